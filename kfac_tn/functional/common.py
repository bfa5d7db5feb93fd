"""What the functions of this room share: what they accept, and in which precision they compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

UNFOLD_BYTES = 64 * 2**20
"""Most bytes of unfolded input (or similar copies) held at once; larger batches go in chunks."""

APPROXIMATIONS = ("expand", "reduce")
"""How a Kronecker factor treats shared positions."""


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
    rows = cast(rows)
    with full_precision(rows):
        return torch.bmm(rows.permute(1, 2, 0), rows.transpose(0, 1))


def border(factor: Tensor, mean: Tensor) -> Tensor:
    """The factor of vectors with a trailing 1, from that without and the vectors' mean."""
    column = torch.cat([factor, mean.unsqueeze(-1)], -1)
    row = append_one(mean).unsqueeze(-2)
    return torch.cat([column, row], -2)


def append_one(rows: Tensor) -> Tensor:
    """Append a 1 to every row."""
    return F.pad(rows, (0, 1), value=1.0)


# ---- what is accepted ------------------------------------------------------------------------


def check(tensor: Tensor, name: str, form: str, least: int, most: int | None = None) -> None:
    """Refuse a tensor with too few or too many axes, no elements, or no floating point."""
    if tensor.ndim < least or (most is not None and tensor.ndim > most):
        raise ValueError(f"{name} must be {form}, got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} is empty: skip such batches")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_approximation(approximation: str) -> str:
    """Refuse anything but an approximation."""
    if approximation not in APPROXIMATIONS:
        raise ValueError(f"approximation must be one of {APPROXIMATIONS}, got {approximation!r}")
    return approximation


def hashable(option: object) -> object:
    """Lists as tuples, to be a key of a cache."""
    return tuple(map(hashable, option)) if isinstance(option, list | tuple) else option


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Type to accumulate in: float32 at least."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def cast(tensor: Tensor) -> Tensor:
    """Cast to the type to accumulate in."""
    return tensor.to(accumulation_dtype(tensor))


def full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from lowering the precision of products."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
