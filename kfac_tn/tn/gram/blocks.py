"""From products of cells to the Gram matrix: what belongs to which block, and where it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, product
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.gram.unfolding import LEAST_CHUNK
from kfac_tn.tn.gram.windows import JointCell, Windows
from kfac_tn.tn.pages import on_huge_pages

CACHE = 2**18
"""Elements that stay in a processor's cache while they are laid out."""

LITTLE = 8
"""What part of the result is little beside it."""

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""A pair of kernel positions, with one number for each axis."""


def examples_at_once(shape: Sequence[int], windows: tuple[Windows, ...], copies: int) -> int:
    """Examples whose copies are no more than the tensor, or little beside the result.

    Args:
        shape: Shared, examples, channels, sizes.
        windows: Of each of the last axes.
        copies: How many there are at once, roughly.
    """
    shared, examples, channels, *_ = shape
    elements = prod(shape)
    result = shared * (channels * prod(window.kernel_size for window in windows)) ** 2
    limit = max(elements, LEAST_CHUNK, result // LITTLE)
    return min(examples, max(1, limit * examples // (copies * elements)))


def by_offset(cells: Sequence[JointCell]) -> list[list[int]]:
    """The numbers of the cells of each offset."""
    numbers = sorted(range(len(cells)), key=lambda at: cells[at].offset)
    return [list(group) for _, group in groupby(numbers, key=lambda at: cells[at].offset)]


def assemble(
    x: Tensor, cells: Sequence[JointCell], grams: Sequence[Tensor], kernels: list[int]
) -> Tensor:
    """The Gram matrix of windows from the products of cells.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        cells: All of them.
        grams: The product of each, `[shared, channels, channels]`.
        kernels: Kernel size along each axis.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernels)`.
    """
    shared, _, channels, *_ = x.shape
    positions = list(product(*map(range, kernels)))
    sums = [_Sums(cells, members, x) for members in by_offset(cells)]
    result = x.new_empty(shared, channels, len(positions), channels, len(positions))
    on_huge_pages(result)
    # Blocks interleave: those of some rows side by side, then as they are in the matrix.
    rows = max(1, CACHE // (shared * channels * len(positions)))
    for start in range(0, channels, rows):
        some = slice(start, start + rows)
        zero = x.new_zeros(()).expand_as(result[:, some, 0, :, 0])
        blocks: dict[Block, Tensor] = {}
        for each in sums:
            blocks.update(each.rows_of_blocks(grams, some))
        for at, k in enumerate(positions):
            side_by_side = [blocks.get((k, other), zero) for other in positions]
            result[:, some, at] = torch.stack(side_by_side).movedim(0, -1)
    return result.view(shared, channels * len(positions), channels * len(positions))


class _Sums:
    """The blocks of one offset, as sums of the products of its cells.

    Args:
        cells: The cells of all offsets.
        members: The numbers of those of this one.
        like: A tensor.
    """

    def __init__(self, cells: Sequence[JointCell], members: list[int], like: Tensor) -> None:
        self.members, self.mirrored = members, cells[members[0]].mirrored
        of_block: dict[Block, tuple[int, ...]] = {}
        for column, at in enumerate(members):
            for block in cells[at].blocks:
                of_block[block] = (*of_block.get(block, ()), column)
        different = {columns: row for row, columns in enumerate(dict.fromkeys(of_block.values()))}
        self.rows = {block: different[columns] for block, columns in of_block.items()}
        # All sums at once are a product with a matrix of zeros and ones.
        chosen = torch.zeros(len(different), len(members))
        for columns, row in different.items():
            chosen[row, list(columns)] = 1
        self.chosen = chosen.to(like)

    def rows_of_blocks(self, grams: Sequence[Tensor], some: slice) -> dict[Block, Tensor]:
        """Some rows of all blocks, each `[shared, rows, channels]`."""
        some_rows = self._sum([grams[at][:, some] for at in self.members])
        found = {block: some_rows[row] for block, row in self.rows.items()}
        if self.mirrored:
            turned = self._sum([grams[at][:, :, some].mT for at in self.members])
            found.update({(k, other): turned[row] for (other, k), row in self.rows.items()})
        return found

    def _sum(self, grams: list[Tensor]) -> Tensor:
        stacked = torch.stack(grams)
        if len(grams) == 1:
            return stacked
        return (self.chosen @ stacked.flatten(1)).view(-1, *stacked.shape[1:])
