"""Sums of outer products: in chunks, in place, and every entry once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_tn.functional.common import cast, cast_chunks, check, full_precision

BLOCK = 128
"""Rows of a Gram matrix that are computed at once, from the diagonal to the right.

What is left of it is mirrored. On a CPU that takes a third less time from 256 rows on; below
`2 * BLOCK` rows, or for fewer than `BLOCK` vectors, mirroring costs more than it saves. A GPU
would rather make one large product.
"""


def gram(rows: Tensor) -> Tensor:
    """Sum over examples of the outer products of rows with themselves.

    Args:
        rows: `[N, groups, d]`.

    Returns:
        `[groups, d, d]`.

    Raises:
        ValueError: If `rows` has not three axes or is empty.

    Example:
        >>> gram(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]))
        tensor([[[1., 2.],
                 [2., 5.]]])
    """
    check(rows, "rows", "[N, groups, d]", 3, most=3)
    with full_precision(rows):
        return sum_grams(cast_chunks(rows), lambda chunk: cast(chunk).permute(1, 2, 0))


def average_gram(rows: Tensor) -> Tensor:
    """Average over examples of the outer products of rows with themselves.

    The smaller of rows and result is divided by their number.

    Args:
        rows: `[N, groups, d]`, with floating point numbers to accumulate in.

    Returns:
        `[groups, d, d]`.
    """
    count, _, size = rows.shape
    if count >= size:
        return gram(rows).div_(count)
    with full_precision(rows):
        columns = rows.permute(1, 2, 0)
        return torch.bmm(columns / count, columns.mT)


def sum_grams(chunks: Sequence[Tensor], columns: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of `columns(chunk) @ columns(chunk).mT` over chunks.

    Args:
        chunks: Any tensors.
        columns: Makes `[groups, d, M]` of a chunk. What it copies is held for one chunk at a time.

    Returns:
        `[groups, d, d]`.
    """
    blocks = _blocks(columns(chunks[0]))
    for chunk in chunks[1:]:
        _add_to(blocks, columns(chunk))
    return _mirror(blocks) if len(blocks) > 1 else blocks[0]


def _blocks(columns: Tensor) -> list[Tensor]:
    """Blocks of rows of `columns @ columns.mT`, each from the diagonal to the right."""
    _, size, count = columns.shape
    mirrored = columns.device.type == "cpu" and size >= 2 * BLOCK and count >= BLOCK
    height = BLOCK if mirrored else size
    return [
        torch.bmm(columns[:, start : start + height], columns[:, start:].mT)
        for start in range(0, size, height)
    ]


def _add_to(blocks: Sequence[Tensor], columns: Tensor) -> None:
    start = 0
    for block in blocks:
        stop = start + block.shape[1]
        block.baddbmm_(columns[:, start:stop], columns[:, start:].mT)
        start = stop


def _mirror(blocks: Sequence[Tensor]) -> Tensor:
    """The symmetric matrices of which blocks of rows are given, each from the diagonal on."""
    rows = []
    for place, block in enumerate(blocks):
        offsets = range(place * BLOCK, 0, -BLOCK)  # of its columns, in the blocks above
        left = [
            above[:, :, start : start + block.shape[1]].mT
            for start, above in zip(offsets, blocks, strict=False)
        ]
        rows.append(torch.cat([*left, block], -1))
    return torch.cat(rows, 1)


def border(factor: Tensor, mean: Tensor) -> Tensor:
    """The factor of vectors with a trailing 1, from that without and the vectors' mean."""
    bordered = F.pad(factor, (0, 1, 0, 1), value=1.0)
    bordered[:, -1, :-1] = mean
    bordered[:, :-1, -1] = mean
    return bordered


def append_one(rows: Tensor) -> Tensor:
    """Append a 1 to every row."""
    return F.pad(rows, (0, 1), value=1.0)
