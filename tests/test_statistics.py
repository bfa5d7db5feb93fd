"""Sums of factors and averages of them, whatever form the factors come in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfac_tn.statistics import Factors, Gram, WeightedSum

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def make(form: str, seed: int, groups: int = 2, size: int = 4):
    """A factor in a form, and its matrix."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, groups, size, generator=generator).double()
    matrix = torch.einsum("ngi,ngj->gij", rows, rows)
    return {"rows": rows, "matrix": matrix}[form], matrix


FORMS = st.sampled_from(["rows", "matrix"])
WEIGHTS = st.one_of(
    st.integers(1, 9), st.floats(0, 5), st.floats(0, 5).map(lambda w: torch.tensor(w).double())
)


@given(terms=st.lists(st.tuples(FORMS, WEIGHTS), min_size=1, max_size=4), total=WEIGHTS)
def test_weighted_sum(terms, total):
    total = total + 1
    found, expected, values = WeightedSum(), torch.zeros(2, 4, 4).double(), []
    for seed, (form, weight) in enumerate(terms):
        value, matrix = make(form, seed)
        if form == "rows":
            values.append((value, value.clone()))
        found.add(Gram(value) if form == "rows" else value.clone(), weight)
        expected += matrix * weight
    result = Factors(found.result(total), torch.ones(1, 1, 1)).input
    torch.testing.assert_close(result, expected / total, **CLOSE)
    assert all(torch.equal(value, before) for value, before in values)  # rows aren't changed


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_and_matrices_average_alike(share, dtype):
    (rows, a), (_, b) = make("rows", 0), make("matrix", 1)
    moved = []
    for factors in (Factors(Gram(rows), b), Factors(a, b)):
        averages = [torch.full_like(f, 0.5, dtype=dtype) for f in (a, b)]
        factors.average_into(*averages, share)
        moved.append(averages)
        assert [t.shape for t in factors.new_zeros(5)] == [(5, 2, 4, 4), (5, 2, 4, 4)]
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
        (diagonal, _) = Factors(form, torch.ones(1, 1, 1)).diagonals()
        assert diagonal.isfinite().all() == matrix.isfinite().all()
