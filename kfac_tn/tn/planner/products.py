"""Products of what is left: in which order, and laid out how in memory."""

from __future__ import annotations

from collections.abc import Iterator

from opt_einsum import paths

from kfac_tn.tn import steps
from kfac_tn.tn.gram import METHODS, WindowGram, Windows
from kfac_tn.tn.gram.step import applies
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.planner.draft import Draft, Value

OPTIMAL_TERMS = 6
"""Up to so many tensors the best order of contraction is searched, beyond it a good one."""

LOOP_COLUMNS = 32
"""Products of fewer columns than that are better made in one."""


Pair = tuple[str, str]
"""The same axis of two copies of a tensor."""


class Products(Draft):
    """The part of the planner that makes steps of sums and products."""

    def _absorb_jointly(self) -> None:
        """Apply the matrices that sum windows of one tensor, all at once, in one of two ways."""
        found: dict[Value, list[tuple[int, str, Value, IndexPattern]]] = {}
        for tensor, matrix, index, other in self._shrinking():
            pattern = self.constants.get(matrix.slot)
            if isinstance(pattern, IndexPattern) and matrix.indices == (other, index):
                axis = tensor.indices.index(index)
                if "joint" in self.strategy or ("runs" in self.strategy and _runs(pattern)):
                    found.setdefault(tensor, []).append((axis, other, matrix, pattern))
        for tensor, several in found.items():
            axes, others, matrices, patterns = zip(
                *sorted(several, key=lambda s: s[0]), strict=True
            )
            if "runs" in self.strategy:
                self._sum_classes(tensor, axes[0], others[0], matrices[0], patterns[0])
                continue
            if len(axes) > 1 and axes == tuple(range(axes[0], axes[-1] + 1)):
                joint = self._keep(steps.JointMatrix(patterns))
                step = steps.ApplyJointly(axes[0], len(axes), self._shape(others))
                slot = self._step(step, tensor.slot, joint)
            else:
                continue
            indices = list(tensor.indices)
            for axis, other in zip(axes, others, strict=True):
                indices[axis] = other
            self.values[self.values.index(tensor)] = Value(slot, tuple(indices))
            self.values = [value for value in self.values if value not in matrices]

    def _sum_classes(
        self, tensor: Value, axis: int, other: str, matrix: Value, pattern: IndexPattern
    ) -> None:
        """Sum along an axis what all runs of a class share: what is left is small."""
        runs = _runs(pattern)
        assert runs is not None
        step = steps.SumClasses(axis, runs.step, runs.borders)
        index = f"{tensor.indices[axis]}, classes"
        self.size = {**self.size, index: runs.step + sum(runs.borders)}
        indices = (*tensor.indices[:axis], index, *tensor.indices[axis + 1 :])
        self.values[self.values.index(tensor)] = Value(self._step(step, tensor.slot), indices)
        small = Value(self._keep(runs), (other, index), constant=True)
        self.values[self.values.index(matrix)] = small

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
            self.values[self.values.index(tensor)] = Value(slot, indices)
            self.values.remove(matrix)

    def _shrinking(self) -> Iterator[tuple[Value, Value, str, str]]:
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

    def _sum(self, value: Value) -> Value:
        """Sum a tensor over those of its indices that nothing else holds."""
        kept = self._kept(other for other in self.values if other is not value)
        axes = tuple(axis for axis, index in enumerate(value.indices) if index not in kept)
        if not axes:
            return value
        indices = tuple(index for index in value.indices if index in kept)
        return Value(self._step(steps.Sum(axes), value.slot), indices, value.constant)

    def _product(self, a: Value, b: Value, rest: list[Value]) -> Value:
        """Multiply two tensors as batched matrices `[batch, free, contracted]`, or elementwise."""
        larger, smaller = sorted((a, b), key=lambda v: self._elements(v.indices), reverse=True)
        shared = [i for i in larger.indices if i in smaller.indices]
        kept = self._kept(rest)
        batch = self._order(i for i in shared if i in kept)
        contracted = tuple(i for i in shared if i not in kept)
        if not contracted and set(smaller.indices) <= set(larger.indices):
            return self._multiply(larger, smaller)
        if a.slot == b.slot and self.strategy & METHODS.keys():
            gram = self._window_gram(a, b, batch, contracted, rest)
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
            repeated = Value(slot, (*lead, *right.indices))
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
        return Value(self._step(step, *slots), indices)

    def _window_gram(
        self,
        a: Value,
        b: Value,
        batch: tuple[str, ...],
        contracted: tuple[str, ...],
        rest: list[Value],
    ) -> Value | None:
        """Multiply a tensor, or its windows, with itself in one step: see `kfac_tn.tn.gram`.

        None if the two are something else, or their windows' positions aren't summed over.
        """
        pairs = list(zip(a.indices, b.indices, strict=True))
        if any((i == j) != (i in batch or i in contracted) for i, j in pairs):
            return None
        found = self._behind_windows(a.slot, pairs, contracted)
        if found is None:
            return None
        slot, axes = found
        windows = tuple(window for _, window in axes if window is not None)
        shared = [at for at, ((i, _), w) in enumerate(axes) if w is None and i in batch]
        summed = [at for at, ((i, _), w) in enumerate(axes) if w is None and i in contracted]
        last = [at for at, (_, window) in enumerate(axes) if window is not None]
        own = [at for at in range(len(axes)) if at not in (*shared, *summed, *last)]
        if not windows:
            if not own:
                return None
            # Positions between kernel positions, too: to copy them to the end is fastest.
            last = [at for at in summed if at > min(own)]
            summed = [at for at in summed if at not in last]
        method = next(m for m in METHODS if m in self.strategy)
        if not applies(method, self._elements(axes[at][0][0] for at in own), windows):
            method = "unfolding"
        groups = (tuple(shared), tuple(summed), tuple(own), tuple(last))
        kernels = last if windows else []
        first, second = ([axes[at][0][copy] for at in (*own, *kernels)] for copy in (0, 1))
        indices = (*(axes[at][0][0] for at in shared), *first, *second)
        scale = 1.0
        if not rest:
            scale, self.scale = self.scale, 1.0
        return Value(self._step(WindowGram(groups, windows, method, scale), slot), indices)

    def _behind_windows(
        self, slot: int, pairs: list[Pair], contracted: tuple[str, ...]
    ) -> tuple[int, list[tuple[Pair, Windows | None]]] | None:
        """What a tensor views through windows, whose kernel positions take the windows' place.

        None if the two copies share a kernel position, or not their output positions.
        """
        made_by = {instruction.slot: instruction for instruction in self.instructions}
        axes: list[tuple[Pair, Windows | None]] = [(pair, None) for pair in pairs]
        while slot in made_by and isinstance(step := made_by[slot].step, steps.Window):
            (kernel, _), (output, _) = axes[step.axis : step.axis + 2]
            if kernel[0] == kernel[1] or output[0] not in contracted:
                return None
            sizes = (step.start, step.kernel_size, step.output_size, step.stride, step.dilation)
            span = (sizes[2] - 1) * sizes[3] + (sizes[1] - 1) * sizes[4] + 1
            axes[step.axis : step.axis + 2] = [(kernel, Windows(*sizes, step.start + span))]
            (slot,) = made_by[slot].inputs
        shapes = {operand: shape for operand, _, shape in self.operands}
        if slot in made_by and isinstance(step := made_by[slot].step, steps.Pad):
            (source,) = made_by[slot].inputs
            before, after = step.amounts[-2::-2], step.amounts[-1::-2]
            viewed = [window is not None for _, window in axes]
            if source in shapes and all(
                viewed[at] or not b + e for at, (b, e) in enumerate(zip(before, after, strict=True))
            ):
                # Zeros need not be there: the methods know where they are.
                for at, (pair, window) in enumerate(axes):
                    if window is not None:
                        start, size = window.start - before[at], shapes[source][at]
                        axes[at] = pair, window._replace(start=start, size=size)
                slot = source
        return slot, axes

    def _loops(
        self,
        lead: tuple[str, ...],
        trail: tuple[str, ...],
        batch: tuple[str, ...],
        small: Value,
        large: Value,
    ) -> bool:
        """Whether to make one product for each position of the indices in front, or one in all."""
        if not lead or self._elements(trail) < LOOP_COLUMNS:
            return False
        copied = self._elements(batch) > 1  # else the same matrix is seen in all places
        repeated = self._elements(lead) * self._elements(small.indices)
        return not copied or repeated < self._elements(large.indices)

    def _multiply(self, larger: Value, smaller: Value) -> Value:
        order = tuple(i for i in larger.indices if i in smaller.indices)
        shape = tuple(self.size[i] if i in order else 1 for i in larger.indices)
        slot = self._arrange(smaller, order, self._shape(order))
        return Value(self._step(steps.Multiply(shape), larger.slot, slot), larger.indices)


def _runs(pattern: IndexPattern) -> steps.Runs | None:
    """What a summed pattern sums: positions at equal distances, most of which runs share."""
    legs = {
        "k": (pattern.kernel_size, pattern.dilation),
        "o": (pattern.output_size, pattern.stride),
    }
    if len(pattern.summed) != 1 or pattern.summed == "i" or pattern.wraps:
        return None
    length, step = legs.pop(pattern.summed)
    ((count, distance),) = legs.values()
    runs = steps.Runs(count, distance, pattern.padding, length, step, pattern.input_size)
    left = step + sum(runs.borders)
    return runs if count <= left < pattern.input_size else None
