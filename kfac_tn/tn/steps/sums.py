"""Sums over the windows of a tensor, of which KFAC-reduce takes the mean before any product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_tn.tn.steps.step import Step

FEW_COLUMNS = 8
"""Columns of a matrix below which a product of a tall matrix with it takes no less time."""

TALL_WASTE = 1.3
"""How much longer such a product takes than that of large matrices."""


@dataclass(frozen=True)
class Runs:
    """Runs of neighbouring positions along an axis, as a constant of a plan.

    Run number `k` begins at `k * distance - padding` and takes `length` positions, but for those
    outside of the axis.

    Attributes:
        count: Number of runs.
        distance: Positions between the beginnings of neighbouring runs.
        padding: Positions before the axis, with which the first run begins.
        length: Length of each run.
        size: Size of the axis.
    """

    count: int
    distance: int
    padding: int
    length: int
    size: int

    @property
    def ends(self) -> list[tuple[int, int]]:
        """First position of each run, and the first after it, within the axis."""
        starts = [k * self.distance - self.padding for k in range(self.count)]
        clip = lambda position: min(max(position, 0), self.size)  # noqa: E731
        return [(clip(start), clip(start + self.length)) for start in starts]

    @property
    def borders(self) -> tuple[int, int]:
        """How many positions at the beginning and at the end are not in all runs."""
        head = max(start for start, _ in self.ends)
        tail = self.size - min(end for _, end in self.ends)
        return head, min(tail, self.size - head)

    def tensor(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Which positions at the borders are outside of which run: `[count, head + tail]`."""
        head, tail = self.borders
        positions = torch.tensor([*range(head), *range(self.size - tail, self.size)], device=device)
        starts, ends = torch.tensor(self.ends, device=device).reshape(-1, 2).unbind(1)
        outside = (positions < starts[:, None]) | (positions >= ends[:, None])
        return outside.to(dtype)


@dataclass(frozen=True)
class SumRuns(Step):
    """Sum a tensor over runs along some axes: over all of an axis, less what is outside of a run.

    The tensor is read once; besides, only its borders are. Takes a matrix of `Runs` for each axis.

    Attributes:
        axes: The axes.
        borders: Positions at the beginning and at the end of each that are not in all runs.
    """

    axes: tuple[int, ...]
    borders: tuple[tuple[int, int], ...]

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor, *arguments: object
    ) -> Tensor:
        """Sum."""
        *outside, axes, borders = arguments
        return _sum_runs(tensor, (), list(zip(axes, borders, outside, strict=True)))  # type: ignore[call-overload]

    def flops(self, *inputs: Tensor) -> int:
        """Additions."""
        return inputs[0].numel()

    def moved(self, *inputs: Tensor) -> int:
        """The borders, which are no neighbours in memory; what is only summed is read faster."""
        numel = inputs[0].numel()
        return -numel // 2 + sum(
            6 * numel * sum(borders) // inputs[0].shape[axis]
            for axis, borders in zip(self.axes, self.borders, strict=True)
        )

    def launches(self, *inputs: Tensor) -> int:
        """Number of operations on tensors."""
        return 3 * 2 ** len(self.axes)


def _sum_runs(
    x: Tensor, full: tuple[int, ...], runs: list[tuple[int, tuple[int, int], Tensor]]
) -> Tensor:
    """Sum over all of some axes, which stay with size 1, and over runs along others."""
    if not runs:
        return x.sum(full, keepdim=True) if full else x
    *others, (axis, (head, tail), outside) = runs
    total = _sum_runs(x, (*full, axis), others)
    size = x.shape[axis]
    parts = [x.narrow(axis, 0, head)] if head else []
    parts += [x.narrow(axis, size - tail, tail)] if tail else []
    if not parts:
        return total.expand(*total.shape[:axis], len(outside), *total.shape[axis + 1 :])
    border = _sum_runs(torch.cat(parts, axis) if len(parts) > 1 else parts[0], full, others)
    return total - torch.tensordot(border, outside, ([axis], [1])).movedim(-1, axis)


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
