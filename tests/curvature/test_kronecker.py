"""Blocks against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size

from kfac_tn.curvature.block import DiagonalBlock
from kfac_tn.curvature.kronecker import KroneckerBlock, mean_eigenvalue, pi_split
from kfac_tn.curvature.layout import Layout

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def spd(*shape: int, rank: int | None = None) -> torch.Tensor:
    """Random symmetric positive semi-definite matrices ``[*shape, shape[-1]]``."""
    root = torch.rand(*shape, rank or shape[-1] + 1, dtype=torch.float64)
    return root @ root.mT


def dense(block: KroneckerBlock) -> torch.Tensor:
    """From the definition: B (x) A in each group; rows of the weight, then the bias."""
    a, b = block.input_factor, block.grad_output_factor
    groups, d_out = b.shape[:2]
    if block.layout.bias_name is None:
        return torch.block_diag(*[torch.kron(b[g], a[g]) for g in range(groups)])
    if block.bias == "separate":
        weight = [torch.kron(b[g], a[g]) for g in range(groups)]
        return torch.block_diag(*weight, *b)
    d_in = a.shape[1] - 1
    joint = torch.block_diag(*[torch.kron(b[g], a[g]) for g in range(groups)])
    places = torch.arange(len(joint)).view(groups * d_out, d_in + 1)
    order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
    return joint[order][:, order]


def matrix(block) -> torch.Tensor:
    """The matrix of a block, by its products with unit vectors."""
    shapes = {name: entry.shape for name, entry in block.diagonal().items()}
    total = sum(shape.numel() for shape in shapes.values())
    columns = []
    for unit in torch.eye(total, dtype=torch.float64):
        pieces = unit.split([shape.numel() for shape in shapes.values()])
        v = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        product = block @ v
        assert {n: p.shape for n, p in product.items()} == shapes
        columns.append(torch.cat([product[name].flatten() for name in shapes]))
    return torch.stack(columns, dim=1)


def flat(entries: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([entry.flatten() for entry in entries.values()])


@st.composite
def blocks(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    groups, d_in, d_out = (draw(st.integers(1, 3)) for _ in range(3))
    bias = draw(st.sampled_from([None, "joint", "separate"]))
    layout = Layout("w", Size([groups * d_out, d_in]), None if bias is None else "b", groups)
    rank = draw(st.sampled_from([None, 1]))
    a = spd(groups, d_in + (bias == "joint"), rank=rank)
    return KroneckerBlock(layout, a, spd(groups, d_out), bias or "separate")


@settings(max_examples=40, deadline=None)
@given(blocks(), st.sampled_from([1e-2, 1.0, 30.0]))
def test_algebra_is_that_of_the_dense_matrix(block, damping):
    expected = dense(block)
    torch.testing.assert_close(matrix(block), expected, **CLOSE)
    torch.testing.assert_close(flat(block.diagonal()), expected.diagonal(), **CLOSE)
    torch.testing.assert_close(block.trace(), expected.trace(), **CLOSE)
    damped = expected + damping * torch.eye(len(expected), dtype=torch.float64)
    inverse = block.inverse(damping)
    torch.testing.assert_close(matrix(inverse), damped.inverse(), **CLOSE)
    torch.testing.assert_close(flat(inverse.diagonal()), damped.inverse().diagonal(), **CLOSE)
    torch.testing.assert_close(inverse.trace(), damped.inverse().trace(), **CLOSE)
    # The inverse is a block itself, with an inverse of its own.
    damped = damped.inverse() + 0.5 * torch.eye(len(expected), dtype=torch.float64)
    torch.testing.assert_close(matrix(inverse.inverse(0.5)), damped.inverse(), **CLOSE)


@settings(max_examples=30, deadline=None)
@given(blocks(), st.sampled_from([1e-2, 1.0]))
def test_pi_damping_is_that_of_the_damped_factors(block, damping):
    """Separate weight and bias are one matrix here: A has a 1 at the bias' place."""
    a, b = block.input_factor, block.grad_output_factor
    if block.layout.bias_name is not None and block.bias == "separate":
        a = torch.stack([torch.block_diag(each, torch.ones(1, 1).double()) for each in a])
    pi = torch.sqrt(a.diagonal(dim1=1, dim2=2).mean(1) / b.diagonal(dim1=1, dim2=2).mean(1)).view(
        -1, 1, 1
    )
    eye_a, eye_b = (torch.eye(m.shape[-1], dtype=torch.float64) for m in (a, b))
    damped = KroneckerBlock(
        block.layout, a + damping**0.5 * pi * eye_a, b + damping**0.5 / pi * eye_b, "joint"
    )
    expected = dense(damped).inverse()
    torch.testing.assert_close(matrix(block.inverse(damping, "pi")), expected, **CLOSE)


def test_pi_split_minimizes_its_bound():
    """trace(A) shift_B / d_out = trace(B) shift_A / d_in at the best split, product = damping."""
    a, b = 100 * spd(2, 3), spd(2, 4)
    shift_a, shift_b = pi_split(a, b, damping=0.3)
    torch.testing.assert_close(shift_a * shift_b, torch.full((2,), 0.3).double())
    torch.testing.assert_close(mean_eigenvalue(a) * shift_b, mean_eigenvalue(b) * shift_a, **CLOSE)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_pi_split_of_zero_factors_is_even(a, b):
    eye = torch.eye(2, dtype=torch.float64)[None]
    for shift in pi_split(a * eye, b * eye, damping=0.04):
        torch.testing.assert_close(shift, torch.tensor([0.2]).double())


def test_a_zero_block_has_the_inverse_of_its_damping():
    layout = Layout("w", Size([2, 3]), "b")
    zero = torch.zeros(1, 3, 3).double(), torch.zeros(1, 2, 2).double()
    for split in ("exact", "pi"):
        inverse = matrix(KroneckerBlock(layout, *zero).inverse(0.5, split))
        if split == "exact":
            torch.testing.assert_close(inverse, 2 * torch.eye(8).double())
        else:
            assert inverse.isfinite().all()


def test_rounding_makes_no_negative_eigenvalue():
    """The smallest eigenvalues of a large singular factor, in float32, are about -1."""
    torch.manual_seed(0)
    root = 1e3 * torch.rand(1, 20, 2)
    factor = root @ root.mT
    assert torch.linalg.eigvalsh(factor).min() < -1e-3
    block = KroneckerBlock(Layout("w", Size([20, 20])), factor, factor)
    assert (block.inverse(1e-3).values > 0).all()


def test_layout_is_a_bijection_also_for_kernels():
    layout = Layout("w", Size([4, 3, 2, 2]), "b", groups=2)
    tensors = {"w": torch.rand(4, 3, 2, 2), "b": torch.rand(4)}
    stacked = layout.to_matrix(tensors)
    assert stacked.shape == (2, 2, 13)
    assert torch.equal(stacked[1, 0], torch.cat([tensors["w"][2].flatten(), tensors["b"][2:3]]))
    for name, tensor in layout.from_matrix(stacked).items():
        assert torch.equal(tensor, tensors[name])


def test_diagonal_block():
    block = DiagonalBlock("w", torch.tensor([[1.0, 2.0], [0.0, 3.0]]).double())
    torch.testing.assert_close(matrix(block), torch.diag(torch.tensor([1.0, 2, 0, 3]).double()))
    inverse = matrix(block.inverse(1.0, "pi"))
    torch.testing.assert_close(inverse, torch.diag(1 / torch.tensor([2.0, 3, 1, 4]).double()))
    assert block.trace() == 6
