"""Plans under torch.func, torch.compile, autocast and other modes, on meta and on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kfac_tn import tn
from kfac_tn.tn import plan as planning

torch.set_num_threads(1)
SPEC = tn.ConvSpec((2, 4, 5, 6), (6, 2, 3, 2), (1, 2), padding=1, groups=2)
VJP = tn.input_vjp(SPEC).simplify()
BUILDERS = (
    tn.forward,
    tn.unfold_input,
    tn.input_vjp,
    tn.weight_vjp,
    tn.kfac_expand_input_factor,
    tn.kfac_reduce_input_factor,
)


def operands_of(network, dtype=torch.float64):
    return {name: torch.rand(shape, dtype=dtype) for name, shape in network.operands.items()}


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(builder, backend):
    network = builder(SPEC).simplify()
    operands = operands_of(network)
    function = lambda operands: network.evaluate(**operands)  # noqa: E731
    expected = function(operands)
    torch._dynamo.reset()
    planning._plan.cache_clear()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(operands), expected)
    torch.testing.assert_close(function(operands), expected)  # what tracing cached is real


def test_each_algorithm_of_gram_matrices_compiles_and_meets_fake_tensors():
    network = tn.kfac_expand_input_factor(tn.ConvSpec((2, 3, 6, 5), (1, 3, 3, 2))).simplify()
    operands = operands_of(network)
    plan = network.plan()
    algorithms = [recipe.algorithm for recipe in (plan, *plan.others)]
    assert {"unfolding", "cells", "lags", "spectra"} <= set(algorithms)
    for algorithm in algorithms:
        function = lambda ops, name=algorithm: network.evaluate(**ops, algorithm=name)  # noqa: E731
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        expected = function(operands)
        torch.testing.assert_close(compiled(operands), expected, msg=algorithm)
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(t) for name, t in operands.items()}
            assert function(fakes).shape == expected.shape


def test_compiled_before_anything_else_is_asked_of_the_network():
    operands = operands_of(VJP)
    fresh = tn.Network.build(VJP.nodes, VJP.output, VJP.size)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda operands: fresh.evaluate(**operands), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(operands), VJP.evaluate(**operands))


def test_compiled_under_transforms():
    operands = operands_of(VJP)
    function = lambda weight, g: VJP.evaluate(weight=weight, grad_output=g)  # noqa: E731
    weight, g = operands["weight"], operands["grad_output"]
    scalar = lambda weight, g: function(weight, g).square().sum()  # noqa: E731
    torch._dynamo.reset()
    batched = torch.compile(
        torch.func.vmap(function, in_dims=(None, 0)), backend="aot_eager", fullgraph=True
    )
    expected = function(weight, g)
    torch.testing.assert_close(
        batched(weight, torch.stack([g, 2 * g])), torch.stack([expected, 2 * expected])
    )
    gradient = torch.compile(torch.func.grad(scalar), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(weight, g), torch.func.grad(scalar)(weight, g))


@pytest.mark.parametrize("network", [VJP, tn.kfac_reduce_input_factor(SPEC).simplify()])
def test_meta_and_fake_tensors(network):
    operands = operands_of(network)
    expected = network.evaluate(**operands)
    meta = network.evaluate(**{name: t.to("meta") for name, t in operands.items()})
    assert (meta.shape, meta.device.type) == (expected.shape, "meta")
    planning._plan.cache_clear()
    planning._recipes.cache_clear()
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(t) for name, t in operands.items()}
        assert network.evaluate(**fakes).shape == expected.shape
    # Real constants may not meet fake operands, nor fake ones be kept.
    torch.testing.assert_close(network.evaluate(**operands), expected)
    fake = network.evaluate(**fakes)
    assert isinstance(fake, FakeTensor)
    assert fake.shape == expected.shape
    exported = torch.export.export(Evaluation(network), (), operands)
    torch.testing.assert_close(exported.module()(**operands), expected)


class Evaluation(torch.nn.Module):
    """A network as a module, which is what `torch.export` takes."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, **operands):
        return self.network.evaluate(**operands)


def test_double_transforms():
    """Planning inside of two transforms leaves nothing of them in what is kept."""
    operands = operands_of(VJP)
    weight, g = operands["weight"], operands["grad_output"]
    scalar = lambda weight: VJP.evaluate(weight=weight, grad_output=g).square().sum()  # noqa: E731
    planning._plan.cache_clear()
    planning._recipes.cache_clear()
    hessian = torch.func.jacfwd(torch.func.jacrev(scalar))(weight)
    reverse = torch.func.jacrev(torch.func.jacrev(scalar))(weight)
    torch.testing.assert_close(hessian, reverse)
    value = scalar(weight)
    direction = torch.einsum("abcdefgh,efgh->abcd", hessian, weight)
    torch.testing.assert_close((direction * weight).sum(), 2 * value)


def test_autocast_lowers_products():
    network = tn.forward(SPEC).simplify()
    operands = operands_of(network, torch.float32)
    expected = network.evaluate(**operands)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = network.evaluate(**operands)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(network.evaluate(**operands), expected)  # constants stay exact


@pytest.mark.parametrize("shape", [(64, 32, 14, 14), (2, 64, 60, 60)])
def test_autocast_leaves_gram_matrices_precise(shape):
    """They are sums of many products, in chunks: added up in place, whatever the algorithm."""
    spec = tn.ConvSpec(shape, (1, shape[1], 3, 3), padding=1)
    network = tn.kfac_expand_input_factor(spec).simplify()
    operands = operands_of(network, torch.float32)
    expected = network.evaluate(**operands)
    plan = network.plan()
    for recipe in (plan, *plan.others):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = network.evaluate(**operands, algorithm=recipe.algorithm)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5, msg=recipe.algorithm)


def test_counting_modes_see_the_evaluation_alone():
    network = tn.ggn_diagonal(SPEC).simplify()
    operands = operands_of(network)
    network.evaluate(**operands)
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            network.evaluate(**operands)
        counts.append(counter.get_total_flops())
        planning._plan.cache_clear()
        planning._recipes.cache_clear()
    assert counts[0] == counts[1] > 0
