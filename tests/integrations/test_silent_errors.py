"""Where curvlinops 3.0.1 and nngeometry 0.4 are wrong in silence: they run, and we are right.

Each row is a setting in which the curvature is known by autograd: KFAC in settings where it is
exact, diagonals anywhere. (BackPACK's rows are in `test_backpack.py`.) A row that fails because the
other package has been mended is to be deleted.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_tn
from kfac_tn.testing import dense_ggn, relative_error, trainable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOLERANCE = 1e-10


class Pool(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.flatten(2).mean(2)


class Twice(nn.Module):
    """One module at two positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x[:, 0]) + self.layer(x[:, 1])


def seeded(build):
    torch.manual_seed(0)
    return build().double()


def images(convolution, size=(5, 6)):
    model = seeded(lambda: nn.Sequential(convolution(), Pool()))
    return model, nn.MSELoss(), torch.rand(4, 4, *size).double(), torch.rand(4, 4).double()


def linear(loss_fn, y):
    return seeded(lambda: nn.Linear(4, 3)), loss_fn, 3 * torch.randn(6, 4).double(), y


LABELS = torch.tensor([0, 1, 2, 1, 0, 0])
ONE_HOT = nn.functional.one_hot(LABELS, 3).double()
WEIGHTS = torch.tensor([0.2, 5.0, 1.0]).double()
SAME = {"kernel_size": 3, "padding": 1}
CURVLINOPS = {  # KFAC-reduce is exact: a layer, averaged over positions, is the model
    "groups": (lambda: images(lambda: nn.Conv2d(4, 4, 3, groups=2)), 0.03),
    "depthwise": (lambda: images(lambda: nn.Conv2d(4, 4, 3, groups=4)), 0.03),
    "circular": (lambda: images(lambda: nn.Conv2d(4, 4, **SAME, padding_mode="circular")), 0.2),
    "reflect": (lambda: images(lambda: nn.Conv2d(4, 4, **SAME, padding_mode="reflect")), 0.2),
    "replicate": (lambda: images(lambda: nn.Conv2d(4, 4, **SAME, padding_mode="replicate")), 0.2),
    "class weights": (lambda: linear(nn.CrossEntropyLoss(WEIGHTS), LABELS), 0.03),
    "ignore_index": (lambda: linear(nn.CrossEntropyLoss(ignore_index=1), LABELS), 0.03),
    "pos_weight": (lambda: linear(nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), ONE_HOT), 0.3),
    "element weights": (lambda: linear(nn.BCEWithLogitsLoss(WEIGHTS), ONE_HOT), 0.3),
    "called twice": (
        lambda: (seeded(Twice), nn.MSELoss(), torch.randn(6, 2, 4).double(), ONE_HOT),
        0.2,
    ),
}


@pytest.mark.parametrize("name", CURVLINOPS)
def test_kfac_beside_curvlinops(name):
    curvlinops = pytest.importorskip("curvlinops")
    build, least = CURVLINOPS[name]
    model, loss_fn, x, y = build()
    operator = curvlinops.KFACLinearOperator(
        model,
        loss_fn,
        list(model.parameters()),
        [(x, y)],
        fisher_type=curvlinops.FisherType.TYPE2,
        kfac_approx=curvlinops.KFACType.REDUCE,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    theirs = operator @ torch.eye(sum(p.numel() for p in model.parameters())).double()
    ours = kfac_tn.compute_kfac(model, loss_fn, [(x, y)], "reduce", "type-2", bias="joint")
    expected = exact_groups(model, loss_fn, x, y)
    if isinstance(model, nn.Linear):  # whose block is no Kronecker product, but the best-known one
        expected = kronecker_product(model, loss_fn, x, y)
    assert relative_error(theirs, expected) > least
    assert relative_error(ours.to_dense(), expected) < TOLERANCE


def exact_groups(model, loss_fn, x, y):
    """The GGN by autograd, without what couples the groups of a convolution."""
    layer = next(module for module in model.modules() if hasattr(module, "bias"))
    rows = torch.arange(len(layer.weight)) // (len(layer.weight) // getattr(layer, "groups", 1))
    group = torch.cat([rows.repeat_interleave(layer.weight[0].numel()), rows])
    return dense_ggn(model, loss_fn, x, y) * (group[:, None] == group)


def kronecker_product(model, loss_fn, x, y):
    """B (x) A with B the loss's own Hessian by autograd, summed over examples, and A of inputs."""
    outputs = model(x).detach()
    hessian = torch.autograd.functional.hessian(lambda z: loss_fn(z, y), outputs)
    rows = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    product = torch.kron(torch.einsum("ninj->ij", hessian), rows.T @ rows / len(x))
    entries = torch.arange(len(product)).view(outputs.shape[1], -1)
    order = torch.cat([entries[:, :-1].flatten(), entries[:, -1]])
    return product[order][:, order]


NNGEOMETRY = {
    "circular": lambda: images(lambda: nn.Conv2d(4, 4, **SAME, padding_mode="circular")),
    "reflect": lambda: images(lambda: nn.Conv2d(4, 4, **SAME, padding_mode="reflect")),
    "replicate": lambda: images(lambda: nn.Conv2d(4, 4, **SAME, padding_mode="replicate")),
    "1-d": lambda: images(lambda: nn.Conv1d(4, 4, **SAME, padding_mode="circular"), (6,)),
    "called twice": lambda: (seeded(Twice), None, torch.rand(6, 2, 4).double(), None),
}


@pytest.fixture
def double_by_default():
    """Nngeometry makes tensors of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("name", NNGEOMETRY)
def test_diagonal_beside_nngeometry(name):
    metrics = pytest.importorskip("nngeometry.metrics")
    objects = pytest.importorskip("nngeometry.object")
    model, _, x, _ = NNGEOMETRY[name]()
    y, loss_fn = torch.zeros(len(x), dtype=torch.long), nn.CrossEntropyLoss()
    expected = dense_ggn(model, loss_fn, x, y).diagonal()
    loader = DataLoader(TensorDataset(x.clone(), y), batch_size=len(x))
    theirs = metrics.FIM(model, loader, objects.PMatDiag, variant="classif_logits").get_diag()
    assert relative_error(theirs, expected) > 0.05
    ours = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
    flat = torch.cat([ours[name].flatten() for name in trainable(model)])
    assert relative_error(flat, expected) < TOLERANCE
