"""Large new tensors on huge pages, where Linux leaves that to the program.

A factor of tens of megabytes is written once into memory that is fresh: with pages of 4 KiB, to
have the system hand them out takes several times as long as to write them. In the environment
`THP_MEM_ALLOC_ENABLE=1` makes torch ask for huge pages for all that it allocates; here it is only
for what is known to be large and to be written from end to end.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor

HUGE = 2**21
"""Bytes of a huge page (x86 and most others)."""

LEAST = 2 * HUGE
"""Bytes of a tensor that is worth the call."""

FRESH = 2**25
"""Bytes of a tensor from which on glibc hands out fresh memory each time: page after page is made
when it is first written, which takes longer than to write it."""

MADV_HUGEPAGE = 14


def _find() -> Callable[[int, int, int], int] | None:
    """The system's `madvise`; None where there is none, or no such advice."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


_madvise = _find()


def on_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages below a new tensor on a CPU, nothing of which has been written yet.

    It is advice: where the system doesn't take it, or there is no memory of the tensor's own (it is
    fake, traced, or transformed), nothing happens.

    Returns:
        The tensor.

    Example:
        >>> on_huge_pages(torch.empty(2048, 2048)).shape
        torch.Size([2048, 2048])
    """
    if torch.compiler.is_compiling() or _madvise is None:
        return tensor
    if type(tensor) is not Tensor or tensor.device.type != "cpu":
        return tensor
    if tensor.numel() * tensor.element_size() < LEAST:
        return tensor
    try:
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return tensor  # it has no memory
    end = start + tensor.numel() * tensor.element_size()
    first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE  # whole pages inside
    if start and first < last:
        _madvise(first, last - first, MADV_HUGEPAGE)
    return tensor
