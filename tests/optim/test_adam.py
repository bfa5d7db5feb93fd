"""Adam's moments and updates, by torch's fused kernel and without it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kfac_tn.optim.adam import (
    adam_updates,
    current_updates,
    lengthened,
    with_longer_averages,
)


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


@settings(max_examples=12)
@given(
    st.sampled_from([0.0, 0.5, 0.9, 0.95]), st.sampled_from([0.1, 0.2, 0.37, 1.0]), st.booleans()
)
def test_growing_averages_of_a_constant_are_the_constant(beta1, horizon, fused):
    gradient = torch.tensor([[3.0, -2.0, 1e-3], [1e3, 1.0, 0.1]], dtype=torch.float64)
    gradient = gradient if fused else gradient.mT  # for which there is no fused kernel
    w = nn.Parameter(torch.zeros_like(gradient))
    group = {"params": [w], "betas": (beta1, 0.999), "eps": 1e-8}
    late, rare = nn.Parameter(w.detach().clone()), nn.Parameter(w.detach().clone())
    group["params"] += [late, rare]
    states: dict = {w: {}, late: {}, rare: {}}
    for step in range(1, 200):
        anew = step == 120 and horizon < 1  # averages begin anew
        reach = 0.0 if anew else max(1.0, horizon * step)
        groups = with_longer_averages([group], set(states), reach, horizon)
        taking = [w] + [late] * (step >= 20) + [rare] * (step % 10 == 0)
        gradients = dict.fromkeys(taking, gradient)
        found = adam_updates(groups, states, gradients)
        for p in taking:
            # The correction doesn't know of that; by then there is next to nothing to correct.
            rtol = 1e-9 if step < 120 else 0.1
            torch.testing.assert_close(found[0][p], gradient, rtol=rtol, atol=0)
            torch.testing.assert_close(found[1][p], gradient.sign(), rtol=max(rtol, 1e-4), atol=0)
        torch.testing.assert_close(found, current_updates(groups, states, gradients))


@pytest.mark.parametrize("every", [2, 7, 30])
def test_averages_of_rare_steps_are_as_if_there_were_no_others(every):
    """Bit for bit those of a parameter alone; its reach, which steps take up, too."""
    torch.manual_seed(0)
    options = {"betas": (0.8, 0.99), "eps": 1e-8}
    often, rare, alone = (nn.Parameter(torch.zeros(3, 2)) for _ in range(3))
    both, single = [{"params": [often, rare], **options}], [{"params": [alone], **options}]
    states: dict = {p: {} for p in (often, rare, alone)}
    count = 0
    for step in range(1, 400):
        gradients = {often: torch.randn(3, 2)}
        if step % every == 0:
            count += 1
            gradients[rare] = gradient = torch.randn(3, 2)
            single_reach = max(1.0, 0.2 * count)
            groups = with_longer_averages(single, {alone}, single_reach, 0.2)
            expected = adam_updates(groups, states, {alone: gradient})
        reach = max(1.0, 0.2 * step)
        found = adam_updates(
            with_longer_averages(both, {often, rare}, reach, 0.2), states, gradients
        )
        if rare in gradients:
            assert all(torch.equal(f[rare], e[alone]) for f, e in zip(found, expected, strict=True))
            times = lengthened(both, states, {often, rare}, reach, 0.2)
            wanted = lengthened(single, states, {alone}, single_reach, 0.2)
            assert times.get(rare) == wanted.get(alone)


def test_averages_that_are_nearly_all_gradients_are_the_state_itself():
    w = nn.Parameter(torch.zeros(3))
    group = {"params": [w], "betas": (0.9, 0.999), "eps": 1e-8}
    states: dict = {w: {}}
    for step in range(1, 601):
        groups = with_longer_averages([group], {w}, max(1.0, 0.2 * step), 0.2)
        moments, _ = adam_updates(groups, states, {w: torch.ones(3)})
        assert (moments[w] is states[w]["exp_avg"]) == (step > 468)
