"""What people do with an optimizer besides calling step: precision, freezing, copies, GANs."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import kfac_tn

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
EAGER = {"factor_interval": 1, "inverse_interval": 1, "fisher": "type-2"}
RULES = ["graft", "kl_clip", "fixed"]


def make_model(dtype=torch.float64) -> nn.Sequential:
    """Convolution, normalization, linear layer."""
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers).to(dtype)


def make_data(seed=0, n=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (n,), generator=generator)


def make(model=None, **options):
    model = make_model() if model is None else model
    loss_fn = nn.CrossEntropyLoss()
    return model, loss_fn, kfac_tn.KFAC(model, loss_fn, **{**EAGER, **options})


def train(model, loss_fn, optimizer, steps, start=0, call=None):
    losses = []
    for step in range(start, start + steps):
        x, y = make_data(step, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = loss_fn((call or model)(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_close(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-12, **tolerance})


# Precision ---------------------------------------------------------------------------------------


def autocast_run(rule, dtype, scaler=None, unscale=False):
    lr = 0.01 if rule == "graft" else 0.1
    model, loss_fn, optimizer = make(make_model(torch.float32), step_rule=rule, lr=lr, damping=0.1)
    for step in range(5):
        x, y = make_data(step, dtype=torch.float32)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_fn(model(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
    assert all(f.input.dtype == torch.float32 for f in optimizer.factors().values())
    return values(model)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("unscale", [True, False])
def test_a_scaler_changes_nothing(rule, dtype, unscale):
    """A power of two is exact in every precision, but for what would underflow without it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, plain = autocast_run(rule, dtype, scaler, unscale), autocast_run(rule, dtype)
    assert_close(scaled, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_full_precision(rule, dtype):
    """As closely as the forward pass in half precision allows."""
    start = values(make_model(torch.float32))
    half, full = (
        torch.cat([(b - a).flatten() for a, b in zip(start, autocast_run(rule, kind), strict=True)])
        for kind in (dtype, torch.float32)
    )
    assert (half - full).norm() < (0.15 if dtype == torch.bfloat16 else 0.02) * full.norm()


def test_a_step_that_the_scaler_skips_leaves_no_trace():
    """An overflow in fp16: neither parameters nor curvature nor the number of steps change."""
    model, loss_fn, optimizer = make(make_model(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(seed, scale=1.0):
        x, y = make_data(seed, dtype=torch.float32)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_fn(model(x), y)
        scaler.scale(loss * scale).backward()
        scaler.step(optimizer)
        scaler.update()

    step(0)
    before = values(model), optimizer.state_dict()["curvature"]["steps"]
    kept = {name: f.input.clone() for name, f in optimizer.factors().items()}
    step(1, scale=torch.inf)
    assert scaler.get_scale() == 2.0**9
    assert same(before[0], values(model))
    assert optimizer.state_dict()["curvature"]["steps"] == before[1]
    assert all(torch.equal(f.input, kept[name]) for name, f in optimizer.factors().items())
    step(2)
    assert not same(before[0], values(model))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_models_in_half_precision_train(rule, dtype):
    model, loss_fn, optimizer = make(make_model(dtype), step_rule=rule, lr=0.03)
    losses = [0.0]
    x, y = make_data(dtype=dtype)
    for step in range(30):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses[step > 0 :] = [loss.item()]
    assert losses[-1] < 0.7 * loss_fn(make_model(dtype)(x), y).item()
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


def test_clipping_of_gradients_acts_on_what_kfac_sees():
    """Clipped by hand or by torch: the same steps; without clipping others."""
    results = []
    for clip in ("torch", "hand", "none"):
        model, loss_fn, optimizer = make(step_rule="fixed", lr=0.1)
        for step in range(3):
            x, y = make_data(step)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            grads = [p.grad for p in model.parameters()]
            norm = torch.cat([g.flatten() for g in grads]).norm()
            if clip == "torch":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            elif clip == "hand":
                assert norm > 0.05
                for g in grads:
                    g.mul_(0.05 / (norm + 1e-6))
            optimizer.step()
        results.append(values(model))
    assert_close(results[0], results[1])
    assert not torch.allclose(results[0][0], results[2][0], rtol=1e-3)


def attack(loss, x, model):
    """Gradients of the inputs alone, as adversarial training takes them."""
    torch.autograd.grad(loss, x)


def attack_in_place(loss, x, model):
    loss.backward(inputs=[x])


def penalty(loss, x, model):
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient.square().sum().item()


def by_hand(loss, x, model):
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


def in_two_parts(loss, x, model):
    """The first ends within the graph, below a frozen head."""
    (gradient,) = torch.autograd.grad(loss, model[3].features, retain_graph=True)
    model[3].features.backward(gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"step_rule": "quadratic"}, {"fisher": "empirical"}])
@pytest.mark.parametrize("extra", [None, attack, attack_in_place, penalty])
@pytest.mark.parametrize("way", [None, by_hand, in_two_parts])
def test_only_passes_that_train_the_model_count(reduction, options, extra, way):
    """Attacks on inputs see other losses than training does, and of a sum loss they'd add up."""
    if way is in_two_parts and options.get("fisher") == "empirical":
        pytest.skip("it takes the gradients of the pass in which the loss is")
    results = []
    for extra_pass, backward in ((None, None), (extra, way)):
        model, loss_fn = make_model(), nn.CrossEntropyLoss(reduction=reduction)
        model[4].requires_grad_(way is not in_two_parts)
        model[3].register_forward_hook(lambda module, args, y: setattr(module, "features", y))
        optimizer = kfac_tn.KFAC(model, loss_fn, **{**EAGER, **options})
        for step in range(4):
            x, y = make_data(step)
            optimizer.zero_grad()
            if extra_pass is not None:
                x_near = (x + 1).requires_grad_()
                extra_pass(loss_fn(model(x_near), y), x_near, model)
            loss = loss_fn(model(x), y)
            loss.backward() if backward is None else backward(loss, x, model)
            optimizer.step()
        results.append(values(model))
    assert_close(*results)


# Batches that are used again ---------------------------------------------------------------------

MEASURED = [
    {"step_rule": "adaptive", "lr": 1.0},  # so that curvature limits steps
    {"step_rule": "quadratic"},
    {"damping": kfac_tn.optim.LevenbergMarquardt(interval=1)},
]


class Centered(nn.Module):
    """Shifts and scales its input before all else."""

    def __init__(self, in_place):
        super().__init__()
        self.rest, self.in_place = make_model(), in_place

    def forward(self, x):
        return self.rest(x.sub_(1).mul_(3) if self.in_place else (x - 1) * 3)


@pytest.mark.parametrize("options", MEASURED)
@pytest.mark.parametrize("how", ["by the model", "by the loop"])
def test_inputs_and_targets_may_be_changed_in_place(options, how):
    results = []
    for in_place in (False, True):
        model, loss_fn, optimizer = make(Centered(in_place and how == "by the model"), **options)
        x_room, y_room = make_data()
        for step in range(4):
            optimizer.zero_grad()
            for x, y in (make_data(step), make_data(step + 10)):
                if in_place and how == "by the loop":
                    x, y = x_room.copy_(x), y_room.copy_(y)
                (loss_fn(model(x), y) / 2).backward()
            optimizer.step()
        results.append(values(model))
    assert_close(*results)


class Deep(nn.Module):
    """Leaves out some layers, by random numbers of a source that isn't torch's."""

    def __init__(self, draw):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6)).double()
        self.draw, self.used = draw, []

    def forward(self, x):
        self.used.append([])
        for layer in self.layers:
            if self.draw() < 0.5:
                x = x + layer(x.tanh())
                self.used[-1].append(layer)
        return x.mean(1)


@pytest.mark.parametrize("options", MEASURED)
@pytest.mark.parametrize("source", [random, numpy.random], ids=["Python", "NumPy"])
@pytest.mark.filterwarnings("ignore:Layer.*no call of it was seen")
def test_layers_left_out_at_random_are_left_out_again(options, source):
    source.seed(0)
    expected = [source.random() for _ in range(18)]
    source.seed(0)
    model, loss_fn, optimizer = make(Deep(source.random), **options)
    for step in range(3):
        x, y = make_data(step)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        assert len(model.used) > 1
        kept = [n for n, number in enumerate(expected[6 * step : 6 * step + 6]) if number < 0.5]
        assert all(used == [model.layers[n] for n in kept] for used in model.used)
        model.used.clear()


class Remembering(nn.Module):
    """Counts its calls, as schedules do, and keeps its features, as for a picture of them."""

    def __init__(self):
        super().__init__()
        self.rest, self.calls = make_model(), 0

    def forward(self, x):
        self.calls += 1
        self.features = self.rest[:4](x)
        return self.rest[4](self.features)


@pytest.mark.parametrize("options", MEASURED)
def test_what_a_model_keeps_is_of_the_users_own_calls(options):
    model, loss_fn, optimizer = make(Remembering(), **options)
    for step in range(3):
        x, y = make_data(step)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        kept = model.features
        optimizer.step()
        assert model.features is kept
        assert model.calls == step + 1
    for compute in (
        kfac_tn.compute_kfac,
        kfac_tn.compute_ekfac,
        kfac_tn.compute_ggn_diagonal,
        lambda model, loss_fn, loader: kfac_tn.compute_per_example_gradients(
            model, loss_fn, *loader[0]
        ),
    ):
        compute(model, loss_fn, [(x, y)])
        assert model.features is kept
        assert model.calls == 3


class Forces(nn.Module):
    """Classifies the gradient of an energy in the inputs, taken in a way of one's own or not."""

    def __init__(self, own):
        super().__init__()
        self.energy, self.head = make_model(), nn.Linear(8, 3).double()
        self.energy.requires_grad_(False)
        self.own = own

    def forward(self, x):
        with torch.set_grad_enabled(self.own or torch.is_grad_enabled()):
            x = x.detach().requires_grad_() if self.own else x
            (forces,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return self.head(forces.flatten(1))


@pytest.mark.parametrize("options", MEASURED)
def test_models_may_differentiate_something_themselves(options):
    results = []
    for own in (False, True):
        model, loss_fn, optimizer = make(Forces(own), **options)
        for step in range(4):
            x, y = make_data(step)
            optimizer.zero_grad()
            loss_fn(model(x.requires_grad_()), y).backward()
            optimizer.step()
        results.append(values(model))
    assert_close(*results)


# Accumulation, checkpointing, compilation --------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("interval", [1, 3])
def test_accumulation_equals_the_large_batch(rule, approximation, interval):
    options = {"step_rule": rule, "approximation": approximation, "lr": 0.02}
    options |= {"factor_interval": interval, "inverse_interval": interval}
    model, loss_fn, optimizer = make(**options)
    train(model, loss_fn, optimizer, 10)
    twin, loss_fn, optimizer = make(**options)
    for step in range(10):
        x, y = make_data(step)
        optimizer.zero_grad()
        for x_part, y_part in zip(x.split([1, 3, 2]), y.split([1, 3, 2]), strict=True):
            (loss_fn(twin(x_part), y_part) * len(x_part) / len(x)).backward()
        optimizer.step()
    assert_close(values(model), values(twin), rtol=1e-6, atol=1e-9)


def test_training_with_activation_checkpointing_is_the_same():
    model, loss_fn, optimizer = make(step_rule="graft")
    train(model, loss_fn, optimizer, 4)
    twin, loss_fn, optimizer = make(step_rule="graft")
    train(
        twin,
        loss_fn,
        optimizer,
        4,
        call=lambda x: twin[3:](checkpoint(twin[:3], x, use_reentrant=False)),
    )
    assert_close(values(model), values(twin))


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["wrapped, inside", "wrapped, outside", "in place"])
def test_compiled_models_take_the_same_steps(backend, how, fisher):
    """Whether KFAC is given the model or what torch.compile made of it."""
    torch._dynamo.reset()
    options = {"fisher": fisher, "factor_interval": 2}
    model, loss_fn, optimizer = make(**options)
    train(model, loss_fn, optimizer, 5)
    twin = make_model()
    if how == "in place":
        twin.compile(backend=backend)
        call = twin
    else:
        call = torch.compile(twin, backend=backend)
    given = call if how == "wrapped, outside" else twin
    _, loss_fn, optimizer = make(given, **options)
    train(twin, loss_fn, optimizer, 5, call=call)
    assert len(optimizer.factors()) == 2
    assert_close(values(model), values(twin))


@pytest.mark.slow
def test_models_compiled_by_inductor_take_the_same_steps():
    torch._dynamo.reset()
    model, loss_fn, optimizer = make()
    train(model, loss_fn, optimizer, 5)
    twin, loss_fn, optimizer = make()
    train(twin, loss_fn, optimizer, 5, call=torch.compile(twin))
    assert_close(values(model), values(twin))


# Groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
def test_groups_have_damping_of_their_own(relative):
    """Each layer as if its damping were everybody's."""

    def first_step(params=None, damping=1e-3):
        options = {"step_rule": "fixed", "relative_damping": relative, "damping": damping}
        model, loss_fn, optimizer = make(params=params, other_lr=None, **options, lr=0.1)
        train(model, loss_fn, optimizer, 1)
        return dict(model.named_parameters())

    model = make_model()
    groups = [
        {"params": [*model[0].parameters(), *model[1].parameters()], "damping": 0.5},
        {"params": list(model[4].parameters())},
    ]
    loss_fn = nn.CrossEntropyLoss()
    options = {"step_rule": "fixed", "relative_damping": relative, "lr": 0.1, "damping": 0.01}
    train(model, loss_fn, kfac_tn.KFAC(model, loss_fn, params=groups, **EAGER, **options), 1)
    high, low = first_step(damping=0.5), first_step(damping=0.01)
    for name, parameter in model.named_parameters():
        if name[0] != "1":  # has no curvature
            expected = (high if name[0] == "0" else low)[name]
            torch.testing.assert_close(parameter, expected, rtol=1e-10, atol=0)


def test_damping_may_change_at_any_time():
    results = []
    for change in (True, False):
        model, loss_fn, optimizer = make(damping=1.0 if change else 0.01)
        optimizer.param_groups[0]["damping"] = 0.01
        train(model, loss_fn, optimizer, 1)
        results.append(values(model))
    assert same(*results)


def test_a_layer_cannot_have_two_dampings():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    weights = [p for name, p in model.named_parameters() if "weight" in name]
    groups = [{"params": weights}, {"params": biases, "damping": 0.5}]
    with pytest.raises(ValueError, match=r"'0' are one block.*give both groups one damping"):
        kfac_tn.KFAC(model, loss_fn, params=groups, **EAGER)
    assert not any(m._forward_hooks for m in [*model.modules(), loss_fn])
    groups = [{"params": weights}, {"params": biases, "lr": 0.5}]
    optimizer = kfac_tn.KFAC(model, loss_fn, params=groups, **EAGER)
    train(model, loss_fn, optimizer, 1)
    optimizer.param_groups[0]["damping"] = 0.5
    before = values(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="one damping"):
        train(model, loss_fn, optimizer, 1, start=1)
    assert same(before[0], values(model))
    assert before[1]["curvature"]["steps"] == optimizer.state_dict()["curvature"]["steps"]


# Freezing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reset", ["optimizer", "model"])
def test_layers_unfrozen_later_are_trained_with_curvature_and_the_others_keep_theirs(rule, reset):
    model = make_model()
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    model, loss_fn, optimizer = make(model, step_rule=rule, factor_interval=50, lr=0.01)
    train(model, loss_fn, optimizer, 3)
    assert list(optimizer.factors()) == ["4"]
    kept = optimizer.factors()["4"].input.clone()
    frozen = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    for step in range(3, 6):
        x, y = make_data(step)
        (optimizer if reset == "optimizer" else model).zero_grad()
        loss_fn(model(x), y).backward()
        with warnings.catch_warnings():
            # If KFAC can't know before the step, this layer's first one is without curvature.
            warnings.simplefilter("error" if reset == "optimizer" else "ignore")
            optimizer.step()
        if step == 3 and reset == "optimizer":
            assert set(optimizer.factors()) == {"0", "4"}
    assert set(optimizer.factors()) == {"0", "4"}
    assert optimizer.factors()["4"].input.shape == kept.shape
    assert optimizer._estimator._moving[1].updates[0] > 1  # goes on, not anew
    assert (model[0].weight - frozen).abs().max() > 1e-4
    treatments = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert treatments["0.weight"] == "KFAC-expand"
    assert treatments["4.bias"] == "none"


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("place", ["before the loss", "before the backward pass"])
@pytest.mark.parametrize("interval", [1, 20])
def test_gradients_may_be_reset_between_the_calls_of_what_was_unfrozen_and_their_loss(
    place, interval
):
    """The other layers' statistics of that step aren't lost, and the step after has all."""

    def run(reset):
        model = make_model()
        model[0].requires_grad_(False)
        model, loss_fn, optimizer = make(model, factor_interval=interval)
        known = []
        for step in range(7):
            if step == 4:
                model[0].requires_grad_(True)
            x, y = make_data(step)
            outputs = model(x)
            if place == "before the loss":
                reset(model, optimizer)
            loss = loss_fn(outputs, y)
            if place == "before the backward pass":
                reset(model, optimizer)
            loss.backward()
            optimizer.step()
            known.append(set(optimizer.factors()))
        return known, values(model)

    known, weights = run(lambda model, optimizer: optimizer.zero_grad())
    assert known == 5 * [{"4"}] + 2 * [{"0", "4"}]
    assert same(weights, run(lambda model, optimizer: model.zero_grad())[1])


def test_unfreezing_equals_having_been_trainable():
    """Once all is trainable, steps are those of an optimizer that had the state."""
    model = make_model()
    model[0].requires_grad_(False)
    model, loss_fn, optimizer = make(model, betas=(0.0, 0.0), factor_decay=0.0)
    train(model, loss_fn, optimizer, 2)
    model[0].requires_grad_(True)
    twin = copy.deepcopy(model)
    _, twin_loss, fresh = make(twin, betas=(0.0, 0.0), factor_decay=0.0)
    train(model, loss_fn, optimizer, 2, start=2)
    train(twin, twin_loss, fresh, 2, start=2)
    assert_close(values(model), values(twin))


def test_layers_frozen_for_a_while_keep_their_curvature():
    model, loss_fn, optimizer = make(factor_interval=100)
    train(model, loss_fn, optimizer, 3)
    kept = optimizer.factors()["0"].input.clone()
    model[0].requires_grad_(False)
    weight = model[0].weight.detach().clone()
    train(model, loss_fn, optimizer, 2, start=3)
    assert torch.equal(model[0].weight, weight)
    model[0].requires_grad_(True)
    train(model, loss_fn, optimizer, 1, start=5)
    assert not torch.equal(model[0].weight, weight)
    assert optimizer.factors()["0"].input.shape == kept.shape


def test_what_groups_left_out_can_be_added_when_unfrozen():
    model = make_model()
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, loss_fn, optimizer = make(model, params=[{"params": trained}])
    train(model, loss_fn, optimizer, 2)
    model[0].requires_grad_(True)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"'0.weight' was frozen.*add_param_group"):
        train(model, loss_fn, optimizer, 1)
    assert same(before, values(model))
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 1e-3, "damping": 0.1})
    train(model, loss_fn, optimizer, 2)
    assert set(optimizer.factors()) == {"0", "4"}
    assert not torch.equal(before[0], model[0].weight)


def test_a_run_continues_from_a_checkpoint_after_unfreezing():
    def run(cut=None):
        model = make_model()
        model[0].requires_grad_(False)
        model, loss_fn, optimizer = make(model, fisher="mc", factor_interval=7)
        for step in range(9):
            if step == 4:
                model[0].requires_grad_(True)
                optimizer.zero_grad()
            if step == cut:
                state = pickle.loads(pickle.dumps(optimizer.state_dict()))
                model = copy.deepcopy(model)
                model, loss_fn, optimizer = make(model, fisher="mc", factor_interval=7)
                optimizer.load_state_dict(state)
            train(model, loss_fn, optimizer, 1, start=step)
        return values(model)

    assert all(same(run(), run(cut)) for cut in (4, 5, 8))


@pytest.mark.parametrize("max_dim", [8192, 4])
@pytest.mark.parametrize("layer", [0, 4])
def test_a_run_continues_from_a_checkpoint_after_freezing(layer, max_dim):
    """Layers keep their curvature, of which the new optimizer can't know before it has the state.

    With the first a whole layer, with the last a bias: its row is where others of the same size
    have zeros.
    """

    def run(cut=None):
        options = {"fisher": "mc", "factor_interval": 5, "max_dim": max_dim}
        model, loss_fn, optimizer = make(**options)
        for step in range(12):
            part = model[0] if layer == 0 else model[4].bias
            if step == 4:
                part.requires_grad_(False)
            if step == cut:
                state = pickle.loads(pickle.dumps(optimizer.state_dict()))
                model = copy.deepcopy(model)
                model, loss_fn, optimizer = make(model, **options)
                optimizer.load_state_dict(state)
                part = model[0] if layer == 0 else model[4].bias
            if step == 9:
                part.requires_grad_(True)
            x, y = make_data(step)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a layer whose bias alone is frozen
                optimizer.step()
        return values(model)

    assert all(same(run(), run(cut)) for cut in (4, 5, 8, 10))


def test_a_state_with_a_bias_is_none_of_a_layer_without():
    """Even where factors are of one size: cut in pieces, they are filled up with zeros."""
    options = {"max_dim": 4, "step_rule": "graft"}
    model, loss_fn, optimizer = make(**options)
    train(model, loss_fn, optimizer, 1)
    other = make_model()
    other[0].bias = None
    _, _, fresh = make(other, **options)
    state = optimizer.state_dict()["curvature"]
    with pytest.raises(ValueError, match=r"layer '0' with parameters.*trainable here are"):
        fresh._estimator.check_state_dict(state)


def test_the_preconditioner_follows_too():
    model = make_model()
    model[0].requires_grad_(False)
    loss_fn = nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, **EAGER)
    x, y = make_data()
    loss_fn(model(x), y).backward()
    preconditioner.step()
    model[0].requires_grad_(True)
    for _ in range(2):
        model.zero_grad()
        loss_fn(model(x), y).backward()
        before = model[0].weight.grad.clone()
        preconditioner.step()
    assert set(preconditioner.factors()) == {"0", "4"}
    assert not torch.allclose(before, model[0].weight.grad)
    model.float().zero_grad()
    loss_fn(model(x.float()), y).backward()
    preconditioner.step()
    assert preconditioner.factors()["0"].input.dtype == torch.float32


# Changes of dtype --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reset", ["optimizer", "model"])
def test_a_model_may_change_its_dtype(rule, reset):
    """From float32 to float64: as if it had been float64 all along, up to float32's rounding."""
    split = "exact" if rule == "fixed" else "pi"
    options = {"step_rule": rule, "factor_interval": 3, "inverse_interval": 3}
    options["damping_split"] = split
    model, loss_fn, optimizer = make(make_model(torch.float32), **options)
    train(model, loss_fn, optimizer, 4)
    model.double()
    if reset == "model":
        model.zero_grad()
        x, y = make_data(4)
        loss_fn(model(x), y).backward()
        optimizer.step()
    else:
        train(model, loss_fn, optimizer, 1, start=4)
    train(model, loss_fn, optimizer, 3, start=5)
    twin, loss_fn, twin_optimizer = make(**options)
    train(twin, loss_fn, twin_optimizer, 8)
    assert_close(values(model), values(twin), rtol=1e-3, atol=1e-4)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert all(f.input.dtype == torch.float64 for f in optimizer.factors().values())
    state = optimizer.state[model[0].weight]
    assert state["exp_avg"].dtype == torch.float64
    model.bfloat16()
    train(model, loss_fn, optimizer, 2, start=8)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(f.input.dtype == torch.float32 for f in optimizer.factors().values())


# Copies ------------------------------------------------------------------------------------------


def by_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


def by_torch_save(objects):
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_it", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_copies_of_model_loss_and_optimizer_train_on_their_own(copy_it, fisher, steps):
    options = {"fisher": fisher, "factor_interval": 2, "inverse_interval": 3, "lr": 0.02}
    model, loss_fn, optimizer = make(**options)
    optimizer.param_groups[0]["lr"] = 0.03
    train(model, loss_fn, optimizer, steps)
    twin, twin_loss, twin_optimizer = copy_it((model, loss_fn, optimizer))
    before = values(model)
    train(twin, twin_loss, twin_optimizer, 4, start=steps)
    assert same(before, values(model))
    assert twin_optimizer.factors().keys() == {"0", "4"}
    assert not same(before, values(twin))
    train(model, loss_fn, optimizer, 4, start=steps)
    assert same(values(model), values(twin))


def frozen(model):
    model[0].requires_grad_(False)


def frozen_in_part(model):
    model[4].bias.requires_grad_(False)


def pruned(model):
    prune.l1_unstructured(model[4], "weight", 2)


@pytest.mark.parametrize("kind", ["optimizer", "preconditioner"])
@pytest.mark.parametrize("change", [frozen, frozen_in_part, pruned])
@pytest.mark.parametrize("steps", [0, 1])
def test_copies_are_possible_once_the_model_was_changed(kind, change, steps):
    """Layers frozen later keep their curvature, in copies, too; they may return."""
    model, loss_fn, optimizer = make(**({} if kind == "optimizer" else {"step_rule": "graft"}))
    if kind == "preconditioner":
        optimizer.close()
        preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, **EAGER)
    sgd = torch.optim.SGD(model.parameters(), 0.1)

    def step(model, loss_fn, optimizers, seed):
        x, y = make_data(seed)
        model.zero_grad()
        loss_fn(model(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a layer whose bias alone is frozen
            for each in optimizers:
                each.step()

    trio = model, loss_fn, [optimizer] if kind == "optimizer" else [preconditioner, sgd]
    for seed in range(2):
        step(*trio, seed)
    change(model)
    for seed in range(2, 2 + steps):
        step(*trio, seed)
    if change is pruned:  # else torch can't copy the product with the mask
        model[4].weight = model[4].weight.detach()
    twins = [copy.deepcopy(trio), pickle.loads(pickle.dumps(trio))]
    for each in (trio, *twins):
        step(*each, 5)
        if change is not pruned:
            each[0].requires_grad_(True)
        step(*each, 6)
        step(*each, 7)
    for twin in twins:
        if steps:  # else the copies know of the change already when their next loss is computed
            assert same(values(model), values(twin[0]))
        assert trio[2][0].factors().keys() == twin[2][0].factors().keys()


def test_a_copied_optimizer_alone_has_a_copy_of_its_model():
    model, loss_fn, optimizer = make()
    train(model, loss_fn, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    before = values(model)
    (group,) = twin.param_groups
    assert same(before, group["params"])
    assert not {id(p) for p in group["params"]} & {id(p) for p in model.parameters()}
    train(model, loss_fn, optimizer, 2, start=2)
    assert same(before, group["params"])


@pytest.mark.parametrize("copy_it", [copy.deepcopy, by_pickle])
def test_copies_of_the_preconditioner_belong_to_the_copied_model(copy_it):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, **EAGER)

    def gradients(model, loss_fn, preconditioner, seed):
        x, y = make_data(seed)
        model.zero_grad()
        loss_fn(model(x), y).backward()
        preconditioner.step()
        return [p.grad.clone() for p in model.parameters()]

    gradients(model, loss_fn, preconditioner, 0)
    copied = copy_it((model, loss_fn, preconditioner))
    expected = gradients(model, loss_fn, preconditioner, 1)
    assert same(gradients(*copied, 1), expected)


@pytest.mark.parametrize("kind", [kfac_tn.KFAC, kfac_tn.KFACPreconditioner])
def test_shallow_copies_are_refused(kind):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match=r"copy\.deepcopy.*state_dict"):
        copy.copy(kind(model, loss_fn))


# Several at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_loss", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_two_optimizers_of_a_gan_do_not_mix(shared_loss, freeze):
    """Each has the factors that it has when its part of the step is all that it sees."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    losses = [nn.BCEWithLogitsLoss()] * 2
    if not shared_loss:
        losses = [nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()]
    options = {**EAGER, "factor_decay": 0.0}
    # The generator's outputs aren't what the loss is of: there is nothing to measure steps on.
    g_optimizer = kfac_tn.KFAC(generator, losses[0], step_rule="graft", **options)
    c_optimizer = kfac_tn.KFAC(critic, losses[1], **options)
    ones, zeros = torch.ones(5, 1).double(), torch.zeros(5, 1).double()
    for _ in range(3):
        real, noise = torch.rand(5, 3).double(), torch.rand(5, 2).double()
        critic.requires_grad_(True)
        before = copy.deepcopy((generator, critic))
        c_optimizer.zero_grad()
        fake = generator(noise)
        loss = losses[1](critic(real), ones) + losses[1](critic(fake.detach()), zeros)
        loss.backward()
        c_optimizer.step()
        trained = copy.deepcopy(critic)
        if freeze:
            critic.requires_grad_(False)
        g_optimizer.zero_grad()
        losses[0](critic(generator(noise)), ones).backward()
        g_optimizer.step()
    both = torch.cat([real, fake.detach()])
    loss_sum = nn.BCEWithLogitsLoss(reduction="sum")
    targets = torch.cat([ones, zeros])
    expected = kfac_tn.compute_kfac(
        before[1], loss_sum, [(both, targets)], fisher="type-2", bias="joint"
    )
    for name, factors in c_optimizer.factors().items():
        block = expected.blocks[name]
        torch.testing.assert_close(factors.input, block.input_factor)
        torch.testing.assert_close(factors.grad_output, block.grad_output_factor / 5)
    whole = nn.Sequential(before[0], trained).requires_grad_(True)
    data = [(noise, ones)]
    loss_mean = nn.BCEWithLogitsLoss()
    expected = kfac_tn.compute_kfac(whole, loss_mean, data, fisher="type-2", bias="joint")
    for name, factors in g_optimizer.factors().items():
        block = expected.blocks[f"0.{name}"]
        torch.testing.assert_close(factors.input, block.input_factor)
        torch.testing.assert_close(factors.grad_output, block.grad_output_factor)
