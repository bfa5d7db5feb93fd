"""Sums and products."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from kfac_tn.tn import gemm
from kfac_tn.tn.steps.step import WIDTH, Step

SMALL_PRODUCT = 20_000
"""Multiplications that take as long as to begin one of many products of small matrices."""


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

    def work(self, *inputs: Tensor) -> float:
        """But for the last axis, there is a product of small matrices for each slice."""
        last = self.axis == inputs[0].ndim - 1
        slices = 0 if last else prod(inputs[0].shape[: self.axis])
        return self.flops(*inputs) + SMALL_PRODUCT * slices

    def by_blas(self, *inputs: Tensor) -> bool:
        """Always: these matrices are small."""
        return True


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
        return gemm.multiply(first, second.mT if right else second).reshape(shape)

    def moved(self, *inputs: Tensor) -> int:
        """Several products by oneDNN are put together."""
        rows = inputs[0].shape[2 if self.left else 1]
        columns = inputs[1].shape[1 if self.right else 2]
        several = len(inputs[0]) > 1 and gemm.takes(*self._matrices(*inputs))
        return 2 * len(inputs[0]) * rows * columns if several else 0

    def _matrices(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first.mT if self.left else first, second.mT if self.right else second

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions."""
        return 2 * inputs[0].numel() * inputs[1].shape[1 if self.right else 2]

    def work(self, *inputs: Tensor) -> float:
        """Small matrices waste some."""
        rows = inputs[0].shape[2 if self.left else 1]
        columns = inputs[1].shape[1 if self.right else 2]
        waste = max(rows, WIDTH) * max(columns, WIDTH) / (rows * columns)
        return self.flops(*inputs) * waste

    def by_blas(self, *inputs: Tensor) -> bool:
        """Whether they are small, or lie such that they had to be copied."""
        return not gemm.takes(*self._matrices(*inputs))
