"""Batches of different lengths: the curvature of a mean loss is that on the whole set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_tn
from kfac_tn.testing import dense_ggn, diagonal_block, relative_error

TOLERANCE = 1e-12
LENGTHS = (2, 12, 5)
SIZES = (3, 3, 1)  # of the batches


def weights(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


LOSSES = {
    "mse": nn.MSELoss(),
    "poisson": nn.PoissonNLLLoss(),
    "bce": nn.BCEWithLogitsLoss(),
    "bce, weight": nn.BCEWithLogitsLoss(weight=weights(0.5, 3.0)),
    "bce, pos_weight": nn.BCEWithLogitsLoss(pos_weight=weights(0.5, 3.0)),
    "cross-entropy": nn.CrossEntropyLoss(),
    "cross-entropy, weight": nn.CrossEntropyLoss(weight=weights(0.5, 3.0), ignore_index=2),
}
SAME_EVERYWHERE = ("mse", "poisson", "bce", "bce, weight", "cross-entropy")
"""Losses whose Hessian doesn't depend on targets."""


class Positions(nn.Module):
    """The same at every position ``[N, T, 3]``; classes on the second axis for cross-entropy."""

    def __init__(self, loss_fn: nn.Module, nonlinear: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.nonlinear = nn.Linear(3, 2), nonlinear
        self.classes = isinstance(loss_fn, nn.CrossEntropyLoss)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        z = z.tanh() if self.nonlinear else z
        return z.movedim(-1, 1) if self.classes else z


class Whole(nn.Module):
    """All terms of all batches in one."""

    def __init__(self, model: Positions):
        super().__init__()
        self.model = model

    def forward(self, batches: list[Tensor]) -> Tensor:
        outputs = [self.model(x) for x in batches]
        if self.model.classes:
            outputs = [z.movedim(1, -1) for z in outputs]
        return torch.cat([z.flatten(0, 1) for z in outputs])


def batches_for(loss_fn: nn.Module) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    data = []
    for size, length in zip(SIZES, LENGTHS, strict=True):
        x = torch.randn(size, length, 3, generator=generator, dtype=torch.float64)
        labels = torch.randint(2, (size, length, 2), generator=generator)
        if isinstance(loss_fn, nn.CrossEntropyLoss):
            y = labels[..., 0].clone()
            y[0, 0] = loss_fn.ignore_index if loss_fn.ignore_index >= 0 else 0
            data.append((x, y))
        else:
            data.append((x, labels.double()))
    return data


def exact_ggn(model: Positions, loss_fn: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of the loss of all terms at once."""
    xs, ys = zip(*data, strict=True)
    return dense_ggn(Whole(model), loss_fn, xs, torch.cat([y.flatten(0, 1) for y in ys]))


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_exact_diagonal_and_trace(loss_fn):
    model, data = Positions(loss_fn), batches_for(loss_fn)
    expected = exact_ggn(model, loss_fn, data)
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, data)
    actual = torch.cat([values.flatten() for values in diagonal.values()])
    assert relative_error(actual, expected.diagonal()) < TOLERANCE
    for bias in ("joint", "separate"):
        ekfac = kfac_tn.compute_ekfac(model, loss_fn, data, fisher="type-2", bias=bias)
        assert relative_error(ekfac.trace(), expected.trace()) < TOLERANCE


@pytest.mark.parametrize("name", LOSSES)
def test_kfac_where_it_is_exact(name):
    """A bias; and one layer's weight, where the Hessian is the same at all positions."""
    loss_fn = LOSSES[name]
    model, data = Positions(loss_fn, nonlinear=False), batches_for(loss_fn)
    expected = exact_ggn(model, loss_fn, data)
    kfac = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2")
    bias = diagonal_block(expected, model, ("layer.bias",))
    assert relative_error(kfac.blocks["layer"].grad_output_factor[0], bias) < TOLERANCE
    if name in SAME_EVERYWHERE:
        nn.init.zeros_(model.layer.weight)
        kfac = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2", bias="joint")
        assert relative_error(kfac.to_dense(), exact_ggn(model, loss_fn, data)) < TOLERANCE


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_empirical_fisher(loss_fn):
    """Each example's own, weighed by its share of the terms.

    An example of an elementwise loss is one term with the mean of its elements; of a cross-entropy,
    each position is one.
    """
    model, data = Positions(loss_fn), batches_for(loss_fn)
    parameters = list(model.parameters())
    total, fisher = 0.0, 0.0
    examples = [pair for xs, ys in data for pair in zip(xs.split(1), ys.split(1), strict=True)]
    for x, y in examples:
        if isinstance(loss_fn, nn.CrossEntropyLoss):
            terms = torch.ones(2) if loss_fn.weight is None else loss_fn.weight
            terms = terms[y[y != loss_fn.ignore_index]].sum()
            scale = terms  # the sum of the terms' losses, not their mean
        else:
            terms, scale = y.numel(), y.numel() ** 0.5
        gradients = torch.autograd.grad(scale * loss_fn(model(x), y), parameters)
        g = torch.cat([each.flatten() for each in gradients])
        fisher, total = fisher + g.outer(g), total + terms
    fisher = fisher / total
    ekfac = kfac_tn.compute_ekfac(model, loss_fn, data, fisher="empirical", bias="joint")
    assert relative_error(ekfac.trace(), fisher.trace()) < TOLERANCE
    kfac = kfac_tn.compute_kfac(model, loss_fn, data, "reduce", "empirical")
    bias = diagonal_block(fisher, model, ("layer.bias",))
    assert relative_error(kfac.blocks["layer"].grad_output_factor[0], bias) < TOLERANCE


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_one_batch_or_one_for_each_example(loss_fn):
    """Of one length: the split is of no matter."""
    model, (_, (x, y), _) = Positions(loss_fn), batches_for(loss_fn)
    alone = [(x[n : n + 1], y[n : n + 1]) for n in range(len(x))]
    for fisher in ("type-2", "empirical"):
        whole, parts = (
            kfac_tn.compute_ekfac(model, loss_fn, data, fisher=fisher, bias="joint").trace()
            for data in ([(x, y)], alone)
        )
        assert relative_error(parts, whole) < TOLERANCE
