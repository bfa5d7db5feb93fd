"""Kronecker factors of one layer, as pure functions of tensors.

Scale. With `a` the vectors that a weight matrix multiplies and `g` the back-propagated columns of
the loss Hessian's root, over `N` examples and `R` shared positions (of a convolution: its outputs):

- expand: `A = 1/(N R) sum_{n,r} a a^T` and `B = sum_{n,r} g g^T` (Grosse & Martens 2016,
  arXiv 1602.01407);
- reduce: `A = 1/N sum_n (mean_r a)(mean_r a)^T` and `B = sum_n (sum_r g)(sum_r g)^T` (Eschenhagen
  et al. 2023, arXiv 2311.00636).

`A` therefore doesn't depend on the number of examples, and `B` has the scale of the loss, whatever
its reduction: means over `n` are in `g` already. All factors have a leading axis of groups, of size
1 where a layer has none. Half-precision tensors give float32 factors, also under autocast; float64
ones float64. Everything is differentiable.

Convolutions are evaluated as tensor networks (Dangel 2024, arXiv 2307.02275; `kfac_tn.tn`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn.conv import Ints, Padding

UNFOLD_BYTES = 64 * 2**20
"""Most bytes of unfolded input (or similar copies) held at once; larger batches go in chunks."""

APPROXIMATIONS = ("expand", "reduce")
"""How a Kronecker factor treats shared positions."""


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
    if _check_approximation(approximation) == "reduce":
        rows = conv_average_input(x, *geometry, bias=bias)
        return gram(rows) / len(rows)
    _check(x, "x", "[N, C_in, *spatial]", 3)
    spec = _spec(tuple(x.shape), *map(_hashable, geometry))
    with _full_precision(x):
        factor = _expand_input_factor(x, spec)
    if not bias:
        return factor
    return _border(factor, conv_average_input(x, *geometry).mean(0))


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
    _check(x, "x", "[N, C_in, *spatial]", 3)
    geometry = (kernel_size, stride, padding, dilation, groups, padding_mode)
    network = _average_network(_spec(tuple(x.shape), *map(_hashable, geometry)))
    with _full_precision(x):
        rows = network.evaluate(input=_cast(x))
    return _append_one(rows) if bias else rows


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
    if _check_approximation(approximation) == "reduce":
        return gram(conv_sum_grad_output(g, groups))
    columns = _group_channels(g, groups)
    with _full_precision(g):
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
    return columns.sum(-1, dtype=_dtype(g))


def linear_input_factor(x: Tensor, approximation: str = "expand", bias: bool = False) -> Tensor:
    """Input factor of a linear layer, with or without shared positions.

    Args:
        x: Input, `[N, *shared, d_in]`.
        approximation: `"expand"` (default) or `"reduce"`; the same without shared positions.
        bias: Whether to append a 1 to every vector. Default: no.

    Returns:
        `[1, d, d]`, `d = d_in`, plus 1 with `bias`. The first axis is that of groups, as
        convolutions have. An average over examples (and positions).

    Raises:
        ValueError: If `x` has fewer than two axes or is empty.

    Example:
        >>> linear_input_factor(torch.tensor([[1.0], [3.0]]), bias=True)
        tensor([[[5., 2.],
                 [2., 1.]]])
    """
    if _check_approximation(approximation) == "reduce":
        rows = linear_average_input(x, bias)
        return gram(rows) / len(rows)
    _check(x, "x", "[N, *shared, d_in]", 2)
    rows = _cast(x.reshape(-1, 1, x.shape[-1]))
    factor = gram(rows) / len(rows)
    return _border(factor, rows.mean(0)) if bias else factor


def linear_average_input(x: Tensor, bias: bool = False) -> Tensor:
    """Mean over shared positions of a linear layer's input: the rows of KFAC-reduce.

    Args:
        x: Input, `[N, *shared, d_in]`.
        bias: Whether to append a 1 to every row. Default: no.

    Returns:
        `[N, 1, d]`, with `d` as in `linear_input_factor`.

    Raises:
        ValueError: As `linear_input_factor`.

    Example:
        >>> linear_average_input(torch.tensor([[[1.0], [3.0]]]), bias=True)
        tensor([[[2., 1.]]])
    """
    _check(x, "x", "[N, *shared, d_in]", 2)
    rows = x.reshape(len(x), -1, x.shape[-1]).mean(1, keepdim=True, dtype=_dtype(x))
    return _append_one(rows) if bias else rows


def linear_grad_output_factor(g: Tensor, approximation: str = "expand") -> Tensor:
    """Output-gradient factor of a linear layer, with or without shared positions.

    Args:
        g: Back-propagated columns of the loss Hessian's root, `[N, *shared, d_out]`.
        approximation: `"expand"` (default) or `"reduce"`.

    Returns:
        `[1, d_out, d_out]`; the first axis is that of groups. A sum: the scale is in `g`.

    Raises:
        ValueError: If `g` has fewer than two axes or is empty.

    Example:
        >>> linear_grad_output_factor(torch.ones(2, 3, 1)).item()
        6.0
        >>> linear_grad_output_factor(torch.ones(2, 3, 1), approximation="reduce").item()
        18.0
    """
    if _check_approximation(approximation) == "reduce":
        return gram(linear_sum_grad_output(g))
    _check(g, "g", "[N, *shared, d_out]", 2)
    return gram(g.reshape(-1, 1, g.shape[-1]))


def linear_sum_grad_output(g: Tensor) -> Tensor:
    """Sum over shared positions of a linear layer's output gradients: the rows of KFAC-reduce.

    Args:
        g: Back-propagated columns, `[N, *shared, d_out]`.

    Returns:
        `[N, 1, d_out]`.

    Raises:
        ValueError: As `linear_grad_output_factor`.

    Example:
        >>> linear_sum_grad_output(torch.ones(1, 3, 2))
        tensor([[[3., 3.]]])
    """
    _check(g, "g", "[N, *shared, d_out]", 2)
    return g.reshape(len(g), -1, g.shape[-1]).sum(1, keepdim=True, dtype=_dtype(g))


def gram(rows: Tensor) -> Tensor:
    """Sum over examples of the outer products of rows with themselves.

    Args:
        rows: `[N, groups, d]`.

    Returns:
        `[groups, d, d]`.

    Raises:
        ValueError: If `rows` has not three axes or is empty.

    Example:
        >>> gram(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]))
        tensor([[[1., 2.],
                 [2., 5.]]])
    """
    _check(rows, "rows", "[N, groups, d]", 3, most=3)
    rows = _cast(rows)
    with _full_precision(rows):
        return torch.bmm(rows.permute(1, 2, 0), rows.transpose(0, 1))


# ---- how it is computed ----------------------------------------------------------------------


def _expand_input_factor(x: Tensor, spec: tn.ConvSpec) -> Tensor:
    """Average of the factors of chunks whose unfolded input stays within `UNFOLD_BYTES`."""
    count = len(x)
    unfolded = prod(x.shape[1:2] + spec.kernel_size + spec.output_size) * _dtype(x).itemsize
    size = max(1, UNFOLD_BYTES // unfolded)
    if size >= count:
        return _expand_network(spec).evaluate(input=_cast(x))
    factors = (
        _expand_network(_resize(spec, len(chunk))).evaluate(input=_cast(chunk))
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
    per_example = groups * channels * min(channels, positions) * _dtype(g).itemsize
    total: Tensor | None = None
    for chunk in g.split(max(1, UNFOLD_BYTES // per_example)):
        chunk = _cast(chunk)
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


def _border(factor: Tensor, mean: Tensor) -> Tensor:
    """The factor of vectors with a trailing 1, from that without and the vectors' mean."""
    column = torch.cat([factor, mean.unsqueeze(-1)], -1)
    row = _append_one(mean).unsqueeze(-2)
    return torch.cat([column, row], -2)


def _append_one(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 1), value=1.0)


def _group_channels(g: Tensor, groups: int) -> Tensor:
    """View `[N, C_out, *spatial]` as `[N, groups, C_out / groups, positions]`."""
    _check(g, "g", "[N, C_out, *spatial]", 3)
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


# ---- what is accepted ------------------------------------------------------------------------


def _check(tensor: Tensor, name: str, form: str, least: int, most: int | None = None) -> None:
    if tensor.ndim < least or (most is not None and tensor.ndim > most):
        raise ValueError(f"{name} must be {form}, got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} is empty: skip such batches")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def _check_approximation(approximation: str) -> str:
    if approximation not in APPROXIMATIONS:
        raise ValueError(f"approximation must be one of {APPROXIMATIONS}, got {approximation!r}")
    return approximation


def _hashable(option: object) -> object:
    """Lists as tuples, to be a key of a cache."""
    return tuple(map(_hashable, option)) if isinstance(option, list | tuple) else option


def _dtype(tensor: Tensor) -> torch.dtype:
    """Type to accumulate in: float32 at least."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def _cast(tensor: Tensor) -> Tensor:
    return tensor.to(_dtype(tensor))


def _full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from lowering the precision of products."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
