"""Damping rules: against their definitions, and against losses computed by hand."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfac_tn
from kfac_tn.optim.damping_rules import DampingSchedule, LevenbergMarquardt

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
EXACT = {"factor_interval": 1, "inverse_interval": 1, "fisher": "type-2", "factor_decay": 0.0}


class Spy(LevenbergMarquardt):
    """Remembers ratios."""

    def after_step(self, ratio, groups):
        self.ratios = [*getattr(self, "ratios", []), ratio]
        super().after_step(ratio, groups)


def data(seed=0, n=6, d_in=3, d_out=2):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(n, d_in + d_out, generator=generator, dtype=torch.float64)
    return draw[:, :d_in], draw[:, d_in:]


def step(model, loss_fn, optimizer, seed=0, scale=1.0, sizes=None, closure=False):
    x, y = data(seed)
    optimizer.zero_grad()
    if closure:

        def compute():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        optimizer.step(compute)
        return
    for x_part, y_part in zip(x.split(sizes or len(x)), y.split(sizes or len(x)), strict=True):
        share = len(x_part) / len(x) if loss_fn.reduction == "mean" else 1.0
        (loss_fn(model(x_part), y_part) * share * scale).backward()
    if scale != 1.0:
        for p in model.parameters():
            p.grad.div_(scale)
    optimizer.step()


@pytest.mark.parametrize("rule", ["fixed", "kl_clip", "graft"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("how", [{}, {"sizes": [1, 3, 2]}, {"scale": 1024.0}, {"closure": True}])
def test_the_quadratic_model_of_a_quadratic_loss_is_exact(rule, reduction, how):
    """One linear layer and a squared error: every ratio is 1, and damping falls."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, 2).double(), nn.MSELoss(reduction=reduction)
    damping = Spy(0.1, decay=0.5, interval=2)
    lr = 1e-3 if rule == "graft" else 0.1
    optimizer = kfac_tn.KFAC(model, loss_fn, lr=lr, damping=damping, step_rule=rule, **EXACT)
    for seed in range(4):
        step(model, loss_fn, optimizer, seed % 2, **how)
    torch.testing.assert_close(damping.ratios, [1.0, 1.0])
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.1 * 0.5**4)


class Noisy(nn.Module):
    """Dropout and batch normalization: randomness, and buffers that change in every call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)).tanh()))


def test_ratios_are_those_of_losses_computed_by_hand():
    model, loss_fn = Noisy(), nn.MSELoss()
    damping = Spy(0.1, interval=1)
    optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.02, damping=damping, step_rule="fixed", **EXACT)
    x, y = data()
    for seed in range(3):
        torch.manual_seed(seed)
        before = copy.deepcopy(model)
        step(model, loss_fn, optimizer)
        torch.manual_seed(seed)
        old_loss = loss_fn(before(x), y)
        old_loss.backward()
        after = copy.deepcopy(model)
        torch.manual_seed(seed)
        new_loss = loss_fn(after(x), y)
        linear, quadratic = 0.0, 0.0
        moved = {
            name: p.detach() - before.get_parameter(name).detach()
            for name, p in model.named_parameters()
        }
        for name, move in moved.items():
            linear += (before.get_parameter(name).grad * move).sum()
        for name, factors in optimizer.factors().items():
            move = torch.cat([moved[f"{name}.weight"], moved[f"{name}.bias"][:, None]], 1)
            dense = torch.kron(factors.grad_output[0], factors.input[0])
            quadratic += move.flatten() @ dense @ move.flatten() / 2
        expected = (new_loss - old_loss) / (linear + quadratic)
        torch.testing.assert_close(damping.ratios[-1], float(expected.detach()), rtol=1e-8, atol=0)


@pytest.mark.parametrize("damping", [LevenbergMarquardt(0.1, decay=0.9999999, interval=1), 0.1])
def test_nobody_notices_that_the_loss_is_computed_again(damping):
    """Random numbers, buffers, gradients and curvature are those of a run with fixed damping."""
    results = []
    for rule in (damping, 0.1):
        model, loss_fn = Noisy(), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, damping=rule, factor_interval=2)
        torch.manual_seed(1)
        for seed in range(5):
            step(model, loss_fn, optimizer, seed)
        results.append((torch.rand(3), dict(model.state_dict()), optimizer.factors()))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-5, atol=1e-6)
    for name, factors in results[0][2].items():
        torch.testing.assert_close(factors.input, results[1][2][name].input, rtol=1e-5, atol=1e-6)


def test_damping_rises_when_the_model_fails():
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.MSELoss()
    model.double()
    damping = Spy(1e-3, interval=1)
    optimizer = kfac_tn.KFAC(model, loss_fn, lr=50.0, damping=damping, step_rule="fixed", **EXACT)
    step(model, loss_fn, optimizer)
    assert damping.ratios[0] < 0.25
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-3 / 0.95)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.8, 0.5), (0.5, 1.0), (0.1, 2.0), (-3.0, 2.0), (float("nan"), 2.0)]
)
def test_levenberg_marquardt_by_its_definition(ratio, expected):
    groups = [{"damping": 1.0}, {"damping": 3.0}]
    LevenbergMarquardt(1.0, decay=0.5, interval=1).after_step(ratio, groups)
    assert [group["damping"] for group in groups] == [expected, 3 * expected]
    limited = LevenbergMarquardt(1.0, decay=0.1, interval=1, minimum=0.9, maximum=1.1)
    groups = [{"damping": 1.0}]
    limited.after_step(ratio, groups)
    assert 0.9 <= groups[0]["damping"] <= 1.1


def test_schedules_act_on_groups_that_have_no_damping_of_their_own():
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), nn.MSELoss()
    groups = [
        {"params": list(model[0].parameters()), "damping": 0.7},
        {"params": list(model[1].parameters())},
    ]
    optimizer = kfac_tn.KFAC(model, loss_fn, params=groups, damping=lambda step: 1 / (1 + step))
    for seed in range(3):
        step(model, loss_fn, optimizer, seed)
        dampings = [group["damping"] for group in optimizer.param_groups]
        assert dampings == [0.7, 1 / (1 + seed)]


def test_a_schedule_is_as_good_as_setting_the_damping():
    results = []
    for damping in (lambda step: 0.1 / (1 + step), 1.0):
        torch.manual_seed(0)
        model, loss_fn = nn.Linear(3, 2).double(), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, damping=damping, step_rule="fixed", **EXACT)
        for seed in range(3):
            if not callable(damping):
                optimizer.param_groups[0]["damping"] = 0.1 / (1 + seed)
            step(model, loss_fn, optimizer, seed)
        results.append(model.weight)
    assert torch.equal(*results)


def test_the_preconditioner_takes_schedules_but_measures_nothing():
    model, loss_fn = nn.Linear(3, 2).double(), nn.MSELoss()
    with pytest.raises(ValueError, match="doesn't take the steps"):
        kfac_tn.KFACPreconditioner(model, loss_fn, damping=LevenbergMarquardt())
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, damping=lambda s: 1 / (1 + s))
    x, y = data()
    for count in range(3):
        loss_fn(model(x), y).backward()
        preconditioner.step()
        assert preconditioner.damping == 1 / (1 + count)


@pytest.mark.parametrize("cut", [1, 4, 5])
def test_a_run_continues_from_a_checkpoint(cut):
    def start(damping):
        model, loss_fn = Noisy(), nn.MSELoss()
        rule = LevenbergMarquardt(damping, decay=0.5, interval=3)
        return model, loss_fn, kfac_tn.KFAC(model, loss_fn, damping=rule, step_rule="fixed")

    model, loss_fn, optimizer = start(0.1)
    torch.manual_seed(1)
    for seed in range(cut):
        step(model, loss_fn, optimizer, seed)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    random = torch.get_rng_state()
    twin, twin_loss, twin_optimizer = start(7.0)
    twin.load_state_dict(states[0])
    twin_optimizer.load_state_dict(states[1])
    copies = copy.deepcopy((model, loss_fn, optimizer))
    results = []
    for run in ((model, loss_fn, optimizer), (twin, twin_loss, twin_optimizer), copies):
        torch.set_rng_state(random)
        for seed in range(cut, 9):
            step(*run, seed)
        results.append((run[0].last.weight, run[2].param_groups[0]["damping"]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][0], results[2][0])
    assert results[0][1] == results[1][1] == results[2][1] != 0.1


def test_a_loss_that_cannot_be_computed_again_is_refused():
    model = nn.Linear(3, 2).double()
    rule = LevenbergMarquardt(interval=1)
    x, y = data()
    for loss_fn, message in (
        (nn.MSELoss(reduction="none"), "reduction 'mean' or 'sum'"),
        (kfac_tn.likelihood.likelihood_of(nn.MSELoss()), "needs a loss module"),
    ):
        with pytest.raises(ValueError, match=message):
            kfac_tn.KFAC(model, loss_fn, damping=rule)
        assert not model._forward_hooks
    loss_fn = nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, damping=rule)
    for attempt in (lambda: loss_fn(2 * model(x), y), lambda: F.mse_loss(model(x), y)):
        optimizer.zero_grad()
        output = attempt()
        if not loss_fn._forward_hooks:
            optimizer.observe(model(x), y)
        output.backward()
        before = model.weight.detach().clone()
        with pytest.raises(RuntimeError, match="can't be recorded"):
            optimizer.step()
        assert torch.equal(model.weight, before)
    optimizer.zero_grad()
    loss_fn(model(x).flatten(), y.flatten()).backward()  # another shape is fine
    optimizer.step()
    optimizer.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LevenbergMarquardt(0.0), "initial is 0.0"),
        (lambda: LevenbergMarquardt(maximum="large"), "maximum is 'large'"),
        (lambda: LevenbergMarquardt(1e-9), "initial damping is 1e-09"),
        (lambda: LevenbergMarquardt(0.1, decay=1.0), "decay is 1.0"),
        (lambda: LevenbergMarquardt(0.1, interval=0), "interval is 0"),
        (lambda: LevenbergMarquardt(0.1, interval=True), "interval is True"),
        (lambda: DampingSchedule(lambda step: -1.0), "damping is -1.0"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
