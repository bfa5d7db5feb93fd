"""Models whose layers are pruned, reparametrized, replaced or resized once KFAC is made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import kfac_tn

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
EAGER = {"factor_interval": 1, "inverse_interval": 1, "fisher": "type-2"}


class Net(nn.Module):
    """Attention and two linear layers."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.hidden = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.hidden(x.mean(1)).tanh())


def make(**options):
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    return model, loss_fn, kfac_tn.KFAC(model, loss_fn, **{**EAGER, **options})


def train(model, loss_fn, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(6, 3, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def louder(model):
    plain = model.hidden.forward
    model.hidden.forward = lambda x: 2 * plain(x)


def without_bias(model):
    model.hidden.bias = None


CHANGES = {
    "pruned weight": lambda model: prune.l1_unstructured(model.hidden, "weight", 0.3),
    "pruned bias": lambda model: prune.l1_unstructured(model.hidden, "bias", 0.5),
    "pruned attention": lambda m: prune.l1_unstructured(m.attention, "in_proj_weight", 0.3),
    "spectral norm": lambda model: parametrizations.spectral_norm(model.hidden),
    "forward replaced": louder,
    "bias removed": without_bias,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_treated_as_by_a_new_optimizer(change):
    """With nothing averaged, steps are those of an optimizer made of the changed model."""
    options = {"betas": (0.0, 0.0), "factor_decay": 0.0, "step_rule": "graft"}
    model, loss_fn, optimizer = make(**options)
    train(model, loss_fn, optimizer, 3)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        torch.manual_seed(1)  # of power iterations
        CHANGES[change](each)
    fresh = kfac_tn.KFAC(twin, loss_fn, **EAGER, **options)
    train(model, loss_fn, optimizer, 2, start=3)
    train(twin, loss_fn, fresh, 2, start=3)
    for name, value in values(twin).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-9, atol=1e-12)
    assert str(optimizer.coverage()) == str(fresh.coverage())


RESTORED = {
    "pruned weight": lambda model: prune.remove(model.hidden, "weight"),
    "pruned bias": lambda model: prune.remove(model.hidden, "bias"),
    "spectral norm": lambda m: parametrize.remove_parametrizations(m.hidden, "weight"),
}


@pytest.mark.parametrize("change", RESTORED)
@pytest.mark.parametrize("other", [None, "diagonal"])
def test_layers_that_are_plain_again_have_factors_again(change, other):
    options = {"betas": (0.0, 0.0), "factor_decay": 0.0, "step_rule": "graft"}
    model, loss_fn, optimizer = make(other_curvature=other, **options)
    CHANGES[change](model)
    train(model, loss_fn, optimizer, 2)
    assert any(
        "hidden" in row.parameter and "KFAC" not in row.treatment for row in optimizer.coverage()
    )
    RESTORED[change](model)
    twin = copy.deepcopy(model)
    fresh = kfac_tn.KFAC(twin, loss_fn, other_curvature=other, **EAGER, **options)
    train(model, loss_fn, optimizer, 2, start=3)
    train(twin, loss_fn, fresh, 2, start=3)
    for name, value in values(twin).items():
        torch.testing.assert_close(values(model)[name], value, rtol=1e-9, atol=1e-12)
    assert str(optimizer.coverage()) == str(fresh.coverage())


def test_changes_between_statistics_are_noticed_when_these_are_due():
    model, loss_fn, optimizer = make(factor_interval=4, inverse_interval=4)
    train(model, loss_fn, optimizer, 9)
    CHANGES["pruned weight"](model)
    kept = optimizer.factors()["head"].input.clone()
    train(model, loss_fn, optimizer, 4, start=9)
    assert set(optimizer.factors()) == {"attention.in_proj", "attention.out_proj", "head"}
    factors = optimizer.factors()["head"].input
    assert factors.shape == kept.shape
    assert not torch.equal(factors, kept)


def test_a_change_just_before_the_step_is_noticed_in_it():
    """Nobody resets gradients in between; what was seen of the old layers is left out."""
    model, loss_fn, optimizer = make()
    train(model, loss_fn, optimizer, 2)
    head = optimizer.factors()["head"].input.clone()
    x, y = torch.rand(6, 3, 4).double(), torch.randint(3, (6,))
    optimizer.zero_grad()
    prune.l1_unstructured(model.hidden, "weight", 0.3)
    loss_fn(model(x), y).backward()
    optimizer.step()
    assert "hidden" not in optimizer.factors()
    assert torch.equal(optimizer.factors()["head"].input, head)
    train(model, loss_fn, optimizer, 1, start=2)
    assert not torch.equal(optimizer.factors()["head"].input, head)


def test_the_preconditioner_follows():
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, **EAGER)
    x, y = torch.rand(6, 3, 4).double(), torch.randint(3, (6,))
    loss_fn(model(x), y).backward()
    preconditioner.step()
    prune.l1_unstructured(model.hidden, "weight", 0.3)
    for _ in range(2):
        model.zero_grad()
        loss_fn(model(x), y).backward()
        gradient = model.hidden.weight_orig.grad.clone()
        preconditioner.step()
        assert torch.equal(model.hidden.weight_orig.grad, gradient)
    assert "hidden" not in preconditioner.factors()


def hidden(model):
    model.hidden = nn.Linear(4, 5).double()


def everything(model):
    for name, module in Net().double().named_children():
        setattr(model, name, module)


def weight_norm(model):
    parametrizations.weight_norm(model.hidden)


@pytest.mark.parametrize("replace", [hidden, everything, weight_norm])
def test_new_parameters_are_not_left_untrained(replace):
    """Even if no parameter that the optimizer has gets a gradient any more."""
    model, loss_fn, optimizer = make()
    train(model, loss_fn, optimizer, 2)
    old = set(model.parameters())
    replace(model)
    before = values(model)
    for step in (2, 3):
        with pytest.raises(RuntimeError, match=r"replaced.*add_param_group"):
            train(model, loss_fn, optimizer, 1, start=step)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    optimizer.add_param_group({"params": [p for p in model.parameters() if p not in old]})
    train(model, loss_fn, optimizer, 3, start=2)
    assert not any(torch.equal(value, before[name]) for name, value in values(model).items())
    expected = kfac_tn.KFAC(model, loss_fn).coverage()
    assert str(optimizer.coverage()) == str(expected)


def wider(model):
    model.hidden.weight.data = torch.rand(7, 4).double()
    model.hidden.bias.data = torch.rand(7).double()
    model.head.weight.data = torch.rand(3, 7).double()


def reshaped(model):
    """As many numbers as before, in a layer that still runs."""
    model.hidden.weight.data = torch.rand(7, 4).double()
    model.hidden.bias.data = torch.rand(7).double()
    model.head = nn.Sequential(nn.Linear(7, 5).double().requires_grad_(False), model.head)


def everything_of(model, optimizer):
    """Deep copies of all that a step may change, flat."""
    state = optimizer.state_dict()
    return torch.utils._pytree.tree_leaves(copy.deepcopy([state, dict(model.state_dict())]))


def assert_same(before, after):
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("interval", [1, 4], ids=["statistics", "idle"])
@pytest.mark.parametrize("change", [wider, reshaped])
@pytest.mark.parametrize("kind", [kfac_tn.KFAC, kfac_tn.KFACPreconditioner])
def test_data_of_another_shape_is_refused_before_anything_changes(kind, change, interval):
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    optimizer = kind(model, loss_fn, **{**EAGER, "factor_interval": interval})
    x, y = torch.rand(6, 3, 4).double(), torch.randint(3, (6,))

    def step():
        model.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    for _ in range(5):
        step()
    old = {p: p.data for p in model.parameters()}
    head = model.head
    change(model)
    before = everything_of(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'hidden\.weight' has shape \[7, 4\].*\[5, 4\]"):
        step()
    assert_same(before, everything_of(model, optimizer))
    model.head = head
    for parameter, data in old.items():
        parameter.data = data
    with pytest.raises(RuntimeError, match=r"'hidden\.weight' has a gradient of shape \[7, 4\]"):
        optimizer.step()
    step()


def test_data_of_another_shape_is_refused_where_layers_are_divided_anew():
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    model.head.requires_grad_(False)
    optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER)
    train(model, loss_fn, optimizer, 3)
    wider(model)
    model.head.requires_grad_(True)
    before = everything_of(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'hidden\.weight' has shape"):
        optimizer.zero_grad()
    assert_same(before, everything_of(model, optimizer))


def grown(**options):
    """A trained optimizer, and the parameters of a layer that its model has got since."""
    model, loss_fn, optimizer = make(**options)
    train(model, loss_fn, optimizer, 3)
    model.hidden = nn.Sequential(model.hidden, nn.Linear(5, 5).double())
    return model, loss_fn, optimizer, model.hidden[1]


INVALID_GROUPS = {
    "a part of a layer": (lambda new: {"params": [new.weight]}, "miss.*hidden.1.bias"),
    "a parameter twice": (lambda new: {"params": [new.weight] * 2}, "miss.*hidden.1.bias"),
    "lr": (lambda new: {"params": list(new.parameters()), "lr": "fast"}, "lr is 'fast'"),
    "betas": (lambda new: {"params": list(new.parameters()), "betas": 0.9}, "betas are 0.9"),
    "damping": (lambda new: {"params": list(new.parameters()), "damping": abs}, "damping is"),
    "options": (lambda new: {"params": list(new.parameters()), "nu": 1}, "no option.*nu"),
    "foreign": (lambda new: {"params": [nn.Parameter(torch.ones(1))]}, "isn't the model's"),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("name", INVALID_GROUPS)
def test_a_group_that_is_refused_leaves_no_trace(name):
    """The right one can be added then, and training goes on as if nothing had been."""
    group, message = INVALID_GROUPS[name]
    runs = []
    for hostile in (False, True):
        model, loss_fn, optimizer, new = grown()
        before = everything_of(model, optimizer), str(optimizer.coverage())
        if hostile:
            with pytest.raises(ValueError, match=message):
                optimizer.add_param_group(group(new))
        assert_same(before[0], everything_of(model, optimizer))
        assert str(optimizer.coverage()) == before[1]
        optimizer.add_param_group({"params": list(new.parameters())})
        train(model, loss_fn, optimizer, 2, start=3)
        runs.append(everything_of(model, optimizer))
    assert_same(*runs)


def test_a_group_with_a_layer_that_an_option_does_not_know_is_refused():
    """At once, not in the middle of a step, and the layers there were keep their curvature."""
    options = {"approximation": lambda name, _: "?" if name == "hidden.1" else "expand"}
    model, loss_fn, optimizer, new = grown(**options)
    before = everything_of(model, optimizer)
    with pytest.raises(ValueError, match=r"approximation is '\?' for layer 'hidden\.1'"):
        optimizer.add_param_group({"params": list(new.parameters())})
    assert_same(before, everything_of(model, optimizer))
    new.requires_grad_(False)
    train(model, loss_fn, optimizer, 2, start=3)
    assert set(optimizer.factors()) == {"attention.in_proj", "attention.out_proj", "hidden", "head"}


def test_a_bias_with_another_damping_than_its_weight_is_refused():
    model, loss_fn, optimizer = make()
    model.hidden.bias.requires_grad_(False)
    groups = [{"params": [p for p in model.parameters() if p is not model.hidden.bias]}]
    optimizer = kfac_tn.KFAC(model, loss_fn, params=groups, **EAGER)
    train(model, loss_fn, optimizer, 3)
    before = everything_of(model, optimizer)
    model.hidden.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="different damping"):
        optimizer.add_param_group({"params": [model.hidden.bias], "damping": 0.5})
    assert_same(before, everything_of(model, optimizer))
    model.hidden.bias.requires_grad_(False)
    train(model, loss_fn, optimizer, 2, start=3)
    assert optimizer.factors()["hidden"].input.shape[-1] == 4


class Switched(nn.Module):
    """A layer that is called, used without a call, or both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head, self.use = nn.Linear(4, 5), nn.Linear(5, 3), "call"
        self.double()

    def forward(self, x):
        x, weight = x.mean(1), self.hidden.weight
        if self.use == "call":
            h = self.hidden(x)
        elif self.use == "function":
            h = nn.functional.linear(x, weight, self.hidden.bias)
        elif self.use == "both":
            h = self.hidden(x) + nn.functional.linear(x, weight)
        else:
            h = self.hidden(x + (weight @ x.mT).mT[:, :4])
        return self.head(h.tanh())


WITHOUT_A_CALL = "'hidden'.* without calling the module"


@pytest.mark.parametrize("use", ["function", "both", "input"])
@pytest.mark.parametrize(
    ("curvature", "split"), [("kfac", "pi"), ("kfac", "exact"), ("ekfac", "pi"), ("diagonal", "pi")]
)
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_layers_used_without_a_call_lose_their_curvature(use, curvature, split, fisher):
    """They take Adam's steps, until they are only called again: then they begin anew."""
    options = {"betas": (0.0, 0.0), "lr": 0.01, "factor_decay": 0.9, "step_rule": "graft"}
    options |= {"curvature": curvature, "damping_split": split, "fisher": fisher}
    model, loss_fn = Switched(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **{**EAGER, **options})
    train(model, loss_fn, optimizer, 3)
    model.use = use
    for step in (3, 4):
        before = values(model.hidden)
        if step == 3:
            with pytest.warns(RuntimeWarning, match=WITHOUT_A_CALL):
                train(model, loss_fn, optimizer, 1, start=step)
        else:
            train(model, loss_fn, optimizer, 1, start=step)
        for name, p in model.hidden.named_parameters():
            adam = before[name] - 0.01 * p.grad / (p.grad.abs() + 1e-8)
            torch.testing.assert_close(p.detach(), adam, rtol=1e-12, atol=1e-14)
    assert optimizer.state_dict()["curvature"]["factors"].keys() == {"head"}
    assert optimizer.diagnostics().layers.keys() == {"head"}
    model.use = "call"
    fresh = kfac_tn.KFAC(copy.deepcopy(model), loss_fn, **{**EAGER, **options})
    for each in (fresh, optimizer):
        train(each._model, loss_fn, each, 1, start=5)
    assert optimizer.diagnostics().layers.keys() == {"hidden", "head"}
    for name, factors in fresh.factors().items():
        same = torch.equal(optimizer.factors()[name].input, factors.input)
        assert same == (name == "hidden")
    train(model, loss_fn, optimizer, 3, start=6)


@pytest.mark.parametrize("order", [("call", "both"), ("both", "call")])
def test_one_micro_batch_is_enough_for_it(order):
    model, loss_fn = Switched(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER)
    train(model, loss_fn, optimizer, 2)
    x, y = torch.rand(6, 3, 4).double(), torch.randint(3, (6,))
    optimizer.zero_grad()
    for model.use in order:
        loss_fn(model(x), y).backward()
    with pytest.warns(RuntimeWarning, match=WITHOUT_A_CALL):
        optimizer.step()
    assert set(optimizer.factors()) == {"head"}


def test_the_preconditioner_leaves_gradients_of_such_layers():
    model, loss_fn = Switched(), nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, **EAGER)
    x, y = torch.rand(6, 3, 4).double(), torch.randint(3, (6,))
    for model.use in ("call", "both"):
        model.zero_grad()
        loss_fn(model(x), y).backward()
        gradient = model.hidden.weight.grad.clone()
        if model.use == "call":
            preconditioner.step()
    with pytest.warns(RuntimeWarning, match=WITHOUT_A_CALL):
        preconditioner.step()
    assert torch.equal(model.hidden.weight.grad, gradient)
