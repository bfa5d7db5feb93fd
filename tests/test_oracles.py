"""KFAC against the exact oracles of kfac_tn.testing, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn import testing
from kfac_tn.testing import dense_ggn, diagonal_block, relative_error

SETTINGS = list(testing.exact_settings())
TOLERANCE = 1e-10


def dense_kfac(model, loss_fn, data, **options):
    options = {"fisher": "type-2", "bias": "joint", **options}
    return kfac_tn.compute_kfac(model, loss_fn, data, **options).to_dense()


class Unbatched(torch.autograd.Function):
    """What it is given; nobody said how to differentiate it for several rows at once."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class PassOn(nn.Module):
    """That, as a layer."""

    def forward(self, x):
        return Unbatched.apply(x)


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_the_dense_ggn_is_that_of_single_rows(loss_fn):
    torch.manual_seed(0)
    model, spare = cnn(), nn.Parameter(torch.rand(2, dtype=torch.float64))
    model.register_parameter("unused", spare)
    x = torch.rand(3, 2, 6, 6, dtype=torch.float64)
    y = torch.rand(3, 3, dtype=torch.float64).softmax(1)
    outputs = model(x)
    rows = []
    for output in outputs.flatten():
        gradients = torch.autograd.grad(
            output, list(model.parameters()), retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in gradients]))
    jacobian = torch.stack(rows)
    hessian = torch.autograd.functional.hessian(lambda z: loss_fn(z, y), outputs.detach())
    expected = jacobian.T @ hessian.view(9, 9) @ jacobian
    assert relative_error(dense_ggn(model, loss_fn, x, y), expected) < TOLERANCE
    model.append(PassOn())
    assert relative_error(dense_ggn(model, loss_fn, x, y), expected) < TOLERANCE


@pytest.mark.parametrize("algorithm", [None, *kfac_tn.tn.ALGORITHMS])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_oracles_1_to_4_and_8_kfac_is_the_ggn(setting, algorithm, monkeypatch):
    if algorithm is not None:  # wherever it applies
        monkeypatch.setenv("KFAC_TN_ALGORITHM", algorithm)
    ggn = dense_ggn(setting.model, setting.loss_fn, setting.x, setting.y)
    data = [(setting.x, setting.y)]
    kfac = dense_kfac(setting.model, setting.loss_fn, data, approximation=setting.approximation)
    for names in setting.exact:
        expected = diagonal_block(ggn, setting.model, names)
        actual = diagonal_block(kfac, setting.model, names)
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("pooled", [False, True])
def test_oracles_1_and_3_in_four_dimensions(pooled):
    torch.manual_seed(0)
    options = {"stride": (1, 2, 1, 1), "padding": (1, 0, 1, 0), "groups": 2, "dtype": torch.float64}
    layers = [kfac_tn.tn.nn.ConvNd(2, 2, (2, 2, 1, 2), **options)]
    if pooled:
        layers += [nn.Flatten(2), nn.AdaptiveAvgPool1d(1)]
    model = nn.Sequential(*layers)
    x = torch.rand(2, 2, 2, 3, 1, 2, dtype=torch.float64)
    y = torch.rand_like(model(x))
    names = ("0.weight", "0.bias")
    approximation = "reduce" if pooled else "expand"
    kfac = dense_kfac(model, nn.MSELoss(), [(x, y)], approximation=approximation)
    expected = diagonal_block(dense_ggn(model, nn.MSELoss(), x, y), model, names)
    assert relative_error(diagonal_block(kfac, model, names), expected) < TOLERANCE


def test_randomized_convolutions_have_the_factors_of_exact_ones():
    torch.manual_seed(0)
    model = cnn().train()
    data = [(torch.rand(4, 2, 6, 6, dtype=torch.float64), torch.randint(3, (4,)))]
    expected = dense_kfac(model, nn.CrossEntropyLoss(), data)
    kfac_tn.tn.nn.randomize(model, keep=0.5)
    assert relative_error(dense_kfac(model, nn.CrossEntropyLoss(), data), expected) < TOLERANCE


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_oracle_5_bias_blocks_of_reduce_are_exact(loss_fn):
    torch.manual_seed(0)
    model = cnn()
    x = torch.rand(4, 2, 6, 6, dtype=torch.float64)
    y = torch.rand(4, 3, dtype=torch.float64).softmax(1)
    ggn = dense_ggn(model, loss_fn, x, y)
    for bias in ("joint", "separate"):
        kfac = dense_kfac(model, loss_fn, [(x, y)], approximation="reduce", bias=bias)
        for name in ("2.bias", "6.bias"):
            expected = diagonal_block(ggn, model, (name,))
            assert relative_error(diagonal_block(kfac, model, (name,)), expected) < TOLERANCE
        # Per group: the blocks on the diagonal of the grouped layer's.
        expected, actual = (diagonal_block(m, model, ("0.bias",)) for m in (ggn, kfac))
        for group in (slice(0, 2), slice(2, 4)):
            assert relative_error(actual[group, group], expected[group, group]) < TOLERANCE


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_oracle_7_one_example_mlp(approximation, reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.rand(1, 3, dtype=torch.float64), torch.tensor([1])
    loss_fn = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)
    targets = {nn.MSELoss: torch.rand(1, 3, dtype=torch.float64), nn.CrossEntropyLoss: y}
    for loss in (loss_fn, nn.MSELoss(reduction=reduction)):
        target = targets[type(loss)]
        options = {"approximation": approximation}
        empirical = dense_kfac(model, loss, [(x, target)], fisher="empirical", **options)
        expected = testing.empirical_fisher(model, loss, x, target)
        type2 = dense_kfac(model, loss, [(x, target)], fisher="type-2", **options)
        ggn = dense_ggn(model, loss, x, target)
        # The last layer's only: between layers B is an average over columns.
        for names in (("2.weight", "2.bias"), ("0.weight", "0.bias")):
            for actual, exact in ((empirical, expected), (type2, ggn)):
                block = diagonal_block(exact, model, names)
                assert relative_error(diagonal_block(actual, model, names), block) < TOLERANCE


def mixed_model() -> nn.Module:
    """Layers of every kind, followed by in-place activations; normalization in eval mode."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Linear(25, 3),
    ).double()


SPLITS = [(6,), (3, 3), (1, 4, 1)]
LOSSES = {
    "mse": nn.MSELoss,
    "cross-entropy": nn.CrossEntropyLoss,
    "weighted": lambda reduction: nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64),
        ignore_index=2,
        reduction=reduction,
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_oracle_9_splitting_the_batch_changes_nothing(loss, fisher, approximation, reduction):
    torch.manual_seed(0)
    model = mixed_model().eval()
    model[2].requires_grad_(False)  # no Kronecker structure, and nothing in "forward-only"
    loss_fn = LOSSES[loss](reduction=reduction)
    x = torch.rand(6, 2, 5, 5, dtype=torch.float64)
    y = torch.randint(4, (6, 3))  # classes on axis 1, extra positions on axis 2
    if loss == "mse":
        y = torch.rand(6, 4, 3, dtype=torch.float64)
    results = []
    for split in SPLITS:
        data = list(zip(x.split(split), y.split(split), strict=True))
        options = {"fisher": fisher, "approximation": approximation}
        results.append(dense_kfac(model, loss_fn, data, **options))
    for result in results[1:]:
        assert relative_error(result, results[0]) < TOLERANCE


def test_oracle_9_mean_and_sum_differ_by_their_factor():
    torch.manual_seed(0)
    model = mixed_model().eval()
    model[2].requires_grad_(False)
    data = [(torch.rand(6, 2, 5, 5, dtype=torch.float64), torch.randint(4, (6, 3)))]
    mean, total = (
        dense_kfac(model, nn.CrossEntropyLoss(reduction=reduction), data)
        for reduction in ("mean", "sum")
    )
    assert relative_error(18 * mean, total) < TOLERANCE


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_oracle_11_monte_carlo_converges_like_the_root_of_the_samples(approximation):
    torch.manual_seed(0)
    model = cnn()
    loss_fn = nn.CrossEntropyLoss()
    data = [(torch.rand(4, 2, 6, 6, dtype=torch.float64), torch.randint(3, (4,)))]
    options = {"approximation": approximation}
    exact = dense_kfac(model, loss_fn, data, **options)

    def error(samples: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        options.update(fisher="mc", mc_samples=samples, generator=generator)
        return relative_error(dense_kfac(model, loss_fn, data, **options), exact)

    few, many = (sum(error(samples, seed) ** 2 for seed in range(8)) ** 0.5 for samples in (4, 64))
    assert 2.5 < few / many < 6.5  # 4, give or take the noise of eight repetitions
    assert error(2000, seed=99) < 0.05


def test_diagonal_blocks_of_other_parameters_are_unbiased():
    """Parameters without Kronecker structure: the exact diagonal of the GGN, in expectation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    loss_fn = nn.CrossEntropyLoss()
    expected = diagonal_block(dense_ggn(model, loss_fn, x, y), model, ("1.weight", "1.bias"))
    for fisher, samples, repeats in (("mc", 3000, 1), ("type-2", 1, 1000)):
        totals = []
        for seed in range(repeats):
            curvature = kfac_tn.compute_kfac(
                model,
                loss_fn,
                [(x, y)],
                fisher=fisher,
                mc_samples=samples,
                generator=torch.Generator().manual_seed(seed),
            )
            diagonal = curvature.diagonal()
            totals.append(torch.cat([diagonal["1.weight"], diagonal["1.bias"]]))
        actual = torch.stack(totals).mean(0)
        assert relative_error(actual, expected.diagonal()) < 0.1


def test_forward_only_has_the_identity_for_output_gradients():
    setting = SETTINGS[0]
    data = [(setting.x, setting.y)]
    curvature = kfac_tn.compute_kfac(
        setting.model, setting.loss_fn, data, fisher="forward-only", bias="joint"
    )
    exact = kfac_tn.compute_kfac(
        setting.model, setting.loss_fn, data, fisher="type-2", bias="joint"
    )
    block, expected = curvature.blocks["0"], exact.blocks["0"]
    torch.testing.assert_close(block.input_factor, expected.input_factor)
    eye = torch.eye(4, dtype=torch.float64)[None]
    torch.testing.assert_close(block.grad_output_factor, eye)


@pytest.mark.parametrize(
    ("mode", "groups"), list(itertools.product(["circular", "reflect", "replicate"], [1, 2]))
)
def test_padding_modes_equal_a_padded_input(mode, groups):
    torch.manual_seed(0)
    x = torch.rand(3, 4, 5, 6, dtype=torch.float64)
    layer = nn.Conv2d(4, 4, 3, padding=2, padding_mode=mode, groups=groups).double()
    plain = nn.Conv2d(4, 4, 3, groups=groups).double()
    plain.load_state_dict(layer.state_dict())
    y = torch.rand_like(layer(x))
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode=mode)
    for approximation in ("expand", "reduce"):
        options = {"approximation": approximation}
        actual = dense_kfac(nn.Sequential(layer), nn.MSELoss(), [(x, y)], **options)
        expected = dense_kfac(nn.Sequential(plain), nn.MSELoss(), [(padded, y)], **options)
        assert relative_error(actual, expected) < TOLERANCE
