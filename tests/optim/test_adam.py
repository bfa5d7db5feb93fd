"""Adam's moments and updates, by torch's fused kernel and without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_tn.optim.adam import adam_updates, current_updates


def contiguous(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def transposed(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape[::-1], dtype=torch.float64).permute(list(range(len(shape)))[::-1])


def channels_last(shape: tuple[int, ...]) -> torch.Tensor:
    x = contiguous(shape)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS = [contiguous, transposed, channels_last]


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("gradients_as", LAYOUTS)
@pytest.mark.parametrize("parameters_as", LAYOUTS)
def test_the_updates_are_those_of_torch_for_every_memory_layout(
    parameters_as, gradients_as, corrected
):
    torch.manual_seed(0)
    shapes = [(4, 3, 2, 2), (5, 3), (7,), ()]
    ours = [nn.Parameter(parameters_as(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"betas": (0.8, 0.95), "eps": 1e-3}
    adam = torch.optim.Adam(theirs, lr=1.0, foreach=False, **options)
    states: dict = {p: {} for p in ours}
    for step in range(1, 4):
        gradients = {p: gradients_as(p.shape) for p in ours}
        before = [p.detach().clone() for p in theirs]
        for p, g in zip(theirs, gradients.values(), strict=True):
            p.grad = g.clone()
        adam.step()
        moments, updates = adam_updates(
            [{"params": ours, **options}], states, gradients, corrected=corrected
        )
        again = current_updates([{"params": ours, **options}], states, set(ours))
        for p, twin, start in zip(ours, theirs, before, strict=True):
            torch.testing.assert_close(updates[p], start - twin.detach(), rtol=1e-10, atol=1e-10)
            exp_avg = adam.state[twin]["exp_avg"]
            expected = exp_avg / (1 - 0.8**step) if corrected else exp_avg
            torch.testing.assert_close(moments[p], expected, rtol=1e-12, atol=0)
            torch.testing.assert_close(states[p]["exp_avg_sq"], adam.state[twin]["exp_avg_sq"])
            torch.testing.assert_close(again[1][p], updates[p], rtol=1e-12, atol=1e-14)


def test_half_precision_is_averaged_in_float32():
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    states: dict = {p: {}}
    gradient = torch.tensor([1e-3, -2e-3, 3e-3], dtype=torch.bfloat16)
    group = {"params": [p], "betas": (0.9, 0.99), "eps": 0.0}
    _, updates = adam_updates([group], states, {p: gradient})
    assert states[p]["exp_avg_sq"].dtype == updates[p].dtype == torch.float32
    torch.testing.assert_close(updates[p], torch.tensor([1.0, -1.0, 1.0]))
