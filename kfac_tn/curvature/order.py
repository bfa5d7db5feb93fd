"""Whether rows of a layer are in the order of the examples, which models may change on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_tn.curvature.calls import Call, Calls, Contributions


class Order:
    """What each example's gradient would be if it were larger, by a factor of its own.

    Takes one more backward pass. A row that isn't larger by its example's factor, when gradients
    arrive as they are, is of another example, or of several: a model that sorts its examples and
    puts its outputs back has them so, say.

    Args:
        calls: The calls.
        column: What is to be back-propagated.
    """

    def __init__(self, calls: Calls, column: Tensor) -> None:
        count = len(calls)
        half = column.dtype.itemsize < 4  # which doesn't reach as far, and is rounded more
        spread = 8.0 if half else 20.0
        self._exponents = torch.linspace(-spread / 2, spread / 2, count, dtype=torch.float64)
        self._tolerance = max(spread / (2 * count), 0.05 if half else 1e-3)
        self._norms: dict[Call, Tensor] = {}
        if count > 1:  # a single example can't be mistaken for another
            factors = self._exponents.exp2().to(column).view(-1, *(1,) * (column.ndim - 1))
            calls.backward(column * factors, self._receive)

    def _receive(self, name: str, attribute: str, contributions: Contributions) -> None:
        for call, g in contributions:
            self._norms[call] = _norms(g)

    def holds(self, contributions: Contributions) -> bool:
        """Whether each row of these is its own example's, or zero."""
        return all(self._is_own(call, g) for call, g in contributions)

    def _is_own(self, call: Call, g: Tensor) -> bool:
        if len(self._exponents) == 1:
            return True
        norms = _norms(g)
        larger = self._norms.get(call, torch.zeros_like(norms))
        off = (larger.log2() - norms.log2() - self._exponents.to(norms)).abs()
        return bool(((off <= self._tolerance) | ((norms == 0) & (larger == 0))).all())


def _norms(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g.flatten(1), dim=1)
