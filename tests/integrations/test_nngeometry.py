"""Curvatures as matrices of nngeometry: its algebra on them against ours, and its own matrices."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_tn

pytest.importorskip("nngeometry")
from nngeometry.metrics import FIM
from nngeometry.object import PMatEKFAC, PMatKFAC, PVector

from kfac_tn.integrations.nngeometry import as_pmat


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), (4,)


def cnn():
    layers = (
        *(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()),
        *(nn.Conv2d(3, 2, (2, 3), dilation=(2, 1), bias=False), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(8, 3)),
    )
    return nn.Sequential(*layers), (2, 4, 4)


def audio():
    layers = nn.Conv1d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)
    model = nn.Sequential(*layers)
    model[3].bias.requires_grad_(False)
    return model, (2, 7)


BUILD = [mlp, cnn, audio]
COMPUTE = {"kfac": kfac_tn.compute_kfac, "ekfac": kfac_tn.compute_ekfac}


def problem(build):
    torch.manual_seed(0)
    model, shape = build()
    data = TensorDataset(torch.randn(6, *shape).double(), torch.randint(3, (6,)))
    return model.double(), data


def compute(build, kind="kfac", **options):
    model, data = problem(build)
    options = {"fisher": "type-2", "bias": "joint", **options}
    return COMPUTE[kind](model, nn.CrossEntropyLoss(), DataLoader(data, batch_size=4), **options)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def multiply(pmat, v):
    return pmat.mv(PVector(pmat.generator.layer_collection, vector_repr=v)).to_torch()


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", COMPUTE)
@pytest.mark.parametrize("build", BUILD)
def test_algebra(build, kind, approximation):
    curvature = compute(build, kind, approximation=approximation)
    pmat = as_pmat(curvature)
    assert isinstance(pmat, PMatKFAC if kind == "kfac" else PMatEKFAC)
    collection = pmat.generator.layer_collection
    v = torch.randn(collection.numel(), dtype=torch.float64)
    vector = PVector(collection, vector_repr=v)
    close(multiply(pmat, v), curvature @ v)
    close(pmat.vTMv(vector), v @ (curvature @ v))
    close(pmat.trace(), curvature.trace())
    close(pmat.frobenius_norm(), curvature.frobenius_norm())
    dense = pmat.to_torch()  # PMatKFAC's is in float32 always
    close(dense.double(), curvature.to_dense(), 1e-10 if kind == "ekfac" else 1e-6)
    if kind == "kfac":
        diagonal = torch.cat([entry.flatten() for entry in curvature.diagonal().values()])
        close(pmat.get_diag(), diagonal)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("kind", COMPUTE)
@pytest.mark.parametrize("build", BUILD)
def test_inverses(build, kind, damping):
    curvature = compute(build, kind)
    pmat = as_pmat(curvature)
    v = torch.randn(len(curvature.eigenvalues()), dtype=torch.float64)
    expected = curvature.inverse(damping, "pi" if kind == "kfac" else "exact") @ v
    tolerance = 1e-5 if kind == "kfac" else 1e-10  # nngeometry rounds its pi to float32
    close(multiply(pmat.inverse(regul=damping), v), expected, tolerance)
    if kind == "kfac":
        vector = PVector(pmat.generator.layer_collection, vector_repr=v)
        close(pmat.solvePVec(vector, regul=damping).to_torch(), expected, tolerance)
    exact = as_pmat(curvature.inverse(damping))  # which nngeometry has for no PMatKFAC
    assert isinstance(exact, PMatEKFAC)
    close(multiply(exact, v), curvature.inverse(damping) @ v)
    close(exact.trace(), curvature.inverse(damping).trace())


def test_agrees_with_nngeometrys_own():
    """Its Fisher is that of a normal distribution: a mean over examples, not over outputs."""
    model, data = problem(mlp)
    theirs = FIM(model, DataLoader(data, batch_size=4), PMatKFAC, variant="regression")
    x = data.tensors[0]
    options = {"fisher": "type-2", "bias": "joint"}
    batches = [(x, torch.zeros(len(x), 3, dtype=torch.float64))]
    pmat = as_pmat(3 / 2 * kfac_tn.compute_kfac(model, nn.MSELoss(), batches, **options))
    assert pmat.generator.layer_collection == theirs.generator.layer_collection
    v = torch.randn(pmat.generator.layer_collection.numel(), dtype=torch.float64)
    close(multiply(pmat, v), multiply(theirs, v))
    close(multiply(pmat.mm(theirs), v), multiply(pmat, multiply(theirs, v)))


def grouped():
    return nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Flatten(), nn.Linear(2, 3)), (2, 2, 2)


def transposed():
    return nn.Sequential(nn.ConvTranspose2d(2, 1, 1), nn.Flatten(), nn.Linear(4, 3)), (2, 2, 2)


def volume():
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(2, 3)), (1, 2, 2, 2)


def norm():
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), (2,)


def embedding():
    layers = nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(nn.Embedding(5, 2), *layers).double()
    return model, TensorDataset(torch.randint(5, (6, 2)), torch.randint(3, (6,)))


def of_embedding(kind, approximation):
    model, data = embedding()
    loss_fn, options = nn.CrossEntropyLoss(), {"approximation": approximation, "bias": "joint"}
    return COMPUTE[kind](model, loss_fn, [data.tensors], **options)


def mixed():
    kfac, ekfac = (compute(mlp, kind) for kind in COMPUTE)
    return kfac_tn.Curvature({**kfac.blocks, "2": ekfac.blocks["2"]}, kfac.shapes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compute(grouped), "'0' has 2 groups.*submatrix"),
        (lambda: compute(transposed), "'0' is a transposed.*submatrix"),
        (lambda: compute(volume), "'0' is a 3-d convolution"),
        (lambda: compute(norm), "'1.weight' has no Kronecker structure.*requires_grad_"),
        (lambda: compute(mlp, bias="separate"), "'0' has a bias of its own.*bias='joint'"),
        (lambda: compute(mlp) + compute(mlp), r"made of \['SumBlock'\]"),
        (mixed, "EigenBlock', 'KroneckerBlock"),
        (lambda: of_embedding("kfac", "expand"), "'0' is an embedding.*submatrix"),
        (lambda: of_embedding("ekfac", "reduce"), "'0' is an embedding.*submatrix"),
        (lambda: compute(mlp).submatrix(["0.bias"]), "'0' is here without its weight"),
        (lambda: kfac_tn.Curvature({}, {}), "no layer"),
    ],
)
def test_what_it_can_not_express_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        as_pmat(make())


def test_parts_can_be_left_out():
    curvature = compute(norm).submatrix(["0.weight", "0.bias"])
    v = torch.randn(9, dtype=torch.float64)
    close(multiply(as_pmat(curvature), v), curvature @ v)


def test_only_curvatures_in_one_dtype_are_taken():
    curvature = compute(mlp)
    with pytest.raises(TypeError, match=r"a Tensor here, not a kfac_tn\.Curvature"):
        as_pmat(curvature.to_dense())
    blocks = {**curvature.blocks, "0": curvature.to(torch.float32).blocks["0"]}
    with pytest.raises(ValueError, match=r"one dtype.*curvature\.to"):
        as_pmat(kfac_tn.Curvature(blocks, curvature.shapes))


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nngeometry.layercollection", None)
    monkeypatch.delitem(sys.modules, "kfac_tn.integrations.nngeometry")
    with pytest.raises(ImportError, match="pip install 'nngeometry"):
        importlib.import_module("kfac_tn.integrations.nngeometry")
