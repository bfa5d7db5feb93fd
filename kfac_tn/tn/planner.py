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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from opt_einsum import paths

from kfac_tn.tn import steps
from kfac_tn.tn.cells import WindowGram, WindowSizes
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Constant, Node, Operand, Scalar
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.steps import Step

OPTIMAL_TERMS = 6
"""Up to so many tensors the best order of contraction is searched, beyond it a good one."""

LOOP_COLUMNS = 32
"""Products of fewer columns than that are better made in one."""

STRATEGIES = (("fold", "spread"), ("spread",), (), ("fold", "spread", "cells"))
"""What patterns may become besides views. The cheapest of these alternatives is taken."""


@dataclass(frozen=True)
class Source:
    """The positions along a padded axis, as integers: a constant that `Gather` and `Collect` take.

    Attributes:
        pattern: The pattern whose input is padded.
    """

    pattern: IndexPattern


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


@dataclass(frozen=True)
class _Value:
    """A tensor during planning: the slot where it will be, and the index along each axis."""

    slot: int
    indices: tuple[str, ...]
    constant: bool = False


class Planner:
    """Turns a network into steps. `values` and `patterns` are what is not contracted yet.

    Attributes:
        operands: Slot, name and shape (one axis per index) of each operand.
        constants: What is in a slot before the first step.
        instructions: The steps in their order. The last one makes the result.
    """

    def __init__(self, network: Network, strategy: Iterable[str]) -> None:
        self.network, self.strategy = network, frozenset(strategy)
        self.output, self.size = network.output_indices, network.size
        self.slots: dict[object, int] = {}  # what is computed: equal things share a slot
        self.operands: list[tuple[int, str, tuple[int, ...]]] = []
        self.constants: dict[int, Constant | Source] = {}
        self.instructions: list[Instruction] = []
        scalars = [n.symbol.value for n in network.nodes if isinstance(n.symbol, Scalar)]
        self.scale = float(prod(scalars, start=Fraction(1)))
        self.values: list[_Value] = []
        self.patterns = [node for node in network.nodes if _is_view(node)]
        self.folds: list[Node] = []
        self._load(node for node in network.nodes if not _is_view(node))
        self._view_patterns()
        self._set_folds_aside()
        self._spread_patterns()
        self._load(self.patterns)
        self.values = [self._sum(value) for value in self.values]
        self._absorb_matrices()
        self._contract()
        self._fold()
        self._finish()

    # ---- slots ----------------------------------------------------------------------------------

    def _slot(self, what: object) -> tuple[int, bool]:
        """Slot of something, and whether it is new."""
        new = what not in self.slots
        return self.slots.setdefault(what, len(self.slots)), new

    def _keep(self, constant: Constant | Source) -> int:
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
            shape = tuple(self.size[index] for index in node.indices)
            if isinstance(node.symbol, Operand):
                slot, new = self._slot((node.symbol.name, shape))
                if new:
                    self.operands.append((slot, node.symbol.name, shape))
                self.values.append(_Value(slot, node.indices))
            elif not isinstance(node.symbol, Scalar):
                slot = self._keep(node.symbol)
                self.values.append(_Value(slot, node.indices, constant=True))

    # ---- patterns -------------------------------------------------------------------------------

    def _view_patterns(self) -> None:
        """View tensors through the patterns at whose input they are, as long as there are any.

        A crop in front of a window makes this two rounds.
        """
        while True:
            attached: dict[_Value, list[Node]] = {}
            for node in self.patterns:
                if (value := self._partner(node, node.indices[-1])) is not None:
                    nodes = attached.setdefault(value, [])
                    # Two patterns that share a leg can't both bring it: one of them meets it.
                    if not any(set(node.indices[:-1]) & set(o.indices[:-1]) for o in nodes):
                        nodes.append(node)
            if not attached:
                return
            for value, nodes in attached.items():
                self.values[self.values.index(value)] = self._view(value, nodes)
                self.patterns = [node for node in self.patterns if node not in nodes]

    def _partner(self, node: Node, index: str) -> _Value | None:
        """The operand that alone shares an index with a pattern, and nothing else of it.

        A pattern whose other indices only exist to be summed over is no view: it is cheaper summed.
        """
        others = [other for other in node.indices if other != index]
        if index in self.output or len(self._holders(index)) != 2:
            return None
        if any(len(self._holders(i)) < 2 and i not in self.output for i in others):
            return None
        for value in self.values:
            if index in value.indices and not value.constant:
                return None if set(others) & set(value.indices) else value
        return None

    def _holders(self, index: str) -> list[_Value | Node]:
        held: tuple[_Value | Node, ...] = (*self.values, *self.patterns)
        return [holder for holder in held if index in holder.indices]

    def _view(self, value: _Value, nodes: list[Node]) -> _Value:
        """View a tensor through the patterns of some of its axes, padded once for all of them."""
        slot, indices = value.slot, list(value.indices)
        zeros = [0] * (2 * len(indices))
        start = {}
        for node in nodes:
            pattern, index = _pattern(node), node.indices[-1]
            before, after = pattern.overhang
            axis = indices.index(index)
            start[index] = max(-before, 0)
            if pattern.padding_mode == "zeros":
                at = 2 * (len(indices) - 1 - axis)  # the last axis comes first
                zeros[at : at + 2] = max(before, 0), max(after, 0)
            elif before > 0 or after > 0:
                slot = self._step(steps.Gather(axis), slot, self._keep(Source(pattern)))
                start[index] = 0
        if any(zeros):
            slot = self._step(steps.Pad(tuple(zeros)), slot)
        for node in nodes:
            pattern, (*legs, index) = _pattern(node), node.indices
            axis = indices.index(index)
            if len(legs) == 2:
                sizes = pattern.kernel_size, pattern.output_size
                distances = pattern.stride, pattern.dilation
                slot = self._step(steps.Window(axis, start[index], *sizes, *distances), slot)
            else:
                ((size, distance),) = pattern.legs
                slot = self._step(steps.Slice(axis, start[index], size, distance), slot)
            indices[axis : axis + 1] = legs
        return _Value(slot, tuple(indices))

    def _set_folds_aside(self) -> None:
        """Patterns at the end of the network: what they fold is contracted without them.

        Their input is an index of the result and of nothing else, and the others are not. Until
        they are folded, they are indices of the result in its place.
        """
        if "fold" not in self.strategy:
            return
        found = True
        while found:
            found = False
            for node in self.patterns:
                *legs, index = node.indices
                alone = index in self.output and len(self._holders(index)) == 1
                held = all(leg not in self.output and len(self._holders(leg)) > 1 for leg in legs)
                if alone and held:
                    at = self.output.index(index)
                    self.output = (*self.output[:at], *legs, *self.output[at + 1 :])
                    self.patterns.remove(node)
                    self.folds.append(node)
                    found = True
                    break

    def _fold(self) -> None:
        """Fold what was set aside, the last first: it may be what an earlier one folds."""
        (value,) = self.values
        for node in reversed(self.folds):
            pattern, (*legs, index) = _pattern(node), node.indices
            axes = [value.indices.index(leg) for leg in legs]
            size, padding = self._extent(pattern)
            if len(legs) == 2:
                # One slice for each position of the shorter leg.
                legs_in_order = sorted(zip(pattern.legs, axes, strict=True))
                ((_, dilation), kernel_axis), ((_, stride), output_axis) = legs_in_order
                step: Step = steps.Fold(kernel_axis, output_axis, stride, dilation, padding, size)
                axis = output_axis - (kernel_axis < output_axis)
                indices = [i for at, i in enumerate(value.indices) if at != kernel_axis]
            else:
                ((_, distance),) = pattern.legs
                (axis,) = axes
                step = steps.Scatter(axis, -padding, distance, size)
                indices = list(value.indices)
            indices[axis] = index
            slot = self._collect(self._step(step, value.slot), pattern, axis)
            value = _Value(slot, tuple(indices))
        self.values = [value]

    def _spread_patterns(self) -> None:
        """Put tensors that hold one leg of a pattern into zeros, then view them through windows."""
        if "spread" not in self.strategy:
            return
        for node in list(self.patterns):
            for at, leg in enumerate(node.indices[:-1]):
                value = self._partner(node, leg)
                if value is not None:
                    self.values[self.values.index(value)] = self._spread(value, node, at)
                    self.patterns.remove(node)
                    break

    def _spread(self, value: _Value, node: Node, at: int) -> _Value:
        """From `x[a]` make `y[b, i] = x[a]` where `i = a * A + b * B - padding`, else 0."""
        pattern, (*legs, index) = _pattern(node), node.indices
        axis = value.indices.index(legs[at])
        size, padding = self._extent(pattern)
        _, distance = pattern.legs[at]
        windows: list[str] = []
        slot = value.slot
        if len(legs) == 2:
            # The windows move backwards: make them move forwards, and turn them around after.
            other, other_distance = pattern.legs[1 - at]
            reach = (other - 1) * other_distance
            slot = self._step(steps.Scatter(axis, reach - padding, distance, size + reach), slot)
            slot = self._step(steps.Window(axis, 0, other, size, 1, other_distance), slot)
            slot = self._step(steps.Flip(axis), slot)
            windows = [legs[1 - at]]
        else:
            slot = self._step(steps.Scatter(axis, -padding, distance, size), slot)
        slot = self._collect(slot, pattern, axis + len(windows))
        return _Value(slot, (*value.indices[:axis], *windows, index, *value.indices[axis + 1 :]))

    def _extent(self, pattern: IndexPattern) -> tuple[int, int]:
        """Size of the axis that a pattern leads to, and the padding before it.

        With a padding mode this is the padded axis, which `_collect` then leads back to the input.
        """
        if not pattern.wraps:
            return pattern.input_size, pattern.padding
        before, after = pattern.overhang
        return before + pattern.input_size + after, 0

    def _collect(self, slot: int, pattern: IndexPattern, axis: int) -> int:
        if not pattern.wraps:
            return slot
        source = self._keep(Source(pattern))
        return self._step(steps.Collect(axis, pattern.input_size), slot, source)

    # ---- products -------------------------------------------------------------------------------

    def _absorb_matrices(self) -> None:
        """Apply constant matrices that shrink a tensor, the one with the largest saving first."""
        while candidates := list(self._shrinking()):
            # Among equals the last axis first: its entries are neighbours in memory.
            tensor, matrix, index, other = max(
                candidates,
                key=lambda c: (self.size[c[2]] / self.size[c[3]], c[0].indices.index(c[2])),
            )
            step = steps.Apply(tensor.indices.index(index), matrix.indices[0] == index)
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
        """Contract what is left pairwise."""
        terms = [frozenset(value.indices) for value in self.values]
        search = paths.optimal if len(terms) <= OPTIMAL_TERMS else paths.auto
        for pair in search(terms, frozenset(self.output), self.size):
            taken = [self.values.pop(at) for at in sorted(pair, reverse=True)]
            while len(taken) > 1:
                first, second = taken.pop(), taken.pop()
                taken.append(self._product(first, second, [*self.values, *taken]))
            self.values += taken

    def _sum(self, value: _Value) -> _Value:
        """Sum a tensor over those of its indices that nothing else holds."""
        kept = self._kept(other for other in self.values if other is not value)
        axes = tuple(axis for axis, index in enumerate(value.indices) if index not in kept)
        if not axes:
            return value
        indices = tuple(index for index in value.indices if index in kept)
        return _Value(self._step(steps.Sum(axes), value.slot), indices, value.constant)

    def _product(self, a: _Value, b: _Value, rest: list[_Value]) -> _Value:
        """Multiply two tensors as batched matrices `[batch, free, contracted]`, or elementwise."""
        larger, smaller = sorted((a, b), key=lambda v: self._elements(v.indices), reverse=True)
        shared = [i for i in larger.indices if i in smaller.indices]
        kept = self._kept(rest)
        batch = self._order(i for i in shared if i in kept)
        contracted = tuple(i for i in shared if i not in kept)
        if not contracted and set(smaller.indices) <= set(larger.indices):
            return self._multiply(larger, smaller)
        if "cells" in self.strategy and a.slot == b.slot:
            gram = self._window_gram(a, b, batch, contracted)
            if gram is not None:
                return gram
        own = {v: self._order(i for i in v.indices if i not in shared) for v in (a, b)}
        # The matrix whose indices come first in the result is the left one.
        left, right = sorted((a, b), key=lambda v: min(map(self._rank, own[v]), default=0))
        border = min(map(self._rank, own[right]), default=0)
        lead = tuple(i for i in own[left] if self._rank(i) < border)
        trail = own[left][len(lead) :]
        if own[right] and self._loops(lead, trail, batch, right, left):
            # Say n and o1, o2 around d: a product for each n leaves the result in its order.
            slot = self._step(steps.Expand(self._shape(lead)), right.slot)
            repeated = _Value(slot, (*lead, *right.indices))
            batch, own = self._order((*batch, *lead)), {repeated: own[right], left: trail}
            left, right = repeated, left
        indices = (*batch, *own[left], *own[right])
        slots, turned = [], []
        for value in (left, right):
            # What is innermost in memory stays so, or the copy would be slow.
            inner = next((i for i in reversed(value.indices) if self.size[i] > 1), None)
            turn = inner in own[value]
            groups = (batch, contracted, own[value]) if turn else (batch, own[value], contracted)
            order = tuple(i for group in groups for i in group)
            slots.append(self._arrange(value, order, tuple(map(self._elements, groups))))
            turned.append(turn)
        if not rest:
            light = min((0, 1), key=lambda at: self._elements((left, right)[at].indices))
            if self._elements((left, right)[light].indices) < self._elements(indices):
                slots[light] = self._scaled(slots[light])
        step = steps.Product(turned[0], not turned[1], self._shape(indices))
        return _Value(self._step(step, *slots), indices)

    def _window_gram(
        self, a: _Value, b: _Value, batch: tuple[str, ...], contracted: tuple[str, ...]
    ) -> _Value | None:
        """Multiply windows of a tensor with themselves without making any: see `cells`.

        None if the two are something else, or their windows' positions aren't summed over.
        """
        pairs = list(zip(a.indices, b.indices, strict=True))
        if any((i == j) != (i in batch or i in contracted) for i, j in pairs):
            return None
        made_by = {instruction.slot: instruction for instruction in self.instructions}
        slot = a.slot
        axes: list[tuple[tuple[str, str], WindowSizes | None]] = [(pair, None) for pair in pairs]
        while slot in made_by and isinstance(step := made_by[slot].step, steps.Window):
            (kernel, _), (output, _) = axes[step.axis : step.axis + 2]
            if kernel[0] == kernel[1] or output[0] not in contracted:
                return None
            sizes = (step.start, step.kernel_size, step.output_size, step.stride, step.dilation)
            axes[step.axis : step.axis + 2] = [(kernel, sizes)]
            (slot,) = made_by[slot].inputs
        shared = [at for at, ((i, _), _) in enumerate(axes) if i in batch]
        summed = [at for at, ((i, _), _) in enumerate(axes) if i in contracted]
        spatial = [at for at, (_, window) in enumerate(axes) if window is not None]
        own = [at for at in range(len(axes)) if at not in (*shared, *summed, *spatial)]
        if not spatial:
            return None
        windows = tuple(window for _, window in axes if window is not None)
        gram = WindowGram((tuple(shared), tuple(summed), tuple(spatial), tuple(own)), windows)
        first, second = ([axes[at][0][copy] for at in (*own, *spatial)] for copy in (0, 1))
        indices = (*(axes[at][0][0] for at in shared), *first, *second)
        return _Value(self._step(gram, slot), indices)

    def _loops(
        self,
        lead: tuple[str, ...],
        trail: tuple[str, ...],
        batch: tuple[str, ...],
        small: _Value,
        large: _Value,
    ) -> bool:
        """Whether to make one product for each position of the indices in front, or one in all."""
        if not lead or self._elements(trail) < LOOP_COLUMNS:
            return False
        copied = self._elements(batch) > 1  # else the same matrix is seen in all places
        repeated = self._elements(lead) * self._elements(small.indices)
        return not copied or repeated < self._elements(large.indices)

    def _multiply(self, larger: _Value, smaller: _Value) -> _Value:
        order = tuple(i for i in larger.indices if i in smaller.indices)
        shape = tuple(self.size[i] if i in order else 1 for i in larger.indices)
        slot = self._arrange(smaller, order, self._shape(order))
        return _Value(self._step(steps.Multiply(shape), larger.slot, slot), larger.indices)

    def _finish(self) -> None:
        """Bring the result into its shape, and note when each slot is needed last."""
        (value,) = self.values
        scaled = _Value(self._scaled(value.slot), value.indices)
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

    # ---- small helpers --------------------------------------------------------------------------

    def _arrange(self, value: _Value, order: tuple[str, ...], shape: tuple[int, ...]) -> int:
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

    def _kept(self, values: Iterable[_Value]) -> set[str]:
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


def _pattern(node: Node) -> IndexPattern:
    assert isinstance(node.symbol, IndexPattern)
    return node.symbol
