"""BackPACK's extensions: against the dense GGN by autograd, our own results, and BackPACK's."""

from __future__ import annotations

import copy
import importlib
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kfac_tn
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.testing import dense_ggn, diagonal_block, exact_settings, relative_error, trainable

pytest.importorskip("backpack")
from backpack import backpack, extend, extensions
from backpack.custom_module.branching import SumModule
from backpack.custom_module.permute import Permute
from backpack.custom_module.scale_module import ScaleModule

from kfac_tn.integrations import backpack as tn

TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def run(extension, model, loss_fn, x, y, objective=None, retain_graph=False):
    """What an extension saves on each parameter, by name; nothing for what it leaves out."""
    model, loss_fn = extend(copy.deepcopy(model)), extend(copy.deepcopy(loss_fn))
    loss = loss_fn(model(x), y) if objective is None else objective(model, loss_fn, x, y)
    with backpack(extension, retain_graph=retain_graph):
        loss.backward(retain_graph=retain_graph)
    saved = {n: getattr(p, extension.savefield, None) for n, p in model.named_parameters()}
    return {name: saved[name] for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors):
    return torch.cat([each.flatten() for each in tensors.values()])


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    # A bias before a normalization has no curvature but for rounding.
    assert (actual - expected).norm() <= TOLERANCE * expected.norm() + 1e-14


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

# Models ------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw, dimension, channels_in, size):
    """A (transposed) convolution with hyper-parameters that fit."""
    groups = draw(st.sampled_from([1, 2]))
    transposed = draw(st.booleans())
    kernel = [draw(st.integers(1, 3)) for _ in range(dimension)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dimension)]
    stride = [draw(st.integers(1, 2)) for _ in range(dimension)]
    options = {"groups": groups, "bias": draw(st.booleans()), "dtype": torch.float64}
    if transposed:
        kinds = TRANSPOSED
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        options |= {"stride": stride, "dilation": dilation, "output_padding": extra}
    else:
        kinds = CONVOLUTIONS
        mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        if draw(st.booleans()):  # torch has no strides then
            stride, padding = [1] * dimension, "same"
        else:
            padding = [draw(st.integers(1, 2)) for _ in range(dimension)]
        options |= {"padding_mode": mode, "padding": padding, "stride": stride}
        options |= {"dilation": [min(d, 2) for d in dilation]}
        kernel = [min(k, 1 + (size - 1) // d) for k, d in zip(kernel, dilation, strict=True)]
    return kinds[dimension - 1](channels_in, 4, kernel, **options)


@st.composite
def networks(draw):
    """A CNN with two convolutions, any activation, pooling and normalization; data and a loss."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dimension = draw(st.sampled_from([1, 2, 3]))
    size = 4 if dimension < 3 else 3
    norms = [
        lambda: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimension - 1](4).eval(),
        lambda: nn.GroupNorm(2, 4),
        lambda: (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimension - 1](
            4, affine=True
        ),
        nn.Identity,
    ]
    pools = [
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimension - 1](2),
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dimension - 1](2, ceil_mode=True),
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dimension - 1](2),
    ]
    activation = draw(st.sampled_from([nn.Tanh(), nn.ReLU(), nn.GELU(), nn.LeakyReLU(0.2)]))
    model = nn.Sequential(
        draw(convolutions(dimension, 2, size)),
        draw(st.sampled_from(norms))(),
        activation,
        nn.AdaptiveAvgPool1d(size)
        if dimension == 1
        else (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimension - 2](size),
        draw(convolutions(dimension, 4, size)),
        nn.Dropout(0.5).eval(),
        draw(st.sampled_from(pools)),
        nn.Flatten(),
        nn.LazyLinear(3, bias=draw(st.booleans())),
    ).double()
    x = torch.rand(3, 2, *[size] * dimension, dtype=torch.float64)
    model(x)
    for module in model:
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.running_mean.uniform_()
            module.running_var.uniform_(0.5, 2)
    reduction = draw(st.sampled_from(["mean", "sum"]))
    weight = torch.tensor([0.2, 5.0, 1.0]).double() if draw(st.booleans()) else None
    labels = torch.tensor([2, draw(st.sampled_from([1, -100])), 0])
    loss_fn, y = draw(
        st.sampled_from(
            [
                (nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction=reduction), labels),
                (nn.MSELoss(reduction=reduction), torch.rand(3, 3).double()),
                (
                    nn.BCEWithLogitsLoss(pos_weight=weight, reduction=reduction),
                    torch.rand(3, 3).double(),
                ),
            ]
        )
    )
    return model, loss_fn, x, y


def per_example_gradients(model, loss_fn, x, y):
    outputs = model(x).detach().requires_grad_()
    (column,) = torch.autograd.grad(loss_fn(outputs, y), outputs)
    return gradients_of(model, x, column)


def gradients_of(model, x, column):
    """By autograd, one example at a time."""
    parameters = trainable(model)
    rows = [
        torch.autograd.grad(model(x[n : n + 1]), list(parameters.values()), column[n : n + 1])
        for n in range(len(x))
    ]
    return dict(zip(parameters, map(torch.stack, zip(*rows, strict=True)), strict=True))


@settings(max_examples=15)
@given(networks())
def test_diagonals_and_gradients_of_drawn_networks(network):
    model, loss_fn, x, y = network
    exact = run(tn.DiagGGNExactTN(), *network)
    assert_close(flat(exact), dense_ggn(*network).diagonal())
    for name, parameter in model.named_parameters():
        assert exact[name].shape == parameter.shape
    gradients = run(tn.BatchGradTN(), *network)
    expected = per_example_gradients(model, loss_fn, x, y)
    for name in expected:
        assert_close(gradients[name], expected[name])
    for samples in (1, 3):
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        estimate = run(tn.DiagGGNMCTN(samples, generator=seeds[0]), *network)
        expected = kfac_tn.compute_ggn_diagonal(
            model, loss_fn, [(x, y)], "mc", samples, generator=seeds[1]
        )
        for name in expected:
            assert_close(estimate[name], expected[name])


@settings(max_examples=10)
@given(networks(), st.sampled_from(["joint", "separate"]), st.sampled_from(["expand", "reduce"]))
def test_kronecker_factors_of_drawn_networks(network, bias, approximation):
    model, loss_fn, x, y = network
    extension = {"expand": tn.KFACExpand, "reduce": tn.KFACReduce}[approximation]
    for fisher in ("type-2", "empirical", "mc"):
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        saved = run(extension(fisher, 2, bias, seeds[0]), *network)
        curvature = kfac_tn.compute_kfac(
            model, loss_fn, [(x, y)], approximation, fisher, 2, bias, seeds[1]
        )
        diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
        for name, block in curvature.blocks.items():
            if not isinstance(block, KroneckerBlock):
                if fisher == "type-2":
                    assert_close(saved[name], diagonal[name])
                continue
            if fisher == "mc":  # compute_kfac draws signs, too: other numbers follow the first ones
                assert saved[f"{name}.weight"].grad_output.shape == block.grad_output_factor.shape
                continue
            assert_close(saved[f"{name}.weight"].grad_output, block.grad_output_factor)
            assert_close(saved[f"{name}.weight"].input, block.input_factor)
            if f"{name}.bias" in saved and bias == "joint":
                assert saved[f"{name}.bias"] is None
            elif f"{name}.bias" in saved:
                b, a = saved[f"{name}.bias"]
                assert_close(b, block.grad_output_factor)
                assert torch.equal(a, torch.ones_like(a))
                assert a.shape == (len(b), 1, 1)


@settings(max_examples=10)
@given(networks(), st.sampled_from(["joint", "separate"]), st.sampled_from(["expand", "reduce"]))
def test_ekfac_of_drawn_networks(network, bias, approximation):
    """Eigenvectors are those of KFAC's factors, values the second moments of gradients there."""
    model, _, x, _ = network
    kfac = {"expand": tn.KFACExpand, "reduce": tn.KFACReduce}[approximation]
    factors = run(kfac("type-2", bias=bias), *network)
    saved = run(tn.EKFAC(approximation, "type-2", bias=bias), *network)
    columns = list(kfac_tn.likelihood.likelihood_of(network[1]).columns(model(x), network[3]))
    gradients = [gradients_of(model, x, column) for column in columns]
    for name, module in model.named_children():
        if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        for attribute in ("weight", "bias") if module.bias is not None else ("weight",):
            block = saved[f"{name}.{attribute}"]
            if block is None:
                assert bias == "joint"
                continue
            b, a = factors[f"{name}.{attribute}"]
            for vectors, factor in ((block.grad_output_vectors, b), (block.input_vectors, a)):
                diagonal = vectors.mT @ factor @ vectors
                assert_close(
                    vectors @ vectors.mT, torch.eye(len(vectors[0])).double().expand(vectors.shape)
                )
                off = diagonal - torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2))
                assert off.norm() <= TOLERANCE * factor.norm()
            names = [f"{name}.{attribute}"]
            if attribute == "weight" and bias == "joint" and module.bias is not None:
                names.append(f"{name}.bias")
            if attribute == "weight":
                index = order(module, names)
            else:
                index = torch.arange(module.bias.numel())
            expected = torch.zeros_like(block.values)
            for each in gradients:
                g = torch.cat([each[part].flatten(1) for part in names], 1)[:, index]
                g = g.view(len(x), *block.values.shape)
                rotated = block.grad_output_vectors.mT @ g @ block.input_vectors
                expected += rotated.square().sum(0)
            assert_close(block.values, expected)


# Exactness ---------------------------------------------------------------------------------------

# Embeddings have diagonals there, and recurrent layers nothing.
SETTINGS = {s.name: s for s in exact_settings() if not re.search("Embedding|step of", s.name)}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_exact_settings(setting):
    """Where KFAC is the GGN, it is the GGN."""
    extension = {"expand": tn.KFACExpand, "reduce": tn.KFACReduce}[setting.approximation]
    saved = run(
        extension("type-2", bias="joint"), setting.model, setting.loss_fn, setting.x, setting.y
    )
    ggn = dense_ggn(setting.model, setting.loss_fn, setting.x, setting.y)
    for names in setting.exact:
        layer = setting.model.get_submodule(names[0].rpartition(".")[0])
        expected = diagonal_block(ggn, setting.model, names)
        b, a = saved[names[0]]
        index = order(layer, names)
        actual = torch.block_diag(*[torch.kron(*pair) for pair in zip(b, a, strict=True)])
        assert_close(actual, expected[index][:, index])


def order(layer, names):
    """Where the entries of B (x) A, group by group, lie among weight and bias."""
    groups = getattr(layer, "groups", 1)
    weight = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    if isinstance(layer, TRANSPOSED):
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    else:
        weight = weight.unflatten(0, (groups, -1)).flatten(2)
    if len(names) == 2:
        bias = layer.weight.numel() + torch.arange(layer.bias.numel())
        weight = torch.cat([weight, bias.view(groups, -1, 1)], -1)
    return weight.flatten()


# BackPACK's own ----------------------------------------------------------------------------------


def doubled(*layers, size=None):
    model = nn.Sequential(*layers).double()
    if size is not None:
        model(torch.rand(4, *size, dtype=torch.float64))
    return model


def images():
    return torch.rand(4, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 2])


def vectors(count=4):
    return torch.rand(count, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 2])


def cnn(*layers):
    """Layers between a first and a last one."""
    first, last = nn.Conv2d(2, 4, 3, padding=1), nn.LazyLinear(3)
    return doubled(first, nn.Tanh(), *layers, nn.Flatten(), last, size=(2, 5, 5))


def mlp(outputs=3):
    return doubled(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


PLAIN = {
    "mlp": lambda: (mlp(), nn.CrossEntropyLoss(), *vectors()),
    "sum": lambda: (mlp(), nn.CrossEntropyLoss(reduction="sum"), *vectors()),
    "regression": lambda: (mlp(), nn.MSELoss(), vectors()[0], torch.rand(4, 3).double()),
    "binary": lambda: (
        mlp(1),
        nn.BCEWithLogitsLoss(),
        vectors()[0],
        torch.tensor([[0.0], [1], [1], [0]]).double(),
    ),
    "cnn": lambda: (cnn(nn.Conv2d(4, 4, 3, stride=2)), nn.CrossEntropyLoss(), *images()),
    "grouped": lambda: (cnn(nn.Conv2d(4, 4, 2, groups=2)), nn.CrossEntropyLoss(), *images()),
    "dilated": lambda: (cnn(nn.Conv2d(4, 4, 2, dilation=2)), nn.CrossEntropyLoss(), *images()),
    "transposed": lambda: (
        cnn(nn.ConvTranspose2d(4, 4, 2, groups=2)),
        nn.CrossEntropyLoss(),
        *images(),
    ),
    "batch norm": lambda: (cnn(nn.BatchNorm2d(4).eval()), nn.CrossEntropyLoss(), *images()),
    "pooling": lambda: (cnn(nn.MaxPool2d(2), nn.ELU()), nn.CrossEntropyLoss(), *images()),
}


@pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN)
def test_agreement_with_backpack(build):
    """Where BackPACK is right."""
    network = build()
    theirs, ours = run(extensions.DiagGGNExact(), *network), run(tn.DiagGGNExactTN(), *network)
    assert_close(flat(ours), flat(theirs))
    theirs, ours = run(extensions.BatchGrad(), *network), run(tn.BatchGradTN(), *network)
    assert_close(flat(ours), flat(theirs))
    torch.manual_seed(0)
    theirs = flat(run(extensions.DiagGGNMC(mc_samples=2000), *network))
    ours = flat(run(tn.DiagGGNMCTN(mc_samples=2000), *network))
    assert relative_error(ours, theirs) < 0.1


@pytest.mark.parametrize("kind", ["mlp", "sum", "regression", "binary"])
@pytest.mark.parametrize("extension", [tn.KFACExpand, tn.KFACReduce])
def test_agreement_with_kflr(kind, extension):
    """On linear layers without shared positions; a mean loss's scale is in B for both."""
    network = PLAIN[kind]()
    theirs, ours = run(extensions.KFLR(), *network), run(extension("type-2"), *network)
    for name, factors in theirs.items():
        assert_close(ours[name].grad_output[0], factors[0])
        if len(factors) > 1:
            assert_close(ours[name].input[0], factors[1])
    torch.manual_seed(0)
    theirs = run(extensions.KFAC(mc_samples=2000), *network)
    ours = run(extension("mc", mc_samples=2000), *network)
    for name, factors in theirs.items():
        assert relative_error(ours[name].grad_output[0], factors[0]) < 0.15


class Calls(nn.Sequential):
    """Runs its modules by a function."""

    def __init__(self, function, *layers):
        super().__init__(*layers)
        self.function = function
        self.double()

    def forward(self, x):
        return self.function(self, x)


def transposing():
    torch.manual_seed(0)
    model = Calls(
        lambda m, x: m[2](m[1](m[0](x).mT)), nn.Linear(5, 5), nn.Linear(5, 3), nn.Flatten()
    )
    return model, nn.MSELoss(), torch.rand(4, 5, 5).double(), torch.rand(4, 15).double()


def tied():
    model = doubled(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model, nn.CrossEntropyLoss(), *vectors()


def twice():
    torch.manual_seed(0)
    model = Calls(
        lambda m, x: m[2](m[1](m[0](m[1](m[0](x))))), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    )
    return model, nn.CrossEntropyLoss(), *vectors()


def functional(function):
    torch.manual_seed(0)
    return Calls(function, nn.Linear(4, 5), nn.Linear(5, 3)), nn.CrossEntropyLoss(), *vectors()


def zeros_into_dropout():
    model = doubled(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    return model, nn.CrossEntropyLoss(), *vectors()


def one_convolution():
    model = doubled(nn.Conv2d(2, 3, 2), nn.Flatten())
    return model, nn.MSELoss(), images()[0], torch.rand(4, 48).double()


def tokens():
    model = doubled(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(0, 1), nn.Linear(5, 3))
    y = torch.tensor([0, 2, 1, 2, 1, 1, 0, 0])
    return model, nn.CrossEntropyLoss(), torch.rand(4, 2, 4).double(), y


def with_loss(loss_fn, y=None, outputs=3):
    def build():
        x, labels = vectors()
        return mlp(outputs), loss_fn, x, labels if y is None else y

    return build


def with_layer(kind, *args, **options):
    return lambda: (cnn(kind(*args, **options)), nn.CrossEntropyLoss(), *images())


CE = nn.CrossEntropyLoss
DIAGONAL = (extensions.DiagGGNExact, tn.DiagGGNExactTN)
GRADIENTS = (extensions.BatchGrad, tn.BatchGradTN)
KRONECKER = (extensions.KFLR, lambda: tn.KFACExpand("type-2"))
RIGHT, REFUSED = "right", "refused"
SAME = {"kernel_size": 3, "padding": 1}
MISSING = NotImplementedError

# name, as in the table of kfac_tn.integrations.backpack: (extensions, model and loss and data,
# what BackPACK does: raises, or is wrong by at least so much; what ours does)
DIFFERENCES = {
    "padding_mode='circular'": (
        DIAGONAL,
        with_layer(nn.Conv2d, 4, 4, **SAME, padding_mode="circular"),
        0.05,
        RIGHT,
    ),
    "padding_mode='reflect'": (
        DIAGONAL,
        with_layer(nn.Conv2d, 4, 4, **SAME, padding_mode="reflect"),
        0.05,
        RIGHT,
    ),
    "padding_mode='replicate'": (
        GRADIENTS,
        with_layer(nn.Conv2d, 4, 4, **SAME, padding_mode="replicate"),
        0.05,
        RIGHT,
    ),
    "padding='same'": (
        DIAGONAL,
        with_layer(nn.Conv2d, 4, 4, 3, padding="same"),
        TypeError,
        RIGHT,
    ),
    "output_padding": (
        DIAGONAL,
        with_layer(nn.ConvTranspose2d, 4, 4, 2, stride=2, output_padding=1),
        RuntimeError,
        RIGHT,
    ),
    "float64 AvgPool": (DIAGONAL, with_layer(nn.AvgPool2d, 2), RuntimeError, RIGHT),
    "AvgPool(ceil_mode=True)": (
        DIAGONAL,
        with_layer(nn.AvgPool2d, 2, ceil_mode=True),
        ValueError,
        RIGHT,
    ),
    "AdaptiveAvgPool, no divisor": (
        DIAGONAL,
        with_layer(nn.AdaptiveAvgPool2d, 2),
        MISSING,
        RIGHT,
    ),
    "GroupNorm": (DIAGONAL, with_layer(nn.GroupNorm, 2, 4), MISSING, RIGHT),
    "GELU": (
        DIAGONAL,
        with_layer(
            nn.GELU,
        ),
        MISSING,
        RIGHT,
    ),
    "class weights": (
        DIAGONAL,
        with_loss(CE(torch.tensor([0.2, 5.0, 1.0]).double())),
        MISSING,
        RIGHT,
    ),
    "ignore_index": (DIAGONAL, with_loss(CE(ignore_index=1)), MISSING, RIGHT),
    "targets of -100": (
        DIAGONAL,
        with_loss(CE(), torch.tensor([0, -100, 2, -100])),
        0.03,
        RIGHT,
    ),
    "pos_weight": (
        DIAGONAL,
        with_loss(
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0).double()),
            torch.tensor([[0.0], [1], [1], [0]]).double(),
            outputs=1,
        ),
        MISSING,
        RIGHT,
    ),
    "several binary outputs": (
        DIAGONAL,
        with_loss(nn.BCEWithLogitsLoss(), torch.arange(12.0).view(4, 3).double() / 12),
        MISSING,
        RIGHT,
    ),
    "MSELoss on more axes": (
        DIAGONAL,
        lambda: (mlp(), nn.MSELoss(), torch.rand(4, 2, 4).double(), torch.rand(4, 2, 3).double()),
        ValueError,
        RIGHT,
    ),
    "view between modules": (
        DIAGONAL,
        lambda: (
            Calls(lambda m, x: m[1](m[0](x).flatten(1)), nn.Conv2d(2, 4, 3), nn.Linear(36, 3)),
            CE(),
            *images(),
        ),
        IndexError,
        RIGHT,
    ),
    "transpose between modules": (DIAGONAL, transposing, 0.05, REFUSED),
    "function between modules": (
        DIAGONAL,
        lambda: functional(lambda m, x: m[1](m[0](x).tanh())),
        AssertionError,
        REFUSED,
    ),
    "tied weights": (GRADIENTS, tied, 0.01, REFUSED),
    "module called twice": (DIAGONAL, twice, AttributeError, REFUSED),
    "examples and positions in one axis": (DIAGONAL, tokens, 0.05, REFUSED),
    "Dropout in train mode": (DIAGONAL, zeros_into_dropout, 0.1, REFUSED),
    "BatchNorm in train mode": (DIAGONAL, with_layer(nn.BatchNorm2d, 4), MISSING, REFUSED),
    "scale of a convolution's factors": (KRONECKER, one_convolution, 14.9, RIGHT),  # 16 times
    "Kronecker factors of groups": (
        KRONECKER,
        with_layer(nn.Conv2d, 4, 4, 2, groups=2),
        MISSING,
        None,
    ),
    "Kronecker factors of shared positions": (
        KRONECKER,
        lambda: (
            doubled(nn.Linear(4, 3), nn.Flatten()),
            nn.MSELoss(),
            torch.rand(4, 2, 4).double(),
            torch.rand(4, 6).double(),
        ),
        MISSING,
        RIGHT,
    ),
}


def comparable(pair, saved):
    """One tensor for what an extension saved."""
    if pair is not KRONECKER:
        return flat(saved)
    b, a = saved["0.weight"]
    return torch.kron(b, a) if b.ndim == 2 else torch.kron(b[0], a[0])


def reference(pair, model, loss_fn, x, y):
    """By autograd."""
    if pair is GRADIENTS:
        return flat(per_example_gradients(model, loss_fn, x, y))
    torch.manual_seed(1)  # of a dropout
    ggn = dense_ggn(model, loss_fn, x, y)
    return ggn.diagonal() if pair is DIAGONAL else diagonal_block(ggn, model, ("0.weight",))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_from_backpack(name):
    """Each row of the table: BackPACK raises or is wrong, ours is right or refuses."""
    pair, build, theirs, ours = DIFFERENCES[name]
    network = build()
    if isinstance(theirs, float):
        expected = reference(pair, *network)
        torch.manual_seed(1)
        assert relative_error(comparable(pair, run(pair[0](), *network)), expected) > theirs
    else:
        with pytest.raises(theirs):
            run(pair[0](), *network)
    if ours is REFUSED:
        with pytest.raises(NotImplementedError, match=r"use kfac_tn\.compute_"):
            run(pair[1](), *network)
    else:
        saved = run(pair[1](), *network)
        if ours is RIGHT:
            assert_close(comparable(pair, saved), reference(pair, *network))


def test_the_table_is_that_of_the_tests():
    rows = [line.split(" | ") for line in tn.__doc__.partition("BackPACK's own")[2].splitlines()]
    table = {row[0].strip("| `"): row[1:] for row in rows[2:] if len(row) == 3}
    others = {"reduction='none'", "a factor of the loss", "two losses"}  # tests below
    assert set(table) == others | set(DIFFERENCES)
    for name, (_, _, theirs, ours) in DIFFERENCES.items():
        expected = "wrong|too large" if isinstance(theirs, float) else f"{theirs.__name__}|refused"
        assert re.search(expected, table[name][0]), name
        assert table[name][1].strip(" |") == (ours or "a pair for each group")


def test_two_losses():
    """BackPACK adds up columns of different losses, which gives cross terms."""
    trunk, heads = doubled(nn.Linear(4, 5), nn.Tanh()), [nn.Linear(5, 3).double() for _ in range(2)]
    losses, (x, y) = (CE(), CE(reduction="sum")), vectors()
    whole = [nn.Sequential(trunk, head) for head in heads]
    expected = 0.0
    for model, loss_fn in zip(whole, losses, strict=True):
        ggn = dense_ggn(model, loss_fn, x, y)
        expected = expected + diagonal_block(ggn, model, ("0.0.weight", "0.0.bias")).diagonal()
    for module in (*whole, *losses):
        extend(module)
    for pair, right in ((extensions.DiagGGNExact(), False), (tn.DiagGGNExactTN(), True)):
        hidden = trunk(x)
        outputs = [head(hidden) for head in heads]
        with backpack(pair):
            (losses[0](outputs[0], y) + losses[1](outputs[1], y)).backward()
        actual = torch.cat([getattr(p, pair.savefield).flatten() for p in trunk.parameters()])
        if right:
            assert_close(actual, expected)
        else:
            assert relative_error(actual, expected) > 0.05


def test_a_factor_of_the_loss():
    """BackPACK's diagonal doesn't know of it, though its gradients do."""
    model, x, y = mlp(), *vectors()
    expected = 0.1 * dense_ggn(model, CE(), x, y).diagonal()

    def objective(model, loss_fn, x, y):
        return 0.1 * loss_fn(model(x), y)

    theirs = flat(run(extensions.DiagGGNExact(), model, CE(), x, y, objective))
    assert_close(0.1 * theirs, expected)
    assert_close(flat(run(tn.DiagGGNExactTN(), model, CE(), x, y, objective)), expected)
    plain = run(tn.KFACExpand("empirical"), model, CE(), x, y)
    scaled = run(tn.KFACExpand("empirical"), model, CE(), x, y, objective)
    assert_close(scaled["0.weight"].grad_output, 0.1 * plain["0.weight"].grad_output)


def test_reduction_none():
    """The weights are the user's own."""
    model, x, y = mlp(), *vectors()
    weights = torch.arange(4.0).double()

    def objective(model, loss_fn, x, y):
        return loss_fn(model(x), y) @ weights

    arguments = model, CE(reduction="none"), x, y, objective
    with pytest.raises(ValueError, match="scalar"):
        run(extensions.DiagGGNExact(), *arguments)
    parts = [w * dense_ggn(model, CE(), x[n : n + 1], y[n : n + 1]) for n, w in enumerate(weights)]
    assert_close(flat(run(tn.DiagGGNExactTN(), *arguments)), sum(parts).diagonal())
    with pytest.raises(NotImplementedError, match="empirical"):
        run(tn.EKFAC(fisher="empirical"), *arguments)


# What BackPACK's mechanism does ------------------------------------------------------------------


class Residual(nn.Module):
    """BackPACK's way to write x + f(x), and a view between modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 3)
        self.act, self.sum = nn.Tanh(), SumModule()
        self.scale, self.swap = ScaleModule(0.5), Permute(0, 2, 1)
        self.double()

    def forward(self, x):  # [N, 2, 4]
        x = self.act(self.first(x))
        x = self.sum(x, self.scale(self.second(x)))
        return self.last(self.swap(x).flatten(1))


def test_branches_and_custom_modules():
    model, loss_fn, y = Residual(), CE(), vectors()[1]
    x = torch.rand(4, 2, 4).double()
    expected = dense_ggn(model, loss_fn, x, y).diagonal()
    assert_close(flat(run(tn.DiagGGNExactTN(), model, loss_fn, x, y)), expected)


def test_frozen_parameters_several_extensions_and_repeated_passes():
    model, loss_fn, x, y = PLAIN["cnn"]()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    expected = dense_ggn(model, loss_fn, x, y).diagonal()
    extend(model)
    extend(loss_fn)
    exact, kfac, gradients = tn.DiagGGNExactTN(), tn.KFACReduce("type-2"), tn.BatchGradTN()
    for _ in range(2):
        loss = loss_fn(model(x), y)
        with backpack(exact, kfac, gradients, retain_graph=True):
            loss.backward(retain_graph=True)
            loss.backward()
        saved = {n: p.diag_ggn_exact_tn for n, p in model.named_parameters() if p.requires_grad}
        assert_close(flat(saved), expected)
        assert not hasattr(model[0].weight, "kfac_reduce")
        assert not hasattr(model[2].weight, "grad_batch_tn")
        b, one = model[2].bias.kfac_reduce
        assert_close(b[0], diagonal_block(dense_ggn(model, loss_fn, x, y), model, ("2.bias",)))
        assert one.item() == 1
        loss = loss_fn(model(x), y)
        model.zero_grad()


def test_running_a_module_again_leaves_its_buffers_alone():
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model, loss_fn, (x, y) = extend(cnn(norm)), extend(CE()), images()
    expected = dense_ggn(model, loss_fn, x, y).diagonal()
    loss = loss_fn(model(x), y)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with backpack(tn.DiagGGNExactTN()):
        loss.backward()
    assert before
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    actual = torch.cat([p.diag_ggn_exact_tn.flatten() for p in model.parameters()])
    assert_close(actual, expected)


class Functions(nn.Module):
    """Sums and flattens by functions, and calls an activation twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.act, self.last = nn.Tanh(), nn.Linear(50, 3)
        self.double()

    def forward(self, x):
        x = self.act(self.first(x))
        x = x + self.act(self.second(x))
        return self.last(x.flatten(1))


def test_backpacks_converter():
    """What a refusal recommends."""
    (x, y), loss_fn = images(), extend(CE())
    with pytest.raises(NotImplementedError, match="use_converter=True"):
        run(tn.DiagGGNExactTN(), Functions(), CE(), x, y)
    expected = dense_ggn(Functions(), CE(), x, y).diagonal()
    model = extend(Functions(), use_converter=True)
    with backpack(tn.DiagGGNExactTN()):
        loss_fn(model(x), y).backward()
    named = dict(model.named_parameters())
    names = trainable(Functions())
    assert_close(torch.cat([named[name].diag_ggn_exact_tn.flatten() for name in names]), expected)


class Cubic(nn.Module):
    """A loss of one's own: sum_n sum_c z^4 / 12."""

    reduction = "sum"

    def forward(self, outputs, targets):
        return outputs.pow(4).sum() / 12

    def columns(self, outputs, targets, weight=None):
        for c in range(outputs.shape[1]):
            column = torch.zeros_like(outputs)
            column[:, c] = outputs[:, c].abs()
            yield column

    def sample(self, outputs, targets, generator=None, weight=None):
        raise NotImplementedError

    def num_terms(self, outputs, targets):
        return 1


def test_a_loss_of_ones_own():
    network = mlp(), Cubic(), *vectors()
    assert_close(flat(run(tn.DiagGGNExactTN(), *network)), dense_ggn(*network).diagonal())


# What is refused ---------------------------------------------------------------------------------


class Owner(nn.Module):
    """Has children and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x):
        return self.layer(x) * self.scale


class Swap(nn.Module):
    """As many features as examples."""

    def forward(self, x):
        return x.mT


class Rows(nn.Module):
    """A function of the whole batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)

    def extra_repr(self):
        return "..."


class Noise(nn.Module):
    """Random in every mode."""

    def forward(self, x):
        return x + torch.randn_like(x)


def weight_norm(bias):
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, bias=bias))


def mix_last(x):
    return torch.cat([torch.zeros_like(x[:-1]), x[-2:-1]])


ALL = [
    tn.DiagGGNExactTN,
    tn.DiagGGNMCTN,
    tn.KFACExpand,
    tn.KFACReduce,
    tn.EKFAC,
    lambda: tn.KFACExpand("empirical"),
    tn.BatchGradTN,
]
WITH_COLUMNS = ALL[:-2]  # gradients alone are there wherever autograd is
REFUSALS = {
    "no rule": (lambda: doubled(nn.Linear(4, 3), nn.PReLU()), r"PReLU.*no rule", ALL),
    "no rule for cells": (
        lambda: doubled(nn.Linear(4, 3), nn.GRUCell(3, 3)),
        r"GRUCell.*no rule",
        ALL,
    ),
    "own parameters": (Owner, "Owner.*parameters of its own", ALL),
    "weight norm": (lambda: doubled(weight_norm(True)), "parameters of its own", ALL),
    "weight norm, no bias": (lambda: doubled(weight_norm(False)), "parameters of its own", ALL),
    "called twice": (lambda: twice()[0], "(used 2|several) times", ALL),
    "tied": (lambda: tied()[0], "weight that is used 2 times", ALL),
    "function": (
        lambda: functional(lambda m, x: m[1](m[0](x).tanh()))[0],
        "Linear.*followed by.*TanhBackward0",
        WITH_COLUMNS,
    ),
    "first layer as a function": (
        lambda: functional(lambda m, x: m[1](nn.functional.linear(x, m[0].weight)))[0],
        "(isn't the work of|are used without calling) an extended module",
        ALL,
    ),
    "batch statistics": (
        lambda: doubled(nn.Linear(4, 3), nn.BatchNorm1d(3)),
        r"BatchNorm1d.*call eval\(\)",
        ALL,
    ),
    "dropout": (lambda: doubled(nn.Linear(4, 3), nn.Dropout()), r"Dropout.*call eval\(\)", ALL),
    "noise": (lambda: doubled(nn.Linear(4, 3), Noise()), "Noise.*is random", ALL),
    "mixing": (lambda: doubled(nn.Linear(4, 3), nn.Softmax(0)), "Softmax.*mixes examples", ALL),
    "mixing by an axis": (
        lambda: doubled(nn.Linear(4, 4), Swap(), nn.Linear(4, 3)),
        r"Swap\(\) mixes examples",
        ALL,
    ),
    "mixing with those before": (
        lambda: doubled(nn.Linear(4, 4), Rows(lambda x: x.cumsum(0)), nn.Linear(4, 3)),
        r"Rows\(...\) mixes examples",
        ALL,
    ),
    "mixing a little of the last two": (
        lambda: doubled(nn.Linear(4, 4), Rows(lambda x: x + 1e-3 * mix_last(x)), nn.Linear(4, 3)),
        r"Rows\(...\) mixes examples",
        ALL,
    ),
    "another order": (
        lambda: doubled(nn.Linear(4, 4), Rows(lambda x: x[[0, 2, 1, 3]]), nn.Linear(4, 3)),
        r"Rows\(...\).*changes their order",
        ALL,
    ),
    "another order, by what they contain": (
        lambda: doubled(nn.Linear(4, 4), Rows(lambda x: x.sort(0).values), nn.Linear(4, 3)),
        r"Rows\(...\).*changes their order",
        ALL,
    ),
    "keyword": (
        lambda: functional(lambda m, x: m[1](input=m[0](x)))[0],
        "first positional argument",
        ALL,
    ),
    "random gradients": (
        lambda: doubled(
            nn.Unflatten(1, (2, 2)),
            kfac_tn.tn.nn.randomize(nn.Sequential(nn.Conv1d(2, 3, 2)), keep=0.5)[0],
            nn.Flatten(),
        ),
        "random gradients",
        ALL,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    """By name, with what to do instead."""
    build, message, which = REFUSALS[name]
    for extension in which:
        with pytest.raises(NotImplementedError, match=f"(?s){message}.*use kfac_tn.compute_kfac"):
            run(extension(), build(), CE(), *vectors())


@pytest.mark.parametrize(("count", "other"), [(2, 1), (33, 16), (33, 32), (70, 32), (70, 64)])
def test_any_two_rows_that_change_places_are_noticed(count, other):
    order = torch.arange(count)
    order[[0, other]] = order[[other, 0]]
    x, y = torch.rand(count, 4).double(), torch.arange(count) % 3
    model = doubled(nn.Linear(4, 4), Rows(lambda x: x[order]), nn.Linear(4, 3))
    for extension in (tn.DiagGGNExactTN(), tn.BatchGradTN()):
        with pytest.raises(NotImplementedError, match=r"Rows\(...\) mixes.*changes their order"):
            run(extension, model, CE(), x, y)
    network = doubled(nn.Linear(4, 4), Rows(torch.tanh), nn.Linear(4, 3)), CE(), x, y
    assert_close(flat(run(tn.DiagGGNExactTN(), *network)), dense_ggn(*network).diagonal())


def test_modules_that_take_and_return_one_number_of_each_example():
    rows = Rows(lambda x: x.squeeze(1)), Rows(torch.sin), Rows(lambda x: x[:, None] * x[:, None])
    network = doubled(nn.Linear(4, 1), *rows, nn.Linear(1, 3)), CE(), *vectors()
    assert_close(flat(run(tn.DiagGGNExactTN(), *network)), dense_ggn(*network).diagonal())
    mixing = doubled(nn.Linear(4, 1), *rows[:1], Rows(lambda x: x.cumsum(0)), *rows[2:])
    with pytest.raises(NotImplementedError, match=r"Rows\(...\) mixes"):
        run(tn.BatchGradTN(), mixing, nn.MSELoss(), vectors()[0], torch.zeros(4, 1).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_examples_of_any_size_are_independent(dtype):
    """Gradients that vanish, or that aren't finite, are no sign of mixing."""
    layers = nn.Linear(4, 4), Rows(lambda x: (x - x.mean(1, True)).tanh()), nn.Linear(4, 3)
    model = doubled(*layers).to(dtype)
    x = vectors()[0].to(dtype) * torch.tensor([[1e-30], [1.0], [1e4], [1e30]], dtype=dtype)
    gradients = run(tn.BatchGradTN(), model, CE(), x, vectors()[1])
    expected = per_example_gradients(model, CE(), x, vectors()[1])
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name])
    x[2] = torch.nan
    assert (
        run(tn.BatchGradTN(), model, CE(), x, vectors()[1])["0.weight"][[0, 1, 3]].isfinite().all()
    )


def refuse(extension, message, model, loss_fn, call, kind=NotImplementedError):
    extend(model)
    extend(loss_fn)
    with backpack(extension), pytest.raises(kind, match=f"(?s){message}"):
        call(model, loss_fn).backward()


@pytest.mark.parametrize("build", ALL)
def test_refused_calls(build):
    """Calls of models and losses that BackPACK doesn't see enough of, or nobody understands."""
    x, y = vectors()
    with backpack(build()), pytest.raises(NotImplementedError, match=r"extend\(loss_fn\)"):
        CE()(extend(mlp())(x), y).backward()
    refuse(build(), "without a batch axis", mlp(), CE(), lambda m, f: f(m(x[0]), y[0]))
    refuse(build(), "first positional", mlp(), CE(), lambda m, f: f(input=m(x), target=y))
    refuse(build(), "targets that require", mlp(), nn.MSELoss(), lambda m, f: f(m(x), m(x)))
    again = "called several times"
    refuse(build(), again, mlp(), CE(), lambda m, f: [f(m(x), y), f(m(x + 1), y)][0])
    refuse(build(), again, mlp(), CE(), lambda m, f: [f(m(x), y), m(x + 1)][0])
    more, other = extend(mlp()), extend(CE())
    refuse(
        build(),
        "has 4 examples, another one 2|has 2 examples, another one 4",
        mlp(),
        CE(),
        lambda m, f: f(m(x), y) + other(more(x[:2]), y[:2]),
    )
    for sizes, kind in (((), {"output_size": (9, 9)}), (((9, 9),), {})):
        layer = nn.ConvTranspose2d(2, 1, 2, stride=2)
        refuse(
            build(),
            "output_size.*output_padding",
            Calls(lambda m, x, a=sizes, k=kind: m[0](x, *a, **k).flatten(1), layer),
            CE(),
            lambda m, f: f(m(images()[0][..., :4, :4]), y),
            (NotImplementedError, ValueError),
        )


def test_a_second_loss_for_the_empirical_fisher():
    x, y = vectors()
    model, other = mlp(), extend(CE())

    def call(m, f):
        outputs = m(x)
        return f(outputs, y) + other(outputs, y)

    refuse(tn.EKFAC(fisher="empirical"), "isn't the only call", model, CE(), call)


@pytest.mark.parametrize("build", ALL[:-1])
def test_unknown_losses(build):
    (x, _), kind = vectors(), TypeError
    refuse(build(), "no likelihood", mlp(), nn.L1Loss(), lambda m, f: f(m(x), x[:, :3]), kind)


def test_unknown_options():
    with pytest.raises(ValueError, match="fisher is 'exact'"):
        tn.KFACExpand("exact")
    with pytest.raises(ValueError, match="bias is 'both'"):
        tn.KFACReduce(bias="both")
    with pytest.raises(ValueError, match="approximation must be"):
        tn.EKFAC("mean")
    for kind in (tn.KFACExpand, tn.KFACReduce, tn.EKFAC, tn.DiagGGNMCTN):
        for samples in (0, -1, 1.5, float("nan"), float("inf"), "3", "auto", True, None):
            with pytest.raises(ValueError, match=f"mc_samples is {samples}: it is a whole number"):
                kind(mc_samples=samples)
    with pytest.raises(NotImplementedError, match="register_layer"):
        tn.BatchGradTN().set_module_extension(nn.PReLU, None)


def test_max_memory():
    network = PLAIN["cnn"]()
    for kind in (tn.DiagGGNExactTN, tn.DiagGGNMCTN):
        for limit in (0, -1, 0.5, float("nan"), float("inf"), "1", True):
            with pytest.raises(ValueError, match=f"max_memory is {limit}: it must be a positive"):
                kind(max_memory=limit)
        with pytest.raises(ValueError, match="max_memory=8"):
            run(kind(max_memory=8), *network)
    expected = flat(run(tn.DiagGGNExactTN(), *network))
    for limit in (20_000, 2e4):
        assert_close(flat(run(tn.DiagGGNExactTN(max_memory=limit), *network)), expected)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.LayerNorm(4), nn.Conv1d(2, 3, 2)])
def test_max_memory_bounds_squares_of_a_bias(layer, monkeypatch):
    """Rows that are made at once, and their squares."""
    shape = (2, 2) if isinstance(layer, nn.Conv1d) else (4,)
    layer.weight.requires_grad_(False)
    model = doubled(layer, nn.Flatten())
    x = torch.rand(5, *shape).double()
    network = model, nn.MSELoss(), x, torch.rand_like(model(x))
    expected = flat(run(tn.DiagGGNExactTN(), *network))
    assert_close(expected, dense_ggn(*network).diagonal())
    family, held = kfac_tn.layers.gradient_family(layer), []
    rows_of = type(family).per_example_bias_gradient

    def watched(self, module, g):
        rows = rows_of(self, module, g)
        held.append(2 * rows.nbytes)
        return rows

    monkeypatch.setattr(type(family), "per_example_bias_gradient", watched)
    for limit in (64, 200):
        held.clear()
        assert_close(flat(run(tn.DiagGGNExactTN(max_memory=limit), *network)), expected)
        assert limit / 2 < max(held) <= limit
    with pytest.raises(ValueError, match=r"max_memory=40 bytes is too little.*the bias of"):
        run(tn.DiagGGNExactTN(max_memory=40), *network)
    held.clear()
    monkeypatch.setattr(kfac_tn.functional.common, "UNFOLD_BYTES", 100)  # the default
    assert_close(flat(run(tn.DiagGGNExactTN(), *network)), expected)
    assert max(held) <= 100


@pytest.mark.parametrize("build", ALL)
def test_empty_batches(build):
    x, y = vectors()
    for loss_fn in (CE(), CE(reduction="sum")):
        message = r"CrossEntropyLoss\(\) was called on an empty batch.*\(0, 3\): skip"
        refuse(build(), message, mlp(), loss_fn, lambda m, f: f(m(x[:0]), y[:0]).sum(), ValueError)


def test_what_is_not_finite():
    """Of an eigendecomposition there would be nothing left; the others pass it on."""
    (x, y), model = vectors(), mlp()
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Linear.*isn't finite: look for NaN"):
        run(tn.EKFAC(), model, CE(), x, y)
    assert run(tn.DiagGGNExactTN(), model, CE(), x, y)["0.weight"].isnan().any()
    assert run(tn.KFACExpand(), model, CE(), x, y)["0.weight"].input.isnan().any()


def test_a_single_class_has_no_curvature():
    x, model = vectors()[0], mlp(1)
    for build in WITH_COLUMNS:
        saved = run(build(), model, CE(), x, torch.zeros(4, dtype=torch.long))
        if isinstance(saved["0.bias"], torch.Tensor):
            assert not flat(saved).any()
    factors = run(tn.KFACExpand("type-2"), model, CE(), x, torch.zeros(4, dtype=torch.long))
    assert not factors["0.weight"].grad_output.any()


def test_autocast_is_refused_where_modules_run_again():
    x, y = vectors()
    model = mlp().float()

    def call(model, loss_fn):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model(x.float()).float(), y)

    for build in WITH_COLUMNS:
        refuse(build(), "autocast|ToCopyBackward0", model, CE(), call)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "backpack.extensions.backprop_extension", None)
    for name in [name for name in sys.modules if name.startswith("kfac_tn.integrations.backpack")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install 'backpack-for-pytorch"):
        importlib.import_module("kfac_tn.integrations.backpack")
