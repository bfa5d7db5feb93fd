"""Windows along an axis, and which pairs of positions meet in the Gram matrix of its windows.

In the Gram matrix, the block of kernel positions k and k' is a sum over outputs o of products of
two positions, o * stride + k * dilation and o * stride + k' * dilation. Which pairs of positions
these are depends on the *offset* of k' from k alone; which of them a block takes, on the ends of
the range of o. So for each offset, positions fall into few *cells*, all positions of which belong
to the same blocks: an interior, and some at the border. One product for each cell replaces one for
each block: in 2-d with a 3 x 3 kernel, padding 1 and stride 1, (almost) 13 products of all
positions instead of 81, and nothing is unfolded. Pairs with a position outside of the axis, a zero,
are left out.

With a stride, positions also fall into residue classes, and there are more offsets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.nn import functional as F


class Windows(NamedTuple):
    """Windows along one axis.

    Attributes:
        start: First position of the first window; negative where windows begin in zeros.
        kernel_size: Positions in a window.
        output_size: Number of windows.
        stride: Distance of windows.
        dilation: Distance of positions in a window.
        size: Size of the axis. Windows may reach beyond it, into zeros.
    """

    start: int
    kernel_size: int
    output_size: int
    stride: int
    dilation: int
    size: int

    @property
    def overhang(self) -> tuple[int, int]:
        """Positions that are needed before and after the axis; negative: not reached."""
        span = (self.output_size - 1) * self.stride + (self.kernel_size - 1) * self.dilation
        return -self.start, self.start + span - (self.size - 1)


def fit(x: Tensor, first_axis: int, windows: tuple[Windows, ...]) -> Tensor:
    """Crop and pad axes of a tensor to exactly the positions that their windows see.

    Args:
        x: The tensor; the axes with windows are its last.
        first_axis: The first axis with windows.
        windows: Of each axis.

    Returns:
        The tensor, a view where no zeros are needed.
    """
    amounts: list[int] = []
    for window in windows:
        amounts[:0] = (max(end, 0) for end in window.overhang)
    if any(amounts):
        x = F.pad(x, amounts)
    for axis, window in enumerate(windows, start=first_axis):
        before, after = window.overhang
        if min(before, after) < 0:
            skip = max(-before, 0)
            x = x.narrow(axis, skip, x.shape[axis] - skip - max(-after, 0))
    return x


def padded_size(windows: tuple[Windows, ...], positions: int) -> int:
    """Positions along all axes, with the zeros that windows see; without windows, as they are."""
    if not windows:
        return positions
    return prod(window.size + sum(max(end, 0) for end in window.overhang) for window in windows)


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


Offset: TypeAlias = tuple[int, int, int]
"""Residue classes of the two positions, and their distance in strides."""


@lru_cache(maxsize=512)
def offsets_and_cells(window: Windows, useless: bool = False) -> dict[Offset, tuple[Cell, ...]]:
    """The cells of one axis, by offset.

    Args:
        window: The axis' windows.
        useless: Whether to return cells that belong to no block, too: together they are all pairs
            of positions within the axis. Default: no.

    Returns:
        For each offset its cells, in order; none where all pairs meet a zero.

    Example:
        >>> cells = offsets_and_cells(Windows(-1, 3, 10, 1, 1, 10))  # kernel size 3, padding 1
        >>> {offset: [cell.count for cell in c] for offset, c in cells.items() if offset[2] >= 0}
        {(0, 0, 0): [1, 8, 1], (0, 0, 1): [9], (0, 0, 2): [8]}
    """
    start, kernel_size, output_size, stride, dilation, size = window
    taps = [divmod(k * dilation, stride) for k in range(kernel_size)]
    members: dict[Offset, list[tuple[int, int]]] = {}
    for k, l in product(range(kernel_size), repeat=2):  # noqa: E741 (k' is no name)
        (shift, residue), (other_shift, other_residue) = taps[k], taps[l]
        members.setdefault((residue, other_residue, other_shift - shift), []).append((k, l))
    cells = {}
    for (residue, other_residue, distance), pairs in members.items():
        firsts, seconds = start + residue, start + other_residue + distance * stride
        # Of these positions, in strides, both are within the axis.
        least = max(-(firsts // stride), -(seconds // stride))
        end = min((size - 1 - firsts) // stride, (size - 1 - seconds) // stride) + 1
        ranges = {pair: (taps[pair[0]][0], taps[pair[0]][0] + output_size) for pair in pairs}
        cuts = {min(max(cut, least), end) for ends in ranges.values() for cut in ends}
        if useless and least < end:
            cuts |= {least, end}
        found = []
        for low, high in pairwise(sorted(cuts)):
            inside = tuple(p for p in pairs if ranges[p][0] <= low and high <= ranges[p][1])
            if inside or useless:
                first, second = firsts + low * stride, seconds + low * stride
                found.append(Cell(first, second, high - low, inside))
        cells[residue, other_residue, distance] = tuple(found)
    return cells


class JointCell(NamedTuple):
    """A cell of each axis, of one offset along all axes.

    Attributes:
        offset: Along each axis.
        cells: One of each axis.
        mirrored: Whether the offset has a reverse, whose products are the transposes.
    """

    offset: tuple[Offset, ...]
    cells: tuple[Cell, ...]
    mirrored: bool

    @property
    def pairs(self) -> int:
        """Number of pairs of positions."""
        return prod(cell.count for cell in self.cells)

    @property
    def blocks(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Pairs of kernel positions, with one number for each axis."""
        for pairs in product(*(cell.blocks for cell in self.cells)):
            first, second = zip(*pairs, strict=True)
            yield first, second


@lru_cache(maxsize=512)
def joint_cells(windows: tuple[Windows, ...], useless: bool = False) -> tuple[JointCell, ...]:
    """The cells of several axes; of an offset and its reverse, only that which leads forward.

    Args:
        windows: Of each axis.
        useless: Whether to return cells that belong to no block, too. Default: no.

    Returns:
        All of them: first those that share cells along the last axes, those of one offset in order.
    """
    found = []
    outer, *inner = windows
    still = (0,) * len(windows)
    for inner_offset, inner_cells in _combinations(tuple(inner), useless):
        for (outer_offset,), (cell,) in _combinations((outer,), useless):
            offset = (outer_offset, *inner_offset)
            way = displacement(offset, windows)
            if way >= still:
                found.append(JointCell(offset, (cell, *inner_cells), way > still))
    return tuple(found)


def displacement(offset: tuple[Offset, ...], windows: tuple[Windows, ...]) -> tuple[int, ...]:
    """What leads from the first position of a pair to the second, along each axis."""
    return tuple(
        second - first + distance * window.stride
        for (first, second, distance), window in zip(offset, windows, strict=True)
    )


def _combinations(
    windows: tuple[Windows, ...], useless: bool
) -> Iterator[tuple[tuple[Offset, ...], tuple[Cell, ...]]]:
    """All offsets along some axes with all of their cells."""
    for found in product(*(offsets_and_cells(window, useless).items() for window in windows)):
        for cells in product(*(cells for _, cells in found)):
            yield tuple(offset for offset, _ in found), cells


class Amounts(NamedTuple):
    """What there is to compute by cells.

    Attributes:
        pairs: Pairs of positions.
        cells: Products of cells.
        copied: Positions along all axes but the first that are copied, for both sides.
        sums: Blocks that are sums over several cells.
        offsets: Offsets along all axes.
        border: Pairs of positions of all cells but the largest of each offset.
    """

    pairs: int
    cells: int
    copied: int
    sums: int
    offsets: int
    border: int


@lru_cache(maxsize=512)
def amounts(windows: tuple[Windows, ...], useless: bool = False) -> Amounts:
    """What there is to compute by cells, for windows along each axis."""
    cells = joint_cells(windows, useless)
    of_offset = Counter(cell.offset for cell in cells)
    largest: dict[object, int] = {}
    for cell in cells:
        largest[cell.offset] = max(cell.pairs, largest.get(cell.offset, 0))
    blocks = {
        (cell.offset, block)
        for cell in cells
        if of_offset[cell.offset] > 1
        for block in cell.blocks
    }
    inner = {tuple((c.first, c.second, c.count) for c in cell.cells[1:]) for cell in cells}
    pairs = sum(cell.pairs for cell in cells)
    return Amounts(
        pairs=pairs,
        cells=len(cells),
        copied=sum(prod(count for *_, count in copy) for copy in inner) * 2,
        sums=len(blocks),
        offsets=len(of_offset),
        border=pairs - sum(largest.values()),
    )


def unfold(x: Tensor, first_axis: int, windows: tuple[Windows, ...]) -> Tensor:
    """View axes that `fit` has prepared through their windows.

    Returns:
        A view: in place of each axis, its kernel positions; last, the output positions of all.
    """
    for axis, window in enumerate(windows, start=first_axis):
        span = (window.kernel_size - 1) * window.dilation + 1
        x = x.unfold(axis, span, window.stride)[..., :: window.dilation].transpose(axis, -1)
    return x
