"""Products of gradients with the inverse curvature, from a room and from elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn.curvature.directions import Room

EVERY = {"factor_interval": 1, "inverse_interval": 1}


def make_model() -> nn.Module:
    """Equal layers, which are stacked; groups, a transposed layer, one without bias, and others."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(75, 5, bias=False),
        nn.Linear(5, 5),
        nn.Tanh(),
        nn.Linear(5, 5),
        nn.Linear(5, 3),
    ).double()


def train(model, optimizer, loss_fn, steps, without=()) -> None:
    """In every other step some parameters have no gradient."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.rand(7, 4, 4, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss_fn(model(x), torch.randint(3, (7,), generator=generator)).backward()
        for name in without if step % 2 else ():
            model.get_submodule(name).zero_grad()
        optimizer.step()


def trained(steps=5, without=(), everywhere=True, **options):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **EVERY, **options)
    if not everywhere:
        optimizer._estimator.room = lambda parameters: Room([], {}, parameters)
    train(model, optimizer, loss_fn, steps, without)
    return model, optimizer


def test_the_room_has_whatever_lies_in_its_order():
    model, optimizer = trained()
    parameters = list(model.parameters())
    room = optimizer._estimator.room(parameters)
    again = optimizer._estimator.room(parameters)
    assert all(place is again[p] for p, place in room.places)
    again[parameters[2]] = parameters[2]
    assert parameters[2] not in room
    apart = [*model[1].parameters(), *model[3].parameters()]
    assert {id(p) for p in room.others} == {id(p) for p in apart}
    assert {id(p) for p, _ in room.places} == {id(p) for p in parameters} - {id(p) for p in apart}
    storages = {m.untyped_storage().data_ptr() for m in room.matrices.values()}
    assert {place.untyped_storage().data_ptr() for _, place in room.places} == storages
    assert sorted(len(matrices) for matrices in room.matrices.values()) == [1, 1, 2, 2]


@pytest.mark.parametrize("damping_split", ["pi", "exact"])
def test_directions_are_the_dense_products(damping_split):
    """(B (x) A + damping)^-1, damping divided or not, times gradients; wherever these lie."""
    model, optimizer = trained(damping_split=damping_split, relative_damping=False, damping=1e-2)
    estimator, generator = optimizer._estimator, torch.Generator().manual_seed(2)
    parameters = list(model.parameters())
    given = {p: torch.rand(p.shape, generator=generator, dtype=p.dtype) for p in parameters}
    room = estimator.room(parameters)
    for parameter, place in room.places:
        place.copy_(given[parameter])
    room.update({p: given[p] for p in room.others})
    found, elsewhere = estimator.precondition(room), estimator.precondition(given)
    assert (
        found.keys()
        == elsewhere.keys()
        == {p for p in parameters if p not in {*model[1].parameters()}}
    )
    damped = {block.name: (f, shifts) for block, f, shifts in estimator.damped_factors()}
    for name in ("0", "2", "6", "7", "9", "10"):
        layer, (factors, (a_shift, b_shift)) = model.get_submodule(name), damped[name]
        groups, d_in = len(factors.input), layer.weight[0].numel()
        for group in range(groups):
            rows = slice(*(len(layer.weight) // groups * (group + k) for k in (0, 1)))
            a, b = factors.input[group], factors.grad_output[group]
            g = given[layer.weight][rows].reshape(-1, d_in)
            if layer.bias is not None:
                g = torch.cat([g, given[layer.bias][rows].unsqueeze(1)], 1)
            eye_a, eye_b = torch.eye(len(a)).to(a), torch.eye(len(b)).to(b)
            if damping_split == "pi":
                block = torch.kron(b + b_shift[group] * eye_b, a + a_shift[group] * eye_a)
            else:
                block = torch.kron(b, a) + 1e-2 * torch.kron(eye_b, eye_a)
            expected = torch.linalg.solve(block, g.flatten()).view_as(g)
            for directions in (found, elsewhere):
                weight = directions[layer.weight][rows].reshape(-1, d_in)
                torch.testing.assert_close(weight, expected[:, :d_in], rtol=1e-8, atol=1e-10)
                if layer.bias is not None:
                    bias = directions[layer.bias][rows]
                    torch.testing.assert_close(bias, expected[:, -1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("without", [(), ("6", "9"), ("0", "1", "3")])
@pytest.mark.parametrize("options", [{}, {"step_rule": "graft"}, {"step_rule": "quadratic"}])
def test_training_is_the_same_without_the_room(options, without):
    """Also where parameters have a gradient in some steps and none in others."""
    model, _ = trained(without=without, **options)
    twin, _ = trained(without=without, everywhere=False, **options)
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-7, atol=1e-9)


def test_the_room_follows_the_models_dtype():
    model, optimizer = trained()
    model.float()
    x, y = torch.rand(7, 4, 4, 4), torch.randint(3, (7,))
    for _ in range(3):
        optimizer.zero_grad()
        optimizer._loss_fn(model(x), y).backward()
        optimizer.step()
    room = optimizer._estimator.room(list(model.parameters()))
    assert len(room.matrices) == 4
    assert all(place.dtype == torch.float32 for place in room.values())
