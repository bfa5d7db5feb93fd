"""The Gram matrix of windows without windows: the doubled index pattern, by offsets and cells.

In the Gram matrix of an unfolded tensor (KFAC-expand's input factor), the block of kernel positions
k and k' is a sum over outputs o of products of two positions, o * stride + k * dilation and
o * stride + k' * dilation. Which pairs of positions these are depends on the *offset* of k' from k
alone; which of them a block takes, on the ends of the range of o. So for each offset, positions
fall into few *cells*, all positions of which belong to the same blocks: an interior, and some at
the border. One product for each cell replaces one for each block: in 2-d with a 3 x 3 kernel and
stride 1, (almost) 13 products of all positions instead of 81, and nothing is unfolded.

With a stride, positions also fall into residue classes, and there are more offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.steps import COMPUTE, Step

WindowSizes = tuple[int, int, int, int, int]
"""Of one axis: first position, kernel size, output size, stride, dilation."""


@dataclass(frozen=True)
class Cell:
    """Pairs of positions along one axis that belong to the same blocks.

    Attributes:
        first: The first position of k's window in the cell.
        second: The first position of k''s.
        count: Number of positions, at the distance of the stride.
        blocks: The pairs (k, k') of kernel positions.
    """

    first: int
    second: int
    count: int
    blocks: tuple[tuple[int, int], ...]


Offset = tuple[int, int, int]
"""Residue classes of the two positions, and their distance in strides."""


@lru_cache(maxsize=512)
def offsets_and_cells(window: WindowSizes) -> dict[Offset, tuple[Cell, ...]]:
    """The cells of one axis, by offset.

    Args:
        window: First position, kernel size, output size, stride, dilation.

    Returns:
        For each offset its cells, in order.

    Example:
        >>> cells = offsets_and_cells((0, 3, 10, 1, 1))  # kernel size 3, 10 outputs
        >>> {offset: [cell.count for cell in c] for offset, c in cells.items() if offset[2] >= 0}
        {(0, 0, 0): [1, 1, 8, 1, 1], (0, 0, 1): [1, 9, 1], (0, 0, 2): [10]}
    """
    start, kernel_size, output_size, stride, dilation = window
    taps = [divmod(k * dilation, stride) for k in range(kernel_size)]
    members: dict[Offset, list[tuple[int, int]]] = {}
    for k, l in product(range(kernel_size), repeat=2):  # noqa: E741 (k' is no name)
        (shift, residue), (other_shift, other_residue) = taps[k], taps[l]
        members.setdefault((residue, other_residue, other_shift - shift), []).append((k, l))
    cells = {}
    for (residue, other_residue, distance), pairs in members.items():
        ranges = {pair: (taps[pair[0]][0], taps[pair[0]][0] + output_size) for pair in pairs}
        cuts = sorted({end for ends in ranges.values() for end in ends})
        found = []
        for low, high in pairwise(cuts):
            inside = tuple(p for p in pairs if ranges[p][0] <= low and high <= ranges[p][1])
            if inside:
                first = start + low * stride + residue
                second = start + (low + distance) * stride + other_residue
                found.append(Cell(first, second, high - low, inside))
        cells[residue, other_residue, distance] = tuple(found)
    return cells


def joint_cells(windows: tuple[WindowSizes, ...]) -> Iterator[tuple[tuple[Cell, ...], bool]]:
    """The cells of several axes; of an offset and its reverse, only one.

    Args:
        windows: Of each axis.

    Yields:
        One cell for each axis, and whether there is a reverse, whose product is the transpose.
    """
    for offsets in product(*(offsets_and_cells(window).items() for window in windows)):
        offset = tuple(o for o, _ in offsets)
        reverse = tuple((second, first, -distance) for first, second, distance in offset)
        if offset >= reverse:
            for cells in product(*(c for _, c in offsets)):
                yield cells, offset != reverse


@dataclass(frozen=True)
class WindowGram(Step):
    """Multiply the windows of a tensor with themselves, summed over all their positions.

    Attributes:
        axes: Of the tensor: those that both copies share and the result keeps, those that are
            summed over, those with windows, and those of which each copy has its own.
        windows: First position, kernel size, output size, stride and dilation, for each axis with
            windows. The result has the axes `[*shared, *own, *kernels, *own, *kernels]`.
    """

    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    windows: tuple[WindowSizes, ...]

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor,
        axes: tuple[tuple[int, ...], ...],
        windows: tuple[WindowSizes, ...],
    ) -> Tensor:
        """Multiply."""
        shapes = [[tensor.shape[axis] for axis in group] for group in axes]
        shared, summed, spatial, own = shapes
        kernels = [kernel_size for _, kernel_size, *_ in windows]
        channels, kernel = prod(own), prod(kernels)
        # Channels last: then a cell is a matrix of positions and channels.
        x = tensor.permute([axis for group in axes for axis in group])
        x = x.reshape(prod(shared), prod(summed), *spatial, channels).contiguous()
        blocks = x.new_zeros(kernel, kernel, len(x), channels, channels)
        for cells, mirrored in joint_cells(windows):
            matrices = []
            for positions in ([c.first for c in cells], [c.second for c in cells]):
                part = x
                for axis, (at, cell, window) in enumerate(
                    zip(positions, cells, windows, strict=True), start=2
                ):
                    part = _every(part, axis, at, cell.count, window[3])
                matrices.append(part.reshape(len(x), -1, channels))
            gram = torch.bmm(matrices[0].mT, matrices[1])
            for pairs in product(*(cell.blocks for cell in cells)):
                k, other = (_ravel(position, kernels) for position in zip(*pairs, strict=True))
                blocks[k, other].add_(gram)
                if mirrored:
                    blocks[other, k].add_(gram.mT)
        result = blocks.permute(2, 3, 0, 4, 1)
        return result.reshape(*shared, *own, *kernels, *own, *kernels)

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions."""
        return 2 * self._rows(*inputs) * self._channels(*inputs)

    def moved(self, *inputs: Tensor) -> int:
        """Elements read and written on the way: copied matrices, products added to blocks."""
        shared = prod(inputs[0].shape[axis] for axis in self.axes[0])
        additions = 3 * self._additions * shared * self._channels(*inputs) ** 2
        return 4 * self._rows(*inputs) + additions

    @property
    def launches(self) -> int:
        """Number of operations on tensors."""
        return self._additions + 3 * sum(1 for _ in joint_cells(self.windows))

    @property
    def _additions(self) -> int:
        return sum(
            prod(len(cell.blocks) for cell in cells) * (1 + mirrored)
            for cells, mirrored in joint_cells(self.windows)
        )

    def _channels(self, *inputs: Tensor) -> int:
        return prod(inputs[0].shape[axis] for axis in self.axes[3])

    def _rows(self, *inputs: Tensor) -> int:
        """Elements of the first matrices of all products."""
        positions = sum(prod(c.count for c in cells) for cells, _ in joint_cells(self.windows))
        others = (axis for group in (0, 1, 3) for axis in self.axes[group])
        return positions * prod(inputs[0].shape[axis] for axis in others)


COMPUTE[WindowGram.__name__] = WindowGram.compute


def _every(tensor: Tensor, axis: int, start: int, count: int, stride: int) -> Tensor:
    if stride == 1:
        return tensor.narrow(axis, start, count)
    stop = start + (count - 1) * stride + 1
    return tensor[(slice(None),) * axis + (slice(start, stop, stride),)]


def _ravel(position: tuple[int, ...], sizes: list[int]) -> int:
    flat = 0
    for at, size in zip(position, sizes, strict=True):
        flat = flat * size + at
    return flat
