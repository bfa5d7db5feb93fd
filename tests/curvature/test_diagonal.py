"""Diagonals and per-example gradients of whole models against autograd, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import kfac_tn
from kfac_tn import functional
from kfac_tn.curvature.calls import Calls
from kfac_tn.curvature.compute import check_finite
from kfac_tn.functional import common
from kfac_tn.layers import gradient_family
from kfac_tn.testing import dense_ggn, relative_error, trainable

TOLERANCE = 1e-10


class Twice(nn.Module):
    """One module called twice, on different numbers of positions."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        first = self.module(x).flatten(1)
        return torch.cat([first, self.module(x.tanh()[..., 1:]).flatten(1)], 1)


class OtherAxes(nn.Module):
    """Hides the examples: time first, batch and time in one axis, single examples."""

    def __init__(self):
        super().__init__()
        self.first, self.merged, self.single = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(0, 1)).tanh().transpose(0, 1)
        x = self.merged(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2])
        return torch.stack([self.single(row.mean(0)) for row in x])


class Functional(nn.Module):
    """A weight that is used without calling its module, too; parameters of the model's own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.rand(3))
        self.mix = nn.Parameter(torch.rand(3, 3))
        self.both = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh() * self.scale @ self.mix
        return self.b(nn.functional.linear(x - self.both, self.a.weight)) + x @ self.both[:, None]


class Broadcast(nn.Module):
    """A class token, positions, scales, all parameters of the model's own; one is used twice."""

    def __init__(self):
        super().__init__()
        for name, shape in {
            "token": (1, 1, 3),
            "positions": (1, 5, 3),
            "scale": (3,),
            "rows": (5, 1),
            "number": (),
            "shift": (5, 3),
            "divisor": (1, 3),
            "unused": (2,),
        }.items():
            setattr(self, name, nn.Parameter(torch.rand(shape) + 0.5))
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.number * x.tanh() * self.scale
        x = torch.sub(self.shift, self.inner(x)) / self.divisor
        x *= self.rows
        return self.head((x.tanh() * self.scale).mean(1).add(self.number))


class BroadcastOtherwise(nn.Module):
    """Parameters that meet tensors whose first axis isn't that of the examples."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift, self.head = (
            nn.Parameter(torch.rand(3)),
            nn.Parameter(torch.rand(1, 3)),
            nn.Linear(3, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = (x.transpose(0, 1).sin() * self.scale).transpose(0, 1)
        rows = (x.flatten(0, 1).tanh() + self.shift).unflatten(0, x.shape[:2])
        return self.head(rows.mean(1))


class Tied(nn.Module):
    """Two layers with one weight, and a frozen bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.b.weight = self.a.weight
        self.c.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


class Unused(nn.Module):
    """Modules that the outputs do not depend on."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.embedding = (
            nn.Linear(3, 2),
            nn.Linear(3, 2),
            nn.Embedding(3, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Text(nn.Module):
    """Indices for inputs, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(self.norm(self.embedding(x))).tanh()
        return self.head(hidden.mean(1))


class Language(nn.Module):
    """Tokens looked up twice, with padding, and positions without an axis of examples."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 3, padding_idx=1)
        self.positions = nn.Embedding(6, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head((hidden.tanh() + self.tokens(x[:, :1])).tanh().mean(1))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


conv = {"kernel_size": 3, "padding": 1}
CASES = {
    "linear": (lambda: nn.Linear(3, 2), (3,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), (3,)),
    "shared positions": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten()),
        (4, 3),
    ),
    "cnn": (
        lambda: images(nn.Conv2d(2, 4, **conv, stride=2), nn.Tanh(), nn.Conv2d(4, 3, 2)),
        (2, 5, 6),
    ),
    "grouped, dilated": (
        lambda: images(
            nn.Conv2d(4, 6, **conv, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 2, dilation=2, groups=6, bias=False),
        ),
        (4, 4, 5),
    ),
    "circular, reflect": (
        lambda: images(
            nn.Conv2d(2, 2, **conv, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(2, 2, (2, 3), padding="same", padding_mode="reflect"),
        ),
        (2, 4, 3),
    ),
    "transposed": (
        lambda: images(
            nn.ConvTranspose2d(4, 4, 2, stride=2, output_padding=1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, (2, 1), padding=(1, 0), dilation=2),
        ),
        (4, 2, 2),
    ),
    "1-d": (lambda: images(nn.Conv1d(2, 3, 3, stride=2), nn.ConvTranspose1d(3, 2, 2)), (2, 7)),
    "3-d": (
        lambda: images(nn.Conv3d(2, 2, 2, groups=2), nn.ConvTranspose3d(2, 1, 2)),
        (2, 3, 2, 3),
    ),
    "normalizations": (
        lambda: images(
            nn.Conv2d(2, 4, **conv),
            nn.BatchNorm2d(4),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4, affine=True),
            nn.Tanh(),
            nn.LayerNorm([4, 3]),
            nn.RMSNorm(3),
        ),
        (2, 4, 3),
    ),
    "called twice": (lambda: Twice(nn.Conv1d(2, 3, 2)), (2, 5)),
    "norm called twice": (lambda: Twice(nn.GroupNorm(1, 2)), (2, 4)),
    "tied": (Tied, (3,)),
    "other axes": (OtherAxes, (2, 3)),
    "other axes, as many as examples": (OtherAxes, (4, 3)),
    "functional use, own parameters": (Functional, (3,)),
    "broadcast parameters": (Broadcast, (4, 3)),
    "broadcast over other axes": (BroadcastOtherwise, (2, 3)),
    "broadcast over other axes, as many as examples": (BroadcastOtherwise, (4, 3)),
    "unused": (Unused, (3,)),
    "recurrent": (lambda: nn.Sequential(nn.RNNCell(3, 2)), (3,)),
    "text": (Text, (3,)),
    "language": (Language, (3,)),
    "language, as long as examples": (Language, (4,)),
}
N = 4


def problem(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make().double()
    if isinstance(next(model.modules()), Text | Language):
        return model, torch.randint(5, (N, *shape))
    x = torch.randn(N, *shape, dtype=torch.float64)
    model(x)  # lazy modules
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model.double().eval(), x


def flat(named: dict[str, Tensor], model: nn.Module) -> Tensor:
    assert list(named) == list(trainable(model))
    for name, parameter in trainable(model).items():
        assert named[name].shape == parameter.shape
    return torch.cat([value.flatten() for value in named.values()])


LOSSES = {
    "mse": (nn.MSELoss(), lambda out: torch.rand_like(out)),
    "cross-entropy": (nn.CrossEntropyLoss(reduction="sum"), lambda out: torch.randint(2, (N,))),
    "weighted": (
        lambda classes: nn.CrossEntropyLoss(torch.rand(classes).double(), ignore_index=0),
        lambda out: torch.tensor([1, 0, 1, 1]),
    ),
}


def loss_and_targets(loss: str, outputs: Tensor) -> tuple[nn.Module, Tensor]:
    loss_fn, targets = LOSSES[loss]
    if loss == "weighted":
        loss_fn = loss_fn(outputs.shape[1])
    return loss_fn, targets(outputs.detach())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_exact_diagonal_is_that_of_the_dense_ggn(case, loss):
    model, x = problem(case)
    loss_fn, y = loss_and_targets(loss, model(x))
    expected = dense_ggn(model, loss_fn, x, y).diagonal()
    for sizes in ([N], [1, N - 1]):
        data = list(zip(x.split(sizes), y.split(sizes), strict=True))
        diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, data)
        assert relative_error(flat(diagonal, model), expected) < TOLERANCE


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_per_example_gradients_are_those_of_a_loop(case, loss):
    model, x = problem(case)
    loss_fn, y = loss_and_targets(loss, model(x))
    gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    outputs = model(x)
    (column,) = torch.autograd.grad(loss_fn(outputs, y), outputs, retain_graph=True)
    parameters = list(trainable(model).values())
    for n in range(N):
        mask = torch.zeros_like(column)
        mask[n] = column[n]
        expected = torch.autograd.grad(
            outputs, parameters, mask, True, allow_unused=True, materialize_grads=True
        )
        expected = torch.cat([g.flatten() for g in expected])
        actual = flat({name: g[n] for name, g in gradients.items()}, model)
        assert (actual - expected).norm() <= TOLERANCE * expected.norm()


FAST = [case for case in CASES if case not in ("other axes, as many as examples", "recurrent")]


@pytest.mark.parametrize("case", [c for c in FAST if c not in ("other axes", "unused")])
def test_per_example_gradients_are_those_of_vmap(case):
    model, x = problem(case)
    loss_fn, y = loss_and_targets("cross-entropy", model(x))

    def loss(parameters, x, y):
        return loss_fn(functional_call(model, parameters, x[None]), y[None])

    parameters = {name: p.detach() for name, p in trainable(model).items()}
    if case == "text":  # whose tied weights have two names for torch.func
        parameters = {name: p for name, p in parameters.items() if name != "head.weight"}
    expected = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    # torch.func takes tied weights for two.
    names = [name for name in expected if (case, name) != ("tied", "a.weight")]
    actual = torch.cat([gradients[name].reshape(N, -1) for name in names], 1)
    wanted = torch.cat([expected[name].reshape(N, -1) for name in names], 1)
    assert relative_error(actual, wanted) < TOLERANCE


@pytest.fixture(params=["a few", "all"])
def verified(request, monkeypatch):
    """Of which examples it is found out what the model does to them."""
    if request.param == "all":
        monkeypatch.setattr("kfac_tn.curvature.calls.FEW", N)
    return request.param


@pytest.mark.parametrize(
    "case", ["cnn", "grouped, dilated", "transposed", "normalizations", "tied", "text"]
)
def test_known_layers_need_no_loop_over_examples(case, verified):
    model, x = problem(case)
    calls = Calls(model, (x, None))
    calls.verify()
    assert calls.unknown == set()


@pytest.mark.parametrize(
    ("case", "unknown"),
    [
        ("other axes", {"first", "merged", "single"}),
        ("other axes, as many as examples", {"first", "merged", "single"}),
        ("functional use, own parameters", {"a.weight", "mix", "both"}),
        ("broadcast parameters", {"unused"}),
        ("broadcast over other axes", {"scale", "shift"}),
        ("broadcast over other axes, as many as examples", {"scale", "shift"}),
        ("language", {"positions"}),
        ("language, as long as examples", {"positions"}),
    ],
)
def test_what_is_looped_over(case, unknown, verified):
    model, x = problem(case)
    calls = Calls(model, (x, None))
    calls.verify()
    found = {name if name in unknown else name.split(".")[0] for name in calls.unknown}
    assert found == unknown


def test_monte_carlo_converges_to_the_exact_diagonal():
    model, x = problem("normalizations")
    loss_fn, y = loss_and_targets("cross-entropy", model(x))
    exact = flat(kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)]), model)
    errors = []
    for samples in (10, 1000):
        generator = torch.Generator().manual_seed(0)
        options = {"mode": "mc", "mc_samples": samples, "generator": generator}
        diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)], **options)
        errors.append(relative_error(flat(diagonal, model), exact))
    assert errors[1] < 0.1
    assert 3 < errors[0] / errors[1] < 33  # 10, give or take


def test_max_memory_changes_nothing_or_is_refused():
    for case in ("cnn", "called twice", "transposed", "functional use, own parameters"):
        model, x = problem(case)
        loss_fn, y = loss_and_targets("mse", model(x))
        expected = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
        chunked = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)], max_memory=2e4)
        assert relative_error(flat(chunked, model), flat(expected, model)) < TOLERANCE
        with pytest.raises(ValueError, match="max_memory=100 bytes is too little"):
            kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)], max_memory=100)


@pytest.mark.parametrize(
    ("limit", "max_memory", "together"),
    # 512 bytes a column, four in a quarter of twice the limit: twice three
    [(2**26, None, [6]), (2**12, None, [3, 3]), (2**26, 100_000, [1] * 6)],
)
def test_columns_wait_for_each_other_where_positions_are_few(
    limit, max_memory, together, monkeypatch
):
    """As far as there is room, and not where the bound on memory is the user's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6)).double()
    x = torch.randn(N, 2, 4, 4, dtype=torch.float64)
    y = model(x).detach()
    columns = []
    original = functional.conv_weight_diagonal

    def spy(x, g, *args, **kwargs):
        columns.append(1 if isinstance(g, Tensor) else len(g))
        return original(x, g, *args, **kwargs)

    monkeypatch.setattr(functional, "conv_weight_diagonal", spy)
    monkeypatch.setattr(common, "UNFOLD_BYTES", limit)
    loss_fn = nn.MSELoss()
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)], max_memory=max_memory)
    assert columns == together
    expected = dense_ggn(model, loss_fn, x, y).diagonal()
    assert relative_error(flat(diagonal, model), expected) < TOLERANCE


def test_large_values_are_finite():
    """Whose sum isn't."""
    check_finite("weight", torch.full((4,), 2e38), torch.full((2, 2), -2e38))
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="'weight' isn't finite"):
            check_finite("weight", torch.ones(3), torch.tensor([bad, 1.0, -bad]))


class Alternating(nn.Module):
    """A layer that is called twice: the first output needs one call, the second one both."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv1d(1, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.shared(x)
        second = self.shared(x[..., 1:] + 1).mean(-1)
        return torch.cat([first.mean(-1), second * first.sum(-1)], 1)


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_columns_that_reach_one_call_of_several(loss):
    torch.manual_seed(0)
    model = Alternating().double()
    x = torch.randn(N, 1, 4, dtype=torch.float64)
    loss_fn, y = loss_and_targets(loss, model(x))
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
    expected = dense_ggn(model, loss_fn, x, y).diagonal()
    assert relative_error(flat(diagonal, model), expected) < TOLERANCE


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(32), nn.GroupNorm(4, 32), nn.LayerNorm([24, 24])])
def test_norms_square_within_max_memory(norm, peak_bytes):
    """Whose rows are as large as their inputs: 2.25 MiB; and refused if one example doesn't fit."""
    x, g = torch.randn(2, 32, 32, 24, 24)
    norm.eval()
    family = gradient_family(norm)
    expected = family.per_example_weight_gradient(norm, x, g).square().sum(0)
    actual = family.weight_diagonal(norm, x, g, 2**20)
    torch.testing.assert_close(actual, expected)
    peak = peak_bytes(lambda: family.weight_diagonal(norm, x, g, 2**20))
    assert peak <= 2**20 + 4 * actual.nbytes
    with pytest.raises(ValueError, match="max_memory=1,000 bytes is too little: one example's"):
        family.weight_diagonal(norm, x, g, 1000)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)])
def test_batch_statistics_are_refused(norm):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), norm, nn.Flatten())
    if norm.track_running_stats:
        model.train()
    else:
        model.eval()
    x, loss_fn = torch.rand(3, 1, 3, 3), nn.MSELoss()
    y = torch.rand(3, 8)
    with pytest.raises(ValueError, match=r"BatchNorm2d '1' .* model.eval\(\)"):
        kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    with pytest.raises(ValueError, match=r"BatchNorm2d '1' .* model.eval\(\)"):
        kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])


class Centred(nn.Module):
    """Mixes the examples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x - x.mean(0)


class Cumulative(nn.Module):
    """Adds to each example those before it, or those behind it; neither the first nor the last."""

    def __init__(self, backwards: bool):
        super().__init__()
        self.linear, self.dims = nn.Linear(2, 2), (0,) if backwards else ()

    def forward(self, x: Tensor) -> Tensor:
        sums = self.linear(x).flip(self.dims)
        sums = torch.cat([sums[:1], sums[1:-1] + 1e-3 * sums[:-2].cumsum(0), sums[-1:]])
        return sums.flip(self.dims)


class Overwritten(nn.Module):
    """Changes what a layer was given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.linear(x)
        x.mul_(2)
        return y


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Centred(), ValueError, "mixes examples"),
        (Cumulative(backwards=False), ValueError, "mixes examples"),
        (Cumulative(backwards=True), ValueError, "mixes examples"),
        (nn.Sequential(nn.PReLU(), nn.Dropout(0.5)).train(), ValueError, "random"),
        (Overwritten(), RuntimeError, "in ?place"),
        (
            kfac_tn.tn.nn.randomize(nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 1, 1))),
            ValueError,
            "RandomizedConvNd '1' .* random",
        ),
        (nn.Sequential(nn.Linear(2, 2).requires_grad_(False)), ValueError, "no trainable"),
        (
            nn.ModuleDict({"e": nn.Embedding(3, 2, scale_grad_by_freq=True)}),
            ValueError,
            "Embedding 'e' has scale_grad_by_freq=True",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_gradient_for_each_example_is_refused(model, error, message, verified):
    torch.manual_seed(0)
    x, loss_fn = torch.rand(N, 2), nn.MSELoss()
    with pytest.raises(error, match=message):
        kfac_tn.compute_per_example_gradients(model, loss_fn, x, x)
    with pytest.raises(error, match=message):
        kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, x)])


def test_refused_options():
    model, x = nn.Linear(2, 2), torch.rand(3, 2)
    for options in ({"mode": "type-2"}, {"mc_samples": 0}, {"max_memory": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            kfac_tn.compute_ggn_diagonal(model, nn.MSELoss(), [(x, x)], **options)
    with pytest.raises(ValueError, match="empty"):
        kfac_tn.compute_ggn_diagonal(model, nn.MSELoss(), [])
    loss_fn = nn.MSELoss(reduction="none")
    with pytest.raises(ValueError, match="reduction='none'"):
        kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, x)])
    with pytest.raises(ValueError, match="scalar"):
        kfac_tn.compute_per_example_gradients(model, loss_fn, x, x)
    with pytest.raises(TypeError, match="tuple"):
        kfac_tn.compute_per_example_gradients(nn.LSTM(2, 2), loss_fn, x, x)


def test_dropout_is_no_harm_to_known_layers():
    """The mask is that of the batch's own forward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
    x, loss_fn = torch.rand(3, 3, dtype=torch.float64), nn.MSELoss()
    y = torch.rand(3, 2, dtype=torch.float64)
    torch.manual_seed(1)
    gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    torch.manual_seed(1)
    loss_fn(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].sum(0), parameter.grad)


class Whole(nn.Module):
    """Takes batches of one size only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(N, 2))


def test_batches_that_cannot_be_cut():
    torch.manual_seed(0)
    model, x, loss_fn = Whole().double(), torch.rand(N, 2, dtype=torch.float64), nn.MSELoss()
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, x)])
    expected = dense_ggn(model, loss_fn, x, x).diagonal()
    assert relative_error(flat(diagonal, model), expected) < TOLERANCE


class Experts(nn.Module):
    """The sign of an entry decides which layer an example goes to, and how the head is used."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        y = torch.empty_like(x)
        y[chosen], y[~chosen] = self.first(x[chosen]), self.second(x[~chosen].tanh())
        outputs = self.head(y.tanh())
        if chosen.all():
            return outputs
        return outputs + ~chosen[:, None] * nn.functional.linear(x, self.head.weight)


def test_every_batch_is_searched_for_weights_used_without_their_module():
    """The first batch, by which calls are verified, uses none so, and one layer for no example."""
    torch.manual_seed(0)
    model, loss_fn = Experts().double(), nn.MSELoss()
    x, y = torch.rand(N, 3, dtype=torch.float64), torch.rand(N, 2, dtype=torch.float64)
    mixed = x - torch.tensor([0.5, 0.0, 0.0])
    assert Calls(model, (x, y)).unknown == set()
    known = {name for name, _ in model.named_parameters()} - Calls(model, (mixed, y)).unknown
    assert known == {"head.bias"}
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y), (mixed, y)])
    both = [dense_ggn(model, loss_fn, each, y).diagonal() for each in (x, mixed)]
    assert relative_error(flat(diagonal, model), sum(both) / 2) < TOLERANCE


class OwnAttention(nn.MultiheadAttention):
    """Whatever it may compute."""


class Masked(nn.Module):
    """Attention whose mask of all examples isn't part of the batch."""

    def __init__(self):
        super().__init__()
        self.attention = OwnAttention(2, 1, batch_first=True)
        self.mask = torch.zeros(N, 3, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=self.mask)[0].sum(1)


def test_models_that_cannot_be_called_on_one_example_are_told_what_to_do():
    x, y, loss_fn = torch.rand(N, 3, 2), torch.rand(N, 2), nn.MSELoss()
    for compute in (
        lambda model: kfac_tn.compute_per_example_gradients(model, loss_fn, x, y),
        lambda model: kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)]),
    ):
        with pytest.raises(ValueError, match=r"one example alone \(Ass.*part of the batch"):
            compute(Masked())


class OneByOne(nn.Module):
    """Layers that are called with single examples, and with what belongs to none."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolution, self.linear = nn.Conv1d(channels, 3, 2), nn.Linear(3, 3)
        self.norm, self.shared = nn.LayerNorm(3), nn.Linear(3, 3)
        self.table = nn.Embedding(2, 3)
        self.register_buffer("vector", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.norm(self.linear(self.convolution(each).mean(1))).tanh() for each in x]
        table = self.table(torch.tensor(1))
        return torch.stack(rows) * self.shared(self.vector) + table


@pytest.mark.parametrize("examples", [1, 2, 3, 5])
@pytest.mark.parametrize("channels", [2, 3])
def test_layers_called_without_a_batch(examples, channels):
    """Also where another of their axes is as long as that of the examples."""
    torch.manual_seed(0)
    model, loss_fn = OneByOne(channels).double(), nn.MSELoss()
    x, y = torch.rand(examples, channels, 4).double(), torch.rand(examples, 3).double()
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
    expected = dense_ggn(model, loss_fn, x, y).diagonal()
    assert relative_error(flat(diagonal, model), expected) < TOLERANCE
    rows = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    loss_fn(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(rows[name].sum(0), parameter.grad)


UNBATCHED = {
    "linear": (lambda: nn.Linear(4, 3), (4,), "''"),
    "square": (lambda: nn.Linear(4, 4), (4,), "''"),
    "layer norm": (lambda: nn.LayerNorm(4), (4,), "''"),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 3)), (4,), "'0', '1'"),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Flatten(0), nn.Linear(16, 4)),
        (4, 6),
        "'0', '2'",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten(0)),
        (2, 2, 2),
        "'0'",
    ),
    "instance norm": (
        lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True), nn.Flatten(0)),
        (4, 6),
        "'0'",
    ),
}


@pytest.mark.parametrize("case", UNBATCHED)
def test_models_called_without_a_batch_are_told_so(case):
    make, shape, names = UNBATCHED[case]
    torch.manual_seed(0)
    model, loss_fn, x = make().double(), nn.MSELoss(), torch.rand(shape).double()
    y = torch.rand_like(model(x))
    message = rf"Layers \[{names}\] were called with a single example.*unsqueeze\(0\)"
    with pytest.raises(ValueError, match=message):
        kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    with pytest.raises(ValueError, match=message):
        kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])


def test_leaves_no_trace():
    model, x = problem("normalizations")
    loss_fn, y = loss_and_targets("mse", model(x))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
    kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    assert (torch.get_rng_state() == random).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert (value == state[name]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model, x = problem("grouped, dilated")
    loss_fn, y = loss_and_targets("cross-entropy", model(x))
    expected = flat(kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)]), model)
    model, x = model.to(dtype), x.to(dtype)
    diagonal = flat(kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)]), model)
    assert diagonal.dtype == torch.float32
    assert relative_error(diagonal.double(), expected) < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    ("poison", "unknown"), [(torch.nan, False), (torch.inf, False), (torch.nan, True)]
)
def test_infinite_outputs_are_told_to_be_that(poison, unknown):
    model = (
        nn.Sequential(nn.Unflatten(1, (1, 3)), OwnRecurrence(3, 2, batch_first=True), FirstOf())
        if unknown
        else nn.Linear(3, 2)
    )
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    x[1, 1] = poison
    with pytest.raises(ValueError, match="finite"):
        kfac_tn.compute_ggn_diagonal(model, nn.MSELoss(), [(x, y)])


class OwnRecurrence(nn.RNN):
    """Whatever it may compute."""


class FirstOf(nn.Module):
    """Of a tuple."""

    def forward(self, values):
        return values[0].flatten(1)


def test_outputs_without_positions_are_no_batch():
    model, loss_fn = nn.Linear(2, 3), nn.MSELoss()
    full = torch.randn(4, 5, 2), torch.randn(4, 5, 3)
    empty = torch.randn(4, 0, 2), torch.randn(4, 0, 3)
    alone = kfac_tn.compute_ggn_diagonal(model, loss_fn, [full])
    both = kfac_tn.compute_ggn_diagonal(model, loss_fn, [empty, full])
    for one, other in zip(alone.values(), both.values(), strict=True):
        assert torch.equal(one, other)
    gradients = kfac_tn.compute_per_example_gradients(model, nn.MSELoss(reduction="sum"), *empty)
    assert {name: g.shape for name, g in gradients.items()} == {"weight": (4, 3, 2), "bias": (4, 3)}
    assert not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("unknown", [False, True])
def test_hooks_of_parameters_have_no_part_in_it(unknown):
    layers = [nn.Unflatten(1, (1, 3)), OwnRecurrence(3, 2, batch_first=True), FirstOf()]
    model = nn.Sequential(*layers) if unknown else nn.Linear(3, 2)
    x, y, loss_fn = torch.randn(4, 3), torch.randn(4, 2), nn.MSELoss()
    results = []
    for _ in range(2):
        diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
        gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
        results.append([*diagonal.values(), *gradients.values()])
        for parameter in model.parameters():
            parameter.register_hook(lambda g: 10 * g)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("max_memory", [0, -1, torch.nan, torch.inf, "1"])
def test_memory_out_of_range_is_refused(max_memory):
    data = [(torch.randn(4, 2), torch.randn(4, 3))]
    with pytest.raises(ValueError, match=f"max_memory is {max_memory}"):
        kfac_tn.compute_ggn_diagonal(nn.Linear(2, 3), nn.MSELoss(), data, max_memory=max_memory)


class Positions(nn.Module):
    """A bias, a parameter of one's own and a normalization, all as large as an output."""

    def __init__(self):
        super().__init__()
        self.own, self.norm = nn.Parameter(torch.randn(1, 64, 64)), nn.LayerNorm((64, 64))
        self.linear = nn.Linear(1, 64 * 64)

    def forward(self, x):
        return self.norm(self.linear(x).view(len(x), 64, 64) + self.own).mean(1)[:, :3]


def test_memory_is_bounded_for_biases_too(monkeypatch):
    from kfac_tn.curvature.copies import CopiesFamily

    held = []
    for family in (CopiesFamily, *{type(f) for f in _families(Positions())}):
        plain = family.per_example_bias_gradient

        def spy(self, module, g, plain=plain):
            result = plain(self, module, g)
            held.append(result.numel() * result.element_size())
            return result

        monkeypatch.setattr(family, "per_example_bias_gradient", spy)
    torch.manual_seed(0)
    model, loss_fn = Positions(), nn.MSELoss()
    data = [(torch.randn(64, 1), torch.randn(64, 3))]
    whole = kfac_tn.compute_ggn_diagonal(model, loss_fn, data)
    assert max(held) == 64 * 64 * 64 * 4
    held.clear()
    parts = kfac_tn.compute_ggn_diagonal(model, loss_fn, data, max_memory=2**18)
    assert max(held) <= 2**17  # and as much for their squares
    for name, part in parts.items():
        torch.testing.assert_close(part, whole[name])
    wide = [(data[0][0], torch.randn(64, 64 * 64))]
    with pytest.raises(ValueError, match=r"max_memory=1,000 bytes .* take"):
        kfac_tn.compute_ggn_diagonal(model.linear, loss_fn, wide, "mc", 1, 1000)


def _families(model):
    from kfac_tn.layers import gradient_family

    return [f for f in map(gradient_family, model.modules()) if f is not None]


class Permuted(nn.Module):
    """Takes its examples in another order inside, as for packed sequences."""

    def __init__(self, way):
        super().__init__()
        self.way, self.inner, self.outer = way, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, batch):
        x, rank = batch  # by which they are sorted
        order = rank.argsort()
        return self.outer(self.back(torch.tanh(self.inner(x[order])), order.argsort()))

    def back(self, x, order):
        matrix = nn.functional.one_hot(order, len(x)).to(x)
        ways = {
            "index": lambda: x[order],
            "select": lambda: x.index_select(0, order),
            "gather": lambda: x.gather(0, order[:, None].expand_as(x)),
            "take": lambda: torch.take_along_dim(x, order[:, None], 0),
            "scatter": lambda: torch.zeros_like(x).index_copy(0, order.argsort(), x),
            "embedding": lambda: nn.functional.embedding(order, x),
            "mm": lambda: matrix @ x,
            "addmm": lambda: torch.addmm(torch.zeros(x.shape[1]).to(x), matrix, x),
            "bmm": lambda: torch.bmm(matrix[None], x[None])[0],
            "einsum": lambda: torch.einsum("mn,nd->md", matrix, x),
            "rows": lambda: torch.stack([x[n] for n in order.tolist()]),
            "unbind": lambda: torch.stack([x.unbind()[n] for n in order.tolist()]),
            "slices": lambda: torch.cat([x[n : n + 1] for n in order.tolist()]),
            "function": lambda: Reordered.apply(x, order),
            "sparse": lambda: torch.sparse.mm(matrix.to_sparse(), x),
            "from the right": lambda: (x.T @ matrix.T).T,
            "repeated": lambda: x.repeat(2, 1)[order],
            "sums": lambda: (matrix.unsqueeze(-1) * x).sum(1),
        }
        return ways[self.way]()


class Reordered(torch.autograd.Function):
    """By index, with a derivative of its own."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x[order]

    @staticmethod
    def backward(ctx, g):
        return g[ctx.order.argsort()], None


WAYS = ["index", "select", "gather", "take", "scatter", "embedding"]
WAYS += ["mm", "addmm", "bmm", "einsum", "rows", "unbind", "slices", "function"]
WAYS += ["sparse", "from the right", "repeated", "sums"]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=20, deadline=None)
@given(order=st.integers(1, 9).flatmap(lambda n: st.permutations(range(n))))
def test_per_example_gradients_where_examples_are_sorted_inside(way, order):
    """Whatever is moved, and how: not only what a few examples would show."""
    model, x = Permuted(way).double(), torch.randn(len(order), 3, dtype=torch.float64)
    y, rank, loss_fn = torch.randn(len(order), 2).double(), torch.tensor(order), nn.MSELoss()
    gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, (x, rank), y)
    for n in range(len(order)):
        one = slice(n, n + 1)
        loss = loss_fn(model((x[one], rank[one])), y[one]) / len(order)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for gradient, wanted in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(gradient[n], wanted)


class PermutedTwice(Permuted):
    """Calls one layer with its examples in two orders."""

    def forward(self, batch):
        x, rank = batch
        order = rank.argsort()
        moved = self.back(torch.tanh(self.inner(2 * x[order])), order.argsort())
        return self.outer(torch.tanh(self.inner(x)) + moved)


@pytest.mark.parametrize("mode", ["exact", "mc"])
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=10, deadline=None)
@given(order=st.integers(1, 9).flatmap(lambda n: st.permutations(range(n))))
def test_diagonals_where_a_layer_has_its_examples_in_two_orders(mode, way, order):
    model, rank = PermutedTwice(way).double(), torch.tensor(order)
    x, y = torch.randn(len(order), 3).double(), torch.randn(len(order), 2).double()
    options = {"mode": mode, "mc_samples": 3 if mode == "mc" else 1}
    sampler = torch.Generator().manual_seed(0)
    whole = kfac_tn.compute_ggn_diagonal(
        model, nn.MSELoss(), [((x, rank), y)], generator=sampler, **options
    )
    if mode == "mc":
        sampler = torch.Generator().manual_seed(0)
        likelihood = kfac_tn.likelihood.likelihood_of(nn.MSELoss())
        outputs = model((x, rank))
        roots = [likelihood.sample(outputs.detach(), y, sampler) / 3**0.5 for _ in range(3)]
        expected = [torch.zeros_like(p) for p in model.parameters()]
        for n, root in ((n, root) for n in range(len(order)) for root in roots):
            gradients = torch.autograd.grad(
                outputs[n], list(model.parameters()), root[n], retain_graph=True
            )
            expected = [e + g.square() for e, g in zip(expected, gradients, strict=True)]
    else:
        expected = [torch.zeros_like(p) for p in model.parameters()]
        for output in model((x, rank)).flatten():
            gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
            scale = 2 / y.numel()
            expected = [e + scale * g.square() for e, g in zip(expected, gradients, strict=True)]
    for actual, wanted in zip(whole.values(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


class Mixing(nn.Module):
    """What an example's hidden numbers become depends on others, but not on all of them."""

    def __init__(self, way):
        super().__init__()
        self.way, self.inner, self.outer = way, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, batch):
        x, weight = batch
        h = self.inner(x)
        ways = {
            "divided by the largest": lambda: h / h.abs().max(),
            "times the largest": lambda: h * h.amax(),
            "largest so far": lambda: torch.where(weight[:, None] > 0, h, h.cummax(0).values),
            "sorted": lambda: h.sort(0).values,
            "gathered": lambda: h + h[weight.argsort()] * (weight[:, None] > 0),
        }
        return self.outer(ways[self.way]())


MIXING = ["divided by the largest", "times the largest", "largest so far", "sorted", "gathered"]
COMPUTE = {
    "diagonal": lambda *a: kfac_tn.compute_ggn_diagonal(*a[:2], [a[2:]]),
    "diagonal, the second batch": lambda model, loss_fn, x, y: kfac_tn.compute_ggn_diagonal(
        model, loss_fn, [((x[0] * 0 + 1e-3, x[1]), y), (x, y)]
    ),
    "per example": kfac_tn.compute_per_example_gradients,
}


@pytest.mark.parametrize("way", MIXING)
@pytest.mark.parametrize("largest", range(8))
@pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE)
def test_examples_that_are_mixed_by_what_they_contain_are_refused(compute, largest, way):
    """Whichever example it is that others depend on: one of them looks as if it were alone."""
    torch.manual_seed(largest)
    model, x, y = Mixing(way).double(), torch.randn(8, 3).double(), torch.randn(8, 2).double()
    x[largest] *= 10
    with pytest.raises(ValueError, match="mixes examples"):
        compute(model, nn.MSELoss(), (x, torch.randn(8)), y)
