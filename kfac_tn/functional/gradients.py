"""Per-example weight gradients, and the diagonal of their second moment: the GGN's."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from kfac_tn.functional.common import cast, check, concatenate
from kfac_tn.functional.conv import conv_sum_grad_output
from kfac_tn.functional.linear import linear_sum_grad_output
from kfac_tn.functional.networks import (
    Geometry,
    adjoint,
    evaluate,
    seen_positions,
    spatial_sizes,
    tiled,
)
from kfac_tn.functional.pairs import Pair, per_example_gradients
from kfac_tn.functional.squares import sum_squared_gradients
from kfac_tn.functional.torch_kernels import is_depthwise, weight_gradients
from kfac_tn.functional.winograd import KERNEL, WINDOW, transform_inputs
from kfac_tn.tn.conv import Ints, Padding


def conv_per_example_weight_gradient(
    x: Tensor,
    g: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Every example's own gradient with respect to a convolution's weight.

    Args:
        x: Input, `[N, C_in, *spatial]`.
        g: Gradients of the output, `[N, C_out, *output]`, or `V` columns of them, `[V, N, ...]`.
        kernel_size: This and the others as in `conv_input_factor`.
        stride: Default: 1.
        padding: Default: 0.
        dilation: Default: 1.
        groups: Default: 1.
        padding_mode: Default: `"zeros"`.

    Returns:
        `[N, C_out, C_in / groups, *kernel_size]`, or `[V, N, ...]`; their sum over examples is what
        autograd gives.

    Raises:
        ValueError: If the arguments describe no convolution of `x`, or `g` isn't of its output.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 1.0, 0.0]]])
        >>> conv_per_example_weight_gradient(x, torch.ones(2, 1, 2), 2)
        tensor([[[[3., 5.]]],
        <BLANKLINE>
        <BLANKLINE>
                [[[1., 1.]]]])
    """
    geometry = Geometry(kernel_size, stride, padding, dilation, groups, padding_mode)
    return _conv_gradients(x, g, geometry)


def conv_weight_diagonal(
    x: Tensor,
    g: Tensor | Sequence[Tensor],
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    max_memory: int | None = None,
) -> Tensor:
    """Diagonal of the generalised Gauss-Newton matrix of a convolution's weight.

    The sum over columns and examples of squared per-example gradients (Dangel et al. 2020,
    arXiv 1912.10985); these are computed in chunks, and never held all at once. Those of kernels
    that are three wide may be computed by Winograd's algorithm, in float32 on a CPU: its result is
    off by some 1e-6, relatively.

    Args:
        x: Input, `[N, C_in, *spatial]`.
        g: Back-propagated columns of the loss Hessian's root, `[N, C_out, *output]` or
            `[V, N, C_out, *output]`, or a sequence of the former.
        kernel_size: This and the others as in `conv_input_factor`.
        stride: Default: 1.
        padding: Default: 0.
        dilation: Default: 1.
        groups: Default: 1.
        padding_mode: Default: `"zeros"`.
        max_memory: Most bytes to hold besides arguments and result. Default: 64 MiB, or what one
            gradient takes if that is more.

    Returns:
        `[C_out, C_in / groups, *kernel_size]`. A sum: the scale of the loss is in `g`.

    Raises:
        ValueError: If the arguments describe no convolution of `x`, `g` isn't of its output, or a
            single gradient takes more than `max_memory`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 1.0, 0.0]]])
        >>> conv_weight_diagonal(x, torch.ones(2, 1, 2), 2)
        tensor([[[10., 26.]]])
    """
    geometry = Geometry(kernel_size, stride, padding, dilation, groups, padding_mode)
    return _conv_diagonal(x, g, geometry, max_memory)


def conv_transpose_per_example_weight_gradient(
    x: Tensor,
    g: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """Every example's own gradient with respect to a transposed convolution's weight.

    Args:
        x: Input, `[N, C_in, *spatial]`.
        g: Gradients of the output, `[N, C_out, *output]`, or `V` columns of them, `[V, N, ...]`.
        kernel_size: This and the others as in `conv_transpose_input_factor`.
        stride: Default: 1.
        padding: Default: 0.
        output_padding: Default: 0.
        groups: Default: 1.
        dilation: Default: 1.

    Returns:
        `[N, C_in, C_out / groups, *kernel_size]`, or `[V, N, ...]`.

    Raises:
        ValueError: As `conv_per_example_weight_gradient`.

    Example:
        >>> import torch
        >>> x, g = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 1.0]]])
        >>> conv_transpose_per_example_weight_gradient(x, g, 2)
        tensor([[[[1., 2.]]]])
    """
    geometry = Geometry(
        kernel_size, stride, padding, dilation, groups, "zeros", True, output_padding
    )
    return _conv_gradients(x, g, geometry)


def conv_transpose_weight_diagonal(
    x: Tensor,
    g: Tensor | Sequence[Tensor],
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    max_memory: int | None = None,
) -> Tensor:
    """Diagonal of the generalised Gauss-Newton matrix of a transposed convolution's weight.

    Args:
        x: Input, `[N, C_in, *spatial]`.
        g: As in `conv_weight_diagonal`.
        kernel_size: This and the others as in `conv_transpose_input_factor`.
        stride: Default: 1.
        padding: Default: 0.
        output_padding: Default: 0.
        groups: Default: 1.
        dilation: Default: 1.
        max_memory: As in `conv_weight_diagonal`.

    Returns:
        `[C_in, C_out / groups, *kernel_size]`. A sum: the scale of the loss is in `g`.

    Raises:
        ValueError: As `conv_weight_diagonal`.

    Example:
        >>> import torch
        >>> x, g = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 1.0]]])
        >>> conv_transpose_weight_diagonal(x, g, 2)
        tensor([[[1., 4.]]])
    """
    geometry = Geometry(
        kernel_size, stride, padding, dilation, groups, "zeros", True, output_padding
    )
    return _conv_diagonal(x, g, geometry, max_memory)


def conv_bias_diagonal(g: Tensor) -> Tensor:
    """Diagonal of the generalised Gauss-Newton matrix of a (transposed) convolution's bias.

    Args:
        g: Back-propagated columns, `[N, C_out, *output]`. Several columns are further examples.

    Returns:
        `[C_out]`. A sum: the scale of the loss is in `g`.

    Raises:
        ValueError: As `conv_sum_grad_output`.

    Example:
        >>> import torch
        >>> conv_bias_diagonal(torch.ones(2, 1, 3))
        tensor([18.])
    """
    return conv_sum_grad_output(g).square().sum((0, 1))


def linear_per_example_weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Every example's own gradient with respect to a linear layer's weight.

    Args:
        x: Input, `[N, *shared, d_in]`.
        g: Gradients of the output, `[N, *shared, d_out]`, or `V` columns of them, `[V, N, ...]`.

    Returns:
        `[N, d_out, d_in]`, or `[V, N, d_out, d_in]`; their sum over examples is autograd's.

    Raises:
        ValueError: If `g` isn't a gradient of the layer's output.

    Example:
        >>> import torch
        >>> x, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> linear_per_example_weight_gradient(x, g)
        tensor([[[3., 6.]]])
    """
    gradients = per_example_gradients(_linear_pair(x, g)).squeeze(2)
    return gradients if g.ndim > x.ndim else gradients.squeeze(0)


def linear_weight_diagonal(
    x: Tensor, g: Tensor | Sequence[Tensor], max_memory: int | None = None
) -> Tensor:
    """Diagonal of the generalised Gauss-Newton matrix of a linear layer's weight.

    Args:
        x: Input, `[N, *shared, d_in]`.
        g: Back-propagated columns of the loss Hessian's root, `[N, *shared, d_out]` or
            `[V, N, *shared, d_out]`, or a sequence of the former.
        max_memory: As in `conv_weight_diagonal`.

    Returns:
        `[d_out, d_in]`. A sum: the scale of the loss is in `g`.

    Raises:
        ValueError: If `g` isn't a gradient of the layer's output, or a single gradient takes more
            than `max_memory`.

    Example:
        >>> import torch
        >>> x, g = torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.tensor([[3.0], [1.0]])
        >>> linear_weight_diagonal(x, g)
        tensor([[10., 36.]])
    """
    return sum_squared_gradients(_linear_pair(x, g), max_memory).squeeze(0)


def linear_bias_diagonal(g: Tensor) -> Tensor:
    """Diagonal of the generalised Gauss-Newton matrix of a linear layer's bias.

    Args:
        g: Back-propagated columns, `[N, *shared, d_out]`. Several columns are further examples.

    Returns:
        `[d_out]`. A sum: the scale of the loss is in `g`.

    Raises:
        ValueError: As `linear_sum_grad_output`.

    Example:
        >>> import torch
        >>> linear_bias_diagonal(torch.ones(2, 3, 1))
        tensor([18.])
    """
    return linear_sum_grad_output(g).square().sum((0, 1))


# ---- how it is computed ----------------------------------------------------------------------


def _linear_pair(x: Tensor, g: Tensor | Sequence[Tensor]) -> Pair:
    check(x, "x", "[N, *shared, d_in]", 2)
    columns = _columns(x, g)
    if columns[0].shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"g of shape {tuple(columns[0].shape)} must be {[*x.shape[:-1], 'd_out']}, or several "
            f"such columns, for x of shape {tuple(x.shape)}"
        )
    positions = x[0, ..., 0].numel()
    return Pair(
        x,
        columns,
        lambda x: x.reshape(len(x), 1, -1, x.shape[-1]).mT,
        lambda g: g.reshape(*g.shape[:2], 1, -1, g.shape[-1]).mT,
        (1, columns[0].shape[-1], x.shape[-1], positions),
        lambda: (tuple(range(positions)),),
    )


def _conv_gradients(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    pairs, shape = _conv_pairs(x, g, geometry)
    gradients = concatenate([per_example_gradients(pair) for pair in pairs])
    gradients = gradients.reshape(-1, len(x), *shape)
    return gradients if g.ndim > x.ndim else gradients.squeeze(0)


def _conv_diagonal(
    x: Tensor, g: Tensor | Sequence[Tensor], geometry: Geometry, max_memory: int | None
) -> Tensor:
    pairs, shape = _conv_pairs(x, g, geometry)
    total = sum_squared_gradients(pairs[0], max_memory)
    for pair in pairs[1:]:
        total += sum_squared_gradients(pair, max_memory)
    return total.reshape(shape)


def _conv_pairs(
    x: Tensor, g: Tensor | Sequence[Tensor], geometry: Geometry
) -> tuple[list[Pair], tuple[int, ...]]:
    """Pairs that share the columns among them, and the weight's shape."""
    check(x, "x", "[N, C_in, *spatial]", 3)
    columns, groups = _columns(x, g), geometry.groups
    kernel, output = spatial_sizes(x, geometry)
    examples, channels, *sizes = columns[0].shape
    fits = examples == len(x) and tuple(sizes) == output
    if not fits or channels % groups:
        raise ValueError(
            f"g of shape {tuple(columns[0].shape)} must be {[len(x), 'C_out', *output]}, or "
            f"several such columns, with groups={groups} dividing C_out, for x of shape "
            f"{tuple(x.shape)}"
        )
    if not geometry.transposed:
        shape = (channels, x.shape[1] // groups, *kernel)
        return [_conv_pair(x, columns, kernel, geometry)], shape
    # The weight's gradient is bilinear in input and output gradient, which change their roles if
    # the convolution is transposed: it is the output gradient that is unfolded.
    shape = (x.shape[1], channels // groups, *kernel)
    geometry, needed = adjoint(x, geometry)
    for dimension, size in enumerate(needed):
        columns = tuple(column.narrow(dimension + 2, 0, size) for column in columns)
    return [_conv_pair(column, (x,), kernel, geometry) for column in columns], shape


def _conv_pair(
    x: Tensor, g: tuple[Tensor, ...], kernel: tuple[int, ...], geometry: Geometry
) -> Pair:
    groups, channels = geometry.groups, g[0].shape[1]
    d_out, d_in = channels // groups, x.shape[1] // groups * prod(kernel)

    def direct(x: Tensor, g: Tensor) -> Tensor:
        return weight_gradients(cast(x), cast(g), geometry).view(-1, groups, d_out, d_in)

    parts = tiled(x, geometry)

    def tiles(x: Tensor) -> Tensor:
        assert parts is not None
        along, across = parts
        # Transformed before anything is repeated; examples are as many as these times WINDOW then.
        transformed = transform_inputs(
            evaluate("unfold", cast(x), along).unflatten(1, (-1, WINDOW))
        )
        images = transformed.view(WINDOW * len(x), *x.shape[1:-1], -1)
        return evaluate("unfold", images, across).view(WINDOW, len(x), groups, d_in // KERNEL, -1)

    return Pair(
        x,
        g,
        lambda x: evaluate("unfold", cast(x), geometry).unflatten(1, (groups, -1)),
        lambda g: g.unflatten(2, (groups, -1)).flatten(4),
        (groups, d_out, d_in, g[0][0, 0].numel()),
        lambda: seen_positions(x, geometry),
        direct if len(kernel) <= 3 and prod(kernel) > 1 else None,
        is_depthwise(x, channels, geometry),
        None if parts is None else tiles,
    )


def _columns(x: Tensor, g: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One by one."""
    if not isinstance(g, Tensor):
        for column in g:
            check(column, "g", "of the output's shape", x.ndim, most=x.ndim)
        return tuple(g)
    check(g, "g", "of the output's shape, or several such columns", x.ndim, most=x.ndim + 1)
    return g.unbind() if g.ndim > x.ndim else (g,)
