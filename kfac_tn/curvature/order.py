"""Whether rows of a layer are in the order of the examples, which models may change on the way."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from kfac_tn.curvature.calls import Call, Calls, Contributions

MOVES = re.compile("Index|Gather|Scatter|Sort|Topk|Masked|Take|Flip|Roll|Rot90|Embedding")
"""Derivatives of what may give rows another order, by the names of autograd's nodes."""

PARTS = re.compile("Select|Slice|Split|Unbind|Narrow|Chunk")
"""Of those that may take rows one by one, to be put together again."""

LEFT = {"MmBackward0": "_saved_self_sym_sizes", "AddmmBackward0": "_saved_mat1_sym_sizes"}
"""Where the shape of a product's first matrix is."""


def may_move_rows(outputs: Tensor) -> bool:
    """Whether anything is done on the way to outputs that can move rows by what they contain.

    What moves them by their number alone does so with a few examples, too, and is found there.
    """
    seen, waiting = set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        sources = [source for source, _ in node.next_functions]
        of_leaf = all(s is None or s.name().endswith("AccumulateGrad") for s in sources)
        name = node.name()
        if isinstance(node, BackwardCFunction) or (MOVES.search(name) and not of_leaf):
            return True
        if name in LEFT and tuple(getattr(node, LEFT[name])) == (len(outputs),) * 2:
            return True  # which may be a permutation
        # Of the first one of several nothing is known without unpacking it.
        product = name in ("BmmBackward0", "BaddbmmBackward0")
        if product and node._input_metadata[0].shape[1] == len(outputs):
            return True
        if PARTS.match(name) and getattr(node, "_saved_dim", 0) == 0:
            whole = getattr(node, "_saved_self_sym_sizes", None) or (len(node._input_metadata),)
            if whole[0] % max(1, len(outputs)) == 0:
                return True
        waiting += sources
    return False


def find_mixed(calls: Calls) -> None:
    """Have parameters differentiated example by example to whom rows of several give gradients.

    ``Calls.verify`` sees that of one example, and what moves or mixes rows by what they contain may
    leave that one where it is: looked for here, with two more backward passes, where there is such.
    """
    if len(calls) == 1 or not may_move_rows(calls.outputs):
        return
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(calls.outputs.shape, generator=generator).to(calls.outputs)
    order = Order(calls, column)

    def receive(name: str, attribute: str, contributions: Contributions) -> None:
        if not order.holds_in_any_order(contributions):
            calls.unknown.add(name)

    calls.backward(column, receive)


class Order:
    """What each example's gradient would be if it were larger, by a factor of its own.

    Takes one more backward pass. A row that isn't larger by its example's factor, when gradients
    arrive as they are, is of another example, or of several: a model that sorts its examples and
    puts its outputs back has them so, say.

    Args:
        calls: The calls.
        column: What is to be back-propagated.
        needed: Whether anything can have moved rows; if not, there is no pass.
    """

    def __init__(self, calls: Calls, column: Tensor, needed: bool = True) -> None:
        count = len(calls)
        half = column.dtype.itemsize < 4  # which doesn't reach as far, and is rounded more
        spread = 8.0 if half else 20.0
        self._exponents = torch.linspace(-spread / 2, spread / 2, count, dtype=torch.float64)
        # At most half of the way to the next one's, if rounding doesn't take more.
        self._tolerance = max(min(spread / (2 * count), 0.05), 0.05 if half else 1e-3)
        self._norms: dict[Call, Tensor] = {}
        self._known = count == 1 or not needed  # a single example can't be mistaken for another
        if not self._known:
            factors = self._exponents.exp2().to(column).view(-1, *(1,) * (column.ndim - 1))
            calls.backward(column * factors, self._receive)

    def _receive(self, name: str, attribute: str, contributions: Contributions) -> None:
        for call, g in contributions:
            self._norms[call] = _norms(g)

    def holds(self, contributions: Contributions) -> bool:
        """Whether each row of these is its own example's, or zero."""
        return self._known or all(self._is_own(call, g) for call, g in contributions)

    def holds_in_any_order(self, contributions: Contributions) -> bool:
        """Whether each row of these is one example's, and none has two; of several calls, its own.

        That is all that sums over examples need.
        """
        if self._known or len(contributions) > 1:
            return self.holds(contributions)
        ((call, g),) = contributions
        exponents, rows = self._larger(call, g)
        exponents = exponents[rows].sort().values
        nearest = torch.bucketize(exponents, (self._exponents[1:] + self._exponents[:-1]) / 2)
        off = (exponents - self._exponents[nearest]).abs()
        return bool((off <= self._tolerance).all() and (nearest.diff() > 0).all())

    def _is_own(self, call: Call, g: Tensor) -> bool:
        exponents, rows = self._larger(call, g)
        return bool(((exponents - self._exponents).abs() <= self._tolerance)[rows].all())

    def _larger(self, call: Call, g: Tensor) -> tuple[Tensor, Tensor]:
        """By which power of two each row is larger, and which of them aren't zero."""
        norms = _norms(g)
        larger = self._norms.get(call, torch.zeros_like(norms))
        exponents = (larger.log2() - norms.log2()).to(self._exponents)
        return exponents, ((norms != 0) | (larger != 0)).to(self._exponents.device)


def _norms(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g.flatten(1), dim=1)
