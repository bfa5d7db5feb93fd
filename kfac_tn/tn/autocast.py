"""Whether autocast lowers the precision of what follows, asked such that `torch.compile` can."""

from __future__ import annotations

import torch

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
