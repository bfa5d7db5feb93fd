"""How a network becomes steps: its patterns as views and folds, the rest as matrix products.

A pattern says `i = o * stride + k * dilation - padding`. It is a tensor of zeros and ones, but to
multiply with it takes no multiplication. Which step it becomes depends on what holds its indices:

- a tensor that holds `i` is viewed through windows (or slices, if just one of `k` and `o` is left);
- a tensor that holds both `k` and `o` is folded: strided slices of it are added up;
- a tensor that holds one of them is put at a distance into zeros, and viewed through windows.

The last two compete: to fold last takes more memory, to spread first takes more multiplications.
Only what is none of these, such as a pattern that has been summed over, is a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Operand
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.planner.draft import Draft, Instruction, PlanConstant, Source
from kfac_tn.tn.planner.native import NativePlanner, NotAConvolutionError
from kfac_tn.tn.planner.patterns import Patterns
from kfac_tn.tn.planner.products import Products

__all__ = [
    "ALGORITHMS",
    "CONTRACTIONS",
    "Draft",
    "Instruction",
    "PlanConstant",
    "Planner",
    "Source",
    "draft",
]

ALGORITHMS: dict[str, tuple[str, ...]] = {
    "unfolding": ("fold", "spread", "unfolding"),
    "spread": ("spread", "unfolding"),
    "matrices": ("unfolding",),
    "cells": ("fold", "spread", "cells"),
    "correlations": ("fold", "spread", "correlations"),
    "positions": ("fold", "spread", "positions"),
    "lags": ("fold", "spread", "lags"),
    "runs": ("fold", "spread", "unfolding", "runs"),
    "joint": ("fold", "spread", "unfolding", "joint"),
    "convolution": (),
}
"""What patterns become besides views, and tensors multiplied with themselves: by name.

- `unfolding`: patterns are folds, or windows over what is spread into zeros; Gram matrices of
  windows are computed by im2col, in chunks.
- `spread`: no folds. `matrices`: no windows over zeros either, patterns are matrices of zeros and
  ones.
- `cells`, `correlations`, `positions`, `lags`: as the first, and Gram matrices by these methods of
  `kfac_tn.tn.gram`.
- `runs`: as the first, and sums over windows along the outermost axis are sums of whole rows, less
  some at the borders; `joint`: they are products with one matrix for all axes.
- `convolution`: the network is a convolution or its derivative, computed by torch's own.

An algorithm applies where it leads to other steps than those before it.
"""

CONTRACTIONS = ("unfolding", "spread", "matrices")
"""The algorithms that are what the network says: pairwise products of its tensors."""


class Planner(Patterns, Products):
    """Turns a network into steps, under one of the strategies."""

    def __init__(self, network: Network, strategy: Iterable[str]) -> None:
        super().__init__(network, strategy)
        self._view_patterns()
        folds = self._set_folds_aside()
        self._spread_patterns()
        self._load(self.patterns)
        self.values = [self._sum(value) for value in self.values]
        self._absorb_jointly()
        self._absorb_matrices()
        self._contract()
        self._fold(folds)
        (value,) = self.values
        self._finish(value)


def draft(network: Network, algorithm: str) -> Draft | None:
    """Turn a network into steps by one of the algorithms.

    Args:
        network: The network.
        algorithm: One of `ALGORITHMS`.

    Returns:
        The steps; None if the network isn't what the algorithm is for.
    """
    if algorithm == "convolution":
        try:
            return NativePlanner(network)
        except NotAConvolutionError:
            return None
    strategy = ALGORITHMS[algorithm]
    needed = {kind for flag in strategy for kind in NEEDS.get(flag, ())}
    return Planner(network, strategy) if needed <= _kinds(network) else None


NEEDS = {
    "cells": ("pair",),
    "correlations": ("pair",),
    "positions": ("pair",),
    "lags": ("pair",),
    "runs": ("sum",),
    "joint": ("sum",),
}
"""What a network must have for a part of an algorithm to make a difference."""


@lru_cache(maxsize=512)
def _kinds(network: Network) -> frozenset[str]:
    """Whether an operand occurs twice, and whether a pattern is summed over."""
    operands = [node.symbol for node in network.nodes if isinstance(node.symbol, Operand)]
    patterns = [node.symbol for node in network.nodes if isinstance(node.symbol, IndexPattern)]
    kinds = {"pair"} if len(set(operands)) < len(operands) else set()
    if any(pattern.summed for pattern in patterns):
        kinds.add("sum")
    return frozenset(kinds)
