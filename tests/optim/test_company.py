"""Optimizers that aren't alone: others, or computations of curvature, use their model or loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kfac_tn

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
EAGER = {"factor_interval": 1, "inverse_interval": 1}


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    loss_fn = nn.CrossEntropyLoss()
    return model, loss_fn, kfac_tn.KFAC(model, loss_fn, **{**EAGER, **options})


def make_data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


def values(*models):
    return [p.detach().clone() for model in models for p in model.parameters()]


def assert_close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def gradients(model, loss_fn, data):
    kfac_tn.compute_per_example_gradients(model, loss_fn, *data[0])


COMPUTATIONS = {
    "kfac": lambda *args: kfac_tn.compute_kfac(*args, generator=torch.Generator()),
    "empirical": lambda *args: kfac_tn.compute_kfac(*args, fisher="empirical"),
    "ekfac": lambda *args: kfac_tn.compute_ekfac(*args, fisher="empirical"),
    "diagonal": kfac_tn.compute_ggn_diagonal,
    "gradients": gradients,
}


@pytest.mark.parametrize("options", [{}, {"step_rule": "quadratic"}, {"curvature": "ekfac"}])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "mc", "forward-only"])
@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_curvature_computed_in_between_changes_no_step(computation, fisher, options):
    """Of the optimizer's own model and loss, before a step or after; gradients reset by hand."""
    if fisher == "forward-only" and "curvature" in options:
        pytest.skip("no gradients")
    results = []
    for company in (False, True):
        model, loss_fn, optimizer = make(fisher=fisher, **options)
        for step in range(3):
            data = [make_data(step)]
            loss_fn(model(data[0][0]), data[0][1]).backward()
            if company:
                COMPUTATIONS[computation](model, loss_fn, data)
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad = None
            if company:
                COMPUTATIONS[computation](model, loss_fn, data)
        results.append(values(model))
    assert_close(*results)


RULES = ["adaptive", "quadratic"]


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("second", RULES)
@pytest.mark.parametrize("first", RULES)
def test_what_one_optimizer_measures_is_hidden_from_another(first, second, fisher):
    """Two on one model and loss, each measuring in its step; against copies that take turns."""
    model, loss_fn, one = make(fisher=fisher, step_rule=first)
    other = kfac_tn.KFAC(model, loss_fn, fisher=fisher, step_rule=second, **EAGER)
    twin, twin_loss, twin_one = make(fisher=fisher, step_rule=first)
    double, double_loss, double_other = make(fisher=fisher, step_rule=second)
    for step in range(3):
        x, y = make_data(step)
        for each in (one, twin_one, double_other):
            each.zero_grad()
        for each, loss in ((model, loss_fn), (twin, twin_loss), (double, double_loss)):
            loss(each(x), y).backward()
        one.step()
        twin_one.step()
        assert_close(values(model), values(twin))
        double.load_state_dict(twin.state_dict())
        other.step()
        double_other.step()
        assert_close(values(model), values(double))
        twin.load_state_dict(double.state_dict())


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_a_frozen_model_has_no_part_of_the_others_loss(fisher):
    """A critic that is frozen in the generator's loss, the loss shared; both step at the end."""

    def run(shared):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        loss_fn = nn.BCEWithLogitsLoss()
        critic_loss = loss_fn if shared else copy.deepcopy(loss_fn)
        options = {"fisher": fisher, **EAGER}
        of_generator = kfac_tn.KFAC(generator, loss_fn, step_rule="graft", **options)
        of_critic = kfac_tn.KFAC(critic, critic_loss, **options)
        ones = torch.ones(5, 1).double()
        for _ in range(3):
            real, noise = torch.rand(5, 3).double(), torch.rand(5, 2).double()
            of_generator.zero_grad()
            of_critic.zero_grad()
            critic.requires_grad_(False)
            loss_fn(critic(generator(noise)), 0 * ones).backward()
            critic.requires_grad_(True)
            critic_loss(critic(real), ones).backward()
            of_critic.step()
            of_generator.step()
        return values(generator, critic)

    assert_close(run(True), run(False))
