"""From a network to the steps that evaluate it, planned once and cached.

Three things make the steps fast:

- An index pattern that meets a tensor in its input positions is no matrix product but a strided
  view of the padded tensor: no flops, and no dense pattern.
- A small matrix that shrinks a tensor is applied at once, the one that shrinks it most first.
- Equal steps are one step. The copies in a Gram matrix are equal up to the names of their indices,
  so everything up to the last product is computed once.

What remains is contracted pairwise, as batched matrix products, in the order that opt_einsum finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import prod

import torch
from opt_einsum import paths
from torch import Tensor

from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Operand, Scalar
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.steps import Apply, Arrange, Gather, Pad, Product, Scale, Step, Sum, Window


@dataclass(frozen=True)
class Cost:
    """What an evaluation costs.

    Attributes:
        flops: Multiplications and additions.
        peak_memory: Largest number of elements held at once, besides operands and constants.
    """

    flops: int
    peak_memory: int


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


@dataclass(frozen=True, eq=False)
class Plan:
    """Steps that evaluate a network; every intermediate tensor has a slot.

    Attributes:
        operands: Slot, name and shape (one axis per index) of each operand.
        constants: Slots filled before evaluation.
        instructions: The steps in their order. The last one makes the result.
    """

    operands: tuple[tuple[int, str, tuple[int, ...]], ...]
    constants: Mapping[int, Tensor]
    instructions: tuple[Instruction, ...]

    def __call__(self, operands: Mapping[str, Tensor]) -> Tensor:
        """Evaluate on operands that `Network.check` has accepted."""
        *_, slots = self.run(operands)
        return slots[self.instructions[-1].slot]

    def run(self, operands: Mapping[str, Tensor]) -> Iterator[dict[int, Tensor]]:
        """Evaluate step by step.

        Args:
            operands: The operands that `Network.check` has accepted.

        Yields:
            After each step, all slots that are filled.
        """
        slots = dict(self.constants)
        for slot, name, shape in self.operands:
            slots[slot] = operands[name].reshape(shape)
        for instruction in self.instructions:
            slots[instruction.slot] = instruction.step(*[slots[i] for i in instruction.inputs])
            yield slots
            for i in instruction.done:
                del slots[i]


@lru_cache(maxsize=256)
def plan(network: Network, dtype: torch.dtype, device: torch.device) -> Plan:
    """Plan the evaluation of a network. The plans used last are kept.

    Args:
        network: The network, evaluated as it is.
        dtype: Type of its operands, hence of its constants.
        device: Where its operands are.

    Returns:
        The plan, to be called with the operands.
    """
    # Constants outlive this call: they must not belong to the mode of whoever calls first.
    with torch.inference_mode(False), torch.no_grad():
        return _Planner(network, dtype, device).plan()


@lru_cache(maxsize=256)
def cost(network: Network) -> Cost:
    """Find out what evaluating a network costs, without evaluating it.

    Args:
        network: The network, as it is.

    Returns:
        Its cost.
    """
    device = torch.device("meta")
    operands = {name: torch.empty(s, device=device) for name, s in network.operands.items()}
    recipe = plan(network, torch.float32, device)
    flops = peak = 0
    # Views share the storage of what they view, so it is storages that count.
    given = [t.untyped_storage()._cdata for t in (*operands.values(), *recipe.constants.values())]
    for slots, instruction in zip(recipe.run(operands), recipe.instructions, strict=True):
        flops += instruction.step.flops(*[slots[i] for i in instruction.inputs])
        storages = [tensor.untyped_storage() for tensor in slots.values()]
        held = {s._cdata: s.nbytes() for s in storages if s._cdata not in given}
        peak = max(peak, sum(held.values()) // torch.float32.itemsize)
    return Cost(flops, peak)


@dataclass(frozen=True)
class _Value:
    """A tensor during planning: the slot where it will be, and the index along each axis."""

    slot: int
    indices: tuple[str, ...]
    constant: bool = False


class _Planner:
    """Turns a network into a plan. `values` are the tensors not contracted yet."""

    def __init__(self, network: Network, dtype: torch.dtype, device: torch.device) -> None:
        self.network, self.dtype, self.device = network, dtype, device
        self.output, self.size = network.output_indices, network.size
        self.slots: dict[object, int] = {}  # what is computed: equal things share a slot
        self.operands: list[tuple[int, str, tuple[int, ...]]] = []
        self.constants: dict[int, Tensor] = {}
        self.instructions: list[Instruction] = []
        scalars = [n.symbol.value for n in network.nodes if isinstance(n.symbol, Scalar)]
        self.scale = float(prod(scalars, start=Fraction(1)))
        self.values: list[_Value] = []

    def plan(self) -> Plan:
        """Make the plan."""
        self._load_operands()
        self._absorb_patterns()
        self._absorb_matrices()
        self._contract()
        last_use = {i: at for at, step in enumerate(self.instructions) for i in step.inputs}
        instructions = [
            Instruction(
                s.step, s.inputs, s.slot, tuple(i for i in {*s.inputs} if last_use[i] == at)
            )
            for at, s in enumerate(self.instructions)
        ]
        return Plan(tuple(self.operands), self.constants, tuple(instructions))

    # ---- slots ----------------------------------------------------------------------------------

    def _slot(self, what: object) -> tuple[int, bool]:
        """Slot of something, and whether it is new."""
        new = what not in self.slots
        return self.slots.setdefault(what, len(self.slots)), new

    def _keep(self, what: object, tensor: Tensor) -> int:
        slot, _ = self._slot(what)
        self.constants[slot] = tensor
        return slot

    def _step(self, step: Step, *inputs: int) -> int:
        slot, new = self._slot((step, inputs))
        if new:
            self.instructions.append(Instruction(step, inputs, slot))
        return slot

    # ---- stages ---------------------------------------------------------------------------------

    def _load_operands(self) -> None:
        for node in self.network.nodes:
            if isinstance(node.symbol, Operand):
                shape = tuple(self.size[index] for index in node.indices)
                slot, new = self._slot((node.symbol.name, shape))
                if new:
                    self.operands.append((slot, node.symbol.name, shape))
                self.values.append(_Value(slot, node.indices))

    def _absorb_patterns(self) -> None:
        """Turn patterns into views where they meet just one operand; make the others dense."""
        attached: dict[int, list[tuple[IndexPattern, tuple[str, ...]]]] = {}
        dense = []
        for node in self.network.nodes:
            symbol = node.symbol
            if isinstance(symbol, IndexPattern) and not symbol.summed:
                partner = self._partner(*node.indices)
                if partner is not None:
                    attached.setdefault(partner, []).append((symbol, node.indices))
                    continue
            if not isinstance(symbol, Operand | Scalar):
                tensor = symbol.tensor(self.dtype, self.device)
                dense.append(_Value(self._keep(symbol, tensor), node.indices, constant=True))
        for at, patterns in attached.items():
            self.values[at] = self._view(self.values[at], patterns)
        self.values += dense

    def _partner(self, k: str, o: str, i: str) -> int | None:
        """The operand that a pattern can be a view of: the only other holder of its input index.

        A pattern whose other indices only exist to be summed over is no view: it is cheaper summed.
        """
        holders = [at for at, value in enumerate(self.values) if i in value.indices]
        if i in self.output or len(self.network.holders(i)) != 2 or len(holders) != 1:
            return None
        if any(len(self.network.holders(j)) < 2 and j not in self.output for j in (k, o)):
            return None
        return None if {k, o} & set(self.values[holders[0]].indices) else holders[0]

    def _view(self, value: _Value, patterns: list[tuple[IndexPattern, tuple[str, ...]]]) -> _Value:
        """Pad a tensor (by zeros: along all axes in one copy), and view it through windows."""
        slot, indices = value.slot, list(value.indices)
        zeros = [0] * (2 * len(indices))
        for pattern, (_, _, i) in patterns:
            before, after = pattern.overhang
            axis = indices.index(i)
            if pattern.padding_mode == "zeros":
                at = 2 * (len(indices) - 1 - axis)  # the last axis comes first
                zeros[at : at + 2] = before, max(after, 0)
            elif before > 0 or after > 0:
                source = self._keep((pattern, "source"), pattern.source(self.device))
                slot = self._step(Gather(axis), slot, source)
        if any(zeros):
            slot = self._step(Pad(tuple(zeros)), slot)
        for pattern, (k, o, i) in patterns:
            axis = indices.index(i)
            sizes = pattern.kernel_size, pattern.output_size
            slot = self._step(Window(axis, *sizes, pattern.stride, pattern.dilation), slot)
            indices[axis : axis + 1] = [k, o]
        return _Value(slot, tuple(indices))

    def _absorb_matrices(self) -> None:
        """Apply constant matrices that shrink a tensor, the one with the largest saving first."""
        while candidates := list(self._shrinking()):
            # Among equals the last axis first: its entries are neighbours in memory.
            tensor, matrix, index, other = max(
                candidates,
                key=lambda c: (self.size[c[2]] / self.size[c[3]], c[0].indices.index(c[2])),
            )
            step = Apply(tensor.indices.index(index), transpose=matrix.indices[0] == index)
            slot = self._step(step, tensor.slot, matrix.slot)
            indices = tuple(other if i == index else i for i in tensor.indices)
            self.values[self.values.index(tensor)] = _Value(slot, indices)
            self.values.remove(matrix)

    def _shrinking(self) -> Iterator[tuple[_Value, _Value, str, str]]:
        """Tensors with a matrix to apply, the index it is applied to and the one it leaves."""
        for matrix in self.values:
            if not (matrix.constant and len(matrix.indices) == 2):
                continue
            for index, other in (matrix.indices, matrix.indices[::-1]):
                holders = [v for v in self.values if index in v.indices and v is not matrix]
                if index in self.output or len(holders) != 1:
                    continue
                (tensor,) = holders
                shrinks = self.size[other] <= self.size[index]
                if shrinks and not tensor.constant and other not in tensor.indices:
                    yield tensor, matrix, index, other

    def _contract(self) -> None:
        """Contract what is left pairwise, and bring the result into its shape."""
        self.values = [self._sum(value) for value in self.values]
        terms = [frozenset(value.indices) for value in self.values]
        for pair in paths.auto(terms, frozenset(self.output), self.size):
            taken = [self.values.pop(at) for at in sorted(pair, reverse=True)]
            while len(taken) > 1:
                first, second = taken.pop(), taken.pop()
                taken.append(self._product(first, second, [*self.values, *taken]))
            self.values += taken
        (value,) = self.values
        permutation = tuple(value.indices.index(index) for index in self.output)
        slot = self._scaled(value.slot)
        slot = self._step(Arrange(permutation, self.network.shape), slot)

    def _sum(self, value: _Value) -> _Value:
        """Sum a tensor over those of its indices that nothing else holds."""
        kept = self._kept(other for other in self.values if other is not value)
        axes = tuple(axis for axis, index in enumerate(value.indices) if index not in kept)
        if not axes:
            return value
        indices = tuple(index for index in value.indices if index in kept)
        return _Value(self._step(Sum(axes), value.slot), indices)

    def _product(self, a: _Value, b: _Value, rest: list[_Value]) -> _Value:
        """Multiply two tensors as batched matrices `[batch, free, contracted]`."""
        larger = max(a, b, key=lambda value: self._elements(value.indices))
        shared = [i for i in larger.indices if i in a.indices and i in b.indices]
        kept = self._kept(rest)
        batch = self._order(i for i in shared if i in kept)
        contracted = tuple(i for i in shared if i not in kept)
        free = [(self._order(i for i in v.indices if i not in shared), v) for v in (a, b)]
        # The matrix whose indices come first in the result is the left one.
        free.sort(key=lambda pair: min(map(self._rank, pair[0]), default=0))
        slots = []
        for own, value in free:
            groups = (batch, own, contracted)
            permutation = tuple(value.indices.index(i) for group in groups for i in group)
            shape = tuple(map(self._elements, groups))
            slots.append(self._step(Arrange(permutation, shape), value.slot))
        indices = (*batch, *free[0][0], *free[1][0])
        if not rest:
            smaller = min((0, 1), key=lambda at: self._elements(free[at][1].indices))
            if self._elements(free[smaller][1].indices) < self._elements(indices):
                slots[smaller] = self._scaled(slots[smaller])
        shape = tuple(self.size[index] for index in indices)
        return _Value(self._step(Product(shape), *slots), indices)

    # ---- small helpers --------------------------------------------------------------------------

    def _scaled(self, slot: int) -> int:
        """Apply the network's scalars, once, where the fewest elements are to be scaled."""
        factor, self.scale = self.scale, 1.0
        return slot if factor == 1 else self._step(Scale(factor), slot)

    def _kept(self, values: Iterable[_Value]) -> set[str]:
        """Indices that the result or one of some tensors holds."""
        return set(self.output).union(*(value.indices for value in values))

    def _rank(self, index: str) -> int:
        return self.output.index(index) if index in self.output else len(self.output)

    def _order(self, indices: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(indices, key=self._rank))

    def _elements(self, indices: Iterable[str]) -> int:
        return prod(self.size[index] for index in indices)
