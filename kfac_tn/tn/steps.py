"""The steps that evaluate a network: pure, differentiable functions of tensors, equal by value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Step:
    """A function of one or more tensors."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        raise NotImplementedError

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions. Default: none, as of views and copies."""
        return 0


@dataclass(frozen=True)
class Pad(Step):
    """Add zeros around a tensor.

    Attributes:
        amounts: Before and after each axis, counted from the last.
    """

    amounts: tuple[int, ...]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        return F.pad(inputs[0], self.amounts)


@dataclass(frozen=True)
class Gather(Step):
    """Take positions along an axis of a tensor, given as a second tensor of integers.

    Attributes:
        axis: The axis.
    """

    axis: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        return inputs[0].index_select(self.axis, inputs[1])


@dataclass(frozen=True)
class Window(Step):
    """View an axis through sliding windows: two axes, kernel and output position, replace it.

    Attributes:
        axis: The axis.
        kernel_size: Positions in a window.
        output_size: Number of windows.
        stride: Distance of windows.
        dilation: Distance of positions in a window.
    """

    axis: int
    kernel_size: int
    output_size: int
    stride: int
    dilation: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        span = (self.kernel_size - 1) * self.dilation + 1
        used = (self.output_size - 1) * self.stride + span
        windows = inputs[0].narrow(self.axis, 0, used).unfold(self.axis, span, self.stride)
        if self.dilation > 1:
            windows = windows[..., :: self.dilation]
        return windows.movedim(-1, self.axis)


@dataclass(frozen=True)
class Apply(Step):
    """Multiply a matrix to an axis of a tensor; the matrix's other axis takes its place.

    Attributes:
        axis: The axis of the tensor.
        transpose: Whether the matrix's first axis is the one that is summed over.
    """

    axis: int
    transpose: bool

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        tensor, matrix = inputs
        if self.transpose:
            matrix = matrix.mT
        if tensor.is_contiguous():
            return _apply(matrix, tensor, self.axis)
        # In the order in which they lie in memory (channels last, say), axes merge without a copy.
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        result = _apply(matrix, tensor.permute(order), order.index(self.axis))
        return result.permute([order.index(axis) for axis in range(tensor.ndim)])

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions."""
        tensor, matrix = inputs
        return 2 * tensor.numel() * matrix.numel() // tensor.shape[self.axis]


def _apply(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    if not after:
        return tensor @ matrix.mT
    slices = tensor.reshape(before.numel(), tensor.shape[axis], after.numel())
    return (matrix @ slices).reshape(*before, len(matrix), *after)


@dataclass(frozen=True)
class Sum(Step):
    """Sum a tensor over axes.

    Attributes:
        axes: The axes.
    """

    axes: tuple[int, ...]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        return inputs[0].sum(self.axes)

    def flops(self, *inputs: Tensor) -> int:
        """Additions."""
        return inputs[0].numel()


@dataclass(frozen=True)
class Arrange(Step):
    """Permute the axes of a tensor, then reshape it: a view where possible, else one copy.

    Attributes:
        permutation: The axes in their new order.
        shape: The shape after that.
    """

    permutation: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        return inputs[0].permute(self.permutation).reshape(self.shape)


@dataclass(frozen=True)
class Scale(Step):
    """Multiply a tensor by a number.

    Attributes:
        factor: The number.
    """

    factor: float

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        return inputs[0] * self.factor

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications."""
        return inputs[0].numel()


@dataclass(frozen=True)
class Product(Step):
    """Multiply matrices `[batch, rows, sum]` and `[batch, columns, sum]`, and reshape the result.

    Attributes:
        shape: Shape of the result.
    """

    shape: tuple[int, ...]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        return torch.bmm(inputs[0], inputs[1].mT).reshape(self.shape)

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions."""
        return 2 * inputs[0].numel() * inputs[1].shape[1]
