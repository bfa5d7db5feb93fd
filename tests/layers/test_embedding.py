"""Embeddings against autograd and the dense GGN, in float64, their options drawn at random."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfac_tn
from kfac_tn import functional
from kfac_tn.curvature.calls import Calls
from kfac_tn.testing import dense_ggn, relative_error

TOLERANCE = 1e-10
SHARED = st.lists(st.integers(1, 4), max_size=2).map(tuple)
INTEGERS = st.sampled_from([torch.int64, torch.int32])


@st.composite
def embeddings(draw: Any, **fixed: Any) -> nn.Embedding:
    """An embedding with any of its options but those whose gradient isn't the loss's."""
    size, width = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    options = {
        "padding_idx": draw(st.none() | st.integers(-size, size - 1)),
        "max_norm": draw(st.none() | st.just(0.7)),
        "norm_type": draw(st.sampled_from([1.0, 2.0])),
        "sparse": draw(st.booleans()),
        **fixed,
    }
    return nn.Embedding(size, width, **options, dtype=torch.float64)


class Model(nn.Module):
    """Looks up, once or twice, and mixes positions."""

    def __init__(self, embedding: nn.Embedding, twice: bool = False):
        super().__init__()
        self.embedding, self.twice = embedding, twice
        self.head = nn.Linear(embedding.embedding_dim, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._look_up(x).tanh().mean(1)
        if self.twice:
            hidden = hidden * self._look_up(x[..., :2] if x.ndim > 1 else x).sum(1)
        return self.head(hidden.tanh())

    def _look_up(self, x: Tensor) -> Tensor:
        """`[N, R, d]`."""
        rows = self.embedding(x)
        return rows.reshape(len(x), -1, rows.shape[-1])


def problem(embedding: nn.Embedding, shape: tuple[int, ...], dtype: torch.dtype, twice: bool):
    model = Model(embedding, twice)
    x = torch.randint(embedding.num_embeddings, shape, dtype=dtype)
    model(x)  # shortens the rows that max_norm is about
    return model, x, torch.randint(2, shape[:1])


@settings(max_examples=40, deadline=None)
@given(embeddings(), st.integers(1, 4), SHARED, INTEGERS, st.booleans(), st.integers(0, 99))
def test_oracle_10_diagonals_and_per_example_gradients(
    embedding, examples, shared, dtype, twice, seed
):
    torch.manual_seed(seed)
    model, x, y = problem(embedding, (examples, *shared), dtype, twice)
    loss_fn = nn.CrossEntropyLoss()
    calls = Calls(model, (x, y))
    calls.verify()
    assert calls.unknown == set()  # none is differentiated alone
    twin = copy.deepcopy(model)
    twin.embedding.sparse = False
    gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    for n in range(examples):
        loss = loss_fn(twin(x[n : n + 1]), y[n : n + 1]) / examples
        (expected,) = torch.autograd.grad(loss, twin.embedding.weight)
        torch.testing.assert_close(
            gradients["embedding.weight"][n], expected, rtol=TOLERANCE, atol=TOLERANCE
        )
    expected = dense_ggn(twin, loss_fn, x, y).diagonal()[: embedding.weight.numel()]
    for data in ([(x, y)], list(zip(x.split(1), y.split(1), strict=True))):  # oracle 9
        diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, data)["embedding.weight"]
        torch.testing.assert_close(diagonal.flatten(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_chunks_change_nothing_and_too_little_memory_is_refused():
    torch.manual_seed(0)
    x, g = torch.randint(9, (6, 5)), torch.randn(6, 5, 3, dtype=torch.float64)
    each = functional.embedding_per_example_weight_gradient(x, g, 9, padding_idx=2)
    expected = each.square().sum(0)
    for max_memory in (None, 10_000, 3_000):
        diagonal = functional.embedding_weight_diagonal(x, g, 9, 2, max_memory)
        assert relative_error(diagonal, expected) < TOLERANCE
    with pytest.raises(ValueError, match="max_memory=100 bytes is too little"):
        functional.embedding_weight_diagonal(x, g, 9, max_memory=100)
    for wrong in (x[0, 0], x[:, :3], x[:0]):
        with pytest.raises(ValueError, match=r"must be \[N, \*shared\]"):
            functional.embedding_weight_diagonal(wrong, g, 9)
