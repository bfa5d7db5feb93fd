"""Sums of matrices times their own transposes: every entry once, the rest mirrored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 128
"""Rows of a result that are computed at once, at the least, up to the diagonal.

What is right of it is mirrored. On a CPU that takes a third less time from 256 rows on. A GPU would
rather make one large product.
"""

MOST_BLOCKS = 8
"""Blocks of rows at the most: more would save little."""

LEAST_SUM = 128
"""Terms of the sums from which on to multiply costs more than to mirror the result."""


def lower_blocks(columns: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Blocks of rows of `scale * columns @ columns.mT`, each from the left to the diagonal.

    Args:
        columns: `[groups, d, terms]`.
        scale: Multiplies one side.

    Returns:
        Blocks `[groups, rows, columns up to the last row]`, for `add_to` and `mirror`.
    """
    _, size, terms = columns.shape
    starts = _starts(size, terms) if columns.device.type == "cpu" else [0]
    return [
        torch.bmm(_scaled(columns[:, start:end], scale), columns[:, :end].mT)
        for start, end in zip(starts, [*starts[1:], size], strict=True)
    ]


def add_to(blocks: Sequence[Tensor], columns: Tensor, scale: float = 1.0) -> None:
    """Add the blocks of another product in place."""
    for block in blocks:
        end = block.shape[2]
        start = end - block.shape[1]
        add_product(block, _scaled(columns[:, start:end], scale), columns[:, :end].mT)


def mirror(blocks: Sequence[Tensor]) -> Tensor:
    """The symmetric matrices `[groups, d, d]` of which the blocks are given."""
    if len(blocks) == 1:
        return blocks[0]
    size = blocks[-1].shape[2]
    whole = blocks[0].new_empty(len(blocks[0]), size, size)
    for block in blocks:
        end = block.shape[2]
        start = end - block.shape[1]
        whole[:, start:end, :end] = block
        whole[:, :start, start:end] = block[:, :, :start].mT
    return whole


def symmetric_share(size: int, terms: int) -> float:
    """Share of a product with its own transpose that is computed on a CPU."""
    starts = _starts(size, terms)
    ends = [*starts[1:], size]
    return sum((end - start) * end for start, end in zip(starts, ends, strict=True)) / size**2


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of batched matrices in place, without a tensor for it where torch can."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(total):
        total.add_(torch.bmm(left, right))  # vmap has no rule for the other
    else:
        total.baddbmm_(left, right)


def _starts(size: int, terms: int) -> list[int]:
    if size < 2 * BLOCK or terms < LEAST_SUM:
        return [0]
    return list(range(0, size, max(BLOCK, -(-size // MOST_BLOCKS))))


def _scaled(rows: Tensor, scale: float) -> Tensor:
    return rows if scale == 1 else rows * scale
