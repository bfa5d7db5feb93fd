"""Whether each example's gradient is that of its row, in an exact pass over a model's calls."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_tn.curvature.calls import Calls
from kfac_tn.curvature.contributions import Call, Contributions
from kfac_tn.row_order import are_apart, are_own, enlarged, exponents, may_move_rows, norms


def find_mixed(calls: Calls, anyway: bool = False) -> None:
    """Have parameters differentiated example by example to whom rows of several give gradients.

    ``Calls.verify`` sees that of one example, and what moves or mixes rows by what they contain may
    leave that one where it is: looked for here, with two more backward passes, where there is such.

    Args:
        calls: The calls; some may become unknown.
        anyway: Whether to look in any case.
    """
    if len(calls) == 1 or not (anyway or may_move_rows(calls.outputs)):
        return
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(calls.outputs.shape, generator=generator).to(calls.outputs)
    # From below one to above: whoever is mixed in is larger than one's own, before or after.
    column = enlarged(numbers, -0.5 * exponents(numbers, len(calls)))
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
        self._column, self._powers = column, exponents(column, len(calls))
        self._norms: dict[Call, Tensor] = {}
        # A single example can't be mistaken for another.
        self._known = len(calls) == 1 or not needed
        if not self._known:
            calls.backward(enlarged(column, self._powers), self._receive)

    def _receive(self, name: str, attribute: str, contributions: Contributions) -> None:
        for call, g in contributions:
            self._norms[call] = norms(g)

    def holds(self, contributions: Contributions) -> bool:
        """Whether each row of these is its own example's, or zero."""
        return self._known or all(
            are_own(*self._both(call, g), self._powers, self._column) for call, g in contributions
        )

    def holds_in_any_order(self, contributions: Contributions) -> bool:
        """Whether each row of these is one example's, and none has two; of several calls, its own.

        That is all that sums over examples need.
        """
        if self._known or len(contributions) > 1:
            return self.holds(contributions)
        ((call, g),) = contributions
        return are_apart(*self._both(call, g), self._powers, self._column)

    def _both(self, call: Call, g: Tensor) -> tuple[Tensor, Tensor]:
        before = norms(g)
        return before, self._norms.get(call, torch.zeros_like(before))
