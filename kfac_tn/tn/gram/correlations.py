"""The Gram matrix of windows of few channels: products of stretches of the last axis.

Along the last axis, a stretch of positions is multiplied with all that its windows see. Of the
product, the diagonals count, each summed over the positions of each kernel position. Along the
others, positions fall into cells that see the same kernel positions; a cell is multiplied with what
is at each offset from it. All factors are views of one padded copy of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_tn.tn.gram.unfolding import LEAST_CHUNK
from kfac_tn.tn.gram.windows import Windows
from kfac_tn.tn.steps import Slice

MOST_CHANNELS = 8
"""Channels in a group up to which that is thought of."""

STRETCH = 28
"""Positions of the last axis that are multiplied at once: fewer for more channels."""

COPIES = 4
"""Copies of a chunk that are made, roughly."""

TapCell = tuple[int, int, tuple[int, ...]]
"""First position and number of positions, at the distance of the stride, and their taps."""


@lru_cache(maxsize=512)
def cells_of_taps(window: Windows) -> tuple[TapCell, ...]:
    """Positions along one axis that belong to the same kernel positions.

    Args:
        window: The axis' windows.

    Returns:
        The cells. Positions outside of the axis, zeros, are left out.

    Example:
        >>> cells_of_taps(Windows(-1, 3, 10, 1, 1, 10))
        ((0, 1, (0, 1)), (1, 8, (0, 1, 2)), (9, 1, (1, 2)))
    """
    start, kernel_size, output_size, stride, dilation, size = window
    cells: list[TapCell] = []
    for residue in sorted({k * dilation % stride for k in range(kernel_size)}):
        taps = [k for k in range(kernel_size) if k * dilation % stride == residue]
        shifts = {k: k * dilation // stride for k in taps}
        begin = start + residue
        least, end = -(begin // stride), (size - 1 - begin) // stride + 1
        ends = {cut for shift in shifts.values() for cut in (shift, shift + output_size)}
        for low, high in pairwise(sorted({min(max(cut, least), end) for cut in ends})):
            inside = tuple(k for k in taps if shifts[k] <= low and high <= shifts[k] + output_size)
            if inside:
                cells.append((begin + low * stride, high - low, inside))
    return tuple(cells)


def gram_by_correlations(x: Tensor, windows: tuple[Windows, ...], scale: float = 1.0) -> Tensor:
    """Multiply cells with what is at each offset from them.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes, at least one.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    count = max(1, max(x.numel() // COPIES, LEAST_CHUNK) // x[0].numel())
    result = torch.cat([_gram(chunk, windows) for chunk in x.split(count)])
    return result if scale == 1 else result.mul_(scale)


def _gram(x: Tensor, windows: tuple[Windows, ...]) -> Tensor:
    shared, _, channels, *_ = x.shape
    *kernels, last = [window.kernel_size for window in windows]
    axes = len(kernels)
    images = _padded(x, windows)
    taps_of_last = _taps(windows[-1], images)
    blocks = x.new_zeros(*kernels, *kernels, shared, channels, last, channels, last)
    for cells in product(*map(cells_of_taps, windows[:-1])):
        sums = _correlate(images, taps_of_last, cells, windows)  # [*offsets, shared, c, k, c', k']
        for taps in product(*(members for _, _, members in cells)):
            target, source = blocks[taps], sums  # [*k', ...], [*offsets, ...]
            for axis, (k, (_, _, members)) in enumerate(zip(taps, cells, strict=True)):
                first = k if axis == 0 else 0
                count = kernels[axis] - first
                target = target.narrow(axis, first, count)
                source = source.narrow(axis, 0 if axis == 0 else max(members) - k, count)
            target.add_(source)
    left, right = range(axes), range(axes, 2 * axes)
    group, c, k, other_c, other_k = range(2 * axes, 2 * axes + 5)
    result = blocks.permute(group, c, *left, k, other_c, *right, other_k).contiguous()
    if axes:
        rest = prod(kernels[1:]) * last
        _mirror(result.view(shared, channels, kernels[0], rest, channels, kernels[0], rest))
    return result.view(shared, channels * prod(kernels) * last, -1)


def _padded(x: Tensor, windows: tuple[Windows, ...]) -> Tensor:
    """A copy with zeros as far as products reach: `[shared, *outer sizes, examples, last, c]`."""
    *outer, last = windows
    reach = (last.kernel_size - 1) * last.dilation
    amounts = [0, 0, reach, reach, 0, 0]
    for window in reversed(outer):
        amounts += [max(amount, 0) for amount in window.overhang]
    return F.pad(x.permute(0, *range(3, x.ndim - 1), 1, x.ndim - 1, 2), amounts).contiguous()


def _correlate(
    images: Tensor,
    taps_of_last: Sequence[Tensor],
    cells: Sequence[TapCell],
    windows: tuple[Windows, ...],
) -> Tensor:
    """Products of a cell's positions with all that their kernel positions see.

    Along the first axis only offsets that aren't negative count: pairs with k' < k are mirror
    images of others. Along the others offsets begin with that of the cell's last kernel position.

    Returns:
        `[*offsets, shared, c, k, c', k']`, k and k' of the last axis; a sum over examples.
    """
    left, around = images, images
    numbers = []
    for axis, ((first, count, taps), window) in enumerate(zip(cells, windows, strict=False), 1):
        first += max(window.overhang[0], 0)  # where `_padded` has put it
        back = 0 if axis == 1 else max(taps)
        numbers.append(back + window.kernel_size - min(taps))
        start = first - back * window.dilation
        size = (numbers[-1] - 1) * window.dilation + (count - 1) * window.stride + 1
        around = around.narrow(axis, start, size)
        left = Slice.compute(left, axis, first, count, window.stride)
    reach = (windows[-1].kernel_size - 1) * windows[-1].dilation
    left = left.narrow(-2, reach, windows[-1].size).flatten(1, -3)
    found = []
    for offset in product(*map(range, numbers)):
        right = around
        for axis, (at, (_, count, _), window) in enumerate(
            zip(offset, cells, windows, strict=False), 1
        ):
            right = Slice.compute(right, axis, at * window.dilation, count, window.stride)
        found.append(_sums(left, right.flatten(1, -3), taps_of_last, windows[-1]))
    sums = torch.stack(found)
    return sums.unflatten(0, numbers) if numbers else sums[0]


def _sums(left: Tensor, right: Tensor, taps: Sequence[Tensor], window: Windows) -> Tensor:
    """Products along the last axis, of each kernel position with each other.

    Args:
        left: `[shared, rows, size, c]`.
        right: `[shared, rows, reach + size + reach, c]`.
        taps: For each stretch, which positions belong to each kernel position.
        window: Of the axis.

    Returns:
        `[shared, c, k, c', k']`.
    """
    kernel_size, reach = window.kernel_size, (window.kernel_size - 1) * window.dilation
    total: Tensor | None = None
    start = 0
    for some in taps:
        count = some.shape[1]
        wide = count + 2 * reach
        positions = left.narrow(2, start, count).flatten(2)
        around = right.narrow(2, start, wide).flatten(2)
        pairs = torch.bmm(positions.mT, around).view(len(left), count, -1, wide, left.shape[3])
        # Along diagonals: what is at each lag from a position.
        lags = pairs.permute(0, 2, 4, 1, 3).flatten(3).unfold(3, 2 * reach + 1, wide + 1)
        lags = lags[..., :: window.dilation].movedim(3, 0)  # [positions, shared, c, c', lags]
        part = some @ lags.reshape(count, -1)
        total = part if total is None else total.add_(part)
        start += count
    assert total is not None
    # Of kernel position k, k' is at lag k' - k.
    total = total.view(kernel_size, *lags.shape[1:]).movedim(0, 3)
    total = total.flatten(3)[..., kernel_size - 1 :]
    return total.unfold(3, kernel_size, max(1, 2 * kernel_size - 2)).movedim(2, 3)


def stretches(window: Windows, channels: int) -> tuple[tuple[int, int], ...]:
    """Stretches of the last axis: their positions, and those that these are multiplied with."""
    around = 2 * (window.kernel_size - 1) * window.dilation
    number = -(-window.size * channels // STRETCH)
    count = -(-window.size // number)
    starts = range(0, window.size, count)
    counts = [min(count, window.size - start) for start in starts]
    return tuple((count, count + around) for count in counts)


def _taps(window: Windows, like: Tensor) -> list[Tensor]:
    """Which positions belong to each kernel position: zeros and ones `[k, positions]`.

    One for each stretch.
    """
    taps = torch.arange(window.kernel_size) * window.dilation + window.start
    behind = torch.arange(window.size) - taps[:, None]  # its place in the first window
    last = (window.output_size - 1) * window.stride
    taken = (behind % window.stride == 0) & (behind >= 0) & (behind <= last)
    counts = [count for count, _ in stretches(window, like.shape[-1])]
    return list(taken.to(like).split(counts, 1))


def _mirror(result: Tensor) -> None:
    """Fill the blocks below the diagonal of `[shared, c, k, rest, c', k', rest']` with others."""
    for k in range(result.shape[2] - 1):
        above = result[:, :, k, :, :, k + 1 :]  # [shared, c, rest, c', k', rest']
        result[:, :, k + 1 :, :, :, k].copy_(above.permute(0, 3, 4, 5, 1, 2))
