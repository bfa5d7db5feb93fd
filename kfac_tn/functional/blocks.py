"""Block-diagonal matrices: what a Kronecker factor is reduced to where its dimension is too large.

A dimension d is cut into p pieces of s = ceil(d / p), the last one filled up with zeros; a
block-diagonal matrix in each of G groups is `[G * p, s, s]`, so one with s = 1 is a diagonal, and
one with p = 1 a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_tn.functional.common import cast
from kfac_tn.tn import gemm
from kfac_tn.tn.autocast import full_precision


def split_rows(rows: Tensor, pieces: int) -> Tensor:
    """Cut the last axis into pieces: `[..., d]` to `[..., pieces, s]`.

    Example:
        >>> split_rows(torch.tensor([1.0, 2.0, 3.0]), 2)
        tensor([[1., 2.],
                [3., 0.]])
    """
    size = -(-rows.shape[-1] // pieces)
    filled = F.pad(rows, (0, pieces * size - rows.shape[-1]))
    return filled.unflatten(-1, (pieces, size))


def block_gram(chunks: Iterable[Tensor], pieces: int) -> Tensor:
    """Diagonal blocks of the sum of the rows' outer products; the rest is never computed.

    Args:
        chunks: Rows `[groups, M, d]`, some at a time.
        pieces: Into how many d is cut.

    Returns:
        `[groups * pieces, s, s]`.

    Example:
        >>> block_gram([torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])], pieces=2)
        tensor([[[10.]],
        <BLANKLINE>
                [[20.]]])
    """
    total: Tensor | None = None
    for chunk in chunks:
        with full_precision(chunk):
            if pieces == chunk.shape[-1]:
                gram = cast(chunk).square().sum(1).flatten()[:, None, None]
            else:
                columns = split_rows(cast(chunk), pieces).permute(0, 2, 3, 1).flatten(0, 1)
                gram = torch.bmm(columns, columns.mT)
        total = gram if total is None else total.add_(gram)
    if total is None:
        raise ValueError("there are no rows")
    return total


def multiply_blocks(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows with block-diagonal matrices.

    Args:
        rows: `[groups, M, d]`.
        matrix: `[groups * pieces, s, s]`.

    Returns:
        `[groups, M, pieces * s]`: a last piece that was filled up with zeros stays so long.

    Example:
        >>> multiply_blocks(torch.ones(1, 1, 2), torch.tensor([[[2.0]], [[3.0]]]))
        tensor([[[2., 3.]]])
    """
    groups, count, _ = rows.shape
    pieces, size = matrix.shape[0] // groups, matrix.shape[-1]
    if pieces == 1:
        return gemm.multiply(rows, matrix)
    if size == 1:
        return rows * matrix.view(groups, 1, pieces)
    columns = split_rows(rows, pieces).transpose(1, 2).flatten(0, 1)
    product = torch.bmm(columns, matrix).unflatten(0, (groups, pieces))
    return product.transpose(1, 2).reshape(groups, count, pieces * size)
