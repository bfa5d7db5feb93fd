"""Operands of which a part is read: what the parts are, and what becomes of them."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn import IndexPattern, Network, Node, Operand
from kfac_tn.tn.planner import ALGORITHMS
from kfac_tn.tn.rewrite import explain, view_operands

torch.set_num_threads(1)

REMAINDER = {  # kernel, stride, dilation, size: what isn't read in the comment
    "dense": (2, 2, 1, 7),  # the last position
    "spread out": (2, 2, 5, 8),  # windows inside of windows: 0 5, 2 7
    "down-sampling": (2, 3, 1, 9),  # every third position
    "down-sampling, cut off": (2, 3, 1, 8),  # the third, but no full stride at the end
    "strided pointwise": (1, 2, 1, 7),  # every other position
    "interleaved": (2, 2, 3, 8),  # windows that cross: 0 3, 2 5, 4 7
}


def spec_of(kernel, stride, dilation, size, groups=1):
    return tn.ConvSpec(
        (2, 4, size, 4), (6, 4 // groups, kernel, 2), (stride, 2), 0, (dilation, 1), groups
    )


def operands_of(network):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, dtype=torch.float64, generator=generator)
        for name, shape in network.operands.items()
    }


def by_einsum(network, operands):
    equation, tensors, shape = network.einsum(**operands)
    return torch.einsum(equation, *tensors).reshape(shape)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def patterns(network):
    return [node for node in network.nodes if isinstance(node.symbol, IndexPattern)]


def parts(network):
    return [n for n in network.nodes if isinstance(n.symbol, Operand) and n.symbol.patterns]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", REMAINDER.values(), ids=REMAINDER)
def test_equations_need_no_pattern(window, groups):
    """Against torch: what is exported is the convolution, and its tensors are views."""
    _, stride, dilation, _ = window
    network = tn.forward(spec_of(*window, groups))
    simplified = network.simplify()
    assert patterns(simplified) == []
    assert len(parts(simplified)) == 1
    operands = operands_of(network)
    equation, tensors, shape = simplified.einsum(**operands)
    assert len(tensors) == 2
    for tensor in tensors:
        assert any(
            tensor.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr()
            and tensor.numel() <= operand.numel()
            for operand in operands.values()
        )
    expected = F.conv2d(
        operands["input"],
        operands["weight"],
        stride=(stride, 2),
        dilation=(dilation, 1),
        groups=groups,
    )
    assert_close(torch.einsum(equation, *tensors).reshape(shape), expected)
    assert_close(simplified.evaluate(**operands), expected)
    assert (simplified.flops, simplified.peak_memory) <= (network.flops, network.peak_memory)


@pytest.mark.parametrize("window", REMAINDER.values(), ids=REMAINDER)
@pytest.mark.parametrize(
    "builder",
    [
        tn.weight_vjp,
        tn.per_example_weight_vjp,
        tn.unfold_input,
        tn.kfac_expand_input_factor,
        tn.ggn_diagonal,
        tn.ggn_gram,
    ],
    ids=lambda builder: builder.__name__,
)
def test_whatever_reads_the_input_needs_no_pattern(builder, window):
    network = builder(spec_of(*window))
    simplified = network.simplify()
    assert patterns(simplified) == []
    operands = operands_of(network)
    assert_close(by_einsum(simplified, operands), by_einsum(network, operands))


@pytest.mark.parametrize("window", REMAINDER.values(), ids=REMAINDER)
def test_zeros_at_the_result_keep_the_pattern(window):
    """The gradient of what isn't read is zero: an equation can't say so but with the pattern."""
    network = tn.input_vjp(spec_of(*window))
    simplified = network.simplify()
    assert patterns(simplified)
    operands = operands_of(network)
    assert_close(by_einsum(simplified, operands), by_einsum(network, operands))


def test_what_stays_a_pattern():
    for options in ({"padding": 1}, {"stride": 1}, {"padding_mode": "circular", "padding": 1}):
        network = tn.forward(tn.ConvSpec((2, 4, 7), (6, 4, 2), **({"stride": 2} | options)))
        assert view_operands(network) == network
    # An input that is also an index of the result, or of a second tensor.
    pairs = IndexPattern(2, 3, 7, stride=2)
    sizes = {"k": 2, "o": 3, "i": 7}
    x, pi = Node(Operand("x"), (("i",),)), Node(pairs, (("k",), ("o",), ("i",)))
    for nodes, output in (([x, pi], ["i", "k"]), ([x, x, pi], ["k", "o"])):
        network = Network.build(nodes, [(index,) for index in output], sizes)
        assert view_operands(network) == network
    # A leg of the operand's own: the diagonal is no view that an axis could be read through.
    own = Node(Operand("x"), (("i",), ("k",)))
    network = Network.build([own, pi], [("k",), ("o",)], sizes)
    assert view_operands(network) == network
    # A leg that is only there to be summed over.
    for gone in "ko":
        network = Network.build([x, pi], [(leg,) for leg in "ko" if leg != gone], sizes)
        assert view_operands(network) == network
    # A digit of an axis.
    digits = Network.build(
        [Node(Operand("x"), (("n", "i"),)), pi], [("n",), ("k",), ("o",)], sizes | {"n": 2}
    )
    assert view_operands(digits) == digits


def test_patterns_that_share_a_leg():
    """The first is read through, the second meets what it brings."""
    first, second = IndexPattern(2, 3, 7, stride=2), IndexPattern(2, 2, 4, stride=2)
    nodes = [
        Node(Operand("x"), (("i",), ("j",))),
        Node(first, (("k",), ("o",), ("i",))),
        Node(second, (("k",), ("p",), ("j",))),
    ]
    sizes = {"k": 2, "o": 3, "p": 2, "i": 7, "j": 4}
    network = Network.build(nodes, [("k",), ("o",), ("p",)], sizes)
    viewed = view_operands(network)
    assert len(patterns(viewed)) == len(parts(viewed)) == 1
    operands = operands_of(network)
    assert_close(by_einsum(viewed, operands), by_einsum(network, operands))
    assert_close(viewed.evaluate(**operands), by_einsum(network, operands))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_part_of_any_operand(data):
    """A network of two windows of a matrix, and what is cropped from a vector."""
    sizes, axes, read, nodes = {"c": 2}, [("c",)], [], []
    for at in "ab":
        kernel, output, stride, dilation = (data.draw(st.integers(1, 4)) for _ in range(4))
        before, after = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
        size = before + (output - 1) * stride + (kernel - 1) * dilation + 1 + after
        pattern = IndexPattern(kernel, output, size, stride, dilation, -before)
        legs = (f"k{at}", f"o{at}", f"i{at}")
        sizes |= dict(zip(legs, (kernel, output, size), strict=True))
        nodes.append(Node(pattern, tuple((leg,) for leg in legs)))
        axes.append((legs[2],))
        read += [(index,) for index in legs[:2]]
    x, w = Node(Operand("x"), tuple(axes)), Node(Operand("w"), (("c",), ("ka",), ("kb",)))
    network = Network.build([x, *nodes, w], data.draw(st.permutations(read)), sizes)
    viewed = view_operands(network)
    assert viewed.operands == network.operands
    # Once at most: counted on the pattern's own tensor.
    injective = [n for n in nodes if n.symbol.tensor(torch.float64).sum((0, 1)).max() <= 1]
    assert len(patterns(network)) - len(patterns(viewed)) == len(injective)
    assert viewed.flops <= network.flops
    assert viewed.peak_memory <= network.peak_memory
    assert view_operands(viewed) is viewed
    assert view_operands(viewed.whole()) == viewed
    operands = operands_of(network)
    expected = by_einsum(network, operands)
    assert_close(by_einsum(viewed, operands), expected)
    assert_close(viewed.evaluate(**operands), expected)
    assert_close(viewed.simplify().evaluate(**operands), expected)


DENSE = spec_of(*REMAINDER["dense"])


@pytest.fixture
def viewed():
    network = tn.forward(DENSE).simplify()
    assert parts(network)
    return network


def test_derivatives_are_those_of_the_whole_operand(viewed):
    """With respect to what isn't read: zero. Against autograd."""
    operands = operands_of(viewed)
    x = operands["input"].requires_grad_()
    output = F.conv2d(x, operands["weight"], stride=2)
    cotangent = torch.rand_like(output)
    (expected,) = torch.autograd.grad(output, x, cotangent)
    assert (expected[:, :, 6] == 0).all()
    rest = {"weight": operands["weight"], "grad_output": cotangent}
    vjp = viewed.contract_with("grad_output").differentiate("input")
    assert vjp.shape == x.shape
    for network in (vjp, vjp.simplify()):
        assert_close(network.evaluate(**rest), expected)
        assert_close(by_einsum(network, rest), expected)
    # The network itself is differentiable, as ever.
    for result in (viewed.evaluate(**operands), by_einsum(viewed, operands)):
        (gradient,) = torch.autograd.grad(result, x, cotangent)
        assert_close(gradient, expected)
    jacobian = viewed.differentiate("input")
    assert jacobian.shape == (*output.shape, *x.shape)
    assert_close(
        torch.tensordot(cotangent, jacobian.evaluate(weight=operands["weight"]), 4), expected
    )


def test_replace(viewed):
    operands = operands_of(viewed)
    tangent = viewed.replace("input", "input_tangent")
    assert tangent.operands == {"input_tangent": (2, 4, 7, 4), "weight": (6, 4, 2, 2)}
    renamed = {"input_tangent": operands["input"], "weight": operands["weight"]}
    assert_close(tangent.evaluate(**renamed), viewed.evaluate(**operands))
    # By a network: an input that is a product, and a convolution that reads a part of another's.
    factors = Network.build(
        [
            Node(Operand("a"), (("n",), ("c",), ("r",))),
            Node(Operand("b"), (("r",), ("x",), ("y",))),
        ],
        [("n",), ("c",), ("x",), ("y",)],
        {"n": 2, "c": 4, "r": 3, "x": 7, "y": 4},
    )
    product = viewed.replace("input", factors)
    a, b = operands_of(factors).values()
    x = torch.einsum("ncr,rxy->ncxy", a, b)
    expected = F.conv2d(x, operands["weight"], stride=2)
    assert_close(product.evaluate(a=a, b=b, weight=operands["weight"]), expected)
    second = tn.forward(tn.ConvSpec((2, 6, 3, 2), (5, 6, 2, 1), stride=(2, 2))).simplify()
    assert parts(second)
    chain = second.replace("weight", "weight_2").replace("input", viewed).simplify()
    weight = torch.rand(5, 6, 2, 1, dtype=torch.float64)
    hidden = F.conv2d(operands["input"], operands["weight"], stride=2)
    expected = F.conv2d(hidden, weight, stride=2)
    assert_close(chain.evaluate(**operands, weight_2=weight), expected)


def test_without(viewed):
    unfolded = viewed.without("weight", ("n",), ("c", "k1", "k2"), ("o1", "o2"))
    x = torch.rand(2, 4, 7, 4, dtype=torch.float64)
    assert_close(unfolded.evaluate(input=x), F.unfold(x, 2, stride=2))
    coefficient = viewed.without("input", ("d",))
    assert coefficient.operands == {"weight": (6, 4, 2, 2)}


def test_where_an_operand_is(viewed):
    assert viewed.nodes[viewed.find("input")].symbol.name == "input"
    with pytest.raises(ValueError, match=r"part of 'input': call whole\(\)"):
        viewed.axes_of("input")
    assert len(viewed.whole().axes_of("input")) == 4
    assert viewed.axes_of("weight") == viewed.whole().axes_of("weight")
    whole = tn.forward(DENSE)
    assert whole.whole() is whole


def test_joining_a_network_with_itself(viewed):
    """Two copies of a part are one tensor, planned once."""
    gram = viewed.join(viewed, ("n", "o1", "o2"), [("d",), ("d'",)])
    operands = operands_of(viewed)
    y = viewed.evaluate(**operands)
    expected = torch.einsum("ndop,neop->de", y, y)
    assert_close(gram.evaluate(**operands), expected)
    assert_close(gram.simplify().evaluate(**operands), expected)
    assert_close(by_einsum(gram.simplify(), operands), expected)


def test_memory_limit():
    """In pieces along the examples, whose axis is that of the tensor, or another one's."""
    spec = tn.ConvSpec((8, 4, 7, 4), (2, 4, 2, 2), 2)
    whole = tn.weight_vjp(spec)
    operands = operands_of(whole)
    viewed = whole.simplify()
    # The examples come after the part, for which there is one axis in the tensor.
    image = viewed.nodes[viewed.find("input")]
    assert image.axes[0] == ("n",)
    part = Operand("input", tuple((axis - 1, p) for axis, p in image.symbol.patterns))
    last = Node(part, (*image.axes[1:], ("n",)))
    moved = viewed.with_nodes(last if node == image else node for node in viewed.nodes)
    assert moved.operands["input"] == (4, 7, 4, 8)
    expected = by_einsum(whole, operands)
    for network, x in ((viewed, operands["input"]), (moved, operands["input"].movedim(0, -1))):
        tensors = operands | {"input": x.contiguous()}
        limit = network.peak_memory - 1
        assert_close(network.evaluate(memory_limit=limit, **tensors), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms(viewed, algorithm):
    """The same apply as to the network with its patterns: views are the planner's."""
    operands = operands_of(viewed)
    expected = F.conv2d(operands["input"], operands["weight"], stride=2)
    try:
        tn.forward(DENSE).plan(algorithm)
    except ValueError:
        return
    assert_close(viewed.evaluate(algorithm=algorithm, **operands), expected)


def test_torch_convolves(viewed):
    """`convolution` finds the pattern of what is read in part, and the axis that is tiled."""
    assert viewed.plan("convolution").algorithm == "convolution"


def test_transforms(viewed):
    operands = operands_of(viewed)
    examples = torch.rand(3, *viewed.operands["input"], dtype=torch.float64)
    call = lambda x: viewed.evaluate(input=x, weight=operands["weight"])  # noqa: E731
    assert_close(torch.func.vmap(call)(examples), torch.stack([call(x) for x in examples]))
    assert_close(
        pickle.loads(pickle.dumps(viewed)).evaluate(**operands), viewed.evaluate(**operands)
    )


def test_drawing_and_printing(viewed, tmp_path):
    assert "part of input[n c k1 o1 (o2 k2)]" in str(viewed)
    assert "part of input" in viewed.to_tikz()
    pytest.importorskip("matplotlib")
    assert viewed.draw(tmp_path / "part.svg").stat().st_size > 0


def test_explain():
    explanation = explain(tn.forward(DENSE))
    assert [applied.name for applied in explanation.applied][-1] == "view_operands"
    assert explanation.simplified.explain().applied == ()


def test_operands_check_their_patterns():
    pairs = IndexPattern(2, 3, 7, stride=2)
    sizes = {"k": 2, "o": 3, "a": 1, "b": 2, "p": 4}
    build = lambda *axes: Network.build(  # noqa: E731
        [Node(Operand("x", ((0, pairs),)), axes)], [], sizes
    )
    assert build(("k",), ("o",)).operands == {"x": (7,)}
    for axes in ([("o",), ("k",)], [("k",), ("p",)], [("k",)], [("a", "b"), ("o",)]):
        with pytest.raises(ValueError, match="with an index for each of its legs"):
            build(*axes)
    with pytest.raises(ValueError, match="has shape"):
        Network.build(
            [Node(Operand("x", ((0, pairs),)), (("k",), ("o",))), Node(Operand("x"), (("p",),))],
            [],
            sizes,
        )
    outside = IndexPattern(2, 4, 7, stride=2, padding=1)
    for patterns, message in [
        (((0, outside),), "can't be viewed"),
        (((0, pairs.sum("o")),), "can't be viewed"),
        (((1, pairs), (0, pairs)), "in their order"),
        (((-1, pairs),), "not negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            Operand("x", patterns)
