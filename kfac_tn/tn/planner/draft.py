"""What the planner works on: slots, and the tensors that are to be in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import TypeAlias

from kfac_tn.tn import steps
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Constant, Node, Operand, Scalar
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.steps import Step


@dataclass(frozen=True)
class Source:
    """The positions along a padded axis, as integers: a constant that `Gather` and `Collect` take.

    Attributes:
        pattern: The pattern whose input is padded.
    """

    pattern: IndexPattern


PlanConstant: TypeAlias = Constant | Source | steps.Runs | steps.JointMatrix
"""What is in a slot before the first step, besides operands."""


@dataclass(frozen=True)
class Instruction:
    """One step of a plan.

    Attributes:
        step: What to compute.
        inputs: Slots that hold its arguments.
        slot: Slot for its result.
        done: Slots that no later step needs.
    """

    step: Step
    inputs: tuple[int, ...]
    slot: int
    done: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"[{self.slot}] = {self.step} of {', '.join(f'[{i}]' for i in self.inputs)}"


@dataclass(frozen=True)
class Value:
    """A tensor during planning: the slot where it will be, and the index along each axis."""

    slot: int
    indices: tuple[str, ...]
    constant: bool = False


class Draft:
    """A plan in the making: what is computed already, and what is not contracted yet.

    Attributes:
        network: The network.
        strategy: What patterns may become besides views.
        output: Indices of the result, as long as patterns are set aside with these in their place.
        size: Size of each index.
        dropped: Indices of size 1 that tensors are reshaped to be without.
        operands: Slot, name and shape (one axis per index) of each operand.
        constants: What is in a slot before the first step.
        instructions: The steps in their order.
        values: Tensors not contracted yet.
        patterns: Patterns that are no tensors yet.
        scale: Product of the network's scalars, until it is applied.
        result: Slot of the result.
    """

    result: int

    def __init__(self, network: Network, strategy: Iterable[str]) -> None:
        self.network, self.strategy = network, frozenset(strategy)
        self.size = network.size
        # Indices of size 1 that only operands hold: two copies may differ in nothing else.
        bound = {i for n in network.nodes if not isinstance(n.symbol, Operand) for i in n.indices}
        self.dropped = {i for i, size in network.sizes if size == 1} - bound
        self.output = self._without_dropped(network.output_indices)
        self.slots: dict[object, int] = {}  # what is computed: equal things share a slot
        self.operands: list[tuple[int, str, tuple[int, ...]]] = []
        self.constants: dict[int, PlanConstant] = {}
        self.instructions: list[Instruction] = []
        self.values: list[Value] = []
        self.patterns = [node for node in network.nodes if _is_view(node)]
        scalars = [n.symbol.value for n in network.nodes if isinstance(n.symbol, Scalar)]
        self.scale = float(prod(scalars, start=Fraction(1)))
        self._load(node for node in network.nodes if not _is_view(node))

    def _without_dropped(self, indices: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(index for index in indices if index not in self.dropped)

    def _slot(self, what: object) -> tuple[int, bool]:
        """Slot of something, and whether it is new."""
        new = what not in self.slots
        return self.slots.setdefault(what, len(self.slots)), new

    def _keep(self, constant: PlanConstant) -> int:
        slot, _ = self._slot(constant)
        self.constants[slot] = constant
        return slot

    def _step(self, step: Step, *inputs: int) -> int:
        slot, new = self._slot((step, inputs))
        if new:
            self.instructions.append(Instruction(step, inputs, slot))
        return slot

    def _load(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            indices = self._without_dropped(node.indices)
            shape = self._shape(indices)
            if isinstance(node.symbol, Operand):
                slot, new = self._slot((node.symbol.name, shape))
                if new:
                    self.operands.append((slot, node.symbol.name, shape))
                self.values.append(Value(slot, indices))
            elif not isinstance(node.symbol, Scalar):
                slot = self._keep(node.symbol)
                self.values.append(Value(slot, indices, constant=True))

    def _holders(self, index: str) -> list[Value | Node]:
        held: tuple[Value | Node, ...] = (*self.values, *self.patterns)
        return [holder for holder in held if index in holder.indices]

    def _arrange(self, value: Value, order: tuple[str, ...], shape: tuple[int, ...]) -> int:
        """Slot of a tensor with its axes in another order, and then in another shape."""
        permutation = tuple(value.indices.index(index) for index in order)
        if permutation == tuple(range(len(order))):
            permutation = ()
        reshaped = None if shape == self._shape(order) else shape
        if not permutation and reshaped is None:
            return value.slot
        return self._step(steps.Arrange(permutation, reshaped), value.slot)

    def _scaled(self, slot: int) -> int:
        """Apply the network's scalars, once, where the fewest elements are to be scaled."""
        factor, self.scale = self.scale, 1.0
        return slot if factor == 1 else self._step(steps.Scale(factor), slot)

    def _finish(self, value: Value) -> None:
        """Bring the result into its shape, and note when each slot is needed last."""
        scaled = Value(self._scaled(value.slot), value.indices)
        self.result = self._arrange(
            scaled, self._without_dropped(self.network.output_indices), self.network.shape
        )
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

    def _kept(self, values: Iterable[Value]) -> set[str]:
        """Indices that the result or one of some tensors holds."""
        return set(self.output).union(*(value.indices for value in values))

    def _rank(self, index: str) -> int:
        return self.output.index(index) if index in self.output else len(self.output)

    def _order(self, indices: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(indices, key=self._rank))

    def _shape(self, indices: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.size[index] for index in indices)

    def _elements(self, indices: Iterable[str]) -> int:
        return prod(self.size[index] for index in indices)


def _is_view(node: Node) -> bool:
    """Whether a node is a pattern that can be a view: not summed over more than one position."""
    return isinstance(node.symbol, IndexPattern) and node.symbol.selects
