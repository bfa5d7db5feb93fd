"""The batch of a step is computed once more as it was computed, and is of the user's objective."""

from __future__ import annotations

import dataclasses
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import kfac_tn
from kfac_tn import testing
from kfac_tn.optim import Adaptive, LevenbergMarquardt, QuadraticModel

EAGER = {"factor_interval": 1, "inverse_interval": 1, "fisher": "type-2"}
RULES = {
    "adaptive": lambda: {"step_rule": Adaptive(interval=1)},
    "quadratic": lambda: {"step_rule": QuadraticModel(relative_norm=None)},
    "Levenberg-Marquardt": lambda: {"step_rule": "graft", "damping": LevenbergMarquardt(0.1)},
}


def data(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, x.sin().sum(1, keepdim=True)


def network(seed=0, last=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, last)).double()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def measured(optimizer):
    """All that was learned from measurements."""
    rule = optimizer._rule.state_dict()
    return rule.get("excess"), rule.get("coefficients"), optimizer.param_groups[0]["damping"]


def same(one, other, **tolerances):
    pairs = zip(measured(one), measured(other), strict=True)
    for a, b in ((a, b) for a, b in pairs if a is not None):
        torch.testing.assert_close(a, b, **tolerances)


# The model as it was called ----------------------------------------------------------------------


class Recurrent(nn.Module):
    """Truncated back-propagation through time: the state of the last call is the next one's."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.cell, self.last = way, nn.Linear(10, 6), nn.Linear(6, 1)
        self.state = torch.zeros(12, 6)
        if way == "buffer":
            del self.state
            self.register_buffer("state", torch.zeros(12, 6))
        self.double()
        self.state = self.state.double()

    def forward(self, x, state=None):
        state = self.state if state is None else state
        h = torch.tanh(self.cell(torch.cat([x, state], 1)))
        if self.way == "attribute":
            self.state = h.detach()
        elif self.way == "buffer":
            self.state.copy_(h.detach())
        self.seen = h.detach()
        return self.last(h)


@pytest.mark.parametrize("way", ["attribute", "buffer"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_a_model_keeps_between_calls_is_as_in_the_call(rule, way):
    runs = []
    for kind in ("argument", way):
        model, loss_fn = Recurrent(kind), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **rule())
        state = torch.zeros(12, 6).double()
        for step in range(8):
            x, y = data(step)
            optimizer.zero_grad()
            outputs = model(x, state) if kind == "argument" else model(x)
            loss_fn(outputs, y).backward()
            state = model.seen
            optimizer.step()
        if kind != "argument":
            assert torch.equal(model.state, state)
        runs.append((flat(model), optimizer))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    same(runs[0][1], runs[1][1])


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, own):
        super().__init__()
        self.net = network()
        self.generator = torch.Generator().manual_seed(3) if own else None

    def forward(self, x, noise=None):
        if self.generator is not None:
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return self.net(x + noise)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_generators_of_ones_own_draw_the_same_numbers(rule):
    runs = []
    for own in (False, True):
        model, loss_fn = Noisy(own), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **rule())
        generator = torch.Generator().manual_seed(3)
        for step in range(6):
            x, y = data(step)
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            optimizer.zero_grad()
            loss_fn(model(x) if own else model(x, noise), y).backward()
            optimizer.step()
        runs.append((flat(model), optimizer))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    same(runs[0][1], runs[1][1])


def test_spectral_normalization_iterates_from_where_it_was():
    """The curvature of the call, whose power iteration began where the last one had ended."""
    model, loss_fn = network(), nn.MSELoss()
    spectral_norm(model[0])
    optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, step_rule=QuadraticModel(relative_norm=None))
    x, y = data()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    own = {n: p for n, p in model.named_parameters() if n.startswith("2")}

    def outputs(*values):
        current = {name: b.clone() for name, b in buffers.items()}
        named = dict(zip(own, values, strict=True))
        return torch.func.functional_call(model, {**current, **named}, (x,))

    jacobians = torch.autograd.functional.jacobian(outputs, tuple(own.values()))
    jacobian = torch.cat([j.reshape(len(x), -1) for j in jacobians], 1)
    model.load_state_dict({**model.state_dict(), **buffers})
    loss_fn(model(x), y).backward()
    slope = torch.cat([p.grad.flatten() for p in own.values()])
    before = torch.cat([p.detach().flatten() for p in own.values()])
    optimizer.step()
    step = torch.cat([p.detach().flatten() for p in own.values()]) - before
    ggn = jacobian.T @ jacobian * 2 / len(x)
    damping = optimizer._estimator.dampings()[model[2].weight]
    best = -(slope @ step) / (step @ ggn @ step + damping * step @ step)
    torch.testing.assert_close(best, torch.ones_like(best), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_modes_are_those_of_the_call(rule):
    """Evaluation may come between backward() and step()."""
    runs = []
    for evaluated in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)
        ).double()
        loss_fn = nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **rule())
        for step in range(6):
            x, y = data(step)
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss_fn(model.train()(x), y).backward()
            if evaluated:
                model.eval()
            optimizer.step()
            assert model.training is not evaluated
        runs.append((flat(model), optimizer))
    assert torch.equal(runs[0][0], runs[1][0])
    same(runs[0][1], runs[1][1], rtol=0, atol=0)


def masked(model, x):
    weights = {"0.weight": model[0].weight * (model[0].weight > 0)}
    return torch.func.functional_call(model, weights, (x,))


def divided(model, x):
    outputs = model(x)
    outputs /= 3
    return outputs


def filled(model, x):
    outputs = model(x)
    outputs[:2] = 0.5
    return outputs.view(-1, 1)


@pytest.mark.parametrize("call", [masked, divided, filled])
def test_outputs_that_the_model_itself_would_not_return_are_no_batch(call):
    model, loss_fn = network(), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=QuadraticModel(), **EAGER)
    x, y = data()
    loss_fn(call(model, x), y).backward()
    before = flat(model)
    with pytest.raises(RuntimeError, match="can't be recorded"):
        optimizer.step()
    assert torch.equal(flat(model), before)


COPIES = {
    "cast": lambda y: y.double(),
    "in another shape": lambda y: y.double().reshape(-1),
    "of another shape": lambda y: y[None][0].reshape(-1).double(),
    "copy": lambda y: y.clone(),
    "of another layout": lambda y: y.reshape(-1),
    "transposed": lambda y: y.view(4, 3, 2).transpose(1, 2),
    "the first of each": lambda y: y.view(4, 3, 2)[:, :-1].contiguous().view(-1, 2).double(),
    "masked": lambda y: y[torch.arange(12) % 3 > 0],
    "chosen": lambda y: y.index_select(0, torch.tensor([7, 2, 3, 11])).double(),
    "gathered": lambda y: y.gather(1, (torch.arange(12) % 2)[:, None]),
    "a column": lambda y: y.unbind(1)[1],
    "a part": lambda y: y.split([5, 7])[1],
    "backwards": lambda y: y.flip(0).roll(1, 0),
}


class Changed(nn.Module):
    """What is done with a model's outputs, in the model."""

    def __init__(self, rest, change):
        super().__init__()
        self.rest, self.change = rest, change

    def forward(self, x):
        return self.change(self.rest(x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", COPIES)
def test_outputs_may_be_copied_for_the_loss(rule, how):
    """As in ``loss_fn(logits.float().reshape(-1, C), y)``, behind autocast."""
    copy, twins = COPIES[how], []
    for within in (True, False):
        model, loss_fn = network(last=2).float(), nn.MSELoss()
        model = Changed(model, lambda y: y.T.contiguous().T)  # columns are what is contiguous
        model, after = (Changed(model, copy), lambda y: y) if within else (model, copy)
        optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.1, **EAGER, **RULES[rule]())
        for step in range(6):
            x, y = data(step)
            optimizer.zero_grad()
            outputs = after(model(x.float()))
            loss_fn(outputs, copy(y.expand(-1, 2).contiguous()).to(outputs)).backward()
            optimizer.step()
        twins.append((optimizer, flat(model)))
    (one, values), (other, expected) = twins
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    same(one, other, rtol=1e-5, atol=0)


@dataclasses.dataclass
class Answer:
    """As research code returns, unknown to torch."""

    text: str
    logits: torch.Tensor
    hidden: torch.Tensor


RETURNED = {
    "tuple": (lambda h, y: (y, h), lambda out: out[0]),
    "nested": (lambda h, y: [h, {"all": (h, y)}], lambda out: out[1]["all"][1]),
    "dataclass": (lambda h, y: Answer("yes", y, h), lambda out: out.logits),
    "part of a view": (lambda h, y: {"states": h, "y": y.mT}, lambda out: out["y"].mT),
}


class Returning(nn.Module):
    """A model that returns more than its prediction."""

    def __init__(self, structure):
        super().__init__()
        self.net, self.structure = network(), structure

    def forward(self, x):
        hidden = self.net[:2](x)
        return self.structure(hidden, self.net[2](hidden))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", RETURNED)
def test_models_may_return_more_than_the_loss_gets(rule, how):
    """As language models do: logits, hidden states, caches."""
    structure, logits = RETURNED[how]
    twins = []
    for model, after in ((network(), lambda out: out), (Returning(structure), logits)):
        loss_fn = nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.1, **EAGER, **RULES[rule]())
        for step in range(6):
            x, y = data(step)
            optimizer.zero_grad()
            loss_fn(after(model(x)), y).backward()
            optimizer.step()
        twins.append((optimizer, flat(model)))
    (one, values), (other, expected) = twins
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    same(one, other, rtol=1e-9, atol=1e-12)


def test_losses_of_several_outputs_are_one_objective():
    """Deep supervision: a loss of each exit, weighted."""
    model, loss_fn = Returning(lambda h, y: (h, y)), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **RULES["quadratic"]())
    x, y = data()
    hidden, outputs = model(x)
    loss = loss_fn(outputs, y) + 0.3 * loss_fn(hidden[:, :2], y.expand(-1, 2))
    loss.backward()
    replay, capture = optimizer._replay, optimizer._estimator.capture
    assert replay.check()
    torch.testing.assert_close(replay.loss(capture), loss.detach() / 1.3)
    generator = torch.Generator().manual_seed(1)
    vector = {p: torch.randn(p.shape, generator=generator).double() for p in model.parameters()}
    slope = sum((p.grad * v).sum() for p, v in vector.items())
    whole = testing.dense_ggn(model.net, loss_fn, x, y)
    v = torch.cat([vector[p].flatten() for p in model.net.parameters()])
    first = len(v) - vector[model.net[2].weight].numel() - 1
    exit_model = Changed(model.net[:2], lambda h: h[:, :2])
    part = testing.dense_ggn(exit_model, loss_fn, x, y.expand(-1, 2))
    expected = (v @ whole @ v + 0.3 * v[:first] @ part @ v[:first]) / 1.3
    for form, factor, *_ in (
        replay.gram([vector], slope, capture),
        replay.form(vector, torch.ones(4).double(), slope, capture),
    ):
        torch.testing.assert_close(form.squeeze(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(factor, torch.tensor(1.3).double(), rtol=1e-6, atol=0)


def test_losses_of_a_part_may_be_looked_at_after_the_backward_pass():
    """When the graph that tells which part is freed."""
    model, loss_fn = network(), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **RULES["adaptive"]())
    x, y = data()
    mask = torch.arange(len(x)) % 2 > 0
    outputs = model(x)[mask]
    loss = loss_fn(outputs, y[mask])
    loss.backward()
    assert loss_fn(outputs, y[mask]) == loss
    optimizer.step()
    assert optimizer._rule.excess.isfinite()


@pytest.mark.parametrize("rule", RULES)
def test_models_may_have_backward_hooks(rule):
    """For which torch puts a node of its own behind what the model returns."""
    twins = []
    for hooked in (False, True):
        model, loss_fn = network(), nn.MSELoss()
        if hooked:
            model.register_full_backward_hook(lambda module, inputs, outputs: None)
        optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.1, **EAGER, **RULES[rule]())
        for step in range(4):
            x, y = data(step)
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of inputs that require no gradient
                loss_fn(model(x)[2:], y[2:]).backward()
            optimizer.step()
        twins.append((optimizer, flat(model)))
    (one, values), (other, expected) = twins
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    same(one, other, rtol=1e-9, atol=1e-12)


def repeated(outputs):
    return outputs[torch.tensor([0, 1, 1])]


def scaled(outputs):
    return (2 * outputs)[:3]


def summed(outputs):
    return outputs.view(4, 3).sum(1, keepdim=True)[:3]


def clamped(outputs):
    chosen = outputs[:3].clone()
    with torch.no_grad():
        chosen.clamp_(-0.01, 0.01)
    return chosen


@pytest.mark.parametrize("change", [repeated, scaled, summed, clamped])
def test_what_is_more_than_a_selection_is_no_batch(change):
    model, loss_fn = network(), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, step_rule=QuadraticModel())
    x, y = data()
    loss_fn(change(model(x)), y[:3]).backward()
    before = flat(model)
    with pytest.raises(RuntimeError, match="can't be recorded"):
        optimizer.step()
    assert torch.equal(flat(model), before)


# The user's objective ----------------------------------------------------------------------------


def objective(how):
    """The gradient of a multiple of the same loss."""

    def backward(model, loss_fn, x, y):
        if isinstance(how, float):
            (how * loss_fn(model(x), y)).backward()
        elif how == "accumulated":
            for part, target in zip(x.chunk(3), y.chunk(3), strict=True):
                loss_fn(model(part), target).backward()
        else:
            parts = zip(x.chunk(3), y.chunk(3), strict=True)
            sum(loss_fn(model(part), target) for part, target in parts).backward()

    return backward


@pytest.mark.parametrize("how", [1.0, 2.0, 100.0, 0.01, "accumulated", "summed"])
def test_newtons_step_does_not_depend_on_the_scale_of_the_objective(how):
    model, loss_fn = network(), nn.MSELoss()
    model[0].requires_grad_(False)  # so that the loss is quadratic
    x, y = data()
    optimizer = kfac_tn.KFAC(
        model,
        loss_fn,
        step_rule=QuadraticModel(relative_norm=None),
        damping=1e-12,
        noise_damping=0,
        **EAGER,
    )
    objective(how)(model, loss_fn, x, y)
    optimizer.step()
    hidden = torch.cat([model[:2](x), torch.ones(len(x), 1)], 1)
    best = (hidden @ torch.linalg.lstsq(hidden, y).solution - y).square().mean()
    torch.testing.assert_close(loss_fn(model(x), y), best, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("how", [2.0, 100.0, 0.01, "accumulated"])
@pytest.mark.parametrize("rule", ["adaptive", "quadratic"])
def test_steps_do_not_depend_on_the_scale_of_the_objective(rule, how):
    runs = []
    for each in (1.0, how):
        model, loss_fn = network(), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, eps=0.0, **EAGER, **RULES[rule]())
        for step in range(6):
            optimizer.zero_grad()
            objective(each)(model, loss_fn, *data(step))
            optimizer.step()
        runs.append((flat(model), optimizer))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-6, atol=1e-8)
    if rule == "adaptive":  # the other's are of directions, which are multiples of gradients
        same(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-8)
    factor = optimizer._rule.state_dict()["factor"]
    assert float(factor) == pytest.approx(3.0 if how == "accumulated" else how)


@pytest.mark.parametrize("rule", ["adaptive", "quadratic"])
def test_clipped_gradients_make_shorter_steps(rule):
    """A factor of gradients alone is none of the objective."""
    moves = []
    for clipped in (False, True):
        model, loss_fn = network(), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **RULES[rule]())
        loss_fn(model(data()[0]), data()[1]).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1 * norm)
        before = flat(model)
        optimizer.step()
        moves.append((flat(model) - before).norm())
        assert optimizer._rule.state_dict()["factor"] == 1
    if rule == "quadratic":
        torch.testing.assert_close(moves[1], 0.1 * moves[0], rtol=1e-4, atol=0)


def log(kind):
    """Another loss of the same output, whose gradient nobody wants."""

    def call(loss_fn, outputs, y):
        if kind == "detached":
            loss_fn(outputs.detach(), y)
        elif kind == "unused":
            loss_fn(outputs, 1 - y)
        return loss_fn(outputs, y)

    return call


@pytest.mark.parametrize("kind", ["detached", "unused"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_losses_that_are_only_looked_at_change_nothing(rule, kind):
    runs = []
    for each in (None, kind):
        model, loss_fn = network(), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **rule())
        for step in range(6):
            x, y = data(step)
            optimizer.zero_grad()
            log(each)(loss_fn, model(x), y).backward()
            optimizer.step()
        runs.append((flat(model), optimizer))
    assert torch.equal(runs[0][0], runs[1][0])
    same(runs[0][1], runs[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("rule", ["quadratic", "Levenberg-Marquardt"])
def test_mixed_targets_are_two_losses_of_one_output(rule, share):
    """As mixup has them; with the identity for curvature, which both have in common."""
    runs = []
    for apart in (False, True):
        model, loss_fn = network(last=3), nn.CrossEntropyLoss()
        options = {**EAGER, "fisher": "forward-only"}
        optimizer = kfac_tn.KFAC(model, loss_fn, **options, **RULES[rule]())
        for step in range(6):
            x, _ = data(step)
            first, second = (torch.arange(len(x)) * k % 3 for k in (1, 2))
            optimizer.zero_grad()
            outputs = model(x)
            if apart:
                terms = share * loss_fn(outputs, first), (1 - share) * loss_fn(outputs, second)
                sum(terms).backward()
            else:
                one, other = (nn.functional.one_hot(y, 3).double() for y in (first, second))
                loss_fn(outputs, share * one + (1 - share) * other).backward()
            optimizer.step()
        runs.append((flat(model), optimizer))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    same(runs[0][1], runs[1][1])


# Gradients that were reset -----------------------------------------------------------------------


@pytest.mark.parametrize("skipped", ["by the scaler", "by the user"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_skipped_batches_are_forgotten_with_the_models_gradients(rule, skipped):
    """The model's own zero_grad() tells the optimizer nothing."""
    runs = []
    for bad in ((), (1, 3)):
        model, loss_fn = network(), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **rule())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        for step in range(5):
            if step in bad:
                x, y = data(100 + step)
                infinite = torch.inf if skipped == "by the scaler" else 1.0
                scaler.scale(infinite * loss_fn(model(x), y)).backward()
                if skipped == "by the scaler":
                    scaler.step(optimizer)
                    scaler.update(4.0)
                model.zero_grad()
            x, y = data(step)
            scaler.scale(loss_fn(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        runs.append((flat(model), optimizer))
    assert torch.equal(runs[0][0], runs[1][0])
    same(runs[0][1], runs[1][1], rtol=0, atol=0)


def test_a_preconditioner_forgets_what_another_optimizer_resets():
    runs = []
    for skip in (False, True):
        model, loss_fn = network(), nn.MSELoss()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, **EAGER)
        for step in range(3):
            if skip:
                loss_fn(model(data(100 + step)[0]), data(step)[1]).backward()
                sgd.zero_grad()
            x, y = data(step)
            loss_fn(model(x), y).backward()
            preconditioner.step()
            sgd.step()
            sgd.zero_grad()
        runs.append(flat(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("skipped", [False, True])
def test_what_is_observed_after_a_reset_belongs_to_the_next_gradients(skipped):
    """Beside a loss that the module computes, in one objective."""
    factors = []
    for batches in (1, 3):
        model, loss_fn = network(), nn.MSELoss()
        options = {**EAGER, "factor_decay": 0.0, "step_rule": "graft", "lr": 0.0}
        optimizer = kfac_tn.KFAC(model, loss_fn, **options)
        for step in range(3 - batches, 3):
            (x, y), (other, target) = data(step), data(10 + step, n=7)
            outputs = model(other)
            optimizer.observe(outputs, target)
            (loss_fn(model(x), y) + nn.functional.mse_loss(outputs, target)).backward()
            if step == 2 or not skipped:
                optimizer.step()
            model.zero_grad()
        factors.append(optimizer.factors())
    for name, expected in factors[0].items():
        torch.testing.assert_close(factors[1][name].input, expected.input)
        torch.testing.assert_close(factors[1][name].grad_output, expected.grad_output)


@pytest.mark.parametrize("rule", ["adaptive", "quadratic"])
def test_gradients_that_are_returned_accumulate_all_the_same(rule):
    """By torch.autograd.grad there is nothing in ``.grad`` until the user puts it there."""
    runs = []
    for returned in (False, True):
        model, loss_fn = network(), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **RULES[rule]())
        parameters = list(model.parameters())
        for step in range(4):
            optimizer.zero_grad()
            sums = [torch.zeros_like(p) for p in parameters]
            for x, y in zip(*(each.chunk(3) for each in data(step)), strict=True):
                loss = loss_fn(model(x), y) / 3
                if returned:
                    grads = torch.autograd.grad(loss, parameters)
                    sums = [s + g for s, g in zip(sums, grads, strict=True)]
                else:
                    loss.backward()
            if returned:
                for p, s in zip(parameters, sums, strict=True):
                    p.grad = s
            optimizer.step()
        runs.append((flat(model), optimizer))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    same(runs[0][1], runs[1][1])


# Losses of several calls -------------------------------------------------------------------------


def test_targets_that_depend_on_the_model_are_refused():
    model, loss_fn = network(), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER)
    x, y = data()
    with pytest.raises(ValueError, match=r"targets of the loss depend .*detach"):
        loss_fn(model(x), model(x + 1))
    loss_fn(model(x), model(x + 1).detach()).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_fn(model(x), y.clone().requires_grad_()).backward()  # of another model, say
    optimizer.step()


@pytest.mark.parametrize("fisher", ["type-2", "forward-only"])
@pytest.mark.parametrize("sizes", [(6, 6), (5, 7)])
def test_examples_of_two_losses_are_not_positions_of_one(fisher, sizes):
    """Without shared positions, KFAC-reduce is KFAC-expand."""
    factors = []
    for approximation in ("expand", "reduce"):
        model, loss_fn = network(), nn.MSELoss()
        options = {**EAGER, "fisher": fisher, "approximation": approximation}
        optimizer = kfac_tn.KFAC(model, loss_fn, **options)
        parts = zip(*(each.split(list(sizes)) for each in data()), strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            sum(loss_fn(model(x), y) for x, y in parts).backward()
            optimizer.step()
        factors.append(optimizer.factors())
    for name, expand in factors[0].items():
        reduce = factors[1][name]
        torch.testing.assert_close(expand.input, reduce.input)
        torch.testing.assert_close(expand.grad_output, reduce.grad_output)


class Twice(nn.Module):
    """Both calls of a layer are of one loss, and share its positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last = nn.Linear(4, 3), nn.Linear(6, 1)
        self.double()

    def forward(self, x):
        return self.last(torch.cat([self.shared(x), self.shared(x.flip(0) + 1).tanh()], 1))


def test_calls_of_one_loss_share_positions_as_before():
    """A layer called twice in each of two losses: the average of two rows for each example."""
    model, loss_fn = Twice(), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, approximation="reduce", **EAGER)
    x, y = data()
    parts = list(zip(x.chunk(2), y.chunk(2), strict=True))
    sum(loss_fn(model(part), target) for part, target in parts).backward()
    optimizer.step()
    rows = torch.cat([(part + part.flip(0) + 1) / 2 for part, _ in parts])
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    torch.testing.assert_close(optimizer.factors()["shared"].input[0], rows.T @ rows / len(rows))


# Calls without a loss of their own ---------------------------------------------------------------


class Tree(nn.Module):
    """A recursive network (Socher et al. 2011): calls itself, by name or as the module that it is.

    Its batches are pairs of these, or inputs.
    """

    def __init__(self, as_module):
        super().__init__()
        torch.manual_seed(0)
        self.as_module = as_module
        self.leaf, self.join, self.last = nn.Linear(4, 6), nn.Linear(12, 6), nn.Linear(6, 1)
        self.double()

    def forward(self, tree, top=True):
        if isinstance(tree, torch.Tensor):
            return self.leaf(tree).tanh()
        call = self if self.as_module else self.forward
        h = self.join(torch.cat([call(part, top=False) for part in tree], 1)).tanh()
        return self.last(h) if top else h


@pytest.mark.parametrize("rule", RULES)
def test_models_may_call_themselves(rule):
    twins = []
    for as_module in (True, False):
        model, loss_fn = Tree(as_module), nn.MSELoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.1, **EAGER, **RULES[rule]())
        for step in range(6):
            (one, y), (other, _) = data(step), data(step + 10)
            optimizer.zero_grad()
            loss_fn(model(((one, other), one)), y).backward()
            optimizer.step()
        twins.append((optimizer, flat(model)))
    (one, values), (other, expected) = twins
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    same(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["adaptive", "quadratic"])
@pytest.mark.parametrize("looked_at", ["outputs", "losses"])
def test_calls_that_nobody_differentiates_are_not_kept(rule, looked_at):
    """As of whoever validates, or acts in an environment, without ``torch.no_grad()``."""
    model, loss_fn = network(), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER, **RULES[rule]())
    nodes, inputs = [], []
    for step in range(5):
        x, y = data(step)
        output = model(x)
        nodes.append(weakref.ref(output.grad_fn.metadata.setdefault("mine", nn.Identity())))
        inputs.append(optimizer._replay._batches[-1].args[0])
        if looked_at == "losses":
            loss_fn(output, y)
        del output
    assert all(node() is None for node in nodes)
    kept = [batch.args[0] for batch in optimizer._replay._batches]
    assert len(kept) == 1  # until the model is called again
    assert kept[0] is inputs[-1]
    x, y = data()
    loss_fn(model(x), y).backward()
    optimizer.step()
    twin = network()
    other = kfac_tn.KFAC(twin, loss_fn, **EAGER, **RULES[rule]())
    loss_fn(twin(x), y).backward()
    other.step()
    assert torch.equal(flat(model), flat(twin))
    same(optimizer, other, rtol=0, atol=0)
