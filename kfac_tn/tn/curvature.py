"""The networks of a convolution's curvature: two copies of a first derivative, joined.

The indices are those of `kfac_tn.tn.operations`, primed in the second copy unless the copies share
them: which indices they share is all that tells one curvature from another (Dangel 2024,
arXiv 2307.02275). `v` counts the back-propagated columns of a root of the
loss Hessian, if there are several.
"""

from __future__ import annotations

from fractions import Fraction
from math import prod

from kfac_tn.tn.conv import ConvSpec, positive
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Node, Operand
from kfac_tn.tn.operations import builder, forward, positions, unfold_input

# ---- Kronecker factors --------------------------------------------------------------------------


@builder
def average_unfolded_input(spec: ConvSpec) -> Network:
    """Network of the unfolded input's mean over output positions.

    Args:
        spec: The convolution.

    Returns:
        Network from `input` to `[N, groups, C_in / groups * prod(K)]`.

    Example:
        >>> import torch
        >>> network = average_unfolded_input(ConvSpec((1, 1, 4), (1, 1, 2), stride=2))
        >>> network.evaluate(input=torch.arange(4.0).reshape(1, 1, 4))  # of 0, 2 and of 1, 3
        tensor([[[1., 2.]]])
    """
    columns = ("c", *positions("k", spec))
    summed = unfold_input(spec).with_output(("n",), ("g",), columns)
    return summed.scale(Fraction(1, prod(spec.output_size)))


@builder
def kfac_expand_input_factor(spec: ConvSpec) -> Network:
    """Network of the input's Kronecker factor in KFC / KFAC-expand.

    The mean over examples and output positions of the outer product of the unfolded input with
    itself (Grosse & Martens 2016, arXiv 1602.01407; up to scale).

    Args:
        spec: The convolution.

    Returns:
        Network from `input` to `[groups, d, d]`, `d = C_in / groups * prod(K)`: input channel, then
        kernel position, as in `weight.flatten(1)` (of a convolution that is not transposed).

    Example:
        >>> kfac_expand_input_factor(ConvSpec((8, 4, 9, 9), (6, 2, 3, 3), groups=2)).shape
        (2, 18, 18)
    """
    count = prod(spec.output_size) * spec.input_shape[0]
    outputs, columns = positions("o", spec), ("c", *positions("k", spec))
    factor = _gram(unfold_input(spec), ("n", "g", *outputs), columns)
    return factor.scale(Fraction(1, count))


@builder
def kfac_reduce_input_factor(spec: ConvSpec) -> Network:
    """Network of the input's Kronecker factor in KFAC-reduce.

    The mean over examples of the outer product with itself of the unfolded input's mean over output
    positions (Eschenhagen et al. 2023, arXiv 2311.00636).

    Args:
        spec: The convolution.

    Returns:
        Network from `input` to `[groups, d, d]`, as `kfac_expand_input_factor`.

    Example:
        >>> spec = ConvSpec((8, 4, 9, 9), (6, 2, 3, 3), groups=2)
        >>> reduce, expand = kfac_reduce_input_factor(spec), kfac_expand_input_factor(spec)
        >>> reduce.simplify().flops < expand.flops / 10
        True
    """
    factor = _gram(average_unfolded_input(spec), ("n", "g"), ("c", *positions("k", spec)))
    return factor.scale(Fraction(1, spec.input_shape[0]))


@builder
def kfac_expand_grad_output_factor(spec: ConvSpec) -> Network:
    """Network of the output gradient's Kronecker factor in KFC / KFAC-expand.

    The sum over examples and output positions of the outer product of the output gradient with
    itself (Grosse & Martens 2016, arXiv 1602.01407; up to scale).

    Args:
        spec: The convolution.

    Returns:
        Network from `grad_output`, `[N, C_out, *O]`, to `[groups, d, d]`, `d = C_out / groups`. A
        sum: the scale of the loss is in `grad_output`. Several columns are further examples.

    Example:
        >>> import torch
        >>> network = kfac_expand_grad_output_factor(ConvSpec((2, 1, 4), (1, 1, 2)))
        >>> network.evaluate(grad_output=torch.ones(2, 1, 3))
        tensor([[[6.]]])
    """
    return _gram(_grad_output(spec), ("n", "g", *positions("o", spec)), ("d",))


@builder
def kfac_reduce_grad_output_factor(spec: ConvSpec) -> Network:
    """Network of the output gradient's Kronecker factor in KFAC-reduce.

    The sum over examples of the outer product with itself of the output gradient's sum over output
    positions (Eschenhagen et al. 2023, arXiv 2311.00636).

    Args:
        spec: The convolution.

    Returns:
        Network from `grad_output` to `[groups, d, d]`, as `kfac_expand_grad_output_factor`.

    Example:
        >>> import torch
        >>> network = kfac_reduce_grad_output_factor(ConvSpec((2, 1, 4), (1, 1, 2)))
        >>> network.evaluate(grad_output=torch.ones(2, 1, 3))
        tensor([[[18.]]])
    """
    return _gram(_grad_output(spec), ("n", "g"), ("d",))


def _grad_output(spec: ConvSpec) -> Network:
    """Network that is the output gradient and nothing else."""
    convolution = forward(spec)
    node = Node(Operand("grad_output"), convolution.output)
    return Network.build([node], convolution.output, convolution.size)


def _gram(rows: Network, share: tuple[str, ...], columns: tuple[str, ...]) -> Network:
    """Join rows with themselves, and sum over what the copies share, but for the group."""
    primed = tuple(f"{index}'" for index in columns)
    return rows.join(rows, share, [("g",), columns, primed])


# ---- generalised Gauss-Newton -------------------------------------------------------------------
#
# With J[v, n] the gradient that one column gives the weight for one example, the matrix is the sum
# over v and n of J J^T.


def _weight_gradients(spec: ConvSpec, columns: int) -> Network:
    """Network of `[V, N, *weight.shape]`: each column's and each example's gradient."""
    leading = {"v": positive("columns", columns)}
    product = forward(spec).contract_with("grad_output", ("v",), ("n",), leading=leading)
    return product.differentiate("weight")


@builder
def ggn_diagonal(spec: ConvSpec, columns: int = 1) -> Network:
    """Network of the diagonal of the weight's generalised Gauss-Newton matrix.

    The sum over columns and examples of squared gradients (Dangel et al. 2020, arXiv 1912.10985).
    With output gradients for columns, the diagonal of the gradients' second moment.

    Args:
        spec: The convolution.
        columns: Number `V` of back-propagated columns of the loss Hessian's root. Default: 1.

    Returns:
        Network from `input` and `grad_output`, `[V, N, C_out, *O]`, to a tensor shaped as the
        weight. A sum: the scale of the loss is in `grad_output`.

    Raises:
        ValueError: If `columns` is no number of columns.

    Example:
        >>> network = ggn_diagonal(ConvSpec((2, 3, 5), (4, 3, 2)), columns=10)
        >>> network.operands["grad_output"], network.shape
        ((10, 2, 4, 4), (4, 3, 2))
    """
    rows = _weight_gradients(spec, columns)
    return rows.join(rows, rows.output_indices, forward(spec).axes_of("weight"))


@builder
def ggn_gram(spec: ConvSpec, columns: int = 1, second: ConvSpec | None = None) -> Network:
    """Network of the Gram matrix of the weight's gradients: all inner products between examples.

    It has the non-zero eigenvalues of the generalised Gauss-Newton matrix (Dangel et al. 2022,
    arXiv 2106.02624); with back-propagated unit vectors of the model's outputs as columns, it is
    the layer's part of the empirical neural tangent kernel.

    Args:
        spec: The convolution.
        columns: Number `V` of back-propagated columns of the loss Hessian's root. Default: 1.
        second: The same convolution of another batch, between which and the first the inner
            products are taken. Default: the same batch.

    Returns:
        Network from `input` and `grad_output`, `[V, N, C_out, *O]`, to `[V, N, V, N]`. With
        `second`, the last two axes are those of the further operands `input_2` and `grad_output_2`.

    Raises:
        ValueError: If the two convolutions' weights don't have the same shape and groups, or
            `columns` is no number of columns.

    Example:
        >>> ggn_gram(ConvSpec((2, 3, 5), (4, 3, 2)), columns=10).shape
        (10, 2, 10, 2)
    """
    rows = others = _weight_gradients(spec, columns)
    if second is not None:
        others = _weight_gradients(second, columns)
        others = others.replace("input", "input_2").replace("grad_output", "grad_output_2")
    share = [index for index in rows.output_indices if index not in ("v", "n")]
    return rows.join(others, share, [("v",), ("n",), ("v'",), ("n'",)])


@builder
def ggn_block(spec: ConvSpec, columns: int = 1) -> Network:
    """Network of the weight's block of the generalised Gauss-Newton matrix, for small layers.

    Channels of different groups share the loss, hence their entries aren't zero: the matrix has
    no structure of groups.

    Args:
        spec: The convolution.
        columns: Number `V` of back-propagated columns of the loss Hessian's root. Default: 1.

    Returns:
        Network from `input` and `grad_output`, `[V, N, C_out, *O]`, to `[d, d]`, `d` the number of
        weights, in the order of `weight.flatten()`.

    Raises:
        ValueError: If `columns` is no number of columns.

    Example:
        >>> ggn_block(ConvSpec((2, 3, 5), (4, 3, 2)), columns=10).shape
        (24, 24)
    """
    rows = _weight_gradients(spec, columns)
    weights = tuple(i for axis in forward(spec).axes_of("weight") for i in axis)
    primed = tuple(f"{index}'" for index in weights)
    return rows.join(rows, ("v", "n"), [weights, primed])


# ---- curvature, back-propagated through the layer -----------------------------------------------
#
# With J the Jacobian of one example's output with respect to its input, the (approximate) Hessian H
# of the loss with respect to the output becomes J^T H J with respect to the input.


@builder
def hbp_backward(spec: ConvSpec) -> Network:
    """Network that takes each example's Hessian from the layer's output to its input.

    `H_in[n] = J^T H_out[n] J`, `J` the unfolded kernel: Hessian back-propagation (Dangel et al.
    2020, arXiv 1902.01813), which is exact, for the layer is linear in its input.

    Args:
        spec: The convolution.

    Returns:
        Network from `weight` and `output_hessian`, `[N, d_out, d_out]`, to `[N, d_in, d_in]`, with
        `d_out = C_out * prod(O)` and `d_in = C_in * prod(I)`, as in `y[0].flatten()`.

    Example:
        >>> hbp_backward(ConvSpec((5, 2, 4), (3, 2, 2))).shape
        (5, 8, 8)
    """
    return _sandwich(spec, ("n",))


@builder
def kfra_backward(spec: ConvSpec) -> Network:
    """Network that takes a batch-averaged Hessian from the layer's output to its input.

    `H_in = J^T H_out J`, `J` the unfolded kernel: the recursion of KFRA (Botev et al. 2017,
    arXiv 1706.03662) in a linear layer. As `J` is the same for all examples, it
    doesn't matter here whether the average is taken before or after.

    Args:
        spec: The convolution; its number of examples plays no role.

    Returns:
        Network from `weight` and `output_hessian`, `[d_out, d_out]`, to `[d_in, d_in]`, as
        `hbp_backward`.

    Example:
        >>> kfra_backward(ConvSpec((5, 2, 4), (3, 2, 2))).shape
        (8, 8)
    """
    return _sandwich(spec)


def _sandwich(spec: ConvSpec, *batch: tuple[str, ...]) -> Network:
    """Contract a Hessian over outputs with two copies of the unfolded kernel."""
    convolution = forward(spec)
    jacobian = convolution.without("input")
    rows, columns = (
        [tuple(f"{index}{prime}" for index in side) for prime in ("", "'")]
        for side in (("g", "d", *positions("o", spec)), ("g", "c", *positions("i", spec)))
    )
    pair = jacobian.join(jacobian, (), ())
    hessian = pair.multiply("output_hessian", *batch, *rows, sizes=convolution.size)
    return hessian.with_output(*batch, *columns)


@builder
def hessian_diagonal_backward(spec: ConvSpec) -> Network:
    """Network that takes each example's Hessian diagonal from the layer's output to its input.

    `h_in = (J * J)^T h_out`, `J` the unfolded kernel: off-diagonal entries are dropped in each
    layer (Becker & LeCun 1989; Elsayed & Mahmood 2022, arXiv 2210.11639).

    Args:
        spec: The convolution.

    Returns:
        Network from `weight` and `output_hessian_diagonal`, `[N, C_out, *O]`, to `[N, C_in, *I]`.

    Example:
        >>> hessian_diagonal_backward(ConvSpec((5, 2, 4), (3, 2, 2))).shape
        (5, 2, 4)
    """
    return _squared_coefficients(spec, "input")


@builder
def hessian_diagonal_weight(spec: ConvSpec) -> Network:
    """Network that takes each example's Hessian diagonal from the layer's output to its weight.

    The sum over examples and output positions of the squared unfolded input, times the diagonal:
    what `hessian_diagonal_backward` is for the input.

    Args:
        spec: The convolution.

    Returns:
        Network from `input` and `output_hessian_diagonal`, `[N, C_out, *O]`, to a tensor shaped as
        the weight.

    Example:
        >>> hessian_diagonal_weight(ConvSpec((5, 2, 4), (3, 2, 2))).shape
        (3, 2, 2)
    """
    return _squared_coefficients(spec, "weight")


def _squared_coefficients(spec: ConvSpec, name: str) -> Network:
    """Square the derivative with respect to an operand, and contract it with a diagonal."""
    convolution = forward(spec)
    axes, coefficients = convolution.axes_of(name), convolution.without(name)
    kept = {*convolution.output_indices, *(index for axis in axes for index in axis)}
    squared = coefficients.join(coefficients, kept & set(coefficients.size), ())
    return squared.multiply(
        "output_hessian_diagonal", *convolution.output, sizes=convolution.size
    ).with_output(*axes)
