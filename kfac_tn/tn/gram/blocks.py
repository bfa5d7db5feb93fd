"""From products of cells to the Gram matrix: what belongs to which block, and where it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, product
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.gram.unfolding import LEAST_CHUNK
from kfac_tn.tn.gram.windows import JointCell, Windows

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
    blocks = _blocks(cells, grams)
    shared, _, channels, *_ = x.shape
    positions = list(product(*map(range, kernels)))
    zero = x.new_zeros(()).expand(shared, channels, channels)
    result = x.new_empty(shared, channels, len(positions), channels, len(positions))
    # Blocks interleave: those of some rows side by side, then as they are in the matrix.
    rows = max(1, CACHE // (shared * channels * len(positions)))
    for start in range(0, channels, rows):
        some = slice(start, start + rows)
        for at, k in enumerate(positions):
            side_by_side = [blocks.get((k, other), zero)[:, some] for other in positions]
            result[:, some, at] = torch.stack(side_by_side).movedim(0, -1)
    return result.view(shared, channels * len(positions), channels * len(positions))


def _blocks(cells: Sequence[JointCell], grams: Sequence[Tensor]) -> dict[Block, Tensor]:
    """The blocks `[shared, c, c']`, each a sum of the products of its cells."""
    blocks: dict[Block, Tensor] = {}
    for members in by_offset(cells):
        places = dict.fromkeys(block for at in members for block in cells[at].blocks)
        sums = [grams[members[0]]] * len(places)
        if len(members) > 1:
            # All sums at once, as a product with a matrix of zeros and ones.
            order = {block: at for at, block in enumerate(places)}
            chosen = torch.zeros(len(order), len(members))
            for column, at in enumerate(members):
                chosen[[order[block] for block in cells[at].blocks], column] = 1
            stacked = torch.stack([grams[at] for at in members])
            total = chosen.to(stacked) @ stacked.flatten(1)
            sums = list(total.view(-1, *stacked.shape[1:]).unbind())
        mirrored = cells[members[0]].mirrored
        turned = {id(s): _transpose(s) for s in sums} if mirrored else {}
        for (first, second), block in zip(places, sums, strict=True):
            blocks[first, second] = block
            if mirrored:
                blocks[second, first] = turned[id(block)]
    return blocks


def _transpose(matrices: Tensor) -> Tensor:
    """A transposed copy of `[shared, c, c']`: torch is fast at single matrices."""
    if len(matrices) == 1:
        return matrices[0].t().contiguous()[None]
    return matrices.mT.contiguous()
