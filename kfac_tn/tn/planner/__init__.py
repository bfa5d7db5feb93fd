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

from kfac_tn.tn.network import Network
from kfac_tn.tn.planner.draft import Instruction, Source, Value
from kfac_tn.tn.planner.patterns import Patterns
from kfac_tn.tn.planner.products import Products

__all__ = ["STRATEGIES", "Instruction", "Planner", "Source"]

STRATEGIES = (("fold", "spread"), ("spread",), (), ("fold", "spread", "cells"))
"""What patterns may become besides views. The cheapest of these alternatives is taken."""


class Planner(Patterns, Products):
    """Turns a network into steps, under one of the strategies.

    Attributes:
        result: Slot of the result. For the others see `Draft`.
    """

    def __init__(self, network: Network, strategy: Iterable[str]) -> None:
        super().__init__(network, strategy)
        self._view_patterns()
        folds = self._set_folds_aside()
        self._spread_patterns()
        self._load(self.patterns)
        self.values = [self._sum(value) for value in self.values]
        self._absorb_matrices()
        self._contract()
        self._fold(folds)
        self._finish()

    def _finish(self) -> None:
        """Bring the result into its shape, and note when each slot is needed last."""
        (value,) = self.values
        scaled = Value(self._scaled(value.slot), value.indices)
        self.result = self._arrange(scaled, self.network.output_indices, self.network.shape)
        needed = {self.result}
        for instruction in reversed(self.instructions):
            if instruction.slot in needed:
                needed.update(instruction.inputs)
        self.instructions = [step for step in self.instructions if step.slot in needed]
        last_use = {i: at for at, step in enumerate(self.instructions) for i in step.inputs}
        self.instructions = [
            Instruction(
                s.step, s.inputs, s.slot, tuple(i for i in {*s.inputs} if last_use[i] == at)
            )
            for at, s in enumerate(self.instructions)
        ]
