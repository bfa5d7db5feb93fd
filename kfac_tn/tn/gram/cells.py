"""The Gram matrix of windows by offsets and cells: one product instead of one for each block."""

from __future__ import annotations

from itertools import groupby, product
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.gram.symmetric import add_product
from kfac_tn.tn.gram.unfolding import LEAST_CHUNK
from kfac_tn.tn.gram.windows import JointCell, Windows, every, joint_cells

COPIES = 6
"""Copies of a chunk that are made at most at once, roughly, beside the first."""

LITTLE = 8
"""What part of the result is little beside it."""

CACHE = 2**18
"""Elements that stay in a processor's cache while they are written."""

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""A pair of kernel positions, with one number for each axis."""


def gram_by_cells(x: Tensor, windows: tuple[Windows, ...], scale: float = 1.0) -> Tensor:
    """Multiply cells with cells, and put the products into all blocks that they belong to.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes, at least one.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    count = examples_at_once(x, windows)
    cells = joint_cells(windows)
    grams: list[Tensor] = []
    for chunk in x.split(count, 1):
        images = _Images(chunk, windows)
        for at, cell in enumerate(cells):
            left, right = images.matrices(cell)
            if at < len(grams):
                add_product(grams[at], left.mT, right)
            else:
                grams.append(torch.bmm(left.mT, right))
    if scale != 1:
        grams = [gram.mul_(scale) for gram in grams]
    return _assemble(x, _blocks(cells, grams), [window.kernel_size for window in windows])


def examples_at_once(x: Tensor, windows: tuple[Windows, ...]) -> int:
    """Examples whose copies are no more than the tensor, or little beside the result."""
    shared, examples, channels, *_ = x.shape
    result = shared * (channels * prod(window.kernel_size for window in windows)) ** 2
    limit = max(x.numel(), LEAST_CHUNK, result // LITTLE)
    return min(examples, max(1, limit * examples // (COPIES * x.numel())))


class _Images:
    """A tensor laid out such that some of its rows are a matrix, without a copy.

    Positions along the inner axes are copied once for all rows that are taken of them.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes.
    """

    def __init__(self, x: Tensor, windows: tuple[Windows, ...]) -> None:
        # Rows first, channels last: [shared, rows, examples, *inner sizes, channels].
        self.rows = x.permute(0, 3, 1, *range(4, x.ndim), 2)
        self.stride, *self.strides = (window.stride for window in windows)
        self.copies: dict[object, Tensor] = {}
        self.inner: object = None

    def matrices(self, cell: JointCell) -> tuple[Tensor, Tensor]:
        """The positions of a cell, of both sides, `[shared, positions, channels]`."""
        outer, *inner = cell.cells
        if inner != self.inner:  # cells that share them follow each other
            self.inner, self.copies = inner, {}
        counts = [c.count for c in inner]
        return (
            self._matrix(outer.first, outer.count, [c.first for c in inner], counts),
            self._matrix(outer.second, outer.count, [c.second for c in inner], counts),
        )

    def _matrix(self, first: int, count: int, firsts: list[int], counts: list[int]) -> Tensor:
        at, phase = divmod(first, self.stride)
        key = (phase, *firsts)
        if key not in self.copies:
            part = self.rows if self.stride == 1 else self.rows[:, phase :: self.stride]
            for axis, taken in enumerate(zip(firsts, counts, self.strides, strict=True), start=3):
                part = every(part, axis, *taken)
            self.copies[key] = part.contiguous()
        rows = self.copies[key].narrow(1, at, count)
        return rows.reshape(len(rows), -1, rows.shape[-1])


def _blocks(cells: tuple[JointCell, ...], grams: list[Tensor]) -> dict[Block, Tensor]:
    """The blocks `[shared, c, c']`, each a sum of the products of its cells."""
    blocks: dict[Block, Tensor] = {}
    numbers = sorted(range(len(cells)), key=lambda at: cells[at].offset)
    for _, group in groupby(numbers, key=lambda at: cells[at].offset):
        members = list(group)
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
        for (first, second), block in zip(places, sums, strict=True):
            blocks[first, second] = block
            if cells[members[0]].mirrored:
                blocks[second, first] = block.mT
    return blocks


def _assemble(x: Tensor, blocks: dict[Block, Tensor], kernels: list[int]) -> Tensor:
    """One matrix from the blocks of all pairs of kernel positions; those that lack are zero."""
    shared, _, channels, *_ = x.shape
    positions = list(product(*map(range, kernels)))
    zero = x.new_zeros(shared, channels, channels)
    result = x.new_empty(shared, channels, len(positions), channels, len(positions))
    # Blocks interleave: what they write together should stay in the cache.
    rows = max(1, CACHE // (shared * channels * len(positions)))
    for start in range(0, channels, rows):
        some = slice(start, start + rows)
        for (i, k), (j, other) in product(enumerate(positions), repeat=2):
            result[:, some, i, :, j] = blocks.get((k, other), zero)[:, some]
    return result.view(shared, channels * len(positions), channels * len(positions))
