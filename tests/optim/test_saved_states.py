"""States that are damaged, spoiled, or of parameters in another order."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

import kfac_tn
from tests.optim.test_changed_models import assert_same, everything_of

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
EAGER = {"factor_interval": 1, "inverse_interval": 1}


def make_model(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


def train(model, loss_fn, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(6, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss_fn(model(x), torch.randint(3, (6,), generator=generator)).backward()
        optimizer.step()


def trained(steps=3, model=None, **options):
    model = make_model() if model is None else model
    loss_fn = nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **{**EAGER, **options})
    train(model, loss_fn, optimizer, steps)
    return model, loss_fn, optimizer


def put(*path):
    """Sets the last of a path of keys to the value that stands before it; or deletes it."""

    def damage(state):
        *keys, name, value = path
        for key in keys:
            state = state[key]
        if value is None:
            del state[name]
        else:
            state[name] = value(state[name]) if callable(value) else value

    return damage


def spoiled(value):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return spoil


def cut(tensor):
    return tensor[:2, :2].clone()


NAN, INF = float("nan"), float("inf")
MOMENTS, GROUP, OF_LAYER = ("state", 0), ("param_groups", 0), ("curvature", "factors", "2")
DAMAGES = {
    **{
        f"{name} of another shape": (put(*MOMENTS, name, cut), rf"'0.weight'.*{name}")
        for name in ("exp_avg", "exp_avg_sq", "previous")
    },
    **{
        f"{name} with {value}": (put(*MOMENTS, name, spoiled(value)), rf"'{name}'.*aren't finite")
        for name in ("exp_avg", "exp_avg_sq", "previous", "step")
        for value in (NAN, INF, -INF)
    },
    **{
        f"no {name}": (put(*MOMENTS, name, None), rf"'0.weight' has no \['{name}'\]")
        for name in ("step", "exp_avg", "exp_avg_sq")
    },
    "squares below zero": (put(*MOMENTS, "exp_avg_sq", spoiled(-1.0)), "negative 'exp_avg_sq'"),
    "whole numbers": (put(*MOMENTS, "exp_avg", lambda m: m.long()), "floating-point"),
    "a number as moment": (put(*MOMENTS, "exp_avg", 1.0), r"1.0 for 'exp_avg'.*floating-point"),
    "half a step": (put(*MOMENTS, "step", torch.tensor(0.5)), "0.5 for 'step'"),
    "a negative step": (put(*MOMENTS, "step", torch.tensor(-1.0)), "-1.0 for 'step'"),
    "two steps": (put(*MOMENTS, "step", torch.ones(2)), "'step'"),
    "lr nan": (put(*GROUP, "lr", NAN), "lr is nan"),
    "betas": (put(*GROUP, "betas", (0.9, 1.0)), "betas are"),
    **{
        f"no {name}": (put(*GROUP, name, None), rf"no \['{name}'\]")
        for name in ("lr", "betas", "eps", "weight_decay", "damping")
    },
    **{
        f"no {name} at all": (put(name, None), f"has no '{name}': it isn't one of KFAC")
        for name in ("rule", "curvature", "state", "param_groups")
    },
    **{
        f"curvature without {name}": (put("curvature", name, None), f"curvature has no '{name}'")
        for name in ("steps", "armed", "intervals", "renewed", "factors")
    },
    "steps in words": (put("curvature", "steps", "many"), "'many' for 'steps'"),
    "one interval": (put("curvature", "intervals", (1,)), r"\(1,\) for 'intervals'"),
    "no pair": (put("curvature", "renewed", {"2": 3}), "for 'renewed'"),
    "factors in a list": (put("curvature", "factors", []), "for 'factors'"),
    "factors spoiled": (put(*OF_LAYER, "input", spoiled(NAN)), "'input' of layer '2'.*finite"),
    "factors cut": (put(*OF_LAYER, "input", cut), "'input' of shape"),
    "a number as coefficients": (put("rule", "coefficients", 1.0), "1.0 for 'coefficients'"),
}


@cache
def ends():
    """A state to be damaged, and what five steps lead to that nobody interrupts."""
    model, _, optimizer = trained(5, step_rule="quadratic")
    return optimizer.state_dict(), everything_of(model, optimizer)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_refused_and_nothing_changed(name):
    """And training goes on as if nobody had tried."""
    damage, message = DAMAGES[name]
    model, loss_fn, optimizer = trained(step_rule="quadratic")
    state, expected = copy.deepcopy(ends()[0]), ends()[1]
    damage(state)
    before = everything_of(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(before, everything_of(model, optimizer))
    train(model, loss_fn, optimizer, 2, start=3)
    assert_same(everything_of(model, optimizer), expected)


def test_a_state_of_another_precision_that_overflows_is_refused():
    state = trained()[2].state_dict()
    state["state"][0]["exp_avg"] = torch.full((4, 4), 1e200, dtype=torch.float64)
    optimizer = kfac_tn.KFAC(make_model().float(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"'0.weight' has 'exp_avg'.*aren't finite"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("damping", NAN), "damping is nan"),
        (put("steps", None), "has no 'steps'"),
        (put("factors", "2", "input", spoiled(INF)), "'input' of layer '2'"),
    ],
    ids=["damping", "steps", "factors"],
)
def test_a_damaged_state_of_the_preconditioner_is_refused(damage, message):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, **EAGER)
    loss_fn(model(torch.rand(6, 4).double()), torch.randint(3, (6,))).backward()
    preconditioner.step()
    state = copy.deepcopy(preconditioner.state_dict())
    damage(state)
    before = everything_of(model, preconditioner)
    with pytest.raises(ValueError, match=message):
        preconditioner.load_state_dict(state)
    assert_same(before, everything_of(model, preconditioner))


# Parameters with names ---------------------------------------------------------------------------


def in_groups(*layers, turned=False):
    """Named parameters of some layers each, every group with a learning rate of its own."""

    def groups(model):
        for each in layers:
            named = [(f"{k}.{n}", p) for k in each for n, p in model[k].named_parameters()]
            yield {"params": named[::-1] if turned else named, "lr": 0.01 * (1 + each[0])}

    return groups


def trained_in(groups, steps=3):
    model = make_model()
    return trained(steps, model, params=groups(model))


ORDERS = {
    "groups": in_groups([2], [4], [0]),
    "parameters": in_groups([0], [2], [4], turned=True),
    "both": in_groups([4], [0], [2], turned=True),
}


@pytest.mark.parametrize("order", ORDERS)
def test_named_parameters_are_found_in_any_order(order):
    """All of them of one shape: the run goes on as the one that the state is of."""
    model, loss_fn, optimizer = trained_in(in_groups([0], [2], [4]))
    other, other_loss, second = trained_in(ORDERS[order], steps=0)
    other.load_state_dict(model.state_dict())
    names = [group["param_names"] for group in second.param_groups]
    second.load_state_dict(optimizer.state_dict())
    assert [group["param_names"] for group in second.param_groups] == names
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_same([*optimizer.state[mine].values()], [*second.state[theirs].values()])
    train(model, loss_fn, optimizer, 3, start=3)
    train(other, other_loss, second, 3, start=3)
    assert_same(model.state_dict().values(), other.state_dict().values())


def test_named_parameters_in_other_groups_are_refused_and_nothing_changed():
    state = trained_in(in_groups([0, 2], [4]))[2].state_dict()
    model, _, optimizer = trained_in(in_groups([2, 4], [0]))
    before = everything_of(model, optimizer)
    with pytest.raises(ValueError, match=r"\['0.bias', '0.weight', .*in groups with others"):
        optimizer.load_state_dict(state)
    assert_same(before, everything_of(model, optimizer))


def test_other_names_or_none_are_told_by_position_as_in_torch():
    model, _, optimizer = trained_in(in_groups([0], [2], [4]))
    for rename in ("module.{}".format, None):
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            names = group.pop("param_names")
            if rename is not None:
                group["param_names"] = [rename(name) for name in names]
        other, _, second = trained_in(in_groups([0], [2], [4]), steps=0)
        second.load_state_dict(state)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert_same([*optimizer.state[mine].values()], [*second.state[theirs].values()])
