"""The rules against their definitions."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn.optim.quadratic import QuadraticModel
from kfac_tn.optim.replay import Replay
from kfac_tn.optim.step_rules import Graft, TrustRegion, clip_kl, graft


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


def test_graft_keeps_directions_and_takes_norms():
    directions, references = tensors((2, 3), (4,)), tensors((2, 3), (4,), seed=1)
    kept = [direction.clone() for direction in directions]
    graft(directions, references)
    for direction, before, reference in zip(directions, kept, references, strict=True):
        torch.testing.assert_close(direction.norm(), reference.norm())
        expected = before / before.norm() * reference.norm()
        torch.testing.assert_close(direction, expected)


@pytest.mark.parametrize(
    ("direction", "reference", "expected"),
    [
        ([0.0, 0.0], [1.0, 0.0], [0.0, 0.0]),
        ([3.0, 4.0], [0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_graft_of_zeros_is_zero(direction, reference, expected):
    direction = torch.tensor(direction)
    graft([direction], [torch.tensor(reference)])
    assert direction.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_graft_in_every_precision(dtype):
    direction, reference = torch.full((4,), 1e-3, dtype=dtype), torch.ones(4, dtype=dtype)
    graft([direction], [reference])
    torch.testing.assert_close(direction, reference)


@pytest.mark.parametrize("limit", [1e-6, 1e-2, 1e6])
def test_clip_kl_has_the_limit_over_all_layers_together(limit):
    directions, gradients = tensors((2, 3), (4,)), tensors((2, 3), (4,))
    lrs = [0.1, 3.0]
    kept = [direction.clone() for direction in directions]

    def change():
        return sum(
            lr**2 * float((d * g).sum())
            for lr, d, g in zip(lrs, directions, gradients, strict=True)
        )

    before = change()
    clip_kl(directions, gradients, lrs, limit)
    scale = min(1.0, (limit / before) ** 0.5)
    for direction, old in zip(directions, kept, strict=True):
        torch.testing.assert_close(direction, scale * old)


def test_clip_kl_of_zeros_and_of_nothing():
    direction = torch.zeros(3)
    clip_kl([direction], [torch.ones(3)], [1.0], limit=1e-3)
    assert direction.tolist() == [0.0, 0.0, 0.0]
    clip_kl([], [], [], limit=1e-3)
    graft([], [])


# The quadratic model, and the trust region -------------------------------------------------------


EAGER = {"factor_interval": 1, "inverse_interval": 1, "fisher": "type-2"}


class Noisy(nn.Module):
    """Dropout, batch normalization, a layer without Kronecker structure."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)).tanh()))


def batch(seed=0, n=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, generator=generator).double()
    return x, torch.randint(3, (n,), generator=generator)


def take_step(model, loss_fn, optimizer, seed=0, sizes=None, scaler=None):
    x, y = batch(seed)
    optimizer.zero_grad()
    for x_part, y_part in zip(x.split(sizes or len(x)), y.split(sizes or len(x)), strict=True):
        loss = loss_fn(model(x_part), y_part) * len(x_part) / len(x)
        (scaler.scale(loss) if scaler else loss).backward()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()


def dense_ggn(model, loss_fn, x, y, names):
    """The GGN over some parameters, from Jacobian and Hessian; random as the caller seeds."""
    state = torch.get_rng_state()
    parameters = {name: model.get_parameter(name).detach() for name in names}

    def outputs(parameters):
        torch.set_rng_state(state)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return torch.func.functional_call(model, {**buffers, **parameters}, (x,))

    jacobians = torch.func.jacrev(outputs)(parameters)
    z = outputs(parameters)
    jacobian = torch.cat([jacobians[n].reshape(z.numel(), -1) for n in names], dim=1)
    hessian = torch.func.hessian(lambda z: loss_fn(z, y))(z).reshape(z.numel(), z.numel())
    torch.set_rng_state(state)
    return jacobian.T @ hessian @ jacobian


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("forward_mode", [True, False])
def test_the_quadratic_model_is_minimized(momentum, relative, forward_mode):
    """Against the dense GGN: no other step in the span of direction and momentum is better."""
    model, loss_fn = Noisy(), nn.CrossEntropyLoss()
    rule = QuadraticModel(momentum=momentum, relative_norm=None)
    options = {**EAGER, "damping": 0.05, "relative_damping": relative}
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule, **options)
    optimizer._replay.forward_mode = forward_mode
    names = [n for n, _ in model.named_parameters() if "norm" not in n]
    previous = torch.zeros(sum(model.get_parameter(n).numel() for n in names)).double()
    for seed in range(3):
        x, y = batch(seed)
        before = {n: model.get_parameter(n).detach().clone() for n in names}
        copied = copy.deepcopy(model)
        torch.manual_seed(seed)
        ggn = dense_ggn(copied, loss_fn, x, y, names)
        loss_fn(copied(x), y).backward()
        gradient = torch.cat([copied.get_parameter(n).grad.flatten() for n in names])
        torch.manual_seed(seed)
        take_step(model, loss_fn, optimizer, seed)
        step = torch.cat([(model.get_parameter(n) - before[n]).flatten() for n in names]).detach()
        dampings, directions = [], {}
        for name, f in optimizer.factors().items():
            scale = f.input[0].diagonal().mean() * f.grad_output[0].diagonal().mean()
            value = 0.05 * (scale if relative else 1.0)
            layer = model.get_submodule(name)
            dampings += [value * torch.ones(layer.weight.numel() + layer.bias.numel())]
            a, b = f.input[0], f.grad_output[0]
            mean_a, mean_b = a.diagonal().mean(), b.diagonal().mean()
            pi = (mean_a / mean_b).sqrt()
            shift_a, shift_b = (mean_a, mean_b) if relative else (pi, 1 / pi)
            a = a + 0.05**0.5 * shift_a * torch.eye(len(a))
            b = b + 0.05**0.5 * shift_b * torch.eye(len(b))
            grads = [copied.get_parameter(f"{name}.{kind}").grad for kind in ("weight", "bias")]
            matrix = b.inverse() @ torch.cat([grads[0], grads[1][:, None]], 1) @ a.inverse()
            directions[f"{name}.weight"], directions[f"{name}.bias"] = matrix[:, :-1], matrix[:, -1]
        d = torch.cat([directions[n].flatten() for n in names])
        span = torch.stack([d, previous] if momentum and seed else [d], dim=1)
        damped = ggn + torch.cat(dampings).double().diag()
        coefficients = torch.linalg.solve(span.T @ damped @ span, -span.T @ gradient)
        torch.testing.assert_close(step, span @ coefficients, rtol=1e-6, atol=1e-9)
        previous = step


def test_a_linear_model_is_solved_in_one_step():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, 2).double(), nn.MSELoss()
    x, y = torch.rand(8, 3).double(), torch.rand(8, 2).double()
    rule = QuadraticModel(relative_norm=None)
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule, damping=1e-12, **EAGER)
    loss_fn(model(x), y).backward()
    optimizer.step()
    full = torch.cat([x, torch.ones(8, 1).double()], 1)
    solution = torch.linalg.lstsq(full, y).solution
    torch.testing.assert_close(model.weight, solution[:3].T, rtol=1e-4, atol=1e-5)
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("how", [{"sizes": [1, 3, 2]}, {"scaler": 1024.0}])
def test_micro_batches_and_scaled_gradients_change_nothing(how):
    results = []
    for options in ({}, how):
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), None
        loss_fn = nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, step_rule="quadratic", **EAGER)
        if "scaler" in options:
            options = {"scaler": torch.amp.GradScaler("cpu", init_scale=options["scaler"])}
        for seed in range(3):
            take_step(model, loss_fn, optimizer, seed, **options)
        results.append(model[0].weight)
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_coefficients_are_kept_between_computations_and_side_effects_are_none(monkeypatch):
    model, loss_fn = Noisy(), nn.CrossEntropyLoss()
    rule = QuadraticModel(interval=4)
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule, **EAGER)
    calls = []
    plain = Replay.gram

    def spy(self, *args):
        buffers = [buffer.clone() for buffer in model.buffers()]
        state = torch.get_rng_state()
        gradients = [p.grad.clone() for p in model.parameters()]
        result = plain(self, *args)
        calls.append(optimizer._estimator.steps - 1)
        assert torch.equal(state, torch.get_rng_state())
        assert all(map(torch.equal, buffers, model.buffers()))
        assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))
        return result

    monkeypatch.setattr(Replay, "gram", spy)
    for seed in range(30):
        take_step(model, loss_fn, optimizer, seed)
    assert calls[:3] == [0, 1, 2]
    assert calls[-2:] == [24, 28]


@pytest.mark.parametrize("cut", [1, 4])
def test_the_quadratic_model_continues_from_a_checkpoint(cut):
    def start():
        model, loss_fn = Noisy(), nn.CrossEntropyLoss()
        rule = QuadraticModel(interval=3)
        return model, loss_fn, kfac_tn.KFAC(model, loss_fn, step_rule=rule, factor_interval=2)

    model, loss_fn, optimizer = start()
    torch.manual_seed(3)
    for seed in range(cut):
        take_step(model, loss_fn, optimizer, seed)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    twin, twin_loss, twin_optimizer = start()
    twin.load_state_dict(states[0])
    twin_optimizer.load_state_dict(states[1])
    random = torch.get_rng_state()
    for run in ((model, loss_fn, optimizer), (twin, twin_loss, twin_optimizer)):
        torch.set_rng_state(random)
        for seed in range(cut, 8):
            take_step(*run, seed)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_compiled_models_have_a_quadratic_model_too():
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), None
        model, loss_fn = model.double(), nn.CrossEntropyLoss()
        call = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = kfac_tn.KFAC(call, loss_fn, step_rule="quadratic", **EAGER)
        for seed in range(3):
            take_step(call, loss_fn, optimizer, seed)
        results.append(model[0].weight)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["graft", "fixed", "kl_clip", "quadratic"])
def test_the_trust_region_keeps_its_limit(rule):
    """Of lr^2 d^T F d, with the damped F that made d; where the limit is far, nothing changes."""
    steps, changes = {}, {}
    for limit in (None, 1e6, 1e-4):
        torch.manual_seed(0)
        model, loss_fn = nn.Linear(3, 3, bias=False).double(), nn.CrossEntropyLoss()
        chosen = QuadraticModel(relative_norm=None) if rule == "quadratic" else rule
        options = {**EAGER, "damping": 1e-9, "step_rule": chosen, "lr": 1.0, "kl_clip": 1.0}
        optimizer = kfac_tn.KFAC(model, loss_fn, trust_region=limit, **options)
        before = model.weight.detach().clone()
        take_step(model, loss_fn, optimizer)
        moved = (model.weight - before).detach()
        steps[limit] = moved
        (f,) = optimizer.factors().values()
        changes[limit] = float((f.grad_output[0] @ moved @ f.input[0] * moved).sum())
    assert torch.equal(steps[None], steps[1e6])
    assert changes[None] > 1e-4
    assert changes[1e-4] == pytest.approx(1e-4, rel=1e-3)
    torch.testing.assert_close(steps[1e-4] / steps[1e-4].norm(), steps[None] / steps[None].norm())


def test_a_trust_region_keeps_a_large_learning_rate_from_blowing_up():
    losses = {}
    x = torch.rand(16, 3, generator=torch.Generator().manual_seed(0)).double()
    y = (7 * x).sin()
    for limit in (None, 1e-2):
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), nn.MSELoss()
        options = {"step_rule": "fixed", "lr": 10.0, "trust_region": limit, **EAGER}
        optimizer = kfac_tn.KFAC(model.double(), loss_fn, **options)
        for _ in range(30):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        losses[limit] = float(loss.detach())
    assert losses[1e-2] < 0.4 < 10 < losses[None]


def test_grafting_to_sgd_takes_the_norm_of_the_averaged_gradient():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, 3).double(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.1, step_rule=Graft("sgd"), **EAGER)
    assert len(optimizer.param_groups) == 1
    before = model.weight.detach().clone()
    take_step(model, loss_fn, optimizer)
    torch.testing.assert_close((model.weight - before).norm(), 0.1 * model.weight.grad.norm())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuadraticModel(interval=0), "interval is 0"),
        (lambda: QuadraticModel(relative_norm=0.0), "relative_norm is 0.0"),
        (lambda: TrustRegion(0.0), "trust_region is 0.0"),
        (lambda: Graft("muon"), "'muon' is unknown"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
