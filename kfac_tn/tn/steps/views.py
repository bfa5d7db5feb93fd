"""Views and copies of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kfac_tn.tn.steps.step import Step


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
