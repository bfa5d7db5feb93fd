"""The steps that evaluate a network: pure, differentiable functions of tensors, equal by value.

A step's attributes are plain numbers, so that a plan is plain data: `compute` is a function of the
tensors and of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Step:
    """A function of one or more tensors, followed by the step's attributes."""

    @staticmethod
    def compute(*inputs: Tensor) -> Tensor:
        """Compute the step from its tensors and its attributes."""
        raise NotImplementedError

    @property
    def attributes(self) -> tuple[object, ...]:
        """The attributes, in the order in which `compute` takes them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        return self.compute(*inputs, *self.attributes)  # type: ignore[arg-type]

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions. Default: none, as of views and copies."""
        return 0

    def moved(self, *inputs: Tensor) -> int:
        """Elements read and written on the way, besides arguments and result. Default: none."""
        return 0

    @property
    def launches(self) -> int:
        """Number of operations on tensors. Default: one."""
        return 1


# ---- views and copies of a tensor --------------------------------------------------------------


@dataclass(frozen=True)
class Arrange(Step):
    """Permute the axes of a tensor, then reshape it: a view where possible, else one copy.

    Attributes:
        permutation: The axes in their new order; empty to keep it.
        shape: The shape after that; None to keep it.
    """

    permutation: tuple[int, ...]
    shape: tuple[int, ...] | None

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, permutation: tuple[int, ...], shape: tuple[int, ...] | None
    ) -> Tensor:
        """Permute and reshape."""
        if permutation:
            tensor = tensor.permute(permutation)
        return tensor if shape is None else tensor.reshape(shape)


@dataclass(frozen=True)
class Expand(Step):
    """View a tensor as so many equal ones.

    Attributes:
        sizes: Sizes of the axes in front.
    """

    sizes: tuple[int, ...]

    @staticmethod
    def compute(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        """Add the axes."""
        return tensor.expand(*sizes, *tensor.shape)


@dataclass(frozen=True)
class Pad(Step):
    """Add zeros around a tensor.

    Attributes:
        amounts: Before and after each axis, counted from the last.
    """

    amounts: tuple[int, ...]

    @staticmethod
    def compute(tensor: Tensor, amounts: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        """Add zeros."""
        return F.pad(tensor, amounts)


@dataclass(frozen=True)
class Slice(Step):
    """View every so-many-th position along an axis.

    Attributes:
        axis: The axis.
        start: First position.
        count: Number of positions.
        stride: Their distance.
    """

    axis: int
    start: int
    count: int
    stride: int

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, axis: int, start: int, count: int, stride: int
    ) -> Tensor:
        """View the positions."""
        if stride == 1:
            return tensor.narrow(axis, start, count)
        stop = start + (count - 1) * stride + 1
        return tensor[(slice(None),) * axis + (slice(start, stop, stride),)]


@dataclass(frozen=True)
class Window(Step):
    """View an axis through sliding windows: two axes, kernel and output position, replace it.

    Attributes:
        axis: The axis.
        start: First position of the first window.
        kernel_size: Positions in a window.
        output_size: Number of windows.
        stride: Distance of windows.
        dilation: Distance of positions in a window.
    """

    axis: int
    start: int
    kernel_size: int
    output_size: int
    stride: int
    dilation: int

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor,
        axis: int,
        start: int,
        kernel_size: int,
        output_size: int,
        stride: int,
        dilation: int,
    ) -> Tensor:
        """View the windows."""
        span = (kernel_size - 1) * dilation + 1
        used = (output_size - 1) * stride + span
        windows = tensor.narrow(axis, start, used).unfold(axis, span, stride)
        if dilation > 1:
            windows = windows[..., ::dilation]
        return windows.movedim(-1, axis)


@dataclass(frozen=True)
class Flip(Step):
    """Reverse an axis of a tensor.

    Attributes:
        axis: The axis.
    """

    axis: int

    @staticmethod
    def compute(tensor: Tensor, axis: int) -> Tensor:  # type: ignore[override]
        """Reverse the axis."""
        return tensor.flip(axis)


@dataclass(frozen=True)
class Gather(Step):
    """Take positions along an axis of a tensor, given as a second tensor of integers.

    Attributes:
        axis: The axis.
    """

    axis: int

    @staticmethod
    def compute(tensor: Tensor, source: Tensor, axis: int) -> Tensor:  # type: ignore[override]
        """Take the positions."""
        return tensor.index_select(axis, source)


# ---- their adjoints ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Scatter(Step):
    """Put the positions of an axis at a distance from each other, zeros elsewhere.

    The adjoint of `Slice`, also of one that reaches beyond its tensor: position `p` is put at
    `p * stride + start`, and left out if that is not within the new axis.

    Attributes:
        axis: The axis.
        start: Where the first position is put.
        stride: Distance of the positions.
        size: Size of the new axis.
    """

    axis: int
    start: int
    stride: int
    size: int

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, axis: int, start: int, stride: int, size: int
    ) -> Tensor:
        """Put the positions into zeros."""
        shape = tensor.shape
        result = tensor.new_zeros((*shape[:axis], size, *shape[axis + 1 :]))
        first, count = _inside(shape[axis], start, stride, size)
        if count > 0:
            target = Slice.compute(result, axis, first * stride + start, count, stride)
            target.copy_(tensor.narrow(axis, first, count))
        return result


@dataclass(frozen=True)
class Fold(Step):
    """Sum two axes into one, along which their windows overlap: the adjoint of `Window`.

    Kernel position `k` of window `o` is added at `o * stride + k * dilation - padding`, and left
    out if that is not within the new axis, which takes the place of the windows' axis.

    Attributes:
        kernel_axis: Axis of the kernel positions.
        output_axis: Axis of the windows.
        stride: Distance of windows.
        dilation: Distance of positions in a window.
        padding: Positions before the new axis, which the first window begins with.
        size: Size of the new axis.
    """

    kernel_axis: int
    output_axis: int
    stride: int
    dilation: int
    padding: int
    size: int

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor,
        kernel_axis: int,
        output_axis: int,
        stride: int,
        dilation: int,
        padding: int,
        size: int,
    ) -> Tensor:
        """Add one strided slice for each kernel position."""
        shape = list(tensor.shape)
        shape[output_axis] = size
        del shape[kernel_axis]
        result = tensor.new_zeros(shape)
        axis = output_axis - (kernel_axis < output_axis)
        for k, windows in enumerate(tensor.unbind(kernel_axis)):
            start = k * dilation - padding
            first, count = _inside(windows.shape[axis], start, stride, size)
            if count > 0:
                target = Slice.compute(result, axis, first * stride + start, count, stride)
                target.add_(windows.narrow(axis, first, count))
        return result

    def flops(self, *inputs: Tensor) -> int:
        """Additions."""
        return inputs[0].numel()


def _inside(count: int, start: int, stride: int, size: int) -> tuple[int, int]:
    """First of `count` positions `p` with `0 <= p * stride + start < size`, and their number."""
    first = max(0, -(start // stride))
    return first, min(count, (size - 1 - start) // stride + 1) - first


@dataclass(frozen=True)
class Collect(Step):
    """Add the positions of an axis up where a second tensor of integers says: `Gather`'s adjoint.

    Attributes:
        axis: The axis.
        size: Size of the new axis.
    """

    axis: int
    size: int

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, source: Tensor, axis: int, size: int
    ) -> Tensor:
        """Add the positions up."""
        shape = tensor.shape
        result = tensor.new_zeros((*shape[:axis], size, *shape[axis + 1 :]))
        return result.index_add(axis, source, tensor)

    def flops(self, *inputs: Tensor) -> int:
        """Additions."""
        return inputs[0].numel()


# ---- arithmetic --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apply(Step):
    """Multiply a matrix to an axis of a tensor; the matrix's other axis takes its place.

    Attributes:
        axis: The axis of the tensor.
        transpose: Whether the matrix's first axis is the one that is summed over.
    """

    axis: int
    transpose: bool

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, matrix: Tensor, axis: int, transpose: bool
    ) -> Tensor:
        """Multiply."""
        if transpose:
            matrix = matrix.mT
        if tensor.is_contiguous():
            return _apply(matrix, tensor, axis)
        # In the order in which they lie in memory (channels last, say), axes merge without a copy.
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        result = _apply(matrix, tensor.permute(order), order.index(axis))
        return result.permute([order.index(axis) for axis in range(tensor.ndim)])

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions."""
        tensor, matrix = inputs
        return 2 * tensor.numel() * matrix.numel() // tensor.shape[self.axis]


def _apply(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    shape = tensor.shape
    before, after = shape[:axis], shape[axis + 1 :]
    if not after:
        return tensor @ matrix.mT
    slices = tensor.reshape(before.numel(), shape[axis], after.numel())
    return (matrix @ slices).reshape(*before, len(matrix), *after)


@dataclass(frozen=True)
class Sum(Step):
    """Sum a tensor over axes.

    Attributes:
        axes: The axes.
    """

    axes: tuple[int, ...]

    @staticmethod
    def compute(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        """Sum."""
        return tensor.sum(axes)

    def flops(self, *inputs: Tensor) -> int:
        """Additions."""
        return inputs[0].numel()


@dataclass(frozen=True)
class Scale(Step):
    """Multiply a tensor by a number.

    Attributes:
        factor: The number.
    """

    factor: float

    @staticmethod
    def compute(tensor: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        """Multiply."""
        return tensor * factor

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications."""
        return inputs[0].numel()


@dataclass(frozen=True)
class Multiply(Step):
    """Multiply a tensor elementwise with one that has all of its indices, or fewer.

    Attributes:
        shape: Shape of the second, with ones for the axes that it lacks.
    """

    shape: tuple[int, ...]

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, other: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """Multiply."""
        return tensor * other.reshape(shape)

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications."""
        return inputs[0].numel()


@dataclass(frozen=True)
class Product(Step):
    """Multiply matrices `[batch, rows, sum]` and `[batch, sum, columns]`, and reshape the result.

    Attributes:
        left: Whether the first lies in memory the other way round, `[batch, sum, rows]`.
        right: Whether the second does, `[batch, columns, sum]`.
        shape: Shape of the result.
    """

    left: bool
    right: bool
    shape: tuple[int, ...]

    @staticmethod
    def compute(  # type: ignore[override]
        first: Tensor, second: Tensor, left: bool, right: bool, shape: tuple[int, ...]
    ) -> Tensor:
        """Multiply and reshape."""
        first = first.mT if left else first
        return torch.bmm(first, second.mT if right else second).reshape(shape)

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions."""
        return 2 * inputs[0].numel() * inputs[1].shape[1 if self.right else 2]


COMPUTE: dict[str, Callable[..., Tensor]] = {
    step.__name__: step.compute for step in Step.__subclasses__()
}
"""What computes each kind of step, by its name."""
