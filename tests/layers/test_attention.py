"""The projections of torch's attention, against linear layers, autograd and the dense GGN."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfac_tn
from kfac_tn.hidden_watch import HiddenApart
from kfac_tn.layers.attention import attention_layers
from kfac_tn.layers.hidden import HiddenLayers
from kfac_tn.testing import dense_ggn, relative_error

TOLERANCE = 1e-10
E, HEADS = 4, 2
OPTIONS = {
    "bias": [True, False],
    "add_bias_kv": [False, True],
    "add_zero_attn": [False, True],
    "batch_first": [True, False],
}
INPUTS = ["self", "cross", "all"]  # which of queries, keys and values are the same tensor


@st.composite
def attentions(draw: Any, **fixed: Any) -> nn.MultiheadAttention:
    options = {name: draw(st.sampled_from(values)) for name, values in OPTIONS.items()} | fixed
    attention = nn.MultiheadAttention(E, HEADS, **options, dtype=torch.float64)
    for parameter in attention.parameters():  # biases start at zero
        nn.init.normal_(parameter)
    return attention


def given_to(attention: nn.MultiheadAttention, inputs: str, batched: bool = True) -> list[Tensor]:
    """Queries, keys and values, shaped as the attention wants them."""

    def one(length: int, width: int) -> Tensor:
        shape = (3, length, width) if attention.batch_first else (length, 3, width)
        shape = shape if batched else (length, width)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    keys = one(5, attention.kdim)
    if inputs == "self":
        return [keys] * 3
    return [one(2, E), keys, keys if inputs == "cross" else one(5, attention.vdim)]


@settings(max_examples=60)
@given(
    st.one_of(attentions(), attentions(kdim=3, vdim=2)),
    st.sampled_from(INPUTS),
    st.booleans(),
    st.fixed_dictionaries(
        {"need_weights": st.booleans(), "average_attn_weights": st.booleans()},
        optional={"mask": st.sampled_from(["bool", "float", "padding", "causal"])},
    ),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 99),
)
def test_values_and_gradients_stay(attention, inputs, batched, options, dropout, seed):
    torch.manual_seed(seed)
    separate = attention.in_proj_weight is None
    attention.dropout = dropout
    x = given_to(attention, "all" if separate else inputs, batched)
    queries, keys = (
        each.shape[-2 if attention.batch_first or not batched else 0] for each in x[:2]
    )
    mask = options.pop("mask", None)
    if mask in ("bool", "float", "causal"):
        blocked = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        floating = torch.zeros(queries, keys, dtype=torch.float64).masked_fill(blocked, -torch.inf)
        options["attn_mask"] = floating if mask == "float" else blocked
        options["is_causal"] = mask == "causal"
    elif mask == "padding":
        options["key_padding_mask"] = torch.arange(keys) == 4
        if batched:
            options["key_padding_mask"] = options["key_padding_mask"].expand(3, -1)
    layers = {each.weight: each for each in attention_layers(attention).values()}
    records = []
    torch.manual_seed(seed)
    expected, weights = attention(*x, **options)
    torch.manual_seed(seed)
    with HiddenApart(HiddenLayers(layers, records.append)):
        actual, same_weights = attention(*x, **options)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(same_weights, weights)
    assert actual.stride() == expected.stride()
    leaves = [*dict.fromkeys(x), *attention.parameters()]
    cotangent = torch.randn_like(actual)
    for one, other in zip(
        torch.autograd.grad(actual, leaves, cotangent, allow_unused=True),
        torch.autograd.grad(expected, leaves, cotangent, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert {id(call.layer) for call in records} == {id(layer) for layer in layers.values()}
    for call in records:
        layer = call.layer
        assert len(call.x) == len(call.output) == (3 if batched else 1)
        if not separate or layer.weight is attention.out_proj.weight:  # else a part of the bias
            torch.testing.assert_close(call.output, F.linear(call.x, layer.weight, layer.bias))


# ---- the same as linear layers ---------------------------------------------------------------


class Attention(nn.Module):
    """Attention of linear layers, with the weights of torch's."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        bias, out = attention.in_proj_bias is not None, attention.out_proj
        self.in_proj = nn.Linear(E, 3 * E, bias, dtype=torch.float64)
        self.out_proj = nn.Linear(E, E, bias, dtype=torch.float64)
        self.in_proj.weight.data = attention.in_proj_weight.detach().clone()
        self.out_proj.weight.data = out.weight.detach().clone()
        if bias:
            self.in_proj.bias.data = attention.in_proj_bias.detach().clone()
            self.out_proj.bias.data = out.bias.detach().clone()

    def forward(self, *inputs: Tensor) -> Tensor:
        whole = {id(x): self.in_proj(x) for x in dict.fromkeys(inputs)}
        parts = [whole[id(x)].chunk(3, -1)[part] for part, x in enumerate(inputs)]
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(*heads)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """One attention, torch's or that above, between linear layers."""

    def __init__(self, inputs: str = "self", batch_first: bool = True, bias: bool = True):
        super().__init__()
        self.inputs, self.batch_first = inputs, batch_first
        self.embed = nn.Linear(3, E, dtype=torch.float64)
        options = {"bias": bias, "batch_first": batch_first, "dtype": torch.float64}
        self.attention: nn.Module = nn.MultiheadAttention(E, HEADS, **options)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter)
        self.head = nn.Linear(E, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.embed(x).tanh()
        inputs = [keys] * 3
        if self.inputs != "self":
            values = keys if self.inputs == "cross" else keys.square()
            inputs = [keys[:, :2].sin(), keys, values]
        return self.head(self.attend(inputs).tanh().mean(1))

    def attend(self, inputs: list[Tensor]) -> Tensor:
        if not isinstance(self.attention, nn.MultiheadAttention):
            return self.attention(*inputs)
        if self.batch_first:
            return self.attention(*inputs)[0]
        turned = {id(x): x.transpose(0, 1) for x in inputs}
        return self.attention(*(turned[id(x)] for x in inputs))[0].transpose(0, 1)


def twins(**options: Any) -> tuple[Model, Model, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Model(**options)
    twin = copy.deepcopy(model)
    twin.attention = Attention(model.attention)
    x, y = torch.randn(5, 4, 3, dtype=torch.float64), torch.randint(2, (5,))
    torch.testing.assert_close(model(x), twin(x))
    return model, twin, x, y


MODELS = [
    {},
    {"batch_first": False},
    {"inputs": "cross"},
    {"inputs": "all", "bias": False},
    {"inputs": "cross", "batch_first": False},
]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_kfac_is_that_of_linear_layers(fisher, approximation, options):
    model, twin, x, y = twins(**options)
    loss_fn, kinds = nn.CrossEntropyLoss(), {"fisher": fisher, "approximation": approximation}
    expected = kfac_tn.compute_kfac(twin, loss_fn, [(x, y)], **kinds)
    actual = kfac_tn.compute_kfac(model, loss_fn, [(x, y)], **kinds)
    for name in ("attention.in_proj", "attention.out_proj"):
        for factor in ("input_factor", "grad_output_factor"):
            one = getattr(actual.blocks[name], factor)
            assert relative_error(one, getattr(expected.blocks[name], factor)) < TOLERANCE


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_oracle_6_ekfac_has_the_trace_of_the_ggn(options):
    model, _, x, y = twins(**options)
    ggn = dense_ggn(model, nn.CrossEntropyLoss(), x, y)
    for data in ([(x, y)], list(zip(x.split(2), y.split(2), strict=True))):
        ekfac = kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), data, fisher="type-2")
        assert len(ekfac.blocks) == 4  # none is differentiated alone
        assert relative_error(ekfac.trace(), ggn.trace()) < TOLERANCE


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 4, **options: Any) -> kfac_tn.KFAC:
    loss_fn = nn.CrossEntropyLoss()
    options = {"factor_interval": 2, "inverse_interval": 2, **options}
    optimizer = kfac_tn.KFAC(model, loss_fn, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return optimizer


CURVATURES: list[dict] = [
    {},
    {"approximation": "reduce"},
    {"curvature": "ekfac", "fisher": "type-2"},
    {"curvature": "diagonal", "fisher": "type-2"},
    {"fisher": "empirical"},
]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("kinds", CURVATURES, ids=str)
def test_steps_are_those_of_linear_layers(kinds, options):
    model, twin, x, y = twins(**options)
    before = copy.deepcopy(model.state_dict())
    for each in (model, twin):
        train(each, x, y, **kinds)
    own, others = model.attention, twin.attention
    pairs = [(own.in_proj_weight, others.in_proj.weight), (own.in_proj_bias, others.in_proj.bias)]
    pairs.append((own.out_proj.weight, others.out_proj.weight))
    for actual, expected in pairs:
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_separate_weights_have_blocks_and_their_packed_bias_has_none():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, HEADS, kdim=3, vdim=2, batch_first=True)

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = attention, nn.Linear(E, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x[..., :3], x[..., :2])[0].mean(1))

    model, x, y = Cross().double(), torch.randn(5, 4, E).double(), torch.randint(2, (5,))
    sizes = [parameter.numel() for parameter in model.parameters()]
    diagonals = dense_ggn(model, nn.CrossEntropyLoss(), x, y).diagonal().split(sizes)
    ekfac = kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), [(x, y)], fisher="type-2")
    for (name, _), diagonal in list(zip(model.named_parameters(), diagonals, strict=True))[:3]:
        block = ekfac.blocks[name.removesuffix("_weight")]
        assert relative_error(block.trace(), diagonal.sum()) < TOLERANCE
    treatments = {row.parameter: row.treatment for row in train(model, x, y).coverage()}
    assert {name for name, one in treatments.items() if one == "Adam"} == {"attention.in_proj_bias"}


# ---- ordinary training -----------------------------------------------------------------------


def test_every_weight_of_a_transformer_trains():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(7, 8)
            self.layers = nn.TransformerDecoder(layer, 2)
            self.head = nn.Linear(8, 7)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            hidden = self.layers(self.tokens(x), memory, tgt_mask=mask, tgt_is_causal=True)
            return self.head(hidden).flatten(0, 1)

    model, loss_fn = Translator(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn)
    treatments = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert {name for name, one in treatments.items() if one == "Adam"} == {
        name for name in treatments if ".norm" in name
    }
    x, memory = torch.randint(7, (6, 5)), torch.randn(6, 3, 8)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_fn(model(x[:, :-1], memory), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_checkpointing_and_autocast_change_nothing():
    for context in (torch.autocast("cpu", torch.bfloat16, enabled=False), torch.autocast("cpu")):
        results = []
        for attend in (Model.attend, _checkpointed):
            model, _, x, y = twins()
            with context:
                model.float().attend = attend.__get__(model)
                train(model, x.float(), y)
            results.append(model.state_dict())
        for one, other in zip(*(result.values() for result in results), strict=True):
            torch.testing.assert_close(one, other)


def _checkpointed(self: Model, inputs: list[Tensor]) -> Tensor:
    return checkpoint(lambda x: Model.attend(self, [x] * 3), inputs[0], use_reentrant=False)


def test_attention_is_as_it_was_after_errors_copies_and_closing():
    model, _, x, y = twins()
    optimizer = train(model, x, y, steps=1, factor_interval=1)
    with pytest.raises((RuntimeError, AssertionError)):
        model.attention(*[torch.randn(2, 3, E + 1, dtype=torch.float64)] * 3)
    assert torch.overrides._get_current_function_mode() is None
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(twin(x), model(x))
    train(twin, x, y)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model(x))
    optimizer.close()
    assert not model.attention._forward_pre_hooks
    assert not model.attention._forward_hooks


@pytest.mark.parametrize("how", ["zero_grad", "close"])
def test_an_interrupt_within_attention_leaves_nothing_behind(how, monkeypatch):
    """In a notebook, training goes on in the same process; no hook sees a KeyboardInterrupt."""
    model, _, x, y = twins()
    optimizer = train(model, x, y, steps=1, factor_interval=1)
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "softmax", interrupted)
        patched.setattr(nn.functional, "scaled_dot_product_attention", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(x)
    getattr(optimizer, how)()
    assert torch.overrides._get_current_function_mode() is None
    expected = model(x)
    assert torch.overrides._get_current_function_mode() is None
    torch.testing.assert_close(expected, model(x))


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_compiled_attention_trains_as_it_does_plain():
    model, _, x, y = twins()
    expected = copy.deepcopy(model)
    train(expected, x, y)
    compiled = torch.compile(model, backend="eager")
    loss_fn = nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, factor_interval=2, inverse_interval=2)
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn(compiled(x), y).backward()
        optimizer.step()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_layers_are_chosen_by_name():
    model, _, x, y = twins()
    kinds = dict.fromkeys(("embed", "attention.in_proj", "head"), "kfac")
    optimizer = train(model, x, y, curvature={**kinds, "attention.out_proj": "none"})
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert rows["attention.out_proj.weight"].treatment == "Adam"
    row = rows["attention.in_proj_weight"]
    assert (row.treatment, row.why) == ("KFAC-expand", "MultiheadAttention: factors 12 x 5")
