"""Sums over the windows of a tensor, of which KFAC-reduce takes the mean before any product."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.steps.step import Step

FEW_COLUMNS = 8
"""Columns of a matrix below which a product of a tall matrix with it takes no less time."""

TALL_WASTE = 1.3
"""How much longer such a product takes than that of large matrices."""

SHORT_ROW = 4
"""Elements that follow each other in memory, of which it takes twice as long to sum rows."""


@dataclass(frozen=True)
class Runs:
    """Runs of positions along an axis at equal distances, as a constant of a plan.

    Run number `k` begins at `k * distance - padding` and takes `length` positions, `step` from one
    to the next, but for those outside of the axis. So it is all positions of its class, those that
    leave its remainder when divided by `step`, less some at the borders.

    Attributes:
        count: Number of runs.
        distance: Positions between the beginnings of neighbouring runs.
        padding: Positions before the axis, with which the first run begins.
        length: Positions in each run.
        step: Distance of a run's positions.
        size: Size of the axis.
    """

    count: int
    distance: int
    padding: int
    length: int
    step: int
    size: int

    @property
    def starts(self) -> list[int]:
        """First position of each run."""
        return [k * self.distance - self.padding for k in range(self.count)]

    @property
    def borders(self) -> tuple[int, int]:
        """Positions at the beginning and at the end that aren't in all runs of their class.

        Those that are left behind the last of as many positions as there are classes count, too.
        """
        head = max(0, max(self.starts) - self.step + 1)
        tail = self.size - min(self.starts) - self.length * self.step
        head = min(head, self.size)
        return head, min(max(tail, self.size % self.step), self.size - head)

    def tensor(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """What each run takes of the sums of classes and of the positions at the borders.

        Returns:
            `[count, step + head + tail]`: 1 for its class; of positions, what that lacks or has
            too much.
        """
        head, tail = self.borders
        positions = torch.tensor([*range(head), *range(self.size - tail, self.size)], device=device)
        starts = torch.tensor(self.starts, device=device)[:, None]
        of_class = (positions - starts) % self.step == 0
        inside = (positions >= starts) & (positions < starts + self.length * self.step)
        summed = positions < self.size // self.step * self.step
        lacking = (of_class & inside).to(dtype) - (of_class & summed).to(dtype)
        own = (torch.arange(self.step, device=device) - starts) % self.step == 0
        return torch.cat([own.to(dtype), lacking], 1)


@dataclass(frozen=True)
class SumClasses(Step):
    """Sum a tensor over classes of positions along an axis; behind the sums put its borders.

    The tensor is read once, in the order in which it lies in memory.

    Attributes:
        axis: The axis.
        step: Distance of the positions of a class: so many there are.
        borders: Positions at the beginning and at the end.
    """

    axis: int
    step: int
    borders: tuple[int, int]

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, axis: int, step: int, borders: tuple[int, int]
    ) -> Tensor:
        """Sum."""
        (head, tail), size = borders, tensor.shape[axis]
        rows = tensor.narrow(axis, 0, size // step * step).unflatten(axis, (-1, step))
        parts = [rows.sum(axis)]
        if head:
            parts.append(tensor.narrow(axis, 0, head))
        if tail:
            parts.append(tensor.narrow(axis, size - tail, tail))
        return torch.cat(parts, axis) if len(parts) > 1 else parts[0]

    def flops(self, *inputs: Tensor) -> int:
        """Additions."""
        return inputs[0].numel()

    def moved(self, *inputs: Tensor) -> int:
        """What is only summed is read faster, unless it comes in short rows."""
        tensor = inputs[0]
        row = self.step * prod(tensor.shape[self.axis + 1 :])
        short = tensor.numel() * SHORT_ROW // row if row > 1 else 0  # of one, the axis is the row
        return short - tensor.numel() // 2

    def launches(self, *inputs: Tensor) -> int:
        """Number of operations on tensors."""
        return 6


@dataclass(frozen=True)
class JointMatrix:
    """The Kronecker product of matrices, as a constant of a plan.

    Attributes:
        factors: Constants whose tensors are matrices.
    """

    factors: tuple[object, ...]

    def tensor(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The product, `[prod(rows), prod(columns)]`."""
        first, *others = (factor.tensor(dtype, device) for factor in self.factors)  # type: ignore[attr-defined]
        for other in others:
            first = torch.kron(first, other)
        return first


@dataclass(frozen=True)
class ApplyJointly(Step):
    """Multiply a matrix to several neighbouring axes of a tensor at once.

    Attributes:
        axis: The first of the axes.
        count: Their number.
        shape: What takes their place.
    """

    axis: int
    count: int
    shape: tuple[int, ...]

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, matrix: Tensor, axis: int, count: int, shape: tuple[int, ...]
    ) -> Tensor:
        """Multiply."""
        before, after = tensor.shape[:axis], tensor.shape[axis + count :]
        if after.numel() == 1:
            result = tensor.reshape(before.numel(), -1) @ matrix.mT
        else:
            result = matrix @ tensor.reshape(before.numel(), matrix.shape[1], after.numel())
        return result.reshape(*before, *shape, *after)

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions."""
        return 2 * inputs[0].numel() * len(inputs[1])

    def work(self, *inputs: Tensor) -> float:
        """A product with few columns takes as long as with some dozens."""
        return TALL_WASTE * 2 * inputs[0].numel() * max(len(inputs[1]), FEW_COLUMNS)

    def by_blas(self, *inputs: Tensor) -> bool:
        """Always: the matrix is small."""
        return True
