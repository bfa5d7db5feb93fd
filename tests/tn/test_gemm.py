"""Products of matrices by oneDNN: equal to float64's, and left to torch wherever more is asked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kfac_tn.tn import gemm

LAYOUTS = {
    "rows": lambda batch, rows, columns: torch.randn(batch, rows, columns),
    "columns": lambda batch, rows, columns: torch.randn(batch, columns, rows).mT,
    "gaps": lambda batch, rows, columns: torch.randn(batch, rows, columns + 3)[:, :, 1:-2],
    "gaps in columns": lambda batch, rows, columns: torch.randn(batch, columns, rows + 1).mT[:, 1:],
    "strided": lambda batch, rows, columns: torch.randn(batch, 2 * rows, 3 * columns)[:, ::2, ::3],
    "batch inside": lambda batch, rows, columns: torch.randn(rows, batch, columns).movedim(1, 0),
    "expanded": lambda batch, rows, columns: torch.randn(rows, columns).expand(batch, -1, -1),
    "expanded columns": lambda batch, rows, columns: torch.randn(columns, rows).mT.expand(
        batch, -1, -1
    ),
    "parameter": lambda batch, rows, columns: torch.nn.Parameter(torch.randn(batch, rows, columns)),
}


@pytest.fixture
def calls(monkeypatch):
    """Takes oneDNN for all sizes; counts its calls."""
    if gemm._linear is None:
        pytest.skip("torch has been built without oneDNN")
    counted, operator = [], gemm._linear

    def linear(*arguments):
        counted.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(gemm, "_linear", linear)
    monkeypatch.setattr(gemm, "SUITS_BLAS", False)
    for name in ("LEAST_PRODUCT", "LEAST_SUM", "LEAST_COPY"):
        monkeypatch.setattr(gemm, name, 1)
    return counted


@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids="-".join)
def test_equals_the_product_in_float64(layouts, calls):
    generator = torch.Generator().manual_seed(0)
    for turn in range(4):
        batch, rows, terms, columns = torch.randint(1, 40, (4,), generator=generator).tolist()
        terms = 1 if turn == 0 else terms  # outer products
        first = LAYOUTS[layouts[0]](batch % 4 + 1, rows, terms)
        second = LAYOUTS[layouts[1]](batch % 4 + 1, terms, columns)
        with torch.no_grad():
            result = gemm.multiply(first, second)
            expected = torch.bmm(first.double(), second.double())
        assert result.shape == expected.shape
        assert result.is_contiguous()
        assert (result - expected).abs().max() < 1e-5 * (1 + expected.abs().max())
    assert calls


@given(st.integers(1, 3), *[st.integers(1, 80) for _ in range(3)])
def test_thresholds_change_no_result(batch, rows, terms, columns):
    first, second = torch.randn(batch, rows, terms), torch.randn(batch, terms, columns)
    expected = torch.bmm(first.double(), second.double())
    assert (gemm.multiply(first, second) - expected).abs().max() < 1e-4


def _derivative(a, b):
    a = a.requires_grad_()
    return torch.autograd.grad(gemm.multiply(a, b).square().sum(), a)[0]


ASKED = {
    "autograd": (_derivative, lambda a, b: 2 * (a @ b) @ b.mT),
    "vmap": (
        lambda a, b: torch.vmap(gemm.multiply)(a[None], b[None])[0],
        torch.matmul,
    ),
    "jvp": (
        lambda a, b: torch.func.jvp(lambda x: gemm.multiply(x, b), (a,), (2 * a,))[1],
        lambda a, b: 2 * a @ b,
    ),
    "grad": (
        lambda a, b: torch.func.grad(lambda x: gemm.multiply(x, b).square().sum())(a),
        lambda a, b: 2 * (a @ b) @ b.mT,
    ),
    "compile": (
        lambda a, b: torch.compile(gemm.multiply, fullgraph=True, backend="aot_eager")(a, b),
        torch.matmul,
    ),
    "float64": (lambda a, b: gemm.multiply(a.double(), b.double()).float(), torch.matmul),
    "meta": (lambda a, b: gemm.multiply(a.to("meta"), b.to("meta")), None),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_onednn_cannot_do_is_left_to_torch(name, calls):
    call, expected = ASKED[name]
    a, b = torch.randn(2, 12, 9), torch.randn(2, 9, 7)
    result = call(a.clone(), b)
    if expected is None:
        assert result.shape == (2, 12, 7)
    else:
        assert torch.allclose(result, expected(a, b), atol=1e-4)
    assert not calls


def test_modes_are_respected(calls):
    a, b = torch.randn(1, 12, 9), torch.randn(1, 9, 7)
    with FlopCounterMode(display=False) as counter:
        gemm.multiply(a, b)
    assert counter.get_total_flops() == 2 * 12 * 9 * 7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gemm.multiply(a, b).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        gemm.multiply(a, b)
    assert not calls


def test_products_are_all_of_blas_where_that_is_faster(calls, monkeypatch):
    monkeypatch.setattr(gemm, "SUITS_BLAS", True)
    first, second = torch.randn(1, 12, 9), torch.randn(1, 9, 7)
    assert torch.equal(gemm.multiply(first, second), torch.bmm(first, second))
    assert not calls


def test_a_torch_that_arranges_its_operators_differently(monkeypatch):
    """Products are torch's then; nothing fails."""

    def other(*arguments):
        raise TypeError("_linear_pointwise() takes 3 arguments")

    assert gemm._find() is gemm._linear
    if gemm._linear is not None:
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", other)
    monkeypatch.setattr(gemm, "_linear", gemm._find())
    assert gemm._linear is None
    first, second = torch.randn(1, 200, 200), torch.randn(1, 200, 200)
    assert torch.equal(gemm.multiply(first, second), torch.bmm(first, second))
