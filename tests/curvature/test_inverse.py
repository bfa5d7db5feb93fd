"""The ladder of fallbacks: Cholesky, jitter, float64, and an honest report."""

from __future__ import annotations

import pytest
import torch

from kfac_tn.curvature import inverse as module
from kfac_tn.curvature.inverse import damped_inverse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_well_conditioned_batch(dtype):
    torch.manual_seed(0)
    root = torch.rand(4, 5, 6, dtype=dtype)
    factor, damping = root @ root.mT, torch.tensor([0.1, 1.0, 0.0, 10.0], dtype=dtype)
    kept = factor.clone()
    inverse, good = damped_inverse(factor, damping)
    eye = torch.eye(5, dtype=dtype)
    expected = (factor + damping.view(-1, 1, 1) * eye).double().inverse()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(inverse.double(), expected, rtol=tolerance, atol=tolerance)
    assert good.all()
    assert torch.equal(factor, kept)


# Matrix in float32, damping, and whether an inverse exists
LADDER = {
    "the shift is lost in float32": (1e6 * torch.ones(2, 2), 1e-3, True),
    "the shift is lost in float64 too": (1e20 * torch.ones(2, 2), 1e-3, True),
    "rounding made an eigenvalue negative": (
        torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-6]]),
        1e-8,
        True,
    ),
    "zero": (torch.zeros(2, 2), 1e-3, True),
    "zero without damping": (torch.zeros(2, 2), 0.0, False),
    "far from semi-definite": (torch.diag(torch.tensor([1.0, -1.0])), 0.1, False),
    "NaN": (torch.full((2, 2), torch.nan), 1.0, False),
    "inf": (torch.tensor([[torch.inf, 0.0], [0.0, 1.0]]), 1.0, False),
    "the inverse overflows": (torch.diag(torch.tensor([1e-39, 1.0])), 0.0, True),
}


@pytest.mark.parametrize(("bad", "damping", "invertible"), LADDER.values(), ids=LADDER)
def test_a_bad_matrix_never_raises_and_never_harms_its_neighbours(bad, damping, invertible):
    easy = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    batch = torch.stack([easy, bad, easy])
    inverse, good = damped_inverse(batch, torch.tensor([1.0, damping, 2.0]))
    assert good.tolist() == [True, invertible, True]
    for index, shift in ((0, 1.0), (2, 2.0)):
        torch.testing.assert_close(inverse[index], (easy + shift * torch.eye(2)).inverse())
    if invertible:
        assert inverse[1].isfinite().all()
        assert (torch.linalg.eigvalsh(inverse[1].double()) >= 0).all()


def test_the_rungs_in_their_order(monkeypatch):
    """Only what failed is tried again: with jitter, in float64, in float64 with jitter."""
    seen = []
    plain = module._cholesky_inverse

    def spy(matrix):
        seen.append((len(matrix), matrix.dtype))
        return plain(matrix)

    monkeypatch.setattr(module, "_cholesky_inverse", spy)
    damped_inverse(torch.stack([torch.eye(2), -torch.eye(2)]), torch.zeros(2))
    single, double = torch.float32, torch.float64
    assert seen == [(2, single), (1, single), (1, double), (1, double)]
