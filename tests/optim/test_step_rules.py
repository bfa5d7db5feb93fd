"""The rules against their definitions."""

from __future__ import annotations

import copy
import io
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kfac_tn
from kfac_tn.optim.adaptive import Adaptive
from kfac_tn.optim.damping_rules import LevenbergMarquardt
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
    options = {**EAGER, "damping": 0.05, "relative_damping": relative, "noise_damping": 0}
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
    assert optimizer._replay.forward_mode == forward_mode  # that it was possible


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


@pytest.mark.parametrize("lr", [0.0, 0.25])
def test_the_quadratic_model_sees_learning_rates_that_differ(lr):
    """The step is the best along the way that is really taken: there the slope has become 0."""
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), nn.MSELoss()
    model[0].requires_grad_(False)  # so that the loss is quadratic
    x, y = torch.rand(8, 3).double(), torch.rand(8, 2).double()
    optimizer = kfac_tn.KFAC(
        model,
        loss_fn,
        step_rule=QuadraticModel(relative_norm=None),
        damping=1e-9,
        params=[{"params": [model[1].bias]}, {"params": [model[1].weight], "lr": lr}],
        **EAGER,
    )
    for step in range(3):
        y = y.roll(step, 0)  # so that there is something left to do
        before = [p.detach().clone() for p in model[1].parameters()]
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        first = [p.grad for p in model[1].parameters()]
        optimizer.step()
        moves = [p.detach() - b for p, b in zip(model[1].parameters(), before, strict=True)]
        last = torch.autograd.grad(loss_fn(model(x), y), list(model[1].parameters()))
        slopes = [
            sum((g * v).sum() for g, v in zip(gradients, moves, strict=True))
            for gradients in (first, last)
        ]
        assert slopes[0] < 0
        assert abs(slopes[1]) < 1e-4 * abs(slopes[0])
        assert (moves[0].norm() == 0) == (lr == 0)


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


class Attention(nn.Module):
    """Attention by the kernel that torch chooses."""

    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(3, 12), nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = self.project(x.unflatten(0, (2, -1))).view(2, 1, -1, 3, 4).unbind(-2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(torch.cat([q, k, mixed], -1)).flatten(0, 2)


def test_attention_in_eval_mode_is_pushed_forward_too():
    """Torch computes it in another way where there is no graph, unless it is told not to."""
    steps = []
    for training in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
        model, loss_fn = model.double().train(training), nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, step_rule="quadratic", **EAGER)
        for _ in range(2):
            x, y = torch.rand(5, 2, 4).double(), torch.randint(3, (5,))
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        assert optimizer._replay.forward_mode
        steps.append(flat(p.detach() for p in model.parameters()))
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("forward_mode", [True, False])
def test_the_quadratic_model_of_attention(forward_mode):
    torch.manual_seed(0)
    model, loss_fn = Attention().double(), nn.CrossEntropyLoss()
    rule = QuadraticModel(relative_norm=None, momentum=False)
    options = EAGER | {"fisher": "mc"}  # of a sequence, whose rows meet
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule, damping=1e-9, **options)
    optimizer._replay.forward_mode = forward_mode
    names = [name for name, _ in model.named_parameters()]
    before = flat(p.detach().clone() for p in model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        ggn = dense_ggn(model, loss_fn, *batch(), names)  # which the hooks let be
    take_step(model, loss_fn, optimizer)
    step = flat(p.detach() for p in model.parameters()) - before
    slope = flat(p.grad for p in model.parameters()) @ step
    assert optimizer._replay.forward_mode == forward_mode
    assert float(-slope / (step @ ggn @ step)) == pytest.approx(1, rel=1e-4)  # its minimum


@pytest.mark.parametrize("rule", ["adaptive", "graft", "kl_clip", "fixed", "quadratic"])
def test_log_softmax_and_nll_train_as_cross_entropy(rule):
    """Though the loss itself has no curvature in what the model returns."""
    results = []
    for tail, loss_fn in (([], nn.CrossEntropyLoss()), ([nn.LogSoftmax(1)], nn.NLLLoss())):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), *tail).double()
        optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule, **EAGER)
        for seed in range(4):
            take_step(model, loss_fn, optimizer, seed)
        results.append(model[0].weight)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


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
        options = {**EAGER, "damping": 1e-9, "step_rule": chosen, "lr": 1.0}
        options |= {"kl_clip": 1.0} if rule == "kl_clip" else {}
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


class Watching(Adaptive):
    """Looks at the directions that it has multiplied."""

    def scale(self, proposal):
        scales = super().scale(proposal)
        self.seen = {p: d.clone() for p, d in proposal.directions.items()}
        return scales


@pytest.mark.parametrize("trust_region", [None, 1e-3])
def test_a_scale_of_ones_own_finds_directions_multiplied(trust_region):
    """Those of rules of ours may be multiplied later; the steps are the same."""
    steps = {}
    for rule in (Adaptive(), Watching()):
        model, loss_fn, lr = smooth(), nn.CrossEntropyLoss(), 1e-2
        optimizer = kfac_tn.KFAC(
            model, loss_fn, lr, step_rule=rule, trust_region=trust_region, **EAGER
        )
        for seed in range(3):
            before = {p: p.detach().clone() for p in model.parameters()}
            take_step(model, loss_fn, optimizer, seed)
            moved = [p.detach() - start for p, start in before.items()]
            steps.setdefault(seed, []).append(flat(moved))
            if isinstance(rule, Watching) and trust_region is None:
                torch.testing.assert_close(flat(moved), -lr * flat(rule.seen.values()))
    for ours, watched in steps.values():
        torch.testing.assert_close(ours, watched, rtol=1e-9, atol=1e-12)


# The adaptive rule ------------------------------------------------------------------------------


def smooth(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def spied(optimizer):
    """What preconditioning returned last: before a rule scales it."""
    seen, plain = {}, optimizer._estimator.precondition

    def spy(gradients):
        directions = plain(gradients)
        seen["directions"] = {p: d.clone() for p, d in directions.items()}
        seen["slopes"] = {p: gradients[p].clone() for p in directions}
        return directions

    optimizer._estimator.precondition = spy
    return seen


@pytest.mark.parametrize("horizon", [0.0, 0.9])
@pytest.mark.parametrize("lr", [1e-2, 3e-3])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("radius", [1e-3, 1.0, 1e9])
def test_steps_minimize_the_quadratic_model_within_the_trust_region(lr, spread, radius, horizon):
    """From the dense GGN: t = min(lr / 1e-2 * share * alpha, lr * radius * Adam's norm / |d|).

    More alpha by as much as averages reach further back, until the gradient's own share is 1.
    """
    model, loss_fn, share, decay, fresh = smooth(), nn.CrossEntropyLoss(), 0.3, 0.6, 0.6
    rule = Adaptive(share, radius, spread, 1, decay, fresh, horizon)
    optimizer = kfac_tn.KFAC(model, loss_fn, lr, betas=(0.5, 0.95), step_rule=rule, **EAGER)
    seen, excess, left = spied(optimizer), None, 1.0
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    for seed in range(4):
        before = [p.detach().clone() for p in parameters]
        twin = smooth()
        twin.load_state_dict(model.state_dict())
        ggn = dense_ggn(twin, nn.CrossEntropyLoss(), *batch(seed), names)
        take_step(model, loss_fn, optimizer, seed)
        d = [seen["directions"][p] for p in parameters]
        m = [seen["slopes"][p] for p in parameters]
        u = []
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        reach = max(1 / (1 - beta1), horizon * (seed + 1))
        left *= 1 - 1 / reach
        for p in parameters:
            state = optimizer.state[p]
            first = state["exp_avg"] / (1 - left)
            u.append(first / ((state["exp_avg_sq"] / (1 - beta2 ** (seed + 1))).sqrt() + 1e-8))
        whole = flat(u).norm() / flat(d).norm()
        bound = []
        for at in range(0, len(d), 2):
            layer = flat(u[at : at + 2]).norm() / flat(d[at : at + 2]).norm()
            bound += [radius * layer**spread * whole ** (1 - spread)] * 2
        trial = flat([b * each for b, each in zip(bound, d, strict=True)])
        metric = sum(b**2 * (each * g).sum() for b, each, g in zip(bound, d, m, strict=True))
        measured = (trial @ ggn @ trial / metric).clamp(min=1)
        excess = measured if excess is None else decay * excess + (1 - decay) * measured
        alpha = 1 / excess  # d^T m / (excess d^T F d), and F d = m
        growth = min(reach * (1 - beta1), 1 / fresh)
        scales = [min(lr * b, lr / 1e-2 * share * growth * alpha) for b in bound]
        expected = [p - t * each for p, t, each in zip(before, scales, d, strict=True)]
        torch.testing.assert_close([p.detach() for p in parameters], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("horizon", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("fresh", "least"), [(0.0, 0.5), (0.3, 0.5), (0.3, 0.0), (1.0, 0.5)])
def test_directions_are_of_an_average_and_the_steps_own_gradient(fresh, least, horizon):
    """(1 - fresh) m + fresh g by the formula, two groups with betas of their own."""
    model, loss_fn = smooth(), nn.MSELoss()
    groups = [
        {"params": list(model[:3].parameters()), "betas": (least, 0.9)},
        {"params": list(model[4].parameters()), "betas": (0.7, 0.95)},
    ]
    rule = Adaptive(fresh=fresh, horizon=horizon)
    optimizer = kfac_tn.KFAC(model, loss_fn, params=groups, step_rule=rule, **EAGER)
    seen = spied(optimizer)
    averages = {p: torch.zeros_like(p) for p in model.parameters()}
    left = [1.0, 1.0]  # of the zeros that averages started from
    for step in range(1, 13):
        x, _ = batch(step)
        optimizer.zero_grad()
        loss_fn(model(x), x).backward()
        optimizer.step()
        for which, (group, given) in enumerate(
            zip(optimizer.param_groups, (least, 0.7), strict=True)
        ):
            assert group["betas"][0] == given  # the user's own, for schedulers
            beta = max(given, 1 - 1 / (horizon * step)) if given and horizon else given
            left[which] *= beta
            for p in group["params"]:
                averages[p] = beta * averages[p] + (1 - beta) * p.grad
                expected = (1 - fresh) * averages[p] / (1 - left[which]) + fresh * p.grad
                torch.testing.assert_close(seen["slopes"][p], expected, rtol=1e-9, atol=1e-12)


def test_the_factors_curvature_is_never_too_large():
    """Where the measured curvature is below it, as where a model is saturated, it stands."""
    rule = Adaptive(decay=0.5)
    for measured, expected in ((0.1, 1.0), (3.0, 2.0), (0.0, 2.0), (float("nan"), 2.0), (0.5, 1.5)):
        rule._average(torch.tensor(measured))
        assert rule.excess == expected


@pytest.mark.parametrize("radius", [1e-3, 1e9])
def test_at_once_no_more_of_alpha_is_used_than_at_the_beginning(radius):
    """(1 - nu) m + nu g with nu = fresh / max(1, t / alpha), where curvature limits t.

    From two looks, before steps 5 and 10: alpha was taken 0.9 * 5 * 0.5 times, and 1 / 0.3 times.
    """
    model, loss_fn = smooth(), nn.MSELoss()
    rule = Adaptive(radius=radius, horizon=0.9, fresh=0.3)
    optimizer = kfac_tn.KFAC(model, loss_fn, betas=(0.5, 0.95), step_rule=rule, **EAGER)
    seen, average, left = spied(optimizer), 0.0, 1.0
    for step in range(13):
        x, _ = batch(step)
        before = [p.detach().clone() for p in model[0].parameters()]
        optimizer.zero_grad()
        loss_fn(model(x), x).backward()
        optimizer.step()
        told = optimizer.diagnostics().layers["0"].update_norm
        g = flat(p.grad for p in model.parameters())
        beta = max(0.5, 1 - 1 / (0.9 * (step + 1)))
        average, left = beta * average + (1 - beta) * g, beta * left
        length = 1.0 if radius < 1 or step < 5 else 2.25 if step < 10 else 1 / 0.3
        nu = 0.3 / length
        expected = (1 - nu) * average / (1 - left) + nu * g
        slopes = flat(seen["slopes"][p] for p in model.parameters())
        torch.testing.assert_close(slopes, expected, rtol=1e-6, atol=1e-12)
        moved = flat(p - old for p, old in zip(model[0].parameters(), before, strict=True))
        assert told == pytest.approx(float(moved.detach().norm()), rel=1e-6)


@pytest.mark.parametrize("fresh", [0.0, 0.1])
@pytest.mark.parametrize("horizon", [0.0, 0.2])
def test_averages_begin_anew_where_steps_go_uphill(horizon, fresh):
    """When the sign of all gradients changes; the next step's averages are its gradients."""
    model, loss_fn = smooth(), nn.MSELoss()
    options = {"betas": (0.5, 0.9), "step_rule": Adaptive(fresh=fresh, horizon=horizon), **EAGER}
    optimizer = kfac_tn.KFAC(model, loss_fn, lr=1e-5, **options)
    seen, slopes, anew = spied(optimizer), [], []
    x, _ = batch(0)
    for step in range(30):
        optimizer.zero_grad()
        loss_fn(model(x), x).backward()
        for p in model.parameters():
            p.grad *= -1 if step >= 14 else 1
        before = {p: p.detach().clone() for p in model.parameters()}
        optimizer.step()
        slopes.append(sum((p.grad * (p - before[p])).sum() for p in before).item())
        if all(torch.equal(seen["slopes"][p], p.grad) for p in model.parameters()):
            anew.append(step)
    if horizon:  # steps are looked at before those whose number is a multiple of 5
        assert all(slope < 0 for slope in [*slopes[:14], *slopes[15:]])
        assert slopes[14] > 0
    assert anew == ([0, 15] if horizon else [0])


def test_averages_reach_no_further_than_the_youngest_parameters():
    """A layer unfrozen late has no average that reached back before; the others keep theirs."""
    model, loss_fn = smooth(), nn.MSELoss()
    model[0].requires_grad_(False)
    rule = Adaptive(fresh=0.0)
    optimizer = kfac_tn.KFAC(model, loss_fn, betas=(0.5, 0.9), step_rule=rule, **EAGER)
    seen, average, left = spied(optimizer), 0.0, 1.0
    for step in range(42):
        if step == 30:
            model[0].requires_grad_(True)
        x, _ = batch(step)
        optimizer.zero_grad()
        loss_fn(model(x), x).backward()
        optimizer.step()
        beta = max(0.5, 1 - 1 / (0.2 * (step % 30 + 1)))
        average, left = beta * average + (1 - beta) * model[4].weight.grad, beta * left
        if rule.anew < 0:
            # From step 30 on what is left is taken for a little more than it is.
            rtol = 1e-9 if step < 30 else 1e-5
            expected = average / (1 - left)
            actual = seen["slopes"][model[4].weight]
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)
    assert rule.begun == 30
    assert rule.anew == -1


def test_without_a_horizon_averages_never_begin_anew():
    """Also where a layer joins late: all is by the formula, uphill or not."""
    model, loss_fn = smooth(), nn.MSELoss()
    model[0].requires_grad_(False)
    options = {"step_rule": Adaptive(fresh=0.1, horizon=0.0), "lr": 1e-5, **EAGER}
    optimizer = kfac_tn.KFAC(model, loss_fn, betas=(0.9, 0.9), **options)
    seen, average = spied(optimizer), 0.0
    x, _ = batch(0)
    for step in range(30):
        if step == 8:
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        (loss_fn(model(x), x) * (-1 if step >= 14 else 1)).backward()
        optimizer.step()
        g = model[4].weight.grad
        average = 0.9 * average + 0.1 * g
        expected = 0.9 * average / (1 - 0.9 ** (step + 1)) + 0.1 * g
        torch.testing.assert_close(seen["slopes"][model[4].weight], expected)


def test_averages_begin_anew_in_the_same_step_after_a_checkpoint():
    """With the step's number, and how far averages reach by then."""
    results = []
    x, _ = batch(0)
    for cut in (None, 15, 17):
        model, loss_fn = smooth(), nn.MSELoss()
        options = {"betas": (0.5, 0.9), "step_rule": "adaptive", **EAGER}
        optimizer = kfac_tn.KFAC(model, loss_fn, **options)
        for step in range(24):
            if step == cut:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = kfac_tn.KFAC(model, loss_fn, **{**options, "step_rule": Adaptive()})
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            (loss_fn(model(x), x) * (-1 if step >= 14 else 1)).backward()
            optimizer.step()
        assert optimizer._rule.begun == 15
        results.append(flat(model.parameters()))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_averages_of_others_reach_as_far_as_betas_say():
    """Adam's steps are torch's, whatever the horizon."""
    model, loss_fn = Noisy().eval(), nn.CrossEntropyLoss()
    rule = Adaptive(horizon=0.9)
    optimizer = kfac_tn.KFAC(model, loss_fn, betas=(0.5, 0.9), step_rule=rule, **EAGER)
    others = [p for p in model.parameters() if p not in optimizer._estimator.layer_of]
    twins = [nn.Parameter(p.detach().clone()) for p in others]
    adam = torch.optim.Adam(twins, lr=1e-2, betas=(0.5, 0.9))
    assert others
    for seed in range(12):
        take_step(model, loss_fn, optimizer, seed)
        for p, twin in zip(others, twins, strict=True):
            twin.grad = p.grad.clone()
        adam.step()
    torch.testing.assert_close(others, twins, rtol=1e-9, atol=1e-12)


def test_last_steps_are_told_until_their_gradient_is_gone():
    """What moved, from diagnostics; with a share of the gradient nothing once that is gone."""
    for fresh in (0.2, 0.0):
        model, loss_fn = smooth(), nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=Adaptive(fresh=fresh), **EAGER)
        for seed in range(3):
            before = [p.detach().clone() for p in model[0].parameters()]
            take_step(model, loss_fn, optimizer, seed)
        moved = flat([p - old for p, old in zip(model[0].parameters(), before, strict=True)])
        told = optimizer.diagnostics().layers["0"].update_norm
        assert told == pytest.approx(float(moved.detach().norm()), rel=1e-6)
        optimizer.zero_grad()
        assert optimizer.diagnostics().layers["0"].update_norm == (None if fresh else told)


def test_the_model_is_of_the_batch_and_has_no_side_effects():
    """With dropout, batch normalization, and parameters that take Adam's steps."""
    model, loss_fn = Noisy(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=Adaptive(interval=1), **EAGER)
    plain, plain_loss = Noisy(), nn.CrossEntropyLoss()
    for seed in range(3):
        torch.manual_seed(seed)
        plain.load_state_dict(model.state_dict())
        x, y = batch(seed)
        plain_loss(plain(x), y).backward()
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        take_step(model, loss_fn, optimizer, seed)
        assert torch.equal(torch.get_rng_state(), after)
        for name, buffer in plain.named_buffers():
            assert torch.equal(buffer, model.get_buffer(name)), name
    assert optimizer._rule.excess.isfinite()


@pytest.mark.parametrize("how", [{"sizes": [1, 3, 2]}, {"scaler": 1024.0}])
def test_measurements_of_micro_batches_and_scaled_gradients_are_the_same(how):
    results = []
    for options in ({}, how):
        model, loss_fn = smooth(), nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=Adaptive(interval=1), **EAGER)
        if "scaler" in options:
            options = {"scaler": torch.amp.GradScaler("cpu", init_scale=options["scaler"])}
        for seed in range(3):
            take_step(model, loss_fn, optimizer, seed, **options)
        results.append(model[0].weight)
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def of_something_else(model, x, y, optimizer):
    outputs = 1.0 * model(x)
    optimizer.observe(outputs, y)
    nn.functional.cross_entropy(outputs, y).backward()


def of_a_part(model, x, y, optimizer):
    optimizer._loss_fn(model(x)[: len(x)] * 1.0, y).backward()


def in_a_chain(model, x, y, optimizer):
    """The last call alone doesn't tell how its output depends on the parameters."""
    optimizer._loss_fn(model(model(x).tanh()), y).backward()


@pytest.mark.parametrize("backward", [of_something_else, of_a_part, in_a_chain])
def test_without_a_batch_steps_are_grafted_and_the_user_is_told(backward):
    results = []
    for rule in (Adaptive(fresh=0.0), "graft"):
        model, loss_fn = smooth(), nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule, **EAGER)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for seed in range(3):
                optimizer.zero_grad()
                backward(model, *batch(seed), optimizer)
                optimizer.step()
        results.append(flat(model.parameters()))
        said = [str(w.message) for w in told if "can't be recorded" in str(w.message)]
        assert len(said) == (rule != "graft")
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


RULES_WITH_BATCH = {
    "adaptive": lambda: {"step_rule": Adaptive(interval=1)},
    "quadratic": lambda: {"step_rule": QuadraticModel(relative_norm=None)},
    "Levenberg-Marquardt": lambda: {"damping": LevenbergMarquardt(0.1, interval=1)},
}


def observed(model, loss_fn, optimizer, seed, scale, parts):
    """Functional losses, as of models that compute their own."""
    for x, y in zip(*(part.chunk(parts) for part in batch(seed)), strict=True):
        outputs = {"logits": model(x)}["logits"]
        optimizer.observe(outputs, y, weight=scale / parts)
        (scale / parts * nn.functional.cross_entropy(outputs, y)).backward()


def called(model, loss_fn, optimizer, seed, scale, parts):
    for x, y in zip(*(part.chunk(parts) for part in batch(seed)), strict=True):
        (scale / parts * loss_fn(model(x), y)).backward()


@pytest.mark.parametrize(("scale", "parts"), [(1.0, 1), (0.25, 1), (1.0, 2), (3.0, 4)])
@pytest.mark.parametrize("rule", RULES_WITH_BATCH)
def test_what_is_observed_is_measured_like_what_the_module_computes(rule, scale, parts):
    results = []
    for way in (observed, called):
        model, loss_fn = smooth(), nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, **RULES_WITH_BATCH[rule](), **EAGER)
        for seed in range(4):
            optimizer.zero_grad()
            way(model, loss_fn, optimizer, seed, scale, parts)
            optimizer.step()
        state = optimizer._rule.state_dict()
        measured = state.get("excess", state.get("coefficients"))
        assert measured.isfinite().all()
        damping = torch.tensor(optimizer.param_groups[0]["damping"])
        results.append((flat(model.parameters()), measured, state["factor"], damping))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["another weight", "a penalty", "a surrogate"])
def test_what_is_observed_but_not_differentiated_is_not_measured(kind):
    """Then steps are grafted."""
    results = []
    for rule in (Adaptive(interval=1, fresh=0.0), "graft"):
        model, loss_fn = smooth(), nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule, **EAGER)
        for seed in range(3):
            x, y = batch(seed)
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.observe(outputs, y)
            loss = nn.functional.cross_entropy(outputs, y, reduction="none")
            if kind == "another weight":
                loss = 0.5 * loss.mean()
            elif kind == "a penalty":
                loss = loss.mean() + 0.3 * sum(p.square().sum() for p in model.parameters())
            else:  # advantages, as of policy gradients
                loss = (loss * torch.linspace(-1, 1, len(loss)).to(loss)).mean()
            loss.backward()
            optimizer.step()
        results.append(flat(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_groups_of_other_learning_rates_keep_their_ratio():
    """One group at rest: the other's steps are as if it were alone."""
    model, loss_fn = smooth(), nn.CrossEntropyLoss()
    groups = [
        {"params": list(model[:3].parameters()), "lr": 0.0},
        {"params": list(model[4].parameters())},
    ]
    optimizer = kfac_tn.KFAC(model, loss_fn, params=groups, step_rule=Adaptive(interval=1), **EAGER)
    twin = smooth()
    twin[:3].requires_grad_(False)
    alone = kfac_tn.KFAC(twin, loss_fn, step_rule=Adaptive(interval=1), **EAGER)
    for seed in range(3):
        for each, its in ((model, optimizer), (twin, alone)):
            take_step(each, loss_fn, its, seed)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_overparametrized_regression_converges():
    """To the last digit, where steps of Adam's size jitter for ever."""
    losses = {}
    x, y = batch(n=16)[0], torch.randn(16, 3, generator=torch.Generator().manual_seed(1)).double()
    for rule in ("graft", "adaptive"):
        torch.manual_seed(0)
        layers = nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)
        model, loss_fn = nn.Sequential(*layers).double(), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule)
        for _ in range(400):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        losses[rule] = loss_fn(model(x), y).item()
    assert losses["adaptive"] < 1e-10 * losses["graft"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuadraticModel(interval=0), "interval is 0"),
        (lambda: QuadraticModel(relative_norm=0.0), "relative_norm is 0.0"),
        (lambda: TrustRegion(0.0), "trust_region is 0.0"),
        (lambda: Graft("muon"), "'muon' is unknown"),
        (lambda: Adaptive(share=0.0), "share is 0.0"),
        (lambda: Adaptive(share=float("inf")), "share is inf"),
        (lambda: Adaptive(radius="large"), "radius is 'large'"),
        (lambda: Adaptive(fresh=float("nan")), "fresh is nan"),
        (lambda: Adaptive(interval=2.5), "interval is 2.5"),
        (lambda: QuadraticModel(relative_norm=True), "relative_norm is True"),
        (lambda: Adaptive(radius=-1.0), "radius is -1.0"),
        (lambda: Adaptive(spread=1.5), "spread is 1.5"),
        (lambda: Adaptive(interval=0), "interval is 0"),
        (lambda: Adaptive(decay=1.0), "decay is 1.0"),
        (lambda: Adaptive(fresh=1.1), "fresh is 1.1"),
        (lambda: Adaptive(horizon=-0.1), "horizon is -0.1"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


RULES = {
    "adaptive": {},
    "graft": {"step_rule": "graft"},
    "graft to sgd": {"step_rule": kfac_tn.optim.Graft("sgd")},
    "fixed": {"step_rule": "fixed"},
    "quadratic": {"step_rule": "quadratic"},
    "trust region": {"trust_region": 0.1},
}


@pytest.mark.parametrize("other", RULES)
@pytest.mark.parametrize("rule", RULES)
def test_states_of_rules_with_other_entries_are_refused_whole(rule, other):
    """The others continue."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, 2).double(), nn.MSELoss()
    x, y = torch.rand(4, 3).double(), torch.rand(4, 2).double()

    def trained(options, steps):
        optimizer = kfac_tn.KFAC(model, loss_fn, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        return optimizer

    saved, optimizer = trained(RULES[other], 3).state_dict(), trained(RULES[rule], 1)
    if saved["rule"].keys() != optimizer.state_dict()["rule"].keys():
        before = optimizer.state[model.weight]["exp_avg"].clone()
        with pytest.raises(ValueError, match=r"another step rule.*Make the optimizer with"):
            optimizer.load_state_dict(saved)
        assert torch.equal(optimizer.state[model.weight]["exp_avg"], before)
        assert optimizer.steps_taken == 1
        return
    optimizer.load_state_dict(saved)
    assert optimizer.steps_taken == 3


# What factors lack -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["CE", "MSE"])
def test_what_layers_lack_is_what_cauchy_and_schwarz_tell(loss_fn, scale):
    """(d^T g)^2 / (r^T H^+ r) over d^T F d, by layer; by hand for both losses."""
    model, rule = smooth(), Adaptive(interval=1, decay=0.0, tolerance=1e-6)
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule, **EAGER)
    x, y = batch(0)
    outputs = model(x)
    y = y if isinstance(loss_fn, nn.CrossEntropyLoss) else outputs.detach().cos()
    loss = loss_fn(outputs, y)
    (scale * loss).backward()
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        p = outputs.detach().softmax(1)[torch.arange(len(x)), y]
        decrement = ((1 - p) / p).mean()
    else:
        decrement = 2 * loss.detach()
    gradients = {p: p.grad.clone() for p in model.parameters()}
    optimizer.step()
    directions = optimizer._estimator.precondition(gradients)
    products = {p: (d * gradients[p]).sum() / scale**2 for p, d in directions.items()}
    layers = optimizer._estimator.layer_of
    expected = torch.zeros(max(layers[p] for p in products) + 1, dtype=torch.float64)
    for p, product in products.items():
        expected[layers[p]] += product / decrement / 1e-6
    torch.testing.assert_close(rule.lacking, expected, rtol=1e-4, atol=0)
    assert rule.excess.isfinite()


class Attending(nn.Module):
    """Classifies by one position, which looks at the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x).tanh()
        h = h + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        return self.last(h[:, 0])


def test_keys_of_which_reduce_has_nothing_do_not_take_the_whole_step():
    """Sums over positions of keys' gradients are zero, and so is B."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, 3, generator=generator)
    y = (x[:, 0] + x.mean(1)).argmax(1)
    losses, lacking = {}, {}
    for tolerance in (torch.inf, 20.0):
        model, loss_fn = Attending(), nn.CrossEntropyLoss()
        rule = Adaptive(tolerance=tolerance)
        optimizer = kfac_tn.KFAC(model, loss_fn, approximation="reduce", step_rule=rule)
        for _ in range(60):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        losses[tolerance] = loss_fn(model(x), y).item()
        if len(rule.lacking):
            layers = optimizer._estimator.layer_of
            modules = model.named_children()
            lacking = {name: float(rule.lacking[layers[m.weight]]) for name, m in modules}
        again = Adaptive(tolerance=tolerance)
        again.load_state_dict(rule.state_dict())
        assert torch.equal(again.lacking, rule.lacking)
    assert max(lacking, key=lambda name: lacking[name]) == "key"
    assert lacking["key"] > 1e6 > lacking["value"]
    assert losses[20.0] < 0.5 * losses[torch.inf]


def test_what_layers_lack_is_kept_where_a_step_leaves_them_out():
    """Of layers that are used in some steps only, as experts are; and new ones may join."""
    model, loss_fn = Attending(), nn.CrossEntropyLoss()
    rule = Adaptive(interval=1, decay=0.5, tolerance=1e-3)
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=rule)
    x, y = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
    layers, seen = optimizer._estimator.layer_of, []
    for names in (["embed", "query", "key", "value", "last"], ["last"], ["embed", "last"]):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        for name, module in model.named_children():
            if name not in names:
                module.zero_grad()  # sets to None: takes no part in the step
        optimizer.step()
        seen.append({n: float(rule.lacking[layers[m.weight]]) for n, m in model.named_children()})
    assert min(seen[0].values()) > 1
    changed = [{n for n in seen[0] if one[n] != other[n]} for one, other in pairwise(seen)]
    assert changed == [{"last"}, {"embed", "last"}]


def test_a_tolerance_that_is_no_positive_number_is_refused():
    with pytest.raises(ValueError, match="tolerance is 0"):
        Adaptive(tolerance=0)
