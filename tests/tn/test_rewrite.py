"""Rewrites: equal results, never dearer; what each does, and what it leaves alone."""

import inspect
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kfac_tn import tn
from kfac_tn.tn import Delta, IndexPattern, Network, Node, Ones, Operand
from kfac_tn.tn.pattern import PADDING_MODES
from kfac_tn.tn.plan import recipe
from kfac_tn.tn.rewrite import (
    REWRITES,
    explain,
    merge_indices,
    merge_patterns,
    prune_ones,
    rewrite,
    squeeze,
    tile,
    trim,
)
from kfac_tn.tn.steps import Slice, Window

torch.set_num_threads(1)
# Everything public that takes just a spec.
BUILDERS = [
    builder
    for name, builder in sorted(vars(tn).items())
    if callable(builder)
    and not isinstance(builder, type)
    and next(iter(inspect.signature(builder).parameters), None) == "spec"
]


@st.composite
def specs(draw, transposed=False):
    """Small convolutions: sizes of 1, windows that don't reach the end, padding nobody needs."""
    dimensions = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    groups, c, d = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    weight = (groups * c, d) if transposed else (groups * d, c)
    # A stride of the kernel's size is rare among drawn ones, and what `tile` is about.
    kernel = each(1, 3)
    stride = kernel if draw(st.booleans()) else each(1, 3)
    try:
        return tn.ConvSpec(
            (draw(st.integers(1, 2)), groups * c, *each(1, 6)),
            (*weight, *kernel),
            stride,
            tuple(zip(each(0, 2), each(0, 2), strict=True)) if draw(st.booleans()) else 0,
            each(1, 2),
            groups,
            transposed,
            padding_mode="zeros" if transposed else draw(st.sampled_from(PADDING_MODES)),
        )
    except ValueError:
        assume(False)


def operands_of(network):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, dtype=torch.float64, generator=generator)
        for name, shape in network.operands.items()
    }


def by_einsum(network, operands):
    """The network with dense patterns: nothing of plans or views is in it."""
    equation, tensors, shape = network.einsum(**operands)
    return torch.einsum(equation, *tensors).reshape(shape)


def assert_equal(rewritten, network):
    assert rewritten.operands == network.operands
    assert rewritten.shape == network.shape
    operands = operands_of(network)
    expected = by_einsum(network, operands)
    tolerance = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(by_einsum(rewritten, operands), expected, **tolerance)
    torch.testing.assert_close(rewritten.evaluate(**operands), expected, **tolerance)


def assert_no_dearer(rewritten, network):
    assert rewritten.flops <= network.flops
    assert rewritten.peak_memory <= network.peak_memory


def build(builder, spec):
    try:
        return builder(spec)
    except ValueError:  # not of transposed convolutions, say
        assume(False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_rewrites_change_no_result_and_are_never_dearer(builder, transposed, data):
    network = build(builder, data.draw(specs(transposed)))
    for function in REWRITES:
        rewritten = function(network)
        assert_equal(rewritten, network)
        assert_no_dearer(rewritten, network)
    simplified = network.simplify()
    assert_equal(simplified, network)
    assert_no_dearer(simplified, network)
    assert simplified.simplify() == simplified


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rewrites_thoroughly(builder, transposed, data):
    network = build(builder, data.draw(specs(transposed)))
    for function in (*REWRITES, Network.simplify):
        assert_equal(function(network), network)
        assert_no_dearer(function(network), network)


def patterns(network):
    return [node.symbol for node in network.nodes if isinstance(node.symbol, IndexPattern)]


@pytest.mark.parametrize(
    "spec",
    [
        tn.ConvSpec((2, 4, 6, 8), (4, 4, 3, 2), stride=(3, 2)),
        tn.ConvSpec((2, 4, 6, 8), (4, 4, 3, 2), dilation=(2, 4)),
        tn.ConvSpec((2, 4, 6, 8), (4, 4, 1, 1)),
        tn.ConvSpec((2, 4, 6, 8), (4, 4, 6, 8)),
        tn.ConvSpec((2, 4, 6, 8), (4, 4, 6, 2), stride=(5, 2)),
    ],
    ids=["dense", "roles exchanged", "pointwise", "full size", "full size and dense"],
)
@pytest.mark.parametrize(
    "builder",
    [tn.forward, tn.input_vjp, tn.weight_vjp, tn.unfold_input, tn.kfac_expand_input_factor],
    ids=lambda builder: builder.__name__,
)
def test_reshapes_need_no_pattern(builder, spec):
    network = builder(spec)
    simplified = network.simplify()
    assert patterns(simplified) == []
    assert_equal(simplified, network)


def test_dense_equation():
    simplified = tn.forward(tn.ConvSpec((2, 4, 6), (5, 4, 3), stride=3)).simplify()
    assert str(simplified).startswith("input[n c (o1 k1)] weight[d c k1] -> [n d o1]")


def test_down_sampling_at_the_result_is_a_slice():
    """Its axis is made up of two, and between the windows there are zeros in one of these."""
    spec = tn.ConvSpec((8, 3, 8, 15), (3, 3, 4, 4), stride=(4, 5))
    network = tn.fold_output(spec)
    tiled = tile(network)
    (crop,) = patterns(tiled)
    assert crop.shape == (4, 5)
    assert "-> [n (g c) (o1 k1) (o2" in str(tiled)
    assert tiled.flops == 0 < network.flops
    assert_equal(tiled, network)
    # Of an operand, the rest is a view: see test_views.py.
    assert patterns(tile(tn.unfold_input(spec)))
    assert patterns(tn.unfold_input(spec).simplify()) == []
    # A last stride that is cut off can't be regrouped.
    ragged = tn.fold_output(tn.ConvSpec((8, 3, 8, 14), (3, 3, 2, 4), stride=(3, 5)))
    assert tile(ragged) == ragged


def test_strided_pointwise_is_a_slice():
    network = tn.forward(tn.ConvSpec((2, 4, 7), (5, 4, 1), stride=2))
    simplified = network.simplify()
    kinds = {type(i.step) for i in recipe(simplified, algorithm="unfolding").instructions}
    assert Slice in kinds
    assert Window not in kinds


def test_trim_leaves_the_centre_of_a_kernel_over_one_pixel():
    spec = tn.ConvSpec((4, 8, 1, 1), (8, 8, 3, 3), padding=1)
    network = tn.forward(spec)
    simplified = network.simplify()
    assert simplified.flops == 2 * 4 * 8 * 8
    assert network.flops == 9 * simplified.flops
    assert_equal(simplified, network)
    # What is in the result stays there, as zeros.
    assert_equal(tn.weight_vjp(spec).simplify(), tn.weight_vjp(spec))


def test_trim_needs_zeros():
    circular = tn.forward(tn.ConvSpec((1, 1, 1), (1, 1, 3), padding=1, padding_mode="circular"))
    assert trim(circular) == circular


def test_merge_patterns():
    """Both patterns of the Hessian's diagonal say which kernel position it is."""
    network = tn.hessian_diagonal_backward(tn.ConvSpec((2, 3, 6, 6), (4, 3, 3, 3), padding=1))
    merged = merge_patterns(network)
    assert len(patterns(network)) == 4
    assert len(patterns(merged)) == 2
    assert_equal(merged, network)
    assert 3 * merged.flops < network.flops
    # Replicated borders lead two kernel positions to one input position.
    replicated = tn.hessian_diagonal_backward(
        tn.ConvSpec((2, 3, 6, 6), (4, 3, 3, 3), padding=1, padding_mode="replicate")
    )
    assert merge_patterns(replicated) == replicated
    # All indices shared: a binary tensor times itself is itself.
    pi = Node(IndexPattern(2, 3, 4), (("k",), ("o",), ("i",)))
    sizes = {"k": 2, "o": 3, "i": 4}
    twice = Network.build([Node(Operand("a"), (("i",),)), pi, pi], [("k",), ("o",)], sizes)
    assert len(patterns(merge_patterns(twice))) == 1
    assert_equal(merge_patterns(twice), twice)


def test_squeeze_keeps_axes_of_the_result():
    spec = tn.ConvSpec((1, 1, 5), (1, 1, 3))
    squeezed = squeeze(tn.forward(spec))
    assert squeezed.shape == (1, 1, 3)
    assert "d" not in squeezed.size
    assert_equal(squeezed, tn.forward(spec))
    sizes = {"i": 1, "j": 1}
    delta = Node(Delta(1), (("i",), ("j",)))
    network = Network.build([Node(Operand("a"), (("i",),)), delta], [("j",)], sizes)
    assert_equal(squeeze(network), network)


def test_merge_indices():
    sizes = {"a": 2, "b": 3, "c": 4}
    nodes = [Node(Operand("x"), (("a", "b"), ("c",))), Node(Operand("y"), (("c", "a", "b"),))]
    network = Network.build(nodes, [("a", "b")], sizes)
    assert str(merge_indices(network)) == "x[ab c] y[(c ab)] -> [ab]\nab=6 c=4"
    assert_equal(merge_indices(network), network)
    apart = Network.build(nodes, [("b", "a")], sizes)
    assert merge_indices(apart) == apart


def test_prune_ones():
    vector, ones = Node(Operand("a"), (("i",),)), Node(Ones(3), (("j",),))
    network = Network.build([vector, ones], [("i",)], {"i": 2, "j": 3})
    assert str(prune_ones(network)).startswith("a[i] 3[] -> [i]")
    assert_equal(prune_ones(network), network)
    result = network.with_output(("i",), ("j",))
    assert prune_ones(result) == result


def test_explain():
    network = tn.input_vjp(tn.ConvSpec((2, 4, 6), (5, 4, 3), stride=3))
    explanation = network.explain()
    assert explanation is explain(network)
    assert explanation.simplified is network.simplify()
    assert [applied.name for applied in explanation.applied] == ["squeeze", "tile"]
    first, last = explanation.applied[0], explanation.applied[-1]
    assert (first.before.flops, last.after.flops) == (network.flops, network.simplify().flops)
    assert "tile: flops" in str(explanation)
    done = network.simplify()
    assert done.explain().applied == ()
    assert done.simplify() is done


def test_a_rule_that_costs_does_not_apply():
    @rewrite
    def worsen(network):
        """Insert an identity that nobody can prune."""
        (index,) = network.output_indices
        if index == "i":
            delta = Node(Delta(3), (("i",), ("j",)))
            yield Network.build((*network.nodes, delta), [("j",)], {"i": 3, "j": 3})

    nodes = [Node(Operand("a"), (("i",),)), Node(Operand("b"), (("i",),))]
    network = Network.build(nodes, [("i",)], {"i": 3})
    assert worsen(network) == network
    assert worsen.__name__ == "worsen"


def test_scalars_stay_exact():
    network = tn.kfac_reduce_input_factor(tn.ConvSpec((3, 1, 5), (1, 1, 3)))
    (scalar,) = [n.symbol for n in network.simplify().nodes if isinstance(n.symbol, tn.Scalar)]
    assert scalar.value == Fraction(1, 3 * 3 * 3)


def test_pointwise_averages_are_plain_sums():
    """Every input position is used once: no matrix is multiplied with, and it is summed at once."""
    spec = tn.ConvSpec((4, 6, 5, 7), (3, 6, 1, 1))
    network = tn.kfac_reduce_input_factor(spec).simplify()
    assert not [node for node in network.nodes if isinstance(node.symbol, IndexPattern)]
    x = torch.rand(4, 6, 5, 7, dtype=torch.float64)
    rows = x.mean((2, 3))
    expected = (rows.T @ rows / 4).unsqueeze(0)
    assert torch.allclose(network.evaluate(input=x), expected, rtol=1e-12)
