"""Gradients of each example, and exact diagonals, of attention and recurrences: in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import kfac_tn
from kfac_tn.curvature.calls import Calls
from kfac_tn.hooks import uncompiled
from kfac_tn.testing import dense_ggn, relative_error, trainable
from tests.layers.test_recurrent import CELLS, HIDDEN, IN, Steps

E, HEADS = 4, 2
TOLERANCE = 1e-10
MiB = 2**20


@pytest.fixture(scope="module", autouse=True)
def apart():
    """Recurrences apart, however few examples there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfac_tn.curvature.recorder.STEPWISE", 0)
        patch.setattr("kfac_tn.curvature.recorder.FUSED", 0)
        yield


def by_loop(model: nn.Module, outputs: Tensor, column: Tensor) -> list[Tensor]:
    """The gradient of each example's output, by autograd, with all examples in the graph."""
    rows = []
    for n in range(len(outputs)):
        one = torch.zeros_like(column)
        one[n] = column[n]
        leaves = list(trainable(model).values())
        rows.append(
            torch.autograd.grad(
                outputs, leaves, one, True, allow_unused=True, materialize_grads=True
            )
        )
    return [torch.stack(each) for each in zip(*rows, strict=True)]


def check(
    model: nn.Module, x: Any, unknown: set[str] | None = None, tolerance: float = TOLERANCE
) -> None:
    """Both results, and which parameters (or modules) are differentiated example by example."""
    loss_fn, hooks = nn.CrossEntropyLoss(), _hooks(model)
    torch.manual_seed(5)
    outputs = model(x)
    torch.manual_seed(6)
    y = torch.rand(outputs.shape).to(outputs).softmax(1)
    predictions = outputs.detach().requires_grad_()
    (column,) = torch.autograd.grad(loss_fn(predictions, y), predictions)
    rows = by_loop(model, outputs, column)
    torch.manual_seed(5)
    gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    assert list(gradients) == list(trainable(model))
    for actual, expected in zip(gradients.values(), rows, strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).norm() <= tolerance * expected.norm() + 1e-14
    likelihood = kfac_tn.likelihood.likelihood_of(loss_fn)
    columns = likelihood.columns(outputs.detach(), y)
    squares = [by_loop(model, outputs, each) for each in columns]
    torch.manual_seed(5)
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
    for number, actual in enumerate(diagonal.values()):
        wanted = sum(each[number].square().sum(0) for each in squares)
        assert (actual - wanted).norm() <= tolerance * wanted.norm() + 1e-14
    if unknown is not None:
        torch.manual_seed(5)
        calls = Calls(model, (x, y))
        calls.verify()
        assert calls.unknown == unknown
    assert hooks == _hooks(model)
    assert torch.overrides._get_current_function_mode() is None


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- attention ---------------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention between linear layers: how it is called is data."""

    def __init__(self, inputs: str = "self", calls: str = "once", mask: str = "", **options: Any):
        super().__init__()
        self.inputs, self.calls, self.mask = inputs, calls, mask
        self.need_weights = options.pop("need_weights", True)
        self.embed, self.head = nn.Linear(3, E), nn.Linear(E, 3)
        self.attention: Any = nn.MultiheadAttention(E, HEADS, **options)
        self.double()
        for parameter in self.attention.parameters():  # biases start at zero
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.embed(x).tanh()
        if self.calls == "unbatched":
            mixed = torch.stack([self.attend(each, None) for each in keys])
        else:
            padding = x[..., 0] > 0.7
            padding[:, 0] = False
            mixed = self.attend(keys, padding)
            if self.calls == "twice":
                mixed = self.attend(mixed.sin(), None)
        return self.head(mixed.tanh().mean(1))

    def attend(self, keys: Tensor, padding: Tensor | None) -> Tensor:
        queries = values = keys
        if self.inputs != "self":
            queries = keys[..., :2, :].sin()
        if self.inputs == "all":
            values = keys.square()
        options: dict[str, Any] = {"need_weights": self.need_weights}
        if self.mask == "padding":
            options["key_padding_mask"] = padding
        elif self.mask:
            blocked = torch.ones(queries.shape[-2], keys.shape[-2], dtype=torch.bool).triu(1)
            floating = torch.zeros(blocked.shape).double().masked_fill(blocked, -torch.inf)
            options["attn_mask"] = floating if self.mask == "float" else blocked
        module = self.attention
        given = [queries, keys[..., : module.kdim], values[..., : module.vdim]]
        if self.inputs == "self" and module._qkv_same_embed_dim:
            given = [keys] * 3
        if module.batch_first or keys.dim() == 2:
            return module(*given, **options)[0]
        turned = {id(each): each.transpose(0, 1) for each in given}
        return module(*(turned[id(each)] for each in given), **options)[0].transpose(0, 1)


booleans = st.booleans()
ATTENDING = st.fixed_dictionaries(
    {
        "inputs": st.sampled_from(["self", "cross", "all"]),
        "calls": st.sampled_from(["once", "twice", "unbatched"]),
        "mask": st.sampled_from(["", "bool", "float", "padding"]),
        **dict.fromkeys(["bias", "add_bias_kv", "add_zero_attn", "batch_first"], booleans),
        "need_weights": booleans,
    },
    optional={"kdim": st.sampled_from([3]), "vdim": st.sampled_from([2])},
)


@settings(max_examples=25)
@given(ATTENDING, st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 3, 4]), booleans)
def test_attention(options, examples, length, training):
    torch.manual_seed(0)
    if options["calls"] == "twice" and options.keys() & {"kdim", "vdim"}:
        options["calls"] = "once"
    model = Attending(**options).train(training)
    unknown = {"attention.in_proj_bias"} if {"kdim", "vdim"} & options.keys() else set()
    unknown |= {"attention.bias_k", "attention.bias_v"} if options["add_bias_kv"] else set()
    if options["calls"] == "unbatched" and examples > 1:
        unknown = {name for name in trainable(model) if name.startswith("attention")}
    unknown &= trainable(model).keys()
    if length == 1 and options["inputs"] == "self" and not options["add_zero_attn"]:
        unknown = (
            None  # whether what is zero but for rounding is close to zero is rounding's choice
        )
    check(model, torch.randn(examples, length, 3).double(), unknown)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_per_example_gradients_are_those_of_vmap(bias, batch_first):
    torch.manual_seed(0)
    loss_fn = nn.CrossEntropyLoss()
    model = Attending(bias=bias, batch_first=batch_first, need_weights=True)
    x, y = torch.randn(5, 4, 3).double(), torch.randint(3, (5,))

    def loss(parameters, x, y):
        return loss_fn(functional_call(model, parameters, x[None]), y[None]) / 5

    expected = vmap(grad(loss), (None, 0, 0))(dict(model.named_parameters()), x, y)
    actual = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name])


def encoder(batch_first: bool = True, norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        E, HEADS, 5, 0.1, batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Encoder(nn.Module):
    """A transformer, with the first position for its output."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False):
        super().__init__()
        self.layers, self.head = encoder(batch_first, norm_first), nn.Linear(E, 3)
        self.batch_first = batch_first
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.head(self.layers(x)[:, 0])
        return self.head(self.layers(x.transpose(0, 1))[0])


@pytest.mark.parametrize("examples", [1, 4, 5])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoders_in_either_mode(norm_first, examples):
    """Dropout is no harm, where no example is called alone."""
    torch.manual_seed(0)
    model, x = Encoder(norm_first=norm_first), torch.randn(examples, 4, E).double()
    check(model.train(), x, set())
    check(model.eval(), x, set())


@pytest.mark.parametrize("examples", [2, 4, 5])
def test_what_is_between_sequence_first_layers_has_its_examples_elsewhere(examples):
    torch.manual_seed(0)
    model = Encoder(batch_first=False).eval()
    unknown = {name for name, _ in model.layers.named_parameters() if "self_attn" not in name}
    check(model, torch.randn(examples, 4, E).double(), {f"layers.{name}" for name in unknown})


def test_decoders():
    torch.manual_seed(0)

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.TransformerDecoderLayer(E, HEADS, 5, 0.0, batch_first=True)
            self.tokens, self.head = nn.Embedding(5, E), nn.Linear(E, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
            hidden = self.tokens(x)
            hidden = self.layers(hidden[:, :3], hidden, tgt_mask=mask, tgt_is_causal=True)
            return self.head(hidden.mean(1))

    check(Translator().double(), torch.randint(5, (4, 6)), set())


def test_masks_may_be_kept_elsewhere():
    """Of all examples: none is called alone."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)
            self.mask = torch.arange(3).expand(5, 3) > torch.tensor([[3], [1], [0], [2], [1]])
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, key_padding_mask=self.mask)[0].sum(1)

    torch.manual_seed(0)
    check(Masked(), torch.randn(5, 3, E).double(), set())


# ---- recurrences -------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "LSTM": nn.LSTM,
    "projected LSTM": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


class Recurrent(nn.Module):
    """A recurrent network between linear layers."""

    def __init__(self, kind: str = "LSTM", calls: str = "once", state: bool = False, **options):
        super().__init__()
        self.calls, self.state = calls, state
        self.rnn = KINDS[kind](IN, HIDDEN, **options)
        ways = 1 + self.rnn.bidirectional
        self.width = self.rnn.proj_size or HIDDEN
        self.embed, self.head = nn.Linear(3, IN), nn.Linear(self.width * ways, 3)
        self.count = ways * self.rnn.num_layers
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.calls == "unbatched":
            return self.head(torch.stack([self.recur(each) for each in x]))
        outputs = self.recur(x)
        return self.head(outputs + self.recur(x.sin()) if self.calls == "twice" else outputs)

    def recur(self, x: Tensor) -> Tensor:
        turned = x.dim() == 3 and not self.rnn.batch_first
        outputs, last = self.rnn(x.transpose(0, 1) if turned else x, self.first(x))
        outputs = outputs.transpose(0, 1) if turned else outputs
        state = last[0] if isinstance(last, tuple) else last
        return outputs.sin().mean(-2) + state.sum() * 0 + outputs[..., -1, :]

    def first(self, x: Tensor) -> Any:
        """The initial state, of the input."""
        if not self.state:
            return None
        start = x.sum(-1).mean(-1).expand(self.count, *x.shape[:-2]).unsqueeze(-1)
        h = start.sin().repeat(*(1,) * (start.dim() - 1), self.width)
        if not isinstance(self.rnn, nn.LSTM):
            return h
        return h, start.cos().repeat(*(1,) * (start.dim() - 1), HIDDEN)


RECURRENT = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(KINDS)),
        "calls": st.sampled_from(["once", "twice", "unbatched"]),
        **dict.fromkeys(["state", "bias", "batch_first", "bidirectional"], booleans),
        "num_layers": st.sampled_from([1, 2]),
    }
)


@settings(max_examples=25)
@given(RECURRENT, st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 3, 4]))
def test_recurrences(options, examples, length):
    torch.manual_seed(0)
    model = Recurrent(**options)
    unknown = set()
    if options["calls"] == "unbatched":
        unknown = {name for name in trainable(model) if name.startswith("rnn")}
    if length == 1 and not options["state"]:
        unknown = None  # weights of states that are zeros
    check(model, torch.randn(examples, length, 3).double(), unknown)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias):
    torch.manual_seed(0)
    for examples, length in itertools.product([1, 4, 5], [2, 4]):
        model = Steps(kind, outputs=3, bias=bias)
        check(model, torch.randn(examples, length, IN).double(), set())


def test_dropout_between_layers():
    torch.manual_seed(0)
    model = Recurrent(num_layers=2, dropout=0.5)
    check(model.train(), torch.randn(4, 5, 3).double(), set())


# ---- what is left to each example alone --------------------------------------------------------


class Packed(nn.Module):
    """Sequences of several lengths, which are part of the batch."""

    def __init__(self, lengths: list[int] | None = None) -> None:
        super().__init__()
        self.rnn, self.head, self.lengths = nn.GRU(IN, HIDDEN), nn.Linear(HIDDEN, 3), lengths
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, 0, 0].abs() * 3).long().clamp(1, x.shape[1])
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths[: len(x)])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        rows, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(rows.mean(1) * rows.shape[1] / lengths[:, None])


def test_packed_sequences():
    """Also where there are as many rows as examples."""
    torch.manual_seed(0)
    model = Packed()
    unknown = {name for name in trainable(model) if name.startswith("rnn")}
    check(model, torch.randn(5, 4, IN).double(), unknown)
    check(Packed([1] * 5), torch.randn(5, 4, IN).double(), unknown)


def lstm(**options: Any) -> Any:
    return Recurrent(num_layers=2, **options)


def _tied() -> nn.Module:
    model: Any = lstm()
    model.rnn.weight_hh_l1 = model.rnn.weight_hh_l0
    return model


def _tied_to_linear() -> nn.Module:
    model: Any = Attending()
    model.head = nn.Sequential(nn.Linear(E, E, bias=False), nn.Linear(E, 3)).double()
    model.head[0].weight = model.attention.out_proj.weight
    return model


def _frozen() -> nn.Module:
    model: Any = lstm()
    model.rnn.weight_hh_l0.requires_grad_(False)
    model.rnn.bias_ih_l1.requires_grad_(False)
    return model


def _pruned() -> nn.Module:
    model: Any = lstm()
    prune.random_unstructured(model.rnn, "weight_hh_l0", 0.5)
    return model


def _pruned_bias() -> nn.Module:
    model: Any = lstm()
    prune.random_unstructured(model.rnn, "bias_hh_l0", 0.5)
    return model


def _normalized() -> nn.Module:
    model: Any = lstm()
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    return model


class Mine(nn.LSTM):
    """Whatever it may compute."""


def _subclass() -> nn.Module:
    model: Any = Recurrent()
    model.rnn = Mine(IN, HIDDEN).double()
    return model


class Used(Attending):
    """A weight that is also used otherwise, and one by its name."""

    def forward(self, x: Tensor) -> Tensor:
        keys = self.embed(x)
        more = self.attention.out_proj(keys).mean(1) + F.linear(
            keys.mean(1), self.attention.in_proj_weight[:E]
        )
        return super().forward(x) + more[:, :3]


class Mapped(nn.Module):
    """Calls attention for each example, by a transform of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Attending(need_weights=True)

    def forward(self, x: Tensor) -> Tensor:
        return vmap(lambda each: self.model(each[None])[0])(x)


RNN = [f"rnn.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
LEFT: dict[str, tuple[Callable[[], nn.Module], set[str] | None]] = {
    "tied": (_tied, {"rnn.weight_hh_l0", "rnn.bias_hh_l0", "rnn.bias_hh_l1"}),
    "tied to a linear layer": (_tied_to_linear, {"head.0.weight", "attention.out_proj.bias"}),
    "frozen weight": (_frozen, {"rnn.bias_hh_l0"}),
    "pruned": (_pruned, {"rnn.weight_hh_l0_orig"}),
    "pruned bias": (_pruned_bias, {"rnn.bias_hh_l0_orig"}),
    "weight norm": (_normalized, None),
    "subclass": (_subclass, set(RNN)),
    "used otherwise": (
        Used,
        {f"attention.{name}" for name in ("in_proj_weight", "out_proj.weight", "out_proj.bias")},
    ),
    "mapped": (Mapped, None),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_differentiated_example_by_example(case):
    torch.manual_seed(0)
    make, unknown = LEFT[case]
    check(make(), torch.randn(4, 5, 3).double(), unknown)


class Loose(nn.Module):
    """Attention that is given another axis than that of the examples for their axis."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=turned)
        self.head = nn.Linear(E, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turned else x
        x = self.attention(x, x, x)[0]
        return self.head((x.transpose(0, 1) if self.turned else x).mean(1))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("length", [3, 4])
def test_attention_among_examples_is_refused(length, turned):
    torch.manual_seed(0)
    model, x = Loose(turned), torch.randn(4, length, E).double()
    y, loss_fn = torch.randint(3, (4,)), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="mixes examples"):
        kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    with pytest.raises(ValueError, match="mixes examples"):
        kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])


class Sorted(nn.Module):
    """A sequence-first network whose examples are sorted inside, by a number of theirs."""

    def __init__(self, way: str, kind: str, twice: bool = False) -> None:
        super().__init__()
        self.way, self.twice, self.head = way, twice, nn.Linear(E, 2)
        kinds = {"linear": nn.Linear, "attention": nn.MultiheadAttention, "recurrence": nn.GRU}
        self.inner: Any = kinds[kind](E, 1 if kind == "attention" else E)
        self.double()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, rank = batch
        order = rank.argsort()
        x = x.transpose(0, 1)
        y = self.moved(self.apply_to(self.moved(x, order)), order.argsort())
        if self.twice:
            y = y + self.apply_to(2 * x).tanh()
        return self.head(y.transpose(0, 1).tanh().mean(1))

    def apply_to(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, nn.Linear):
            return self.inner(x.transpose(0, 1).contiguous()).transpose(0, 1)
        return self.inner(x)[0] if isinstance(self.inner, nn.GRU) else self.inner(x, x, x)[0]

    def moved(self, x: Tensor, order: Tensor) -> Tensor:
        index = order[None, :, None].expand_as(x)
        ways = {
            "index": lambda: x[:, order],
            "both": lambda: x[torch.arange(len(x))[:, None], order],
            "mask": lambda: x[:, order][:, torch.ones(len(order), dtype=torch.bool)],
            "select": lambda: x.index_select(1, order),
            "gather": lambda: x.gather(1, index),
            "matmul": lambda: F.one_hot(order, len(order)).to(x) @ x,
            "rows": lambda: torch.stack([x[:, n] for n in order.tolist()], 1),
            "merged": lambda: (
                x.unflatten(2, (2, 2))
                .flatten(1, 2)[:, (2 * order[:, None] + torch.arange(2)).flatten()]
                .unflatten(1, (-1, 2))
                .flatten(2)
            ),
            "select merged": lambda: (
                x.unflatten(2, (2, 2))
                .flatten(1, 2)
                .index_select(1, (2 * order[:, None] + torch.arange(2)).flatten())
                .unflatten(1, (-1, 2))
                .flatten(2)
            ),
            "heads": lambda: x.unflatten(2, (2, 2))[:, order].flatten(2),
        }
        return ways[self.way]()


SORTED = ["index", "both", "mask", "select", "gather", "matmul", "rows", "merged", "heads"]
SORTED += ["select merged"]
ORDERS = st.integers(1, 6).flatmap(lambda n: st.permutations(range(n)))


@pytest.mark.parametrize("kind", ["linear", "attention", "recurrence"])
@pytest.mark.parametrize("way", SORTED)
@settings(max_examples=10)
@given(order=ORDERS, times=st.sampled_from([1, 2, 0]), twice=booleans)
def test_examples_that_are_sorted_inside(kind, way, order, times, twice):
    """Also where sequences are as long as there are examples, or so many times."""
    torch.manual_seed(0)
    model, rank, length = Sorted(way, kind, twice), torch.tensor(order), times * len(order) or 3
    x = torch.randn(len(order), length, E).double(), rank
    check(model, x)


# ---- contexts ----------------------------------------------------------------------------------


def _checkpointed(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    forward = twin.forward
    twin.forward = lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore
    return twin


MADE: dict[str, Callable[[], nn.Module]] = {
    "attention": Attending,
    "sequence first": lambda: Attending(batch_first=False, need_weights=False),
    "LSTM": lambda: Recurrent(bidirectional=True, bias=False),
    "GRU": lambda: Recurrent("GRU", batch_first=True),
    "cell": lambda: nn.Sequential(nn.Linear(3, IN), Steps("GRU", outputs=3)).double(),
}


@pytest.mark.parametrize("case", MADE)
def test_checkpointing(case):
    torch.manual_seed(0)
    check(_checkpointed(MADE[case]()), torch.randn(4, 5, 3).double(), set())


@pytest.mark.parametrize("case", ["attention", "sequence first", "GRU", "cell"])
def test_autocast(case):
    torch.manual_seed(0)
    model, x = MADE[case]().float(), torch.randn(4, 5, 3)
    y, loss_fn = torch.randint(3, (4,)), nn.CrossEntropyLoss()
    exact = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    squares = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
    with torch.autocast("cpu", torch.bfloat16):
        gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
        diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
    for name, expected in exact.items():
        assert relative_error(gradients[name], expected) < 0.05
        assert relative_error(diagonal[name], squares[name]) < 0.1


@pytest.mark.parametrize("case", MADE)
def test_other_hooks_see_nothing_of_it(case):
    """An optimizer's, of the same model."""
    torch.manual_seed(0)
    model, x, y = MADE[case](), torch.randn(4, 5, 3).double(), torch.randint(3, (4,))
    loss_fn = nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        optimizer = kfac_tn.KFAC(each, loss_fn, factor_interval=1)
        for _ in range(2):
            loss = loss_fn(each(x), y)
            if each is model:
                kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
                kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", ["attention", "GRU"])
def test_compiled_models(case):
    torch.manual_seed(0)
    model, x = MADE[case](), torch.randn(4, 5, 3).double()
    y, loss_fn = torch.randint(3, (4,)), nn.CrossEntropyLoss()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    actual = kfac_tn.compute_per_example_gradients(compiled, loss_fn, x, y)
    expected = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    for one, other in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(one, other)
    with uncompiled():
        calls = Calls(compiled, (x, y))
        calls.verify()
    assert calls.unknown == set()


def test_interrupts_leave_nothing_behind(monkeypatch):
    """Which call no hooks of modules."""

    def interrupt(*args):
        raise KeyboardInterrupt

    model, x = Attending(), torch.randn(4, 5, 3).double()
    before = _hooks(model)
    monkeypatch.setattr("kfac_tn.layers.attention._project", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kfac_tn.compute_per_example_gradients(model, nn.MSELoss(), x, x[:, 0])
    assert torch.overrides._get_current_function_mode() is None
    assert _hooks(model) == before


def test_several_batches():
    torch.manual_seed(0)
    for model in (Attending(), Recurrent()):
        x, y = torch.randn(7, 5, 3).double(), torch.randint(3, (7,))
        loss_fn = nn.CrossEntropyLoss()
        data = list(zip(x.split([1, 4, 2]), y.split([1, 4, 2]), strict=True))
        diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, data)
        expected = dense_ggn(model, loss_fn, x, y).diagonal()
        assert relative_error(torch.cat([d.flatten() for d in diagonal.values()]), expected) < 1e-10


def test_inputs_that_are_overwritten_are_refused():
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.rnn(x)[0][:, -1]
            x.mul_(2)
            return y

    x = torch.randn(4, 5, 3)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        kfac_tn.compute_per_example_gradients(Overwriting(), nn.MSELoss(), x, x[:, 0])


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "mc"])
@pytest.mark.parametrize("kind", ["attention", "LSTM"])
def test_peak_of_exact_diagonals(peak_bytes, kind, mode):
    """Besides a backward pass of linear layers apart, their inputs, and the result."""
    torch.manual_seed(0)
    width, examples, length, classes = 64, 16, 8, 10

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = (
                nn.MultiheadAttention(width, 4, batch_first=True)
                if kind == "attention"
                else nn.LSTM(width, width, batch_first=True)
            )
            self.head = nn.Linear(width, classes)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(*[x] * (3 if kind == "attention" else 1))[0]
            return self.head(y[:, 0])

    model, loss_fn = First(), nn.CrossEntropyLoss()
    x, y = torch.randn(examples, length, width), torch.randint(classes, (examples,))
    weights = sum(p.numel() for p in model.parameters()) * 4
    largest = max(p.numel() for p in model.parameters()) * 4

    def compute(max_memory: int | None) -> None:
        kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)], mode, max_memory=max_memory)

    def backward() -> None:
        calls = Calls(model, (x, y))
        with torch.no_grad():
            column = calls.outputs.softmax(1)
        calls.backward(column, lambda *_: None, list(model.parameters()))

    compute(None)
    besides = peak_bytes(backward) + 3 * weights + MiB // 16
    for limit in (4 * largest, 8 * largest):
        assert peak_bytes(lambda limit=limit: compute(limit)) <= besides + limit
    with pytest.raises(ValueError, match="max_memory=100 bytes is too little"):
        compute(100)


# ---- when it pays ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "examples", "times", "expected"),
    [
        (nn.GRU, 3, 5, False),
        (nn.GRU, 4, 50, True),
        (nn.LSTM, 23, 5, False),
        (nn.LSTM, 24, 5, True),
        (nn.LSTM, 30, 64, False),
        (nn.LSTM, 32, 64, True),
        (lambda *sizes: nn.LSTM(*sizes, proj_size=2), 4, 64, True),
        (lambda *sizes: nn.LSTM(*sizes).double(), 4, 64, True),
    ],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrences_of_few_examples_are_called_on_each(
    make, examples, times, expected, batch_first, monkeypatch
):
    monkeypatch.setattr("kfac_tn.curvature.recorder.STEPWISE", 4)
    monkeypatch.setattr("kfac_tn.curvature.recorder.FUSED", 24)
    rnn = make(4, 4)
    rnn.batch_first = batch_first

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, x: Tensor) -> Tensor:
            if batch_first:
                return self.rnn(x)[0].mean(1)
            return self.rnn(x.transpose(0, 1))[0].mean(0)

    calls = Calls(Model(), (torch.randn(examples, times, 4).to(rnn.weight_ih_l0), None))
    calls.verify()
    assert (calls.unknown == set()) is expected


def test_batches_are_treated_alike(monkeypatch):
    """As the first one is, unless that is empty: dropout in training mode allows no other way."""
    monkeypatch.setattr("kfac_tn.curvature.recorder.STEPWISE", 4)
    torch.manual_seed(0)
    model, loss_fn = Recurrent(num_layers=2, dropout=0.5).train(), nn.CrossEntropyLoss()
    x, y = torch.randn(7, 5, 3).double(), torch.randint(3, (7,))
    data = list(zip(x.split([0, 5, 2]), y.split([0, 5, 2]), strict=True))
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, data)
    assert all(each.isfinite().all() for each in diagonal.values())
    with pytest.raises(ValueError, match="random"):
        kfac_tn.compute_ggn_diagonal(model, loss_fn, data[2:])
