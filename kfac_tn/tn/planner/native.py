"""Networks that are a convolution, or its derivative in the image or the kernel: torch computes it.

A convolution connects three tensors: an image, which holds the input positions of all patterns, a
kernel and a result, which hold their legs. Two of them are operands, the third is what the network
computes. Where windows lie side by side, patterns have been simplified to composite axes, or to
nothing: they are put back first. Every other index then has its role by which of the three hold it:
all of them a group, image and result the batch, image and kernel the input channels, kernel and
result the output ones.
"""

from __future__ import annotations

from kfac_tn.tn import steps
from kfac_tn.tn.names import fresh
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Node, Operand, Scalar
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.planner.draft import Draft, Source, Value
from kfac_tn.tn.planner.patterns import pattern_of

MOST_DIMENSIONS = 3
"""Spatial dimensions that torch's convolutions have at most."""

Axis = tuple[IndexPattern, str, str, str]
"""A spatial dimension: its pattern, and its index in the image, the kernel (if any), the result."""


Sizes = tuple[int, ...]


class NotAConvolutionError(Exception):
    """The network is something else."""


class NativePlanner(Draft):
    """Turns a network that is a convolution into steps.

    Raises:
        NotAConvolutionError: If it isn't one.
    """

    def __init__(self, network: Network) -> None:
        network = untiled(network)
        super().__init__(network, ())
        for node in network.nodes:
            known = isinstance(node.symbol, Operand | Scalar)
            if not known and node not in self.patterns:
                raise NotAConvolutionError
        if len(self.values) != 2 or len(self.patterns) > MOST_DIMENSIONS:
            raise NotAConvolutionError
        if self.values[0].slot == self.values[1].slot:
            raise NotAConvolutionError  # a Gram matrix: `kfac_tn.tn.gram` saves half of it
        self.axes: list[Axis] = []
        if self.patterns:
            self._find_roles()
        else:
            self._guess_roles()
        self._find_axes()
        self._convolve()

    def _find_roles(self) -> None:
        """Which tensor is the image, the kernel, the result; the output is None."""
        held: list[tuple[set[str], Value | None]] = [
            (set(value.indices), value) for value in self.values
        ]
        held.append((set(self.output), None))

        def holder(index: str) -> int:
            found = [at for at, (indices, _) in enumerate(held) if index in indices]
            others = [n for n in self.patterns if index in n.indices]
            if len(found) != 1 or len(others) != 1:
                raise NotAConvolutionError
            return found[0]

        roles: set[tuple[int, ...]] = set()
        for node in self.patterns:
            pattern = pattern_of(node)
            if len(node.indices) < 3:  # a slice of every so-many-th position
                if pattern.axes != "oi" or pattern.wraps:
                    raise NotAConvolutionError
                output, image = node.indices
                first, last = holder(image), holder(output)
                if first == last:
                    raise NotAConvolutionError
                roles.add((first, 3 - first - last, last))
                self.axes.append((pattern, image, "", output))
                continue
            kernel, output, image = node.indices
            at = tuple(map(holder, (image, kernel, output)))
            if roles and at not in roles:
                # The legs of a pattern play the same role.
                kernel, output = output, kernel
                at = at[0], at[2], at[1]
                pattern = IndexPattern(
                    pattern.output_size,
                    pattern.kernel_size,
                    pattern.input_size,
                    pattern.dilation,
                    pattern.stride,
                    pattern.padding,
                    pattern.padding_mode,
                )
            roles.add(at)
            self.axes.append((pattern, image, kernel, output))
        if len(roles) != 1 or len(set(*roles)) != 3:
            raise NotAConvolutionError
        (order,) = roles
        self._cast([held[at][1] for at in order])

    def _guess_roles(self) -> None:
        """The same without patterns: kernels of size 1, the channels of which come second."""
        tensors = [*self.values, None]
        starts = [(self.output if v is None else v.indices)[:1] for v in tensors]
        alone = [at for at, start in enumerate(starts) if starts.count(start) == 1]
        if len(alone) != 1 or not all(starts):
            raise NotAConvolutionError  # image and result begin with the examples
        kernel = tensors.pop(alone[0])
        channel = (self.output if kernel is None else kernel.indices)[-1]
        tensors.sort(key=lambda v: channel not in (self.output if v is None else v.indices))
        self._cast([tensors[0], kernel, tensors[1]])

    def _cast(self, tensors: list[Value | None]) -> None:
        self.tensors = tensors
        self.held = [self.output if v is None else v.indices for v in tensors]

    def _find_axes(self) -> None:
        """The roles of the other indices."""
        image, kernel, result = map(set, self.held)
        spatial = {index for _, *indices in self.axes for index in indices} - {""}
        others = [i for i in dict.fromkeys((*self.held[0], *self.held[2])) if i not in spatial]
        if (image | kernel | result) - spatial - set(others):
            raise NotAConvolutionError  # a kernel's own index
        if any((i in image) + (i in kernel) + (i in result) < 2 for i in others):
            raise NotAConvolutionError
        self.groups = tuple(i for i in others if i in image & kernel & result)
        self.inputs = tuple(i for i in others if i not in result)
        self.outputs = tuple(i for i in others if i not in image)
        batch = [i for i in others if i not in kernel]
        # Rows behind the channels (a 1 x 7 kernel's, say) stay where they are: a kernel of size 1.
        order = self.held[0]
        first = min((order.index(index) for _, index, *_ in self.axes), default=len(order))
        last = max((order.index(i) for i in self.inputs), default=first)
        for i in [i for i in batch if order.index(i) > min(first, last)]:
            if len(self.axes) < MOST_DIMENSIONS:
                size = self.size[i]
                self.axes.append((IndexPattern(1, size, size), i, "", i))
                batch.remove(i)
        if not self.axes:
            raise NotAConvolutionError
        self.batch = tuple(batch)
        self.axes.sort(key=lambda axis: order.index(axis[1]))

    def _convolve(self) -> None:
        """Lay the operands out as torch has them, convolve, and undo it."""
        elements = self._elements
        groups, inputs, outputs = map(elements, (self.groups, self.inputs, self.outputs))
        images, kernels, results = zip(*(indices for _, *indices in self.axes), strict=True)
        kernels = tuple(filter(None, kernels))
        kernel_size = tuple(pattern.kernel_size for pattern, *_ in self.axes)
        orders = (
            (*self.batch, *self.groups, *self.inputs, *images),
            (*self.groups, *self.outputs, *self.inputs, *kernels),
            (*self.batch, *self.groups, *self.outputs, *results),
        )
        count = elements(self.batch)
        shapes = (
            (count, groups * inputs, *self._shape(images)),
            (groups * outputs, inputs, *kernel_size),
            (count, groups * outputs, *self._shape(results)),
        )
        image, kernel, result = (
            None if value is None else self._arrange(value, order, shape)
            for value, order, shape in zip(self.tensors, orders, shapes, strict=True)
        )
        stride = tuple(pattern.stride for pattern, *_ in self.axes)
        dilation = tuple(pattern.dilation for pattern, *_ in self.axes)
        if image is None:
            assert kernel is not None
            assert result is not None
            slot = self._transposed(self._scaled(kernel), result, stride, dilation, groups)
            order = orders[0]
        else:
            image, padding = self._pad(image)
            options = (stride, padding, dilation, groups)
            if kernel is not None:
                slot = self._step(steps.Convolve(*options), image, self._scaled(kernel))
                order = orders[2]
            else:
                assert result is not None
                step = steps.ConvolveBackward(*options, kernel_size)
                slot = self._scaled(self._step(step, image, result))
                order = orders[1]
        slot = self._step(steps.Arrange((), self._shape(order)), slot)
        self._finish(Value(slot, order))

    def _pad(self, slot: int) -> tuple[int, tuple[int, ...]]:
        """Zeros around the image, by torch if it can, or whatever the padding mode says."""
        padding, amounts = [], [0] * (2 * len(self.axes))
        for axis, (pattern, *_) in enumerate(self.axes):
            before, after = pattern.overhang
            span = (pattern.kernel_size - 1) * pattern.dilation + 1
            outputs = (pattern.input_size + 2 * before - span) // pattern.stride + 1
            padding.append(0)
            if pattern.wraps:
                slot = self._step(steps.Gather(axis + 2), slot, self._keep(Source(pattern)))
            elif before >= 0 and outputs == pattern.output_size:
                padding[-1] = before
            else:
                skip, end = max(-before, 0), pattern.input_size + min(after, 0)
                slot = self._step(steps.Slice(axis + 2, skip, end - skip, 1), slot)
                at = 2 * (len(self.axes) - 1 - axis)
                amounts[at : at + 2] = max(before, 0), max(after, 0)
        if any(amounts):
            slot = self._step(steps.Pad(tuple(amounts)), slot)
        return slot, tuple(padding)

    def _transposed(
        self, kernel: int, result: int, stride: Sizes, dilation: Sizes, groups: int
    ) -> int:
        """Convolve with the adjoint, and cut or fill to the size of the image."""
        overhangs = [pattern.overhang for pattern, *_ in self.axes]
        fits = [
            not pattern.wraps
            and before >= 0
            and 0 <= before - after < max(pattern.stride, pattern.dilation)
            for (pattern, *_), (before, after) in zip(self.axes, overhangs, strict=True)
        ]
        padding = tuple(b if fit else 0 for fit, (b, _) in zip(fits, overhangs, strict=True))
        extra = tuple(b - a if fit else 0 for fit, (b, a) in zip(fits, overhangs, strict=True))
        step = steps.ConvolveTransposed(stride, padding, dilation, groups, extra)
        slot = self._step(step, result, kernel)
        amounts = [0] * (2 * len(self.axes))
        for axis, ((pattern, *_), fit) in enumerate(zip(self.axes, fits, strict=True), start=2):
            before, after = pattern.overhang
            if pattern.wraps:
                source = self._keep(Source(pattern))
                slot = self._step(steps.Collect(axis, pattern.input_size), slot, source)
            elif not fit:
                count = pattern.input_size - max(-before, 0) - max(-after, 0)
                slot = self._step(steps.Slice(axis, max(before, 0), count, 1), slot)
                at = 2 * (len(self.axes) + 1 - axis)
                amounts[at : at + 2] = max(-before, 0), max(-after, 0)
        return self._step(steps.Pad(tuple(amounts)), slot) if any(amounts) else slot


def untiled(network: Network) -> Network:
    """Put patterns back in the place of composite axes: what `kfac_tn.tn.rewrite.tile` has undone.

    An axis `(o k)` of one of the three tensors becomes one index that a pattern leads to, if one of
    the others holds `o`, and the other `k`, or the positions that are cropped from it.
    """
    operands = [node for node in network.nodes if isinstance(node.symbol, Operand)]
    if len(operands) != 2:
        return network
    for node in (*operands, None):
        axes = network.output if node is None else node.axes
        for at, axis in enumerate(axes):
            tile = _tile(network, *axis) if len(axis) == 2 else None
            if tile is None:
                continue
            pattern, leg, crop = tile
            (new,) = fresh(axis[:1], network.size)
            joined = (*axes[:at], (new,), *axes[at + 1 :])
            nodes = [n if n is not node else Node(n.symbol, joined) for n in network.nodes]
            nodes = [n for n in nodes if n != crop]
            nodes.append(Node(pattern, ((leg,), axis[:1], (new,))))
            output = joined if node is None else network.output
            sizes = {**network.size, new: pattern.input_size}
            return untiled(Network.build(nodes, output, sizes))
    return network


def _tile(
    network: Network, output: str, kernel: str
) -> tuple[IndexPattern, str, Node | None] | None:
    """The pattern that an axis is made up of, the kernel's index, and the crop that it includes."""
    crop, leg, dilation, padding = None, kernel, 1, 0
    for node in network.nodes:
        if isinstance(node.symbol, IndexPattern) and node.indices[-1:] == (kernel,):
            if not (node.symbol.selects and node.symbol.axes == "ki"):
                return None
            crop, leg = node, node.indices[0]
            dilation, padding = node.symbol.dilation, node.symbol.padding
    tensors = [n.indices for n in network.nodes if isinstance(n.symbol, Operand)]
    held = [
        [index in indices for index in (output, kernel, leg)]
        for indices in (network.output_indices, *tensors)
    ]
    alone = crop is None  # then the kernel holds the very index
    if sorted(held) != sorted([[True, True, alone], [True, False, False], [False, alone, True]]):
        return None
    count, width = network.size[output], network.size[kernel]
    pattern = IndexPattern(network.size[leg], count, count * width, width, dilation, padding)
    return pattern, leg, crop
