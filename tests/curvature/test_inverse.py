"""The ladder of fallbacks: Cholesky, jitter, float64, and an honest report."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_tn import testing
from kfac_tn.curvature import inverse as module
from kfac_tn.curvature.inverse import damped_inverses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_well_conditioned_batch(dtype):
    torch.manual_seed(0)
    root = torch.rand(4, 5, 6, dtype=dtype)
    factor, damping = root @ root.mT, torch.tensor([0.1, 1.0, 0.0, 10.0], dtype=dtype)
    kept = factor.clone()
    ((inverse, good),) = damped_inverses([factor], [damping])
    eye = torch.eye(5, dtype=dtype)
    expected = (factor + damping.view(-1, 1, 1) * eye).double().inverse()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(inverse.double(), expected, rtol=tolerance, atol=tolerance)
    assert good
    assert torch.equal(factor, kept)


@pytest.mark.parametrize("size", [65, 128, 300])
def test_large_matrices_in_rows_or_columns(size):
    """What is inverted in place comes out symmetric, in rows, and leaves the factor as it is."""
    torch.manual_seed(0)
    root = torch.rand(2, size, 2 * size, dtype=torch.float64)
    for factor in (root @ root.mT, (root @ root.mT).mT):
        kept, damping = factor.clone(), torch.tensor([0.1, 10.0]).double()
        ((inverse, good),) = damped_inverses([factor], [damping])
        expected = torch.linalg.inv(factor + damping.view(-1, 1, 1) * torch.eye(size).double())
        assert good
        torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(inverse, inverse.mT)
        assert inverse.is_contiguous()
        assert torch.equal(factor, kept)


single, double = torch.float32, torch.float64

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
    expected = torch.stack([(easy + shift * torch.eye(2)).inverse() for shift in (1.0, 2.0)])
    # In a batch of its neighbours, as a group among groups, and both.
    dampings = torch.tensor([1.0, damping, 2.0])
    factors = [torch.stack([easy, bad, easy]), easy[None], bad[None], torch.stack([easy, easy])]
    shifts = [dampings, dampings[:1], dampings[1:2], dampings[::2]]
    kept = [factor.clone() for factor in factors]
    (mixed, mixed_good), (one, one_good), (alone, alone_good), (two, two_good) = damped_inverses(
        factors, shifts
    )
    assert (mixed_good, one_good, alone_good, two_good) == (invertible, True, invertible, True)
    torch.testing.assert_close(mixed[::2], expected)
    torch.testing.assert_close(one, expected[:1])
    torch.testing.assert_close(two, expected)
    for inverse in (mixed[1], alone[0]) if invertible else ():
        assert inverse.isfinite().all()
        assert (torch.linalg.eigvalsh(inverse.double()) >= 0).all()
    for factor, before in zip(factors, kept, strict=True):
        torch.testing.assert_close(factor, before, rtol=0, atol=0, equal_nan=True)


def test_the_rungs_in_their_order(monkeypatch):
    """Only what failed is tried again: with jitter, in float64, in float64 with jitter."""
    seen = []
    plain = module._cholesky_inverse

    def spy(matrix, shift):
        seen.append((len(matrix), matrix.dtype))
        return plain(matrix, shift)

    monkeypatch.setattr(module, "_cholesky_inverse", spy)
    pair = torch.stack([torch.eye(2), -torch.eye(2)])
    ((inverse, good),) = damped_inverses([pair], [torch.zeros(2)])
    assert not good
    assert torch.equal(inverse[0], torch.eye(2))
    assert seen == [(2, single), (1, single), (1, double), (1, double)]


@pytest.mark.parametrize("limit", [1, 60, 2**20])
def test_equal_sizes_share_a_batch_up_to_a_limit_and_any_order_comes_back(monkeypatch, limit):
    """Two sizes and two dtypes, groups of several numbers."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "_BATCH", limit)
    calls = []
    plain = module._cholesky_inverse

    def spy(matrix, shift):
        calls.append(len(matrix))
        return plain(matrix, shift)

    monkeypatch.setattr(module, "_cholesky_inverse", spy)
    factors, dampings = [], []
    for groups, size, dtype in ((1, 3, single), (2, 5, double), (2, 3, single), (1, 3, double)) * 3:
        root = torch.rand(groups, size, size, dtype=dtype)
        factors.append(root @ root.mT)
        dampings.append(torch.rand(groups, dtype=dtype) + 0.1)
    results = damped_inverses(factors, dampings)
    for factor, damping, (inverse, good) in zip(factors, dampings, results, strict=True):
        assert good
        assert inverse.dtype == factor.dtype
        shifted = factor + damping.view(-1, 1, 1) * torch.eye(factor.shape[-1], dtype=factor.dtype)
        torch.testing.assert_close(
            inverse.double(), shifted.double().inverse(), rtol=1e-3, atol=1e-3
        )
    assert len(calls) == {1: 12, 60: 6, 2**20: 3}[limit]
    assert sum(calls) == sum(map(len, factors))
    assert damped_inverses([], []) == []


@settings(max_examples=60)
@given(
    size=st.integers(1, 40),
    rank=st.integers(0, 5),
    scale=st.sampled_from([1e-18, 1e-6, 1.0, 1e6, 1e15]),
    damping=st.sampled_from([1e-8, 1e-3]),
    seed=st.integers(0, 1000),
)
def test_rank_deficient_factors_of_any_scale_have_a_positive_inverse(
    size, rank, scale, damping, seed
):
    """In float32, damped in units of the factor: never refused, and what it should be."""
    torch.manual_seed(seed)
    root = torch.rand(1, size, rank)
    factor = scale * (root @ root.mT)
    shift = damping * (factor.diagonal(dim1=1, dim2=2).mean(1) if rank else torch.ones(1))
    ((inverse, good),) = damped_inverses([factor], [shift])
    assert good
    assert inverse.isfinite().all()
    values = torch.linalg.eigvalsh(inverse[0].double())
    assert values.min() > -1e-5 * values.max()
    if damping == 1e-3:  # far above the rounding error of the factor
        exact = (factor + shift.view(-1, 1, 1) * torch.eye(size)).double().inverse()
        assert testing.relative_error(inverse.double(), exact) < 1e-2
