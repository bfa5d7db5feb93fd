"""The adjoints of views: what they leave out is zero, what they repeat is added up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kfac_tn.tn.steps.step import Step
from kfac_tn.tn.steps.views import Slice


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
        sizes = list(tensor.shape)
        sizes[output_axis] = size
        result = tensor.new_zeros(sizes[:kernel_axis] + sizes[kernel_axis + 1 :])
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
