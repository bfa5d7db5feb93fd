"""Kronecker factors of convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kfac_tn.functional.common import (
    cast,
    cast_chunks,
    check,
    check_approximation,
    concatenate,
    split,
)
from kfac_tn.functional.networks import Geometry, evaluate
from kfac_tn.functional.products import append_one, average_gram, border, gram, sum_grams
from kfac_tn.tn import gemm
from kfac_tn.tn.autocast import full_precision
from kfac_tn.tn.conv import Ints, Padding
from kfac_tn.tn.gram.unfolding import side_by_side

FEW = 32
"""Channels of each of several groups, up to which copies for large products don't pay."""


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
        >>> import torch
        >>> x = torch.ones(4, 6, 8, 8)
        >>> conv_input_factor(x, 3, padding=1, groups=2).shape
        torch.Size([2, 27, 27])
        >>> conv_input_factor(x, 1, groups=6, approximation="reduce", bias=True)[0]
        tensor([[1., 1.],
                [1., 1.]])
    """
    geometry = Geometry(kernel_size, stride, padding, dilation, groups, padding_mode)
    return input_factor(x, geometry, approximation, bias)


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
        >>> import torch
        >>> x = torch.arange(8.0).reshape(1, 1, 8)
        >>> conv_average_input(x, 2, stride=2, bias=True)  # means of 0, 2, 4, 6 and of 1, 3, 5, 7
        tensor([[[3., 4., 1.]]])
    """
    geometry = Geometry(kernel_size, stride, padding, dilation, groups, padding_mode)
    return average_input(x, geometry, bias)


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
        >>> import torch
        >>> g = torch.ones(2, 4, 3, 3)
        >>> conv_grad_output_factor(g, groups=2)[0]
        tensor([[18., 18.],
                [18., 18.]])
        >>> conv_grad_output_factor(g, groups=4, approximation="reduce").flatten()
        tensor([162., 162., 162., 162.])
    """
    if check_approximation(approximation) == "reduce":
        return gram(conv_sum_grad_output(g, groups))
    _check_channels(g, groups)
    with full_precision(g):
        return _expand_grad_output_factor(g, groups)


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
        >>> import torch
        >>> conv_sum_grad_output(torch.ones(1, 2, 3, 3), groups=2)
        tensor([[[9.],
                 [9.]]])
    """
    _check_channels(g, groups)
    positions = tuple(range(2, g.ndim))
    sums = concatenate([cast(chunk).sum(positions) for chunk in cast_chunks(g)])
    return sums.unflatten(1, (groups, -1))


# ---- how it is computed ----------------------------------------------------------------------


def input_factor(x: Tensor, geometry: Geometry, approximation: str, bias: bool) -> Tensor:
    """Input factor, as `conv_input_factor`, also of transposed convolutions."""
    if check_approximation(approximation) == "reduce":
        rows = average_input(x, geometry, bias)
        return average_gram(rows)
    check(x, "x", "[N, C_in, *spatial]", 3)
    with full_precision(x):
        factor = _expand_input_factor(x, geometry)
    return border(factor, average_input(x, geometry, False).mean(0)) if bias else factor


def average_input(x: Tensor, geometry: Geometry, bias: bool) -> Tensor:
    """Rows of KFAC-reduce, as `conv_average_input`, also of transposed convolutions."""
    check(x, "x", "[N, C_in, *spatial]", 3)
    with full_precision(x):
        chunks = [evaluate("average", cast(chunk), geometry) for chunk in cast_chunks(x)]
    rows = concatenate(chunks)
    return append_one(rows) if bias else rows


def _expand_input_factor(x: Tensor, geometry: Geometry) -> Tensor:
    """Average of the factors of chunks that are cast one after the other."""
    chunks = cast_chunks(x)
    total = evaluate("expand", cast(chunks[0]), geometry)
    if len(chunks) == 1:
        return total
    total = total * (len(chunks[0]) / len(x))
    for chunk in chunks[1:]:
        total.add_(evaluate("expand", cast(chunk), geometry), alpha=len(chunk) / len(x))
    return total


def _expand_grad_output_factor(g: Tensor, groups: int) -> Tensor:
    """Sum over examples and positions, without a transposed copy of it all.

    Examples are laid side by side, some at a time, for few, large products. They are already if
    channels come last, which is of no use to a product over groups of few channels; large ones are
    multiplied where they are, and so are those of groups of few channels, each apart.
    """
    channels, positions = g.shape[1] // groups, g[0, 0].numel()
    if g.stride(0) == positions * g.stride(-1) and (groups == 1 or channels >= 16):
        chunks = cast_chunks(g)
    elif groups > 1 and channels <= min(FEW, positions):
        return _sum_of_products(split(g, g.shape[1] * (positions + channels)), groups)
    else:
        chunks = g.split(side_by_side(g.shape[1], positions))

    def columns(chunk: Tensor) -> Tensor:
        return cast(chunk.unflatten(1, (groups, channels)).movedim(0, 2)).flatten(2)

    return sum_grams(chunks, columns)


def _sum_of_products(chunks: Sequence[Tensor], groups: int) -> Tensor:
    """Sum over chunks of each example's product, which isn't larger than the example itself."""

    def factor(chunk: Tensor) -> Tensor:
        columns = cast(chunk).reshape(len(chunk) * groups, chunk.shape[1] // groups, -1)
        return gemm.multiply(columns, columns.mT).unflatten(0, (-1, groups)).sum(0)

    total = factor(chunks[0])
    for chunk in chunks[1:]:
        total += factor(chunk)
    return total


def _check_channels(g: Tensor, groups: int) -> None:
    check(g, "g", "[N, C_out, *spatial]", 3)
    if groups < 1 or g.shape[1] % groups:
        raise ValueError(f"groups={groups} must divide the {g.shape[1]} channels of g")
