"""Factors above the limit of their dimension: the dense formulas with parts of them, in float64."""

from __future__ import annotations

import copy
import math
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfac_tn
from kfac_tn import testing
from kfac_tn.functional import common
from kfac_tn.functional.blocks import block_gram, multiply_blocks, split_rows

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), (7,)),
    "shared positions": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
        (3, 4),
    ),
    "grouped conv": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 10, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)
        ),
        (4, 3, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(4, 10, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(50, 3)
        ),
        (4, 3),
    ),
}


def make(case, **options):
    torch.manual_seed(0)
    model, loss_fn = CASES[case][0]().double(), nn.CrossEntropyLoss()
    options = {"factor_interval": 1, "inverse_interval": 1, "fisher": "type-2", **options}
    return model, loss_fn, kfac_tn.KFAC(model, loss_fn, **options)


def make_data(case, seed=0, n=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *CASES[case][1], generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def train(case, model, loss_fn, optimizer, steps=1, start=0):
    for step in range(start, start + steps):
        x, y = make_data(case, step)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def cut(matrix: Tensor, limit: int, kind: str, side: str = "") -> Tensor:
    """A matrix [d, d] with zeros outside of the blocks that are kept."""
    d, kind = (
        len(matrix),
        {"input": "blocks", "output": "diagonal"}[side] if kind == "auto" else kind,
    )
    if d <= limit:
        return matrix
    pieces = d if kind == "diagonal" else math.ceil(d / limit)
    size = math.ceil(d / pieces)
    place = torch.arange(d) // size
    return matrix * (place[:, None] == place)


def written_out(blocks: Tensor, groups: int, d: int) -> list[Tensor]:
    """Block-diagonal matrices of all groups, dense."""
    return [torch.block_diag(*pieces)[:d, :d] for pieces in blocks.chunk(groups)]


def matrices(named: dict[str, Tensor], block) -> list[Tensor]:
    """Weight and bias of each group, [d_out, d_in]."""
    weight = named[block.weight_name]
    if block.family.transposed:
        weight = weight.unflatten(0, (block.groups, -1)).transpose(1, 2).flatten(2)
    else:
        weight = weight.unflatten(0, (block.groups, -1)).flatten(2)
    bias = named[block.bias_name].view(block.groups, -1, 1)
    return list(torch.cat([weight, bias], 2))


LIMITS = [
    (3, "blocks"),
    (4, "blocks"),
    (8, "blocks"),
    (2, "diagonal"),
    (8, "diagonal"),
    (4, "auto"),
]


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("limit", "kind"), LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_factors_are_parts_of_the_whole_ones(case, limit, kind, approximation, monkeypatch):
    """Of several steps, whatever the chunks; what fills up the last block is zero."""
    monkeypatch.setattr(common, "UNFOLD_BYTES", 4000)
    found = []
    for options in ({"max_dim": None}, {"max_dim": limit, "large_factors": kind}):
        model, loss_fn, optimizer = make(case, approximation=approximation, **options)
        for seed in range(2):  # without steps, so both see the same
            x, y = make_data(case, seed)
            loss_fn(model(x), y).backward()
        found.append(optimizer._estimator.capture.take().factors)
    for (block, whole), (_, parts) in zip(*(f.items() for f in found), strict=True):
        for side, one, other in (
            ("input", whole.input, parts.input),
            ("output", whole.grad_output, parts.grad_output),
        ):
            d = one.shape[-1]
            assert other.shape[-1] <= max(limit, 1) or other.shape == one.shape
            dense = written_out(other, block.groups, d)
            for expected, actual in zip(one, dense, strict=True):
                torch.testing.assert_close(actual, cut(expected, limit, kind, side))
            total = one.diagonal(dim1=-2, dim2=-1).sum()
            torch.testing.assert_close(other.diagonal(dim1=-2, dim2=-1).sum(), total)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("split", ["pi", "exact"])
@pytest.mark.parametrize(("limit", "kind"), LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_directions_are_the_dense_formula(case, limit, kind, split, relative):
    damping, lr = 0.02, 0.05
    model, loss_fn, optimizer = make(
        case,
        max_dim=limit,
        large_factors=kind,
        damping=damping,
        damping_split=split,
        relative_damping=relative,
        noise_damping=0,
        step_rule="fixed",
        lr=lr,
        betas=(0.0, 0.0),
    )
    for step in range(2):
        before = copy.deepcopy(model)
        train(case, model, loss_fn, optimizer, start=step)
        loss_fn(before(make_data(case, step)[0]), make_data(case, step)[1]).backward()
        old, new = dict(before.named_parameters()), dict(model.named_parameters())
        moved = {n: (old[n] - new[n]).detach() / lr for n in old}
        for block in optimizer._estimator.blocks:
            factors = optimizer.factors()[block.name]
            gradients = matrices({n: p.grad for n, p in old.items()}, block)
            for g, (gradient, ours) in enumerate(
                zip(gradients, matrices(moved, block), strict=True)
            ):
                d_out, d_in = gradient.shape
                a = written_out(factors.input, block.groups, d_in)[g]
                b = written_out(factors.grad_output, block.groups, d_out)[g]
                mean_a, mean_b = a.trace() / d_in, b.trace() / d_out
                eye_a, eye_b = torch.eye(d_in).to(a), torch.eye(d_out).to(b)
                if split == "exact":
                    shift = damping * (mean_a * mean_b if relative else 1.0)
                    dense = torch.kron(b, a) + shift * torch.kron(eye_b, eye_a)
                else:
                    pi = (mean_a / mean_b).sqrt()
                    shift_a = damping**0.5 * (mean_a if relative else pi)
                    shift_b = damping**0.5 * (mean_b if relative else 1 / pi)
                    dense = torch.kron(b + shift_b * eye_b, a + shift_a * eye_a)
                solved = torch.linalg.solve(dense, gradient.flatten()).view_as(gradient)
                torch.testing.assert_close(ours, solved, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("limit", "kind"), LIMITS)
@pytest.mark.parametrize("case", list(CASES)[:3])
def test_ekfac_is_along_the_eigenvectors_of_the_parts(case, limit, kind, approximation):
    """diag(U^T GGN U) with U of the cut factors, and the trace of the GGN, by autograd."""
    damping, lr = 0.02, 0.05
    model, loss_fn, optimizer = make(
        case,
        curvature="ekfac",
        approximation=approximation,
        max_dim=limit,
        large_factors=kind,
        inverse_interval=100,
        factor_decay=0.0,
        damping=damping,
        step_rule="fixed",
        lr=lr,
        betas=(0.0, 0.0),
    )
    train(case, model, loss_fn, optimizer)
    vectors = {
        block: tuple(
            [torch.block_diag(*pieces)[:d] for pieces in v.clone().chunk(block.groups)]
            for v, d in (
                (moving.basis(block).input, block.joint_dim),
                (moving.basis(block).grad_output, block.grad_output_dim),
            )
        )
        for block, moving in optimizer._estimator.known()
    }
    before = copy.deepcopy(model)
    gradient_steps = 1
    optimizer._estimator.steps = 30  # where no eigenvectors are due
    optimizer._estimator.capture.armed = True
    train(case, model, loss_fn, optimizer, gradient_steps, start=1)
    x, y = make_data(case, 1)
    ggn = testing.dense_ggn(before, loss_fn, x, y)
    loss_fn(before(x), y).backward()
    old, new = dict(before.named_parameters()), dict(model.named_parameters())
    moved = {n: (old[n] - new[n]).detach() / lr for n in old}
    places, start = {}, 0
    for name, p in old.items():
        places[name] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    for block, moving in optimizer._estimator.known():
        gradients = matrices({n: p.grad for n, p in old.items()}, block)
        for g, rows in enumerate(matrices(places, block)):
            exact = ggn[rows.flatten()][:, rows.flatten()]
            a, b = vectors[block]
            u = torch.kron(b[g], a[g])
            torch.testing.assert_close(u @ u.T, torch.eye(len(u)).to(u))
            v = (u.T @ exact @ u).diagonal()
            torch.testing.assert_close(moving.eigenvalues(block)[g].sum(), exact.trace())
            solved = u @ (u.T @ gradients[g].flatten() / (v + damping * v.sum() / len(u)))
            ours = matrices(moved, block)[g].flatten()
            torch.testing.assert_close(ours, solved, rtol=1e-6, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(*[st.integers(1, 6)] * 5, st.integers(0, 1000))
def test_functions_of_blocks(groups, count, d, limit, chunks, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, count, d, generator=generator).double()
    pieces = math.ceil(d / limit)
    size = math.ceil(d / pieces)
    gram = block_gram(rows.split(max(1, count // chunks), 1), pieces)
    assert gram.shape == (groups * pieces, size, size)
    dense = written_out(gram, groups, d)
    for g, each in enumerate(dense):
        torch.testing.assert_close(each, cut(rows[g].T @ rows[g], limit, "blocks"))
    product = multiply_blocks(rows, gram)
    assert product.shape == (groups, count, pieces * size)
    torch.testing.assert_close(product[..., :d], rows @ torch.stack(dense))
    assert not product[..., d:].any()
    torch.testing.assert_close(split_rows(rows, pieces).flatten(-2)[..., :d], rows)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["diagonal", "blocks"])
def test_continues_bit_for_bit(kind, curvature):
    options = {"max_dim": 4, "large_factors": kind, "curvature": curvature, "fisher": "mc"}
    case = "grouped conv"
    model, loss_fn, optimizer = make(case, **options)
    train(case, model, loss_fn, optimizer, 4)
    other, other_loss, fresh = make(case, **options)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    train(case, model, loss_fn, optimizer, 3, start=4)
    train(case, other, other_loss, fresh, 3, start=4)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    state = optimizer.state_dict()
    for changed in ({"max_dim": None}, {"large_factors": "blocks", "max_dim": 5}):
        _, _, unlike = make(case, **{**options, **changed})
        with pytest.raises(ValueError, match=r"another model|max_dim"):
            unlike.load_state_dict(state)


def test_coverage_and_diagnostics_tell():
    model, loss_fn, optimizer = make("linear", max_dim=4, large_factors="blocks", noise_damping=0)
    rows = {row.parameter: row.why for row in optimizer.coverage()}
    assert "the input's only its 2 diagonal blocks of 4 (above max_dim=4)" in rows["0.weight"]
    assert "the output's only its 2 diagonal blocks of 3" in rows["0.weight"]
    assert "output" not in rows["2.weight"]
    train("linear", model, loss_fn, optimizer, 2)
    layer = optimizer.diagnostics().layers["0"]
    factors = optimizer.factors()["0"]
    a = written_out(factors.input, 1, 8)[0]
    values = torch.linalg.eigvalsh(a) + 1e-3**0.5 * a.trace() / 8
    assert layer.input_condition == pytest.approx(float(values[-1] / values[0]))
    _, _, optimizer = make("linear", max_dim=4)
    (why,) = (row.why for row in optimizer.coverage() if row.parameter == "0.weight")
    assert "the input's only its 2 diagonal blocks of 4" in why
    assert "the output's only its diagonal" in why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_dim": 0}, "max_dim is 0"),
        ({"max_dim": 1.5}, "max_dim is 1.5"),
        ({"max_dim": "auto"}, "max_dim is 'auto'"),
        ({"large_factors": "none"}, "large_factors is 'none'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("linear", **options)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_a_vocabulary_trains_in_little_memory(curvature):
    """A whole factor of 50,257 outputs would take 10 GB; on the defaults none is made."""
    torch.manual_seed(0)
    vocabulary, width = 50257, 16
    model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary))
    loss_fn = nn.CrossEntropyLoss()
    options = {"lr": 1e-2, "curvature": curvature}
    optimizer = kfac_tn.KFAC(model, loss_fn, **options)
    x, y = torch.randint(vocabulary, (8,)), torch.randint(vocabulary, (8,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # KiB
    memory = optimizer.diagnostics().layers["1"].memory
    assert memory < 4 * 4 * vocabulary * (width + 1)
