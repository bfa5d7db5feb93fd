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
from math import prod

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
    "spectra": ("fold", "spread", "spectra"),
    "runs": ("fold", "spread", "unfolding", "runs"),
    "joint": ("fold", "spread", "unfolding", "joint"),
    "tensors": ("tensors",),
    "convolution": (),
}
"""What patterns become besides views, and tensors multiplied with themselves: by name.

- `unfolding`: patterns are folds, or windows over what is spread into zeros; Gram matrices of
  windows are computed by im2col, in chunks.
- `spread`: no folds. `matrices`: no windows over zeros either, patterns are matrices of zeros and
  ones.
- `cells`, `correlations`, `positions`, `lags`, `spectra`: as the first, and Gram matrices by these
  methods of `kfac_tn.tn.gram`.
- `runs`: as the first, and sums over windows along the outermost axis are sums of whole rows, less
  some at the borders; `joint`: they are products with one matrix for all axes.
- `tensors`: no views either, all patterns are tensors of zeros and ones. Two operands then meet
  before any window is seen: of kernels that see most of a small input, each pair of positions once.
- `convolution`: the network is a convolution or its derivative, computed by torch's own.

An algorithm applies where it leads to other steps than those before it.
"""

CONTRACTIONS = ("unfolding", "spread", "matrices")
"""The algorithms that are what the network says: pairwise products of its tensors."""


class Planner(Patterns, Products):
    """Turns a network into steps, under one of the strategies."""

    def __init__(self, network: Network, strategy: Iterable[str]) -> None:
        super().__init__(network, strategy)
        if "tensors" not in self.strategy:
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
        network: The network, with whole operands: which views are worth it is for the planner.
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
    "spectra": ("pair",),
    "runs": ("sum",),
    "joint": ("sum",),
    "tensors": ("meeting",),
}
"""What a network must have for a part of an algorithm to make a difference."""


MOST_MET, LEAST_MET = 2, 2**22
"""Elements of a product of operands that windows are to see: per element of theirs; at any rate."""


@lru_cache(maxsize=512)
def _kinds(network: Network) -> frozenset[str]:
    """Whether an operand occurs twice, a pattern is summed over, two operands meet at patterns."""
    operands = [node.symbol for node in network.nodes if isinstance(node.symbol, Operand)]
    patterns = [node.symbol for node in network.nodes if isinstance(node.symbol, IndexPattern)]
    kinds = {"pair"} if len(set(operands)) < len(operands) else set()
    if any(pattern.summed for pattern in patterns):
        kinds.add("sum")
    if len(operands) == len(set(operands)) == 2 and _meet(network):
        kinds.add("meeting")
    return frozenset(kinds)


def _meet(network: Network) -> bool:
    """Whether a pattern connects two operands that can be multiplied before, within its memory."""
    first, second = (set(n.indices) for n in network.nodes if isinstance(n.symbol, Operand))
    summed = (first & second) - set(network.output_indices)
    patterns = (set(n.indices) for n in network.nodes if isinstance(n.symbol, IndexPattern))
    if not summed or not any(p & first and p & second for p in patterns):
        return False
    elements = lambda indices: prod(network.size[index] for index in indices)  # noqa: E731
    operands = elements(first) + elements(second)
    return elements((first | second) - summed) <= max(MOST_MET * operands, LEAST_MET)
