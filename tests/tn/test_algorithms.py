"""Whatever algorithm is forced, the result is the same as by the default, which has oracles."""

from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn.plan import recipe
from kfac_tn.tn.steps import Convolve, ConvolveBackward, ConvolveTransposed
from tests.tn.test_operations import ANY, ANY_4D, BEFORE_THE_INPUT, BUILDERS, far

torch.set_num_threads(1)
MORE_BEHIND = tn.ConvSpec((1, 1, 3), (1, 1, 1), dilation=3, transposed=True, output_padding=2)
"""A transposed pointwise convolution: its dilation only allows for further positions."""
CONVOLUTIONS = (Convolve, ConvolveTransposed, ConvolveBackward)


def operands_of(network, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, dtype=dtype, generator=generator)
        for name, shape in network.operands.items()
    }


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
@settings(max_examples=25)
@example(spec=MORE_BEHIND, simplified=False)
@example(spec=BEFORE_THE_INPUT[0], simplified=True)
@example(spec=BEFORE_THE_INPUT[2], simplified=False)
@example(spec=BEFORE_THE_INPUT[3], simplified=True)
@given(spec=st.one_of(ANY, ANY_4D, far()), simplified=st.booleans())
def test_every_algorithm_gives_the_same(builder, spec, simplified):
    network = builder(spec)
    network = network.simplify() if simplified else network
    operands = operands_of(network)
    steps = recipe(network, torch.float64)
    expected = network.evaluate(**operands)
    scale = expected.abs().max().clamp(min=1e-300)
    for other in steps.others:
        actual = network.evaluate(algorithm=other.algorithm, **operands)
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-12 * scale, other.algorithm


@pytest.mark.parametrize("shape", [(1, 1, 2, 2, 2), (2, 2, 5, 6, 4)])
def test_positions_behind_the_last_window_are_left_out(shape):
    spec = tn.ConvSpec(shape, (1, shape[1], 1, 1, 1), stride=(1, 2, 3))
    network = tn.kfac_expand_input_factor(spec)
    operands = operands_of(network)
    rows = operands["input"][:, :, :, ::2, ::3].movedim(1, 0).flatten(1)
    steps = network.plan()
    for algorithm in (steps.algorithm, *(other.algorithm for other in steps.others)):
        actual = network.evaluate(algorithm=algorithm, **operands)[0]
        torch.testing.assert_close(actual, rows @ rows.T / rows.shape[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_are_recognized(transposed, groups):
    """The network itself, its derivatives and tangents; in one to three dimensions; not in four."""
    for dimensions in (1, 2, 3):
        shape = (2, 4, *[7] * dimensions)
        spec = tn.ConvSpec(
            shape, (4, 4 // groups, *[3] * dimensions), 2, 1, groups=groups, transposed=transposed
        )
        for builder in (tn.forward, tn.input_vjp, tn.weight_vjp, tn.input_jvp, tn.weight_jvp):
            steps = builder(spec).simplify().plan("convolution").instructions
            assert sum(isinstance(i.step, CONVOLUTIONS) for i in steps) == 1
    spec = tn.ConvSpec((2, 4, *[5] * 4), (4, 4, *[2] * 4))
    with pytest.raises(ValueError, match="doesn't apply"):
        tn.forward(spec).plan("convolution")


def test_what_is_no_convolution_is_left_alone():
    general = tn.ConvSpec((2, 4, 9, 9), (6, 4, 3, 3), padding=1)
    pointwise = tn.ConvSpec((2, 4, 9, 9), (6, 4, 1, 1))
    builders = (tn.unfold_input, tn.kfac_expand_input_factor, tn.ggn_diagonal)
    for spec, builder in product((general, pointwise), builders):
        with pytest.raises(ValueError, match="doesn't apply"):
            builder(spec).simplify().plan("convolution")


def test_kernels_of_size_one_along_an_axis_need_no_copy():
    spec = tn.ConvSpec((2, 4, 9, 9), (6, 4, 1, 7), padding=(0, 3))
    network = tn.forward(spec).simplify()
    (convolve,) = (
        i.step for i in network.plan("convolution").instructions if isinstance(i.step, Convolve)
    )
    assert convolve.padding == (0, 3)
    operands = operands_of(network)
    expected = F.conv2d(operands["input"], operands["weight"], padding=(0, 3))
    torch.testing.assert_close(network.evaluate(algorithm="convolution", **operands), expected)


TILED = {
    "pointwise": ((4, 6, 5, 5), (8, 6, 1, 1), {}),
    "pointwise in groups": ((4, 6, 5, 5), (8, 3, 1, 1), {"groups": 2}),
    "pointwise, every other": ((4, 6, 8, 8), (8, 6, 1, 1), {"stride": 2}),
    "dense": ((4, 6, 8, 9), (8, 6, 2, 3), {"stride": (2, 3)}),
    "dense along one axis": ((4, 6, 8, 9), (8, 6, 2, 3), {"stride": (2, 1)}),
    "dense in one dimension": ((4, 6, 8), (8, 6, 4), {"stride": 4}),
    "interleaved": ((4, 6, 8, 9), (8, 6, 2, 3), {"dilation": (4, 3)}),
    "down-sampling": ((4, 6, 9, 8), (8, 6, 2, 3), {"stride": (3, 4)}),
    "transposed": ((4, 6, 4, 5), (6, 8, 2, 3), {"stride": (2, 3), "transposed": True}),
    "transposed, pointwise": ((4, 6, 4, 5), (6, 8, 1, 1), {"transposed": True}),
}


@pytest.mark.parametrize("name", TILED)
def test_convolutions_are_recognized_without_their_patterns(name):
    """What has been simplified to reshapes and slices is offered to torch's kernels as well."""
    shape, weight_shape, options = TILED[name]
    spec = tn.ConvSpec(shape, weight_shape, **options)
    for builder in (tn.forward, tn.input_vjp, tn.weight_vjp, tn.input_jvp, tn.weight_jvp):
        network = builder(spec).simplify()
        steps = network.plan("convolution").instructions
        assert sum(isinstance(i.step, CONVOLUTIONS) for i in steps) == 1
        operands = operands_of(network)
        expected = network.evaluate(algorithm="unfolding", **operands)
        actual = network.evaluate(algorithm="convolution", **operands)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        single = {name: operand.float() for name, operand in operands.items()}
        actual = network.evaluate(algorithm="convolution", **single)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_operands_meet_before_windows_where_that_takes_little_memory():
    """A kernel that sees most of a small input: each pair of positions is multiplied once."""
    spec = tn.ConvSpec((32, 64, 7, 7), (64, 1, 7, 7), padding=3, groups=64)
    network = tn.weight_vjp(spec).simplify()
    assert recipe(network).algorithm == "tensors"
    x, g = operands_of(network).values()
    x.requires_grad_()
    weight = torch.zeros(64, 1, 7, 7, dtype=torch.float64, requires_grad=True)
    F.conv2d(x, weight, padding=3, groups=64).backward(g)
    actual = network.evaluate(input=x.detach(), grad_output=g, algorithm="tensors")
    torch.testing.assert_close(actual, weight.grad, rtol=1e-12, atol=1e-12)
    # All pairs of positions of a larger input would be many times what the operands are.
    large = tn.ConvSpec((2, 64, 56, 56), (64, 1, 7, 7), padding=3, groups=64)
    steps = recipe(tn.weight_vjp(large).simplify())
    assert "tensors" not in [steps.algorithm, *(other.algorithm for other in steps.others)]


def test_patches_of_three_colours_are_a_product():
    """Torch's transposed convolution takes as long for three channels as for sixteen."""
    colours, many = (tn.ConvSpec((8, c, 64, 64), (64, c, 4, 4), stride=4) for c in (3, 64))
    assert recipe(tn.input_vjp(colours).simplify()).algorithm == "unfolding"
    assert recipe(tn.input_vjp(many).simplify()).algorithm == "convolution"
