"""Networks of convolutions against torch and against plain loops."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn.pattern import PADDING_MODES

torch.set_num_threads(1)
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
BUILDERS = (
    tn.forward,
    tn.unfold_input,
    tn.average_unfolded_input,
    tn.kfac_expand_input_factor,
    tn.kfac_reduce_input_factor,
)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def operands_of(network):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, dtype=torch.float64, generator=generator)
        for name, shape in network.operands.items()
    }


@st.composite
def specs(draw, least=1, most=3, transposed=False):
    dimensions = draw(st.integers(least, most))
    sizes = st.integers(3, 6) if dimensions < 4 else st.integers(2, 3)

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    size = tuple(draw(sizes) for _ in range(dimensions))
    stride, dilation, padding = each(1, 3), each(1, 2), each(0, 1)
    kernel = tuple(
        min(k, (s - 1) // d + 1) for k, s, d in zip(each(1, 3), size, dilation, strict=True)
    )
    groups, c, d = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    extra: tuple[int, ...] | int = 0
    mode = "zeros"
    if transposed:
        kernel = tuple(max(k, 2) for k in kernel)
        extra = tuple(
            min(e, max(s, d) - 1) for e, s, d in zip(each(0, 2), stride, dilation, strict=True)
        )
    else:
        mode = draw(st.sampled_from(PADDING_MODES))
    weight = (groups * c, d, *kernel) if transposed else (groups * d, c, *kernel)
    return tn.ConvSpec(
        (draw(st.integers(1, 2)), groups * c, *size),
        weight,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        extra,
        mode,
    )


def pad(x, spec):
    """Pad one axis after the other: torch knows most modes for three dimensions at most."""
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    for axis, sides in enumerate(spec.padding, start=2):
        lines = x.movedim(axis, -1)
        padded = F.pad(lines.reshape(1, -1, lines.shape[-1]), sides, mode=mode)
        x = padded.reshape(*lines.shape[:-1], -1).movedim(-1, axis)
    return x


@settings(max_examples=60, deadline=None)
@given(spec=specs())
def test_forward(spec):
    operands = operands_of(tn.forward(spec))
    x, weight = operands["input"], operands["weight"]
    options = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}
    expected = CONV[spec.dimensions](pad(x, spec), weight, **options)
    assert tuple(expected.shape) == spec.output_shape
    assert_close(tn.forward(spec).evaluate(**operands), expected)


@settings(max_examples=40, deadline=None)
@given(spec=specs(transposed=True))
def test_transposed_forward(spec):
    operands = operands_of(tn.forward(spec))
    expected = CONV_TRANSPOSE[spec.dimensions](
        operands["input"],
        operands["weight"],
        stride=spec.stride,
        padding=tuple(before for before, _ in spec.padding),
        output_padding=spec.output_padding,
        groups=spec.groups,
        dilation=spec.dilation,
    )
    assert tuple(expected.shape) == spec.output_shape
    assert_close(tn.forward(spec).evaluate(**operands), expected)


def unfold_by_loops(x, spec):
    """[N, C, *K, *O], one slice for each kernel position."""
    x = pad(x, spec)
    unfolded = x.new_empty(*x.shape[:2], *spec.kernel_size, *spec.output_size)
    for position in product(*map(range, spec.kernel_size)):
        slices = tuple(
            slice(k * d, k * d + (o - 1) * s + 1, s)
            for k, d, o, s in zip(
                position, spec.dilation, spec.output_size, spec.stride, strict=True
            )
        )
        unfolded[(slice(None), slice(None), *position)] = x[(slice(None), slice(None), *slices)]
    return unfolded


def check_unfolding(spec):
    x = operands_of(tn.unfold_input(spec))["input"]
    n, groups = len(x), spec.groups
    positions = int(np.prod(spec.output_size))
    unfolded = unfold_by_loops(x, spec).reshape(n, -1, positions)
    assert_close(tn.unfold_input(spec).evaluate(input=x), unfolded)

    grouped = unfolded.reshape(n, groups, -1, positions)
    expand = torch.einsum("ngap,ngbp->gab", grouped, grouped) / (n * positions)
    mean = grouped.mean(-1)
    reduce = torch.einsum("nga,ngb->gab", mean, mean) / n
    for builder, expected in (
        (tn.average_unfolded_input, mean),
        (tn.kfac_expand_input_factor, expand),
        (tn.kfac_reduce_input_factor, reduce),
    ):
        network = builder(spec)
        assert_close(network.evaluate(input=x), expected)
        assert_close(network.simplify().evaluate(input=x), expected)


@settings(max_examples=50, deadline=None)
@given(spec=specs())
def test_unfolding_and_factors(spec):
    check_unfolding(spec)


@settings(max_examples=10, deadline=None)
@given(spec=specs(least=4, most=4))
def test_four_dimensions(spec):
    check_unfolding(spec)
    operands = operands_of(tn.forward(spec))
    unfolded = unfold_by_loops(operands["input"], spec).flatten(6).flatten(1, 5)
    unfolded = unfolded.unflatten(1, (spec.groups, -1))
    weight = operands["weight"].flatten(1).unflatten(0, (spec.groups, -1))
    expected = torch.einsum("ngkp,gok->ngop", unfolded, weight).reshape(spec.output_shape)
    assert_close(tn.forward(spec).evaluate(**operands), expected)


@settings(max_examples=20, deadline=None)
@given(spec=specs(least=2, most=2))
def test_unfold_as_torch(spec):
    x = operands_of(tn.unfold_input(spec))["input"]
    expected = F.unfold(pad(x, spec), spec.kernel_size, spec.dilation, 0, spec.stride)
    assert_close(tn.unfold_input(spec).evaluate(input=x), expected)


@pytest.mark.parametrize("builder", BUILDERS)
@settings(max_examples=15, deadline=None)
@given(spec=specs())
def test_einsum_is_evaluate(builder, spec):
    for network in (builder(spec), builder(spec).simplify()):
        operands = operands_of(network)
        expected = network.evaluate(**operands)
        assert tuple(expected.shape) == network.shape
        equation, tensors, shape = network.einsum(**operands)
        assert_close(torch.einsum(equation, *tensors).reshape(shape), expected)
        arrays = [tensor.numpy() for tensor in tensors]
        numpy = torch.from_numpy(np.asarray(np.einsum(equation, *arrays, optimize=True)))
        assert_close(numpy.reshape(shape), expected)


@settings(max_examples=20, deadline=None)
@given(spec=specs(transposed=True))
def test_transposed_unfolding(spec):
    """Transposed convolutions multiply their unfolded input with their weights, too."""
    operands = operands_of(tn.forward(spec))
    x, weight = operands["input"], operands["weight"]
    unfolded = tn.unfold_input(spec).evaluate(input=x).unflatten(1, (spec.groups, -1))
    matrix = weight.unflatten(0, (spec.groups, -1)).transpose(1, 2).flatten(2)
    expected = tn.forward(spec).evaluate(**operands)
    assert_close((matrix @ unfolded).reshape(expected.shape), expected)
    mean = unfolded.mean(-1)
    reduce = torch.einsum("nga,ngb->gab", mean, mean) / len(x)
    network = tn.kfac_reduce_input_factor(spec)
    assert_close(network.evaluate(input=x), reduce)
    assert_close(network.simplify().evaluate(input=x), reduce)


def test_no_spatial_dimension_is_a_linear_layer():
    spec = tn.ConvSpec((3, 4), (5, 4))
    operands = operands_of(tn.forward(spec))
    x, weight = operands["input"], operands["weight"]
    assert_close(tn.forward(spec).evaluate(**operands), x @ weight.T)
    for builder in (tn.kfac_expand_input_factor, tn.kfac_reduce_input_factor):
        assert_close(builder(spec).evaluate(input=x), (x.T @ x / 3)[None])


def test_spec_is_normalised():
    spec = tn.ConvSpec((2, 4, 8, 9), (6, 2, 3, 4), padding="same", dilation=(1, 3), groups=2)
    assert spec.padding == ((1, 1), (4, 5))
    assert spec.stride == (1, 1)
    assert spec.output_shape == (2, 6, 8, 9)
    explicit = tn.ConvSpec(
        [2, 4, 8, 9], [6, 2, 3, 4], [1, 1], [[1, 1], [4, 5]], [1, 3], 2, output_padding=0
    )
    assert explicit == spec
    assert hash(explicit) == hash(spec)
    assert tn.forward(explicit) is tn.forward(spec)
    assert tn.ConvSpec((1, 1, 5), (1, 1, 2), padding="valid").padding == ((0, 0),)
    assert tn.ConvSpec((1, 1, 5, 5), (1, 1, 2, 2), padding=(1,)).padding == ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (2,)}, "input_shape"),
        ({"input_shape": (2, 4, 0, 8)}, "input_shape"),
        ({"input_shape": (2, 4, 8)}, "input_shape=.* has 1 spatial .* has 2"),
        ({"weight_shape": (6, 3, 3, 3)}, r"weight_shape\[1\] must be 4 / 1 = 4"),
        ({"groups": 3}, "groups=3 must divide 4"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 4}, "groups=4 must divide .* the 6"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"stride": (1, 2, 3)}, "stride=.* has 3 entries for 2 dimensions"),
        ({"dilation": -1}, "dilation=-1 must be at least 1"),
        ({"padding": -1}, "padding=-1 must be at least 0"),
        ({"padding": ((0, 1), (-1, 0))}, "padding=.* must be at least 0"),
        ({"padding": ((0, 1, 2), (1, 0))}, r"a pair \(before, after\)"),
        ({"padding": "full"}, "padding='full' is neither"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
        ({"dilation": 5}, r"5 \* \(3 - 1\) \+ 1 = 11 positions.* 0 \+ 8 \+ 0 = 8"),
        ({"padding": 8, "padding_mode": "reflect"}, "'reflect' .* 8 >= 8"),
        ({"padding": 9, "padding_mode": "circular"}, "'circular' .* 9 > 8"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror'"),
        ({"output_padding": 1}, "output_padding=1 is for transposed"),
    ],
)
def test_refused_specs(options, message):
    valid = {"input_shape": (2, 4, 8, 8), "weight_shape": (6, 4, 3, 3)}
    with pytest.raises(ValueError, match=message):
        tn.ConvSpec(**{**valid, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_shape": (6, 4, 3, 3)}, r"weight_shape\[0\] must be 4"),
        ({"output_padding": 2, "stride": 2}, r"output_padding=2 .* 2 >= max\(2, 1\)"),
        ({"padding": "same"}, "padding='same': transposed"),
        ({"padding": 5}, r"\(8 - 1\) \* 1 \+ 1 \* \(3 - 1\) \+ 0 \+ 1 - 5 - 5 = 0"),
        ({"padding": 1, "padding_mode": "circular"}, "padding_mode='circular': a transposed"),
    ],
)
def test_refused_transposed_specs(options, message):
    valid = {"input_shape": (2, 4, 8, 8), "weight_shape": (4, 6, 3, 3), "transposed": True}
    with pytest.raises(ValueError, match=message):
        tn.ConvSpec(**{**valid, **options})
