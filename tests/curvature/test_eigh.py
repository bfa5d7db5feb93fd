"""Eigendecompositions of low rank by a sketch: as torch's, of all that isn't zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_tn.curvature import eigh as module
from kfac_tn.curvature.eigh import eigh

GROUPS, SIZE = 2, 48


@pytest.fixture
def sketches(monkeypatch):
    """Counts what is decomposed by torch, by size; small matrices are sketched, too."""
    sizes, plain = [], torch.linalg.eigh
    monkeypatch.setattr(module, "LEAST", 8)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: sizes.append(m.shape[-1]) or plain(m))
    return sizes


def of_rank(rank, dtype=torch.float64, spread=0.0, seed=0):
    """Matrices with eigenvalues from 1 down to 10^-spread, and zero."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(GROUPS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(random)[0][..., :rank]
    values = torch.logspace(0, -spread, rank, dtype=torch.float64)
    return ((vectors * values) @ vectors.mT).to(dtype)


def check(matrix, values, vectors, tolerance):
    scale = matrix.abs().amax()
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    assert ((vectors * values.unsqueeze(-2)) @ vectors.mT - matrix).abs().max() < tolerance * scale
    assert (vectors.mT @ vectors - eye).abs().max() < tolerance
    assert (values.diff() >= -tolerance * scale).all()
    expected = torch.linalg.eigvalsh(matrix.double()).clamp(min=0)
    assert (values - expected).abs().max() < tolerance * scale


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@settings(max_examples=30)
@given(rank=st.integers(1, SIZE), spread=st.floats(0, 12), seed=st.integers(0, 9))
def test_decomposes_whatever_the_rank(dtype, tolerance, rank, spread, seed):
    matrix = of_rank(rank, dtype, spread, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST", 8)
        check(matrix, *eigh(matrix), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_low_rank_is_found_in_a_sketch(dtype, sketches):
    limit = SIZE // module.SHARE
    for rank in range(1, SIZE + 1):
        sketches.clear()
        eigh(of_rank(rank, dtype))
        assert sketches == [limit if rank <= limit else SIZE]


def test_a_tail_above_rounding_is_not_lost(sketches):
    matrix = of_rank(4) + 1e-12 * torch.eye(SIZE, dtype=torch.float64)
    values, _ = eigh(matrix)
    assert sketches == [SIZE]
    assert (values > 5e-13).all()


def test_all_groups_have_a_low_rank_or_none_is_sketched(sketches):
    matrix = torch.cat([of_rank(2), of_rank(40)])
    check(matrix, *eigh(matrix), 1e-13)
    assert sketches == [SIZE]


def test_what_is_not_positive_is_left_to_torch(sketches):
    """Rows that fill up the last piece of a block-diagonal factor have a negative eigenvalue."""
    matrix = of_rank(3)
    matrix[:, -1], matrix[:, :, -1] = 0, 0
    matrix[:, -1, -1] = -5
    eigh(matrix)
    assert sketches == [SIZE]


@pytest.mark.parametrize("matrix", [torch.zeros(1, SIZE, SIZE), torch.zeros(3, SIZE, SIZE)])
def test_zero(matrix, sketches):
    values, vectors = eigh(matrix)
    assert (values == 0).all()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(SIZE).expand(len(matrix), -1, -1))


def test_the_same_each_time_and_no_random_number_is_taken(sketches):
    matrix = of_rank(3)
    state = torch.random.get_rng_state()
    first, second = eigh(matrix), eigh(matrix)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sketches == [SIZE // module.SHARE] * 2


def test_what_is_not_finite_stays_so(sketches):
    matrix = of_rank(3)
    matrix[1, 0, 0] = torch.nan
    try:
        values, vectors = eigh(matrix)
    except torch.linalg.LinAlgError:
        return
    assert not (values.isfinite().all() and vectors.isfinite().all())


def test_half_precision(sketches):
    matrix = of_rank(3).to(torch.bfloat16)
    values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == torch.bfloat16
    torch.testing.assert_close(
        (vectors * values.unsqueeze(-2)) @ vectors.mT, matrix, atol=0.05, rtol=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [0.5, 1.0])
def test_as_exact_as_torchs_own(dtype, rank):
    """Also where the rank is all that there are columns, which then aren't independent enough."""
    size = module.LEAST + 8
    for seed in range(6):
        rows = torch.randn(int(rank * size) // module.SHARE, size, dtype=dtype)
        matrix = (rows.mT @ rows)[None]
        errors = []
        for decompose in (eigh, torch.linalg.eigh):
            values, vectors = decompose(matrix)
            product = (vectors * values.unsqueeze(-2)) @ vectors.mT
            errors.append(float((product - matrix).norm()))
        assert errors[0] < 2 * errors[1], seed


def test_an_eigenvalue_beyond_the_sketch_is_not_lost():
    size = 2 * module.LEAST
    rank = size // module.SHARE
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    values = torch.tensor([1.0] * rank + [6e-5] + [0.0] * (size - rank - 1), dtype=torch.float64)
    matrix = ((vectors * values) @ vectors.mT).float()[None]
    found = eigh(matrix)[0][0].sort(descending=True).values[rank]
    assert abs(float(found) - 6e-5) < 5e-6
