"""What the functions of this room share: what they accept, precision and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNFOLD_BYTES = 64 * 2**20
"""Most bytes of unfolded input (or similar copies) held at once; larger batches go in chunks."""

CACHE_BYTES = 4 * 2**20
"""Most bytes of a copy on a CPU that is made to be read once, at best from the cache."""

SEQUENCES = (tuple, list)

APPROXIMATIONS = ("expand", "reduce")
"""How a Kronecker factor treats shared positions."""


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
    return tuple(map(hashable, option)) if isinstance(option, SEQUENCES) else option


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Type to accumulate in: float32 at least."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def cast(tensor: Tensor) -> Tensor:
    """Cast to the type to accumulate in. A copy is contiguous: it needn't be laid out anew."""
    dtype = accumulation_dtype(tensor)
    if tensor.dtype == dtype:
        return tensor
    return tensor.to(dtype, memory_format=torch.contiguous_format)


def split(tensor: Tensor, per_example: int) -> tuple[Tensor, ...]:
    """Chunks of examples, such that copies of `per_example` elements each stay within bounds."""
    limit = UNFOLD_BYTES
    if tensor.device.type == "cpu":
        limit = min(limit, CACHE_BYTES)
    size = limit // (per_example * accumulation_dtype(tensor).itemsize)
    return tensor.split(max(1, size))


def cast_chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Chunks of examples that may be `cast` one after the other; one if that copies nothing.

    Reductions that accumulate in another type are no way around: on a CPU they copy it all.
    """
    if tensor.dtype == accumulation_dtype(tensor):
        return (tensor,)
    return split(tensor, tensor[0].numel())


def concatenate(chunks: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Concatenate along an axis; a single chunk isn't copied."""
    return torch.cat(list(chunks), axis) if len(chunks) > 1 else chunks[0]
