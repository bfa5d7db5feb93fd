"""Every operation of a convolution against torch: its convolutions, autograd and torch.func."""

import pickle
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn.pattern import PADDING_MODES

torch.set_num_threads(1)
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SIZES = {1: (3, 9), 2: (3, 5), 3: (2, 3), 4: (2, 2)}
COLUMNS = 2
BUILDERS = [value for value in vars(tn).values() if hasattr(value, "cache_info")]


@st.composite
def specs(draw, least=1, most=3, transposed=False):
    """Convolutions of few numbers, with every option; small enough for their dense Jacobian."""
    dimensions = draw(st.integers(least, most))
    low, high = SIZES[dimensions]

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    size, stride, dilation = each(low, high), each(1, 3), each(1, 3)
    kernel = each(1, min(3, high))
    pairs = tuple(zip(each(0, 2), each(0, 2), strict=True))
    paddings = [pairs, pairs, each(0, 2), draw(st.integers(0, 1))]
    if not transposed:
        paddings += ["valid"] + ["same"] * (max(stride) == 1)
    groups, c, d = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    extra = tuple(
        draw(st.integers(0, max(s, e) - 1)) for s, e in zip(stride, dilation, strict=True)
    )
    try:
        return tn.ConvSpec(
            (draw(st.integers(1, 2)), groups * c, *size),
            (groups * c, d, *kernel) if transposed else (groups * d, c, *kernel),
            stride,
            draw(st.sampled_from(paddings)),
            dilation,
            groups,
            transposed,
            extra if transposed else 0,
            "zeros" if transposed else draw(st.sampled_from(PADDING_MODES)),
        )
    except ValueError as error:  # no output, or more padding than the mode can have
        assume("leaves no output" not in str(error))
        assume("spans" not in str(error))
        assume("needs padding <" not in str(error))
        raise


ANY = st.one_of(specs(), specs(transposed=True))
ANY_4D = st.one_of(specs(4, 4), specs(4, 4, transposed=True))


@st.composite
def far(draw):
    """Convolutions with more padding than kernel: along some axes, windows see nothing else."""
    dimensions, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    stride = each(1, 6)
    try:
        return tn.ConvSpec(
            (draw(st.integers(1, 2)), 2, *each(1, 2)),
            (2, draw(st.integers(1, 2)), *each(1, 2)),
            stride,
            tuple(zip(each(0, 5), each(0, 2), strict=True)),
            each(1, 2),
            transposed=transposed,
            output_padding=tuple(s - 1 for s in stride) if transposed else 0,
            padding_mode=draw(st.sampled_from(["zeros"] + ["replicate"] * (not transposed))),
        )
    except ValueError as error:
        assume("leaves no output" not in str(error))
        assume("spans" not in str(error))
        assume("does not take" not in str(error))
        raise


BEFORE_THE_INPUT = (
    tn.ConvSpec((1, 1, 1), (1, 1, 2), stride=3, padding=((3, 0),)),
    tn.ConvSpec((1, 1, 1), (1, 1, 2), stride=3, padding=((3, 0),), padding_mode="replicate"),
    tn.ConvSpec((2, 1, 1, 3, 1), (1, 1, 1, 1, 2), (2, 1, 3), ((3, 3), (0, 3), (3, 0))),
    tn.ConvSpec((1, 1, 1), (1, 1, 1), 6, ((5, 0),), transposed=True, output_padding=5),
)
"""All windows are in the padding before the input, with room left between the two."""


# ---- the oracle: torch's convolutions, and loops over the kernel where it has none ---------------


def pad(x, spec):
    """Pad one axis after the other: torch knows most modes for three dimensions at most."""
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    for axis, sides in enumerate(spec.padding, start=2):
        lines = x.movedim(axis, -1)
        padded = F.pad(lines.reshape(1, -1, lines.shape[-1]), sides, mode=mode)
        x = padded.reshape(*lines.shape[:-1], -1).movedim(-1, axis)
    return x


def loop(x, weight, spec, sizes):
    """Convolve a padded input, one slice for each kernel position."""
    x, weight = x.unflatten(1, (spec.groups, -1)), weight.unflatten(0, (spec.groups, -1))
    total = 0
    for position in product(*map(range, spec.kernel_size)):
        geometry = zip(position, spec.dilation, sizes, spec.stride, strict=True)
        slices = tuple(slice(k * e, k * e + (o - 1) * s + 1, s) for k, e, o, s in geometry)
        taken = x[(..., *slices)]
        total = total + torch.einsum("ngc...,gdc->ngd...", taken, weight[(..., *position)])
    return total.flatten(1, 2)


def convolve(x, weight, spec):
    """The convolution of a spec, without a bias."""
    options = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}
    if not spec.transposed:
        padded = pad(x, spec)
        if spec.dimensions in CONV:
            return CONV[spec.dimensions](padded, weight, **options)
        return loop(padded, weight, spec, spec.output_size)
    sides = [side for pair in reversed(spec.padding) for side in pair]
    if spec.dimensions in CONV:  # padding takes away from the output, here what is asymmetric, too
        options["output_padding"] = spec.output_padding
        full = CONV_TRANSPOSE[spec.dimensions](x, weight, **options)
    else:  # the VJP of a convolution
        size = [o + sum(p) for o, p in zip(spec.output_size, spec.padding, strict=True)]
        zeros = x.new_zeros(len(x), spec.output_shape[1], *size)
        _, vjp = torch.func.vjp(lambda z: loop(z, weight, spec, spec.input_size), zeros)
        (full,) = vjp(x)
    return F.pad(full, [-side for side in sides])


class Oracle:
    """The results of all operations, from the Jacobians of torch's convolution."""

    def __init__(self, spec, operands):
        self.spec, self.x, self.weight = spec, operands["input"], operands["weight"]
        self.operands = operands
        # Jacobians with respect to the input of one example and to the weight, as matrices
        rows, columns = prod(spec.output_shape[1:]), prod(spec.input_shape[1:])
        basis = torch.eye(columns, dtype=torch.float64).reshape(-1, *spec.input_shape[1:])
        self.by_input = convolve(basis, self.weight, spec).reshape(columns, rows).T
        basis = torch.eye(self.weight.numel(), dtype=torch.float64)
        basis = basis.reshape(-1, *spec.weight_shape)
        jacobian = torch.vmap(lambda w: convolve(self.x, w, spec))(basis)
        self.by_weight = jacobian.flatten(2).permute(1, 2, 0)  # [N, outputs, weights]

    def unfolded(self):
        """[N, G, C * K, O]: what the weights of any one output channel are multiplied by."""
        spec, n = self.spec, len(self.x)
        channels = [spec.groups, spec.output_shape[1] // spec.groups]
        positions, kernel = prod(spec.output_size), prod(spec.kernel_size)
        jacobian = self.by_weight.reshape(n, *channels, positions, spec.groups, -1, kernel)
        groups = torch.arange(spec.groups)
        first = jacobian[:, :, 0].movedim(1, 0)[groups, :, :, groups]  # [G, N, O, C D or D C, K]
        split = (-1, channels[1]) if spec.transposed else (channels[1], -1)
        first = first.unflatten(3, split).select(4 if spec.transposed else 3, 0)
        return first.flatten(3).permute(1, 0, 3, 2)

    def gradients(self):
        """[V, N, *weight]: the gradient for each column and each example, by autograd."""

        def of_one(x, g):
            _, vjp = torch.func.vjp(lambda w: convolve(x[None], w, self.spec), self.weight)
            return vjp(g[None])[0]

        over_examples = torch.vmap(of_one)
        return torch.stack([over_examples(self.x, g) for g in self.operands["grad_outputs"]])

    def results(self):
        """What each builder's network is to be evaluated on, and what it is to give."""
        spec, x, weight, operands = self.spec, self.x, self.weight, self.operands
        n, groups, g = len(x), spec.groups, operands["grad_output"]
        forward = lambda x, weight: convolve(x, weight, spec)  # noqa: E731
        output, vjp = torch.func.vjp(forward, x, weight)
        input_vjp, weight_vjp = vjp(g)
        yield tn.forward, (x, weight), output
        yield tn.input_vjp, (weight, g), input_vjp
        yield tn.weight_vjp, (x, g), weight_vjp
        dx, dw = operands["input_tangent"], operands["weight_tangent"]
        along = lambda *d: torch.func.jvp(forward, (x, weight), d)[1]  # noqa: E731
        yield tn.input_jvp, (dx, weight), along(dx, torch.zeros_like(weight))
        yield tn.weight_jvp, (x, dw), along(torch.zeros_like(x), dw)

        unfolded, mean = self.unfolded(), self.unfolded().mean(-1)
        yield tn.unfold_input, (x,), unfolded.flatten(1, 2)
        unfold = lambda x: Oracle(spec, {**operands, "input": x}).unfolded().flatten(1, 2)  # noqa: E731
        cotangent = torch.rand_like(unfolded.flatten(1, 2))
        yield tn.fold_output, (cotangent,), torch.func.vjp(unfold, x)[1](cotangent)[0]
        yield tn.average_unfolded_input, (x,), mean
        yield tn.unfold_kernel, (weight,), self.by_input
        expand = torch.einsum("ngap,ngbp->gab", unfolded, unfolded) / (n * unfolded.shape[-1])
        yield tn.kfac_expand_input_factor, (x,), expand
        reduce = torch.einsum("nga,ngb->gab", mean, mean) / n
        yield tn.kfac_reduce_input_factor, (x,), reduce
        columns = g.reshape(n, groups, g.shape[1] // groups, -1)
        expand = torch.einsum("ngap,ngbp->gab", columns, columns)
        yield tn.kfac_expand_grad_output_factor, (g,), expand
        reduce = torch.einsum("nga,ngb->gab", columns.sum(-1), columns.sum(-1))
        yield tn.kfac_reduce_grad_output_factor, (g,), reduce

        rows, roots = self.gradients(), operands["grad_outputs"]
        flat, two = rows.flatten(2), {"columns": COLUMNS}
        yield tn.per_example_weight_vjp, (x, roots[0]), rows[0]
        yield tn.ggn_diagonal, (x, roots), rows.square().sum((0, 1)), two
        yield tn.ggn_gram, (x, roots), torch.einsum("vna,wma->vnwm", flat, flat), two
        yield tn.ggn_block, (x, roots), torch.einsum("vna,vnb->ab", flat, flat), two
        hessian, diagonal, j = operands["output_hessian"], g.flatten(1).square(), self.by_input
        yield tn.hbp_backward, (weight, hessian), j.T @ hessian @ j
        yield tn.kfra_backward, (weight, hessian.mean(0)), j.T @ hessian.mean(0) @ j
        back = (diagonal @ j.square()).reshape(x.shape)
        yield tn.hessian_diagonal_backward, (weight, g.square()), back
        back = torch.einsum("noa,no->a", self.by_weight.square(), diagonal).reshape(weight.shape)
        yield tn.hessian_diagonal_weight, (x, g.square()), back


def operands_of(spec):
    """All operands that a convolution's networks may take."""
    generator = torch.Generator().manual_seed(0)
    outputs = prod(spec.output_shape[1:])
    shapes = {
        "input": spec.input_shape,
        "weight": spec.weight_shape,
        "grad_output": spec.output_shape,
        "grad_outputs": (COLUMNS, *spec.output_shape),
        "input_tangent": spec.input_shape,
        "weight_tangent": spec.weight_shape,
        "output_hessian": (spec.input_shape[0], outputs, outputs),
    }
    draw = lambda shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return {name: draw(shape) for name, shape in shapes.items()}


def assert_equal(actual, expected, what):
    """Relative error below 1e-12, in the norm of the largest entry."""
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max().item()
    assert error <= 1e-12 * expected.abs().max().item(), f"{what}: {error}"


def check(spec):
    oracle = Oracle(spec, operands_of(spec))
    for builder, tensors, expected, *options in oracle.results():
        network = builder(spec, **dict(*options))
        operands = dict(zip(network.operands, tensors, strict=True))
        assert_equal(network.evaluate(**operands), expected, builder.__name__)


@settings(max_examples=50)
@given(spec=specs())
def test_convolution(spec):
    check(spec)


@settings(max_examples=50)
@given(spec=specs(transposed=True))
def test_transposed_convolution(spec):
    check(spec)


@settings(max_examples=20)
@given(spec=ANY_4D)
def test_four_dimensions(spec):
    check(spec)


@pytest.mark.parametrize("spec", BEFORE_THE_INPUT)
def test_windows_before_the_input(spec):
    check(spec)


@settings(max_examples=50)
@given(spec=far())
def test_more_padding_than_kernel(spec):
    check(spec)


@pytest.mark.slow
@settings(max_examples=2000)
@given(spec=st.one_of(ANY, ANY_4D, far()))
def test_many(spec):
    check(spec)


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_networks_are_cached_values(builder):
    spec, equal = (tn.ConvSpec((2, 2, 5, 4), (4, 1, 3, 2), 2, p, groups=2) for p in (1, (1, 1)))
    network = builder(spec)
    assert builder(equal) is network
    assert builder.cache_info().maxsize is not None
    assert pickle.loads(pickle.dumps(network)) == network
    rebuilt = tn.Network.build(network.nodes, network.output, network.size)
    assert (rebuilt, hash(rebuilt)) == (network, hash(network))


def test_no_spatial_dimension_is_a_linear_layer():
    spec = tn.ConvSpec((3, 4), (5, 4))
    operands = operands_of(spec)
    x, weight, g = (operands[name] for name in ("input", "weight", "grad_output"))
    assert_equal(tn.forward(spec).evaluate(input=x, weight=weight), x @ weight.T, "forward")
    assert_equal(tn.weight_vjp(spec).evaluate(input=x, grad_output=g), g.T @ x, "weight_vjp")
    for builder in (tn.kfac_expand_input_factor, tn.kfac_reduce_input_factor):
        assert_equal(builder(spec).evaluate(input=x), (x.T @ x / 3)[None], builder.__name__)


@settings(max_examples=30)
@given(spec=specs(2, 2))
def test_fold_and_unfold_as_torch(spec):
    if spec.padding_mode != "zeros" or any(before != after for before, after in spec.padding):
        spec = tn.ConvSpec(spec.input_shape, spec.weight_shape, groups=spec.groups)
    padding = tuple(before for before, _ in spec.padding)
    options = (spec.kernel_size, spec.dilation, padding, spec.stride)
    x = operands_of(spec)["input"]
    columns = F.unfold(x, *options)
    assert_equal(tn.unfold_input(spec).evaluate(input=x), columns, "unfold")
    folded = F.fold(columns, spec.input_size, *options)
    assert_equal(tn.fold_output(spec).evaluate(grad_output=columns), folded, "fold")


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
@settings(max_examples=6)
@given(spec=ANY)
def test_einsum_and_simplify_are_evaluate(builder, spec):
    generator = torch.Generator().manual_seed(0)
    network = builder(spec)
    operands = {
        name: torch.randn(shape, dtype=torch.float64, generator=generator)
        for name, shape in network.operands.items()
    }
    expected = network.evaluate(**operands)
    assert tuple(expected.shape) == network.shape
    for equal in (network, network.simplify()):
        equation, tensors, shape = equal.einsum(**operands)
        arrays = [tensor.numpy() for tensor in tensors]
        result = torch.from_numpy(np.asarray(np.einsum(equation, *arrays, optimize=True)))
        assert_equal(result.reshape(shape), expected, builder.__name__)
    assert_equal(network.simplify().evaluate(**operands), expected, builder.__name__)


# ---- randomised derivatives ---------------------------------------------------------------------


@settings(max_examples=20)
@given(spec=ANY)
def test_randomized_vjps(spec):
    """Sampling is masking: the input or the weight, or, along the kernel, what is left of it."""
    operands = operands_of(spec)
    x, weight, g = (operands[name] for name in ("input", "weight", "grad_output"))
    ones = (1,) * spec.dimensions
    for along in ("channels", "spatial", "kernel"):
        network = tn.randomized_weight_vjp(spec, along)
        mask = torch.rand(network.operands["mask"], dtype=torch.float64)
        per_channel = mask.reshape(-1, *ones) if along == "channels" else mask
        masked = x if along == "kernel" else x * per_channel
        expected = tn.weight_vjp(spec).evaluate(input=masked, grad_output=g)
        expected = expected * mask if along == "kernel" else expected
        actual = network.evaluate(input=x, grad_output=g, mask=mask)
        assert_equal(actual, expected, f"weight, {along}")

        network = tn.randomized_input_vjp(spec, along)
        mask = torch.rand(network.operands["mask"], dtype=torch.float64)
        per_channel = mask.reshape(-1, *ones) if along == "channels" else mask
        masked = g if along == "kernel" else g * per_channel
        kernel = weight * mask if along == "kernel" else weight
        expected = tn.input_vjp(spec).evaluate(weight=kernel, grad_output=masked)
        actual = network.evaluate(weight=weight, grad_output=g, mask=mask)
        assert_equal(actual, expected, f"input, {along}")


@pytest.mark.parametrize("along", ["channels", "spatial", "kernel"])
@pytest.mark.parametrize("name", ["input", "weight"])
def test_randomized_vjps_are_unbiased(name, along):
    """Over all masks, each with its probability."""
    spec = tn.ConvSpec((2, 4, 3), (4, 2, 4), padding=1, groups=2)
    exact = {"input": tn.input_vjp, "weight": tn.weight_vjp}[name](spec)
    randomized = {"input": tn.randomized_input_vjp, "weight": tn.randomized_weight_vjp}[name]
    network, operands = randomized(spec, along), operands_of(spec)
    operands = {operand: operands[operand] for operand in exact.operands}
    (size,), keep = network.operands["mask"], 0.3
    mean = 0
    for kept in product((False, True), repeat=size):
        mask = torch.tensor(kept, dtype=torch.float64)
        probability = keep ** sum(kept) * (1 - keep) ** (size - sum(kept))
        mean = mean + probability * network.evaluate(**operands, mask=mask / keep)
    assert_equal(mean, exact.evaluate(**operands), along)


def test_unknown_sampling_is_refused():
    spec = tn.ConvSpec((2, 4, 3), (4, 2, 2), groups=2)
    for builder in (tn.randomized_input_vjp, tn.randomized_weight_vjp):
        with pytest.raises(ValueError, match=r"along='batch' is none of \('channels', "):
            builder(spec, "batch")


@pytest.mark.parametrize("builder", [tn.ggn_diagonal, tn.ggn_gram, tn.ggn_block])
def test_numbers_of_columns(builder):
    spec = tn.ConvSpec((2, 4, 3), (4, 2, 2), groups=2)
    assert builder(spec, 2.0) == builder(spec, 2)
    for columns in (0, -1, 1.5, "a", None):
        with pytest.raises(ValueError, match="columns="):
            builder(spec, columns)


# ---- two batches --------------------------------------------------------------------------------


def test_gram_between_two_batches():
    first = tn.ConvSpec((2, 4, 5, 4), (6, 2, 3, 2), (1, 2), 1, groups=2)
    second = tn.ConvSpec((3, 4, 6, 3), (6, 2, 3, 2), (1, 2), 1, groups=2)
    network = tn.ggn_gram(first, COLUMNS, second)
    a, b = operands_of(first), operands_of(second)
    rows, others = (
        Oracle(spec, operands).gradients().flatten(2)
        for spec, operands in ((first, a), (second, b))
    )
    result = network.evaluate(
        input=a["input"],
        grad_output=a["grad_outputs"],
        input_2=b["input"],
        grad_output_2=b["grad_outputs"],
    )
    assert_equal(result, torch.einsum("vna,wma->vnwm", rows, others), "ggn_gram")
    with pytest.raises(ValueError, match="'k1' has sizes 3 and 2"):
        tn.ggn_gram(first, COLUMNS, tn.ConvSpec((3, 4, 6, 3), (6, 2, 2, 2), groups=2))
