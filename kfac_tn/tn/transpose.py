"""Transposed matrices that are to be copied: on a CPU, by torch's shuffle of channels.

torch copies a transposed matrix element by element; where it shuffles channels that are innermost
in memory, which is the same, it transposes blocks of them in registers: three times as fast. That
operator has no derivative. It is taken for large plain tensors that nobody differentiates,
transforms, traces or counts; everything else is left to the copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_tn.tn.unwatched import unwatched

LEAST = 2**13
"""Elements that are worth the longer call."""


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
