"""From products of cells to the Gram matrix: what belongs to which block, and where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, product
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.gram.unfolding import LEAST_CHUNK
from kfac_tn.tn.gram.windows import JointCell, Windows
from kfac_tn.tn.pages import on_huge_pages
from kfac_tn.tn.transpose import transposed

CACHE = 2**19
"""Elements that stay in a processor's cache while they are laid out, and occupy several threads."""

LEAST_ROWS = 2**16
"""Elements that are laid out at once, at the least."""

LITTLE = 2
"""What part of the result is little beside it: such copies are gone before the result is made."""

SHARE = 8, 16
"""What part of the tensor, or of the result, is laid out at once at the most."""

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""A pair of kernel positions, with one number for each axis."""


def examples_at_once(shape: Sequence[int], windows: tuple[Windows, ...], copies: float) -> int:
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
    return min(examples, max(1, int(limit * examples / (copies * elements))))


def by_offset(cells: Sequence[JointCell]) -> list[list[int]]:
    """The numbers of the cells of each offset."""
    numbers = sorted(range(len(cells)), key=lambda at: cells[at].offset)
    return [list(group) for _, group in groupby(numbers, key=lambda at: cells[at].offset)]


def assemble(
    x: Tensor, cells: Sequence[JointCell], grams: list[Tensor], kernels: list[int]
) -> Tensor:
    """The Gram matrix of windows from the products of cells.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        cells: All of them.
        grams: The product of each, `[shared, channels, channels]`. The list is emptied on the way,
            so that no more is held than what is needed.
        kernels: Kernel size along each axis.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernels)`.
    """
    shared, _, channels, *_ = x.shape
    positions = list(product(*map(range, kernels)))
    blocks: dict[Block, Tensor] = {}
    mirrored: dict[Block, Tensor] = {}
    for members in by_offset(cells):
        for block, gram in _sums([cells[at] for at in members], [grams[at] for at in members]):
            blocks[block] = gram
            if cells[members[0]].mirrored:
                mirrored[block[::-1]] = gram
        for at in members:
            grams[at] = x.new_empty(0)
    zero = x.new_zeros(()).expand(shared, channels, channels)
    result = x.new_empty(shared, channels, len(positions), channels, len(positions))
    on_huge_pages(result)
    # Blocks interleave: those of some rows side by side, then as they are in the matrix.
    parts = x.numel() // SHARE[0], result.numel() // SHARE[1]
    at_once = min(CACHE, max(*parts, LEAST_ROWS))
    rows = max(1, at_once // (shared * channels * len(positions)))
    for start in range(0, channels, rows):
        some = slice(start, start + rows)
        laid_out = {block: gram[:, some] for block, gram in blocks.items()}
        # Each is transposed once, into memory that its blocks share.
        if mirrored:
            each = dict.fromkeys(mirrored.values())
            columns = transposed(torch.stack([gram[:, :, some] for gram in each]))
            turned = dict(zip(each, columns, strict=True))
            laid_out |= {block: turned[gram] for block, gram in mirrored.items()}
        for at, k in enumerate(positions):
            side_by_side = [laid_out.get((k, other), zero[:, some]) for other in positions]
            result[:, some, at] = transposed(torch.stack(side_by_side, 2))
    return result.view(shared, channels * len(positions), channels * len(positions))


def _sums(cells: Sequence[JointCell], grams: Sequence[Tensor]) -> Iterator[tuple[Block, Tensor]]:
    """The blocks of one offset, as sums of the products of its cells; equal ones are one tensor."""
    of_block: dict[Block, tuple[int, ...]] = {}
    for column, cell in enumerate(cells):
        for block in cell.blocks:
            of_block[block] = (*of_block.get(block, ()), column)
    different = {columns: row for row, columns in enumerate(dict.fromkeys(of_block.values()))}
    if all(len(columns) == 1 for columns in different):
        sums = [grams[column] for (column,) in different]
    else:  # all at once, by a product with a matrix of zeros and ones
        chosen = torch.zeros(len(different), len(grams))
        for columns, row in different.items():
            chosen[row, list(columns)] = 1
        stacked = torch.stack(list(grams))
        sums = [*(chosen.to(stacked) @ stacked.flatten(1)).view(-1, *stacked.shape[1:])]
    for block, columns in of_block.items():
        yield block, sums[different[columns]]
