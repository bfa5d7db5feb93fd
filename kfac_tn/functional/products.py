"""Sums of outer products: in chunks, in place, and every entry once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from kfac_tn.functional.common import cast, cast_chunks, check
from kfac_tn.tn import gemm
from kfac_tn.tn.autocast import full_precision
from kfac_tn.tn.gram.symmetric import LEAST_SUM, SymmetricSum


def gram(rows: Tensor) -> Tensor:
    """Sum over examples of the outer products of rows with themselves.

    Args:
        rows: `[N, groups, d]`.

    Returns:
        `[groups, d, d]`.

    Raises:
        ValueError: If `rows` has not three axes or is empty.

    Example:
        >>> import torch
        >>> gram(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]))
        tensor([[[1., 2.],
                 [2., 5.]]])
    """
    check(rows, "rows", "[N, groups, d]", 3, most=3)
    chunks = cast_chunks(rows)
    with full_precision(rows):
        if len(chunks) == 1 and len(rows) < LEAST_SUM:  # one product, and nothing to decide
            columns = cast(rows).permute(1, 2, 0)
            return gemm.multiply(columns, columns.mT)
        return sum_grams(chunks, lambda chunk: cast(chunk).permute(1, 2, 0))


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
        return gemm.multiply(columns / count, columns.mT)


def sum_grams(chunks: Sequence[Tensor], columns: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of `columns(chunk) @ columns(chunk).mT` over chunks.

    Args:
        chunks: Any tensors.
        columns: Makes `[groups, d, M]` of a chunk. What it copies is held for one chunk at a time.

    Returns:
        `[groups, d, d]`.
    """
    total = SymmetricSum()
    for chunk in chunks:
        total.add(columns(chunk))
    return total.result()


def border(factor: Tensor, mean: Tensor) -> Tensor:
    """The factor of vectors with a trailing 1, from that without and the vectors' mean."""
    bordered = F.pad(factor, (0, 1, 0, 1), value=1.0)
    bordered[:, -1, :-1] = mean
    bordered[:, :-1, -1] = mean
    return bordered


def append_one(rows: Tensor) -> Tensor:
    """Append a 1 to every row."""
    return F.pad(rows, (0, 1), value=1.0)
