"""The Gram matrix of windows of one channel: a depthwise convolution of the tensor with itself.

Along the last axis, what kernel position k sees is convolved with all that windows see, which gives
the products with all k' at once. Along the others, positions fall into cells that see the same
kernel positions; a cell is convolved with its surroundings, which gives all offsets at once.
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
from kfac_tn.tn.gram.windows import Windows, every, fit

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

COPIES = 6
"""Copies of a chunk that are made, roughly, torch's own included."""

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
    """Convolve cells with their surroundings.

    Args:
        x: `[shared, examples, 1, *sizes]`.
        windows: Of each of the last axes, one to three.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = prod(kernel sizes)`.
    """
    count = max(1, max(x.numel() // COPIES, LEAST_CHUNK) // x[0].numel())
    result = torch.cat([_gram(chunk, windows) for chunk in x.split(count)])
    return result if scale == 1 else result.mul_(scale)


def _gram(x: Tensor, windows: tuple[Windows, ...]) -> Tensor:
    shared, examples = x.shape[:2]
    images = fit(x[:, :, 0], 2, windows)
    images = images.reshape(1, shared * examples, *images.shape[2:])
    *kernels, last = [window.kernel_size for window in windows]
    axes = len(kernels)
    blocks = x.new_zeros(*kernels, *kernels, shared, last, last)
    for cells in product(*map(cells_of_taps, windows[:-1])):
        correlations = _correlate(images, cells, windows, examples)  # [k, shared, *offsets, k']
        offsets = range(2, 2 + axes)
        correlations = correlations.permute(*offsets, 1, 0, 2 + axes).contiguous()
        for taps in product(*(members for _, _, members in cells)):
            target, source = blocks[taps], correlations  # [*k', shared, k, k'], [*offsets, ...]
            for axis, (k, (_, _, members)) in enumerate(zip(taps, cells, strict=True)):
                first = k if axis == 0 else 0
                count = kernels[axis] - first
                target = target.narrow(axis, first, count)
                source = source.narrow(axis, 0 if axis == 0 else max(members) - k, count)
            target.add_(source)
    turned = [2 * axes, *range(axes), 2 * axes + 1, *range(axes, 2 * axes), 2 * axes + 2]
    result = blocks.permute(turned).contiguous()
    if axes:
        _mirror(result.view(shared, kernels[0], -1, kernels[0], prod(kernels[1:]) * last))
    return result.view(shared, prod(kernels) * last, -1)


def _correlate(
    images: Tensor, cells: Sequence[TapCell], windows: tuple[Windows, ...], examples: int
) -> Tensor:
    """Products of a cell's positions with all that their kernel positions see.

    Along the first axis only offsets that aren't negative count: pairs with k' < k are mirror
    images of others. Along the others offsets begin with that of the cell's last kernel position.

    Returns:
        `[k, shared, *offsets, k']`, k and k' of the last axis; a sum over examples.
    """
    *outer, last = windows
    surroundings = kernels = images
    for axis, ((first, count, taps), window) in enumerate(zip(cells, outer, strict=True), start=2):
        first -= window.start  # where `fit` has put it
        reach = (window.kernel_size - 1 - min(taps)) * window.dilation
        before = 0 if axis == 2 else max(taps) * window.dilation
        size = before + (count - 1) * window.stride + reach + 1
        surroundings = surroundings.narrow(axis, first - before, size)
        kernels = every(kernels, axis, first, count, window.stride)
    surroundings = surroundings.contiguous()
    dimensions = len(windows)
    strides = [window.stride for window in windows]
    dilations = [window.dilation for window in windows]
    products = [
        CONVOLVE[dimensions](
            surroundings,
            every(kernels, dimensions + 1, k * last.dilation, last.output_size, last.stride)
            .movedim(0, 1)
            .contiguous(),
            stride=dilations,
            dilation=strides,
            groups=images.shape[1],
        )
        .unflatten(1, (-1, examples))
        .sum(2)
        for k in range(last.kernel_size)
    ]
    return torch.stack(products)[:, 0]


def _mirror(result: Tensor) -> None:
    """Fill the blocks below the diagonal of `[shared, k, rest, k', rest']` with those above."""
    for k in range(result.shape[1] - 1):
        result[:, k + 1 :, :, k].copy_(result[:, k, :, k + 1 :].permute(0, 2, 3, 1))
