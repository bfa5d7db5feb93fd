"""Curvatures as linear operators: curvlinops' own tools on them, against the dense matrix."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import Tensor, nn

import kfac_tn
import kfac_tn.testing

curvlinops = pytest.importorskip("curvlinops")
from curvlinops._torch_base import PyTorchLinearOperator  # noqa: E402
from scipy.sparse.linalg import eigsh  # noqa: E402

from kfac_tn.curvature.block import DiagonalBlock  # noqa: E402
from kfac_tn.integrations.curvlinops import as_linear_operator  # noqa: E402

LOSS = nn.CrossEntropyLoss()


def build() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model of most kinds of blocks: groups, transposed, no bias, no Kronecker structure."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh()),
        *(nn.ConvTranspose2d(4, 2, 2, bias=False), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(18, 3)),
    ).double()
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(3, (8,))
    return model, [(x[:5], y[:5]), (x[5:], y[5:])]


def curvatures() -> dict[str, kfac_tn.Curvature]:
    model, data = build()
    options = {"model": model, "loss_fn": LOSS, "loader": data, "fisher": "type-2"}
    kfac = kfac_tn.compute_kfac(**options)
    return {
        "kfac": kfac,
        "joint, reduce": kfac_tn.compute_kfac(**options, bias="joint", approximation="reduce"),
        "ekfac": kfac_tn.compute_ekfac(**options),
        "sum": kfac + kfac_tn.compute_ekfac(**options),
        "inverse": kfac.inverse(damping=0.1),
    }


CURVATURES = curvatures()


@pytest.fixture(params=CURVATURES)
def curvature(request):
    return CURVATURES[request.param]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Dense(PyTorchLinearOperator):
    """A symmetric matrix as an operator over the same parameters."""

    SELF_ADJOINT = True

    def __init__(self, matrix: Tensor, like: PyTorchLinearOperator):
        super().__init__(like._in_shape, like._out_shape)
        self.matrix, self.device_, self.dtype_ = matrix, like.device, like.dtype

    device = property(lambda self: self.device_)
    dtype = property(lambda self: self.dtype_)

    def _matmat(self, columns):
        product = self.matrix @ torch.cat([column.flatten(0, -2) for column in columns])
        pieces = product.split(self._in_shape_flat)
        return [p.view_as(c) for p, c in zip(pieces, columns, strict=True)]


def test_products(curvature):
    operator, dense = as_linear_operator(curvature), curvature.to_dense()
    assert isinstance(operator, PyTorchLinearOperator)
    assert operator.shape == dense.shape
    assert (operator.device, operator.dtype) == (dense.device, torch.float64)
    matrix = torch.randn(len(dense), 4, dtype=torch.float64)
    close(operator @ matrix, dense @ matrix)
    close(operator @ matrix[:, 0], dense @ matrix[:, 0])
    close(operator.adjoint() @ matrix, dense.T @ matrix)
    shapes = list(curvature.shapes.values())
    sizes = [shape.numel() for shape in shapes]
    for columns in (matrix, matrix[:, 0]):
        pieces = columns.split(sizes)
        as_list = [p.reshape(*s, *p.shape[1:]) for p, s in zip(pieces, shapes, strict=True)]
        product = operator @ as_list
        assert [p.shape for p in product] == [p.shape for p in as_list]
        close(torch.cat([p.reshape(-1, *columns.shape[1:]) for p in product]), dense @ columns)


def test_scipy(curvature):
    dense = curvature.to_dense()
    scipy = as_linear_operator(curvature).to_scipy()
    vector = torch.randn(len(dense), dtype=torch.float64)
    close(torch.from_numpy(scipy @ vector.numpy()), dense @ vector)
    close(torch.from_numpy(scipy.rmatvec(vector.numpy())), dense @ vector)


@pytest.mark.parametrize(("name", "which"), [("kfac", "LA"), ("ekfac", "LA"), ("inverse", "SA")])
def test_scipy_eigenvalues(name, which):
    curvature = CURVATURES[name]
    scipy = as_linear_operator(curvature).to_scipy()
    found = torch.from_numpy(eigsh(scipy, k=3, which=which, return_eigenvectors=False))
    values = torch.linalg.eigvalsh(curvature.to_dense())
    close(found.sort().values, values[-3:] if which == "LA" else values[:3], 1e-8)


def test_exact_functions_of_the_matrix():
    curvature = CURVATURES["kfac"]
    operator, dense = as_linear_operator(curvature), curvature.to_dense()
    damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    close(operator.trace(), dense.trace())
    close(operator.frobenius_norm(), torch.linalg.matrix_norm(dense))
    close(operator.logdet(0.1), torch.logdet(damped))
    close(operator.det(0.1), torch.det(damped))
    vector = torch.randn(len(dense), dtype=torch.float64)
    close(operator.inverse(0.1) @ vector, torch.linalg.solve(damped, vector))


def test_combinations_with_curvlinops_operators(curvature):
    model, data = build()
    parameters = list(model.parameters())
    ggn = curvlinops.GGNLinearOperator(model, LOSS, parameters, data)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    exact = kfac_tn.testing.dense_ggn(model, LOSS, x, y)
    operator, dense = as_linear_operator(curvature), curvature.to_dense()
    vector = torch.randn(len(dense), dtype=torch.float64)
    for combined, expected in [
        (operator + ggn, dense + exact),
        (ggn - operator, exact - dense),
        (0.5 * operator, 0.5 * dense),
        (operator @ ggn, dense @ exact),
        ((ggn @ operator).adjoint(), dense @ exact),
        (operator + operator, 2 * dense),
    ]:
        close(combined @ vector, expected @ vector)
    rows, columns = [0, 3, 40], [1, 3, 5, 80]
    part = curvlinops.SubmatrixLinearOperator(operator, rows, columns)
    close(part @ torch.eye(4, dtype=torch.float64), dense[rows][:, columns])


@pytest.mark.parametrize("given", [list, dict, iter])
@pytest.mark.parametrize("names", [["6.bias", "0.weight", "1.bias", "6.weight"], ["3.weight"]])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "sum", "inverse"])
def test_parameters_in_the_order_of_other_operators(name, names, given):
    """By their names, or as the dict that operators on curvlinops' main branch are made of."""
    model, data = build()
    parameters = {name: model.get_parameter(name) for name in names}
    curvature = CURVATURES[name]
    sizes = torch.tensor([shape.numel() for shape in curvature.shapes.values()])
    pieces = dict(
        zip(curvature.shapes, torch.arange(sizes.sum()).split(sizes.tolist()), strict=True)
    )
    places = torch.cat([pieces[name] for name in names])
    dense = curvature.to_dense()[places][:, places]
    operator = as_linear_operator(curvature, given(parameters))
    assert operator.shape == dense.shape
    vector = torch.randn(len(dense), dtype=torch.float64)
    close(operator @ vector, dense @ vector)
    close(operator.trace(), dense.trace())
    ggn = curvlinops.GGNLinearOperator(model, LOSS, list(parameters.values()), data)
    close((operator + ggn) @ vector, dense @ vector + ggn @ vector)
    if name != "sum":
        damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
        close(operator.inverse(0.1) @ vector, torch.linalg.solve(damped, vector))


ESTIMATORS = {
    "hutchinson_trace": lambda a: curvlinops.hutchinson_trace(a, num_matvecs=7),
    "hutchpp_trace": lambda a: curvlinops.hutchpp_trace(a, num_matvecs=9),
    "xtrace": lambda a: curvlinops.xtrace(a, num_matvecs=8),
    "hutchinson_diag": lambda a: curvlinops.hutchinson_diag(a, num_matvecs=7),
    "xdiag": lambda a: curvlinops.xdiag(a, num_matvecs=8),
    "hutchinson_squared_fro": lambda a: curvlinops.hutchinson_squared_fro(a, num_matvecs=7),
    "lanczos_approximate_spectrum": lambda a: curvlinops.lanczos_approximate_spectrum(
        a, ncv=8, num_repeats=2, boundaries=(0.0, 1.5)
    ),
    "lanczos_approximate_log_spectrum": lambda a: curvlinops.lanczos_approximate_log_spectrum(
        a, ncv=8, num_repeats=2, boundaries=(1e-5, 1.5)
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_see_the_same_matrix(curvature, name):
    """With the same random vectors, an estimate is that of the dense matrix."""
    operator = as_linear_operator(curvature)
    estimates = []
    for matrix in (operator, Dense(curvature.to_dense(), operator)):
        torch.manual_seed(1)
        estimates.append(ESTIMATORS[name](matrix))
    close(*estimates, tolerance=1e-7)


def test_estimates_that_are_exact():
    last = CURVATURES["kfac"].submatrix(["6.weight", "6.bias"])
    dense = last.to_dense()
    rank = int(torch.linalg.matrix_rank(dense))
    assert 3 * rank < len(dense)  # what Hutch++ needs to span the matrix' range
    torch.manual_seed(0)
    close(curvlinops.hutchpp_trace(as_linear_operator(last), 3 * rank), dense.trace(), 1e-7)
    diagonal = CURVATURES["kfac"].submatrix(["1.weight", "1.bias"])
    operator, expected = as_linear_operator(diagonal), diagonal.to_dense().diagonal()
    close(curvlinops.hutchinson_diag(operator, 1), expected)
    close(curvlinops.hutchinson_trace(operator, 1), expected.sum())


def test_spectral_cache_and_boundaries():
    operator = as_linear_operator(CURVATURES["kfac"])
    values = torch.linalg.eigvalsh(CURVATURES["kfac"].to_dense())
    torch.manual_seed(0)
    cache = curvlinops.LanczosApproximateSpectrumCached(operator, ncv=12)
    grid, density = cache.approximate_spectrum(num_repeats=3, num_points=256)
    assert grid[0] < values[0]
    assert grid[-1] > values[-1]
    mass = torch.trapezoid(density, grid)
    assert abs(mass - 1) < 0.05


@pytest.mark.parametrize("inverse", ["cg", "lsmr", "neumann"])
def test_iterative_inverses(inverse):
    curvature, damping = CURVATURES["kfac"], 0.5
    ones = {n: torch.ones(shape, dtype=torch.float64) for n, shape in curvature.shapes.items()}
    blocks = {name: DiagonalBlock(name, values) for name, values in ones.items()}
    identity = kfac_tn.Curvature(blocks, curvature.shapes)
    damped = as_linear_operator(curvature) + damping * as_linear_operator(identity)
    operator = {
        "cg": lambda: curvlinops.CGInverseLinearOperator(damped, tolerance=1e-9, eps=0),
        "lsmr": lambda: curvlinops.LSMRInverseLinearOperator(damped, atol=1e-13, btol=1e-13),
        "neumann": lambda: curvlinops.NeumannInverseLinearOperator(damped, 400, scale=0.8),
    }[inverse]()
    vectors = torch.randn(len(curvature.eigenvalues()), 2, dtype=torch.float64)
    expected = curvature.inverse(damping) @ vectors
    close(operator @ vectors, expected, 1e-6)
    close(operator.adjoint() @ vectors, expected, 1e-6)


def test_refused():
    curvature = CURVATURES["kfac"]
    with pytest.raises(TypeError, match="takes a kfac_tn"):
        as_linear_operator(curvature.to_dense())
    with pytest.raises(ValueError, match="nose"):
        as_linear_operator(curvature, ["0.weight", "nose"])
    with pytest.raises(ValueError, match=r"each once.*not \['6.bias'\]"):
        as_linear_operator(curvature, ["6.bias", "6.bias"])
    with pytest.raises(ValueError, match=r"list of names .*not 6.bias"):
        as_linear_operator(curvature, "6.bias")
    with pytest.raises(TypeError, match=r"parameters is a set.* order.*list"):
        as_linear_operator(curvature, {"6.bias", "6.weight"})
    blocks = {**curvature.blocks, "0": curvature.to(torch.float32).blocks["0"]}
    with pytest.raises(ValueError, match=r"one dtype.*curvature\.to"):
        as_linear_operator(kfac_tn.Curvature(blocks, curvature.shapes))


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops._torch_base", None)
    monkeypatch.delitem(sys.modules, "kfac_tn.integrations.curvlinops")
    with pytest.raises(ImportError, match="pip install 'curvlinops-for-pytorch"):
        importlib.import_module("kfac_tn.integrations.curvlinops")
