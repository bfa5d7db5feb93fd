"""Kronecker factors of transposed convolutions."""

from __future__ import annotations

from torch import Tensor

from kfac_tn.functional.conv import (
    average_input,
    conv_grad_output_factor,
    conv_sum_grad_output,
    input_factor,
)
from kfac_tn.functional.networks import Geometry
from kfac_tn.tn.conv import Ints, Padding


def conv_transpose_input_factor(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    approximation: str = "expand",
    bias: bool = False,
) -> Tensor:
    """Input factor of a transposed convolution in any number of spatial dimensions.

    Args:
        x: Input, `[N, C_in, *spatial]`.
        kernel_size: One number, or one per dimension.
        stride: This and the others, and their order, as in `torch.nn.functional.conv_transpose2d`.
            Default: 1.
        padding: Positions cut off both sides of the output. Default: 0.
        output_padding: Positions added after the output. Default: 0.
        groups: Default: 1.
        dilation: Default: 1.
        approximation: `"expand"` (default) or `"reduce"`, as in `conv_input_factor`.
        bias: Whether to append a 1 to every vector, for a bias that joins the weight. Default: no.

    Returns:
        `[groups, d, d]`, `d = C_in / groups * prod(kernel_size)`, plus 1 with `bias`. Indices are
        input channel, then kernel position: those of the weight in its native layout, `[C_in,
        C_out / groups, *kernel_size]`, but for the second axis, which is that of the
        output-gradient factor. An average over examples (and output positions).

    Raises:
        ValueError: If the arguments describe no transposed convolution of `x`.

    Example:
        >>> import torch
        >>> x = torch.ones(4, 6, 8, 8)
        >>> conv_transpose_input_factor(x, 3, stride=2, groups=2).shape
        torch.Size([2, 27, 27])
        >>> conv_transpose_input_factor(x[:1, :1, :1, 0], 2)[0]  # outputs see one weight each
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    geometry = Geometry(
        kernel_size, stride, padding, dilation, groups, "zeros", True, output_padding
    )
    return input_factor(x, geometry, approximation, bias)


def conv_transpose_average_input(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    bias: bool = False,
) -> Tensor:
    """Mean over output positions of a transposed convolution's unfolded input: KFAC-reduce's rows.

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
        `[N, groups, d]`, with `d` as in `conv_transpose_input_factor`.

    Raises:
        ValueError: As `conv_transpose_input_factor`.

    Example:
        >>> import torch
        >>> conv_transpose_average_input(torch.tensor([[[2.0, 4.0]]]), 2, stride=2)
        tensor([[[1.5000, 1.5000]]])
    """
    geometry = Geometry(
        kernel_size, stride, padding, dilation, groups, "zeros", True, output_padding
    )
    return average_input(x, geometry, bias)


# Gradients of an output don't tell how it came about.
conv_transpose_grad_output_factor = conv_grad_output_factor
conv_transpose_sum_grad_output = conv_sum_grad_output
