"""EKFAC and diagonals in the optimizer: against autograd's dense GGN, in float64."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_tn
from kfac_tn import testing
from kfac_tn.curvature.intervals import is_due

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.module(x), self.module(x.tanh()[..., 1:])], dim=-1)


def transposed() -> nn.Module:
    conv = nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))


MODELS = {
    "grouped conv": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (4, 3, 3),
    ),
    "shared positions": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        (2, 4),
    ),
    "called twice": (
        lambda: nn.Sequential(
            Twice(nn.Conv1d(2, 2, 2, bias=False)), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)
        ),
        (2, 4),
    ),
    "transposed": (transposed, (4, 3)),
}


def make(case="grouped conv", **options):
    torch.manual_seed(0)
    model = MODELS[case][0]().double()
    loss_fn = nn.CrossEntropyLoss()
    options = {"factor_interval": 1, "inverse_interval": 1, "fisher": "type-2", **options}
    return model, loss_fn, kfac_tn.KFAC(model, loss_fn, **options)


def make_data(case="grouped conv", seed=0, n=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *MODELS[case][1], generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def train(optimizer, model, loss_fn, steps, case="grouped conv", start=0):
    for step in range(start, start + steps):
        x, y = make_data(case, step)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def permutation(block) -> Tensor:
    """Where each entry of the matrices [G, d_out, d_in] is in the flat parameters."""
    names, start = {}, 0
    for name, p in block.parameters.items():
        names[name] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    weight = names.pop(block.weight_name)
    if block.family.transposed:
        weight = weight.unflatten(0, (block.groups, -1)).transpose(1, 2).flatten(2)
    else:
        weight = weight.unflatten(0, (block.groups, -1)).flatten(2)
    bias = [b.view(block.groups, -1, 1) for b in names.values()]
    return torch.cat([weight, *bias], dim=2)


def groups_of(matrix: Tensor, model, block) -> list[Tensor]:
    """A dense matrix's blocks of a layer's groups, in the order of kron(B, A)."""
    dense = testing.diagonal_block(matrix, model, list(block.parameters))
    return [dense[rows.flatten()][:, rows.flatten()] for rows in permutation(block)]


def split(tensors, block) -> list[Tensor]:
    """Tensors by name as vectors of each group."""
    flat = torch.cat([tensors[name].flatten() for name in block.parameters])
    return [flat[rows.flatten()] for rows in permutation(block)]


INTERVALS = [(1, 1), (1, 3), (2, 3)]


# Eigenvectors are unique where no eigenvalue is double: not for reduce of transposed convolutions,
# whose mean inputs span few directions.
CASES = [(case, "expand") for case in MODELS] + [(case, "reduce") for case in list(MODELS)[:3]]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("intervals", INTERVALS, ids=str)
@pytest.mark.parametrize(("case", "approximation"), CASES)
def test_ekfac_is_the_dense_formula(case, intervals, relative, approximation):
    """U diag(average of diag(U^T GGN U)) U^T + damping I, solved; new U take its diagonal along."""
    decay, damping, lr = 0.6, 0.03, 0.05
    model, loss_fn, optimizer = make(
        case,
        curvature="ekfac",
        approximation=approximation,
        factor_interval=intervals[0],
        inverse_interval=intervals[1],
        relative_damping=relative,
        damping=damping,
        factor_decay=decay,
        step_rule="fixed",
        lr=lr,
        betas=(0.0, 0.0),
    )
    known: dict[tuple[str, int], list] = {}  # basis, values, number of updates
    checked = 0
    for step in range(9):
        x, y = make_data(case, step)
        before = copy.deepcopy(model)
        train(optimizer, model, loss_fn, 1, case, start=step)
        ggn = testing.dense_ggn(before, loss_fn, x, y)
        loss_fn(before(x), y).backward()
        gradients = {n: p.grad for n, p in before.named_parameters()}
        old, new = dict(before.named_parameters()), dict(model.named_parameters())
        moved = {n: (old[n] - new[n]).detach() / lr for n in old}
        for block in optimizer._estimator.blocks:
            factors = optimizer.factors()[block.name]
            ours = split(moved, block)
            for g, exact in enumerate(groups_of(ggn, before, block)):
                entry = known.setdefault((block.name, g), [])
                if entry and is_due(step, intervals[0]):
                    basis, average, count = entry
                    share = (1 - decay) / (1 - decay ** (count + 1))
                    moments = (basis.T @ exact @ basis).diagonal()
                    entry[1:] = [(1 - share) * average + share * moments, count + 1]
                if not entry or is_due(step, intervals[1]):
                    eigen = [torch.linalg.eigh(f[g]) for f in (factors.grad_output, factors.input)]
                    basis = torch.kron(eigen[0][1], eigen[1][1])
                    if not entry or not entry[2]:
                        average, count = torch.kron(eigen[0][0], eigen[1][0]), 0
                    else:
                        dense = entry[0] @ entry[1].diag() @ entry[0].T
                        average, count = (basis.T @ dense @ basis).diagonal(), entry[2]
                    entry[:] = [basis, average, count]
                basis, average, _ = entry
                shift = damping * (average.mean() if relative else 1.0)
                solved = basis @ ((basis.T @ split(gradients, block)[g]) / (average + shift))
                torch.testing.assert_close(ours[g], solved, rtol=1e-6, atol=1e-9)
                checked += 1
    assert checked >= 18


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", MODELS)
def test_oracle_6_traces_of_ekfac_and_diagonal_are_the_ggns(case, reduction):
    """For every layer, whichever eigenvectors; and the diagonal's entries are its own."""
    for curvature in ("ekfac", "diagonal"):
        torch.manual_seed(0)
        model = MODELS[case][0]().double()
        loss_fn = nn.CrossEntropyLoss(reduction=reduction)
        options = {"factor_interval": 1, "inverse_interval": 2, "fisher": "type-2", "lr": 1e-3}
        optimizer = kfac_tn.KFAC(model, loss_fn, curvature=curvature, factor_decay=0.0, **options)
        for step in range(4):
            before = copy.deepcopy(model)
            train(optimizer, model, loss_fn, 1, case, start=step)
        ggn = testing.dense_ggn(before, loss_fn, *make_data(case, 3))
        for block, moving in optimizer._estimator.known():
            eigenvalues = moving.eigenvalues(block)
            for g, exact in enumerate(groups_of(ggn, before, block)):
                torch.testing.assert_close(eigenvalues[g].sum(), exact.trace(), rtol=1e-10, atol=0)
                if curvature == "diagonal":
                    torch.testing.assert_close(eigenvalues[g].flatten(), exact.diagonal())


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("case", MODELS)
def test_diagonal_is_the_dense_formula(case, relative):
    decay, damping, lr = 0.6, 0.03, 0.05
    model, loss_fn, optimizer = make(
        case,
        curvature="diagonal",
        relative_damping=relative,
        damping=damping,
        factor_decay=decay,
        factor_interval=2,
        step_rule="fixed",
        lr=lr,
        betas=(0.0, 0.0),
    )
    average, count = 0.0, 0
    for step in range(12):
        x, y = make_data(case, step)
        before = copy.deepcopy(model)
        train(optimizer, model, loss_fn, 1, case, start=step)
        if is_due(step, 2):
            count += 1
            new = testing.dense_ggn(before, loss_fn, x, y).diagonal()
            average = average + (1 - decay) / (1 - decay**count) * (new - average)
        loss_fn(before(x), y).backward()
        averages = average.split([p.numel() for p in before.parameters()])
        names = [name for name, _ in before.named_parameters()]
        diagonal = dict(zip(names, averages, strict=True))
        old, moved = dict(before.named_parameters()), dict(model.named_parameters())
        for block in optimizer._estimator.blocks:
            ours = split({n: (old[n] - moved[n]).detach() / lr for n in old}, block)
            v = split(diagonal, block)
            gradient = split({n: p.grad for n, p in old.items()}, block)
            for g, each in enumerate(ours):
                shift = damping * (v[g].mean() if relative else 1.0)
                torch.testing.assert_close(each, gradient[g] / (v[g] + shift))


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_empirical_moments_are_those_of_the_examples_own_gradients(curvature):
    """N sum_n g_n g_n^T with g_n of the mean loss; from the user's own pass, no other."""
    case = "called twice"
    model, loss_fn, optimizer = make(
        case, curvature=curvature, fisher="empirical", factor_decay=0.0, lr=1e-3
    )
    train(optimizer, model, loss_fn, 2, case)
    basis = {
        block: moving.basis(block)
        if curvature == "diagonal"
        else copy.deepcopy(moving.basis(block))
        for block, moving in optimizer._estimator.known()
    }
    x, y = make_data(case, 2)
    rows = []
    for n in range(len(x)):
        loss = loss_fn(model(x[n : n + 1]), y[n : n + 1]) / len(x)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([each.flatten() for each in grads]))
    dense = len(x) * torch.stack(rows).T @ torch.stack(rows)
    loss_fn(model(x), y).backward()
    moments = optimizer._estimator.capture.take().moments
    assert moments.keys() == set(optimizer._estimator.blocks)
    for block, moment in moments.items():
        (exact,) = groups_of(dense, model, block)
        u = torch.eye(len(exact), dtype=exact.dtype)
        if curvature == "ekfac":
            u = torch.kron(basis[block].grad_output[0], basis[block].input[0])
        torch.testing.assert_close(moment.flatten(), (u.T @ exact @ u).diagonal())


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_micro_batches_are_one_batch(curvature, fisher):
    results = []
    for parts in (1, 3):
        model, loss_fn, optimizer = make(curvature=curvature, fisher=fisher, lr=1e-2)
        for step in range(3):
            x, y = make_data(seed=step)
            optimizer.zero_grad()
            for some, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_fn(model(some), targets) / parts).backward()
            optimizer.step()
        results.append(values(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


KINDS = [
    {"curvature": "ekfac"},
    {"curvature": "diagonal"},
    {"curvature": {"0": "ekfac", "3": "diagonal"}, "approximation": {"0": "reduce", "3": "expand"}},
    {"curvature": {"0": "kfac", "3": "ekfac"}},
    {"curvature": {"0": "diagonal", "3": "kfac"}, "damping_split": "exact"},
]


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_continues_bit_for_bit(kind, stop):
    options = {"fisher": "mc", "inverse_interval": 3, "factor_interval": 2, **kind}
    model, loss_fn, optimizer = make(**options)
    train(optimizer, model, loss_fn, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    copies = [copy.deepcopy((model, loss_fn, optimizer))]
    copies.append(pickle.loads(pickle.dumps((model, loss_fn, optimizer))))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    copies.append(make(**options))
    copies[-1][0].load_state_dict(saved["model"])
    copies[-1][2].load_state_dict(saved["optimizer"])
    train(optimizer, model, loss_fn, 5, start=stop)
    for other_model, other_loss, other in copies:
        train(other, other_model, other_loss, 5, start=stop)
        assert same(values(model), values(other_model))


def test_states_of_another_kind_are_refused_whole():
    saved = []
    for curvature in ("kfac", "ekfac", "diagonal"):
        model, loss_fn, optimizer = make(curvature=curvature)
        train(optimizer, model, loss_fn, 2)
        saved.append(optimizer.state_dict())
    _, _, optimizer = make(curvature="kfac")
    for state in saved[1:]:
        with pytest.raises(ValueError, match="another kind of curvature for layer '0'"):
            optimizer.load_state_dict(state)
    assert optimizer.steps_taken == 0
    optimizer.load_state_dict(saved[0])


AVERAGED = {
    "expand, mc": {"fisher": "mc"},
    "reduce, mc": {"fisher": "mc", "approximation": "reduce"},
    "expand, empirical": {"fisher": "empirical"},
    "expand, type-2": {"fisher": "type-2"},
}


@pytest.mark.parametrize("other", AVERAGED)
@pytest.mark.parametrize("one", AVERAGED)
@pytest.mark.parametrize("preconditioner", [False, True])
def test_averages_of_one_matrix_are_not_continued_with_another(preconditioner, one, other):
    made = []
    for options in (AVERAGED[one], AVERAGED[other]):
        model, loss_fn, optimizer = make(**options)
        if preconditioner:
            optimizer.close()
            optimizer = kfac_tn.KFACPreconditioner(model, loss_fn, **options)
        made.append(optimizer)
        loss_fn(model(make_data()[0]), make_data()[1]).backward()
        optimizer.step()
    before = copy.deepcopy(made[1].state_dict())
    approximations = [AVERAGED[name].get("approximation", "expand") for name in (one, other)]
    fishers = {AVERAGED[name]["fisher"] for name in (one, other)}
    message = None
    if len(fishers) == 2 and "empirical" in fishers:
        message = "state has averages of fisher="
    elif len(set(approximations)) == 2:
        message = f"approximation='{approximations[0]}' for layer '0'"
    if message is None:
        made[1].load_state_dict(made[0].state_dict())
        return
    with pytest.raises(ValueError, match=message):
        made[1].load_state_dict(made[0].state_dict())
    after = made[1].state_dict()
    assert str(before) == str(after)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_poisoned_batch_leaves_no_trace(kind):
    model, loss_fn, optimizer = make(fisher="empirical", **kind)
    train(optimizer, model, loss_fn, 3)
    before = values(model)
    x, y = make_data(seed=3)
    x[0, 0, 0, 0] = torch.nan
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    with pytest.warns(RuntimeWarning, match="A gradient isn't finite"):
        optimizer.step()
    assert same(values(model), before)
    loss_fn(model(x), y).backward()
    for p in model.parameters():  # a finite gradient, but poisoned statistics
        p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match="The curvature of a batch"):
        optimizer.step()
    train(optimizer, model, loss_fn, 3, start=4)
    assert all(p.isfinite().all() for p in values(model))
    state = optimizer.state_dict()["curvature"]["factors"]
    for entry in state.values():
        assert all(v.isfinite().all() for v in entry.values() if isinstance(v, Tensor))


def test_coverage_and_diagnostics_tell():
    model, loss_fn, optimizer = make(**KINDS[2])
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert rows["0.weight"].treatment == "EKFAC-reduce"
    assert rows["3.weight"].treatment == "diagonal"
    assert "second moments 3 x 17" in rows["3.bias"].why
    train(optimizer, model, loss_fn, 3)
    layers = optimizer.diagnostics().layers
    state = optimizer.state_dict()["curvature"]["factors"]
    for name in ("0", "3"):
        v, shift = state[name]["values"].flatten(1), state[name]["shift"]
        ratios = (v.amax(1) + shift) / (v.amin(1) + shift)
        assert layers[name].condition == pytest.approx(float(ratios.max()))
        assert layers[name].damping_share == pytest.approx(
            float((shift / (v.mean(1) + shift)).max())
        )
        assert layers[name].input_condition is None
        assert layers[name].kl > 0
        assert layers[name].statistics_age == 0
    assert layers["3"].memory == (3 * 17 + 1) * 8
    assert "condition" in str(optimizer.diagnostics())


@pytest.mark.parametrize("rule", [{"step_rule": "quadratic"}, {"trust_region": 1e-3}, {}], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_rule_takes_every_kind(kind, rule):
    damping = kfac_tn.optim.LevenbergMarquardt()
    model, loss_fn, optimizer = make(fisher="mc", damping=damping, **kind, **rule)
    x, y = make_data(n=40)
    first = loss_fn(model(x), y).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    assert loss_fn(model(x), y).item() < 0.9 * first


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_preconditioner(curvature):
    """The direction of the optimizer's first steps, where both see the same."""
    options = {"curvature": curvature, "step_rule": "fixed", "factor_interval": 1}
    options |= {"inverse_interval": 1, "fisher": "type-2"}
    model, loss_fn, optimizer = make(**options, lr=1.0, betas=(0.0, 0.0))
    other = copy.deepcopy(model)
    preconditioner = kfac_tn.KFACPreconditioner(other, loss_fn, **options)
    for step in range(3):
        train(optimizer, model, loss_fn, 1, start=step)
        x, y = make_data(seed=step)
        other.zero_grad()
        loss_fn(other(x), y).backward()
        preconditioner.step()
        with torch.no_grad():
            for p in other.parameters():
                p.sub_(p.grad)
        for one, two in zip(values(model), values(other), strict=True):
            torch.testing.assert_close(one, two)


# What can't be had ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "kron"}, "curvature is 'kron' for layer '0': choose one of"),
        ({"curvature": {"0": "ekfac"}}, "curvature has no entry for layer '3'"),
        ({"curvature": {"0": "ekfac", "3": "kfac", "1": "kfac"}}, r"curvature names \['1'\]"),
        ({"curvature": "ekfac", "fisher": "forward-only"}, r"forward-only.*layers \['0', '3'\]"),
        (
            {
                "curvature": lambda name, module: "diagonal" if name == "3" else "kfac",
                "fisher": "forward-only",
            },
            r"layers \['3'\]",
        ),
    ],
    ids=["unknown", "missing", "superfluous", "all forward-only", "one forward-only"],
)
def test_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


class Tokens(nn.Module):
    """Logits of all positions, one after the other, as language models have them."""

    def __init__(self, mix: bool = False):
        super().__init__()
        self.first, self.second, self.mix = nn.Linear(3, 4), nn.Linear(4, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh().cumsum(1)
        if self.mix:
            h = h.cumsum(0)
        return self.second(h).flatten(0, 1)


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_merged_positions_are_found_out(curvature):
    """Sampled targets are independent, so they are fine; the columns of type-2 are not."""
    x, y = torch.randn(4, 5, 3).double(), torch.randint(3, (20,))
    for mix, fisher, message in (
        (False, "mc", None),
        (False, "type-2", r"\[20, 3\].*fisher='mc'"),
        (True, "mc", r"depend on several rows .* in layers \['first'\]"),
    ):
        torch.manual_seed(0)
        model, loss_fn = Tokens(mix).double(), nn.CrossEntropyLoss()
        optimizer = kfac_tn.KFAC(model, loss_fn, curvature=curvature, fisher=fisher)

        def steps(model=model, loss_fn=loss_fn, optimizer=optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()

        if message is None:
            steps()
        else:
            with pytest.raises(ValueError, match=message):
                steps()


def test_merged_positions_give_unbiased_moments():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 3).double(), torch.randint(3, (6,))
    model, loss_fn = Tokens().double(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, curvature="diagonal", mc_samples=4000)
    loss_fn(model(x), y).backward()
    moments = optimizer._estimator.capture.take().moments
    exact = testing.dense_ggn(model, loss_fn, x, y)
    for block, moment in moments.items():
        (dense,) = groups_of(exact, model, block)
        assert testing.relative_error(moment.flatten(), dense.diagonal()) < 0.1


class Embedded(nn.Module):
    """A language model whose layers all depend on embeddings, of tokens and of positions."""

    def __init__(self, mix: bool = False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(5, 4), nn.Embedding(3, 4)
        self.hidden, self.head, self.mix = nn.Linear(4, 4), nn.Linear(4, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.tokens(x) + self.positions(torch.arange(x.shape[1]))).tanh()
        return self.head(h.cumsum(0) if self.mix else h).flatten(0, 1)


def test_merged_positions_behind_embeddings():
    x, y = torch.randint(5, (2, 3)), torch.randint(3, (6,))
    loss_fn = nn.CrossEntropyLoss()
    mixing = Embedded(mix=True)
    optimizer = kfac_tn.KFAC(mixing, loss_fn, curvature="diagonal")
    with pytest.raises(ValueError, match=r"depend on several rows .* in layers \['hidden'\]"):
        loss_fn(mixing(x), y).backward()
    torch.manual_seed(0)
    model = Embedded().double()
    optimizer = kfac_tn.KFAC(model, loss_fn, curvature="diagonal", mc_samples=4000)
    loss_fn(model(x), y).backward()
    moments = optimizer._estimator.capture.take().moments
    exact = testing.dense_ggn(model, loss_fn, x, y)
    assert len(moments) == 4
    for block, moment in moments.items():
        (dense,) = groups_of(exact, model, block)
        assert testing.relative_error(moment.flatten(), dense.diagonal()) < 0.1


def test_inputs_changed_in_place_and_old_graphs_are_refused():
    model, loss_fn, optimizer = make("shared positions", curvature="diagonal", fisher="mc")
    x, y = make_data("shared positions")
    loss = loss_fn(model(x), y)
    x.add_(1)
    with pytest.raises(RuntimeError, match="input of layer '0' was changed in place"):
        loss.backward()
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="was called before an earlier step"):
        loss.backward()


def test_inputs_are_not_kept_longer_than_needed():
    """A loss that is kept for its value keeps no inputs; nor does a step without statistics."""
    import weakref

    for options in ({}, {"curvature": "diagonal"}):
        model, loss_fn, optimizer = make("shared positions", fisher="mc", **options)
        x, y = make_data("shared positions")
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        gone = weakref.ref(x)
        del x
        assert gone() is None
        assert loss.isfinite()


def test_unfreezing_and_changing_dtype():
    model, loss_fn, optimizer = make(curvature={"0": "ekfac", "3": "diagonal"}, fisher="mc")
    model[3].bias.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="Of layer '3' only"):
        train(optimizer, model, loss_fn, 2)
    model[3].bias.requires_grad_(True)
    train(optimizer, model, loss_fn, 2, start=2)
    model.float()
    for step in range(4, 7):
        x, y = make_data(seed=step)
        optimizer.zero_grad()
        loss_fn(model(x.float()), y).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in values(model))
    for entry in optimizer.state_dict()["curvature"]["factors"].values():
        assert all(v.dtype == torch.float32 for v in entry.values() if isinstance(v, Tensor))


class Checkpointed(nn.Module):
    """The layers of a model, run again in the backward pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize("fisher", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_activation_checkpointing_changes_nothing(curvature, fisher):
    results = []
    for wrap in (lambda model: model, Checkpointed):
        torch.manual_seed(0)
        model, loss_fn = wrap(MODELS["grouped conv"][0]().double()), nn.CrossEntropyLoss()
        options = {"factor_interval": 1, "inverse_interval": 2, "fisher": fisher}
        optimizer = kfac_tn.KFAC(model, loss_fn, curvature=curvature, **options)
        train(optimizer, model, loss_fn, 4)
        results.append(values(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_autocast_and_scaled_losses(curvature):
    """Half precision where the model wants it; what is averaged has float32, and no scale in it."""
    found = []
    for scale, dtype in ((1.0, None), (1024.0, torch.bfloat16)):
        torch.manual_seed(0)
        model, loss_fn = MODELS["grouped conv"][0](), nn.CrossEntropyLoss()
        options = {"factor_interval": 1, "inverse_interval": 1, "fisher": "type-2", "lr": 1e-4}
        optimizer = kfac_tn.KFAC(model, loss_fn, curvature=curvature, **options)
        for step in range(3):
            x, y = make_data(seed=step)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = loss_fn(model(x.float()), y)
            (scale * loss).backward()
            for p in model.parameters():
                p.grad /= scale
            optimizer.step()
        state = optimizer.state_dict()["curvature"]["factors"]
        assert {entry["values"].dtype for entry in state.values()} == {torch.float32}
        found.append(torch.stack([entry["values"].sum() for entry in state.values()]))
    torch.testing.assert_close(*found, rtol=0.05, atol=0.0)
