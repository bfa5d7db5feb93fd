"""Transposed matrices: equal to torch's, in every layout and dtype, and differentiable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kfac_tn.tn import transpose
from kfac_tn.tn.transpose import transposed

DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64


@pytest.fixture
def calls(monkeypatch):
    """Takes the shuffle for all sizes; counts its calls."""
    if not transpose._works:
        pytest.skip("torch has no shuffle of channels as it is expected")
    counted, operator = [], transpose._shuffled
    monkeypatch.setattr(transpose, "LEAST", 1)
    monkeypatch.setattr(transpose, "_shuffled", lambda x: counted.append(x) or operator(x))
    return counted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 5), (1, 1), (7, 1), (1, 7), (2, 3, 4), (2, 0, 3), (3, 1, 70, 33)]
)
def test_equals_torch(shape, dtype, calls):
    matrices = torch.randn(shape).mul(99).to(dtype)
    result = transposed(matrices)
    assert torch.equal(result, matrices.mT)
    assert bool(calls) == bool(matrices.numel())
    assert result.is_contiguous() or not calls


@given(*[st.integers(1, 200) for _ in range(3)])
def test_threshold_changes_no_result(batch, rows, columns):
    matrices = torch.randn(batch % 4 + 1, rows, columns)
    assert torch.equal(transposed(matrices), matrices.mT)


def test_special_values_stay_where_they_are(calls):
    matrices = torch.randn(40, 50)
    matrices[3, 4], matrices[30, 20], matrices[7, 7] = torch.nan, torch.inf, -0.0
    torch.testing.assert_close(transposed(matrices), matrices.mT, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(transposed(matrices)[7, 7])


def test_what_is_shuffled_has_memory_of_its_own(calls):
    for shape in ((1, 9), (9, 1), (8, 9)):
        matrices = torch.randn(shape)
        transposed(matrices).zero_()
        assert matrices.all()


@pytest.mark.parametrize(
    "layout",
    [lambda x: x.mT, lambda x: x[:, 1:], lambda x: x[::2], lambda x: x[:1].expand(5, -1)],
    ids=["transposed", "gaps", "strided", "expanded"],
)
def test_other_layouts_are_views(layout, calls):
    matrices = layout(torch.randn(20, 30))
    result = transposed(matrices)
    assert torch.equal(result, matrices.mT)
    assert not calls


def test_whoever_watches_has_torchs_own(calls):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transposed, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(transposed, (x,))
    plain = x.detach()
    assert torch.equal(torch.vmap(transposed)(plain[None])[0], plain.mT)
    jacobian = torch.func.jacrev(transposed)(plain)
    assert torch.equal(jacobian.sum((0, 1)), torch.ones(4, 5).double())
    assert torch.equal(jacobian.sum((2, 3)), torch.ones(5, 4).double())
    with FakeTensorMode():
        assert transposed(torch.empty(4, 5)).shape == (5, 4)
    assert not calls


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    compiled = torch.compile(transposed, backend="eager", fullgraph=True)
    matrices = torch.randn(200, 100)
    assert torch.equal(compiled(matrices), matrices.mT)
