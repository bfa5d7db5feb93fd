"""Gram matrices of windows: the doubled index pattern, without the windows where that pays.

KFAC-expand's input factor is the Gram matrix of an unfolded tensor,

    A[(c, k), (c', k')] = sum_{n, o} x[n, c, o S + k D - P] x[n, c', o S + k' D - P],

two copies of the tensor and of its index patterns that share the output position `o`. Six methods
compute it, and the planner takes the one that it estimates to be fastest:

- `unfolding`: as written, im2col and a matrix product, in chunks;
- `cells`: one product for all blocks `(k, k')` of equal offset `k' - k`, nothing is unfolded;
- `lags`: as `cells`, but all pairs of positions come from the gradient of one convolution's weight,
  and only those at the border, which not all blocks have, are products of cells;
- `spectra`: as `lags`, but the pairs come from products of Fourier transforms at each frequency;
- `correlations`: for one channel or a few, products of stretches of the last axis at each offset
  along the others;
- `positions`: for a few positions, all pairs of them first, summed over windows after.

A tensor without windows (of a pointwise convolution, or a linear layer) is the first method's
simplest case.
"""

from kfac_tn.tn.gram.step import METHODS, WindowGram
from kfac_tn.tn.gram.windows import Windows

__all__ = ["METHODS", "WindowGram", "Windows"]
