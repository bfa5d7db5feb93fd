"""The networks of a convolution and of its first derivatives.

Indices: `n` batch, `g` group, `c` input and `d` output channel within the group, and per spatial
dimension `i1, i2, ...` input, `o1, o2, ...` output, `k1, k2, ...` kernel position. Only `forward`
is written down. Everything else is a manipulation of it (Dangel 2024, arXiv 2307.02275), and so
holds for transposed convolutions and any number of spatial dimensions.

The cotangent of whatever a network computes is the operand `grad_output`; tangents are
`input_tangent` and `weight_tangent`. Builders are cached: equal specs share their network.
"""

from __future__ import annotations

from functools import lru_cache

from kfac_tn.tn.conv import ConvSpec
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Axes, Node, Operand

# A few hundred shapes are more than a model has; older ones are forgotten.
builder = lru_cache(maxsize=512)


def positions(letter: str, spec: ConvSpec) -> tuple[str, ...]:
    """Names of the input (`"i"`), output (`"o"`) or kernel (`"k"`) positions of a convolution."""
    return tuple(f"{letter}{dimension + 1}" for dimension in range(spec.dimensions))


def _axes(indices: tuple[str, ...]) -> Axes:
    return tuple((index,) for index in indices)


@builder
def forward(spec: ConvSpec) -> Network:
    """Network of the convolution itself.

    Args:
        spec: The convolution.

    Returns:
        Network from `input` and `weight` to the output `[N, C_out, *O]`, without bias.

    Example:
        >>> print(forward(ConvSpec((1, 2, 5), (4, 2, 3))))
        input[n (g c) i1] Pi[k1 o1 i1] weight[(g d) c k1] -> [n (g d) o1]
        c=2 d=4 g=1 i1=5 k1=3 n=1 o1=3
    """
    inputs, outputs, kernel = (positions(letter, spec) for letter in "iok")
    short, long = (inputs, outputs) if spec.transposed else (outputs, inputs)
    weight = (("g", "c"), ("d",)) if spec.transposed else (("g", "d"), ("c",))
    nodes = [Node(Operand("input"), (("n",), ("g", "c"), *_axes(inputs)))]
    sizes = {
        "n": spec.input_shape[0],
        "g": spec.groups,
        "c": spec.input_shape[1] // spec.groups,
        "d": spec.output_shape[1] // spec.groups,
        **dict(zip(inputs, spec.input_size, strict=True)),
        **dict(zip(outputs, spec.output_size, strict=True)),
        **dict(zip(kernel, spec.kernel_size, strict=True)),
    }
    for pattern, k, o, i in zip(spec.patterns(), kernel, short, long, strict=True):
        nodes.append(Node(pattern, ((k,), (o,), (i,))))
    nodes.append(Node(Operand("weight"), (*weight, *_axes(kernel))))
    return Network.build(nodes, [("n",), ("g", "d"), *_axes(outputs)], sizes)


# ---- unfolding ----------------------------------------------------------------------------------


@builder
def unfold_input(spec: ConvSpec) -> Network:
    """Network of the unfolded input (im2col): for each output, what each weight is multiplied by.

    Args:
        spec: The convolution.

    Returns:
        Network from `input` to `[N, C_in * prod(K), prod(O)]`, as `torch.nn.functional.unfold`.

    Example:
        >>> import torch
        >>> network = unfold_input(ConvSpec((2, 3, 8, 8), (4, 3, 3, 3)))
        >>> network.evaluate(input=torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 27, 36])
    """
    kernel, outputs = positions("k", spec), positions("o", spec)
    return forward(spec).without("weight", ("n",), ("g", "c", *kernel), outputs)


@builder
def unfold_kernel(spec: ConvSpec) -> Network:
    """Network of the unfolded kernel: the (Toeplitz) matrix of the convolution of one example.

    The Jacobian of one example's output with respect to its input: rows are outputs, columns
    inputs, and blocks of different groups are zero.

    Args:
        spec: The convolution; its number of examples plays no role.

    Returns:
        Network from `weight` to `[C_out * prod(O), C_in * prod(I)]`, with
        `matrix @ x.flatten(1).T == y.flatten(1).T`.

    Example:
        >>> import torch
        >>> network = unfold_kernel(ConvSpec((1, 1, 4), (1, 1, 2)))
        >>> network.evaluate(weight=torch.tensor([[[1.0, 2.0]]]))
        tensor([[1., 2., 0., 0.],
                [0., 1., 2., 0.],
                [0., 0., 1., 2.]])
    """
    rows, columns = ("g", "d", *positions("o", spec)), ("g'", "c", *positions("i", spec))
    return forward(spec).without("input", rows, columns, split=("g",))


@builder
def fold_output(spec: ConvSpec) -> Network:
    """Network that folds (col2im): the transpose of `unfold_input`, its VJP.

    Args:
        spec: The convolution whose input was unfolded.

    Returns:
        Network from `grad_output`, `[N, C_in * prod(K), prod(O)]`, to `[N, C_in, *I]`, as
        `torch.nn.functional.fold`: what stems from one input position is summed.

    Example:
        >>> import torch
        >>> network = fold_output(ConvSpec((1, 1, 4), (1, 1, 2)))
        >>> network.evaluate(grad_output=torch.ones(1, 2, 3))
        tensor([[[1., 2., 2., 1.]]])
    """
    return unfold_input(spec).contract_with("grad_output").differentiate("input")


# ---- derivatives --------------------------------------------------------------------------------


@builder
def input_vjp(spec: ConvSpec) -> Network:
    """Network of the vector-Jacobian product with respect to the input: what `backward` computes.

    Without `output_padding` and remainders, this is the transposed convolution.

    Args:
        spec: The convolution.

    Returns:
        Network from `weight` and `grad_output`, `[N, C_out, *O]`, to `[N, C_in, *I]`.

    Example:
        >>> import torch
        >>> network = input_vjp(ConvSpec((1, 1, 3), (1, 1, 2)))
        >>> network.evaluate(weight=torch.tensor([[[1.0, 2]]]), grad_output=torch.ones(1, 1, 2))
        tensor([[[1., 3., 2.]]])
    """
    return forward(spec).contract_with("grad_output").differentiate("input")


@builder
def weight_vjp(spec: ConvSpec) -> Network:
    """Network of the vector-Jacobian product with respect to the weight: its gradient.

    Args:
        spec: The convolution.

    Returns:
        Network from `input` and `grad_output`, `[N, C_out, *O]`, to a tensor shaped as the weight,
        summed over examples.

    Example:
        >>> print(weight_vjp(ConvSpec((2, 3, 5), (4, 3, 2))))
        input[n (g c) i1] Pi[k1 o1 i1] grad_output[n (g d) o1] -> [(g d) c k1]
        c=3 d=4 g=1 i1=5 k1=2 n=2 o1=4
    """
    return forward(spec).contract_with("grad_output").differentiate("weight")


@builder
def per_example_weight_vjp(spec: ConvSpec) -> Network:
    """Network of every example's own gradient with respect to the weight.

    Args:
        spec: The convolution.

    Returns:
        Network from `input` and `grad_output`, `[N, C_out, *O]`, to `[N, *weight.shape]`.

    Example:
        >>> per_example_weight_vjp(ConvSpec((2, 3, 5), (4, 3, 2))).shape
        (2, 4, 3, 2)
    """
    return forward(spec).contract_with("grad_output", ("n",)).differentiate("weight")


@builder
def input_jvp(spec: ConvSpec) -> Network:
    """Network of the Jacobian-vector product with respect to the input.

    Args:
        spec: The convolution.

    Returns:
        Network from `input_tangent`, `[N, C_in, *I]`, and `weight` to `[N, C_out, *O]`.

    Example:
        >>> sorted(input_jvp(ConvSpec((1, 1, 3), (1, 1, 2))).operands)
        ['input_tangent', 'weight']
    """
    return forward(spec).replace("input", "input_tangent")


@builder
def weight_jvp(spec: ConvSpec) -> Network:
    """Network of the Jacobian-vector product with respect to the weight.

    Args:
        spec: The convolution.

    Returns:
        Network from `input` and `weight_tangent`, shaped as the weight, to `[N, C_out, *O]`.

    Example:
        >>> sorted(weight_jvp(ConvSpec((1, 1, 3), (1, 1, 2))).operands)
        ['input', 'weight_tangent']
    """
    return forward(spec).replace("weight", "weight_tangent")


# ---- randomised derivatives ---------------------------------------------------------------------

ALONG = ("channels", "spatial", "kernel")
"""What randomised derivatives sample."""


@builder
def randomized_weight_vjp(spec: ConvSpec, along: str = "channels") -> Network:
    """Network of the weight VJP with a part of the input sampled: tensor dropout.

    With a mask that holds `1 / p` with probability `p` and else 0, independently (Bernoulli-CRS:
    Adelman et al. 2021, arXiv 1805.08079), the result is an unbiased estimate of `weight_vjp`,
    and only that part of the input where the mask isn't 0 is needed (Dangel 2024,
    arXiv 2307.02275). A mask of ones gives `weight_vjp` itself.

    Args:
        spec: The convolution.
        along: What is sampled: `"channels"` (default) of the input, `"spatial"` for positions in
            the input, or `"kernel"` for positions in the kernel.

    Returns:
        Network from `input`, `grad_output` and `mask`, of shape `[C_in]`, `[*I]` or `[*K]`, to a
        tensor shaped as the weight.

    Raises:
        ValueError: If `along` is none of these.

    Example:
        >>> network = randomized_weight_vjp(ConvSpec((2, 3, 8, 8), (4, 3, 3, 3)), "spatial")
        >>> network.operands["mask"]
        (8, 8)
    """
    return _mask(weight_vjp(spec), spec, along, ("g", "c"), "i")


@builder
def randomized_input_vjp(spec: ConvSpec, along: str = "channels") -> Network:
    """Network of the input VJP with a part of its sum sampled.

    Masks as for `randomized_weight_vjp`; the result is an unbiased estimate of `input_vjp`.

    Args:
        spec: The convolution.
        along: What is sampled: `"channels"` (default) of the output, `"spatial"` for positions in
            the output, or `"kernel"` for positions in the kernel.

    Returns:
        Network from `weight`, `grad_output` and `mask`, of shape `[C_out]`, `[*O]` or `[*K]`, to
        `[N, C_in, *I]`.

    Raises:
        ValueError: If `along` is none of these.

    Example:
        >>> network = randomized_input_vjp(ConvSpec((2, 3, 8, 8), (4, 3, 3, 3)))
        >>> network.operands["mask"]
        (4,)
    """
    return _mask(input_vjp(spec), spec, along, ("g", "d"), "o")


def _mask(
    network: Network, spec: ConvSpec, along: str, channels: tuple[str, ...], spatial: str
) -> Network:
    if along not in ALONG:
        raise ValueError(f"along={along!r} is none of {ALONG}")
    axes = {
        "channels": (channels,),
        "spatial": _axes(positions(spatial, spec)),
        "kernel": _axes(positions("k", spec)),
    }[along]
    return network.multiply("mask", *axes)
