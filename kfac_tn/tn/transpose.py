"""Transposed matrices that are to be copied: on a CPU, by torch's shuffle of channels.

torch copies a transposed matrix element by element; where it shuffles channels that are innermost
in memory, which is the same, it transposes blocks of them in registers: three times as fast. That
operator has no derivative. Matrices of few rows that have a place already are put there by BLAS, as
products with the identity, in one pass over the memory. Both are taken for large plain tensors that
nobody differentiates, transforms, traces or counts; everything else is left to the copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_tn.tn.unwatched import unwatched

LEAST = 2**13
"""Elements that are worth the longer call."""

FEW = 32
"""Rows of a matrix up to which its product with the identity is faster than to shuffle and copy."""


def transposed(matrices: Tensor) -> Tensor:
    """Transpose matrices, to be read: in rows if that is fast, else as a view.

    Args:
        matrices: `[..., rows, columns]`.

    Returns:
        `[..., columns, rows]`.

    Example:
        >>> transposed(torch.tensor([[1, 2], [3, 4]]))
        tensor([[1, 3],
                [2, 4]])
    """
    if torch.compiler.is_compiling() or not _takes(matrices):
        return matrices.mT
    return _shuffled(matrices)


def transpose_into(target: Tensor, matrices: Tensor) -> None:
    """Put transposed matrices where they belong.

    Where one isn't finite, neither are its other rows at that column.

    Args:
        target: `[..., columns, rows]`.
        matrices: `[..., rows, columns]`.

    Example:
        >>> transpose_into(target := torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> target
        tensor([[1., 3.],
                [2., 4.]])
    """
    if torch.compiler.is_compiling() or not _multiplies(target, matrices):
        target.copy_(transposed(matrices))
        return
    *_, rows, columns = matrices.shape
    some = matrices.view(-1, rows, columns)
    identity = torch.eye(rows, dtype=matrices.dtype).expand(len(some), rows, rows)
    torch.bmm(some.mT, identity, out=target.view(-1, columns, rows))


def _multiplies(target: Tensor, matrices: Tensor) -> bool:
    return (
        torch.backends.mkl.is_available()
        and matrices.dtype in (torch.float32, torch.float64)
        and matrices.dtype is target.dtype
        and matrices.shape[-2] <= FEW
        and matrices.numel() >= LEAST
        and matrices.device.type == target.device.type == "cpu"
        and matrices.is_contiguous()
        and target.is_contiguous()
        and _is_exact()
        and unwatched(target, matrices)
    )


def _is_exact() -> bool:
    """Whether products of float32 matrices are what they say."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)
    if precision is not None:  # since then torch may refuse to tell the other
        return precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


def _takes(matrices: Tensor) -> bool:
    return (
        _works
        and matrices.device.type == "cpu"
        and matrices.numel() >= LEAST
        and matrices.is_contiguous()
        and unwatched(matrices)
    )


def _shuffled(matrices: Tensor) -> Tensor:
    """Rows as groups of channels, one position for each matrix."""
    *batch, rows, columns = matrices.shape
    channels = matrices.view(-1, 1, 1, rows * columns).permute(0, 3, 1, 2)
    return (
        torch.native_channel_shuffle(channels, rows).permute(0, 2, 3, 1).view(*batch, columns, rows)
    )


def _try() -> bool:
    """Whether torch has the operator, with its result laid out like its argument."""
    matrices = torch.arange(12).view(2, 2, 3)
    try:
        unwatched(matrices)
        return torch.equal(_shuffled(matrices), matrices.mT)
    except (AttributeError, RuntimeError, TypeError):
        return False


_works = _try()
