"""Autocast: whether it lowers the precision of what follows, asked as `torch.compile` can trace."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia")

AVAILABLE = frozenset(kind for kind in KINDS if torch.amp.is_autocast_available(kind))
"""Types of devices with autocast; to ask torch each time breaks the graph in its older versions."""


def is_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device.

    Example:
        >>> with torch.autocast("cpu"):
        ...     is_enabled("cpu"), is_enabled("meta")
        (True, False)
    """
    return device_type in AVAILABLE and torch.is_autocast_enabled(device_type)


def full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from lowering the precision of products on a tensor's device."""
    device = tensor.device.type
    if is_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
