"""The Gram matrix of windows from that of positions: examples first, then the doubled patterns.

For a few positions it is cheapest to multiply all of them with each other, and to sum over windows
after: along each axis, a matrix leads from pairs of positions to pairs of kernel positions.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kfac_tn.tn import gemm
from kfac_tn.tn.gram.unfolding import LEAST_CHUNK
from kfac_tn.tn.gram.windows import Windows

MOST_PAIRS = 2**16
"""Pairs of positions and channels, of one group, up to which that is thought of."""


MOST_COLUMNS = 128
"""Pairs of kernel positions up to which windows along all axes are summed over at once."""


def gram_by_positions(x: Tensor, windows: tuple[Windows, ...], scale: float = 1.0) -> Tensor:
    """Multiply positions, then sum over windows.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes, at least one.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    doubled = [doubled_pattern(window, x) for window in windows]
    doubled[0] = doubled[0] * scale
    if at_once(x.shape[2], windows):
        doubled = [_joint(doubled).contiguous()]
    parts = [_gram(part, windows, doubled) for part in x.split(groups_at_once(x.shape, windows))]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def groups_at_once(shape: tuple[int, ...], windows: tuple[Windows, ...]) -> int:
    """How many groups' pairs of positions are held at once: about as many elements as there are."""
    shared, examples, channels = shape[:3]
    positions = channels * prod(window.size for window in windows)
    limit = max(shared * examples * positions, LEAST_CHUNK)
    return min(shared, max(1, limit // positions**2))


def at_once(channels: int, windows: tuple[Windows, ...]) -> bool:
    """Whether windows along all axes are summed over at once: few pairs, and of one channel."""
    return channels == 1 and prod(window.kernel_size for window in windows) ** 2 <= MOST_COLUMNS


def doubled_pattern(window: Windows, like: Tensor) -> Tensor:
    """How many windows have two positions at two places of the kernel: `[k, k', i, i']`.

    Two copies of an index pattern that share the output position, summed over it.
    """
    arange = lambda size, step: torch.arange(size, device=like.device) * step  # noqa: E731
    kernel = arange(window.kernel_size, window.dilation)[:, None, None]
    outputs = arange(window.output_size, window.stride)[:, None] + window.start
    pattern = (kernel + outputs == arange(window.size, 1)).to(like.dtype)
    return torch.einsum("koi,loj->klij", pattern, pattern)


def _gram(x: Tensor, windows: tuple[Windows, ...], doubled: list[Tensor]) -> Tensor:
    shared, _, channels, *sizes = x.shape
    rows, axes = x.flatten(2), len(windows)
    size = channels * prod(window.kernel_size for window in windows)
    pairs = gemm.multiply(rows.mT, rows)
    if at_once(channels, windows):
        # Pairs lie in memory as they are summed: nothing is copied.
        columns = doubled[0].view(1, -1, size**2)
        return gemm.multiply(pairs.reshape(1, shared, -1), columns).view(shared, size, size)
    pairs = pairs.view(shared, channels, *sizes, channels, *sizes)
    for axis, pattern in enumerate(doubled):
        # What is summed goes, what takes its place comes last: the next axis is the second always.
        left = axes - axis
        pairs = torch.tensordot(pairs, pattern, ([2, 3 + left], [2, 3]))
    kernels = range(3, 3 + 2 * axes)
    pairs = pairs.permute(0, 1, *kernels[::2], 2, *kernels[1::2])
    return pairs.reshape(shared, size, size)


def _joint(doubled: list[Tensor]) -> Tensor:
    """The doubled patterns of all axes as one: `[*sizes, *sizes, *kernels, *kernels]`."""
    joint, axes = doubled[0], len(doubled)
    for other in doubled[1:]:
        joint = torch.tensordot(joint, other, 0)
    ends = [range(at, 4 * axes, 4) for at in range(4)]  # k, k', i, i' of each axis
    return joint.permute(*ends[2], *ends[3], *ends[0], *ends[1])
