"""Sums of factors and averages of them, whatever form the factors come in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kfac_tn.factors import Factors, Gram, Pending, WeightedSum
from kfac_tn.layers import partition

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


LAYER = nn.Conv1d(2, 6, 4, padding=1, bias=False, groups=2).double()
((BLOCK,), _) = partition(LAYER)


def make(form: str, seed: int):
    """A factor of two groups of size 4 in a form, and its matrix."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 2, 4, generator=generator).double()
    if form == "pending":
        x = rows.flatten(1)[:, :6].view(3, 2, 3)
        windows = nn.functional.pad(x, (1, 1)).unfold(2, 4, 1)
        return Pending(BLOCK, LAYER, x, 6, False), torch.einsum(
            "ngoi,ngoj->gij", windows, windows
        ) / 6
    matrix = torch.einsum("ngi,ngj->gij", rows, rows)
    return (Gram(rows) if form == "rows" else matrix), matrix


FORMS = st.sampled_from(["rows", "matrix", "pending"])
WEIGHTS = st.one_of(
    st.integers(1, 9), st.floats(0, 5), st.floats(0, 5).map(lambda w: torch.tensor(w).double())
)


@given(terms=st.lists(st.tuples(FORMS, WEIGHTS), min_size=1, max_size=4), total=WEIGHTS)
def test_weighted_sum(terms, total):
    total = total + 1
    found, expected, values = WeightedSum(), torch.zeros(2, 4, 4).double(), []
    for seed, (form, weight) in enumerate(terms):
        value, matrix = make(form, seed)
        if form != "matrix":
            kept = value.rows if form == "rows" else value.x
            values.append((kept, kept.clone()))
        found.add(value, weight)
        expected += matrix * weight
    result = Factors(found.result(total), torch.ones(1, 1, 1)).input
    torch.testing.assert_close(result, expected / total, **CLOSE)
    assert all(torch.equal(value, before) for value, before in values)  # rows aren't changed


@pytest.mark.parametrize("form", ["rows", "pending"])
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_forms_average_alike(form, share, dtype):
    (value, a), (_, b) = make(form, 0), make("matrix", 1)
    moved = []
    for factors in (Factors(value, b), Factors(a, b)):
        averages = [torch.full_like(f, 0.5, dtype=dtype) for f in (a, b)]
        factors.average_into(*averages, share)
        moved.append(averages)
        assert factors.like.dtype is torch.float64
        torch.testing.assert_close(factors.input, a, **CLOSE)
    torch.testing.assert_close(moved[0], moved[1])
    torch.testing.assert_close(moved[0][0].double(), 0.5 + share * (a - 0.5), rtol=1e-5, atol=1e-6)


BAD = [float("nan"), float("inf"), -float("inf"), 1e30, -1e25, 1.0, 0.0]


@given(entries=st.lists(st.tuples(st.integers(0, 23), st.sampled_from(BAD)), max_size=6))
def test_a_factor_is_finite_where_its_diagonal_is(entries):
    rows = torch.rand(3, 2, 4)
    for place, value in entries:
        rows.view(-1)[place] = value
    matrix = torch.einsum("ngi,ngj->gij", rows, rows)
    for form in (Gram(rows), matrix):
        (diagonal, _) = Factors(form, torch.ones(1, 1, 1)).witnesses()
        assert diagonal.isfinite().all() == matrix.isfinite().all()


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(entries=st.lists(st.tuples(st.integers(0, 29), st.sampled_from(BAD)), max_size=4))
def test_a_pending_factor_is_finite_where_its_witness_is(mode, dtype, entries):
    layer = nn.Conv1d(2, 3, 3, padding=1, padding_mode=mode).to(dtype)
    ((block,), _) = partition(layer)
    x = torch.rand(3, 2, 5).to(dtype)
    for place, value in entries:
        x.view(-1)[place] = value
    factors = Factors(Pending(block, layer, x, 15, True), torch.ones(1, 1, 1))
    assert factors.like.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    (witness, _) = factors.witnesses()
    assert witness.isfinite().all() == factors.input.isfinite().all()
