"""A thousand steps with everything that goes wrong in practice."""

from __future__ import annotations

import io
import warnings
from statistics import median

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn.optim.damping_rules import LevenbergMarquardt
from kfac_tn.optim.quadratic import QuadraticModel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # they are what is asked for
STEPS = 1000


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(12, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)),
    )


def batch(step, generator):
    """Ordinary as a rule; now and then poisoned, tiny, zero, constant; or one example."""
    n = 1 if step % 5 == 3 else 8
    x = torch.randn(n, 2, 4, generator=generator)
    y = (x.sum((1, 2)) > 0).long() + (x[:, 0, 0] > 1).long()
    kind = (
        ("nan", "inf", "zero", "constant", "tiny", "overflow", "ignored")[step // 7 % 7]
        if step % 7 == 2
        else "ordinary"
    )
    if kind == "nan":
        x[0, 0, 0] = torch.nan
    elif kind == "inf":
        x[0, 0, 0] = -torch.inf
    elif kind == "overflow":
        x *= 1e30
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "zero":
        x.zero_()
    elif kind == "constant":
        x = x[:1].expand(8, -1, -1).clone()
        y = y[:1].expand(8).clone()
    elif kind == "ignored":
        y.fill_(-100)
    return x, y, kind


def tensors_of(model, optimizer):
    state = optimizer.state_dict()
    for entry in [*state["state"].values(), *state["curvature"]["factors"].values()]:
        yield from (value for value in entry.values() if torch.is_tensor(value))
    yield from model.parameters()


class Run:
    """One training run, that may be saved and continued."""

    def __init__(self, half, options):
        self.model, self.half, self.options = make_model().eval(), half, options
        self.loss_fn = nn.CrossEntropyLoss()
        made = {
            name: value() if isinstance(value, type) else value for name, value in options.items()
        }
        self.optimizer = kfac_tn.KFAC(self.model, self.loss_fn, **made)
        self.scaler = torch.amp.GradScaler("cpu", enabled=half, growth_interval=5)

    def step(self, step):
        x, y, kind = batch(step, torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=self.half):
            loss = self.loss_fn(self.model(x), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item() if kind == "ordinary" else None

    def saved_and_loaded(self):
        file = io.BytesIO()
        things = self.model, self.optimizer, self.scaler
        torch.save([thing.state_dict() for thing in things], file)
        file.seek(0)
        other = Run(self.half, self.options)
        states = torch.load(file, weights_only=True)
        for thing, state in zip((other.model, other.optimizer, other.scaler), states, strict=True):
            thing.load_state_dict(state)
        return other


RUNS = {
    "defaults": {},
    "reduce, dense": {"approximation": "reduce", "factor_interval": 2, "inverse_interval": 3},
    "absolute damping": {"relative_damping": False, "factor_interval": 5, "inverse_interval": 10},
    "empirical": {"fisher": "empirical", "factor_interval": 1, "inverse_interval": 5},
    "forward-only": {"fisher": "forward-only", "factor_interval": 1, "inverse_interval": 5},
    "small damping": {"damping": 1e-10, "factor_interval": 1, "inverse_interval": 2},
    "intervals by budget": {"factor_interval": "auto", "inverse_interval": "auto"},
    "Levenberg-Marquardt": {"damping": LevenbergMarquardt, "factor_interval": 5},
    "exact damping": {"damping_split": "exact", "factor_interval": 5, "inverse_interval": 5},
    "trust region": {"trust_region": 1e-4, "lr": 0.03},
    "quadratic model": {"step_rule": QuadraticModel, "damping": 0.1, "lr": 0.1},
    "KL clip": {"step_rule": "kl_clip", "lr": 0.02, "factor_interval": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16 autocast"])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_training_goes_on_through_poisoned_batches(half, options):
    run = Run(half, options)
    losses = []
    for step in range(STEPS):
        loss = run.step(step)
        losses += [] if loss is None else [loss]
        if step % 50 == 0:
            assert all(tensor.isfinite().all() for tensor in tensors_of(run.model, run.optimizer))
    assert all(tensor.isfinite().all() for tensor in tensors_of(run.model, run.optimizer))
    # Medians: every fifth batch is a single example, whose loss may be anything.
    assert median(losses[-100:]) < 0.7 * median(losses[:20])


@pytest.mark.parametrize("scale", [1e8, 1e16, 1e18, 1e19, 1e20, 1e30])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_huge_inputs_leave_everything_finite(scale, options):
    """Where squares overflow, or nearly so."""
    run = Run(False, options)
    for step in range(12):
        x, y, _ = batch(step, torch.Generator().manual_seed(step))
        run.optimizer.zero_grad()
        run.loss_fn(run.model(x * scale if step in (2, 5, 6) else x), y).backward()
        run.optimizer.step()
        assert all(tensor.isfinite().all() for tensor in tensors_of(run.model, run.optimizer))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "fp16 autocast"])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_it_continues_bit_for_bit_from_any_step(half, options):
    """Saved and loaded after every step, among poisoned batches: no other parameters."""
    straight = Run(half, options)
    cut = Run(half, options)
    for step in range(40):
        straight.step(step)
        cut.step(step)
        cut = cut.saved_and_loaded()
    for one, other in zip(
        tensors_of(straight.model, straight.optimizer),
        tensors_of(cut.model, cut.optimizer),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("step_2_is", ["nan", "inf", "zero_grad", "ignored"])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_batch_left_out_leaves_no_trace(step_2_is, options):
    """As if there had never been such a batch: the samples of the next ones are the same, too."""
    runs = [Run(False, options) for _ in range(2)]
    for step in range(12):
        x, y, _ = batch(0, torch.Generator().manual_seed(step))
        for run in runs:
            if step in (2, 5) and run is runs[1]:
                bad = x.clone()
                bad[0, 0, 0] = {"nan": torch.nan, "inf": torch.inf}.get(step_2_is, 0.0)
                run.optimizer.zero_grad()
                ignored = torch.full_like(y, -100) if step_2_is == "ignored" else y
                run.loss_fn(run.model(bad), ignored).backward()
                if step_2_is != "zero_grad":
                    run.optimizer.step()
            run.optimizer.zero_grad()
            run.loss_fn(run.model(x), y).backward()
            run.optimizer.step()
    first, second = (tensors_of(run.model, run.optimizer) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_warnings_come_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        run = Run(False, {})
        for step in range(130):
            run.step(step)
    messages = [str(warning.message) for warning in caught if "finite" in str(warning.message)]
    assert len(messages) == len(set(messages)) > 0
