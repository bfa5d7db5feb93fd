"""EKFAC against the dense GGN and the dense empirical Fisher, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_tn
from kfac_tn import testing
from kfac_tn.curvature.block import DiagonalBlock
from kfac_tn.curvature.eigen import EigenBlock
from kfac_tn.functional import common
from kfac_tn.functional.rows import rotated_second_moment
from kfac_tn.layers import LayerFamily, LinearFamily
from kfac_tn.layers.registry import FAMILIES


class Flat(nn.Module):
    """Two outputs, which depend on the positions unevenly and not linearly."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        weights = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
        return torch.stack([(x * weights).sum(1), (x.sin() * weights.cos()).mean(1)], dim=1)


class Twice(nn.Module):
    """One module called twice, on different numbers of positions."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        first = self.module(x)
        return torch.cat([first.flatten(1), self.module(x.tanh()[..., 1:]).flatten(1)], dim=1)


class Classifier(nn.Module):
    """For a module that keeps the number of positions or not: three logits."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.flat = module, Flat()
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.module(x).tanh()))


conv2d = {"kernel_size": 3, "padding": 1}
CASES = {
    "linear": (lambda: nn.Linear(3, 4), (3,)),
    "linear with shared positions": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear with few shared positions": (lambda: nn.Linear(6, 5), (2, 6)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), (2, 2, 3)),
    "conv": (lambda: nn.Conv2d(2, 4, **conv2d), (2, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, **conv2d, groups=2), (4, 4, 3)),
    "depthwise": (lambda: nn.Conv2d(3, 3, **conv2d, groups=3), (3, 4, 4)),
    "dilated": (lambda: nn.Conv2d(2, 2, 2, dilation=2), (2, 5, 4)),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, bias=False), (2, 7, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, **conv2d, padding_mode="circular"), (2, 4, 3)),
    "reflect, same": (
        lambda: nn.Conv2d(2, 2, (2, 3), padding="same", padding_mode="reflect"),
        (2, 4, 4),
    ),
    "1-d": (lambda: nn.Conv1d(3, 2, 3, stride=2, padding=2, groups=1), (3, 8)),
    "3-d": (lambda: nn.Conv3d(2, 2, (1, 2, 2), groups=2), (2, 2, 3, 3)),
    "4-d": (lambda: kfac_tn.tn.nn.ConvNd(1, 2, (2, 1, 2, 1)), (1, 2, 2, 2, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=2, padding=(0, 1)), (2, 2, 3)),
    "transposed, grouped": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2),
        (4, 3),
    ),
    "called twice": (lambda: Twice(nn.Conv1d(2, 3, 2)), (2, 5)),
    "grouped, called twice": (lambda: Twice(nn.Conv1d(2, 4, 2, groups=2)), (2, 5)),
}
LOSSES = {
    "cross-entropy": lambda: nn.CrossEntropyLoss(),
    "weighted sum": lambda: nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 3.0, 0.5]).double(), reduction="sum", ignore_index=1
    ),
}


def problem(case: str, sizes=(3, 2)):
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = Classifier(make()).double()
    data = [(torch.randn(n, *shape).double(), torch.randint(3, (n,))) for n in sizes]
    return model, data


def whole(data) -> tuple[Tensor, Tensor]:
    x, y = zip(*data, strict=True)
    return torch.cat(x), torch.cat(y)


def exact_blocks(model, matrix, curvature, bias: str):
    """(name of the block, its names of parameters, their exact block) one by one or together."""
    for name, block in curvature.blocks.items():
        if bias == "joint":
            yield name, block.names, testing.diagonal_block(matrix, model, block.names)
        else:
            for each in block.names:
                yield name, (each,), testing.diagonal_block(matrix, model, (each,))


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_trace_is_exact_and_no_error_larger_than_kfacs(case, loss, approximation, bias):
    """For each layer; the trace of a matrix is the sum of its diagonal in any basis."""
    model, data = problem(case)
    loss_fn = LOSSES[loss]()
    options = {"fisher": "type-2", "approximation": approximation, "bias": bias}
    ekfac = kfac_tn.compute_ekfac(model, loss_fn, data, **options)
    kfac = kfac_tn.compute_kfac(model, loss_fn, data, **options)
    ggn = testing.dense_ggn(model, loss_fn, *whole(data))
    torch.testing.assert_close(ekfac.trace(), ggn.trace(), rtol=1e-10, atol=0)
    dense, dense_kfac = ekfac.to_dense(), kfac.to_dense()
    checked = set()
    for _, names, exact in exact_blocks(model, ggn, ekfac, bias):
        part = ekfac.submatrix(names)
        torch.testing.assert_close(part.trace(), exact.trace(), rtol=1e-10, atol=1e-14)
        error = (testing.diagonal_block(dense, model, names) - exact).norm()
        kfac_error = (testing.diagonal_block(dense_kfac, model, names) - exact).norm()
        assert error <= kfac_error * (1 + 1e-9) + 1e-12
        checked.update(names)
    assert checked == set(ekfac.shapes) == set(testing.trainable(model))


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("case", CASES)
def test_eigenvalues_are_the_exact_blocks_along_the_eigenvectors(case, bias):
    """values[g, o, i] = u^T GGN u for the eigenvector u, multiplied by autograd's GGN."""
    model, data = problem(case)
    loss_fn = nn.CrossEntropyLoss()
    ekfac = kfac_tn.compute_ekfac(model, loss_fn, data, fisher="type-2", bias=bias)
    kfac = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2", bias=bias)
    ggn = testing.dense_ggn(model, loss_fn, *whole(data))
    for name, block in ekfac.blocks.items():
        assert isinstance(block, EigenBlock)
        exact = testing.diagonal_block(ggn, model, block.names)
        unit = torch.eye(block.values.numel()).double().view(-1, *block.values.shape)
        vectors = block.grad_output_vectors @ unit @ block.input_vectors.mT
        entries = block.layout.from_matrix(vectors)
        flat = torch.cat([entries[each].flatten(1) for each in block.names], dim=1)
        torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)).double())
        expected = ((flat @ exact) * flat).sum(1).view_as(block.values)
        torch.testing.assert_close(block.values, expected, rtol=1e-9, atol=1e-12)
        # and the eigenvectors are those of KFAC's factors
        for vectors, matrix in (
            (block.input_vectors, kfac.blocks[name]._full_input_factor),
            (block.grad_output_vectors, kfac.blocks[name].grad_output_factor),
        ):
            rotated = vectors.mT @ matrix @ vectors
            diagonal = torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
            torch.testing.assert_close(rotated, diagonal, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_empirical_eigenvalues_are_those_of_the_gradients(case):
    model, data = problem(case)
    ekfac = kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), data, fisher="empirical")
    exact = testing.empirical_fisher(model, nn.CrossEntropyLoss(), *whole(data))
    torch.testing.assert_close(ekfac.trace(), exact.trace(), rtol=1e-10, atol=0)


def test_samples_converge_to_type_2():
    model, data = problem("grouped")
    generator = torch.Generator().manual_seed(0)
    exact = testing.dense_ggn(model, nn.CrossEntropyLoss(), *whole(data)).trace()
    errors = []
    for samples in (10, 1000):
        ekfac = kfac_tn.compute_ekfac(
            model, nn.CrossEntropyLoss(), data, mc_samples=samples, generator=generator
        )
        errors.append(abs(float(ekfac.trace() / exact - 1)))
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


@pytest.mark.parametrize("sizes", [(1, 4), (5,), (2, 2, 1)])
@pytest.mark.parametrize("loss", LOSSES)
def test_splitting_the_data_changes_nothing(sizes, loss):
    model, data = problem("called twice")
    x, y = whole(data)
    split = list(zip(x.split(sizes), y.split(sizes), strict=True))
    first, second = (
        kfac_tn.compute_ekfac(model, LOSSES[loss](), each, fisher="type-2").to_dense()
        for each in (data, split)
    )
    assert testing.relative_error(first, second) < 1e-9


@pytest.mark.parametrize("case", ["grouped", "called twice", "linear with few shared positions"])
def test_chunks_of_examples_add_up(case, monkeypatch):
    model, data = problem(case)
    options = {"fisher": "type-2", "bias": "joint"}
    kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), data, **options)
    expected = kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), data, **options).to_dense()
    seen = []
    plain = kfac_tn.layers.base.rotated_second_moment

    def spy(input_rows, *rest):
        seen.append(input_rows.shape[1])
        return plain(input_rows, *rest)

    monkeypatch.setattr(kfac_tn.layers.base, "rotated_second_moment", spy)
    monkeypatch.setattr(common, "UNFOLD_BYTES", 1)
    chunked = kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), data, **options).to_dense()
    assert set(seen) == {1}
    assert testing.relative_error(chunked, expected) < 1e-9


@settings(max_examples=60)
@given(*[st.integers(1, 5)] * 5, st.sampled_from([2**26, 2**10, 1]), st.integers(0, 1000))
def test_second_moments_of_any_shape(groups, count, positions, d_in, d_out, limit, seed):
    """Whichever way is cheaper gives the definition, in chunks of any size."""
    torch.manual_seed(seed)
    a = torch.randn(groups, count, positions, d_in).double()
    g = torch.randn(groups, count, positions, d_out).double()
    q_a, q_b = torch.randn(groups, d_in, d_in).double(), torch.randn(groups, d_out, d_out).double()
    expected = torch.einsum("gnro,gnri,gop,gij->gnpj", g, a, q_b, q_a).square().sum(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "UNFOLD_BYTES", limit)
        torch.testing.assert_close(rotated_second_moment(a, g, q_a, q_b), expected)


# Diagonals in place of factors --------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_layers_with_diagonals_have_the_ggns(case, loss):
    """Of two batches, against the diagonal of autograd's GGN; the other layers are KFAC's."""
    model, data = problem(case)
    loss_fn = LOSSES[loss]()

    def kind(name, module):
        return "kfac" if name == "head" else "diagonal"

    curvature = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2", curvature=kind)
    plain = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2")
    ggn = testing.dense_ggn(model, loss_fn, *whole(data))
    for name, values in curvature.diagonal().items():
        if name.startswith("head"):
            torch.testing.assert_close(values, plain.diagonal()[name])
            continue
        assert isinstance(curvature.blocks[name], DiagonalBlock)
        exact = testing.diagonal_block(ggn, model, (name,)).diagonal()
        torch.testing.assert_close(values.flatten(), exact, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("compute", [kfac_tn.compute_kfac, kfac_tn.compute_ekfac])
def test_factors_above_the_limit_are_refused_before_anything_is_computed(compute):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 50_000))
    loss_fn = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"Layer '1' has a factor of dimension 50,000.* 10 GB"):
        compute(model, loss_fn, [])
    with pytest.raises(ValueError, match=r"Layer '0' has a factor of dimension 4, above max_dim=3"):
        compute(model, loss_fn, [], max_dim=3)


def test_diagonals_that_cannot_be_had_are_refused():
    model, data = problem("linear")
    for options, message in (
        ({"curvature": "ekfac"}, "'ekfac' for layer 'module': compute_ekfac"),
        ({"curvature": "diagonal", "fisher": "forward-only"}, "'diagonal' for layer 'module'"),
        ({"curvature": {"module": "kfac"}}, "curvature has no entry for layer 'head'"),
    ):
        with pytest.raises(ValueError, match=message):
            kfac_tn.compute_kfac(model, nn.CrossEntropyLoss(), data, **options)


# Around it ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers with and without Kronecker structure, unused and frozen ones."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu_(self.frozen(self.norm(self.conv(x)))).mean((2, 3)))


def test_what_has_no_eigenvectors_keeps_its_diagonal_and_the_rest_is_zero():
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    data = [(torch.rand(4, 2, 4, 4).double(), torch.randint(3, (4,)))]
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(0)
    ekfac = kfac_tn.compute_ekfac(model, loss_fn, data, fisher="type-2", generator=generator)
    generator.manual_seed(0)
    kfac = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2", generator=generator)
    assert torch.equal(before, torch.get_rng_state())
    assert ekfac.shapes == kfac.shapes
    assert list(ekfac.blocks) == list(kfac.blocks)
    for name in ("norm.weight", "norm.bias"):
        assert isinstance(ekfac.blocks[name], DiagonalBlock)
        assert torch.equal(ekfac.blocks[name].values, kfac.blocks[name].values)
    assert not ekfac.submatrix(["unused.weight", "unused.bias"]).to_dense().any()
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in [loss_fn, *model.modules()])


def test_half_precision_models_have_single_precision_eigenvalues():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 2)).bfloat16()
    data = [(torch.rand(4, 2, 4).bfloat16(), torch.rand(4, 2).bfloat16())]
    curvature = kfac_tn.compute_ekfac(model, nn.MSELoss(), data, fisher="type-2")
    assert curvature.blocks["0"].values.dtype == torch.float32
    ggn = testing.dense_ggn(model.float(), nn.MSELoss(), *(part.float() for part in data[0]))
    torch.testing.assert_close(curvature.trace(), ggn.trace(), rtol=0.02, atol=0)


class SequenceFirst(nn.Module):
    """Positions before examples."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"fisher": "forward-only"}, None, "forward-only.*compute_kfac"),
        ({"fisher": "type-1"}, None, "type-1"),
        ({"bias": "none"}, None, "'none'"),
        ({}, iter(()), "iterator"),
        ({}, (), "empty"),
        ({}, None, r"'body' was called with 5 in the first axis.*\[4, 2\]"),
    ],
)
def test_what_has_no_exact_answer_is_refused(options, data, message):
    model, loss_fn = SequenceFirst(), nn.MSELoss()
    batches = [(torch.rand(4, 5, 2), torch.rand(4, 2))] if data is None else data
    with pytest.raises(ValueError, match=message):
        kfac_tn.compute_ekfac(model, loss_fn, batches, **options)
    assert not any(module._forward_hooks for module in [loss_fn, *model.modules()])


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_models_called_without_a_batch_are_told_so(fisher):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(0), nn.Linear(12, 3))
    batch = torch.rand(2, 4, 4), torch.rand(3)
    message = r"Layers \['0', '2'\] were called with a single example.*unsqueeze\(0\)"
    with pytest.raises(ValueError, match=message):
        kfac_tn.compute_ekfac(model, nn.MSELoss(), [batch], fisher=fisher)


class Careless(nn.Module):
    """Changes the input of its first layer after the call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = x.clone()
        hidden = self.first(x)
        x += 1
        return self.second(hidden.tanh())


def test_inputs_that_are_changed_afterwards_are_refused_as_by_autograd():
    model, loss_fn, data = Careless(), nn.MSELoss(), (torch.rand(4, 2), torch.rand(4, 2))
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss_fn(model(data[0]), data[1]).backward()
    with pytest.raises(RuntimeError, match="layer 'first' was changed in place"):
        kfac_tn.compute_ekfac(model, loss_fn, [data])


def test_works_under_inference_mode_and_without_gradients():
    model, data = problem("grouped")
    expected = kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), data, fisher="type-2").to_dense()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            curvature = kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), data, fisher="type-2")
        assert torch.equal(curvature.to_dense(), expected)


def test_activation_checkpointing_counts_once():
    model, data = problem("grouped")
    expected = kfac_tn.compute_ekfac(model, nn.CrossEntropyLoss(), data, fisher="type-2").to_dense()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    curvature = kfac_tn.compute_ekfac(
        Checkpointed(), nn.CrossEntropyLoss(), data, fisher="type-2"
    ).to_dense()
    assert testing.relative_error(curvature, expected) < 1e-12


def test_results_that_are_not_finite_are_refused():
    data = [(torch.full((1, 2), torch.nan), torch.rand(1, 2))]
    with pytest.raises(ValueError, match="isn't finite"):
        kfac_tn.compute_ekfac(nn.Linear(2, 2), nn.MSELoss(), data)


class Loud(nn.Linear):
    """A layer of its own kind."""


class LoudFamily(LinearFamily):
    """One that was written before there was EKFAC."""

    input_rows = LayerFamily.input_rows


def test_layers_whose_family_does_not_know_single_examples_are_named(monkeypatch):
    monkeypatch.setitem(FAMILIES, Loud, LoudFamily())
    data = [(torch.rand(3, 2), torch.rand(3, 2))]
    assert kfac_tn.compute_kfac(Loud(2, 2), nn.MSELoss(), data).trace() > 0
    with pytest.raises(NotImplementedError, match=r"LoudFamily.*Loud.*input_rows.*KFAC instead"):
        kfac_tn.compute_ekfac(Loud(2, 2), nn.MSELoss(), data)


# An independent implementation, where it is right ------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), (4,)


def cnn():
    layers = (
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 3),
    )
    return nn.Sequential(*layers), (2, 5, 7)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_agrees_with_curvlinops(make, approximation, fisher, bias):
    """With factors whose eigenvalues are single: the eigenvectors of others are anybody's.

    So there are many examples, and no stride for which reduce averages the same pixels twice.
    """
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model, shape = make()
    model, loss_fn = model.double(), nn.CrossEntropyLoss()
    x, y = torch.rand(60, *shape).double(), torch.randint(3, (60,))
    data = [(x[:40], y[:40]), (x[40:], y[40:])]
    theirs = curvlinops.EKFACLinearOperator(
        model,
        loss_fn,
        list(model.parameters()),
        data,
        fisher_type=fisher,
        kfac_approx=approximation,
        separate_weight_and_bias=bias == "separate",
        check_deterministic=False,
    )
    options = {"fisher": fisher, "approximation": approximation, "bias": bias}
    ours = kfac_tn.compute_ekfac(model, loss_fn, data, **options).to_dense()
    assert testing.relative_error(ours, theirs @ torch.eye(len(ours)).double()) < 1e-8
