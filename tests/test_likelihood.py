"""Losses as likelihoods, against the autograd Hessian of the very loss."""

from __future__ import annotations

import copy
import importlib.util
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

import kfac_tn
from kfac_tn.likelihood import (
    CrossEntropyLikelihood,
    MSELikelihood,
    empirical_factor,
    likelihood_of,
    register_likelihood,
)
from kfac_tn.likelihood import registry as registry_module

REDUCTIONS = ("mean", "sum", "none")


# ---------------------------------------------------------------------------------------- oracles


def hessian(function, outputs):
    """Hessian of a scalar function, flattened to [numel, numel]."""
    outputs = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(outputs), outputs, create_graph=True)
    one_hots = torch.eye(outputs.numel(), dtype=outputs.dtype).reshape(-1, *outputs.shape)
    (rows,) = torch.autograd.grad(gradient, outputs, one_hots, is_grads_batched=True)
    return rows.reshape(outputs.numel(), outputs.numel())


def gram(columns, outputs, num_examples):
    """``sum_v s_v s_v^T`` of each example, as a block diagonal."""
    columns = list(columns)
    assert all(column.shape == outputs.shape for column in columns)
    root = torch.stack(columns).reshape(len(columns), num_examples, -1)
    return torch.block_diag(*torch.einsum("vni,vnj->nij", root, root))


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def scalar(loss_fn, targets, weight=None):
    """The loss as a scalar function of the outputs; unreduced ones weighed and summed."""

    def function(outputs):
        loss = loss_fn(outputs, targets)
        return (loss if weight is None else weight * loss).sum()

    return function


# ------------------------------------------------------------------------------------------ cases


def logits(*shape, seed=0):
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed))


CROSS_ENTROPY_SHAPES = {"unbatched": (3,), "batched": (3, 3), "1d": (2, 3, 2), "2d": (1, 3, 2, 2)}


def class_indices(shape):
    """Classes 1 and 2 in turn."""
    positions = shape[:1] * (len(shape) > 1) + shape[2:]
    return torch.arange(math.prod(positions)).reshape(positions) % 2 + 1


def probabilities(shape):
    return logits(*shape, seed=1).softmax(0 if len(shape) == 1 else 1)


def cross_entropy_cases():
    weight = torch.tensor([0.0, 2.0, 0.3]).double()
    for (shape_name, shape), reduction, class_weight, smoothing in product(
        CROSS_ENTROPY_SHAPES.items(), REDUCTIONS, (None, weight), (0.0, 0.2)
    ):
        keywords = {"reduction": reduction, "weight": class_weight, "label_smoothing": smoothing}
        name = (
            f"{shape_name}-{reduction}-{'plain' if class_weight is None else 'weight'}-{smoothing}"
        )
        loss_fn = nn.CrossEntropyLoss(**keywords)
        yield pytest.param(loss_fn, shape, probabilities(shape), id=f"{name}-probabilities")
        # -100: torch's default; 2: a class; 255: outside of the classes, as in segmentation
        for ignore_index in (-100, 2, 255):
            loss_fn = nn.CrossEntropyLoss(ignore_index=ignore_index, **keywords)
            targets = class_indices(shape)
            targets.view(-1)[1:2] = ignore_index
            yield pytest.param(loss_fn, shape, targets, id=f"{name}-ignore{ignore_index}")


ELEMENTWISE_SHAPES = {"scalar": (), "vector": (3,), "batched": (3, 2), "2d": (2, 3, 2)}


def elementwise_cases():
    for (shape_name, shape), reduction in product(ELEMENTWISE_SHAPES.items(), REDUCTIONS):
        name, targets = f"{shape_name}-{reduction}", logits(*shape, seed=1).sigmoid()
        yield pytest.param(nn.MSELoss(reduction=reduction), shape, targets, id=f"mse-{name}")
        poisson = nn.PoissonNLLLoss(full=reduction == "sum", reduction=reduction)
        yield pytest.param(poisson, shape, (4 * targets).round(), id=f"poisson-{name}")
        for weight_shape, pos_weight_shape in product((None, shape[-1:], shape), repeat=2):
            loss_fn = nn.BCEWithLogitsLoss(
                reduction=reduction,
                weight=None if weight_shape is None else logits(*weight_shape, seed=2).exp(),
                pos_weight=None
                if pos_weight_shape is None
                else logits(*pos_weight_shape, seed=3).exp(),
            )
            options = f"weight{weight_shape}-pos{pos_weight_shape}"
            yield pytest.param(loss_fn, shape, targets, id=f"bce-{name}-{options}")
        yield pytest.param(loss_fn, shape, targets.round(), id=f"bce-{name}-hard")


CROSS_ENTROPY_CASES = list(cross_entropy_cases())
ELEMENTWISE_CASES = list(elementwise_cases())

SMALL_CASES = [
    pytest.param(nn.CrossEntropyLoss(), (2, 3), torch.tensor([0, 2]), id="cross-entropy"),
    pytest.param(
        nn.CrossEntropyLoss(
            weight=torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1, ignore_index=1
        ),
        (2, 3, 2),
        torch.tensor([[0, 2], [1, 2]]),
        id="cross-entropy-positions",
    ),
    pytest.param(
        nn.CrossEntropyLoss(reduction="sum"), (3,), torch.tensor(1), id="cross-entropy-unbatched"
    ),
    pytest.param(nn.MSELoss(), (2, 2), torch.zeros(2, 2).double(), id="mse"),
    pytest.param(
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 0.5]).double()),
        (2, 2),
        torch.tensor([[0.0, 1.0], [0.3, 1.0]]).double(),
        id="bce",
    ),
    pytest.param(
        nn.PoissonNLLLoss(), (2, 2), torch.tensor([[0.0, 3.0], [1.0, 1.0]]).double(), id="poisson"
    ),
]


# ------------------------------------------------------------------------------------ exactness


def check_columns(loss_fn, outputs, targets, num_examples):
    columns = likelihood_of(loss_fn).columns(outputs, targets)
    expected = hessian(scalar(loss_fn, targets), outputs)
    assert_close(gram(columns, outputs, num_examples), expected)


def check_weighted_columns(loss_fn, outputs, targets, num_examples):
    weight = torch.rand_like(loss_fn(outputs, targets))
    weight.view(-1)[:1] *= weight.numel() == 1  # zero is a weight, too
    columns = likelihood_of(loss_fn).columns(outputs, targets, weight=weight)
    expected = hessian(scalar(loss_fn, targets, weight), outputs)
    assert_close(gram(columns, outputs, num_examples), expected)


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), CROSS_ENTROPY_CASES)
def test_columns_of_cross_entropy(loss_fn, shape, targets):
    check_columns(loss_fn, logits(*shape), targets, 1 if len(shape) == 1 else shape[0])
    if loss_fn.reduction == "none":
        check_weighted_columns(loss_fn, logits(*shape), targets, 1 if len(shape) == 1 else shape[0])


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), ELEMENTWISE_CASES)
def test_columns_of_elementwise_losses(loss_fn, shape, targets):
    num_examples = shape[0] if shape else 1
    check_columns(loss_fn, logits(*shape), targets, num_examples)
    if loss_fn.reduction == "none":
        check_weighted_columns(loss_fn, logits(*shape), targets, num_examples)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_columns_of_any_cross_entropy(data):
    num_examples, num_classes = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 5))
    positions = data.draw(st.lists(st.integers(1, 2), max_size=2))
    labels = st.integers(0, num_classes - 1) | st.just(-100)
    count = num_examples * math.prod(positions)
    # the first target counts: else the mean is NaN
    drawn = [0, *data.draw(st.lists(labels, min_size=count - 1, max_size=count - 1))]
    weights = st.lists(st.floats(0.1, 10), min_size=num_classes, max_size=num_classes)
    weight = data.draw(st.none() | weights)
    loss_fn = nn.CrossEntropyLoss(
        weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
        label_smoothing=data.draw(st.floats(0, 1)),
        reduction=data.draw(st.sampled_from(REDUCTIONS)),
    )
    # (the autograd Hessian of confident predictions is the less accurate one)
    outputs = data.draw(st.floats(0, 1)) * logits(
        num_examples, num_classes, *positions, seed=data.draw(st.integers(0, 9))
    )
    targets = torch.tensor(drawn).reshape(num_examples, *positions)
    check_columns(loss_fn, outputs, targets, num_examples)


def test_the_root_of_cross_entropy_has_its_rank():
    likelihood = likelihood_of(nn.CrossEntropyLoss())
    targets = torch.zeros(2, 3, dtype=torch.long)
    columns = list(likelihood.columns(logits(2, 4, 3), targets))
    assert len(columns) == (4 - 1) * 3
    for column in columns:  # one position each
        assert (column != 0).any(dim=1).sum(dim=1).eq(1).all()


@pytest.mark.parametrize("confidence", [0.0, 30.0, 800.0, 1e6])
@pytest.mark.parametrize("winner", [0, 1])
def test_confident_cross_entropy(confidence, winner):
    """However confident, up to probabilities that are zero: finite, to rounding errors of p."""
    outputs = torch.tensor([[0.0, 0.0, -1.0]]).double()
    outputs[0, winner] = confidence
    columns = likelihood_of(nn.CrossEntropyLoss()).columns(outputs, torch.tensor([0]))
    expected = hessian(scalar(nn.CrossEntropyLoss(), torch.tensor([0])), outputs)
    torch.testing.assert_close(gram(columns, outputs, 1), expected, rtol=0, atol=5e-16)


def test_confident_binary_cross_entropy_keeps_its_tiny_curvature():
    (column,) = likelihood_of(nn.BCEWithLogitsLoss()).columns(
        torch.tensor([[60.0]]).double(), torch.ones(1, 1)
    )
    assert_close(column**2, torch.tensor([[60.0]]).double().neg().exp())


def test_hyper_parameters_are_read_when_used():
    loss_fn = nn.CrossEntropyLoss()
    outputs, targets = logits(2, 3), torch.tensor([0, 1])
    likelihood = likelihood_of(loss_fn)
    loss_fn.weight = torch.tensor([1.0, 5.0, 1.0]).double()
    loss_fn.reduction = "sum"
    assert likelihood.reduction == "sum"
    expected = hessian(scalar(loss_fn, targets), outputs)
    assert_close(gram(likelihood.columns(outputs, targets), outputs, 2), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, torch.tensor([0.0, 2.0, 0.3]).double()])
@pytest.mark.parametrize("shape", CROSS_ENTROPY_SHAPES.values(), ids=CROSS_ENTROPY_SHAPES)
def test_nll_behind_log_softmax_is_cross_entropy(shape, weight, reduction):
    """Columns and samples, back-propagated to the logits; targets that are ignored, too."""
    z, targets, dim = logits(*shape).requires_grad_(), class_indices(shape), len(shape) > 1
    targets.view(-1)[1:2] = 255
    loss_fn, reference = (
        cls(weight=weight, ignore_index=255, reduction=reduction)
        for cls in (nn.NLLLoss, nn.CrossEntropyLoss)
    )
    outputs = z.log_softmax(int(dim))
    expected = hessian(scalar(reference, targets), z.detach())
    likelihood = likelihood_of(loss_fn)

    def pulled_back(columns):
        return [torch.autograd.grad(outputs, z, s, retain_graph=True)[0] for s in columns]

    num_examples = shape[0] if dim else 1
    exact = pulled_back(likelihood.columns(outputs, targets))
    torch.testing.assert_close(gram(exact, z, num_examples), expected, rtol=1e-12, atol=1e-14)
    (sample,) = pulled_back([likelihood.sample(outputs, targets, torch.manual_seed(0))])
    same = likelihood_of(reference).sample(z, targets, torch.manual_seed(0))
    torch.testing.assert_close(sample, same, rtol=1e-12, atol=1e-14)
    assert likelihood.num_terms(outputs, targets) == likelihood_of(reference).num_terms(z, targets)


def test_byte_labels_are_labels_not_a_mask():
    check_columns(nn.CrossEntropyLoss(), logits(2, 3), torch.tensor([2, 0]).byte(), 2)


# ---------------------------------------------------------------------------------- Monte Carlo


def draws(likelihood, outputs, targets, count, **keywords):
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [likelihood.sample(outputs, targets, generator, **keywords) for _ in range(count)]
    )


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), SMALL_CASES)
def test_samples_have_the_hessian_as_second_moment(loss_fn, shape, targets):
    """All pairs of terms: independent ones, of other examples and positions, don't correlate."""
    outputs = 0.3 * logits(*shape)  # nothing too rare to be drawn
    samples = draws(likelihood_of(loss_fn), outputs, targets, 3000).flatten(1)
    products = torch.einsum("si,sj->sij", samples, samples)
    for draws_of, expected in (
        (samples, torch.zeros_like(samples[0])),
        (products, hessian(scalar(loss_fn, targets), outputs)),
    ):
        standard_error = draws_of.std(0) / len(draws_of) ** 0.5
        assert ((draws_of.mean(0) - expected).abs() <= 4.5 * standard_error + 1e-12).all()
        # ... and the test has power
        assert standard_error.max() < 0.1 * products.mean(0).abs().max().sqrt()


def test_weighted_samples_have_the_hessian_as_second_moment():
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    outputs, targets = 0.3 * logits(2, 3), torch.tensor([0, 2])
    weight = torch.tensor([0.2, 3.0]).double()
    samples = draws(likelihood_of(loss_fn), outputs, targets, 3000, weight=weight).flatten(1)
    products = torch.einsum("si,sj->sij", samples, samples)
    error = products.mean(0) - hessian(scalar(loss_fn, targets, weight), outputs)
    assert (error.abs() <= 4.5 * products.std(0) / len(products) ** 0.5 + 1e-12).all()


def test_a_cross_entropy_sample_is_a_scaled_gradient_at_a_drawn_target():
    weight = torch.tensor([1.0, 2.0, 0.5]).double()
    loss_fn = nn.CrossEntropyLoss(weight=weight, ignore_index=0)
    outputs, targets = logits(4, 3, 2), torch.tensor([[1, 2], [1, 0], [2, 2], [1, 1]])
    sample = likelihood_of(loss_fn).sample(outputs, targets, torch.Generator().manual_seed(3))

    drawn = sample.argmin(1)  # the only negative entry
    outputs.requires_grad_()
    (score,) = torch.autograd.grad(F.cross_entropy(outputs, drawn, reduction="sum"), outputs)
    coefficient = weight[targets] * (targets != 0)
    assert_close(sample, score * (coefficient / coefficient.sum()).sqrt()[:, None])


def test_a_binary_sample_is_a_scaled_gradient_at_a_drawn_target():
    loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0).double())
    outputs, targets = logits(4, 2), torch.tensor([[0.0, 1.0]] * 4).double()
    sample = likelihood_of(loss_fn).sample(outputs, targets, torch.Generator().manual_seed(3))

    drawn = (sample < 0).double()
    outputs.requires_grad_()
    unreduced = F.binary_cross_entropy_with_logits(outputs, drawn, reduction="sum")
    (score,) = torch.autograd.grad(unreduced, outputs)
    assert_close(sample, score * ((1 + 2 * targets) / outputs.numel()).sqrt())


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), SMALL_CASES)
def test_a_generator_reproduces_samples(loss_fn, shape, targets):
    likelihood, outputs = likelihood_of(loss_fn), 0.3 * logits(*shape)
    state = torch.get_rng_state()
    first = draws(likelihood, outputs, targets, 20)
    assert torch.equal(first, draws(likelihood, outputs, targets, 20))
    assert not all(torch.equal(first[0], other) for other in first[1:])
    assert torch.equal(state, torch.get_rng_state())  # the global one is left alone


def test_ignored_targets_have_no_curvature():
    likelihood, outputs = likelihood_of(nn.CrossEntropyLoss()), logits(2, 3)
    targets = torch.tensor([-100, 1])
    for column in (*likelihood.columns(outputs, targets), likelihood.sample(outputs, targets)):
        assert column[0].eq(0).all()


@pytest.mark.parametrize("targets", [torch.tensor([-100, -100]), torch.tensor([3, 3])])
def test_no_target_that_counts_is_nan_like_the_loss(targets):
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    outputs = logits(2, 4)
    assert loss_fn(outputs, targets).isnan()
    likelihood = likelihood_of(loss_fn)
    assert likelihood.sample(outputs, targets).isnan().all()
    assert all(column.isnan().all() for column in likelihood.columns(outputs, targets))
    assert likelihood.num_terms(outputs, targets) == 0


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), SMALL_CASES)
def test_outputs_that_are_not_finite_raise_nothing(loss_fn, shape, targets):
    outputs = torch.full(shape, torch.nan)
    likelihood = likelihood_of(loss_fn)
    if not isinstance(loss_fn, nn.MSELoss):  # whose Hessian doesn't depend on the outputs
        assert likelihood.sample(outputs, targets).isnan().any()


# ---------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), SMALL_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_give_float32_columns(loss_fn, shape, targets, dtype):
    likelihood, outputs = likelihood_of(loss_fn), logits(*shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        columns = list(likelihood.columns(outputs, targets))
        sample = likelihood.sample(outputs, targets)
    assert all(column.dtype == torch.float32 for column in (*columns, sample))
    exact = list(likelihood.columns(outputs.double(), targets))
    torch.testing.assert_close(columns, [column.float() for column in exact])


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), SMALL_CASES)
def test_columns_are_detached_and_leave_the_grad_mode_alone(loss_fn, shape, targets):
    outputs = logits(*shape).requires_grad_()
    likelihood = likelihood_of(loss_fn)
    for column in likelihood.columns(outputs, targets):
        assert not column.requires_grad
        assert torch.is_grad_enabled()
    assert not likelihood.sample(outputs, targets).requires_grad


@pytest.mark.parametrize(("loss_fn", "shape", "targets"), SMALL_CASES)
def test_no_host_synchronisation(loss_fn, shape, targets):
    """Fake tensors have no values: whatever would fetch one to the host raises."""
    loss_fn = copy.deepcopy(loss_fn)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs, targets = mode.from_tensor(logits(*shape)), mode.from_tensor(targets)
        with pytest.raises(DataDependentOutputException):
            outputs.sum().item()
        likelihood = likelihood_of(loss_fn)
        assert all(column.shape == shape for column in likelihood.columns(outputs, targets))
        assert likelihood.sample(outputs, targets).shape == shape
        likelihood.num_terms(outputs, targets)


# ----------------------------------------------------------------------------- empirical Fisher


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_number_of_terms(reduction):
    weight = torch.tensor([1.0, 2.0, 0.5])
    indices = torch.tensor([[0, 2], [1, -100]])
    cross_entropy = nn.CrossEntropyLoss(weight=weight, reduction=reduction, label_smoothing=0.1)
    mean = reduction == "mean"
    for loss_fn, shape, targets, expected in (
        (cross_entropy, (2, 3, 2), indices, 3.5),
        (cross_entropy, (2, 3, 2), torch.full((2, 3, 2), 1 / 3), 4),
        (nn.CrossEntropyLoss(reduction=reduction), (2, 3, 2), indices, 3),
        (nn.MSELoss(reduction=reduction), (5, 2), torch.zeros(5, 2), 10),
        (nn.MSELoss(reduction=reduction), (5, 3, 2), torch.zeros(5, 3, 2), 30),
        (nn.PoissonNLLLoss(reduction=reduction), (5, 2), torch.zeros(5, 2), 10),
        (nn.MSELoss(reduction=reduction), (), torch.tensor(0.0), 1),
        (nn.BCEWithLogitsLoss(reduction=reduction), (5, 2), torch.zeros(5, 2), 10),
    ):
        actual = likelihood_of(loss_fn).num_terms(torch.zeros(shape), targets)
        assert actual == (expected if mean else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 2)])
@pytest.mark.parametrize("loss_class", [nn.MSELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss])
def test_the_empirical_fisher_of_elementwise_losses_is_a_mean_over_examples(
    loss_class, shape, reduction
):
    """Of the outer product of the gradient that each has alone."""
    loss_fn, outputs = loss_class(reduction=reduction), logits(*shape)
    targets = logits(*shape, seed=1).sigmoid()
    mean = reduction == "mean"

    def gradient(z, y):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(loss_fn(z, y), z)[0].flatten(1)

    examples = zip(outputs.split(1), targets.split(1), strict=True)
    expected = sum(g.T @ g for g in (gradient(z, y) for z, y in examples)) / (5 if mean else 1)
    g = gradient(outputs, targets)
    assert_close(empirical_factor(likelihood_of(loss_fn), outputs, targets) * g.T @ g, expected)


def test_the_empirical_fisher_of_positions_is_a_mean_over_them():
    loss_fn, targets = nn.CrossEntropyLoss(), torch.tensor([[0, 2], [1, -100]])
    assert empirical_factor(likelihood_of(loss_fn), logits(2, 3, 2), targets) == 3
    assert empirical_factor(HalfSquare(), logits(2, 3), logits(2, 3)) == 1
    assert empirical_factor(likelihood_of(nn.MSELoss()), logits(), logits()) == 1


# ------------------------------------------------------------------------------------- refusals


def test_options_without_a_fisher_in_natural_parameters_are_refused():
    with pytest.raises(ValueError, match="set log_input=True"):
        likelihood_of(nn.PoissonNLLLoss(log_input=False))
    loss_fn = nn.PoissonNLLLoss()
    likelihood = likelihood_of(loss_fn)
    loss_fn.log_input = False
    with pytest.raises(ValueError, match="set log_input=True"):
        likelihood.sample(torch.zeros(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"must be class indices.*CrossEntropyLoss takes prob"):
        likelihood_of(nn.NLLLoss()).columns(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))


OWN_LOSSES = [
    nn.MSELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.CrossEntropyLoss,
    nn.NLLLoss,
]
UNKNOWN_REDUCTIONS = ["Mean", "avg", "batchmean", "elementwise_mean", "", None, 1]


@pytest.mark.parametrize("reduction", UNKNOWN_REDUCTIONS)
@pytest.mark.parametrize("loss_class", OWN_LOSSES)
def test_unknown_reductions_are_refused(loss_class, reduction):
    """Whatever isn't known would pass for a sum."""
    match = rf"{loss_class.__name__}.*reduction={reduction!r}: choose one of \('mean'"
    with pytest.raises(ValueError, match=match):
        likelihood_of(loss_class(reduction=reduction))
    loss_fn = loss_class()
    likelihood, targets = likelihood_of(loss_fn), torch.zeros(2, 3)
    loss_fn.reduction = reduction
    for method in (likelihood.columns, likelihood.sample, likelihood.num_terms):
        with pytest.raises(ValueError, match=match):
            method(torch.zeros(2, 3), targets)
    with pytest.raises(ValueError, match=match):
        _ = likelihood.reduction
    for use in (kfac_tn.KFAC, lambda *args: kfac_tn.compute_ggn_diagonal(*args, [])):
        with pytest.raises(ValueError, match=match):
            use(nn.Linear(3, 3), loss_fn)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("reduction", UNKNOWN_REDUCTIONS)
def test_unknown_reductions_of_ones_own_losses_are_refused(reduction):
    loss_fn = HalfSquare()
    loss_fn.reduction = reduction
    with pytest.raises(ValueError, match=rf"HalfSquare.*reduction={reduction!r}"):
        likelihood_of(loss_fn)
    register_likelihood(nn.CTCLoss, lambda loss: loss_fn)
    with pytest.raises(ValueError, match=rf"HalfSquare.*reduction={reduction!r}"):
        likelihood_of(nn.CTCLoss())


@pytest.mark.parametrize("smoothing", [1.5, -0.1, float("nan")])
@pytest.mark.parametrize("targets", [torch.tensor([0, 1]), torch.full((2, 3), 1 / 3)])
def test_label_smoothing_that_is_none_is_refused(targets, smoothing):
    match = f"CrossEntropyLoss.*label_smoothing={smoothing}: it must be in"
    with pytest.raises(ValueError, match=match):
        likelihood_of(nn.CrossEntropyLoss(label_smoothing=smoothing))
    loss_fn = nn.CrossEntropyLoss()
    likelihood = likelihood_of(loss_fn)
    loss_fn.label_smoothing = smoothing
    for method in (likelihood.columns, likelihood.sample, likelihood.num_terms):
        with pytest.raises(ValueError, match=match):
            method(torch.zeros(2, 3), targets)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 255])
def test_ignored_classes_of_probabilities_are_refused_where_the_loss_refuses_them(ignore_index):
    loss_fn, outputs, targets = nn.CrossEntropyLoss(), logits(2, 3), probabilities((2, 3))
    loss_fn.ignore_index = ignore_index
    likelihood = likelihood_of(loss_fn)
    if ignore_index < 0:
        check_columns(loss_fn, outputs, targets, 2)
        return
    with pytest.raises(RuntimeError, match="ignore_index"):
        loss_fn(outputs, targets)
    for method in (likelihood.columns, likelihood.sample, likelihood.num_terms):
        with pytest.raises(ValueError, match=f"ignore_index={ignore_index}.*are probabilities"):
            method(outputs, targets)


@pytest.mark.parametrize(
    ("loss_class", "name"),
    [
        (nn.CrossEntropyLoss, "weight"),
        (nn.NLLLoss, "weight"),
        (nn.BCEWithLogitsLoss, "weight"),
        (nn.BCEWithLogitsLoss, "pos_weight"),
    ],
)
def test_negative_weights_of_a_loss_are_refused(loss_class, name):
    """However they came about; zeros and NaN, which is the data's affair, aren't."""
    match = rf"the {name} of {loss_class.__name__}\(\) is negative somewhere \(-2\)"
    negative = torch.tensor([1.0, -2.0, 0.0]).double()
    with pytest.raises(ValueError, match=match):
        likelihood_of(loss_class(**{name: negative}))
    loss_fn = loss_class(**{name: torch.tensor([1.0, 0.0, torch.nan]).double()})
    likelihood, outputs = likelihood_of(loss_fn), logits(2, 3)
    elementwise = loss_class is nn.BCEWithLogitsLoss
    targets = torch.ones(2, 3) if elementwise else torch.tensor([0, 1])
    list(likelihood.columns(outputs, targets))
    getattr(loss_fn, name)[2] = -2.0  # in place
    with pytest.raises(ValueError, match=match):
        likelihood.columns(outputs, targets)
    setattr(loss_fn, name, torch.ones(3).double())
    list(likelihood.columns(outputs, targets))
    setattr(loss_fn, name, negative)
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            likelihood.sample(outputs, targets)


def test_the_way_out_for_a_policy_gradient():
    """The refusal of advantages says it; done so, they leave no trace in the curvature."""
    torch.manual_seed(0)
    x, actions = torch.randn(6, 3), torch.randint(2, (6,))
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0, 1.0])
    model, loss_fn = nn.Linear(3, 2), nn.CrossEntropyLoss(reduction="none")
    optimizer = kfac_tn.KFAC(model, loss_fn)
    with pytest.raises(ValueError, match=r"must not be negative.*advantages.*optimizer\.observe"):
        (loss_fn(model(x), actions) * advantages).mean().backward()
    optimizer.close()

    def factors(weights):
        options = {"step_rule": "graft", "damping": 0.1, "fisher": "type-2"}
        optimizer = kfac_tn.KFAC(model, nn.CrossEntropyLoss(), lr=0.0, **options)
        outputs = model(x)
        optimizer.observe(outputs, actions)
        (loss_fn(outputs, actions) * weights).mean().backward()
        optimizer.step()
        (found,) = optimizer.factors().values()
        return found.input, found.grad_output

    plain = factors(torch.ones(6))
    assert plain[1].any()
    torch.testing.assert_close(factors(advantages), plain)


@pytest.mark.parametrize("loss_class", [nn.MSELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss])
def test_targets_that_would_broadcast_are_refused(loss_class):
    likelihood = likelihood_of(loss_class())
    with pytest.raises(ValueError, match=r"shape of the outputs, \(3, 1\), but have \(3,\)"):
        likelihood.columns(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="shape of the outputs"):
        likelihood.sample(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize(
    "targets", [torch.zeros(3), torch.zeros(2, 3).long(), torch.zeros(2, 4), torch.rand(2)]
)
def test_targets_that_are_neither_labels_nor_probabilities_are_refused(targets):
    likelihood = likelihood_of(nn.CrossEntropyLoss())
    for method in (likelihood.columns, likelihood.sample, likelihood.num_terms):
        with pytest.raises(ValueError, match=r"class indices of shape \(2,\)"):
            method(torch.zeros(2, 3), targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "labels", [torch.tensor([0, -1]), torch.tensor([0, 3]), torch.tensor([-2, -100])]
)
def test_labels_that_the_loss_refuses_are_refused(labels, reduction):
    """Negative ones aren't counted from the end."""
    loss_fn, outputs = nn.CrossEntropyLoss(torch.rand(3), reduction=reduction), torch.zeros(2, 3)
    likelihood = likelihood_of(loss_fn)
    with pytest.raises(IndexError):
        loss_fn(outputs, labels)
    for method in (likelihood.columns, likelihood.sample):
        with pytest.raises(IndexError, match=r"must be in \[0, 3\), or ignore_index=-100"):
            method(outputs, labels)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("targets", [torch.tensor([0, 1]), torch.full((2, 3), 1 / 3)])
def test_class_weights_of_another_number_are_refused(classes, targets):
    likelihood = likelihood_of(nn.CrossEntropyLoss(torch.ones(classes)))
    for method in (likelihood.columns, likelihood.sample, likelihood.num_terms):
        with pytest.raises(ValueError, match=rf"weight of shape \({classes},\).* have 3 classes"):
            method(torch.zeros(2, 3), targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_weight_of_a_reduced_loss_is_refused(reduction):
    likelihood = likelihood_of(nn.CrossEntropyLoss(reduction=reduction))
    with pytest.raises(ValueError, match="reduction='none' only"):
        likelihood.columns(torch.zeros(2, 3), torch.tensor([0, 1]), weight=torch.ones(2))
    with pytest.raises(ValueError, match="reduction='none' only"):
        likelihood.sample(torch.zeros(2, 3), torch.tensor([0, 1]), weight=torch.ones(2))


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.tensor([1.0, -1.0]), "must not be negative"),
        (torch.ones(3), r"shape of the unreduced loss, \(2,\), but has \(3,\)"),
        (torch.tensor(1.0), "shape of the unreduced loss"),
    ],
)
def test_bad_weights_are_refused(weight, match):
    likelihood = likelihood_of(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=match):
        likelihood.columns(torch.zeros(2, 3), torch.tensor([0, 1]), weight=weight)


class Focal(nn.CrossEntropyLoss):
    """A subclass that computes something else."""

    def forward(self, input, target):
        return super().forward(input, target) ** 2


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (nn.BCELoss(), r"sigmoid\(z\) is nn.BCEWithLogitsLoss"),
        (nn.KLDivLoss(), "probabilities as targets"),
        (nn.L1Loss(), "no curvature where it is linear"),
        (nn.GaussianNLLLoss(), "examples/custom_likelihood.py has a Gaussian"),
        (nn.CTCLoss(), "doesn't say what its likelihood is"),
        (
            F.cross_entropy,
            r"pass nn.CrossEntropyLoss\(...\).*optimizer.observe\(outputs, targets\)",
        ),
        (F.mse_loss, r"pass nn.MSELoss\(...\)"),
        (F.nll_loss, r"pass nn.NLLLoss\(...\)"),
        (lambda outputs, targets: outputs.sum(), "pass the nn.Module of the same loss"),
        (nn.MSELoss, "It is a class: pass a loss"),
        (Focal(), r"subclass of torch.nn.CrossEntropyLoss, but may compute something else"),
        (Focal(), r"register_likelihood\(Focal, CrossEntropyLikelihood\)"),
        (torch.compile(nn.MSELoss()), r"torch.compile.*pass the loss module.*_orig_mod"),
        (None, "no likelihood is known for None"),
    ],
)
def test_unknown_losses_are_refused_with_a_remedy(loss_fn, match):
    with pytest.raises(TypeError, match=match) as error:
        likelihood_of(loss_fn)
    message = str(error.value)
    for known in ("torch.nn.BCEWithLogitsLoss", "torch.nn.CrossEntropyLoss", "torch.nn.MSELoss"):
        assert known in message
    assert "kfac_tn.likelihood.Likelihood" in message


# ---------------------------------------------------------------------- protocol and registration


class HalfSquare(nn.Module):
    """Implements the protocol: half the summed squared error."""

    reduction = "sum"

    def forward(self, outputs, targets):
        return (outputs - targets).square().sum() / 2

    def columns(self, outputs, targets, weight=None):
        for index in range(outputs.shape[1]):
            column = torch.zeros_like(outputs)
            column[:, index] = 1
            yield column

    def sample(self, outputs, targets, generator=None, weight=None):
        return torch.empty_like(outputs).normal_(generator=generator)

    def num_terms(self, outputs, targets):
        return 1


def test_a_loss_with_the_members_of_the_protocol_is_its_own_likelihood():
    loss_fn = HalfSquare()
    assert likelihood_of(loss_fn) is loss_fn
    likelihood = likelihood_of(nn.MSELoss())
    assert likelihood_of(likelihood) is likelihood


def test_a_subclass_that_implements_the_protocol_is_its_own_likelihood():
    class Own(HalfSquare, nn.MSELoss):
        pass

    loss_fn = Own()
    assert likelihood_of(loss_fn) is loss_fn


def test_half_of_a_protocol_is_refused_with_what_is_missing():
    class Half(nn.Module):
        def columns(self, outputs, targets, weight=None):
            yield outputs

    with pytest.raises(TypeError, match="has no reduction, sample, num_terms"):
        likelihood_of(Half())


@pytest.fixture
def registry(monkeypatch):
    """A registry to change at will."""
    factories = dict(registry_module._FACTORIES)
    monkeypatch.setattr(registry_module, "_FACTORIES", factories)


@pytest.mark.usefixtures("registry")
def test_registration_is_of_exactly_that_class():
    class Logged(nn.CrossEntropyLoss):
        pass

    class LoggedToo(Logged):
        pass

    register_likelihood(Logged, CrossEntropyLikelihood)
    assert isinstance(likelihood_of(Logged()), CrossEntropyLikelihood)
    with pytest.raises(TypeError, match=r"subclass of torch.nn.CrossEntropyLoss.*Logged"):
        likelihood_of(LoggedToo())


@pytest.mark.usefixtures("registry")
def test_bad_registrations_are_refused():
    with pytest.raises(TypeError, match="must be a class"):
        register_likelihood(nn.CTCLoss(), MSELikelihood)
    with pytest.raises(TypeError, match="must be callable"):
        register_likelihood(nn.CTCLoss, None)
    register_likelihood(nn.CTCLoss, lambda loss: object())
    with pytest.raises(TypeError, match=r"CTCLoss returned .* has no reduction, columns"):
        likelihood_of(nn.CTCLoss())


# -------------------------------------------------------------------------------------- example


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "custom_likelihood.py"
    spec = importlib.util.spec_from_file_location("custom_likelihood", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_example_against_the_autograd_fisher(example, reduction):
    loss_fn = example.HeteroscedasticGaussianLoss(reduction)
    outputs = logits(3, 2)
    targets = torch.zeros(3).double()
    assert likelihood_of(loss_fn) is loss_fn
    # The Hessian is quadratic in the residual: its mean over a target one standard deviation above
    # and one below is its mean over the Gaussian.
    mean, deviation = outputs[:, 0], (outputs[:, 1] / 2).exp()
    fisher = sum(hessian(scalar(loss_fn, mean + s * deviation), outputs) / 2 for s in (-1, 1))
    assert_close(gram(loss_fn.columns(outputs, targets), outputs, 3), fisher)

    samples = draws(loss_fn, outputs, targets, 3000).flatten(1)
    products = torch.einsum("si,sj->sij", samples, samples)
    error = (products.mean(0) - fisher).abs()
    assert (error <= 4.5 * products.std(0) / len(products) ** 0.5).all()
    assert loss_fn.num_terms(outputs, targets) == (3 if reduction == "mean" else 1)


def test_the_example_agrees_with_torch(example):
    outputs, targets = logits(5, 2), logits(5, seed=1)
    expected = nn.GaussianNLLLoss()(outputs[:, 0], targets, outputs[:, 1].exp())
    torch.testing.assert_close(example.HeteroscedasticGaussianLoss()(outputs, targets), expected)


def test_the_example_refuses_what_it_does_not_know(example):
    loss_fn = example.HeteroscedasticGaussianLoss()
    with pytest.raises(ValueError, match="reduction must be"):
        example.HeteroscedasticGaussianLoss("none")
    with pytest.raises(ValueError, match=r"targets \[N\]"):
        loss_fn(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="takes no weight"):
        loss_fn.sample(torch.zeros(3, 2), torch.zeros(3), weight=torch.ones(3))


def test_the_example_runs(example):
    before, after = example.main(["--steps", "20", "--examples", "64"])
    assert after < before
