"""Adam's moments and updates, by torch's fused kernel and without it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kfac_tn.optim.adam import adam_updates, current_updates, with_longer_averages


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


@given(
    st.sampled_from([0.0, 0.5, 0.9, 0.95]), st.sampled_from([0.1, 0.2, 0.37, 1.0]), st.booleans()
)
def test_growing_averages_of_a_constant_are_the_constant(beta1, horizon, fused):
    gradient = torch.tensor([[3.0, -2.0, 1e-3], [1e3, 1.0, 0.1]], dtype=torch.float64)
    gradient = gradient if fused else gradient.mT  # for which there is no fused kernel
    w = nn.Parameter(torch.zeros_like(gradient))
    group = {"params": [w], "betas": (beta1, 0.999), "eps": 1e-8}
    v = nn.Parameter(w.detach().clone())  # takes its first step later
    group["params"].append(v)
    states: dict = {w: {}, v: {}}
    for step in range(1, 200):
        groups = with_longer_averages([group], {w, v}, max(1.0, horizon * step), horizon)
        gradients = {w: gradient} if step < 20 else {w: gradient, v: gradient}
        found = adam_updates(groups, states, gradients)
        torch.testing.assert_close(found[0][w], gradient, rtol=1e-9, atol=0)
        torch.testing.assert_close(found[1][w], gradient.sign(), rtol=1e-4, atol=0)
        torch.testing.assert_close(found, current_updates(groups, states, gradients))


def test_averages_that_are_nearly_all_gradients_are_the_state_itself():
    w = nn.Parameter(torch.zeros(3))
    group = {"params": [w], "betas": (0.9, 0.999), "eps": 1e-8}
    states: dict = {w: {}}
    for step in range(1, 601):
        groups = with_longer_averages([group], {w}, max(1.0, 0.2 * step), 0.2)
        moments, _ = adam_updates(groups, states, {w: torch.ones(3)})
        assert (moments[w] is states[w]["exp_avg"]) == (step > 468)
