"""Per-example gradients of convolutions' weights by torch's own kernels: nothing is unfolded.

The channels of several examples are those of one convolution, its groups as many times as many.
Where each group has a single channel, as depthwise convolutions have, oneDNN's kernel for these
takes a fifteenth of the time of products with an unfolded input. It is for kernels that are at most
three wide and not dilated; wider ones are several of these, side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_tn.functional.networks import Geometry, spec_of
from kfac_tn.tn.conv import ConvSpec

WIDTH = 3
"""Of kernels that oneDNN has code for; wider ones take as long as without."""

REPEATED = 4
"""Outputs of one channel, for each of which it is read anew, that still take less time so."""

_KERNELS: dict[int, Callable[..., Tensor]] = {
    1: torch.nn.grad.conv1d_weight,
    2: torch.nn.grad.conv2d_weight,
    3: torch.nn.grad.conv3d_weight,
}


def is_depthwise(x: Tensor, channels: int, geometry: Geometry) -> bool:
    """Whether oneDNN has its kernel for such a convolution with so many output channels."""
    if torch.compiler.is_compiling():  # what it compiles must not depend on such choices
        return False
    spec = spec_of(x, geometry)
    return (
        spec.groups == x.shape[1]
        and channels <= REPEATED * spec.groups
        and len(spec.kernel_size) <= 2
        and prod(spec.kernel_size) > 1
        and set(spec.dilations) == {1}
    )


def weight_gradients(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    """Every example's gradient of a convolution's weight.

    Args:
        x: Input, `[N, C_in, *spatial]`, in at most three spatial dimensions.
        g: Gradient of the output, `[N, C_out, *output]`.
        geometry: The convolution, not a transposed one.

    Returns:
        `[N, C_out, C_in / groups, *kernel_size]`.
    """
    spec, channels = spec_of(x, geometry), g.shape[1]
    shape = (len(x), channels, spec.weight_shape[1], *spec.kernel_size)
    if is_depthwise(x, channels, geometry):
        x = _padded(x, spec)
        x = x.repeat_interleave(channels // spec.groups, 1) if channels > spec.groups else x
        return _depthwise(x.flatten(0, 1), g.flatten(0, 1), spec).view(shape)
    padding = [before for before, _ in spec.paddings]
    if spec.padding_mode != "zeros" or any(before != after for before, after in spec.paddings):
        x, padding = _padded(x, spec), [0] * len(padding)
    x, g = x.flatten(0, 1).unsqueeze(0), g.flatten(0, 1).unsqueeze(0)
    weight_shape, groups = (shape[0] * shape[1], *shape[2:]), shape[0] * spec.groups
    gradient = _KERNELS[len(padding)]
    return gradient(x, weight_shape, g, spec.strides, padding, spec.dilations, groups).view(shape)


def _padded(x: Tensor, spec: ConvSpec) -> Tensor:
    sides = [size for pair in reversed(spec.paddings) for size in pair]
    return F.pad(x, sides, "constant" if spec.padding_mode == "zeros" else spec.padding_mode)


def _depthwise(x: Tensor, g: Tensor, spec: ConvSpec) -> Tensor:
    """Of padded channels and the gradients of their outputs, `[C, *spatial]`: `[C, *kernel]`."""
    kernel, strides = list(spec.kernel_size), list(spec.strides)
    if len(kernel) == 1:  # a column, since it is rows that are narrow
        x, g, kernel, strides = x.unsqueeze(2), g.unsqueeze(2), [*kernel, 1], [*strides, 1]
    parts = []
    for first in range(0, kernel[1], WIDTH):
        width = min(WIDTH, kernel[1] - first)
        met = x.narrow(2, first, (g.shape[2] - 1) * strides[1] + width)
        shape = (len(x), 1, kernel[0], width)
        parts.append(_KERNELS[2](met[None], shape, g[None], strides, groups=len(x)))
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
