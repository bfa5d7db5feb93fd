"""Diagnostics: against numbers computed by hand."""

from __future__ import annotations

import builtins
import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import kfac_tn
from kfac_tn.optim.adaptive import Adaptive
from kfac_tn.optim.diagnostics import log_diagnostics, plot_spectra

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def make_model():
    torch.manual_seed(0)
    layers = nn.Conv1d(4, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers).double()


def train(model, loss_fn, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(5, 4, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss_fn(model(x), torch.randint(3, (5,), generator=generator)).backward()
        optimizer.step()


RULES = [
    {},
    {"step_rule": "kl_clip", "lr": 0.1},
    {"step_rule": "fixed", "lr": 0.1},
    {"step_rule": "quadratic"},
    {"step_rule": "quadratic", "trust_region": 1e-6},
    {"trust_region": 1e-9},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("relative", [True, False])
def test_numbers_by_hand(rule, relative):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    options = {"factor_interval": 3, "inverse_interval": 5, "weight_decay": 0.0, **rule}
    optimizer = kfac_tn.KFAC(
        model, loss_fn, damping=0.04, relative_damping=relative, noise_damping=0, **options
    )
    train(model, loss_fn, optimizer, 28)
    before = copy.deepcopy(model)
    train(model, loss_fn, optimizer, 1, start=28)
    state = copy.deepcopy(optimizer.state_dict())
    snapshot = optimizer.diagnostics()
    assert snapshot.steps == optimizer.steps_taken == 29
    assert snapshot.intervals == (3, 5)
    assert set(snapshot.layers) == {"0", "3"}
    for name, layer in snapshot.layers.items():
        factors = optimizer.factors()[name]
        shares, conditions = [], {"input": [], "grad_output": []}
        forms = 0.0
        new, old = model.get_submodule(name), before.get_submodule(name)
        step = torch.cat([(new.weight - old.weight).flatten(1), (new.bias - old.bias)[:, None]], 1)
        moved = step.detach().chunk(len(factors.input))
        for a, b, part in zip(factors.input, factors.grad_output, moved, strict=True):
            means = a.diagonal().mean(), b.diagonal().mean()
            pi = (means[0] / means[1]).sqrt()
            shifts = (0.2 * means[0], 0.2 * means[1]) if relative else (0.2 * pi, 0.2 / pi)
            damped = [m + s * torch.eye(len(m)) for m, s in zip((a, b), shifts, strict=True)]
            for kind, matrix in zip(conditions, damped, strict=True):
                conditions[kind].append(torch.linalg.cond(matrix))
            whole = torch.kron(damped[1], damped[0]).trace()
            shares.append(1 - torch.kron(b, a).trace() / whole)
            forms += (b @ part @ a * part).sum() / 2
        assert layer.input_condition == pytest.approx(float(max(conditions["input"])))
        assert layer.grad_output_condition == pytest.approx(float(max(conditions["grad_output"])))
        assert layer.damping_share == pytest.approx(float(max(shares).detach()))
        assert layer.kl == pytest.approx(float(forms), rel=1e-6)
        assert layer.update_norm == pytest.approx(float(step.detach().norm()), rel=1e-6)
        size = torch.cat([new.weight.flatten(), new.bias]).norm()
        assert layer.relative_update_norm == pytest.approx(
            float((step.norm() / size).detach()), rel=1e-6
        )
        assert (layer.statistics_age, layer.inverses_age) == (1, 3)  # at steps 27 and 25
        numel = factors.input.numel() + factors.grad_output.numel()
        assert layer.memory == 2 * 8 * numel
    assert snapshot.memory == sum(layer.memory for layer in snapshot.layers.values())
    assert set(snapshot.seconds) == {"statistics", "averages and inverses", "products"}
    assert all(seconds > 0 for seconds in snapshot.seconds.values())
    text = str(snapshot).splitlines()
    assert [line.split()[0] for line in text] == ["layer", "0", "3", "29"]
    leaves, before = tree_leaves(optimizer.state_dict()), tree_leaves(state)
    assert all(
        torch.equal(one, other) if isinstance(one, Tensor) else one == other
        for one, other in zip(leaves, before, strict=True)
    )


def test_nothing_yet_and_no_effect_on_training():
    results = []
    for asked in (True, False):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn)
        if asked:
            assert optimizer.diagnostics().layers == {}
        for step in range(4):
            train(model, loss_fn, optimizer, 1, start=step)
            if asked:
                optimizer.diagnostics()
        results.append(list(model.parameters()))
    assert all(map(torch.equal, *results))


def test_ages_continue_from_a_checkpoint():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    rule = Adaptive(fresh=0.0)  # else a step is unknown where its gradient is
    optimizer = kfac_tn.KFAC(
        model, loss_fn, factor_interval=50, inverse_interval=50, step_rule=rule
    )
    train(model, loss_fn, optimizer, 12)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    rule = Adaptive(fresh=0.0)
    twin = kfac_tn.KFAC(copy.deepcopy(model), nn.CrossEntropyLoss(), step_rule=rule)
    twin.load_state_dict(torch.load(file, weights_only=True))
    ages = [(layer.statistics_age, layer.kl) for layer in optimizer.diagnostics().layers.values()]
    assert [(la.statistics_age, la.kl) for la in twin.diagnostics().layers.values()] == ages
    assert ages[0][0] > 0


def test_the_preconditioner_has_no_steps_of_its_own():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn)
    loss_fn(model(torch.rand(5, 4, 4).double()), torch.randint(3, (5,))).backward()
    preconditioner.step()
    snapshot = preconditioner.diagnostics()
    assert snapshot.layers["0"].kl is None
    assert snapshot.layers["0"].input_condition > 1
    assert "0/kl" not in snapshot.scalars()
    assert "None" not in str(snapshot)


def test_logging():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn)
    written = []
    handle = log_diagnostics(optimizer, lambda *each: written.append(each), every=3)
    train(model, loss_fn, optimizer, 7)
    assert sorted({step for _, _, step in written}) == [3, 6]
    assert {"0/kl", "3/update_norm", "seconds/products", "memory"} <= {tag for tag, _, _ in written}
    assert all(isinstance(value, int | float) for _, value, _ in written)
    handle.remove()
    count = len(written)
    train(model, loss_fn, optimizer, 3)
    assert len(written) == count
    with pytest.raises(ValueError, match="every is 0"):
        log_diagnostics(optimizer, print, every=0)


def test_pictures_of_spectra(tmp_path, monkeypatch):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn)
    with pytest.raises(ValueError, match="take a step first"):
        plot_spectra(optimizer)
    train(model, loss_fn, optimizer, 2)
    figure = plot_spectra(optimizer, str(tmp_path / "spectra.png"))
    assert (tmp_path / "spectra.png").stat().st_size > 0
    assert [axis.get_title() for axis in figure.axes] == ["0: A", "0: B", "3: A", "3: B"]
    factor = optimizer.factors()["3"].input[0]
    drawn = torch.as_tensor(figure.axes[2].lines[0].get_ydata())
    torch.testing.assert_close(drawn, torch.linalg.eigvalsh(factor).flip(0))
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_spectra(optimizer)
