"""Plans: what is cached, shared, viewed and counted, and what they run under."""

from collections import Counter

import pytest
import torch

from kfac_tn import tn
from kfac_tn.tn import plan as planning
from kfac_tn.tn.gram import WindowGram
from kfac_tn.tn.rewrite import explain
from kfac_tn.tn.steps import Apply, Arrange, Pad, Product, Window

SPEC = tn.ConvSpec((2, 4, 5, 6), (6, 2, 3, 2), (1, 2), padding=1, groups=2)
BUILDERS = (
    tn.forward,
    tn.unfold_input,
    tn.kfac_expand_input_factor,
    tn.kfac_reduce_input_factor,
)
CPU = torch.device("cpu")


def operands_of(network, dtype=torch.float64):
    return {name: torch.rand(shape, dtype=dtype) for name, shape in network.operands.items()}


def steps(network, algorithm="unfolding"):
    recipe = network.plan(algorithm)
    return Counter(type(instruction.step) for instruction in recipe.instructions)


def test_plans_are_cached():
    network = tn.forward(SPEC)
    recipe = planning.plan(network, torch.float32, CPU)
    assert planning.plan(tn.forward(SPEC), torch.float32, CPU) is recipe
    assert planning.plan(network, torch.float64, CPU) is not recipe
    network.evaluate(**operands_of(network, torch.float32))
    before = planning._plan.cache_info()
    network.evaluate(**operands_of(network, torch.float32))
    after = planning._plan.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_caches_are_bounded():
    caches = (
        planning._plan,
        planning._recipe,
        planning._recipes,
        explain,
        tn.forward,
        tn.kfac_expand_input_factor,
    )
    for cache in caches:
        assert cache.cache_info().maxsize is not None


def test_windows_are_views():
    """Forward pads, views, multiplies once; a Gram matrix is one step; reduce never unfolds."""
    assert steps(tn.forward(SPEC)) == {Pad: 1, Window: 2, Arrange: 3, Product: 1}
    assert steps(tn.kfac_expand_input_factor(SPEC)) == {WindowGram: 1, Arrange: 1}
    reduce = steps(tn.kfac_reduce_input_factor(SPEC).simplify())
    assert reduce == {Apply: 2, WindowGram: 1, Arrange: 1}
    assert steps(tn.unfold_input(SPEC)) == {Pad: 1, Window: 2, Arrange: 1}


def test_expand_memory_is_one_unfolded_input():
    spec = tn.ConvSpec((8, 16, 14, 14), (16, 16, 3, 3), padding=1)
    padded, unfolded, factor = 8 * 16 * 16 * 16, 8 * 16 * 9 * 14 * 14, (16 * 9) ** 2
    assert tn.unfold_input(spec).peak_memory == padded + unfolded
    assert unfolded <= tn.kfac_expand_input_factor(spec).peak_memory <= padded + unfolded + factor
    assert tn.kfac_reduce_input_factor(spec).simplify().peak_memory < factor + unfolded / 20


def test_flops():
    spec = tn.ConvSpec((8, 16, 14, 14), (32, 16, 3, 3), padding=1)
    assert tn.unfold_input(spec).flops == 0
    assert tn.forward(spec).flops == 2 * 8 * 32 * (16 * 9) * 14 * 14
    gram = 2 * (16 * 9) ** 2 * 8 * 14 * 14
    assert gram <= tn.kfac_expand_input_factor(spec).flops < gram * 1.01
    assert tn.kfac_reduce_input_factor(spec).simplify().flops < gram / 50


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_differentiable(builder, mode):
    spec = tn.ConvSpec((2, 2, 4, 3), (2, 1, 2, 2), (1, 2), 1, groups=2, padding_mode=mode)
    network = builder(spec).simplify()
    operands = {name: t.requires_grad_() for name, t in operands_of(network).items()}
    function = lambda *tensors: network.evaluate(**dict(zip(operands, tensors, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(operands.values()))


@pytest.mark.parametrize("builder", BUILDERS)
def test_function_transforms(builder):
    """Also when the first evaluation, which makes the constants, is inside of one."""
    network = builder(SPEC).simplify()
    operands = operands_of(network)
    x, others = operands["input"], {n: t for n, t in operands.items() if n != "input"}

    def function(x):
        return network.evaluate(input=x, **others)

    direction = torch.rand_like(x)
    expected = torch.stack([function(x), function(direction)])
    planning._plan.cache_clear()
    gradient = torch.func.grad(lambda x: function(x).square().sum())(x)
    torch.testing.assert_close(function(x), expected[0])
    planning._plan.cache_clear()
    value, tangent = torch.func.jvp(function, (x,), (direction,))
    torch.testing.assert_close(function(x), expected[0])
    planning._plan.cache_clear()
    batched = torch.func.vmap(function)(torch.stack([x, direction]))
    torch.testing.assert_close(function(x), expected[0])
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(batched, expected)
    torch.testing.assert_close((gradient * direction).sum(), 2 * (value * tangent).sum())


def test_constants_outlive_the_mode_they_are_made_in():
    network = tn.average_unfolded_input(SPEC).simplify()
    x = torch.rand(2, 4, 5, 6, requires_grad=True)
    planning._plan.cache_clear()
    with torch.inference_mode():
        network.evaluate(input=x.detach())
    network.evaluate(input=x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("builder", BUILDERS)
def test_strides_of_operands_do_not_matter(builder):
    network = builder(SPEC).simplify()
    operands = operands_of(network)
    expected = network.evaluate(**operands)
    strided = {n: t.to(memory_format=torch.channels_last) for n, t in operands.items()}
    torch.testing.assert_close(network.evaluate(**strided), expected)
    torch.testing.assert_close(
        network.evaluate(
            **{n: t[..., None].expand(*t.shape, 2)[..., 0] for n, t in operands.items()}
        ),
        expected,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_dtypes(dtype):
    network = tn.forward(SPEC)
    operands = operands_of(network, dtype)
    result = network.evaluate(**operands)
    assert result.dtype == dtype
    expected = torch.nn.functional.conv2d(*operands.values(), stride=(1, 2), padding=1, groups=2)
    torch.testing.assert_close(result, expected)


def test_same_operand_in_two_shapes_of_nodes():
    """A tensor may be read as one axis in one node and as two in another."""
    nodes = [
        tn.Node(tn.Operand("a"), (("i", "j"),)),
        tn.Node(tn.Operand("a"), (("k",),)),
    ]
    network = tn.Network.build(nodes, [("i",)], {"i": 2, "j": 3, "k": 6})
    a = torch.arange(6.0)
    assert network.evaluate(a=a).tolist() == [3 * 15, 12 * 15]


def test_two_patterns_with_one_leg_on_one_tensor():
    """A window and a slice of one tensor that lead to the same index: only one may bring it."""
    spec = tn.ConvSpec(
        (1, 1, 2, 2, 2), (1, 1, 1, 1, 3), padding=((0, 0), (0, 0), (0, 2)), transposed=True
    )
    network = tn.fold_output(spec)
    columns = torch.rand(network.operands["grad_output"], dtype=torch.float64)
    expected = network.evaluate(grad_output=columns)
    actual = network.simplify().evaluate(grad_output=columns)
    assert torch.allclose(actual, expected, rtol=1e-12)
