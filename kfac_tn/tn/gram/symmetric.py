"""Sums of matrices times their own transposes: every entry once, the rest mirrored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfac_tn.tn import gemm

BLOCK = 64
"""Rows of a result that are computed at once, at the least, up to the diagonal.

What is right of it is mirrored. On a CPU that takes up to a third less time. A GPU would rather
make one large product.
"""

MOST_BLOCKS = 4
"""Blocks of rows at the most: more would save little."""

LEAST_SUM = 512
"""Terms of the sums from which on to multiply costs more than to mirror the result."""

LEAST_ELEMENTS = 2**18
"""Rows times terms from which on it costs more than the calls for several blocks."""


MOST_COPIED = 2**18
"""Elements that are copied at once, to be read from a cache."""

LEAST_CHUNK = 64
"""Terms that are at least."""


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
    blocks: list[Tensor] = []
    for chunk in _in_rows(columns):
        if blocks:
            add_to(blocks, chunk, scale)
        else:
            blocks = [
                gemm.multiply(_scaled(chunk[:, start:end], scale), chunk[:, :end].mT)
                for start, end in zip(starts, [*starts[1:], size], strict=True)
            ]
    return blocks


def add_to(blocks: Sequence[Tensor], columns: Tensor, scale: float = 1.0) -> None:
    """Add the blocks of another product in place."""
    for chunk in _in_rows(columns):
        for block in blocks:
            end = block.shape[2]
            start = end - block.shape[1]
            add_product(block, _scaled(chunk[:, start:end], scale), chunk[:, :end].mT)


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
    elif gemm.takes(left, right):
        total.add_(gemm.multiply(left, right))
    else:
        total.baddbmm_(left, right)


def _starts(size: int, terms: int) -> list[int]:
    if size < 2 * BLOCK or terms < LEAST_SUM or size * terms < LEAST_ELEMENTS:
        return [0]
    return list(range(0, size, max(BLOCK, -(-size // MOST_BLOCKS))))


def _in_rows(columns: Tensor) -> Iterator[Tensor]:
    """Chunks of the terms, copied for a product that wants them to follow each other in memory."""
    groups, size, _ = columns.shape
    if columns.stride(2) == 1 or not (
        columns.device.type == "cpu" and gemm.takes(columns, columns.mT)
    ):
        yield columns
        return
    for chunk in columns.split(max(LEAST_CHUNK, MOST_COPIED // (groups * size)), 2):
        yield chunk.contiguous()


def _scaled(rows: Tensor, scale: float) -> Tensor:
    return rows if scale == 1 else rows * scale
