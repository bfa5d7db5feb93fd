"""Recurrent layers and cells, against linear layers, autograd and the dense GGN."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import kfac_tn
from kfac_tn.hidden_watch import HiddenApart
from kfac_tn.layers.hidden import HiddenCall, HiddenLayers
from kfac_tn.layers.recurrent import recurrent_layers
from kfac_tn.testing import dense_ggn, diagonal_block, relative_error, trainable
from tests.layers.test_attention import CURVATURES

TOLERANCE = 1e-10
IN, HIDDEN, N, T = 2, 3, 4, 5
KINDS: dict[str, Any] = {
    "LSTM": nn.LSTM,
    "projected LSTM": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
CELLS: dict[str, Any] = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}
SMALL, LARGE = {}, {"num_layers": 2, "bidirectional": True}


def flat(values: Any) -> list[Tensor]:
    """The tensors of a nested output."""
    if isinstance(values, PackedSequence):
        return [values.data]
    return [values] if isinstance(values, Tensor) else [t for each in values for t in flat(each)]


# ---- values and gradients ----------------------------------------------------------------------


def check_same(module: nn.Module, args: Sequence[Any], examples: int) -> None:
    """Outputs and gradients with the layers apart are torch's, and calls those of linear layers."""
    layers, calls = recurrent_layers(module), list[HiddenCall]()
    torch.manual_seed(1)
    expected = flat(module(*args))
    with HiddenApart(HiddenLayers({each.weight: each for each in layers.values()}, calls.append)):
        torch.manual_seed(1)
        actual = flat(module(*args))
    leaves = [x for x in flat(args) if x.requires_grad] + list(module.parameters())
    cotangents = [torch.randn_like(each) for each in expected]
    gradients = torch.autograd.grad(expected, leaves, cotangents)
    outputs = [call.output for call in calls]
    found = torch.autograd.grad(actual, [*leaves, *outputs], cotangents)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(found[: len(leaves)], gradients)
    assert {id(call.layer) for call in calls} == {id(layer) for layer in layers.values()}
    of_leaf = dict(zip(leaves, gradients, strict=True))
    for call, g in zip(calls, found[len(leaves) :], strict=True):
        assert len(call.x) == len(g) == examples
        rows = g.flatten(0, -2)
        torch.testing.assert_close(rows.T @ call.x.flatten(0, -2), of_leaf[call.layer.weight])
        if call.layer.bias is not None:
            torch.testing.assert_close(rows.sum(0), of_leaf[call.layer.bias])


def state_of(module: Any, *batch: int) -> Any:
    """Random initial states, as the module wants them."""
    count = module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or HIDDEN, HIDDEN][: 1 + isinstance(module, nn.LSTM)]
    h = [torch.randn(count, *batch, size).double().requires_grad_() for size in sizes]
    return tuple(h) if len(h) > 1 else h[0]


@pytest.mark.parametrize("batch", ["first", "second", "none", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_of_networks_stay(kind, batch):
    torch.manual_seed(0)
    shapes = [SMALL, LARGE, {**LARGE, "num_layers": 3, "dropout": 0.5}]
    for shape, bias, given in itertools.product(shapes, [True, False], [True, False]):
        module = KINDS[kind](IN, HIDDEN, bias=bias, batch_first=batch == "first", **shape).double()
        if batch == "packed":
            sequences = [torch.randn(length, IN).double() for length in (2, 5, 1, 2)]
            packed = pack_sequence(sequences, enforce_sorted=False)
            args, examples = [packed._replace(data=packed.data.requires_grad_())], 10
        else:
            size = {"first": (N, T, IN), "second": (T, N, IN), "none": (T, IN)}[batch]
            args, examples = [torch.randn(size).double().requires_grad_()], N
        if batch == "none":
            examples = 1
        if given:
            args.append(state_of(module, *(() if batch == "none" else (N,))))
        for training in {True, "dropout" not in shape}:
            check_same(module.train(training), args, examples)


@pytest.mark.parametrize("kind", CELLS)
def test_values_and_gradients_of_cells_stay(kind):
    torch.manual_seed(0)
    for bias, given, batch in itertools.product([True, False], [True, False], [(N,), ()]):
        cell = CELLS[kind](IN, HIDDEN, bias=bias).double()
        args: list[Any] = [torch.randn(*batch, IN).double().requires_grad_()]
        if given:
            h = [torch.randn(*batch, HIDDEN).double().requires_grad_() for _ in range(2)]
            args.append(tuple(h) if kind == "LSTM" else h[0])
        check_same(cell, args, N if batch else 1)


def test_cells_refuse_states_of_other_batches_as_torch_does():
    cell = nn.GRUCell(IN, HIDDEN)
    with HiddenApart(HiddenLayers({}, lambda call: None)), pytest.raises(RuntimeError, match="row"):
        cell(torch.randn(N, IN), torch.randn(1, HIDDEN))


# ---- the same as linear layers -----------------------------------------------------------------


class Loops(nn.Module):
    """A recurrent network of linear layers that are called time after time."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.lstm, self.gru = isinstance(module, nn.LSTM), isinstance(module, nn.GRU)
        self.act = getattr(torch, getattr(module, "nonlinearity", "tanh"))
        self.sizes = [module.proj_size or HIDDEN, HIDDEN]
        self.depth, self.ways = module.num_layers, ["", "_reverse"][: 1 + module.bidirectional]
        for name, layer in recurrent_layers(module).items():
            bias = layer.bias is not None
            linear = nn.Linear(*layer.weight.shape[::-1], bias, dtype=torch.float64)
            linear.load_state_dict(copy.deepcopy(layer.state_dict()))
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for layer in range(self.depth):
            ways = [self.one_way(x, f"_l{layer}{way}", bool(way)) for way in self.ways]
            x = torch.cat(ways, -1)
        return x, None

    def one_way(self, x: Tensor, name: str, back: bool) -> Tensor:
        h, c = (x.new_zeros(len(x), size) for size in self.sizes)
        from_x, outputs = getattr(self, f"ih{name}")(x), []
        for t in range(x.shape[1])[:: -1 if back else 1]:
            a, b = from_x[:, t], getattr(self, f"hh{name}")(h)
            if self.lstm:
                i, f, g, o = (a + b).split(HIDDEN, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif self.gru:
                (ar, az, an), (br, bz, bn) = a.split(HIDDEN, 1), b.split(HIDDEN, 1)
                new = torch.tanh(an + (ar + br).sigmoid() * bn)
                z = (az + bz).sigmoid()
                h = (1 - z) * new + z * h
            else:
                h = self.act(a + b)
            if hasattr(self, f"hr{name}"):
                h = getattr(self, f"hr{name}")(h)
            outputs.append(h)
        return torch.stack(outputs[:: -1 if back else 1], 1)


class Model(nn.Module):
    """A recurrent network, torch's or that above, between linear layers."""

    def __init__(self, kind: str = "LSTM", batch_first: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(3, IN)
        self.rnn = KINDS[kind](IN, HIDDEN, batch_first=batch_first, **options)
        width = self.rnn.proj_size or HIDDEN
        self.head = nn.Linear(width * (1 + self.rnn.bidirectional), 2)
        self.turned = not batch_first
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recur(self.embed(x).tanh()).tanh())

    def recur(self, x: Tensor) -> Tensor:
        """What is between the layers, of all times, is sequence-first where torch's default is."""
        if not self.turned or isinstance(self.rnn, Loops):
            return self.rnn(x)[0].mean(1)
        return self.rnn(x.transpose(0, 1))[0].mean(0)


def twins(**options: Any) -> tuple[Model, Model, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Model(**options)
    twin = copy.deepcopy(model)
    twin.rnn = Loops(model.rnn)
    x, y = torch.randn(N, T, 3).double(), torch.randint(2, (N,))
    torch.testing.assert_close(model(x), twin(x))
    return model, twin, x, y


MODELS: list[dict[str, Any]] = [
    {"kind": "LSTM"},
    {"kind": "projected LSTM", **LARGE},
    {"kind": "GRU", "batch_first": True},
    {"kind": "GRU", "bias": False, **LARGE},
    {"kind": "tanh", "bidirectional": True},
    {"kind": "relu", "num_layers": 2, "batch_first": True},
]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_kfac_is_that_of_linear_layers(fisher, approximation, options):
    model, twin, x, y = twins(**options)
    kinds: dict[str, Any] = {"fisher": fisher, "approximation": approximation}
    expected = kfac_tn.compute_kfac(twin, nn.CrossEntropyLoss(), [(x, y)], **kinds)
    actual = kfac_tn.compute_kfac(model, nn.CrossEntropyLoss(), [(x, y)], **kinds)
    assert actual.blocks.keys() == expected.blocks.keys()
    for name, block in actual.blocks.items():
        for factor in ("input_factor", "grad_output_factor"):
            one, other = getattr(block, factor), getattr(expected.blocks[name], factor)
            assert relative_error(one, other) < TOLERANCE


def start(model: nn.Module, **options: Any) -> tuple[kfac_tn.KFAC, nn.Module]:
    """An optimizer, and the loss that it is made of."""
    loss_fn = nn.CrossEntropyLoss()
    options = {"factor_interval": 2, "inverse_interval": 2, **options}
    return kfac_tn.KFAC(model, loss_fn, **options), loss_fn


def fit(
    optimizer: kfac_tn.KFAC, loss_fn: nn.Module, model: Any, x: Any, y: Tensor, steps: int = 4
) -> list[float]:
    """Train, and return the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(model: nn.Module, x: Any, y: Tensor, steps: int = 4, **options: Any) -> kfac_tn.KFAC:
    optimizer, loss_fn = start(model, **options)
    fit(optimizer, loss_fn, model, x, y, steps)
    return optimizer


@pytest.mark.parametrize("kinds", CURVATURES, ids=str)
def test_steps_are_those_of_linear_layers(kinds):
    for options in MODELS[1:3]:
        model, twin, x, y = twins(**options)
        before = copy.deepcopy(model.state_dict())
        for each in (model, twin):
            train(each, x, y, **kinds)
        for name, layer in recurrent_layers(model.rnn).items():
            for role, parameter in getattr(twin.rnn, name).named_parameters():
                actual = getattr(layer, role)
                torch.testing.assert_close(actual, parameter, rtol=1e-8, atol=1e-8)
        for name, value in model.state_dict().items():
            assert not torch.equal(value, before[name])


# ---- factors by autograd -----------------------------------------------------------------------


class Steps(nn.Module):
    """Cells as others use them: a loop of one's own."""

    def __init__(self, kind: str, outputs: int = 2, **options: Any) -> None:
        super().__init__()
        self.cell, self.head = CELLS[kind](IN, HIDDEN, **options), nn.Linear(HIDDEN, outputs)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for each in x.unbind(1):
            state = self.cell(each, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Packed(nn.Module):
    """A recurrent network on sequences of several lengths, and a layer on the last states."""

    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.rnn = KINDS[kind](IN, HIDDEN, **options)
        self.head = nn.Linear(self.rnn.proj_size or HIDDEN, 2)
        self.double()

    def forward(self, x: PackedSequence) -> Tensor:
        last = self.rnn(x)[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


def factors_by_loops(
    rnn: Any, head: nn.Linear, sequences: Sequence[Tensor], approximation: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B under a mean squared error, of each sequence alone, with a loop over its times."""
    loops, sums = Loops(rnn), dict[str, list[Any]]()
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, layer in loops.named_children():
        layer.register_forward_hook(
            lambda layer, args, y, name=name: calls.setdefault(name, []).append((args[0], y))
        )
    for x in sequences:
        calls.clear()
        output = head(loops(x.unsqueeze(0))[0][:, -1])[0]
        for name, pairs in calls.items():
            ys = [y for _, y in pairs]
            bias = getattr(loops, name).bias is not None
            rows = torch.cat([a.detach().reshape(-1, a.shape[-1]) for a, _ in pairs])
            rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1) if bias else rows
            columns = []
            for each in output:
                gradients = torch.autograd.grad(each, ys, retain_graph=True)
                scale = (2 / (len(sequences) * len(output))) ** 0.5
                columns.append(scale * torch.cat([g.reshape(-1, g.shape[-1]) for g in gradients]))
            if approximation == "reduce":
                rows, columns = rows.mean(0, True), [g.sum(0, True) for g in columns]
            one = sums.setdefault(name, [0, 0.0, 0.0])
            one[0] += len(rows)
            one[1] = one[1] + rows.T @ rows
            one[2] = one[2] + sum(g.T @ g for g in columns)
    return {name: (a / count, b) for name, (count, a, b) in sums.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("approximation", ["expand", "reduce", "packed"])
def test_factors_are_those_of_a_loop_by_autograd(kind, approximation):
    torch.manual_seed(0)
    packed = approximation == "packed"
    model = Packed(kind, num_layers=2)
    sequences = [
        torch.randn(length, IN).double() for length in ((2, 5, 1, 2) if packed else [T] * N)
    ]
    x = pack_sequence(sequences, enforce_sorted=False) if packed else torch.stack(sequences, 1)
    expected = factors_by_loops(
        model.rnn, model.head, sequences, "expand" if packed else approximation
    )
    kfac = kfac_tn.compute_kfac(
        model,
        nn.MSELoss(),
        [(x, torch.randn(N, 2).double())],
        approximation="expand" if packed else approximation,
        fisher="type-2",
        bias="joint",
        forward=lambda model, batch: (model(batch[0]), batch[1]),
    )
    assert kfac.blocks.keys() == {*(f"rnn.{name}" for name in expected), "head"}
    for name, (a, b) in expected.items():
        block = kfac.blocks[f"rnn.{name}"]
        assert relative_error(block.input_factor[0], a) < TOLERANCE
        assert relative_error(block.grad_output_factor[0], b) < TOLERANCE


# ---- the dense GGN -----------------------------------------------------------------------------


class Once(nn.Module):
    """One step from a state that isn't zero."""

    def __init__(self, kind: str, cell: bool) -> None:
        super().__init__()
        self.rnn = (CELLS if cell else KINDS)[kind](IN, HIDDEN)
        self.head, self.is_cell = nn.Linear(HIDDEN, 2), cell
        self.double()
        self.state = torch.randn(2, 1, HIDDEN).double()
        nn.init.constant_(next(p for n, p in self.named_parameters() if "bias" in n), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = tuple(self.state) if self.is_cell else tuple(self.state.unsqueeze(1))
        h = h if isinstance(self.rnn, nn.LSTM | nn.LSTMCell) else h[0]
        outputs = self.rnn(x, h) if self.is_cell else self.rnn(x.unsqueeze(0), h)[0][0]
        return self.head(outputs[0] if isinstance(outputs, tuple) else outputs)


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_one_step_of_one_example_has_the_exact_ggn(kind, cell):
    torch.manual_seed(0)
    model, loss_fn = Once(kind, cell), nn.CrossEntropyLoss()
    x, y = torch.randn(1, IN).double(), torch.tensor([1])
    ggn = dense_ggn(model, loss_fn, x, y)
    kfac = kfac_tn.compute_kfac(model, loss_fn, [(x, y)], fisher="type-2", bias="joint")
    for name, parameter in trainable(model).items():
        if parameter.dim() == 2:
            names = name, name.replace("weight", "bias")
            expected = diagonal_block(ggn, model, names)
            actual = diagonal_block(kfac.to_dense(), model, names)
            assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("model", [*MODELS, *CELLS], ids=str)
def test_oracle_6_ekfac_has_the_trace_of_the_ggn(model):
    torch.manual_seed(0)
    made = Steps(model) if isinstance(model, str) else Model(**model)
    x = torch.randn(N, T, IN if isinstance(model, str) else 3).double()
    y = torch.randint(2, (N,))
    ggn = dense_ggn(made, nn.CrossEntropyLoss(), x, y)
    for data in ([(x, y)], list(zip(x.split(2), y.split(2), strict=True))):
        ekfac = kfac_tn.compute_ekfac(made, nn.CrossEntropyLoss(), data, fisher="type-2")
        weights = [p for p in made.parameters() if p.dim() == 2]
        assert len(ekfac.blocks) == len(weights)  # none is differentiated alone
        assert relative_error(ekfac.trace(), ggn.trace()) < TOLERANCE


@pytest.mark.parametrize("compute", [kfac_tn.compute_kfac, kfac_tn.compute_ekfac])
def test_algebra(compute):
    torch.manual_seed(0)
    model, x, y = Model("projected LSTM"), torch.randn(N, T, 3).double(), torch.randint(2, (N,))
    curvature = compute(model, nn.CrossEntropyLoss(), [(x, y)], fisher="type-2")
    dense = curvature.to_dense()
    assert len(dense) == sum(p.numel() for p in model.parameters())
    v = torch.randn(len(dense)).double()
    torch.testing.assert_close(curvature @ v, dense @ v)
    damped = dense + 0.1 * torch.eye(len(dense)).double()
    torch.testing.assert_close(curvature.inverse(damping=0.1) @ v, torch.linalg.solve(damped, v))
    torch.testing.assert_close(curvature.logdet(damping=0.1), damped.logdet())
    if compute is kfac_tn.compute_kfac:
        block, names = curvature.blocks["rnn.hr_l0"], ("rnn.weight_hr_l0",)
        product = torch.kron(block.grad_output_factor[0], block.input_factor[0])
        torch.testing.assert_close(diagonal_block(dense, model, names), product)


@pytest.mark.parametrize("kind", CELLS)
def test_exact_diagonals_and_gradients_of_each_example(kind):
    torch.manual_seed(0)
    loss_fn, x, y = nn.CrossEntropyLoss(), torch.randn(N, T, IN).double(), torch.randint(2, (N,))
    models = [Steps(kind), nn.Sequential(Last(KINDS[kind](IN, HIDDEN)), nn.Linear(HIDDEN, 2))]
    for model in (each.double() for each in models):
        ggn = dense_ggn(model, loss_fn, x, y).diagonal()
        diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
        assert relative_error(torch.cat([d.flatten() for d in diagonal.values()]), ggn) < TOLERANCE
        gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
        for n in range(N):
            loss = loss_fn(model(x[n : n + 1]), y[n : n + 1]) / N
            expected = torch.autograd.grad(loss, list(model.parameters()))
            torch.testing.assert_close([g[n] for g in gradients.values()], list(expected))


class Last(nn.Module):
    """The last output of a sequence-first network."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.transpose(0, 1))[0][-1]


# ---- packed sequences --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"approximation": "reduce"}, {"curvature": "ekfac"}])
def test_packed_sequences_are_refused_where_examples_must_be_apart(options):
    model, x = Packed(), pack_sequence([torch.randn(n, IN).double() for n in (3, 2)])
    y = torch.randint(2, (2,))
    with pytest.raises(ValueError, match=r"rnn\.ih_l0.*PackedSequence.*expand"):
        train(model, x, y, steps=1, **options)


class Tagger(nn.Module):
    """One prediction for each position of packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(IN, IN), nn.GRU(IN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 2)
        self.double()

    def forward(self, x: PackedSequence) -> Tensor:
        return self.head(self.rnn(x._replace(data=self.embed(x.data)))[0].data)


def test_positions_that_meet_have_no_common_columns():
    torch.manual_seed(0)
    model, x = Tagger(), pack_sequence([torch.randn(n, IN).double() for n in (3, 2)])
    with pytest.raises(ValueError, match=r"several rows depend on the same positions.*'embed'"):
        train(model, x, torch.randint(2, (5,)), steps=1, fisher="type-2")
    optimizer = train(model, x, torch.randint(2, (5,)))
    assert set(optimizer.factors()) == {"embed", "rnn.ih_l0", "rnn.hh_l0", "head"}


# ---- ordinary training -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_every_weight_trains_and_curvature_pays(kind):
    """Whether the first and the last number of a sequence have one sign."""
    torch.manual_seed(0)
    x = torch.randn(64, 8, 1)
    y = (x[:, 0, 0] * x[:, -1, 0] > 0).long()
    start = nn.Sequential(Last(KINDS[kind](1, 8)), nn.Linear(8, 2))
    losses, loss_fn = {}, nn.CrossEntropyLoss()
    for curvature in ("kfac", "none"):
        model = copy.deepcopy(start)
        optimizer = kfac_tn.KFAC(model, loss_fn, curvature=curvature)
        losses[curvature] = fit(optimizer, loss_fn, model, x, y, 100)
        names = {row.parameter for row in optimizer.coverage() if row.treatment != "Adam"}
        assert names == (dict(model.named_parameters()).keys() if curvature == "kfac" else set())
    assert losses["kfac"][-1] < 0.5 * losses["none"][-1]


def test_checkpoints_continue_bit_for_bit():
    torch.manual_seed(0)
    model, x, y = Model(**LARGE), torch.randn(N, T, 3).double(), torch.randint(2, (N,))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, factor_interval=2)
    fit(optimizer, loss_fn, model, x, y, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    fit(optimizer, loss_fn, model, x, y, 4)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = Model(**LARGE)
    resumed = kfac_tn.KFAC(again, loss_fn, factor_interval=2)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    fit(resumed, loss_fn, again, x, y, 4)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_checkpointing_and_autocast_change_nothing(kind, autocast):
    if autocast and kind == "LSTM":
        pytest.skip("torch has an LSTM in bfloat16 on some processors only")
    for make in (lambda: Model(kind, bias=False), lambda: Steps(kind)):
        torch.manual_seed(0)
        model = make().float()
        plain, x = copy.deepcopy(model), torch.randn(N, T, 3 if isinstance(model, Model) else IN)
        y, forward = torch.randint(2, (N,)), model.forward
        model.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizers = [train(each, x, y) for each in (model, plain)]
        assert all(
            len(each.factors()) == sum(p.dim() == 2 for p in plain.parameters())
            for each in optimizers
        )
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compiled_models_train_as_they_do_plain(kind):
    for make in (lambda: Model(kind), lambda: Steps(kind)):
        torch.manual_seed(0)
        model = make()
        plain, x = copy.deepcopy(model), torch.randn(N, T, 3 if isinstance(model, Model) else IN)
        x, y = x.double(), torch.randint(2, (N,))
        train(plain, x, y)
        compiled = torch.compile(model, backend="eager")
        fit(*start(model), compiled, x, y)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_modules_are_as_they_were_after_errors_copies_and_closing():
    model, _, x, y = twins()
    optimizer = train(model, x, y, steps=1, factor_interval=1)
    with pytest.raises(RuntimeError):
        model.rnn(torch.randn(2, 3, IN + 1).double())
    assert torch.overrides._get_current_function_mode() is None
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(twin(x), model(x))
    train(twin, x, y)
    with torch.no_grad():
        assert torch.equal(model(x), model.eval()(x))
    optimizer.close()
    assert not model.rnn._forward_pre_hooks
    assert not model.rnn._forward_hooks


# ---- which weights have blocks -----------------------------------------------------------------


def _tied(model: Model) -> None:
    model.rnn.weight_hh_l1 = model.rnn.weight_hh_l0
    model.rnn.bias_hh_l1 = model.rnn.bias_hh_l0


def _frozen(model: Model) -> None:
    model.rnn.weight_hh_l0.requires_grad_(False)
    model.rnn.bias_ih_l1.requires_grad_(False)


class Mine(nn.LSTM):
    """Whatever it may compute."""


def _subclass(model: Model) -> None:
    model.rnn = Mine(IN, HIDDEN, num_layers=2).double()


ALL = {"embed", "head", "rnn.ih_l0", "rnn.hh_l0", "rnn.ih_l1", "rnn.hh_l1"}
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "tied": (_tied, ALL - {"rnn.hh_l1"}),
    "frozen": (_frozen, ALL - {"rnn.hh_l0"}),
    "subclass": (_subclass, {"embed", "head"}),
    "pruned": (
        lambda model: prune.random_unstructured(model.rnn, "weight_hh_l0", 0.5),
        ALL - {"rnn.hh_l0"},
    ),
    "weight norm": (
        lambda model: parametrizations.weight_norm(model.rnn, "weight_hh_l0"),
        {"embed", "head"},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_train_without_blocks(change):
    make, expected = CHANGES[change]
    model, _, x, y = twins(num_layers=2)
    make(model)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = train(model, x, y)
    assert set(optimizer.factors()) == expected
    assert dict(model.named_parameters()).keys() == {row.parameter for row in optimizer.coverage()}
    for name, parameter in trainable(model).items():
        assert not torch.equal(parameter, before[name])


def test_weights_pruned_later_lose_their_block():
    model, _, x, y = twins(num_layers=2)
    optimizer, loss_fn = start(model)
    fit(optimizer, loss_fn, model, x, y)
    prune.random_unstructured(model.rnn, "weight_hh_l0", 0.5)
    before = model.rnn.weight_hh_l0_orig.detach().clone()
    fit(optimizer, loss_fn, model, x, y)
    rows = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert rows["rnn.weight_hh_l0_orig"] == "Adam"
    assert set(optimizer.factors()) == ALL - {"rnn.hh_l0"}
    assert not torch.equal(model.rnn.weight_hh_l0_orig, before)


def test_a_recurrent_weight_that_is_also_used_otherwise_has_no_statistics():
    torch.manual_seed(0)

    class Penalized(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.rnn.weight_hh_l0.square().mean()

    model, x, y = Penalized(), torch.randn(N, T, 3).double(), torch.randint(2, (N,))
    kfac = kfac_tn.compute_kfac(Model(), nn.CrossEntropyLoss(), [(x, y)])
    assert "rnn.hh_l0" in kfac.blocks
    with pytest.warns(RuntimeWarning, match="'rnn.hh_l0' has a gradient, but no call of it"):
        optimizer = train(model, x, y)
    assert "rnn.hh_l0" not in optimizer.factors()
    assert "rnn.ih_l0" in optimizer.factors()
