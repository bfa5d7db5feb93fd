"""Factors that are computed when a step averages them: the same, for less memory until then."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn import statistics
from kfac_tn.factors import Pending
from kfac_tn.optim import Adaptive
from tests.test_capture import assert_same, factors, watch

NEVER, ALWAYS = 2**62, 1


class Model(nn.Module):
    """Convolutions of all kinds, one of them called twice; few positions, so inputs are small."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
        self.twice = nn.Conv2d(6, 6, 3, padding="same", groups=2, bias=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.down = nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return self.head(torch.tanh(self.down(self.up(h))).flatten(2).mT)


def setting(dtype=torch.float64):
    x = torch.rand(2, 4, 2, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Model().to(dtype), nn.MSELoss(), x, torch.zeros(2, 4, 3, dtype=dtype)


def one_pass(model, loss_fn, x, y):
    loss_fn(model(x), y).backward()


def micro_batches(model, loss_fn, x, y):
    for part, target in zip(x.split(1), y.split(1), strict=True):
        loss_fn(model(part), target).backward()


def two_losses(model, loss_fn, x, y):
    (loss_fn(model(x), y) + 2 * loss_fn(model(x + 1), y)).backward()


def overwritten(model, loss_fn, x, y):
    """Once gradients are there, a loader may put the next batch where this one was."""
    x = x.clone()
    loss_fn(model(x), y).backward()
    x.zero_()


def autocast(model, loss_fn, x, y):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
    loss_fn(outputs.to(y.dtype), y).backward()


USES = [one_pass, micro_batches, two_losses, overwritten, autocast]


def seen(use, least, monkeypatch, fisher="type-2", approximation="expand"):
    monkeypatch.setattr(statistics, "LARGE", least)
    model, loss_fn, x, y = setting()
    capture = watch(model, loss_fn, fisher, approximation)
    use(model, loss_fn, x, y)
    return factors(capture)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "mc", "forward-only"])
def test_the_same_factors(use, fisher, monkeypatch):
    if use is two_losses and fisher == "empirical":
        pytest.skip("refused")
    assert_same(seen(use, ALWAYS, monkeypatch, fisher), seen(use, NEVER, monkeypatch, fisher))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_small_factors_and_rows_are_not_kept_waiting(approximation, monkeypatch):
    for least, expected in ((ALWAYS, approximation == "expand"), (NEVER, False)):
        monkeypatch.setattr(statistics, "LARGE", least)
        model, loss_fn, x, y = setting()
        capture = watch(model, loss_fn, approximation=approximation)
        one_pass(model, loss_fn, x, y)
        taken = capture.take().factors
        pending = {b.name for b, each in taken.items() if isinstance(each._both[0], Pending)}
        # What is called twice is a sum by then, and the head has as many inputs as positions.
        assert ("first" in pending) == ("down" in pending) == expected
        assert not {"twice", "head"} & pending


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_training_is_the_same(curvature, monkeypatch):
    """With statistics in most steps, a checkpoint in between, and a batch that isn't finite."""
    trained = []
    for least in (ALWAYS, NEVER):
        monkeypatch.setattr(statistics, "LARGE", least)
        model, loss_fn, x, y = setting()
        optimizer = kfac_tn.KFAC(
            model, loss_fn, curvature=curvature, factor_interval=2, inverse_interval=3
        )
        for step in range(9):
            optimizer.zero_grad()
            loss_fn(model(x + step / 10), y).backward()
            optimizer.step()
            if step == 4:
                loss_fn(model(torch.full_like(x, torch.nan)), y).backward()
                with pytest.warns(RuntimeWarning, match="isn't finite"):
                    optimizer.step()
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = kfac_tn.KFAC(
                    model, loss_fn, curvature=curvature, factor_interval=2, inverse_interval=3
                )
                optimizer.load_state_dict(state)
        trained.append([p.detach().clone() for p in model.parameters()])
    for pending, written in zip(*trained, strict=True):
        torch.testing.assert_close(pending, written, rtol=1e-9, atol=1e-11)


def test_statistics_that_are_not_finite_leave_averages_as_they_were(monkeypatch):
    """The input overflows only when it is squared, and gradients stay finite."""
    monkeypatch.setattr(statistics, "LARGE", ALWAYS)
    model = nn.Sequential(nn.Conv1d(4, 2, 3, padding=1), nn.Flatten())
    loss_fn = nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, factor_interval=1)
    x, y = torch.rand(2, 4, 3), torch.zeros(2, 6)
    for scale in (1.0, 1e20):
        optimizer.zero_grad()
        outputs = model(x * scale) / scale
        before = {name: f.input.clone() for name, f in optimizer.factors().items()}
        loss_fn(outputs, y).backward()
        if scale == 1:
            optimizer.step()
        else:
            with pytest.warns(RuntimeWarning, match="curvature of a batch isn't finite"):
                optimizer.step()
    assert before
    for name, each in optimizer.factors().items():
        assert torch.equal(each.input, before[name])


def test_compute_kfac(monkeypatch):
    computed = []
    for least in (ALWAYS, NEVER):
        monkeypatch.setattr(statistics, "LARGE", least)
        model, loss_fn, x, y = setting()
        data = list(zip(x.split(1), y.split(1), strict=True))
        curvature = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2", bias="joint")
        computed.append(curvature.to_dense())
    torch.testing.assert_close(computed[0], computed[1], rtol=1e-10, atol=1e-13)


def test_memory(peak_bytes):
    """Of a step with statistics, without the averages: never more than one factor at a time."""
    channels, layers = 96, 6
    model = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)))
    loss_fn = nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, factor_interval=1, step_rule=Adaptive(horizon=0))
    x = torch.rand(2, channels, 2, 2)
    y = torch.zeros_like(x)

    def step():
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer._estimator._average()

    step()  # makes the averages
    optimizer._estimator.capture.armed = True
    factor = 4 * (9 * channels + 1) ** 2
    gradients = sum(4 * p.numel() for p in model.parameters())
    assert peak_bytes(step) < gradients + 2.5 * factor < layers * factor
