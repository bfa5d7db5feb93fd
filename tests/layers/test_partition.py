"""Which parameters get a Kronecker block, which don't, and why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import kfac_tn
from kfac_tn.layers import (
    ConvFamily,
    ConvTransposeFamily,
    LayerFamily,
    LinearFamily,
    partition,
    register_layer,
)
from kfac_tn.layers.registry import FAMILIES


class Layers(nn.Module):
    """A bag of named modules."""

    def __init__(self, **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


def tied(first: nn.Module, second: nn.Module, *attributes: str) -> Layers:
    for attribute in attributes:
        setattr(second, attribute, getattr(first, attribute))
    return Layers(a=first, b=second)


# Model, blocks as {name: parameters}, others as {parameter: a word of the reason}
CASES = {
    "linear and convolutions": (
        lambda: Layers(
            l=nn.Linear(2, 3), c1=nn.Conv1d(2, 2, 1), c2=nn.Conv2d(2, 2, 1), c3=nn.Conv3d(2, 2, 1)
        ),
        {name: [f"{name}.weight", f"{name}.bias"] for name in ("l", "c1", "c2", "c3")},
        {},
    ),
    "transposed convolutions": (
        lambda: Layers(
            t1=nn.ConvTranspose1d(2, 2, 1),
            t2=nn.ConvTranspose2d(2, 2, 1, bias=False),
            t3=nn.ConvTranspose3d(2, 2, 1),
            t4=kfac_tn.tn.nn.ConvTransposeNd(2, 2, (1, 1, 1, 1)),
        ),
        {
            "t1": ["t1.weight", "t1.bias"],
            "t2": ["t2.weight"],
            "t3": ["t3.weight", "t3.bias"],
            "t4": ["t4.weight", "t4.bias"],
        },
        {},
    ),
    "transposed convolutions tied with other output paddings": (
        lambda: tied(
            nn.ConvTranspose1d(1, 1, 2, stride=2),
            nn.ConvTranspose1d(1, 1, 2, stride=2, output_padding=1),
            "weight",
            "bias",
        ),
        {},
        {"a.weight": "hyper-parameters", "a.bias": "hyper-parameters"},
    ),
    "the model is the layer": (lambda: nn.Linear(2, 3), {"": ["weight", "bias"]}, {}),
    "no bias": (lambda: Layers(l=nn.Linear(2, 3, bias=False)), {"l": ["l.weight"]}, {}),
    "frozen weight": (
        lambda: Layers(l=frozen(nn.Linear(2, 3), "weight")),
        {},
        {"l.bias": "frozen"},
    ),
    "frozen bias": (lambda: Layers(l=frozen(nn.Linear(2, 3), "bias")), {"l": ["l.weight"]}, {}),
    "frozen layer": (lambda: Layers(l=frozen(nn.Linear(2, 3), "weight", "bias")), {}, {}),
    "normalization and embedding": (
        lambda: Layers(n=nn.LayerNorm(2), e=nn.Embedding(3, 2)),
        {"e": ["e.weight"]},
        {
            "n.weight": "LayerNorm",
            "n.bias": "LayerNorm",
        },
    ),
    "attention": (
        lambda: Layers(m=nn.MultiheadAttention(2, 1, add_bias_kv=True)),
        {
            "m.in_proj": ["m.in_proj_weight", "m.in_proj_bias"],
            "m.out_proj": ["m.out_proj.weight", "m.out_proj.bias"],
        },
        {"m.bias_k": "MultiheadAttention", "m.bias_v": "MultiheadAttention"},
    ),
    "attention with weights of their own": (
        lambda: frozen(nn.MultiheadAttention(2, 1, kdim=3), "k_proj_weight"),
        {
            "q_proj": ["q_proj_weight"],
            "v_proj": ["v_proj_weight"],
            "out_proj": ["out_proj.weight", "out_proj.bias"],
        },
        {"in_proj_bias": "MultiheadAttention"},
    ),
    "attentions tied": (
        lambda: tied(nn.MultiheadAttention(2, 1), nn.MultiheadAttention(2, 1), "in_proj_weight"),
        {
            "a.out_proj": ["a.out_proj.weight", "a.out_proj.bias"],
            "b.out_proj": ["b.out_proj.weight", "b.out_proj.bias"],
        },
        {
            "a.in_proj_weight": "another bias",
            "a.in_proj_bias": "no block",
            "b.in_proj_bias": "no block",
        },
    ),
    "a subclass of attention": (
        lambda: Layers(m=type("Mine", (nn.MultiheadAttention,), {})(2, 1, bias=False)),
        {},
        {"m.in_proj_weight": "Mine", "m.out_proj.weight": "NonDynamicallyQuantizableLinear"},
    ),
    "a subclass may compute something else": (
        lambda: Layers(l=type("Mine", (nn.Linear,), {})(2, 3)),
        {},
        {"l.weight": "Mine", "l.bias": "Mine"},
    ),
    "reparametrized weight": (
        lambda: Layers(l=nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))),
        {},
        {
            "l.bias": "ParametrizedLinear",
            "l.parametrizations.weight.original0": "ParametrizationList",
            "l.parametrizations.weight.original1": "ParametrizationList",
        },
    ),
    "pruned weight": (
        lambda: Layers(l=prune.identity(nn.Linear(2, 3), "weight")),
        {},
        {"l.bias": "weight", "l.weight_orig": "Linear"},
    ),
    "linear layers tied, biases too": (
        lambda: tied(nn.Linear(2, 2), nn.Linear(2, 2), "weight", "bias"),
        {"a": ["a.weight", "a.bias"]},
        {},
    ),
    "linear layers tied, no biases": (
        lambda: tied(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), "weight"),
        {"a": ["a.weight"]},
        {},
    ),
    "linear layers tied, biases not": (
        lambda: tied(nn.Linear(2, 2), nn.Linear(2, 2), "weight"),
        {},
        {"a.weight": "another bias", "a.bias": "no block", "b.bias": "no block"},
    ),
    "biases tied, weights not": (
        lambda: tied(nn.Linear(2, 3), nn.Linear(2, 3), "bias"),
        {"a": ["a.weight"], "b": ["b.weight"]},
        {"a.bias": "shared with 'b', which has another weight"},
    ),
    "embedding and linear tied": (
        lambda: tied(nn.Embedding(5, 2), nn.Linear(2, 5), "weight"),
        {},
        {"a.weight": "shared with Linear 'b', another kind of layer", "b.bias": "no block"},
    ),
    "embeddings tied": (
        lambda: tied(nn.Embedding(5, 2), nn.Embedding(5, 2), "weight"),
        {"a": ["a.weight"]},
        {},
    ),
    "embeddings tied with other paddings": (
        lambda: tied(nn.Embedding(5, 2), nn.Embedding(5, 2, padding_idx=0), "weight"),
        {},
        {"a.weight": "hyper-parameters"},
    ),
    "embeddings whose gradients are no matrix or not the loss's": (
        lambda: Layers(
            s=nn.Embedding(3, 2, sparse=True), f=nn.Embedding(3, 2, scale_grad_by_freq=True)
        ),
        {},
        {"s.weight": "sparse=True", "f.weight": "scale_grad_by_freq=True"},
    ),
    "convolutions tied with other strides": (
        lambda: tied(nn.Conv1d(1, 1, 2), nn.Conv1d(1, 1, 2, stride=2), "weight", "bias"),
        {},
        {"a.weight": "hyper-parameters", "a.bias": "hyper-parameters"},
    ),
    "layers without elements": (
        lambda: Layers(a=nn.Linear(2, 0), b=nn.Linear(0, 2)),
        {},
        {
            "a.weight": "no elements",
            "a.bias": "no elements",
            "b.weight": "no elements",
            "b.bias": "no elements",
        },
    ),
    "a layer whose forward was replaced": (
        lambda: _patched(),
        {},
        {"a.weight": "a forward of its own", "a.bias": "a forward of its own"},
    ),
    "one module under two names": (
        lambda: _registered_twice(),
        {"a": ["a.weight", "a.bias"]},
        {},
    ),
}


def _patched() -> Layers:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight, layer.bias)
    return Layers(a=layer)


def _registered_twice() -> Layers:
    layer = nn.Linear(2, 2)
    return Layers(a=layer, b=layer)


@pytest.mark.parametrize(("make", "blocks", "others"), CASES.values(), ids=CASES)
def test_every_trainable_parameter_once_and_with_a_reason(make, blocks, others):
    model = make()
    found, rest = partition(model)
    assert {block.name: list(block.parameters) for block in found} == blocks
    assert {other.name for other in rest} == set(others)
    for other in rest:
        assert others[other.name] in other.reason
    covered = [p for block in found for p in block.parameters.values()]
    covered += [other.parameter for other in rest]
    assert len(covered) == len(set(covered))
    assert set(covered) == {p for p in model.parameters() if p.requires_grad}


def test_block_of_tied_modules_knows_them_all():
    model = tied(nn.Linear(2, 2), nn.Linear(2, 2), "weight", "bias")
    ((block,), _) = partition(model)
    assert block.modules == (model.a, model.b)
    ((block,), _) = partition(_registered_twice())
    assert len(block.modules) == 1


def test_sizes_of_a_grouped_convolution():
    ((block,), _) = partition(nn.Conv2d(4, 6, (2, 3), groups=2))
    assert (block.groups, block.input_dim, block.grad_output_dim) == (2, 2 * 6, 3)


def test_sizes_of_a_grouped_transposed_convolution():
    ((block,), _) = partition(nn.ConvTranspose2d(4, 6, (2, 5), groups=2))
    assert (block.groups, block.input_dim, block.grad_output_dim) == (2, 2 * 10, 3)


@pytest.mark.parametrize(
    "choice",
    [
        "reduce",
        {"a": "reduce", "b": "expand"},
        lambda name, module: {"a": "reduce"}.get(name, "expand"),
    ],
)
def test_approximation_for_all_by_name_or_by_function(choice):
    blocks, _ = partition(Layers(a=nn.Linear(1, 1), b=nn.Linear(1, 1), n=nn.LayerNorm(1)), choice)
    assert blocks[0].approximation == "reduce"
    assert blocks[1].approximation == ("reduce" if choice == "reduce" else "expand")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("shrink", "'shrink'"),
        ({"a": "reduce"}, "b"),
        ({"a": "reduce", "b": "expand", "n": "expand"}, r"\['n'\]"),
        (lambda name, module: "shrink", "'shrink'"),
    ],
)
def test_wrong_approximations_are_refused(choice, message):
    model = Layers(a=nn.Linear(1, 1), b=nn.Linear(1, 1), n=nn.LayerNorm(1))
    with pytest.raises(ValueError, match=message):
        partition(model, choice)


def test_lazy_modules_are_refused_until_they_have_a_shape():
    model = Layers(l=nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'l.weight' is not initialized"):
        partition(model)
    model.l(torch.zeros(1, 2))
    assert partition(model)[0][0].input_dim == 2


def test_registered_layers_get_a_block():
    class Loud(nn.Linear):
        pass

    assert partition(Loud(2, 3))[0] == []
    register_layer(Loud, LinearFamily())
    try:
        ((block,), others) = partition(Loud(2, 3))
    finally:
        del FAMILIES[Loud]
    assert block.input_dim == 2
    assert others == []


SINGLE = [
    (LinearFamily(), nn.Linear(3, 2), (3,)),
    (ConvFamily(), nn.Conv1d(3, 2, 2), (3, 5)),
    (ConvFamily(), nn.Conv2d(4, 2, 2, groups=2), (4, 5, 4)),
    (ConvFamily(), nn.Conv3d(2, 2, 2, padding=1, padding_mode="circular"), (2, 3, 4, 3)),
    (ConvTransposeFamily(), nn.ConvTranspose1d(3, 2, 2, stride=2), (3, 5)),
    (ConvTransposeFamily(), nn.ConvTranspose2d(4, 2, 2, groups=2), (4, 5, 4)),
    (ConvTransposeFamily(), nn.ConvTranspose3d(2, 2, 2, dilation=2), (2, 3, 4, 3)),
]


@pytest.mark.parametrize(
    ("family", "module", "shape"), SINGLE, ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_single_example_may_lack_its_batch_axis(family, module, shape, bias):
    x = torch.rand(shape)
    output = module(x)
    assert family.batch_and_positions(module, output) == family.batch_and_positions(
        module, module(x[None])
    )
    for method, argument in (
        ("input_factor", (x, bias)),
        ("average_input", (x, bias)),
        ("grad_output_factor", (output,)),
        ("sum_grad_output", (output,)),
        ("per_example_weight_gradient", (x, output)),
        ("per_example_bias_gradient", (output,)),
        ("weight_diagonal", (x, output)),
    ):
        batched = tuple(a[None] if isinstance(a, torch.Tensor) else a for a in argument)
        actual = getattr(family, method)(module, *argument)
        torch.testing.assert_close(actual, getattr(family, method)(module, *batched))


@pytest.mark.parametrize(
    ("family", "module", "shape"), SINGLE, ids=lambda value: type(value).__name__
)
def test_per_example_gradients_and_diagonals(family, module, shape):
    module = copy.deepcopy(module).double()
    x = torch.rand(4, *shape, dtype=torch.float64)
    output = module(x)
    g = torch.rand_like(output)
    expected = [
        torch.autograd.grad(module(x[n : n + 1]), [module.weight, module.bias], g[n : n + 1])
        for n in range(4)
    ]
    weights, biases = (torch.stack(gradients) for gradients in zip(*expected, strict=True))
    torch.testing.assert_close(family.per_example_weight_gradient(module, x, g), weights)
    torch.testing.assert_close(family.per_example_bias_gradient(module, g), biases)
    squares = weights.square().sum(0)
    torch.testing.assert_close(family.weight_diagonal(module, x, g), squares)
    torch.testing.assert_close(family.columns_diagonal(module, x, [g, 2 * g]), 5 * squares)


def test_families_may_lack_what_only_diagonals_need():
    class Mine(LinearFamily):
        per_example_weight_gradient = LayerFamily.per_example_weight_gradient

    with pytest.raises(NotImplementedError, match=r"Mine has no per_example_weight_gradient\(\)"):
        Mine().per_example_weight_gradient(nn.Linear(1, 1), torch.ones(1, 1), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("limit", "size", "pieces"), [(8192, 8191, 1), (8192, 12287, 6), (64, 127, 2), (4096, 8191, 4)]
)
def test_blocks_of_factors_that_are_cut_are_small(limit, size, pieces):
    """They cost the cube of their size: of one size, two halves of a very large one still do."""
    layer = nn.Linear(size, 1)  # and a row for the bias
    [block], _ = partition(layer, max_dim=limit)
    assert block.input_pieces == pieces
