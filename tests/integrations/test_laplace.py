"""The backend for laplace-torch: against laplace-torch's own curvature, and its full matrices."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_tn
import kfac_tn.testing

pytest.importorskip("laplace")
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN, GGNInterface

from kfac_tn.integrations.laplace import GroupedKron, KFACTNBackend, restore

LIKELIHOODS = ("classification", "regression")


def plain():
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(12, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)),
    )


def grouped():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh()),
        *(nn.Conv2d(4, 4, 2, groups=4, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
    )


def transposed():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 2, stride=2), nn.Tanh(), nn.ConvTranspose2d(4, 6, 2, groups=2)),
        *(nn.Tanh(), nn.ConvTranspose2d(6, 2, (2, 1), bias=False), nn.Flatten(), nn.Linear(24, 3)),
    )


def embedding():
    return nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Tanh(), nn.Linear(8, 3))


def frozen():
    model = plain()
    model[0].requires_grad_(False)
    return model


def make(build, likelihood: str) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = build().double().eval()
    if build is embedding:
        x = torch.randint(5, (10, 4))
    else:
        x = torch.randn(10, 2, 4, 4, dtype=torch.float64)
    classes = likelihood == "classification"
    y = torch.randint(3, (10,)) if classes else torch.randn(10, 3, dtype=torch.float64)
    return model, TensorDataset(x, y)


def fit(model, data, likelihood, structure, backend=KFACTNBackend, subset="all", **options):
    """Fit on batches of 4, 4 and 2."""
    la = Laplace(model, likelihood, subset, structure, backend=backend, **options)
    la.fit(DataLoader(data, batch_size=4))
    return la


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def diagonal_from_jacobians(model, likelihood, data) -> Tensor:
    """By laplace-torch, with torch.func."""
    return GGNInterface.diag(CurvlinopsGGN(model, likelihood), *data.tensors)[1]


def sizes(model: nn.Module) -> list[int]:
    return [p.numel() for p in model.parameters() if p.requires_grad]


def blocks(matrix: Tensor, model: nn.Module) -> Tensor:
    """What remains of a matrix if parameters aren't coupled."""
    starts = torch.repeat_interleave(torch.tensor(sizes(model)))
    return torch.where(starts[:, None] == starts, matrix, 0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("build", [plain, frozen])
def test_kron_agrees_with_laplaces_own(build, likelihood):
    model, data = make(build, likelihood)
    mine, theirs = (
        fit(model, data, likelihood, "kron", backend) for backend in (KFACTNBackend, CurvlinopsGGN)
    )
    assert not isinstance(mine.H_facs, GroupedKron)
    close(mine.H.to_matrix(), theirs.H.to_matrix())
    close(mine.loss, theirs.loss)
    close(mine.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    x = data.tensors[0][:3]
    close(mine(x), theirs(x))
    samples = [la.sample(4, generator=torch.Generator().manual_seed(0)) for la in (mine, theirs)]
    assert samples[0].shape == samples[1].shape == (4, sum(sizes(model)))


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "bias": False}])
def test_kron_of_one_convolution_is_exact(conv, groups, options):
    """Its output the prediction, a squared error: KFAC is the GGN's block."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(4, 4, 2, groups=groups, **options), nn.Flatten()).double()
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    data = TensorDataset(x, torch.randn_like(model(x)).detach())
    kron = fit(model, data, "regression", "kron")
    full = kfac_tn.testing.dense_ggn(model, nn.MSELoss(reduction="sum"), *data.tensors) / 2
    close(kron.H.to_matrix(), blocks(full, model))
    close(kron.H_facs.to_matrix(), blocks(full, model))
    close(kron.H_facs.diag(), full.diagonal())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_full(likelihood):
    """Laplace's own, from our Jacobians."""
    model, data = make(grouped, likelihood)
    losses = {"classification": nn.CrossEntropyLoss, "regression": nn.MSELoss}
    exact = kfac_tn.testing.dense_ggn(model, losses[likelihood](reduction="sum"), *data.tensors)
    full = fit(model, data, likelihood, "full")
    close(full.H, exact / 2 if likelihood == "regression" else exact)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("build", [grouped, transposed, embedding, frozen])
def test_kron_is_kfac_of_the_whole_set(build, approximation, likelihood):
    model, data = make(build, likelihood)
    options = {"approximation": approximation}
    la = fit(model, data, likelihood, "kron", backend_kwargs=options)
    loss_fn = (nn.CrossEntropyLoss if likelihood == "classification" else nn.MSELoss)(
        reduction="sum"
    )
    whole = [data.tensors]
    kfac = kfac_tn.compute_kfac(model, loss_fn, whole, approximation, fisher="type-2")
    expected = kfac.to_dense()
    if likelihood == "regression":
        expected = expected / 2
    exact = diagonal_from_jacobians(model, likelihood, data)
    start = 0
    for name, shape in kfac.shapes.items():
        here = range(start, start + shape.numel())
        if name in kfac.blocks:  # no Kronecker structure: the exact diagonal, not an estimate of it
            expected[here, here] = exact[here]
        start += shape.numel()
    close(la.H.to_matrix(), expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("build", [plain, grouped, transposed, embedding, frozen])
def test_diag_agrees_with_jacobians(build, likelihood):
    model, data = make(build, likelihood)
    la = fit(model, data, likelihood, "diag")
    close(la.H, diagonal_from_jacobians(model, likelihood, data))
    probe = la(data.tensors[0][:3])
    assert all(part.isfinite().all() for part in (probe if isinstance(probe, tuple) else [probe]))
    assert la.sample(7).shape == (7, sum(sizes(model)))
    assert la.log_marginal_likelihood().isfinite()


@pytest.mark.parametrize("build", [plain, grouped, transposed, embedding, frozen])
def test_jacobians(build):
    model, data = make(build, "classification")
    x = data.tensors[0]
    expected = CurvlinopsGGN(model, "classification").jacobians(x)
    backend = KFACTNBackend(model, "classification")
    close(backend.jacobians(x), expected)
    jacobians, outputs = backend.jacobians(x, enable_backprop=True)
    assert outputs.requires_grad
    close((jacobians.detach(), outputs.detach()), expected)


class Wrapped(nn.Module):
    """A model that is called with a dict."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch["input_ids"])


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("build", [grouped, transposed, embedding])
def test_models_called_with_dicts(build, structure):
    model, data = make(build, "classification")
    expected = fit(model, data, "classification", structure)
    rows = [{"input_ids": x, "labels": y} for x, y in data]
    la = fit(Wrapped(model), rows, "classification", structure)
    matrices = [one.H if structure == "diag" else one.H.to_matrix() for one in (la, expected)]
    close(*matrices)
    x = data.tensors[0][:3]
    close(la({"input_ids": x}), expected(x))


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("build", [grouped, transposed, embedding])
def test_posterior_with_groups(build, per_parameter):
    model, data = make(build, "classification")
    count = len(sizes(model))
    prior = torch.linspace(0.5, 2, count, dtype=torch.float64) if per_parameter else 1.5
    la = fit(model, data, "classification", "kron", prior_precision=prior, temperature=0.5)
    diagonal = la.prior_precision_diag
    precision = 2 * la.H.to_matrix() + torch.diag(diagonal)
    close(la.posterior_precision.to_matrix(), precision)
    close(la.log_det_posterior_precision, torch.logdet(precision))
    close(la.posterior_precision.diag(), precision.diagonal())
    x = data.tensors[0][:3]
    jacobians, outputs = CurvlinopsGGN(model, "classification").jacobians(x)
    variance = jacobians @ torch.linalg.inv(precision) @ jacobians.mT
    close(la.functional_variance(jacobians), variance)
    flat = jacobians.flatten(0, 1)
    close(la.functional_covariance(jacobians), flat @ torch.linalg.inv(precision) @ flat.T)
    scaled = outputs / (1 + math.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
    close(la(x, link_approx="probit"), scaled.softmax(-1))
    delta = torch.randn(len(precision), dtype=torch.float64)
    close(la.square_norm(la.mean + delta), delta @ precision @ delta, 1e-8)
    root = la.posterior_precision.bmm(torch.eye(len(precision), dtype=torch.float64), -0.5)
    close(root @ root.T, torch.linalg.inv(precision))
    samples = la.sample(5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, len(precision), dtype=torch.float64, generator=generator)
    close(samples, la.mean + noise @ root)


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_marginal_likelihood_can_be_optimized(structure):
    model, data = make(grouped, "regression")
    la = fit(model, data, "regression", structure, prior_precision=1.0)
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(method="marglik", init_prior_prec=1.0, n_steps=50)
    assert la.log_marginal_likelihood() > before


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("build", [plain, grouped, transposed, embedding])
def test_checkpoints(build, per_parameter, tmp_path):
    model, data = make(build, "classification")
    count = len(sizes(model))
    prior = torch.linspace(0.5, 2, count, dtype=torch.float64) if per_parameter else 1.5
    la = fit(model, data, "classification", "kron", prior_precision=prior)
    fresh = Laplace(model, "classification", "all", "kron", backend=KFACTNBackend)
    torch.save(la.state_dict(), tmp_path / "la")
    fresh.load_state_dict(torch.load(tmp_path / "la", weights_only=False))
    x = data.tensors[0][:3]
    if build is transposed:  # not in another order without a word
        for use in (
            lambda: fresh(x),
            fresh.log_marginal_likelihood,
            lambda: fresh.sample(2),
            fresh.H.to_matrix,
            fresh.H_facs.diag,
        ):
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                use()
    restore(fresh)
    assert type(fresh.H_facs) is type(la.H_facs)
    close(fresh(x), la(x))
    close(fresh.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize("build", [plain, grouped, transposed])
def test_fit_in_two_parts(build):
    model, data = make(build, "classification")
    whole = fit(model, data, "classification", "kron")
    la = Laplace(model, "classification", "all", "kron", backend=KFACTNBackend)
    for part in (slice(3), slice(3, None)):
        loader = DataLoader(TensorDataset(*(t[part] for t in data.tensors)), batch_size=2)
        la.fit(loader, override=False)
    close(la.H.to_matrix(), whole.H.to_matrix())
    close(la.loss, whole.loss)


class Pooled(nn.Module):
    """A layer at every position, then their mean."""

    def __init__(self, layer: nn.Module, axis: int):
        super().__init__()
        self.layer, self.last, self.axis = layer, nn.Linear(4, 3), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).tanh().mean(self.axis))


POOLED = {
    "linear": lambda: (Pooled(nn.Linear(2, 4), 1), (3, 2)),
    "convolution": lambda: (Pooled(nn.Conv1d(2, 4, 2, bias=False), 2), (2, 3)),
    "grouped": lambda: (Pooled(nn.Conv1d(2, 4, 2, groups=2), 2), (2, 3)),
    "transposed": lambda: (Pooled(nn.ConvTranspose1d(2, 4, 2), 2), (2, 3)),
}


def of_different_lengths(build) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Ten examples; the first four, the next four and the last two have as many positions."""
    torch.manual_seed(0)
    model, shape = build()
    axis = shape.index(3)
    data = []
    for n in range(10):
        sizes = list(shape)
        sizes[axis] = (3, 12, 5)[n // 4]
        data.append((torch.randn(sizes, dtype=torch.float64), torch.tensor(n % 3)))
    return model.double().eval(), data


def kfac_of(model, data, **options) -> Tensor:
    loss_fn, loader = nn.CrossEntropyLoss(reduction="sum"), DataLoader(data, batch_size=4)
    return kfac_tn.compute_kfac(model, loss_fn, loader, fisher="type-2", **options).to_dense()


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("build", POOLED.values(), ids=POOLED)
def test_batches_with_different_numbers_of_positions(build, approximation):
    model, data = of_different_lengths(build)
    options = {"approximation": approximation}
    la = fit(model, data, "classification", "kron", backend_kwargs=options)
    expected = kfac_of(model, data, **options)
    close(la.H.to_matrix(), expected)
    close((2 * la.H_facs).to_matrix(), 2 * expected)


@pytest.mark.parametrize("build", POOLED.values(), ids=POOLED)
def test_a_fit_that_goes_on_with_other_numbers_of_positions(build):
    """laplace-torch discounts what it has, in place, by numbers of examples alone."""
    model, data = of_different_lengths(build)
    la = Laplace(model, "classification", "all", "kron", backend=KFACTNBackend)
    for part in (data[:4], data[4:8], data[8:]):
        la.fit(DataLoader(part, batch_size=4), override=False)
    close(la.H.to_matrix(), kfac_of(model, data))


def test_loaded_factors_are_weighed_by_examples():
    """All that laplace-torch keeps of them; right for batches of one length."""
    model, data = make(plain, "classification")
    half, rest = [
        TensorDataset(*(t[part] for t in data.tensors)) for part in (slice(4), slice(4, 10))
    ]
    la = fit(model, half, "classification", "kron")
    fresh = Laplace(model, "classification", "all", "kron", backend=KFACTNBackend)
    fresh.load_state_dict(la.state_dict())
    restore(fresh)
    fresh.fit(DataLoader(rest, batch_size=4), override=False)
    close(fresh.H.to_matrix(), fit(model, data, "classification", "kron").H.to_matrix())


@pytest.mark.parametrize("build", [plain, grouped])
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_last_layer(build, structure):
    model, data = make(build, "classification")
    backends = {"kron": CurvlinopsGGN, "diag": GGNInterface}
    mine, theirs = (
        fit(model, data, "classification", structure, backend, subset="last_layer")
        for backend in (KFACTNBackend, backends[structure])
    )
    values = [la.H.to_matrix() if structure == "kron" else la.H for la in (mine, theirs)]
    close(*values)
    x = data.tensors[0][:3]
    close(mine(x), theirs(x))
    assert all(p.requires_grad for la in (mine, theirs) for p in la.model.parameters())


def test_subnetwork():
    model, data = make(grouped, "classification")
    indices = torch.tensor([1, 7, 30, 50])
    la = fit(model, data, "classification", "diag", subset="subnetwork", subnetwork_indices=indices)
    close(la.H, diagonal_from_jacobians(model, "classification", data)[indices])
    x = data.tensors[0][:3]
    jacobians, _ = CurvlinopsGGN(model, "classification").jacobians(x)
    close(la.backend.jacobians(x)[0], jacobians[..., indices])


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_monte_carlo(structure):
    model, data = make(grouped, "classification")
    torch.manual_seed(1)
    options = {"fisher": "mc", "mc_samples": 300}
    sampled = fit(model, data, "classification", structure, backend_kwargs=options).H
    exact = fit(model, data, "classification", structure).H
    if structure == "kron":
        sampled, exact = sampled.to_matrix(), exact.to_matrix()
    error = (sampled - exact).norm() / exact.norm()
    assert 0 < error < 0.2


def test_refused():
    model, data = make(transposed, "classification")
    with pytest.raises(ValueError, match="fisher is 'empirical'"):
        fit(model, data, "classification", "diag", backend_kwargs={"fisher": "empirical"})
    with pytest.raises(TypeError, match="kfac_approx"):
        fit(
            *make(plain, "classification"),
            "classification",
            "kron",
            asdl_fisher_kwargs={"kfac_approx": "reduce"},
        )
    kron = fit(*make(grouped, "classification"), "classification", "kron").H_facs
    other = fit(*make(embedding, "classification"), "classification", "kron").H_facs
    ungrouped = fit(*make(plain, "classification"), "classification", "kron").H_facs
    for left, right in [(kron, other), (kron, ungrouped), (ungrouped, kron)]:
        with pytest.raises(ValueError, match="can't be added"):
            left + right


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace.curvature", None)
    monkeypatch.delitem(sys.modules, "kfac_tn.integrations.laplace")
    with pytest.raises(ImportError, match="pip install 'laplace-torch"):
        importlib.import_module("kfac_tn.integrations.laplace")
