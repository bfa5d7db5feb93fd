"""Kronecker factors of convolutions."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from kfac_tn import tn
from kfac_tn.functional import common
from kfac_tn.functional.common import (
    accumulation_dtype,
    append_one,
    border,
    cast,
    check,
    check_approximation,
    full_precision,
    gram,
    hashable,
)
from kfac_tn.tn.conv import Ints, Padding


def conv_input_factor(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    approximation: str = "expand",
    padding_mode: str = "zeros",
    bias: bool = False,
) -> Tensor:
    """Input factor of a convolution in any number of spatial dimensions.

    Args:
        x: Input, `[N, C_in, *spatial]`.
        kernel_size: One number, or one per dimension.
        stride: As in `torch.nn.Conv2d`, whose defaults are those here. Default: 1.
        padding: Number, one per dimension, `(before, after)` per dimension, `"same"` or `"valid"`.
            Default: 0.
        dilation: Default: 1.
        groups: Default: 1.
        approximation: `"expand"` (default, as in the first KFAC for convolutions) averages outer
            products over examples and output positions; `"reduce"` averages vectors over positions
            first, which is far cheaper.
        padding_mode: `"zeros"` (default), `"circular"`, `"reflect"` or `"replicate"`.
        bias: Whether to append a 1 to every unfolded vector, for a bias that joins the weight.
            Default: no.

    Returns:
        `[groups, d, d]`, `d = C_in / groups * prod(kernel_size)`, plus 1 with `bias`; indices in
        the order of `weight.flatten(1)`. An average over examples (and positions).

    Raises:
        ValueError: If the arguments describe no convolution of `x`. The message names the culprit.

    Example:
        >>> x = torch.ones(4, 6, 8, 8)
        >>> conv_input_factor(x, 3, padding=1, groups=2).shape
        torch.Size([2, 27, 27])
        >>> conv_input_factor(x, 1, groups=6, approximation="reduce", bias=True)[0]
        tensor([[1., 1.],
                [1., 1.]])
    """
    geometry = (kernel_size, stride, padding, dilation, groups, padding_mode)
    if check_approximation(approximation) == "reduce":
        rows = conv_average_input(x, *geometry, bias=bias)
        return gram(rows) / len(rows)
    check(x, "x", "[N, C_in, *spatial]", 3)
    spec = _spec(tuple(x.shape), *map(hashable, geometry))
    with full_precision(x):
        factor = _expand_input_factor(x, spec)
    if not bias:
        return factor
    return border(factor, conv_average_input(x, *geometry).mean(0))


def conv_average_input(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    bias: bool = False,
) -> Tensor:
    """Mean over output positions of a convolution's unfolded input: the rows of KFAC-reduce.

    Rows of several calls of one module are to be averaged before `gram`. The input is contracted
    with one small matrix per spatial dimension; nothing is unfolded.

    Args:
        x: Input, `[N, C_in, *spatial]`.
        kernel_size: This and the others as in `conv_input_factor`.
        stride: Default: 1.
        padding: Default: 0.
        dilation: Default: 1.
        groups: Default: 1.
        padding_mode: Default: `"zeros"`.
        bias: Whether to append a 1 to every row. Default: no.

    Returns:
        `[N, groups, d]`, with `d` as in `conv_input_factor`.

    Raises:
        ValueError: As `conv_input_factor`.

    Example:
        >>> x = torch.arange(8.0).reshape(1, 1, 8)
        >>> conv_average_input(x, 2, stride=2, bias=True)  # means of 0, 2, 4, 6 and of 1, 3, 5, 7
        tensor([[[3., 4., 1.]]])
    """
    check(x, "x", "[N, C_in, *spatial]", 3)
    geometry = (kernel_size, stride, padding, dilation, groups, padding_mode)
    network = _average_network(_spec(tuple(x.shape), *map(hashable, geometry)))
    with full_precision(x):
        rows = network.evaluate(input=cast(x))
    return append_one(rows) if bias else rows


def conv_grad_output_factor(g: Tensor, groups: int = 1, approximation: str = "expand") -> Tensor:
    """Output-gradient factor of a convolution.

    Args:
        g: Back-propagated columns of the loss Hessian's root, `[N, C_out, *spatial]`. Several
            columns are further examples.
        groups: Default: 1.
        approximation: `"expand"` (default) or `"reduce"`.

    Returns:
        `[groups, C_out / groups, C_out / groups]`. A sum over examples: the scale is in `g`.

    Raises:
        ValueError: If `g` has no spatial dimension, is empty, or `groups` doesn't divide `C_out`.

    Example:
        >>> g = torch.ones(2, 4, 3, 3)
        >>> conv_grad_output_factor(g, groups=2)[0]
        tensor([[18., 18.],
                [18., 18.]])
        >>> conv_grad_output_factor(g, groups=4, approximation="reduce").flatten()
        tensor([162., 162., 162., 162.])
    """
    if check_approximation(approximation) == "reduce":
        return gram(conv_sum_grad_output(g, groups))
    columns = _group_channels(g, groups)
    with full_precision(g):
        return _expand_grad_output_factor(columns)


def conv_sum_grad_output(g: Tensor, groups: int = 1) -> Tensor:
    """Sum over positions of a convolution's output gradients: the rows of KFAC-reduce.

    Args:
        g: Back-propagated columns, `[N, C_out, *spatial]`.
        groups: Default: 1.

    Returns:
        `[N, groups, C_out / groups]`.

    Raises:
        ValueError: As `conv_grad_output_factor`.

    Example:
        >>> conv_sum_grad_output(torch.ones(1, 2, 3, 3), groups=2)
        tensor([[[9.],
                 [9.]]])
    """
    columns = _group_channels(g, groups)
    return columns.sum(-1, dtype=accumulation_dtype(g))


# ---- how it is computed ----------------------------------------------------------------------


def _expand_input_factor(x: Tensor, spec: tn.ConvSpec) -> Tensor:
    """Average of the factors of chunks whose unfolded input stays within `common.UNFOLD_BYTES`."""
    count = len(x)
    unfolded = (
        prod(x.shape[1:2] + spec.kernel_size + spec.output_size) * accumulation_dtype(x).itemsize
    )
    size = max(1, common.UNFOLD_BYTES // unfolded)
    if size >= count:
        return _expand_network(spec).evaluate(input=cast(x))
    factors = (
        _expand_network(_resize(spec, len(chunk))).evaluate(input=cast(chunk))
        * (len(chunk) / count)
        for chunk in x.split(size)
    )
    total = next(factors)
    for factor in factors:
        total += factor
    return total


def _expand_grad_output_factor(g: Tensor) -> Tensor:
    """Sum over examples and positions, `[N, groups, C, R]`, without a transposed copy of it all.

    Few channels: one product per example and group, summed after; its results are smaller than `g`.
    Many: one product per group, over chunks of examples laid out side by side.
    """
    _, groups, channels, positions = g.shape
    per_example = groups * channels * min(channels, positions) * accumulation_dtype(g).itemsize
    total: Tensor | None = None
    for chunk in g.split(max(1, common.UNFOLD_BYTES // per_example)):
        chunk = cast(chunk)
        if channels <= positions:
            columns = chunk.reshape(-1, channels, positions)
            products = torch.bmm(columns, columns.mT)
            factor = products.reshape(-1, groups, channels, channels).sum(0)
        else:
            columns = chunk.permute(1, 2, 0, 3).reshape(groups, channels, -1)
            factor = torch.bmm(columns, columns.mT)
        total = factor if total is None else total.add_(factor)
    assert total is not None  # `g` is not empty
    return total


def _group_channels(g: Tensor, groups: int) -> Tensor:
    """View `[N, C_out, *spatial]` as `[N, groups, C_out / groups, positions]`."""
    check(g, "g", "[N, C_out, *spatial]", 3)
    if groups < 1 or g.shape[1] % groups:
        raise ValueError(f"groups={groups} must divide the {g.shape[1]} channels of g")
    return g.reshape(len(g), groups, g.shape[1] // groups, -1)


@lru_cache(maxsize=1024)
def _spec(
    shape: tuple[int, ...],
    kernel_size: Ints,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    padding_mode: str,
) -> tn.ConvSpec:
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
    weight_shape = (groups, shape[1] // groups, *kernel)
    return tn.ConvSpec(
        shape, weight_shape, stride, padding, dilation, groups, padding_mode=padding_mode
    )


@lru_cache(maxsize=1024)
def _resize(spec: tn.ConvSpec, count: int) -> tn.ConvSpec:
    """The same convolution of a batch of another size."""
    return replace(spec, input_shape=(count, *spec.input_shape[1:]))


@lru_cache(maxsize=1024)
def _expand_network(spec: tn.ConvSpec) -> tn.Network:
    return tn.kfac_expand_input_factor(spec).simplify()


@lru_cache(maxsize=1024)
def _average_network(spec: tn.ConvSpec) -> tn.Network:
    return tn.average_unfolded_input(spec).simplify()
