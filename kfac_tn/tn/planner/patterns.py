"""Patterns as steps: views, folds, and windows over what is spread into zeros."""

from __future__ import annotations

from kfac_tn.tn import steps
from kfac_tn.tn.node import Node
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.planner.draft import Draft, Source, Value
from kfac_tn.tn.steps import Step


class Patterns(Draft):
    """The part of the planner that makes steps of index patterns."""

    def _view_patterns(self) -> None:
        """View tensors through the patterns at whose input they are, as long as there are any.

        A crop in front of a window makes this two rounds.
        """
        while True:
            attached: dict[Value, list[Node]] = {}
            for node in self.patterns:
                if (value := self._partner(node, node.indices[-1])) is not None:
                    nodes = attached.setdefault(value, [])
                    # Two patterns that share a leg can't both bring it: one of them meets it.
                    if not any(set(node.indices[:-1]) & set(o.indices[:-1]) for o in nodes):
                        nodes.append(node)
            if not attached:
                return
            for value, nodes in attached.items():
                # By axis, in whatever order the network has them: what comes of it is the same.
                in_order = sorted(nodes, key=lambda node: value.indices.index(node.indices[-1]))
                self.values[self.values.index(value)] = self._view(value, in_order)
                self.patterns = [node for node in self.patterns if node not in nodes]

    def _partner(self, node: Node, index: str) -> Value | None:
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

    def _view(self, value: Value, nodes: list[Node]) -> Value:
        """View a tensor through the patterns of some of its axes, padded once for all of them."""
        slot, indices = value.slot, list(value.indices)
        zeros = [0] * (2 * len(indices))
        start = {}
        for node in nodes:
            pattern, index = pattern_of(node), node.indices[-1]
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
            *legs, index = node.indices
            axis = indices.index(index)
            slot = self._step(view(pattern_of(node), axis, start[index]), slot)
            indices[axis : axis + 1] = legs
        return Value(slot, tuple(indices))

    def _set_folds_aside(self) -> list[Node]:
        """Patterns at the end of the network: what they fold is contracted without them.

        Their input is an index of the result and of nothing else, and the others are not. Until
        they are folded, they are indices of the result in its place.
        """
        folds: list[Node] = []
        found = "fold" in self.strategy
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
                    folds.append(node)
                    found = True
                    break
        return folds

    def _fold(self, folds: list[Node]) -> None:
        """Fold what was set aside, the last first: it may be what an earlier one folds."""
        (value,) = self.values
        for node in reversed(folds):
            pattern, (*legs, index) = pattern_of(node), node.indices
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
            value = Value(slot, tuple(indices))
        self.values = [value]

    def _spread_patterns(self) -> None:
        """Put tensors that hold one leg of a pattern into zeros, then view them through windows."""
        if "spread" not in self.strategy:
            return
        for node in list(self.patterns):
            legs = enumerate(node.indices[:-1])
            partners = [(at, v) for at, leg in legs if (v := self._partner(node, leg)) is not None]
            if partners:
                # An output's positions, rather than a kernel's: the fewer copies, the better.
                at, value = min(
                    partners,
                    key=lambda p: self._elements(p[1].indices) / self.size[node.indices[p[0]]] ** 2,
                )
                self.values[self.values.index(value)] = self._spread(value, node, at)
                self.patterns.remove(node)

    def _spread(self, value: Value, node: Node, at: int) -> Value:
        """From `x[a]` make `y[b, i] = x[a]` where `i = a * A + b * B - padding`, else 0."""
        pattern, (*legs, index) = pattern_of(node), node.indices
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
        return Value(slot, (*value.indices[:axis], *windows, index, *value.indices[axis + 1 :]))

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


def view(pattern: IndexPattern, axis: int, start: int) -> Step:
    """The step that views an axis through a pattern, whose legs are axes in its place.

    Args:
        pattern: The pattern.
        axis: The axis, padded where the pattern needs it.
        start: Position along the axis where both legs begin.
    """
    if len(pattern.legs) == 2:
        sizes = pattern.kernel_size, pattern.output_size
        return steps.Window(axis, start, *sizes, pattern.stride, pattern.dilation)
    ((size, distance),) = pattern.legs
    return steps.Slice(axis, start, size, distance)


def pattern_of(node: Node) -> IndexPattern:
    """The pattern of a node that has one."""
    assert isinstance(node.symbol, IndexPattern)
    return node.symbol
