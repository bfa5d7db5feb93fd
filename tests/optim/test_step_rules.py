"""The rules against their definitions."""

from __future__ import annotations

import pytest
import torch

from kfac_tn.optim.step_rules import clip_kl, graft


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


def test_graft_keeps_directions_and_takes_norms():
    directions, references = tensors((2, 3), (4,)), tensors((2, 3), (4,), seed=1)
    kept = [direction.clone() for direction in directions]
    graft(directions, references)
    for direction, before, reference in zip(directions, kept, references, strict=True):
        torch.testing.assert_close(direction.norm(), reference.norm())
        expected = before / before.norm() * reference.norm()
        torch.testing.assert_close(direction, expected)


@pytest.mark.parametrize(
    ("direction", "reference", "expected"),
    [
        ([0.0, 0.0], [1.0, 0.0], [0.0, 0.0]),
        ([3.0, 4.0], [0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_graft_of_zeros_is_zero(direction, reference, expected):
    direction = torch.tensor(direction)
    graft([direction], [torch.tensor(reference)])
    assert direction.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_graft_in_every_precision(dtype):
    direction, reference = torch.full((4,), 1e-3, dtype=dtype), torch.ones(4, dtype=dtype)
    graft([direction], [reference])
    torch.testing.assert_close(direction, reference)


@pytest.mark.parametrize("limit", [1e-6, 1e-2, 1e6])
def test_clip_kl_has_the_limit_over_all_layers_together(limit):
    directions, gradients = tensors((2, 3), (4,)), tensors((2, 3), (4,))
    lrs = [0.1, 3.0]
    kept = [direction.clone() for direction in directions]

    def change():
        return sum(
            lr**2 * float((d * g).sum())
            for lr, d, g in zip(lrs, directions, gradients, strict=True)
        )

    before = change()
    clip_kl(directions, gradients, lrs, limit)
    scale = min(1.0, (limit / before) ** 0.5)
    for direction, old in zip(directions, kept, strict=True):
        torch.testing.assert_close(direction, scale * old)


def test_clip_kl_of_zeros_and_of_nothing():
    direction = torch.zeros(3)
    clip_kl([direction], [torch.ones(3)], [1.0], limit=1e-3)
    assert direction.tolist() == [0.0, 0.0, 0.0]
    clip_kl([], [], [], limit=1e-3)
    graft([], [])
