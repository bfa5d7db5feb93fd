"""KFAC's direction for another optimizer."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import kfac_tn

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def make_model(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv1d(4, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers).to(dtype)


def make_data(seed=0, n=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 4, 4, generator=generator).double()
    return x, torch.randint(3, (n,), generator=generator)


def make(model=None, **options):
    model = make_model() if model is None else model
    loss_fn = nn.CrossEntropyLoss()
    options = {"fisher": "type-2", "factor_interval": 1, "inverse_interval": 1, **options}
    return model, loss_fn, kfac_tn.KFACPreconditioner(model, loss_fn, **options)


def gradients(model, loss_fn, seed=0):
    model.zero_grad()
    x, y = make_data(seed)
    loss_fn(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


RULES = [
    {"step_rule": "graft"},
    {"step_rule": "fixed"},
    {"step_rule": "kl_clip", "kl_clip": 1e-4, "lr": 0.1},
    {"step_rule": "kl_clip", "kl_clip": 1e4, "lr": 0.1},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("relative", [True, False])
def test_gradients_are_solved_with_the_damped_curvature(rule, relative):
    model, loss_fn, preconditioner = make(
        damping=0.01, relative_damping=relative, noise_damping=0, **rule
    )
    before = gradients(model, loss_fn)
    assert preconditioner.step() is True
    expected = {}
    for name, factors in preconditioner.factors().items():
        weight, bias = before[f"{name}.weight"], before[f"{name}.bias"]
        matrix = torch.cat([weight.flatten(1), bias.unsqueeze(1)], dim=1)
        rows = []
        groups = len(factors.input)
        for a, b, part in zip(
            factors.input, factors.grad_output, matrix.chunk(groups), strict=True
        ):
            mean_a, mean_b = a.trace() / len(a), b.trace() / len(b)
            pi = (mean_a / mean_b).sqrt()
            shift_a, shift_b = (0.1 * mean_a, 0.1 * mean_b) if relative else (0.1 * pi, 0.1 / pi)
            damped_a = a + shift_a * torch.eye(len(a)).double()
            damped_b = b + shift_b * torch.eye(len(b)).double()
            rows.append(damped_b.inverse() @ part @ damped_a.inverse())
        d = torch.cat(rows)
        expected[f"{name}.weight"] = d[:, :-1].reshape(weight.shape)
        expected[f"{name}.bias"] = d[:, -1]
    if rule["step_rule"] == "graft":
        expected = {n: d / d.norm() * before[n].norm() for n, d in expected.items()}
    elif rule["step_rule"] == "kl_clip":
        change = 0.1**2 * sum(float((d * before[n]).sum()) for n, d in expected.items())
        expected = {n: d * min(1.0, (rule["kl_clip"] / change) ** 0.5) for n, d in expected.items()}
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12)
        else:  # no Kronecker structure
            assert torch.equal(parameter.grad, before[name])


def test_grafted_gradients_keep_their_norms_and_sgd_trains():
    model, loss_fn, preconditioner = make()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    x, y = make_data()
    for _ in range(15):
        sgd.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        norms = [p.grad.norm() for p in model.parameters()]
        preconditioner.step()
        torch.testing.assert_close([p.grad.norm() for p in model.parameters()], norms)
        sgd.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_gradient_scaling_may_be_on(scale):
    """The map is linear in the gradient, and the factors don't know the scale."""
    model, loss_fn, preconditioner = make()
    twin, twin_loss, twin_preconditioner = make()
    gradients(model, loss_fn)
    twin.zero_grad()
    x, y = make_data()
    (scale * twin_loss(twin(x), y)).backward()
    preconditioner.step()
    twin_preconditioner.step()
    for ours, scaled in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(scaled.grad, scale * ours.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_are_left_as_they_are(bad):
    model, loss_fn, preconditioner = make()
    gradients(model, loss_fn)
    preconditioner.step()
    kept = {
        n: (f.input.clone(), f.grad_output.clone()) for n, f in preconditioner.factors().items()
    }
    gradients(model, loss_fn, seed=1)
    model[1].weight.grad[0] = bad
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="skip its step"):
        assert preconditioner.step() is False
    assert preconditioner.step() is False  # any further warning is an error here
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad.nan_to_num(7.0), old.nan_to_num(7.0))
    for name, factors in preconditioner.factors().items():
        assert torch.equal(factors.input, kept[name][0])
        assert torch.equal(factors.grad_output, kept[name][1])


def test_no_gradients_no_step():
    model, _, preconditioner = make()
    assert preconditioner.step() is True
    assert preconditioner.factors() == {}
    assert all(p.grad is None for p in model.parameters())


def test_sparse_gradients_of_embeddings_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    model, loss_fn, preconditioner = make(model)
    x, y = torch.tensor([0, 1]), torch.tensor([0, 1])
    loss_fn(model(x), y).backward()
    before = model[0].weight.grad.to_dense().clone(), model[1].weight.grad.clone()
    assert preconditioner.step()
    assert model[0].weight.grad.is_sparse
    assert torch.equal(model[0].weight.grad.to_dense(), before[0])
    assert not torch.equal(model[1].weight.grad, before[1])


def test_layers_with_part_of_their_gradients_keep_these():
    model, loss_fn, preconditioner = make()
    before = gradients(model, loss_fn)
    model[3].bias.grad = None
    with pytest.warns(RuntimeWarning, match=r"'3' only \['3.weight'\] has a gradient"):
        preconditioner.step()
    assert torch.equal(model[3].weight.grad, before["3.weight"])
    assert not torch.equal(model[0].weight.grad, before["0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_rule": "kl_clip"}, "needs lr"),
        ({"step_rule": "graft", "lr": 0.1}, "take none"),
        ({"step_rule": "newton"}, "'newton'"),
        ({"kl_clip": -1.0}, "kl_clip is -1.0"),
        ({"kl_clip": 1.0}, "kl_clip=1.0 is for step_rule='kl_clip', but step_rule is 'graft'"),
        ({"overhead": 1.0}, "overhead=1.0 is for factor_interval='auto'"),
        ({"mc_samples": 2}, "mc_samples=2 is for fisher='mc'"),
        ({"step_rule": "kl_clip", "lr": True}, "lr is True"),
        ({"damping": True}, "damping is True"),
        ({"step_rule": "kl_clip", "lr": -1.0}, "lr is -1.0"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"factor_decay": 2.0}, "factor_decay is 2.0"),
        ({"factor_interval": 0}, "factor_interval is 0"),
        ({"fisher": "exact"}, "'exact'"),
    ],
    ids=str,
)
def test_hyper_parameters_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_a_run_continues_from_a_checkpoint_bit_for_bit(fisher):
    options = {"fisher": fisher, "factor_interval": 3, "inverse_interval": 4}

    def train(model, loss_fn, preconditioner, steps):
        for step in steps:
            gradients(model, loss_fn, seed=step)
            preconditioner.step()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.05 * p.grad)

    model, loss_fn, preconditioner = make(**options)
    train(model, loss_fn, preconditioner, range(8))
    first, loss_fn, preconditioner = make(**options)
    train(first, loss_fn, preconditioner, range(5))
    file = io.BytesIO()
    torch.save([first.state_dict(), preconditioner.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second, loss_fn, preconditioner = make(seed=9, **options)
    second.load_state_dict(weights)
    preconditioner.load_state_dict(state)
    train(second, loss_fn, preconditioner, range(5, 8))
    for one, other in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_models_state_is_refused():
    _, _, preconditioner = make()
    other, loss_fn, others = make(nn.Linear(4, 3).double())
    loss_fn(other(torch.rand(2, 4).double()), torch.tensor([0, 1])).backward()
    others.step()
    with pytest.raises(ValueError, match="unknown here"):
        preconditioner.load_state_dict(others.state_dict())


def test_an_optimizers_state_is_refused_and_nothing_changed():
    model, loss_fn, preconditioner = make()
    x, y = make_data()
    loss_fn(model(x), y).backward()
    preconditioner.step()
    optimizer = kfac_tn.KFAC(model, loss_fn)
    for state in (optimizer.state_dict(), optimizer.state_dict()["curvature"]):
        with pytest.raises(ValueError, match="isn't one of KFACPreconditioner"):
            preconditioner.load_state_dict(state)
    assert preconditioner.steps_taken == 1


def test_coverage_and_repr():
    _, _, preconditioner = make()
    treatments = {row.parameter: row.treatment for row in preconditioner.coverage()}
    assert treatments["0.weight"] == "KFAC-expand"
    assert treatments["1.weight"] == "gradient as it is"
    assert repr(preconditioner.coverage()) in repr(preconditioner)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("damping", -1.0, "damping is -1.0"),
        ("damping", "small", "damping is 'small'"),
        ("lr", float("nan"), "lr is nan"),
        ("lr", -1.0, "lr is -1.0"),
        ("lr", None, "needs lr"),
    ],
)
def test_what_is_set_out_of_range_is_refused_before_anything_is_changed(name, value, message):
    model, loss_fn, preconditioner = make(step_rule="kl_clip", lr=0.1)
    expected, good = gradients(model, loss_fn), getattr(preconditioner, name)
    setattr(preconditioner, name, value)
    with pytest.raises(ValueError, match=message):
        preconditioner.step()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
    assert preconditioner.steps_taken == 0
    setattr(preconditioner, name, good)
    preconditioner.step()
    assert preconditioner.factors()


def test_observe_and_close():
    model, loss_fn, preconditioner = make()
    expected = gradients(model, loss_fn)
    preconditioner.step()
    expected = [p.grad.clone() for p in model.parameters()]
    twin, _, preconditioner = make()
    x, y = make_data()
    output = twin(x)
    preconditioner.observe(output, y)
    nn.functional.cross_entropy(output, y).backward()
    preconditioner.step()
    assert all(
        torch.equal(p.grad, other) for p, other in zip(twin.parameters(), expected, strict=True)
    )
    preconditioner.close()
    assert not any(m._forward_hooks for m in twin.modules())


@pytest.mark.parametrize("rule", RULES[:3], ids=str)
def test_which_rules_are_linear_in_scaled_gradients(rule):
    """Those that are may run before GradScaler unscales; the KL limit may not, as documented."""
    results = []
    for scale in (1.0, 1024.0):
        model, loss_fn, preconditioner = make(damping=0.01, **rule)
        x, y = make_data(0)
        (scale * loss_fn(model(x), y)).backward()
        assert preconditioner.step() is True
        results.append(torch.cat([p.grad.flatten() / scale for p in model.parameters()]))
    linear = rule["step_rule"] != "kl_clip"
    assert torch.allclose(*results, rtol=1e-10, atol=0) is linear
