"""The optimizer: against a plain re-implementation, and everything users expect of one."""

from __future__ import annotations

import copy
import io
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfac_tn
from kfac_tn.curvature import inverse
from kfac_tn.curvature.checks import all_finite

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
EAGER = {"factor_interval": 1, "inverse_interval": 1}
NAN, INF = float("nan"), float("inf")


def make_model(dtype=torch.float64) -> nn.Sequential:
    """A grouped convolution with bias and a linear layer with bias."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(dtype)


def make_data(seed=1, n=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 4, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (n,), generator=generator)


def train(optimizer, model, loss_fn, steps, start=0):
    for step in range(start, start + steps):
        x, y = make_data(seed=step, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def make(model=None, loss_fn=None, **options):
    model = make_model() if model is None else model
    loss_fn = nn.CrossEntropyLoss() if loss_fn is None else loss_fn
    return model, loss_fn, kfac_tn.KFAC(model, loss_fn, **{**EAGER, **options})


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# A plain re-implementation -----------------------------------------------------------------------


def plain_factors(model, x, approximation):
    """[(A, B) of each group] of both layers, type-2, from the model's own formula."""
    conv, head = model[0], model[3]
    h = conv(x).tanh().flatten(1).detach()
    p = head(h).softmax(1).detach()
    hessian = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / len(x)
    ones = torch.ones(len(x), 1, 4, dtype=x.dtype)
    jacobian = head.weight.detach() * (1 - h.square()).unsqueeze(1)
    full = (jacobian.mT @ hessian @ jacobian).view(-1, 4, 4, 4, 4)  # n, channel, r, channel', r'
    groups = []
    for g in range(2):
        a = torch.cat([F.unfold(x[:, 2 * g : 2 * g + 2], 2), ones], dim=1)
        channels = full[:, 2 * g : 2 * g + 2, :, 2 * g : 2 * g + 2]
        if approximation == "expand":
            groups.append(
                (
                    torch.einsum("nir,njr->ij", a, a) / (4 * len(x)),
                    torch.einsum("nirjr->ij", channels),
                )
            )
        else:
            a = a.mean(2)
            groups.append((a.T @ a / len(x), channels.sum((0, 2, 4))))
    h = torch.cat([h, ones[..., 0]], dim=1)
    return [groups, [(h.T @ h / len(x), hessian.sum(0))]]


def dense_direction(weight, bias, factors, damping, relative):
    """Solve with the explicit Kronecker product of the damped factors, group by group."""
    matrix = torch.cat([weight.flatten(1), bias.unsqueeze(1)], dim=1)
    rows = []
    for (a, b), part in zip(factors, matrix.chunk(len(factors)), strict=True):
        mean_a, mean_b = a.trace() / len(a), b.trace() / len(b)
        pi = (mean_a / mean_b).sqrt()
        shift_a = damping**0.5 * (mean_a if relative else pi)
        shift_b = damping**0.5 * (mean_b if relative else 1 / pi)
        eye_a, eye_b = torch.eye(len(a), dtype=a.dtype), torch.eye(len(b), dtype=b.dtype)
        dense = torch.kron(b + shift_b * eye_b, a + shift_a * eye_a)
        rows.append(torch.linalg.solve(dense, part.flatten()).view_as(part))
    d = torch.cat(rows)
    return d[:, :-1].reshape(weight.shape), d[:, -1]


RULES = [
    {"step_rule": "graft"},
    {"step_rule": "fixed"},
    {"step_rule": "kl_clip", "kl_clip": 1e-5},
    {"step_rule": "kl_clip", "kl_clip": 1e5},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_equals_a_plain_implementation(rule, relative, approximation):
    lr, beta1, beta2, eps, decay, damping, keep = 0.01, 0.8, 0.99, 1e-6, 0.1, 0.02, 0.7
    model, loss_fn, optimizer = make(
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=decay,
        damping=damping,
        relative_damping=relative,
        noise_damping=0,
        factor_decay=keep,
        approximation=approximation,
        fisher="type-2",
        **rule,
    )
    plain = make_model()
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in plain.parameters()]
    averages, weight_sum = None, 0.0
    for t in range(1, 5):
        train(optimizer, model, loss_fn, 1, start=t)
        x, y = make_data(seed=t)
        new = plain_factors(plain, x, approximation)
        weight_sum = keep * weight_sum + 1 - keep
        if averages is None:
            averages = [[(0 * a, 0 * b) for a, b in layer] for layer in new]
        averages = [
            [
                (keep * a + (1 - keep) * new_a, keep * b + (1 - keep) * new_b)
                for (a, b), (new_a, new_b) in zip(layer, new_layer, strict=True)
            ]
            for layer, new_layer in zip(averages, new, strict=True)
        ]
        parameters = list(plain.parameters())
        gradients = torch.autograd.grad(loss_fn(plain(x), y), parameters)
        m_hat, u = [], []
        for moment, g in zip(moments, gradients, strict=True):
            moment[0] = beta1 * moment[0] + (1 - beta1) * g
            moment[1] = beta2 * moment[1] + (1 - beta2) * g**2
            m_hat.append(moment[0] / (1 - beta1**t))
            u.append(m_hat[-1] / ((moment[1] / (1 - beta2**t)).sqrt() + eps))
        d = []
        for index, layer in enumerate(averages):
            corrected = [(a / weight_sum, b / weight_sum) for a, b in layer]
            pair = m_hat[2 * index : 2 * index + 2]
            d.extend(dense_direction(*pair, corrected, damping, relative))
        if rule["step_rule"] == "graft":
            d = [each / each.norm() * adam.norm() for each, adam in zip(d, u, strict=True)]
        elif rule["step_rule"] == "kl_clip":
            change = sum(lr**2 * (each * m).sum() for each, m in zip(d, m_hat, strict=True))
            d = [each * min(1, (rule["kl_clip"] / change) ** 0.5) for each in d]
        with torch.no_grad():
            for p, each in zip(parameters, d, strict=True):
                p.mul_(1 - lr * decay).sub_(lr * each)
        for ours, expected in zip(model.parameters(), parameters, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("damping", [1e-4, 0.1])
def test_exact_damping_is_added_to_the_product(relative, damping):
    """Against a dense solve with kron(B, A) + damping I."""
    options = {"step_rule": "fixed", "lr": 0.1, "fisher": "type-2", "betas": (0.0, 0.0)}
    options |= {"damping": damping, "relative_damping": relative, "damping_split": "exact"}
    model, loss_fn, optimizer = make(**options)
    for seed in range(3):
        before = copy.deepcopy(model)
        train(optimizer, model, loss_fn, 1, start=seed)
        x, y = make_data(seed=seed)
        loss_fn(before(x), y).backward()
        for name, factors in optimizer.factors().items():
            old, new = before.get_submodule(name), model.get_submodule(name)
            gradient = torch.cat([old.weight.grad.flatten(1), old.bias.grad[:, None]], 1)
            moved = torch.cat(
                [(old.weight - new.weight).flatten(1), (old.bias - new.bias)[:, None]], 1
            )
            parts = zip(
                *(factors.input, factors.grad_output),
                *(each.detach().chunk(len(factors.input)) for each in (gradient, moved)),
                strict=True,
            )
            for a, b, g, step in parts:
                scale = a.diagonal().mean() * b.diagonal().mean() if relative else 1.0
                dense = torch.kron(b, a)
                dense = dense + damping * scale * torch.eye(len(dense), dtype=dense.dtype)
                expected = torch.linalg.solve(dense, g.flatten()).view_as(g)
                torch.testing.assert_close(step, 0.1 * expected, rtol=1e-6, atol=1e-9)


def test_states_of_another_damping_split_are_refused():
    saved = []
    for split in ("pi", "exact"):
        model, loss_fn, optimizer = make(damping_split=split)
        train(optimizer, model, loss_fn, 1)
        saved.append(optimizer.state_dict())
    with pytest.raises(ValueError, match="another damping_split"):
        optimizer.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])


class Mixed(nn.Module):
    """Parameters with and without Kronecker structure."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.linear, self.free = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x):
        return self.linear(self.norm(self.embed(x))) * self.free


@pytest.mark.parametrize("options", [{}, {"other_lr": 0.02}, {"step_rule": "fixed"}], ids=str)
def test_parameters_without_structure_take_adamw_steps(options):
    """Those of torch.optim.AdamW, given the same gradients."""
    model = Mixed()
    twin = copy.deepcopy(model)
    options = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1, **options}
    optimizer = kfac_tn.KFAC(model, nn.CrossEntropyLoss(), **options)
    other_lr = options.get("other_lr", 1e-3 if "step_rule" in options else 0.01)
    adam = torch.optim.AdamW(twin.parameters(), other_lr, (0.9, 0.98), 1e-7, weight_decay=0.1)
    names = [name for name, _ in model.named_parameters() if name.startswith(("norm", "free"))]
    for step in range(4):
        torch.manual_seed(step)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        optimizer._estimator.capture.seen_loss = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no curvature was seen
            optimizer.step()
        adam.step()
    for name in names:
        ours, expected = model.get_parameter(name), twin.get_parameter(name)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


# Groups, schedulers, closures --------------------------------------------------------------------


def test_default_groups():
    model = Mixed()
    assert len(kfac_tn.KFAC(model, nn.CrossEntropyLoss()).param_groups) == 1
    layers, others = kfac_tn.KFAC(model, nn.CrossEntropyLoss(), other_lr=0.5).param_groups
    expected = [model.embed.weight, *model.linear.parameters()]
    assert {id(p) for p in layers["params"]} == {id(p) for p in expected}
    assert others["lr"] == 0.5
    assert len(layers["params"] + others["params"]) == len(list(model.parameters()))
    frozen = Mixed()
    frozen.linear.requires_grad_(False)
    layers, others = kfac_tn.KFAC(frozen, nn.CrossEntropyLoss(), other_lr=0.5).param_groups
    expected = [frozen.embed.weight, *frozen.linear.parameters()]
    assert {id(p) for p in layers["params"]} == {id(p) for p in expected}
    assert (layers["lr"], others["lr"]) == (1e-2, 0.5)
    kinds = {"embed": "none", "linear": "kfac"}
    optimizer = kfac_tn.KFAC(model, nn.CrossEntropyLoss(), other_lr=0.5, curvature=kinds)
    layers, others = optimizer.param_groups
    assert {id(p) for p in layers["params"]} == {id(p) for p in model.linear.parameters()}


def test_groups_with_options_of_their_own():
    """A group with lr 0 stands still; each other group is as if its options were everybody's."""

    def run(params=None, **options):
        options = {"lr": 0.01, "fisher": "type-2", "step_rule": "graft", **options}
        model, loss_fn, optimizer = make(params=None, **options)
        if params is not None:
            groups = params(model)
            model, loss_fn, optimizer = make(model, params=groups, **options)
        train(optimizer, model, loss_fn, 1)
        return values(model)

    start = values(make_model())
    mine = {"lr": 0.03, "betas": (0.5, 0.6), "eps": 1e-4, "weight_decay": 0.2}
    mixed = run(
        lambda model: [
            {"params": list(model[0].parameters()), **mine},
            {"params": [model[3].weight]},
            {"params": [model[3].bias], "lr": 0.0},
        ]
    )
    alone = run()
    everybody = run(
        lambda model: [{"params": list(model.parameters()), **mine}],
    )
    for index, expected in enumerate([everybody, everybody, alone, start]):
        torch.testing.assert_close(mixed[index], expected[index], rtol=1e-12, atol=0)


def test_the_order_of_groups_does_not_matter_and_names_are_allowed():
    model, loss_fn, optimizer = make()
    other = make_model()
    groups = [{"params": [p]} for p in reversed(list(other.parameters()))]
    other_optimizer = kfac_tn.KFAC(other, loss_fn, params=groups, **EAGER)
    train(optimizer, model, loss_fn, 2)
    train(other_optimizer, other, loss_fn, 2)
    assert same(values(model), values(other))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda m: [{"params": [m[0].weight]}], r"miss.*'0.bias', '3.weight', '3.bias'"),
        (lambda m: [{"params": [*m.parameters(), nn.Parameter(torch.ones(1))]}], "isn't the model"),
        (lambda m: [{"params": m.parameters(), "momentum": 0.9}], r"no option \['momentum'\]"),
        (lambda m: [{"params": m.parameters(), "maximize": True}], r"no option \['maximize'\]"),
        (lambda m: [{"params": m.parameters(), "lr": -1.0}], "lr is -1"),
        (lambda m: [{"params": m.parameters(), "betas": (0.9,)}], "betas are"),
    ],
)
def test_wrong_groups_are_refused_and_leave_no_hooks(groups, message):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=message):
        kfac_tn.KFAC(model, loss_fn, params=groups(model))
    assert not any(m._forward_hooks for m in [*model.modules(), loss_fn])


def test_foreign_parameters_cannot_be_added_later():
    _, _, optimizer = make()
    with pytest.raises(ValueError, match="isn't the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (1.0, 0.9)}, r"betas are \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, "betas are"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas are"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": -1.0}, "weight_decay is"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"damping": -1.0}, "damping is"),
        ({"factor_decay": 1.0}, "factor_decay is 1.0"),
        ({"factor_decay": -0.1}, "factor_decay is"),
        ({"factor_interval": 0}, "factor_interval is 0"),
        ({"inverse_interval": 1.5}, "inverse_interval is 1.5"),
        ({"mc_samples": 0}, "mc_samples is 0"),
        ({"fisher": "exact"}, "fisher is 'exact'"),
        ({"damping_split": "even"}, "damping_split is 'even'"),
        ({"approximation": "shrink"}, "shrink"),
        ({"step_rule": "newton"}, "step_rule is 'newton'"),
        ({"kl_clip": 0.0}, "kl_clip is 0.0"),
        ({"other_lr": -1.0, "model": Mixed}, "lr is -1.0"),
        ({"other_lr": -1.0}, "other_lr is -1.0"),
        ({"seed": "first"}, "seed is 'first'"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"relative_damping": "no"}, "relative_damping is 'no'"),
        ({"approximation": None}, "approximation is None for layer"),
        ({"curvature": True}, "curvature is True for layer"),
        ({"other_lr": 0.1, "params": []}, "exclude each other"),
        ({"kl_clip": 5.0}, "kl_clip=5.0 is for step_rule='kl_clip', but step_rule is 'adaptive'"),
        ({"kl_clip": 1.0, "step_rule": kfac_tn.optim.Graft()}, "but step_rule is Graft: leave"),
        ({"kl_clip": 1e-3, "step_rule": "graft"}, "kl_clip=0.001 is for.*'graft': leave it out"),
        *[
            ({"mc_samples": 8, "fisher": fisher}, f"mc_samples=8 is for fisher='mc'.*'{fisher}'")
            for fisher in ("type-2", "empirical", "forward-only")
        ],
        ({"overhead": 0.01}, "overhead=0.01 is for factor_interval='auto'.*are 50 and 100"),
        *[
            ({name: value}, f"{name} is {value!r}: it must be a positive whole number")
            for name in ("factor_interval", "inverse_interval", "max_dim")
            for value in (True, float("nan"), float("inf"), "often", 0.5, -1)
        ],
        ({"factor_interval": None}, "factor_interval is None"),
        *[({"mc_samples": value}, f"mc_samples is {value}") for value in (True, INF, NAN, None)],
        *[({"seed": value}, f"seed is {value}: it must be a whole") for value in (True, NAN, None)],
        *[
            ({name: value}, f"{name} is '?{value}'?: it must be")
            for name in ("lr", "eps", "weight_decay", "damping", "factor_decay", "noise_damping")
            for value in (True, NAN, INF, "x")
        ],
        *[({"trust_region": value}, f"trust_region is {value!r}") for value in (True, NAN, "x", 0)],
        *[({"other_lr": value}, f"other_lr is {value!r}") for value in (True, NAN, INF, "x")],
        *[
            ({"kl_clip": value, "step_rule": "kl_clip"}, f"kl_clip is {value!r}")
            for value in (True, NAN, "x", 0)
        ],
        ({"overhead": "x", "factor_interval": "auto"}, "overhead is 'x'"),
        ({"betas": (0.9, True)}, r"betas are \(0.9, True\)"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused_by_name(options, message):
    options = dict(options)
    model, loss_fn = options.pop("model", make_model)(), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=message):
        kfac_tn.KFAC(model, loss_fn, **options)
    assert not any(m._forward_hooks for m in [*model.modules(), loss_fn])


@pytest.mark.parametrize(
    ("options", "same_as"),
    [
        ({"step_rule": "kl_clip", "kl_clip": 1e-3}, {"step_rule": "kl_clip"}),
        ({"fisher": "type-2", "mc_samples": "auto"}, {"fisher": "type-2"}),
        (
            {"factor_interval": "auto", "inverse_interval": 4.0, "overhead": 0.25},
            {"factor_interval": "auto", "inverse_interval": 4},
        ),
    ],
    ids=str,
)
def test_defaults_may_be_given_where_they_act(options, same_as):
    ends = []
    for each in (options, same_as):
        model, loss_fn, optimizer = make(**each)
        train(optimizer, model, loss_fn, 3)
        ends.append(values(model))
    assert same(*ends)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", float("nan")),
        ("lr", -0.1),
        ("weight_decay", float("inf")),
        ("damping", 0.0),
        ("damping", -1.0),
        ("betas", (0.9, 1.0)),
    ],
)
def test_what_a_schedule_sets_out_of_range_is_refused_before_anything_is_changed(option, value):
    model, loss_fn, optimizer = make()
    train(optimizer, model, loss_fn, 2)
    before, good = snapshot(model, optimizer), optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=rf"{option} (is|are) "):
        train(optimizer, model, loss_fn, 1, start=2)
    optimizer.param_groups[0][option] = good
    assert same(snapshot(model, optimizer), before)
    assert optimizer.steps_taken == 2
    train(optimizer, model, loss_fn, 1, start=2)
    assert optimizer.steps_taken == 3


def test_what_cannot_be_observed_is_refused():
    model, _, optimizer = make()
    x, y = make_data()
    with pytest.raises(ValueError, match=r"no graph.*very outputs"):
        optimizer.observe(model(x).detach(), y)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight of a loss is {weight}"):
            optimizer.observe(model(x), y, weight)
    with torch.no_grad():  # an evaluation
        optimizer.observe(model(x), y)


@pytest.mark.parametrize("option", ["momentum", "maximize", "foreach", "nesterov"])
def test_unknown_options_are_refused(option):
    with pytest.raises(TypeError, match=option):
        kfac_tn.KFAC(make_model(), nn.CrossEntropyLoss(), **{option: True})


@pytest.mark.parametrize(
    "use",
    [kfac_tn.KFAC, kfac_tn.KFACPreconditioner, lambda m, loss: kfac_tn.compute_kfac(m, loss, [])],
)
def test_parameters_in_place_of_the_model_are_refused(use):
    with pytest.raises(TypeError, match=r"model is a generator: give the torch.nn.Module itself"):
        use(nn.Linear(2, 2).parameters(), nn.MSELoss())


def test_models_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        make(make_model().requires_grad_(False))
    model = make_model()
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="'phase' has dtype"):
        make(model)


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    model, loss_fn, optimizer = make(model)
    loss_fn(model(torch.tensor([0, 1])), torch.tensor([0, 1])).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match=r"'0.weight' is sparse.*sparse=False"):
        optimizer.step()
    assert same(values(model), before)


SCHEDULERS = {
    "StepLR": (lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), [(0.01, 0.9), (0.005, 0.9)]),
    "OneCycleLR": (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.1, total_steps=4, base_momentum=0.85, max_momentum=0.95
        ),
        None,
    ),
    "LambdaLR": (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 / (step + 1)),
        [(0.01, 0.9), (0.005, 0.9)],
    ),
}


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_act_as_on_adamw(schedule, expected):
    """Learning rates and momenta, step by step."""
    model, loss_fn, optimizer = make(lr=0.01, betas=(0.9, 0.98))
    adam = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.01, betas=(0.9, 0.98))
    ours, theirs = schedule(optimizer), schedule(adam)
    for step in range(3):
        (group,), (other,) = optimizer.param_groups, adam.param_groups
        assert (group["lr"], group["betas"]) == (other["lr"], other["betas"])
        if expected is not None and step < 2:
            assert (group["lr"], group["betas"][0]) == pytest.approx(expected[step])
        before = values(model)
        train(optimizer, model, loss_fn, 1, start=step)
        assert not same(values(model), before)
        ours.step()
        adam.step()
        theirs.step()
    assert len({len(values(model))}) == 1


def test_the_scheduled_learning_rate_is_the_one_used():
    halved, loss_fn, optimizer = make(lr=0.02, fisher="type-2")
    optimizer.param_groups[0]["lr"] = 0.01
    train(optimizer, halved, loss_fn, 1)
    plain, loss_fn, optimizer = make(lr=0.01, fisher="type-2")
    train(optimizer, plain, loss_fn, 1)
    assert same(values(halved), values(plain))


def test_a_tensor_as_learning_rate():
    one, loss_fn, optimizer = make(lr=torch.tensor(0.01))
    train(optimizer, one, loss_fn, 2)
    other, loss_fn, optimizer = make(lr=float(torch.tensor(0.01)))
    train(optimizer, other, loss_fn, 2)
    assert same(values(one), values(other))


def test_a_closure_is_called_once_with_gradients_and_its_loss_returned():
    model, loss_fn, optimizer = make()
    twin, twin_loss, twin_optimizer = make()
    x, y = make_data(seed=0)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    train(twin_optimizer, twin, twin_loss, 1)
    assert calls == [True]
    assert loss.item() == loss_fn(make_model()(x), y).item()
    assert same(values(model), values(twin))


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    model, loss_fn, optimizer = make()
    x, y = make_data()
    loss_fn(model(x), y).backward()
    optimizer.zero_grad(set_to_none=to_none)
    for parameter in model.parameters():
        assert (parameter.grad is None) if to_none else not parameter.grad.any()


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_rule": "quadratic"},
        {"damping": kfac_tn.optim.LevenbergMarquardt(interval=1)},
        {"curvature": "ekfac"},
        {"factor_interval": "auto", "inverse_interval": "auto"},
    ],
    ids=["adaptive", "quadratic", "measured damping", "ekfac", "automatic intervals"],
)
def test_it_does_not_matter_where_in_the_loop_gradients_are_reset(options):
    """Many loops do it after the loss and before its backward pass."""
    ends = []
    for place in ("start", "before the loss", "before the backward pass", "end"):
        torch.manual_seed(0)
        loss_fn, (x, y) = nn.CrossEntropyLoss(), make_data()
        wide = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 20), nn.Tanh(), nn.Linear(20, 3))
        wide = wide.to(x)
        optimizer = kfac_tn.KFAC(wide, loss_fn, **{"factor_interval": 1, **options})
        for _ in range(6):
            if place == "start":
                optimizer.zero_grad()
            outputs = wide(x)
            if place == "before the loss":
                optimizer.zero_grad()
            loss = loss_fn(outputs, y)
            if place == "before the backward pass":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if place == "end":
                optimizer.zero_grad()
        ends.append(values(wide))
    assert all(same(end, ends[0]) for end in ends)


def test_a_step_without_gradients_does_nothing():
    model, _, optimizer = make()
    before = values(model)
    optimizer.step()
    assert same(values(model), before)
    assert optimizer.factors() == {}


def test_step_hooks_of_torch_run():
    model, loss_fn, optimizer = make()
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    train(optimizer, model, loss_fn, 1)
    assert seen == ["before", "after"]


# What it tells -----------------------------------------------------------------------------------


def test_coverage_names_every_parameter_its_treatment_and_why():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2, bias=False)
    )
    model[1].bias.requires_grad_(False)
    optimizer = kfac_tn.KFAC(
        model, nn.CrossEntropyLoss(), approximation={"0": "reduce", "3": "expand"}
    )
    rows = [(row.parameter, row.shape, row.treatment, row.why) for row in optimizer.coverage()]
    conv = "Conv2d: factors 2 x 10 in 2 groups"
    assert rows == [
        ("0.weight", (4, 1, 3, 3), "KFAC-reduce", conv),
        ("0.bias", (4,), "KFAC-reduce", conv),
        ("1.weight", (4,), "Adam", "GroupNorm has no Kronecker structure here"),
        ("1.bias", (4,), "none", "frozen"),
        ("3.weight", (2, 4), "KFAC-expand", "Linear: factors 2 x 4"),
    ]
    table = repr(optimizer.coverage()).splitlines()
    assert len(table) == 6
    assert all(row[0] in line and row[3] in line for row, line in zip(rows, table[1:], strict=True))
    assert repr(optimizer.coverage()) in repr(optimizer)
    assert "lr: " in repr(optimizer)


def test_factors_are_shown_by_layer():
    model, loss_fn, optimizer = make()
    train(optimizer, model, loss_fn, 1)
    assert {name: tuple(f.input.shape) for name, f in optimizer.factors().items()} == {
        "0": (2, 9, 9),
        "3": (1, 17, 17),
    }


@pytest.mark.parametrize("make_one", [kfac_tn.KFAC, kfac_tn.KFACPreconditioner])
def test_a_loss_that_is_never_called_is_an_error_that_helps(make_one):
    model = make_model()
    optimizer = make_one(model, nn.CrossEntropyLoss())
    x, y = make_data()
    before = values(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"observe\(outputs, targets\)"):
        optimizer.step()
    assert same(values(model), before)
    with torch.no_grad():
        model[0].weight.zero_()


def test_observe_in_training_equals_the_loss_module():
    model, loss_fn, optimizer = make(step_rule="graft")
    train(optimizer, model, loss_fn, 3)
    twin, _, optimizer = make(step_rule="graft")
    for step in range(3):
        x, y = make_data(seed=step)
        optimizer.zero_grad()
        output = twin(x)
        optimizer.observe(output, y)
        F.cross_entropy(output, y).backward()
        optimizer.step()
    assert same(values(model), values(twin))


@pytest.mark.parametrize(
    "loss_fn", [nn.L1Loss(), F.cross_entropy, nn.MSELoss], ids=["module", "function", "class"]
)
def test_unknown_losses_are_refused(loss_fn):
    model = make_model()
    with pytest.raises(TypeError, match="no likelihood is known"):
        kfac_tn.KFAC(model, loss_fn)
    assert not any(m._forward_hooks for m in model.modules())


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.called = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.called(F.linear(x, self.used.weight, self.used.bias).tanh())


def test_a_weight_used_functionally_is_trained_and_the_user_told_once():
    model = Functional()
    loss_fn = nn.CrossEntropyLoss()
    options = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.0}
    optimizer = kfac_tn.KFAC(model, loss_fn, **options)
    adam_model = Functional()
    adam = torch.optim.AdamW(adam_model.used.parameters(), **options)
    x, y = torch.rand(6, 4), torch.randint(3, (6,))
    pairs = list(zip(model.used.parameters(), adam_model.used.parameters(), strict=True))

    def step():
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        for ours, theirs in pairs:
            theirs.grad = ours.grad.clone()
        optimizer.step()
        adam.step()

    with pytest.warns(RuntimeWarning, match="'used'"):
        step()
    step()  # any further warning is an error here
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_a_layer_frozen_later_stands_still():
    model, loss_fn, optimizer = make()
    train(optimizer, model, loss_fn, 1)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with pytest.warns(RuntimeWarning, match="without curvature"):
        train(optimizer, model, loss_fn, 2, start=1)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[0].bias, before[1])


def test_after_close_the_curvature_stays():
    model, loss_fn, optimizer = make()
    train(optimizer, model, loss_fn, 1)
    kept = {name: f.input.clone() for name, f in optimizer.factors().items()}
    optimizer.close()
    before = values(model)
    train(optimizer, model, loss_fn, 2, start=1)
    assert not same(values(model), before)
    assert all(torch.equal(f.input, kept[name]) for name, f in optimizer.factors().items())


# What isn't finite -------------------------------------------------------------------------------


def snapshot(model, optimizer):
    state = optimizer.state_dict()
    tensors = values(model)
    for entry in state["state"].values():
        tensors += [entry[key].clone() for key in sorted(entry)]
    for _, entry in sorted(state["curvature"]["factors"].items()):
        tensors += [value.clone() for value in entry.values() if torch.is_tensor(value)]
    return tensors


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["inputs", "targets", "gradient"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "mc"])
def test_what_is_not_finite_changes_nothing_and_warns_once(bad, where, fisher):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model, loss_fn, optimizer = make(model, nn.MSELoss(), fisher=fisher)
    x, y = torch.rand(2, 5, 3).double().unbind(0)
    y = y[:, :2].clone()

    def step(x, y, break_gradient=False):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        if break_gradient:
            model[0].bias.grad[0] = bad
        optimizer.step()

    step(x, y)
    before = snapshot(model, optimizer)
    bad_x, bad_y = x.clone(), y.clone()
    (bad_x if where == "inputs" else bad_y)[0, 0] = bad
    bad_step = (x, y, True) if where == "gradient" else (bad_x, bad_y)
    with pytest.warns(RuntimeWarning, match="isn't finite"):
        step(*bad_step)
    step(*bad_step)  # any further warning is an error here
    assert same(snapshot(model, optimizer), before)
    step(x, y)
    assert not same(snapshot(model, optimizer), before)
    assert all(value.isfinite().all() for value in snapshot(model, optimizer))


@pytest.mark.parametrize("batch", ["empty", "summed, empty", "all ignored", "summed, all ignored"])
def test_batches_without_a_term_change_nothing_and_warn(batch):
    """Their gradients are zero, which isn't to say that momentum should go on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    loss_fn = nn.CrossEntropyLoss(reduction="sum" if "summed" in batch else "mean")
    model, loss_fn, optimizer = make(model, loss_fn)
    x, y = torch.rand(5, 3).double(), torch.randint(2, (5,))
    nothing = (x, torch.full_like(y, -100)) if "ignored" in batch else (x[:0], y[:0])

    def step(*batches):
        losses = [loss_fn(model(inputs), targets) for inputs, targets in batches]
        optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        optimizer.step()

    step((x, y))
    before = snapshot(model, optimizer)
    with pytest.warns(RuntimeWarning, match=r"gradients are zero.*empty"):
        step(nothing)
    assert same(snapshot(model, optimizer), before)
    if batch == "empty":  # of a part there is nothing to say
        step(nothing, (x, y))
        assert not same(snapshot(model, optimizer), before)


def test_the_preconditioner_tells_of_an_empty_batch():
    model, loss_fn = nn.Linear(3, 2), nn.MSELoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn)
    loss_fn(model(torch.rand(0, 3)), torch.rand(0, 2)).backward()
    with pytest.warns(RuntimeWarning, match="gradients are zero"):
        assert not preconditioner.step()
    model.zero_grad()
    loss_fn(model(torch.rand(4, 3)), torch.rand(4, 2)).backward()
    assert preconditioner.step()


def test_an_infinite_input_that_the_model_forgives_does_not_poison_the_factors():
    """Gradients may be finite where the input factor isn't: clamped units, ReLU's dead ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardtanh(), nn.Linear(4, 2)).double()
    model, loss_fn, optimizer = make(model, nn.MSELoss(), fisher="type-2")
    x, y = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    big = x.clone()
    big[0] = 1e200  # its square overflows
    for inputs in (x, big, x):
        optimizer.zero_grad()
        loss_fn(model(inputs), y).backward()
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(posinf=1.0, neginf=-1.0)
        if inputs is big:
            before = snapshot(model, optimizer)[len(list(model.parameters())) * 4 :]
            with pytest.warns(RuntimeWarning, match="curvature of a batch isn't finite"):
                optimizer.step()
            after = snapshot(model, optimizer)[len(list(model.parameters())) * 4 :]
            assert same(before, after)
        else:
            optimizer.step()
    assert all(value.isfinite().all() for value in snapshot(model, optimizer))


@pytest.mark.parametrize(
    ("tensors", "finite"),
    [
        ([torch.zeros(2), torch.zeros(0)], True),
        ([torch.full((3,), 3e38)], False),  # its square isn't
        ([torch.full((3,), 3e38, dtype=torch.bfloat16)], False),
        ([torch.full((3,), 3e38, dtype=torch.float64)], True),
        ([torch.ones(2), torch.full((3,), 1e200, dtype=torch.float64)], False),
        ([torch.tensor(6e4, dtype=torch.float16)], True),
        ([torch.zeros(2), torch.tensor([0.0, torch.nan])], False),
        ([torch.tensor(-torch.inf, dtype=torch.bfloat16), torch.zeros(1)], False),
    ],
)
def test_all_finite(tensors, finite):
    assert all_finite(tensors) is finite


def test_dead_layers_and_zero_inputs():
    """Singular and zero factors: every step stays finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100)  # all units dead: B of the first layer is zero
    for relative in (True, False):
        twin = copy.deepcopy(model)
        twin, loss_fn, optimizer = make(twin, relative_damping=relative)
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(twin(torch.zeros(5, 3)), torch.randint(2, (5,))).backward()
            optimizer.step()
        assert all(p.isfinite().all() for p in twin.parameters())
        assert not torch.equal(twin[2].bias, model[2].bias)


def test_factors_that_cannot_be_inverted_are_reported_and_the_last_inverse_kept():
    model, loss_fn, optimizer = make(fisher="type-2")
    train(optimizer, model, loss_fn, 1)
    moving = next(m for m in optimizer._estimator._moving if m.blocks[0].name == "0")
    kept = moving.input_inverse.clone()
    moving.input -= 1e6 * torch.eye(9).double()
    with pytest.warns(RuntimeWarning, match="layer '0' can't be inverted.*last good inverse"):
        train(optimizer, model, loss_fn, 1, start=1)
    assert torch.equal(moving.input_inverse, kept)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "step_rule", [kfac_tn.optim.Adaptive(interval=1), "quadratic"], ids=["adaptive", "quadratic"]
)
def test_a_measurement_that_fails_leaves_the_parameters_and_training_goes_on(step_rule):
    """The error is the user's to see; all that counts steps has counted this one."""
    failing = []

    class Fails(nn.Sequential):
        def forward(self, x):
            if failing:
                raise RuntimeError("out of memory")
            return super().forward(x)

    model, loss_fn, optimizer = make(Fails(*make_model()), step_rule=step_rule)
    train(optimizer, model, loss_fn, 2)
    before, (x, y) = values(model), make_data(seed=2)
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    failing.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    failing.clear()
    assert same(values(model), before)
    train(optimizer, model, loss_fn, 2, start=3)
    assert optimizer.steps_taken == 5
    assert all(state["step"] == 5 for state in optimizer.state.values())
    assert not same(values(model), before)
    assert all(value.isfinite().all() for value in snapshot(model, optimizer))


# TorchScript -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make_one", [kfac_tn.KFAC, kfac_tn.KFACPreconditioner])
def test_scripting_a_watched_model_says_what_to_do(make_one):
    model, (x, _) = make_model(), make_data()
    optimizer = make_one(model, nn.CrossEntropyLoss())
    with pytest.raises(AttributeError, match=r"call close\(\) of the optimizer before"):
        torch.jit.script(model)
    optimizer.close()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_watched_model_is_traced_as_if_nobody_watched():
    """Between the passes of a step, which notices nothing."""
    ends = []
    for traced in (False, True):
        model, loss_fn, optimizer = make()
        x, y = make_data()
        loss = loss_fn(model(x), y)
        if traced:
            script, alone = torch.jit.trace(model, x), torch.jit.trace(make_model(), x)
            kinds, expected = (
                [node.kind() for node in each.inlined_graph.nodes()] for each in (script, alone)
            )
            assert kinds == expected
            with torch.no_grad():
                torch.testing.assert_close(script(2 * x), model(2 * x))
        loss.backward()
        optimizer.step()
        ends.append(values(model))
    assert same(*ends)


# Intervals ---------------------------------------------------------------------------------------


def count_calls(monkeypatch, owner, name, steps_of):
    seen = []
    plain = getattr(owner, name)

    def spy(*args, **kwargs):
        seen.append(steps_of())
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return seen


@pytest.mark.parametrize("interval", [1, 3, 10])
def test_extra_passes_and_inversions_happen_when_due(monkeypatch, interval):
    """Every ``interval`` steps; at the beginning, more often."""
    model, loss_fn, optimizer = make(factor_interval=interval, inverse_interval=interval)
    estimator = optimizer._estimator
    passes = count_calls(monkeypatch, estimator.capture, "_differentiate", lambda: estimator.steps)
    inversions = count_calls(monkeypatch, inverse, "_cholesky_inverse", lambda: estimator.steps)
    records = count_calls(
        monkeypatch, estimator._moving[0].blocks[0].family, "input_factor", lambda: estimator.steps
    )
    train(optimizer, model, loss_fn, 8 * interval)
    late = [step for step in passes if step >= 5 * interval]
    assert late == list(range(5 * interval, 8 * interval, interval))
    gaps = [after - before for before, after in pairwise(passes)]
    assert passes[0] == 0
    assert gaps[0] == 1
    assert max(gaps) == interval
    assert sorted(set(inversions)) == passes
    assert sorted(set(records)) == passes


def test_between_updates_the_curvature_is_used_unchanged():
    model, loss_fn, optimizer = make(factor_interval=10, inverse_interval=10)
    train(optimizer, model, loss_fn, 51)
    kept = {name: f.input.clone() for name, f in optimizer.factors().items()}
    before = values(model)
    train(optimizer, model, loss_fn, 1, start=51)
    assert all(torch.equal(f.input, kept[name]) for name, f in optimizer.factors().items())
    assert not same(values(model), before)


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_keep_their_dtype_and_the_loss_falls(dtype):
    model, loss_fn, optimizer = make(make_model(dtype), lr=0.03)
    x, y = make_data(dtype=dtype)
    first = loss_fn(model(x), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert all(p.dtype == dtype for p in model.parameters())
    least = torch.promote_types(dtype, torch.float32)
    assert all(f.input.dtype == least for f in optimizer.factors().values())


# Checkpoints -------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("fisher", ["mc", "type-2"])
@pytest.mark.parametrize("split", ["pi", "exact"])
@pytest.mark.parametrize("cut", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_run_continues_from_a_checkpoint_bit_for_bit(fisher, split, cut, dtype):
    options = {
        "fisher": fisher,
        "damping_split": split,
        "factor_interval": 3,
        "inverse_interval": 4,
        "seed": 5,
    }
    model, loss_fn, optimizer = make(make_model(dtype), **options)
    train(optimizer, model, loss_fn, 2 * cut)
    first, loss_fn, optimizer = make(make_model(dtype), **options)
    train(optimizer, first, loss_fn, cut)
    saved = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second = make_model(dtype)
    second.load_state_dict(saved["model"])
    second, loss_fn, optimizer = make(second, **{**options, "seed": 6, "lr": 0.5})
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, second, loss_fn, cut, start=cut)
    assert same(values(model), values(second))


def test_loading_and_bad_gradients_forget_what_was_seen():
    """Also if the gradients are reset by the model, not by the optimizer."""
    results = []
    for interruption in ("none", "load", "bad gradient"):
        model, loss_fn, optimizer = make(fisher="type-2")
        train(optimizer, model, loss_fn, 1)
        if interruption != "none":
            x, y = make_data(seed=7)
            loss_fn(model(x), y).backward()
        if interruption == "load":
            optimizer.load_state_dict(optimizer.state_dict())
        elif interruption == "bad gradient":
            model[0].bias.grad[0] = torch.nan
            with pytest.warns(RuntimeWarning, match="isn't finite"):
                optimizer.step()
        model.zero_grad()
        x, y = make_data(seed=8)
        loss_fn(model(x), y).backward()
        optimizer.step()
        results.append(values(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_loading_into_a_running_optimizer_goes_back():
    model, loss_fn, optimizer = make()
    train(optimizer, model, loss_fn, 2)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(optimizer, model, loss_fn, 2, start=2)
    expected = values(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, model, loss_fn, 2, start=2)
    assert same(values(model), expected)


def other_states():
    """States that don't belong to make_model()."""

    def of(model, *shape, steps=1):
        model, loss_fn, optimizer = make(model.double())
        for _ in range(steps):
            x, y = torch.rand(3, *shape).double(), torch.randint(2, (3,))
            loss_fn(model(x), y).backward()
            optimizer.step()
        return optimizer.state_dict()

    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4))
    ungrouped = nn.Sequential(nn.Conv2d(4, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    names = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 3))
    renamed = nn.Sequential(
        nn.Identity(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )
    adam = torch.optim.Adam(make_model().parameters())
    yield "renamed", of(renamed, 4, 3, 3), ValueError
    yield "wide", of(wide, 4, 3, 3), ValueError
    yield "ungrouped", of(ungrouped, 4, 3, 3), ValueError
    yield "names", of(names, 4, 3, 3), ValueError
    yield "another optimizer", adam.state_dict(), ValueError
    yield "more groups", of(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), 4, 3, 3), ValueError


@pytest.mark.parametrize("case", list(other_states()), ids=lambda case: case[0])
def test_another_models_state_is_refused_and_nothing_changed(case):
    _, state, error = case
    model, loss_fn, optimizer = make()
    train(optimizer, model, loss_fn, 2)
    before, steps = snapshot(model, optimizer), optimizer._estimator.steps
    with pytest.raises(error):
        optimizer.load_state_dict(state)
    assert same(snapshot(model, optimizer), before)
    assert optimizer._estimator.steps == steps
