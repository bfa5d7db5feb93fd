"""Manipulations of small random networks against einsum, autograd and substitution."""

import runpy
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_tn.tn import Delta, Network, Node, Operand

SIZES = {"i": 2, "j": 3, "k": 2, "l": 1, "m": 3}
NAMES = ("a", "b", "c")
EXAMPLES = settings(max_examples=60)


def group(draw, indices):
    """Axes of one or more indices each."""
    axes = []
    for index in indices:
        if axes and draw(st.booleans()):
            axes[-1] += (index,)
        else:
            axes.append((index,))
    return tuple(axes)


@st.composite
def networks(draw):
    """Products of two or three operands over at most five indices, and sometimes a delta."""
    nodes = []
    some = st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=4, unique=True)
    for name in NAMES[: draw(st.integers(2, 3))]:
        nodes.append(Node(Operand(name), group(draw, draw(some))))
    if draw(st.booleans()):
        nodes.append(Node(Delta(SIZES["i"]), (("i",), ("k",))))
    held = sorted({index for node in nodes for index in node.indices})
    output = draw(st.lists(st.sampled_from(held), max_size=4, unique=True))
    network = Network.build(nodes, group(draw, output), SIZES)
    return network.scale(Fraction(1, 3)) if draw(st.booleans()) else network


def operands_of(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator)
        for name, shape in network.operands.items()
    }


def reference(network, operands, output=None):
    """The definition: multiply everything, then sum. One einsum over all indices."""
    number = {index: at for at, index in enumerate(network.size)}
    terms = []
    for node in network.nodes:
        if isinstance(node.symbol, Operand):
            tensor = operands[node.symbol.name].reshape([network.size[i] for i in node.indices])
        else:
            tensor = node.symbol.tensor(torch.float64, torch.device("cpu"))
        terms += [tensor, [number[index] for index in node.indices]]
    output = network.output if output is None else output
    result = torch.einsum(*terms, [number[index] for axis in output for index in axis])
    return result.reshape(network.shape_of(output))


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@EXAMPLES
@given(network=networks())
def test_evaluate(network):
    operands = operands_of(network)
    assert_close(network.evaluate(**operands), reference(network, operands))


@EXAMPLES
@given(network=networks(), data=st.data())
def test_sums_and_outputs(network, data):
    operands = operands_of(network)
    summed = data.draw(st.sets(st.sampled_from(network.output_indices or ("",)))) - {""}
    kept = [tuple(i for i in axis if i not in summed) for axis in network.output]
    expected = reference(network, operands, [axis for axis in kept if axis])
    assert_close(network.sum_over(*summed).evaluate(**operands), expected)
    order = data.draw(st.permutations(sorted(network.size)))
    output = group(data.draw, order)
    expected = reference(network, operands, output)
    assert_close(network.with_output(*output).evaluate(**operands), expected)


@EXAMPLES
@given(network=networks(), data=st.data())
def test_rename(network, data):
    operands = operands_of(network)
    names = dict(zip(network.size, data.draw(st.permutations(list(network.size))), strict=True))
    assert network.rename(names).rename({new: old for old, new in names.items()}) == network
    renamed = network.rename(names).evaluate(**operands)
    assert_close(renamed, reference(network, operands))


@EXAMPLES
@given(network=networks(), data=st.data())
def test_rename_makes_two_indices_one(network, data):
    """Then only entries are left where the two are equal."""
    tensors = [set(node.indices) for node in network.nodes] + [set(network.output_indices)]
    pairs = [
        (gone, kept)
        for gone, kept in permutations(network.size, 2)
        if network.size[gone] == network.size[kept]
        and gone not in network.output_indices
        and not any({gone, kept} <= indices for indices in tensors)
    ]
    if not pairs:
        return
    gone, kept = data.draw(st.sampled_from(pairs))
    operands = operands_of(network)
    delta = Node(Delta(network.size[gone]), ((gone,), (kept,)))
    expected = reference(network.with_nodes((*network.nodes, delta)), operands)
    assert_close(network.rename({gone: kept}).evaluate(**operands), expected)


@EXAMPLES
@given(network=networks(), name=st.sampled_from(NAMES[:2]))
def test_derivatives(network, name):
    operands = operands_of(network)
    others = {other: tensor for other, tensor in operands.items() if other != name}
    function = lambda tensor: reference(network, {**others, name: tensor})  # noqa: E731
    value, tangent = operands[name], operands_of(network, seed=1)[name]
    jacobian = torch.func.jacrev(function)(value)
    assert_close(network.differentiate(name).evaluate(**others), jacobian)
    output, jvp = torch.func.jvp(function, (value,), (tangent,))
    assert_close(network.replace(name, "t").evaluate(**others, t=tangent), jvp)
    cotangents = torch.randn(2, *output.shape, dtype=torch.float64)
    vjp = torch.func.vjp(function, value)[1]
    product = network.contract_with("g").differentiate(name)
    assert_close(product.evaluate(**others, g=cotangents[0]), vjp(cotangents[0])[0])
    several = network.contract_with("g", ("v",), leading={"v": 2}).differentiate(name)
    assert_close(several.evaluate(**others, g=cotangents), torch.vmap(vjp)(cotangents)[0])
    # A scalar product with the operand itself gives the function back.
    assert product.multiply(name, *product.output).sum_over(*product.output_indices).evaluate(
        **operands, g=cotangents[0]
    ).item() == pytest.approx((function(value) * cotangents[0]).sum().item(), abs=1e-12)


@EXAMPLES
@given(first=networks(), second=networks(), data=st.data())
def test_join(first, second, data):
    """The product of all entries of both, on the diagonal of what they share."""
    second = second.with_nodes(  # other operands: the same ones might have other shapes
        Node(Operand(f"{n.symbol}_2"), n.axes) if isinstance(n.symbol, Operand) else n
        for n in second.nodes
    )
    common = sorted(set(first.size) & set(second.size))
    share = data.draw(st.sets(st.sampled_from(common))) if common else set()
    primed = {index: index if index in share else f"{index}'" for index in second.size}
    everything = sorted({*first.size, *primed.values()})
    output = data.draw(st.permutations(everything))
    joined = first.join(second, share, [(index,) for index in output])
    number = {index: at for at, index in enumerate(everything)}
    a, b = operands_of(first), operands_of(second)
    expected = torch.einsum(
        reference(first, a, [(index,) for index in first.size]),
        [number[index] for index in first.size],
        reference(second, b, [(index,) for index in second.size]),
        [number[primed[index]] for index in second.size],
        [number[index] for index in output],
    )
    assert_close(joined.evaluate(**a, **b), expected)


def test_joining_again_and_again():
    """The primed names of an earlier copy are not those of a later one."""
    a = Network.build([Node(Operand("a"), (("i",), ("j",)))], [("i",)], {"i": 2, "j": 3})
    twice = a.join(a, (), [("i",), ("i'",)])
    four = twice.join(twice, (), [("i",), ("i'",), ("i''",), ("i'''",)])
    assert sorted(four.size) == sorted(index + "'" * n for index in "ij" for n in range(4))
    tensor = torch.randn(2, 3, dtype=torch.float64)
    row = tensor.sum(1)
    expected = torch.einsum("a,b,c,d->abcd", row, row, row, row)
    assert_close(four.evaluate(a=tensor), expected)


@EXAMPLES
@given(outer=networks(), inner=networks(), data=st.data())
def test_replace_by_a_network(outer, inner, data):
    """Replacing an operand is evaluating the network in its place."""
    axes, sizes = outer.axes_of("a"), dict(inner.size)
    # The inner network: three new operands with the axes of the outer one's, whole or split, and
    # inner indices that it holds as well.
    whole = data.draw(st.lists(st.booleans(), min_size=len(axes), max_size=len(axes)))
    output = []
    for at, (axis, as_one) in enumerate(zip(axes, whole, strict=True)):
        names = (f"x{at}",) if as_one else tuple(f"x{at}{index}" for index in axis)
        lengths = outer.shape_of((axis,)) if as_one else [outer.size[index] for index in axis]
        sizes.update(zip(names, lengths, strict=True))
        output.append(names)
    nodes = [
        Node(Operand(f"{n.symbol}_2"), n.axes) if isinstance(n.symbol, Operand) else n
        for n in inner.nodes
    ]
    nodes[0] = Node(nodes[0].symbol, (*nodes[0].axes, *output[::2]))
    nodes[1] = Node(nodes[1].symbol, (*output[1::2], *nodes[1].axes, *output[:1]))
    inner = Network.build(nodes, output, sizes)
    others = {name: t for name, t in operands_of(outer).items() if name != "a"}
    own = operands_of(inner, seed=1)
    replaced = outer.replace("a", inner)
    expected = reference(outer, {**others, "a": inner.evaluate(**own)})
    assert_close(replaced.evaluate(**others, **own), expected)


def test_replaced_networks_keep_names_where_they_can():
    vectors = [Node(Operand("u"), (("i",), ("r",))), Node(Operand("v"), (("j",), ("r",)))]
    low_rank = Network.build(vectors, [("i",), ("j",)], {"i": 4, "j": 3, "r": 2})
    nodes = [Node(Operand("w"), (("g", "d"), ("c",))), Node(Operand("x"), (("c",),))]
    layer = Network.build(nodes, [("g", "d")], {"g": 2, "d": 2, "c": 3})
    replaced = layer.replace("w", low_rank)
    assert str(replaced) == "u[(g d) r] v[c r] x[c] -> [(g d)]\nc=3 d=2 g=2 r=2"
    clashing = layer.rename({"c": "r"}).replace("w", low_rank)
    assert str(clashing) == "u[(g d) r'] v[r r'] x[r] -> [(g d)]\nd=2 g=2 r=3 r'=2"
    taken = [Node(Operand("u"), (("i",), ("r",), ("r'",))), Node(Operand("v"), (("j",),))]
    taken = Network.build(taken, [("i",), ("j",)], {"i": 4, "j": 3, "r": 2, "r'": 5})
    clashing = layer.rename({"c": "r"}).replace("w", taken)
    assert [str(node) for node in clashing.nodes] == ["u[(g d) r'' r']", "v[r]", "x[r]"]


def test_derivative_of_a_sum_is_ones():
    nodes = [Node(Operand("a"), (("i",), ("j",))), Node(Operand("b"), (("i",),))]
    network = Network.build(nodes, [("i",)], {"i": 2, "j": 3})
    derivative = network.differentiate("a")
    assert [str(node) for node in derivative.nodes] == ["b[i]", "ones[j]", "delta[i i']"]
    b = torch.tensor([2.0, 5.0])
    expected = torch.diag(b)[..., None].expand(2, 2, 3)
    torch.testing.assert_close(derivative.evaluate(b=b), expected)


PRODUCT = Network.build(
    [Node(Operand("a"), (("i",), ("j",))), Node(Operand("b"), (("j",), ("k",)))],
    [("i",), ("k",)],
    {"i": 2, "j": 3, "k": 4},
)
SPLIT_3_2 = Network.build([Node(Operand("c"), (("x", "y"),))], [("x", "y")], {"x": 3, "y": 2})


@pytest.mark.parametrize(
    ("manipulate", "message"),
    [
        (lambda n: n.rename({"x": "y"}), r"no indices \{'x'\} among \['i', 'j', 'k'\]"),
        (lambda n: n.rename({"i": "k"}), "'k' has sizes 2 and 4"),
        (lambda n: n.sum_over("j"), r"the result \[i k\] has no indices \{'j'\}"),
        (lambda n: n.with_output(("x",)), "output indices that belong to no node: {'x'}"),
        (lambda n: n.multiply("c", ("x",)), "sizes must name .*'x'"),
        (lambda n: n.multiply("c", ("i",), sizes={"i": 5}), "'i' has sizes 2 and 5"),
        (lambda n: n.contract_with("c", leading={"j": 2}), "'j' has sizes 3 and 2"),
        (lambda n: n.replace("c", "d"), "0 nodes hold the operand 'c'"),
        (lambda n: n.replace("a", n), r"\[i k\] of shape \(2, 4\) doesn't fit .*\[i j\]"),
        (lambda n: n.replace("a", n.sum_over("k")), r"\[i\] of shape \(2,\) doesn't fit"),
        (lambda n: n.multiply("w", ("i", "j")).replace("w", SPLIT_3_2), r"'i': 2, 'j': 3"),
        (lambda n: n.without("a", ("i",)), "output indices that belong to no node: {'i'}"),
        (lambda n: n.join(n, ("x",), ()), r"no indices \{'x'\}"),
        (lambda n: n.join(n.rename({"i": "x"}), ("i",), ()), r"no indices \{'i'\}"),
        (
            lambda n: n.join(
                Network.build([Node(Operand("c"), (("i",),))], [], {"i": 3}), ("i",), ()
            ),
            "'i' has sizes 2 and 3",
        ),
        (lambda n: n.join(n, (), ()).differentiate("a"), "2 nodes hold the operand 'a'"),
    ],
)
def test_refused_manipulations(manipulate, message):
    with pytest.raises(ValueError, match=message):
        manipulate(PRODUCT)


def test_constants_have_one_index_per_axis():
    square = Network.build([Node(Delta(4), (("i",), ("j",)))], [("i",), ("j",)], {"i": 4, "j": 4})
    matrix = Node(Operand("w"), (("g", "d"), ("c",)))
    network = Network.build([matrix], [("c",)], {"g": 2, "d": 2, "c": 4})
    with pytest.raises(ValueError, match=r"delta\[i j\] cannot be split into \[\(g d\) c\]"):
        network.replace("w", square)


def test_example_of_factorized_kernels(capsys):
    example = Path(__file__).parents[2] / "examples" / "factorized_kernels.py"
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.count("KFAC-expand of") == 3
