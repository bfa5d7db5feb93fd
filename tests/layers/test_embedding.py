"""Embeddings against autograd and the dense GGN, in float64, their options drawn at random."""

from __future__ import annotations

import copy
import itertools
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


# ---- the same as a linear layer on one-hot vectors -------------------------------------------


class OneHot(nn.Module):
    """What an embedding is: a linear layer on one-hot vectors, and on zeros for padding."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.size, self.padding_idx = embedding.num_embeddings, embedding.padding_idx
        self.embedding_dim = embedding.embedding_dim
        self.linear = nn.Linear(self.size, self.embedding_dim, bias=False, dtype=torch.float64)
        self.linear.weight.data = embedding.weight.detach().T.clone()

    def forward(self, x: Tensor) -> Tensor:
        vectors = nn.functional.one_hot(x.long(), self.size).double()
        if self.padding_idx is not None:
            vectors[..., self.padding_idx] = 0
        return self.linear(vectors)


def twins(twice: bool = False, **options: Any) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Model(nn.Embedding(7, 3, **options, dtype=torch.float64), twice)
    twin = Model(OneHot(model.embedding), twice)
    twin.head.load_state_dict(model.head.state_dict())
    x, y = torch.randint(7, (5, 4)), torch.randint(2, (5,))
    torch.testing.assert_close(model(x), twin(x))
    return model, twin, x, y


def untransposed(dense: Tensor) -> Tensor:
    """Of the twin's linear layer, ``[d, V]``, as of the embedding's ``[V, d]``."""
    order = torch.arange(21).view(3, 7).T.flatten()
    return dense[order][:, order]


PADDINGS = [None, 2]


@pytest.mark.parametrize("padding_idx", PADDINGS)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_kfac_is_that_of_a_linear_layer_on_one_hot_vectors(
    fisher, approximation, twice, padding_idx
):
    model, twin, x, y = twins(twice, padding_idx=padding_idx)
    loss_fn, options = nn.CrossEntropyLoss(), {"fisher": fisher, "approximation": approximation}
    expected = kfac_tn.compute_kfac(twin, loss_fn, [(x, y)], **options)
    expected = untransposed(expected.submatrix(["embedding.linear.weight"]).to_dense())
    for data in ([(x, y)], list(zip(x.split([2, 3]), y.split([2, 3]), strict=True))):
        curvature = kfac_tn.compute_kfac(model, loss_fn, data, **options)
        curvature = curvature.submatrix(["embedding.weight"])
        assert relative_error(curvature.to_dense(), expected) < TOLERANCE
    dense = expected + 0.1 * torch.eye(21, dtype=torch.float64)
    assert relative_error(curvature.inverse(0.1).to_dense(), dense.inverse()) < TOLERANCE
    assert relative_error(curvature.logdet(0.1), dense.logdet()) < TOLERANCE
    assert (
        relative_error(curvature.diagonal()["embedding.weight"].flatten(), expected.diagonal())
        < TOLERANCE
    )
    assert relative_error(curvature.frobenius_norm(), expected.norm()) < TOLERANCE
    loaded = type(curvature).from_state_dict(curvature.state_dict())
    assert torch.equal(loaded.to_dense(), curvature.to_dense())


@pytest.mark.parametrize("padding_idx", PADDINGS)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_oracle_6_ekfac_has_the_trace_of_the_ggn(approximation, twice, padding_idx):
    model, twin, x, y = twins(twice, padding_idx=padding_idx)
    loss_fn, options = nn.CrossEntropyLoss(), {"fisher": "type-2", "approximation": approximation}
    ggn = dense_ggn(model, loss_fn, x, y)[:21, :21]
    ekfac = kfac_tn.compute_ekfac(model, loss_fn, [(x, y)], **options).blocks["embedding"]
    assert relative_error(ekfac.trace(), ggn.trace()) < TOLERANCE
    diagonal = kfac_tn.compute_kfac(model, loss_fn, [(x, y)], **options, curvature="diagonal")
    actual = diagonal.blocks["embedding.weight"].values.flatten()
    assert relative_error(actual, ggn.diagonal()) < TOLERANCE
    if approximation == "expand":  # where eigenvectors are no matter of rounding
        expected = kfac_tn.compute_ekfac(twin, loss_fn, [(x, y)], **options)
        expected = untransposed(expected.submatrix(["embedding.linear.weight"]).to_dense())
        actual = torch.stack(
            [
                (ekfac @ {"embedding.weight": row.view(7, 3)})["embedding.weight"].flatten()
                for row in torch.eye(21, dtype=torch.float64)
            ]
        )
        assert relative_error(actual, expected) < TOLERANCE


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 4, **options: Any) -> kfac_tn.KFAC:
    loss_fn = nn.CrossEntropyLoss()
    options = {"factor_interval": 1, "inverse_interval": 2, **options}
    optimizer = kfac_tn.KFAC(model, loss_fn, noise_damping=0, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"approximation": "reduce"},
        {"damping_split": "exact"},
        {"fisher": "empirical", "step_rule": "graft"},
        {"fisher": "forward-only", "step_rule": "fixed", "lr": 0.1},
        {"curvature": "ekfac", "mc_samples": 2},
        {"curvature": "ekfac", "approximation": "reduce"},
        {"curvature": "diagonal", "fisher": "type-2"},
        {"max_dim": 2, "large_factors": "diagonal"},
        {"max_dim": 4, "large_factors": "blocks", "approximation": "reduce"},
        {"max_dim": 4, "large_factors": "blocks", "approximation": "reduce", "curvature": "ekfac"},
    ],
    ids=str,
)
@pytest.mark.parametrize("padding_idx", PADDINGS)
@pytest.mark.parametrize("twice", [False, True])
def test_steps_are_those_of_a_linear_layer_on_one_hot_vectors(twice, padding_idx, options):
    model, twin, x, y = twins(twice, padding_idx=padding_idx)
    before = model.embedding.weight.detach().clone()
    train(model, x, y, **options)
    train(twin, x, y, **options)
    expected = twin.embedding.linear.weight.T
    assert not torch.equal(model.embedding.weight, before)
    torch.testing.assert_close(model.embedding.weight, expected, rtol=1e-8, atol=1e-8)
    if padding_idx is not None:
        assert not model.embedding.weight[padding_idx].any()


# ---- indices that examples share -------------------------------------------------------------


class Positioned(nn.Module):
    """Tokens and positions; these without an axis of examples, or each example's own."""

    def __init__(self, own: bool, form: str):
        super().__init__()
        self.own, self.form = own, form
        self.tokens, self.positions = nn.Embedding(5, 2), nn.Embedding(3, 2)
        self.head = nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(3)
        if self.own:
            positions = positions.expand(len(x), -1)
        elif self.form == "[1, T]":
            positions = positions[None]
        hidden = (self.tokens(x) + self.positions(positions)).tanh()
        if self.form == "merged":  # as language models compute their loss
            return self.head(hidden).flatten(0, 1)
        return self.head(hidden.mean(1))


def positioned(form: str, examples: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, own = Positioned(False, form), Positioned(True, form)
    own.load_state_dict(model.state_dict())
    rows = 3 * examples if form == "merged" else examples
    return model, own, torch.randint(5, (examples, 3)), torch.randint(2, (rows,))


FORMS = [("[T]", 2), ("[T]", 3), ("[1, T]", 2), ("merged", 3), ("merged", 2)]


@pytest.mark.parametrize(("form", "examples"), FORMS)
@pytest.mark.parametrize(
    ("kind", "fisher"),
    [
        *itertools.product(["kfac"], ["type-2", "mc", "empirical"]),
        *itertools.product(["ekfac", "diagonal"], ["type-2"]),
    ],
)
def test_shared_positions_have_the_curvature_of_everybodys_own_on_average(
    kind, fisher, form, examples
):
    """Gradients summed over examples: unbiased, however many examples and positions there are."""
    model, own, x, y = positioned(form, examples)
    loss_fn, name, times = nn.CrossEntropyLoss(reduction="sum"), "positions.weight", 200

    def diagonal(model: nn.Module, fisher: str, times: int) -> Tensor:
        data = [(x, y)] * times  # each time with signs or targets of its own
        options = {"fisher": fisher, "generator": torch.Generator().manual_seed(0)}
        if kind == "ekfac":
            return kfac_tn.compute_ekfac(model, loss_fn, data, **options).trace() / times
        curvature = kfac_tn.compute_kfac(model, loss_fn, data, curvature=kind, **options)
        return curvature.diagonal()[name] / times

    if kind != "kfac" and form == "merged":  # linear layers want the examples apart
        for each in (model, own):
            each.requires_grad_(False).positions.requires_grad_(True)
    expected = diagonal(own, "empirical" if fisher == "empirical" else "type-2", 1)
    assert relative_error(diagonal(model, fisher, times), expected) < 0.25


def test_an_optimizer_with_the_empirical_fisher_refuses_shared_positions():
    """Whose signs aren't random: it takes the gradients of the user's own pass."""
    for form, examples in FORMS:
        model, own, x, y = positioned(form, examples)
        train(own, x, y, fisher="empirical", step_rule="graft")
        with pytest.raises(ValueError, match="'positions' looks up indices that examples share"):
            train(model, x, y, fisher="empirical", step_rule="graft")
        kinds = {"tokens": "kfac", "positions": "none", "head": "kfac"}
        optimizer = train(model, x, y, fisher="empirical", step_rule="graft", curvature=kinds)
        (row,) = (row for row in optimizer.coverage() if row.parameter == "positions.weight")
        assert (row.treatment, row.why) == ("Adam", "curvature is 'none'")


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_a_model_with_shared_positions_trains(curvature):
    model, _, x, y = positioned("[T]", 3)
    y = y.clone()
    y[0] = 1 - y[1]
    before = nn.functional.cross_entropy(model(x), y)
    optimizer = train(model, x, y, steps=20, curvature=curvature)
    assert nn.functional.cross_entropy(model(x), y) < before
    assert {row.treatment for row in optimizer.coverage()} != {"Adam"}


# ---- options ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(embeddings(sparse=False), SHARED, INTEGERS, st.booleans(), st.integers(0, 99), st.data())
def test_options_are_honoured_while_training(embedding, shared, dtype, twice, seed, data):
    torch.manual_seed(seed)
    model, x, y = problem(embedding, (3, *shared), dtype, twice)
    kinds, approximations = ["kfac", "ekfac", "diagonal"], ["expand", "reduce"]
    options = {
        "curvature": data.draw(st.sampled_from(kinds)),
        "approximation": data.draw(st.sampled_from(approximations)),
    }
    weight = embedding.weight.detach().clone()
    optimizer = train(model, x, y, **options)
    model(x)
    used = embedding.weight[x.long().flatten().unique()]
    assert used.isfinite().all()
    if embedding.max_norm is not None:
        norms = used.norm(p=embedding.norm_type, dim=1)
        assert (norms <= embedding.max_norm * (1 + 1e-6)).all()
    untouched = set(range(len(weight))) - set(x.flatten().tolist())
    if options == {"curvature": "ekfac", "approximation": "reduce"}:
        untouched = set()  # eigenvectors of A's null space mix them with what is looked up
    if embedding.padding_idx is not None:
        untouched.add(embedding.padding_idx)
        weight[embedding.padding_idx] *= 0 if embedding.max_norm is None else 1
    (row,) = (row for row in optimizer.coverage() if row.parameter == "embedding.weight")
    assert row.treatment != "Adam"
    for index in untouched:
        torch.testing.assert_close(embedding.weight[index], weight[index], rtol=1e-9, atol=1e-9)


def test_coverage_says_what_an_embedding_has_and_why_it_has_nothing():
    cases = {
        "expand": ({}, "expand", "Embedding: factors 3 x 7, the input's a diagonal"),
        "reduce": ({}, "reduce", "Embedding: factors 3 x 7"),
        "scaled": ({"scale_grad_by_freq": True}, "expand", "its gradient isn't that of the loss"),
        "sparse": ({"sparse": True}, "expand", "sparse=True: its gradient is no matrix"),
    }
    for options, approximation, expected in cases.values():
        model = Model(nn.Embedding(7, 3, **options))
        optimizer = kfac_tn.KFAC(model, nn.CrossEntropyLoss(), approximation=approximation)
        row = optimizer.coverage()[0]
        assert row.why.endswith(expected)
        assert row.treatment == ("Adam" if options else f"KFAC-{approximation}")
    model = Model(nn.Embedding(7, 3))
    options = {"approximation": "reduce", "max_dim": 6}
    row = kfac_tn.KFAC(model, nn.CrossEntropyLoss(), **options).coverage()[0]
    assert row.why.endswith("the input's only its diagonal (above max_dim=6)")


def test_gradients_that_are_not_the_losss_are_refused_by_name():
    model = Model(nn.Embedding(7, 3, scale_grad_by_freq=True))
    data = [(torch.randint(7, (4, 2)), torch.randint(2, (4,)))]
    for compute in (kfac_tn.compute_kfac, kfac_tn.compute_ekfac, kfac_tn.compute_ggn_diagonal):
        with pytest.raises(ValueError, match="'embedding' has scale_grad_by_freq=True"):
            compute(model, nn.CrossEntropyLoss(), data)
    model.embedding.requires_grad_(False)
    kfac_tn.compute_kfac(model.double(), nn.CrossEntropyLoss(), data)


def test_sparse_gradients_have_a_diagonal():
    torch.manual_seed(0)
    model = Model(nn.Embedding(7, 3, sparse=True, dtype=torch.float64))
    x, y, loss_fn = torch.randint(7, (4, 2)), torch.randint(2, (4,)), nn.CrossEntropyLoss()
    exact = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])["embedding.weight"]
    options = {"mc_samples": 3000, "generator": torch.Generator().manual_seed(0)}
    block = kfac_tn.compute_kfac(model, loss_fn, [(x, y)], **options).blocks["embedding.weight"]
    assert relative_error(block.values, exact) < 0.1


def test_checkpoints_continue_bit_for_bit():
    torch.manual_seed(0)
    model, _, x, y = positioned("[T]", 3)
    first = train(model, x, y, steps=3)
    twin = copy.deepcopy(model)
    second = kfac_tn.KFAC(
        twin, nn.CrossEntropyLoss(), factor_interval=1, inverse_interval=2, noise_damping=0
    )
    second.load_state_dict(first.state_dict())
    for each, optimizer in ((model, first), (twin, second)):
        loss_fn = optimizer._loss_fn
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(each(x), y).backward()
            optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
