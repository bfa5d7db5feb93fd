"""The networks behind the functions of convolutions: one for each kind and shape, made once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_tn import tn
from kfac_tn.functional import winograd
from kfac_tn.functional.common import hashable
from kfac_tn.tn.conv import Ints, Padding
from kfac_tn.tn.plan import Plan, plan, run

_BUILDERS = {
    "average": tn.average_unfolded_input,
    "expand": tn.kfac_expand_input_factor,
    "unfold": tn.unfold_input,
}


class Geometry(NamedTuple):
    """What users say of a convolution: all but its numbers of examples and channels."""

    kernel_size: Ints
    stride: Ints
    padding: Padding
    dilation: Ints
    groups: int
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Ints = 0


def evaluate(kind: str, x: Tensor, geometry: Geometry) -> Tensor:
    """Evaluate what a convolution makes of its input alone.

    Args:
        kind: `"average"`, `"expand"` or `"unfold"`.
        x: Input, `[N, C_in, *spatial]`.
        geometry: The convolution.

    Raises:
        ValueError: If this is no convolution of `x`.
    """
    key = _key(x, geometry)
    if torch.compiler.is_compiling():
        # The compiler sees the steps alone, and takes the plan for a constant.
        return run(_compiled_plan(kind, x.dtype, x.device, *key), {"input": x})
    return _network(kind, *key).evaluate(input=x)


def spatial_sizes(x: Tensor, geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of a convolution's kernel and output.

    Raises:
        ValueError: If this is no convolution of `x`.
    """
    return _spatial_sizes(*_key(x, geometry))


def adjoint(x: Tensor, geometry: Geometry) -> tuple[Geometry, tuple[int, ...]]:
    """The convolution that takes a transposed one's output to its input, in the same weight.

    Returns:
        The convolution, and the sizes to which the output is to be cut off before: what output
        padding adds beyond the padding is none of its input.
    """
    kernel, stride, padding, dilation, sizes = _adjoint(*_key(x, geometry))
    return Geometry(kernel, stride, padding, dilation, geometry.groups), sizes


def tiled(x: Tensor, geometry: Geometry) -> tuple[Geometry, Geometry] | None:
    """A convolution as one along the last axis, in tiles, and one across it of what that makes.

    Unfolded, the first has for each tile of outputs all that these meet; the second leaves the last
    axis alone.

    Returns:
        None if kernels aren't as `kfac_tn.functional.winograd` has them, the last tile isn't full,
        or this is compiled, where tiles aren't faster.
    """
    if torch.compiler.is_compiling():
        return None
    return _tiled(*_key(x, geometry))


def seen_positions(x: Tensor, geometry: Geometry) -> tuple[tuple[int, ...], ...]:
    """For each entry of a kernel, the output positions at which it sees more than padding.

    Both are numbered row by row.
    """
    return _seen_positions(*_key(x, geometry))


def spec_of(x: Tensor, geometry: Geometry) -> tn.ConvSpec:
    """All that is to know of a convolution, but that it has one output channel for each group."""
    return _spec(*_key(x, geometry))


def _key(x: Tensor, geometry: Geometry) -> tuple[Any, ...]:
    """Shape and options, to be looked up in a cache.

    A plan is for one shape. Where a compiler has symbols for sizes, a length makes them numbers.
    """
    shape = [len(range(size)) for size in x.shape] if torch.compiler.is_compiling() else x.shape
    return (tuple(shape), *map(hashable, geometry))


@torch.compiler.assume_constant_result
def _compiled_plan(kind: str, dtype: torch.dtype, device: torch.device, *key: Any) -> Plan:
    return plan(_network(kind, *key), dtype, device)


@torch.compiler.assume_constant_result
def _spatial_sizes(*key: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    spec = _spec(*key)
    return spec.kernel_size, spec.output_size


@torch.compiler.assume_constant_result
def _adjoint(*key: Any) -> tuple[Any, ...]:
    spec = _spec(*key)
    extras: Any = spec.output_padding  # normalised: one per dimension
    needed = [
        (before, after - extra)
        for (before, after), extra in zip(spec.paddings, extras, strict=True)
    ]
    sizes = (size + min(0, last) for size, (_, last) in zip(spec.output_size, needed, strict=True))
    padding = tuple((before, max(0, last)) for before, last in needed)
    return spec.kernel_size, spec.strides, padding, spec.dilations, tuple(sizes)


@lru_cache(maxsize=1024)
def _tiled(*key: Any) -> tuple[Geometry, Geometry] | None:
    spec = _spec(*key)
    kernel, strides, dilations = spec.kernel_size, spec.strides, spec.dilations
    paddings, mode = tuple(spec.paddings), spec.padding_mode
    if (kernel[-1], strides[-1], dilations[-1]) != (winograd.KERNEL, 1, 1):
        return None
    if spec.output_size[-1] % winograd.TILE:
        return None
    ones, zeros = (1,) * (len(kernel) - 1), ((0, 0),) * (len(kernel) - 1)
    window, step = (*ones, winograd.WINDOW), (*ones, winograd.TILE)
    along = Geometry(window, step, (*zeros, paddings[-1]), 1, 1, mode)
    across = Geometry(
        (*kernel[:-1], 1), (*strides[:-1], 1), (*paddings[:-1], (0, 0)), dilations, 1, mode
    )
    return along, across


@torch.compiler.assume_constant_result
@lru_cache(maxsize=1024)
def _seen_positions(shape: tuple[int, ...], *options: Any) -> tuple[tuple[int, ...], ...]:
    key = (1, 1, *shape[2:]), *Geometry(*options)._replace(groups=1)
    seen = _network("unfold", *key).evaluate(input=torch.ones(key[0]))
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in seen[0])


@lru_cache(maxsize=1024)
def _network(kind: str, *key: Any) -> tn.Network:
    return _BUILDERS[kind](_spec(*key)).simplify()


@lru_cache(maxsize=1024)
def _spec(shape: tuple[int, ...], *options: Any) -> tn.ConvSpec:
    geometry = Geometry(*options)
    kernel_size, groups = geometry.kernel_size, geometry.groups
    dimensions = len(shape) - 2
    kernel = (kernel_size,) * dimensions if isinstance(kernel_size, int) else kernel_size
    if len(kernel) != dimensions or min(kernel) < 1:
        raise ValueError(
            f"kernel_size={kernel_size} must be one positive number, or one for each of the "
            f"{dimensions} spatial dimensions of x of shape {shape}"
        )
    if groups < 1 or shape[1] % groups:
        raise ValueError(f"groups={groups} must divide the {shape[1]} channels of x")
    # The number of output channels plays no role here: one per group.
    channels = (shape[1], 1) if geometry.transposed else (groups, shape[1] // groups)
    return tn.ConvSpec(
        shape,
        (*channels, *kernel),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups,
        geometry.transposed,
        geometry.output_padding,
        geometry.padding_mode,
    )
