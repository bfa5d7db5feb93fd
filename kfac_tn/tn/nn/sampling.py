"""Samples of a convolution's input, from which its weight gradient is estimated.

The weight gradient sums `input[n, c, i] * grad_output[n, d, o]` over examples and over positions
`i, o` that a kernel element joins. Keeping each of its terms, or each of its entries, with
probability `keep` and dividing by `keep` leaves the expectation as it is (Bernoulli-CRS, or
column-row sampling: Adelman et al. 2021, arXiv 1805.08079; randomized differentiation: Oktay et al.
2021, arXiv 2007.10412), and only what is kept of the input must outlive the forward pass. A sample
is drawn once for the whole batch, so what it keeps is a smaller dense tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import grad

from kfac_tn.tn import operations
from kfac_tn.tn.conv import ConvSpec


class Sample(Protocol):
    """What is kept of an input, and how the weight gradient is estimated from that."""

    def take(self, x: Tensor) -> Tensor:
        """What is kept of the input `[N, C_in, *I]`."""

    def weight_gradient(self, kept: Tensor, grad_output: Tensor) -> Tensor:
        """Estimate the gradient of the weight for `grad_output`, `[N, C_out, *O]`."""


@dataclass(frozen=True, eq=False)
class Draw:
    """Independent decisions to keep things, all with one probability.

    Attributes:
        keep: The probability.
        device: Where to draw.
        generator: Source of randomness. None: torch's global one of the device.
    """

    keep: float
    device: torch.device
    generator: torch.Generator | None

    def __call__(self, count: int) -> Tensor:
        """Which of a number of things are kept, as sorted integers."""
        numbers = torch.rand(count, device=self.device, generator=self.generator)
        return (numbers < self.keep).nonzero().flatten()


def draw_sample(along: str, draw: Draw, spec: ConvSpec) -> Sample:
    """Draw what is kept of the input of a convolution, whose padding is symmetric zeros."""
    if draw.keep == 1:
        return PositionSample(spec, 1.0, torch.arange(prod(spec.input_size), device=draw.device))
    if along == "channels":
        return ChannelSample.draw(draw, spec)
    if along == "kernel":
        kernel = draw(prod(spec.kernel_size))
        return PositionSample(spec, 1 / draw.keep, touched(spec, kernel), kernel)
    return PositionSample(spec, 1 / draw.keep, draw(prod(spec.input_size)))


@dataclass(frozen=True, eq=False)
class ChannelSample:
    """Some input channels, the same in all groups; of a depthwise convolution, some groups.

    The weight's entries for other channels get no gradient this time.

    Attributes:
        spec: The convolution.
        scale: Inverse of the probability to be kept.
        kept: The channels within a group, or the groups.
    """

    spec: ConvSpec
    scale: float
    kept: Tensor

    @classmethod
    def draw(cls, draw: Draw, spec: ConvSpec) -> ChannelSample:
        """Draw channels or groups."""
        channels = spec.input_shape[1] // spec.groups
        return cls(spec, 1 / draw.keep, draw(channels if channels > 1 else spec.groups))

    def take(self, x: Tensor) -> Tensor:  # noqa: D102
        if self._whole_groups:
            return x.index_select(1, self.kept)
        return x.unflatten(1, (self.spec.groups, -1)).index_select(2, self.kept).flatten(1, 2)

    def weight_gradient(self, kept: Tensor, grad_output: Tensor) -> Tensor:  # noqa: D102
        spec, count = self.spec, len(self.kept)
        shape = spec.weight_shape
        gradient = grad_output.new_zeros(shape)
        if not count:
            return gradient
        if self._whole_groups:
            g = grad_output.unflatten(1, (spec.groups, -1)).index_select(1, self.kept).flatten(1, 2)
            partial = weight_vjp(kept, (g.shape[1], *shape[1:]), g, spec, count)
            gradient.unflatten(0, (spec.groups, -1)).index_copy_(
                0, self.kept, partial.unflatten(0, (count, -1))
            )
        else:
            partial = weight_vjp(
                kept, (shape[0], count, *shape[2:]), grad_output, spec, spec.groups
            )
            gradient.index_copy_(1, self.kept, partial)
        return gradient.mul_(self.scale)

    @cached_property
    def _whole_groups(self) -> bool:
        return self.spec.weight_shape[1] == 1


@dataclass(frozen=True, eq=False)
class PositionSample:
    """Some input positions, drawn themselves or as those that some kernel elements touch.

    The gradient is that of an input with zeros elsewhere. Gathered products of the kept positions
    would need fewer flops, but lose to the libraries' dense kernels unless almost nothing is kept.

    Attributes:
        spec: The convolution.
        scale: Inverse of the probability to be kept.
        kept: The input positions, counted through all dimensions.
        kernel: The kernel positions that get a gradient. None: all.
    """

    spec: ConvSpec
    scale: float
    kept: Tensor
    kernel: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:  # noqa: D102
        lines = x.flatten(2)
        return lines if len(self.kept) == lines.shape[2] else lines.index_select(2, self.kept)

    def weight_gradient(self, kept: Tensor, grad_output: Tensor) -> Tensor:  # noqa: D102
        spec = self.spec
        shape = (*kept.shape[:2], *spec.input_size)
        if kept.shape[2] < prod(spec.input_size):
            zeros = kept.new_zeros(*kept.shape[:2], prod(spec.input_size))
            kept = zeros.index_copy_(2, self.kept, kept)
        x = kept.reshape(shape)
        gradient = weight_vjp(x, spec.weight_shape, grad_output, spec, spec.groups)
        if self.kernel is None:
            return gradient.mul_(self.scale)
        factors = gradient.new_zeros(prod(spec.kernel_size))
        return gradient.mul_(factors.index_fill_(0, self.kernel, self.scale).view(spec.kernel_size))


@dataclass(frozen=True, eq=False)
class OutputSample:
    """Some output channels, the same in all groups; or, if groups have one each, some groups.

    The gradient of the input sums over the output channels of a group, so this estimates it.

    Attributes:
        spec: The convolution.
        scale: Inverse of the probability to be kept.
        kept: The channels within a group, or the groups.
    """

    spec: ConvSpec
    scale: float
    kept: Tensor

    @classmethod
    def draw(cls, draw: Draw, spec: ConvSpec) -> OutputSample:
        """Draw channels or groups."""
        channels = spec.weight_shape[0] // spec.groups
        return cls(spec, 1 / draw.keep, draw(channels if channels > 1 else spec.groups))

    def input_gradient(self, weight: Tensor, grad_output: Tensor) -> Tensor:
        """Estimate the gradient of the input, `[N, C_in, *I]`."""
        spec, count = self.spec, len(self.kept)
        if not count:
            return grad_output.new_zeros(spec.input_shape)
        axis = 0 if spec.weight_shape[0] == spec.groups else 1
        w = weight.unflatten(0, (spec.groups, -1)).index_select(axis, self.kept).flatten(0, 1)
        g = grad_output.unflatten(1, (spec.groups, -1)).index_select(axis + 1, self.kept)
        g = g.flatten(1, 2)
        if axis == 1:
            return input_vjp(spec.input_shape, w, g, spec, spec.groups).mul_(self.scale)
        shape = (spec.input_shape[0], count * weight.shape[1], *spec.input_size)
        partial = input_vjp(shape, w, g, spec, count).mul_(self.scale).unflatten(1, (count, -1))
        gradient = grad_output.new_zeros(spec.input_shape)
        gradient.unflatten(1, (spec.groups, -1)).index_copy_(1, self.kept, partial)
        return gradient


def touched(spec: ConvSpec, kernel: Tensor) -> Tensor:
    """The input positions that some kernel positions are ever multiplied with.

    Args:
        spec: The convolution.
        kernel: Kernel positions, counted through all dimensions.

    Returns:
        Input positions, counted through all dimensions, sorted.

    Example:
        >>> touched(ConvSpec((1, 1, 6), (1, 1, 2), stride=2), torch.tensor([1])).tolist()
        [1, 3, 5]
    """
    count = torch.zeros(prod(spec.kernel_size), device=kernel.device)
    count = count.index_fill_(0, kernel, 1.0).view(spec.kernel_size)
    for pattern in spec.patterns():  # each contracts the first axis, and appends its own
        matrix = pattern.sum("o").tensor(count.dtype, kernel.device)
        count = torch.tensordot(count, matrix, dims=([0], [0]))
    return count.flatten().nonzero().flatten()


def weight_vjp(
    x: Tensor, weight_shape: tuple[int, ...], grad_output: Tensor, spec: ConvSpec, groups: int
) -> Tensor:
    """Exact gradient of a weight: torch's kernels where it has the dimension, else a network."""
    if 1 <= spec.dimensions <= 3:
        options = (spec.strides, _padding(spec), spec.dilations, groups)
        vjp = getattr(grad, f"conv{spec.dimensions}d_weight")
        return vjp(x, weight_shape, grad_output, *options)
    network = operations.weight_vjp(_resized(spec, tuple(x.shape), weight_shape, groups))
    return network.simplify().evaluate(input=x, grad_output=grad_output)


def input_vjp(
    input_shape: tuple[int, ...], weight: Tensor, grad_output: Tensor, spec: ConvSpec, groups: int
) -> Tensor:
    """Exact gradient of an input, as `weight_vjp`."""
    if 1 <= spec.dimensions <= 3:
        options = (spec.strides, _padding(spec), spec.dilations, groups)
        vjp = getattr(grad, f"conv{spec.dimensions}d_input")
        return vjp(input_shape, weight, grad_output, *options)
    network = operations.input_vjp(_resized(spec, input_shape, tuple(weight.shape), groups))
    return network.simplify().evaluate(weight=weight, grad_output=grad_output)


def _padding(spec: ConvSpec) -> tuple[int, ...]:
    return tuple(before for before, _ in spec.paddings)


@lru_cache(maxsize=1024)
def _resized(
    spec: ConvSpec, input_shape: tuple[int, ...], weight_shape: tuple[int, ...], groups: int
) -> ConvSpec:
    """The same convolution of fewer channels."""
    return replace(spec, input_shape=input_shape, weight_shape=weight_shape, groups=groups)
