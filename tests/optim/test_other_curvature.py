"""Parameters without Kronecker structure, with the Fisher's diagonal for curvature."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn import testing

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

OTHERS = ("scale", "shift", "norm.weight", "norm.bias", "attention.in_proj_weight")


class Attention(nn.MultiheadAttention):
    """Of a type of its own, which may compute something else."""


class Net(nn.Module):
    """A scalar, a vector, a normalization and packed projections, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.shift = nn.Parameter(torch.randn(4))
        self.norm = nn.LayerNorm(4)
        self.attention = Attention(4, 2, bias=False, batch_first=True)
        self.attention.out_proj.weight.requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(x * self.scale + self.shift)
        return self.head(self.attention(x, x, x)[0].mean(1))


def make(**options):
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    options = {"factor_interval": 1, "inverse_interval": 1, "other_curvature": "diagonal"} | options
    return model, loss_fn, kfac_tn.KFAC(model, loss_fn, **options)


def data(seed=0, n=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def train(model, loss_fn, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x, y = data(step)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_its_mean_is_the_diagonal_of_the_dense_ggn():
    """Squared gradients of random columns: unbiased, with the error of a mean."""
    model, loss_fn, optimizer = make(lr=0.0, mc_samples=400, factor_decay=0.0)
    x, y = data()
    loss_fn(model(x), y).backward()
    optimizer.step()
    ggn = testing.dense_ggn(model, loss_fn, x, y)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    exact = dict(zip(names, ggn.diagonal().split(sizes), strict=True))
    state = optimizer.state_dict()["curvature"]["factors"]
    for name in OTHERS:
        estimate = state[name]["values"].flatten()
        # A square of a (nearly) normal number has the standard deviation sqrt(2) of its mean.
        error = (estimate - exact[name]).abs() / (2 / 400) ** 0.5
        assert (error <= 5 * exact[name] + 1e-12).all(), name


@pytest.mark.parametrize("relative", [True, False])
def test_directions_are_the_dense_formula(relative):
    damping = 0.1
    options = {"damping": damping, "relative_damping": relative, "betas": (0.0, 0.9), "lr": 0.3}
    model, loss_fn, optimizer = make(step_rule="fixed", **options)
    x, y = data()
    before = values(model)
    loss_fn(model(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    state = optimizer.state_dict()["curvature"]["factors"]
    for name in OTHERS:
        diagonal = state[name]["values"].view(gradients[name].shape)
        shift = damping * (diagonal.mean() if relative else 1)
        expected = before[name] - 0.3 * gradients[name] / (diagonal + shift)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rule", ["adaptive", "graft", "kl_clip", "fixed", "quadratic"])
def test_every_rule_trains_with_it(rule):
    options = {"lr": 0.03} if rule in ("kl_clip", "fixed") else {}
    model, loss_fn, optimizer = make(step_rule=rule, damping=0.1, **options)
    before, (x, y) = values(model), data(1)
    start = loss_fn(model(x), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    assert loss_fn(model(x), y).item() < 0.97 * start
    for name in OTHERS:
        assert not torch.equal(model.get_parameter(name), before[name])
    assert set(OTHERS) <= optimizer.diagnostics().layers.keys()


def test_coverage_says_so():
    rows = {row.parameter: row.treatment for row in make()[2].coverage()}
    assert {rows[name] for name in OTHERS} == {"diagonal"}
    rows = {row.parameter: row.treatment for row in make(other_curvature=None)[2].coverage()}
    assert {rows[name] for name in OTHERS} == {"Adam"}


@pytest.mark.parametrize("stop", [0, 3])
def test_continues_bit_for_bit(stop):
    model, loss_fn, optimizer = make(factor_interval=2)
    train(model, loss_fn, optimizer, stop)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    twin, _ = copied = copy.deepcopy((model, optimizer))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    loaded, loss, resumed = make(factor_interval=2)
    loaded.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(model, loss_fn, optimizer, 4, stop)
    train(loaded, loss, resumed, 4, stop)
    for name, value in values(model).items():
        assert torch.equal(value, values(loaded)[name]), name
    assert copied[1].param_groups[0]["params"][0] is next(twin.parameters())


def test_states_without_it_and_with_it_do_not_mix():
    model, loss_fn, optimizer = make()
    train(model, loss_fn, optimizer, 2)
    with pytest.raises(ValueError, match="unknown here"):
        make(other_curvature=None)[2].load_state_dict(optimizer.state_dict())


def test_hooks_of_parameters_see_the_users_pass_alone():
    """And don't change the diagonal."""
    states, calls = [], []
    for factor in (1.0, 100.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
        loss_fn = nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, other_curvature="diagonal")
        handle = model[1].weight.register_hook(lambda g, f=factor: (calls.append(f), f * g)[1])
        x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
        loss_fn(model(x), y).backward()
        optimizer.step()
        states.append(optimizer.state_dict()["curvature"]["factors"]["1.weight"]["values"])
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        handle.remove()
        loss_fn(model(x), y).backward()
    assert torch.equal(*states)
    assert calls == [1.0, 1.0, 100.0, 100.0]


def test_a_poisoned_batch_leaves_no_trace():
    model, loss_fn, optimizer = make()
    train(model, loss_fn, optimizer, 2)
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    x, y = data(9)
    optimizer.zero_grad()
    loss_fn(model(x.clone().index_fill_(0, torch.tensor(0), torch.nan)), y).backward()
    with pytest.warns(RuntimeWarning, match="isn't finite"):
        optimizer.step()
    for name, value in values(model).items():
        assert torch.equal(value, before[name])
    after = optimizer.state_dict()["curvature"]["factors"]
    for name in OTHERS:
        assert torch.equal(after[name]["values"], state["curvature"]["factors"][name]["values"])


def test_unfreezing_and_changing_dtype():
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    model.shift.requires_grad_(False)
    optimizer = kfac_tn.KFAC(model, loss_fn, factor_interval=1, other_curvature="diagonal")
    train(model, loss_fn, optimizer, 2)
    kept = optimizer.state_dict()["curvature"]["factors"]["scale"]["values"]
    model.shift.requires_grad_(True)
    optimizer.zero_grad()
    assert torch.equal(optimizer.state_dict()["curvature"]["factors"]["scale"]["values"], kept)
    train(model, loss_fn, optimizer, 1, start=2)
    assert "shift" in optimizer.state_dict()["curvature"]["factors"]
    model.float()
    x, y = data(5)
    optimizer.zero_grad()
    loss_fn(model(x.float()), y).backward()
    optimizer.step()
    state = optimizer.state_dict()["curvature"]["factors"]
    assert all(state[name]["values"].dtype == torch.float32 for name in OTHERS)


@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_what_is_frozen_later_stands_still_and_keeps_its_diagonal(fisher):
    model, loss_fn, optimizer = make(fisher=fisher)
    train(model, loss_fn, optimizer, 2)
    before = values(model)
    kept = optimizer.state_dict()["curvature"]["factors"]["shift"]["values"].clone()
    for name in ("scale", "shift", "norm.weight"):
        model.get_parameter(name).requires_grad_(False)
    train(model, loss_fn, optimizer, 2, start=2)
    after = values(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"norm.bias", "attention.in_proj_weight", "head.weight", "head.bias"}
    state = optimizer.state_dict()["curvature"]["factors"]
    assert torch.equal(state["shift"]["values"], kept)
    model.shift.requires_grad_(True)
    train(model, loss_fn, optimizer, 1, start=4)
    assert not torch.equal(model.shift, after["shift"])


@pytest.mark.parametrize("step_rule", ["adaptive", "fixed", "quadratic"])
def test_parameters_without_elements_change_nothing(step_rule):
    """As of an adapter of rank 0, or a head of no classes."""

    def run(parameters):
        torch.manual_seed(0)
        model, loss_fn = Net().double(), nn.CrossEntropyLoss()
        for name, parameter in parameters.items():
            model.register_parameter(name, parameter)
            model.register_forward_pre_hook(
                lambda module, args, p=parameter: (args[0] + p.double().sum(),)
            )
        optimizer = kfac_tn.KFAC(
            model, loss_fn, step_rule=step_rule, factor_interval=1, other_curvature="diagonal"
        )
        train(model, loss_fn, optimizer, 4)
        return values(model)

    plain, empty = run({}), run({"adapter": nn.Parameter(torch.empty(0, 4))})
    for name, value in plain.items():  # sums of one more zero may be rounded differently
        torch.testing.assert_close(empty[name], value, rtol=1e-12, atol=1e-15)


def test_preconditioner():
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(
        model, loss_fn, other_curvature="diagonal", step_rule="fixed", damping=0.1
    )
    x, y = data()
    loss_fn(model(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    preconditioner.step()
    for name in OTHERS:
        diagonal = preconditioner.state_dict()["factors"][name]["values"]
        diagonal = diagonal.view(gradients[name].shape)
        expected = gradients[name] / (diagonal + 0.1 * diagonal.mean())
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"other_curvature": "kfac"}, r"other_curvature is 'kfac': choose 'diagonal' or None"),
        ({"fisher": "empirical"}, "needs the extra backward passes of fisher='mc' or 'type-2'"),
        ({"fisher": "forward-only"}, "but fisher is 'forward-only'"),
    ],
)
def test_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_its_learning_rate_is_the_rules_own():
    assert [group["lr"] for group in make(step_rule="kl_clip", lr=0.1)[2].param_groups] == [0.1]
    groups = make(step_rule="kl_clip", lr=0.1, other_lr=0.02)[2].param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.02]
