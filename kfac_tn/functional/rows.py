"""Per-example weight gradients in an eigenbasis: the second moments of EKFAC."""

from __future__ import annotations

from torch import Tensor

from kfac_tn.functional import common
from kfac_tn.functional.blocks import multiply_blocks
from kfac_tn.functional.common import cast, check
from kfac_tn.functional.networks import Geometry, evaluate
from kfac_tn.functional.products import append_one
from kfac_tn.tn.autocast import full_precision
from kfac_tn.tn.conv import Ints, Padding


def conv_input_rows(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    bias: bool = False,
) -> Tensor:
    """Unfolded input of a convolution: what a row of the weight is multiplied by, everywhere.

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
        `[groups, N, R, d]`, `R` output positions, `d` in the order of `weight.flatten(1)`.

    Raises:
        ValueError: As `conv_input_factor`.

    Example:
        >>> import torch
        >>> conv_input_rows(torch.arange(4.0).reshape(1, 1, 4), 3, bias=True)
        tensor([[[[0., 1., 2., 1.],
                  [1., 2., 3., 1.]]]])
    """
    geometry = Geometry(kernel_size, stride, padding, dilation, groups, padding_mode)
    return _unfold(x, geometry, bias)


def conv_transpose_input_rows(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    bias: bool = False,
) -> Tensor:
    """Unfolded input of a transposed convolution: for each output, what a weight is multiplied by.

    Args:
        x: Input, `[N, C_in, *spatial]`.
        kernel_size: This and the others as in `conv_transpose_input_factor`.
        stride: Default: 1.
        padding: Default: 0.
        output_padding: Default: 0.
        groups: Default: 1.
        dilation: Default: 1.
        bias: Whether to append a 1 to every row. Default: no.

    Returns:
        `[groups, N, R, d]`, `R` output positions, `d` as in `conv_transpose_input_factor`.

    Raises:
        ValueError: As `conv_transpose_input_factor`.

    Example:
        >>> import torch
        >>> conv_transpose_input_rows(torch.tensor([[[2.0, 3.0]]]), 2)
        tensor([[[[2., 0.],
                  [3., 2.],
                  [0., 3.]]]])
    """
    geometry = Geometry(
        kernel_size, stride, padding, dilation, groups, "zeros", True, output_padding
    )
    return _unfold(x, geometry, bias)


def _unfold(x: Tensor, geometry: Geometry, bias: bool) -> Tensor:
    check(x, "x", "[N, C_in, *spatial]", 3)
    with full_precision(x):
        columns = evaluate("unfold", cast(x), geometry)
    rows = columns.unflatten(1, (geometry.groups, -1)).permute(1, 0, 3, 2)
    return append_one(rows) if bias else rows


def conv_grad_output_rows(g: Tensor, groups: int = 1) -> Tensor:
    """Output gradients of a convolution, position by position.

    Args:
        g: Back-propagated columns, `[N, C_out, *spatial]`.
        groups: Default: 1.

    Returns:
        `[groups, N, R, C_out / groups]`.

    Raises:
        ValueError: As `conv_grad_output_factor`.

    Example:
        >>> import torch
        >>> conv_grad_output_rows(torch.ones(2, 4, 3, 3), groups=2).shape
        torch.Size([2, 2, 9, 2])
    """
    check(g, "g", "[N, C_out, *spatial]", 3)
    if groups < 1 or g.shape[1] % groups:
        raise ValueError(f"groups={groups} must divide the {g.shape[1]} channels of g")
    return cast(g).unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2)


def linear_input_rows(x: Tensor, bias: bool = False) -> Tensor:
    """Inputs of a linear layer, position by position.

    Args:
        x: Input, `[N, *shared, d_in]`.
        bias: Whether to append a 1 to every row. Default: no.

    Returns:
        `[1, N, R, d_in]`, with one more column for the bias.

    Raises:
        ValueError: As `linear_input_factor`.

    Example:
        >>> import torch
        >>> linear_input_rows(torch.ones(2, 5, 3), bias=True).shape
        torch.Size([1, 2, 5, 4])
    """
    check(x, "x", "[N, *shared, d_in]", 2)
    rows = cast(x.reshape(1, len(x), -1, x.shape[-1]))
    return append_one(rows) if bias else rows


def linear_grad_output_rows(g: Tensor) -> Tensor:
    """Output gradients of a linear layer, position by position.

    Args:
        g: Back-propagated columns, `[N, *shared, d_out]`.

    Returns:
        `[1, N, R, d_out]`.

    Raises:
        ValueError: As `linear_input_factor`.

    Example:
        >>> import torch
        >>> linear_grad_output_rows(torch.ones(2, 3)).shape
        torch.Size([1, 2, 1, 3])
    """
    check(g, "g", "[N, *shared, d_out]", 2)
    return cast(g.reshape(1, len(g), -1, g.shape[-1]))


def rotated_second_moment(
    input_rows: Tensor,
    grad_output_rows: Tensor,
    input_vectors: Tensor | None,
    grad_output_vectors: Tensor | None,
) -> Tensor:
    r"""Sum over examples of the squared entries of their weight gradients in an eigenbasis.

    The gradient of one example is sum_r g_r a_r^T over its positions; EKFAC's eigenvalues are the
    sums of the squared entries of Q_B^T (sum_r g_r a_r^T) Q_A (George et al. 2018, Eq. 10).
    Each side is rotated where that takes fewer products: before its rows are contracted, or after.
    Gradients are formed for a few examples at a time.
    Without shared positions no gradient is formed at all: a square of g a^T is the product of the
    squares.

    Args:
        input_rows: a, `[groups, N, R, d_in]`.
        grad_output_rows: g, `[groups, N, R, d_out]`.
        input_vectors: Q_A, `[groups, d_in, d_in]`, or the blocks of a block-diagonal matrix (see
            `kfac_tn.functional.blocks`), or None for unit vectors.
        grad_output_vectors: Q_B, `[groups, d_out, d_out]`, or None.

    Returns:
        `[groups, d_out, d_in]`; as much larger as blocks were filled up.

    Example:
        >>> import torch
        >>> a, g = torch.tensor([[[[1.0, 2.0], [0.0, 1.0]]]]), torch.tensor([[[[3.0], [1.0]]]])
        >>> rotated_second_moment(a, g, torch.eye(2)[None], torch.eye(1)[None])  # 3 a_1 + a_2
        tensor([[[ 9., 49.]]])
    """
    positions, d_in, d_out = *input_rows.shape[2:], grad_output_rows.shape[-1]
    a, g = input_rows, grad_output_rows
    a_first, g_first = positions <= d_out, positions <= d_in
    if a_first:
        a = multiply_rows(a, input_vectors)
    if g_first:
        g = multiply_rows(g, grad_output_vectors)
    if positions == 1:
        return g.squeeze(2).square().mT @ a.squeeze(2).square()
    example = len(a) * a.shape[-1] * g.shape[-1] * a.itemsize
    size = max(
        1, common.UNFOLD_BYTES // (4 * 2 * example)
    )  # a gradient, and its rotation or square
    total: Tensor | None = None
    for some_a, some_g in zip(a.split(size, 1), g.split(size, 1), strict=True):
        gradients = some_g.mT @ some_a
        if not a_first:
            gradients = multiply_rows(gradients, input_vectors)
        if not g_first:
            gradients = multiply_rows(gradients.mT, grad_output_vectors).mT
        moment = gradients.square_().sum(1)
        total = moment if total is None else total.add_(moment)
    assert total is not None
    return total


def multiply_rows(rows: Tensor, matrix: Tensor | None) -> Tensor:
    """`[groups, N, R, d]` times `[groups, d, d]` or blocks: no copy of them for each example."""
    if matrix is None:
        return rows
    matrix = matrix.to(rows)  # a model may have changed its dtype since these were made
    return multiply_blocks(rows.flatten(1, 2), matrix).unflatten(1, rows.shape[1:3])
