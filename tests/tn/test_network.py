"""Networks as data: value, manipulations, rewrites, and what is refused."""

import pickle
from fractions import Fraction
from inspect import signature

import pytest
import torch

from kfac_tn import tn
from kfac_tn.tn import Delta, IndexPattern, Network, Node, Operand, Scalar
from kfac_tn.tn.rewrite import average_first, merge_scalars, prune_deltas, simplify

SPEC = tn.ConvSpec((2, 4, 5, 6), (6, 2, 3, 2), (1, 2), padding=1, groups=2)
BUILDERS = (
    tn.forward,
    tn.unfold_input,
    tn.average_unfolded_input,
    tn.kfac_expand_input_factor,
    tn.kfac_reduce_input_factor,
)


def rand(*shape):
    return torch.rand(shape, dtype=torch.float64)


def matrix_product(output=(("i",), ("k",))):
    nodes = [Node(Operand("a"), (("i",), ("j",))), Node(Operand("b"), (("j",), ("k",)))]
    return Network.build(nodes, output, {"i": 2, "j": 3, "k": 4})


@pytest.mark.parametrize("builder", BUILDERS)
def test_networks_are_values(builder):
    network = builder(SPEC)
    rebuilt = Network(tuple(network.nodes), tuple(network.output), tuple(network.sizes))
    assert rebuilt is not network
    assert rebuilt == network
    assert hash(rebuilt) == hash(network)
    assert len({network, rebuilt, network.simplify()}) == (
        1 if network.simplify() is network else 2
    )
    assert pickle.loads(pickle.dumps(network)) == network
    assert "input[n (g c) i1 i2]" in str(network)
    assert "Pi[k2 o2 i2]" in str(network)
    assert "k1=3" in str(network)
    assert eval(repr(network), {**vars(tn), "Fraction": Fraction}) == network


def test_networks_differ():
    networks = {builder(SPEC) for builder in BUILDERS}
    assert len(networks) == len(BUILDERS)


def test_immutable():
    with pytest.raises(AttributeError):
        tn.forward(SPEC).nodes = ()


def test_rename_joins_indices():
    a, b = rand(2, 3), rand(3, 2)
    square = Network.build(matrix_product().nodes, [("i",)], {"i": 2, "j": 3, "k": 2})
    rows = square.rename({"k": "i"})
    torch.testing.assert_close(rows.evaluate(a=a, b=b), (a @ b).diagonal())


def test_manipulations():
    a, b = rand(2, 3), rand(3, 4)
    network = matrix_product()
    cases = [
        (network, a @ b),
        (network.with_output(("k", "i")), (a @ b).T.flatten()),
        (network.sum_over("i"), (a @ b).sum(0)),
        (network.sum_over("i", "k"), (a @ b).sum()),
        (network.scale(Fraction(1, 3)).scale(Fraction(2)), a @ b * 2 / 3),
    ]
    for manipulated, expected in cases:
        torch.testing.assert_close(manipulated.evaluate(a=a, b=b), expected)
    tangent = rand(2, 3)
    jvp = network.replace("a", "a_tangent")
    torch.testing.assert_close(jvp.evaluate(a_tangent=tangent, b=b), tangent @ b)
    vjp = network.contract_with("v").without("a", ("i",), ("j",))
    v = rand(2, 4)
    torch.testing.assert_close(vjp.evaluate(b=b, v=v), v @ b.T)
    gram = network.join(network, ("j", "k"), [("i",), ("i'",)])
    assert gram.operands == {"a": (2, 3), "b": (3, 4)}
    torch.testing.assert_close(gram.evaluate(a=a, b=b), (a * b.square().sum(1)) @ a.T)


@pytest.mark.parametrize("name", ["input", "weight"])
def test_derivative_of_convolution(name):
    x, weight = rand(2, 4, 5, 6), rand(6, 2, 3, 2)
    network = tn.forward(SPEC)
    derivative = network.differentiate(name)
    (other,) = {"input", "weight"} - {name}
    operands = {"input": x, "weight": weight}
    jacobian = torch.autograd.functional.jacobian(
        lambda tensor: torch.nn.functional.conv2d(
            tensor if name == "input" else x,
            tensor if name == "weight" else weight,
            stride=(1, 2),
            padding=1,
            groups=2,
        ),
        operands[name],
    )
    torch.testing.assert_close(derivative.evaluate(**{other: operands[other]}), jacobian)
    # Contracting it with the operand again is the convolution; the deltas are pruned.
    axes = derivative.output[len(network.output) :]
    again = Network.build(
        [*derivative.nodes, Node(Operand(name), axes)], network.output, derivative.size
    )
    assert any(isinstance(node.symbol, Delta) for node in again.nodes)
    assert not any(isinstance(node.symbol, Delta) for node in again.simplify().nodes)
    expected = network.evaluate(**operands)
    torch.testing.assert_close(again.evaluate(**operands), expected)
    torch.testing.assert_close(again.simplify().evaluate(**operands), expected)


def test_average_first():
    average = average_first(tn.average_unfolded_input(SPEC))
    assert [str(n.symbol) for n in average.nodes] == ["input", "sum_o Pi", "sum_o Pi", "1/20"]
    # An output position that two copies share is summed over the product, not the pattern.
    expand = tn.kfac_expand_input_factor(SPEC)
    assert average_first(expand) == expand
    # All indices of a pattern may go; a number is left.
    alone = Network.build(
        [Node(Operand("a"), (("j",),)), Node(IndexPattern(2, 3, 4), (("k",), ("o",), ("i",)))],
        [("j",)],
        {"j": 2, "k": 2, "o": 3, "i": 4},
    )
    assert str(average_first(alone).nodes[1].symbol) == "sum_koi Pi"
    for network in (alone, average_first(alone)):
        assert network.evaluate(a=torch.ones(2)).tolist() == [6, 6]


def test_prune_deltas_keeps_what_it_must():
    sizes = {"i": 2, "j": 2}
    vector, delta = Node(Operand("a"), (("i",),)), Node(Delta(2), (("i",), ("j",)))
    diagonal = Network.build([vector, delta], [("i",), ("j",)], sizes)
    assert prune_deltas(diagonal) == diagonal
    assert diagonal.evaluate(a=torch.tensor([1.0, 2.0])).tolist() == [[1, 0], [0, 2]]
    trace = Network.build([Node(Operand("a"), (("i",), ("j",))), delta], [], sizes)
    assert prune_deltas(trace) == trace
    assert trace.evaluate(a=torch.tensor([[1.0, 2.0], [3.0, 4.0]])).item() == 5
    renamed = prune_deltas(Network.build([vector, delta], [("j",)], sizes))
    assert renamed == Network.build([Node(Operand("a"), (("j",),))], [("j",)], sizes)


def test_merge_scalars():
    network = matrix_product().scale(Fraction(1, 3)).scale(Fraction(3, 2))
    merged = merge_scalars(network)
    assert [n.symbol for n in merged.nodes[2:]] == [Scalar(Fraction(1, 2))]
    assert merge_scalars(network.scale(Fraction(2))) == matrix_product()


@pytest.mark.parametrize("builder", BUILDERS)
def test_simplify(builder):
    network = builder(SPEC)
    simple = network.simplify()
    assert simple.simplify() is simple
    assert simplify(network) is simple  # cached
    assert simple.operands == network.operands
    assert simple.shape == network.shape
    assert simple.flops <= network.flops
    assert simple.peak_memory <= network.peak_memory


@pytest.mark.parametrize(
    ("nodes", "output", "sizes", "message"),
    [
        ([Node(Operand("a"), (("i", "i"),))], (), {"i": 2}, "twice"),
        ([Node(Operand("a"), (("i",),))], (("i",), ("i",)), {"i": 2}, "twice"),
        ([Node(Operand("a"), (("i",),))], (("j",),), {"i": 2, "j": 2}, "no node: {'j'}"),
        ([Node(Operand("a"), (("i",),))], (), {}, "sizes"),
        *(
            ([Node(Operand("a"), (("i",),))], (), {"i": size}, "sizes .* at least 1: not {'i': ")
            for size in (0, -1, 1.5, "3", None)
        ),
        ([Node(Delta(3), (("i",), ("j",)))], (), {"i": 2, "j": 3}, r"\(2, 3\), expected \(3, 3\)"),
        (
            [Node(Operand("a"), (("i",),)), Node(Operand("a"), (("j",),))],
            (),
            {"i": 2, "j": 3},
            r"a\[j\] has shape \(3,\), expected \(2,\)",
        ),
    ],
)
def test_refused_networks(nodes, output, sizes, message):
    with pytest.raises(ValueError, match=message):
        Network.build(nodes, output, sizes)


def test_names_that_evaluation_takes_for_itself_are_refused():
    arguments = signature(Network.evaluate).parameters.values()
    reserved = {each.name for each in arguments if each.kind != each.VAR_KEYWORD}
    assert reserved == {"self", "memory_limit", "algorithm"}
    for name in reserved:
        with pytest.raises(ValueError, match=f"can't be named '{name}'"):
            tn.forward(SPEC).replace("input", name)


@pytest.mark.parametrize("method", ["evaluate", "einsum"])
def test_refused_operands(method):
    call = getattr(tn.forward(SPEC), method)
    x, weight = rand(2, 4, 5, 6), rand(6, 2, 3, 2)
    cases = [
        ({"input": x}, r"takes the operands \['input', 'weight'\], got \['input'\]"),
        ({"input": x, "weight": weight, "bias": x}, "got .*'bias'"),
        ({"input": x, "weight": weight[:4]}, r"'weight' has shape \(4, 2, 3, 2\).*\(6, 2, 3, 2\)"),
        ({"input": x, "weight": weight.float()}, "'weight' is torch.float32"),
        ({"input": x.long(), "weight": weight.long()}, "'input' has dtype torch.int64"),
        ({"input": x, "weight": weight.to("meta")}, "share dtype and device"),
    ]
    for operands, message in cases:
        with pytest.raises(ValueError, match=message):
            call(**operands)
    constant = Network.build([Node(Delta(2), (("i",), ("j",)))], [("i",)], {"i": 2, "j": 2})
    with pytest.raises(ValueError, match="no operands"):
        constant.evaluate()


def test_refused_manipulations():
    with pytest.raises(ValueError, match="0 nodes hold the operand 'bias'"):
        tn.forward(SPEC).differentiate("bias")
    with pytest.raises(ValueError, match="2 nodes hold the operand 'input'"):
        tn.kfac_expand_input_factor(SPEC).differentiate("input")


def test_more_indices_than_letters():
    indices = tuple(f"i{n}" for n in range(60))
    nodes = [Node(Operand("a"), (indices,)), Node(Operand("b"), (indices[:30], indices[30:]))]
    network = Network.build(nodes, [indices], dict.fromkeys(indices, 1))
    a, b = torch.tensor([2.0]), torch.tensor([[3.0]])
    assert network.evaluate(a=a, b=b).tolist() == [6]
    with pytest.raises(ValueError, match="52 letters, but this network 60 indices: call evaluate"):
        network.einsum(a=a, b=b)
