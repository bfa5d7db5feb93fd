"""The hooks: what they record, in which scale, and that they leave no trace."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import kfac_tn
from kfac_tn.capture import Capture
from kfac_tn.graph import find
from kfac_tn.layers import partition

FISHERS = ["type-2", "empirical", "mc", "forward-only"]
DETERMINISTIC = ["type-2", "empirical", "forward-only"]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def make_data(n: int = 6, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 4, 4, generator=generator).double()
    return x, torch.randint(3, (n,), generator=generator)


def watch(model, loss_fn, fisher="type-2", approximation="expand", **options) -> Capture:
    generator = torch.Generator().manual_seed(0)
    blocks, _ = partition(model, approximation)
    return Capture(blocks, loss_fn, fisher, generator=lambda device: generator, **options)


def factors(capture: Capture):
    """A and B by layer name, of what was seen since the last time."""
    taken = capture.take().factors
    return {block.name: (each.input, each.grad_output) for block, each in taken.items()}


def assert_same(actual, expected, **options):
    assert actual.keys() == expected.keys()
    assert expected
    for name in expected:
        for one, other in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, **{**CLOSE, **options})


def plain_factors(model, loss_fn, x, y, fisher="type-2", approximation="expand"):
    """Those of one ordinary pass."""
    capture = watch(model, loss_fn, fisher, approximation)
    loss_fn(model(x), y).backward()
    found = factors(capture)
    capture.close()
    return found


# Nothing is recorded, nothing is kept, nothing is changed ----------------------------------------


def under_no_grad(capture, model, loss_fn, x, y):
    with torch.no_grad():
        loss_fn(model(x), y)


def in_inference_mode(capture, model, loss_fn, x, y):
    with torch.inference_mode():
        loss_fn(model(x), y)


def without_backward(capture, model, loss_fn, x, y):
    loss_fn(model(x), y)


def when_not_armed(capture, model, loss_fn, x, y):
    capture.armed = False
    loss_fn(model(x), y).backward()


def after_close(capture, model, loss_fn, x, y):
    capture.close()
    capture.close()
    loss_fn(model(x), y).backward()


def by_another_loss(capture, model, loss_fn, x, y):
    nn.CrossEntropyLoss()(model(x), y).backward()


def of_a_copy(capture, model, loss_fn, x, y):
    loss_fn(copy.deepcopy(model)(x), y).backward()


def by_a_copy_of_the_loss(capture, model, loss_fn, x, y):
    copy.deepcopy(loss_fn)(model(x), y).backward()


def of_a_model_that_went_through_a_file(capture, model, loss_fn, x, y):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loss_fn(torch.load(file, weights_only=False)(x), y).backward()


def of_a_frozen_input(capture, model, loss_fn, x, y):
    logits = model(x).detach().requires_grad_()
    loss_fn(logits, y).backward()


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(
    "act",
    [
        under_no_grad,
        in_inference_mode,
        without_backward,
        when_not_armed,
        after_close,
        by_another_loss,
        of_a_copy,
        by_a_copy_of_the_loss,
        of_a_model_that_went_through_a_file,
        of_a_frozen_input,
    ],
)
def test_nothing_is_recorded(act, fisher):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    capture = watch(model, loss_fn, fisher)
    act(capture, model, loss_fn, x, y)
    assert factors(capture) == {}


@pytest.mark.parametrize("fisher", FISHERS)
def test_validation_in_between_contributes_nothing(fisher):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    expected = plain_factors(model, loss_fn, x, y, fisher)
    capture = watch(model, loss_fn, fisher)
    loss = loss_fn(model(x), y)
    loss_fn(model(2 * x), y)  # neither no_grad nor backward
    loss.backward()
    loss_fn(model(3 * x), y)
    assert_same(factors(capture), expected)


def hooks(*modules: nn.Module) -> int:
    return sum(len(m._forward_hooks) for module in modules for m in module.modules())


def test_the_hooks_go_with_their_capture():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    capture = watch(model, loss_fn)
    assert hooks(model, loss_fn) == 4
    reference = weakref.ref(capture)
    del capture
    assert reference() is None  # at once: no cycle keeps it for the garbage collector
    assert hooks(model, loss_fn) == 0


@pytest.mark.parametrize("make", [kfac_tn.KFAC, kfac_tn.KFACPreconditioner])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_forgotten_optimizer_is_freed_and_its_hooks_with_it(make, steps):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    optimizer = make(model, loss_fn, factor_interval=1)
    for _ in range(steps):
        loss_fn(model(x), y).backward()
        optimizer.step()
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert hooks(model, loss_fn) == 0


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("backward", [True, False])
def test_the_graph_dies_with_the_loss(fisher, backward):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    capture = watch(model, loss_fn, fisher)
    hidden = []
    handle = model[3].register_forward_hook(lambda m, a, output: hidden.append(weakref.ref(output)))
    gc.disable()
    try:
        loss = loss_fn(model(x), y)
        if backward:
            loss.backward()
        del loss
        assert hidden[0]() is None
    finally:
        gc.enable()
        handle.remove()
    assert (factors(capture) != {}) is backward


def test_a_loss_kept_for_its_value_keeps_no_statistics():
    """``total += loss`` is a common slip; the input factors of a layer are no small change."""
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    capture = watch(model, loss_fn)
    output = model(x)
    loss = loss_fn(output, y)
    statistic = weakref.ref(find(output, capture._key)[0].record.input)
    assert statistic() is not None
    loss.backward()
    capture.take()
    assert statistic() is None
    assert loss.item() > 0


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_micro_batches_do_not_pile_up(fisher, approximation):
    """Their statistics are summed as they come: memory doesn't grow with their number."""
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    capture = watch(model, loss_fn, fisher, approximation)
    statistics = []
    for _ in range(6):
        output = model(x)
        statistics += [weakref.ref(one.record.input) for one in find(output, capture._key)]
        loss_fn(output, y).backward()
        del output
    alive = sum(statistic() is not None for statistic in statistics)
    assert alive <= 6  # of three layers: the last pass, and the first, where the sums are now


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_the_users_gradients_are_bit_identical(fisher, approximation):
    model, loss_fn, (x, y) = make_model().float(), nn.CrossEntropyLoss(), make_data()
    x = x.float().requires_grad_()

    def gradients():
        x.grad = None
        model.zero_grad()
        loss_fn(model(x), y).backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    expected = gradients()
    capture = watch(model, loss_fn, fisher, approximation)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    assert factors(capture)


@pytest.mark.parametrize("fisher", FISHERS)
def test_the_global_random_state_is_untouched(fisher):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    optimizer = kfac_tn.KFAC(model, loss_fn, fisher=fisher, factor_interval=1)
    before = torch.get_rng_state()
    for _ in range(2):
        loss_fn(model(x), y).backward()
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_the_same_in_the_extra_pass():
    """In particular: a layer after dropout gets the factors of the inputs that it had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3, bias=False)).double()
    x, y = torch.rand(5, 4).double(), torch.randint(3, (5,))
    loss_fn = nn.CrossEntropyLoss()
    capture = watch(model, loss_fn)
    seen = []
    model[1].register_forward_hook(lambda m, args, output: seen.append(args[0].detach()))
    loss_fn(model(x), y).backward()
    ((a, _),) = factors(capture).values()
    torch.testing.assert_close(a[0], seen[0].T @ seen[0] / 5, **CLOSE)


def test_two_captures_on_one_model_do_not_mix():
    model, (x, y) = make_model(), make_data()
    losses = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    expected = [
        plain_factors(model, loss_fn, x, y, fisher, "reduce")
        for loss_fn, fisher in zip(losses, ("type-2", "empirical"), strict=True)
    ]
    first = watch(model, losses[0], "type-2", "reduce")
    second = watch(model, losses[1], "empirical", "reduce")
    output = model(x)
    losses[0](output, y).backward(retain_graph=True)
    losses[1](output, y).backward()
    assert_same(factors(first), expected[0])
    assert_same(factors(second), expected[1])


# How a loss may be called ------------------------------------------------------------------------

CALLS = {
    "positional": lambda loss_fn, output, y: loss_fn(output, y),
    "half": lambda loss_fn, output, y: loss_fn(output, target=y),
    "keywords": lambda loss_fn, output, y: loss_fn(input=output, target=y),
    "swapped": lambda loss_fn, output, y: loss_fn(target=y, input=output),
}


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_losses_called_with_keywords(call, fisher):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    expected = plain_factors(model, loss_fn, x, y, fisher)
    capture = watch(model, loss_fn, fisher)
    call(loss_fn, model(x), y).backward()
    assert_same(factors(capture), expected)


OBJECTIVES = {
    "divided": lambda loss: loss / 7,
    "divided in place": lambda loss: loss.div_(7),
    "multiplied": lambda loss: 1e4 * loss,
    "maximized": lambda loss: -loss,
    "with a penalty": lambda loss: loss + 3,
    "two copies": lambda loss: loss + loss,
}


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_factor_of_the_whole_objective_cancels(objective, reduction, fisher):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(reduction=reduction), make_data()
    expected = plain_factors(model, loss_fn, x, y, fisher)
    capture = watch(model, loss_fn, fisher)
    objective(loss_fn(model(x), y)).backward()
    assert_same(factors(capture), expected)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_observe_equals_the_loss_module(fisher, reduction, approximation):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(reduction=reduction), make_data()
    expected = plain_factors(model, loss_fn, x, y, fisher, approximation)
    capture = watch(model, loss_fn, fisher, approximation)
    output = model(x)
    capture.observe(output, y)
    nn.functional.cross_entropy(output, y, reduction=reduction).backward()
    assert_same(factors(capture), expected)


MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).double()
REDUCTIONS = {
    "own mean": (lambda losses: losses.mean(), torch.ones(6).double() / 6),
    "own sum, normalized": (lambda losses: losses.sum(), torch.ones(6).double() / 6),
    "mask": (lambda losses: (losses * MASK).sum() / MASK.sum(), MASK / 4),
    "weights": (lambda losses: losses @ torch.arange(6.0).double(), torch.arange(6).double() / 15),
    "maximized": (lambda losses: -losses.mean(), torch.ones(6).double() / 6),
}


@pytest.mark.parametrize(("reduce", "weights"), REDUCTIONS.values(), ids=REDUCTIONS)
def test_a_loss_that_the_user_reduces(reduce, weights):
    """The last layer's B by hand: weights times the softmax's covariance."""
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(reduction="none"), make_data()
    capture = watch(model, loss_fn)
    output = model(x)
    reduce(loss_fn(output, y)).backward()
    p = output.detach().softmax(1)
    hessians = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = torch.einsum("n,nij->ij", weights, hessians)
    torch.testing.assert_close(factors(capture)["5"][1][0], expected, **CLOSE)


def test_own_mean_equals_the_mean_for_every_layer():
    model, (x, y) = make_model(), make_data()
    expected = plain_factors(model, nn.CrossEntropyLoss(), x, y)
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    capture = watch(model, loss_fn)
    loss_fn(model(x), y).mean().backward()
    assert_same(factors(capture), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: watch(m, nn.CrossEntropyLoss(reduction="none"), "empirical"), "empirical"),
        (lambda m: watch(m, nn.CrossEntropyLoss(), "exact"), "'exact'"),
        (lambda m: watch(m, nn.CrossEntropyLoss(), "mc", mc_samples=0), "mc_samples is 0"),
    ],
)
def test_unknown_kinds_are_refused(make, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        make(model)
    assert hooks(model) == 0


def test_observing_an_unreduced_loss_is_refused():
    model, (x, y) = make_model(), make_data()
    capture = watch(model, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="none"):
        capture.observe(model(x), y)


class PoissonLoss(nn.Module):
    """exp(z) - y z, averaged over examples; its root is sqrt(exp(z))."""

    reduction = "mean"

    def forward(self, outputs, targets):
        return (outputs.exp() - targets * outputs).sum() / len(outputs)

    def columns(self, outputs, targets, weight=None):
        for k in range(outputs.shape[1]):
            column = torch.zeros_like(outputs)
            column[:, k] = (outputs[:, k].exp() / len(outputs)).sqrt()
            yield column

    def sample(self, outputs, targets, generator=None, weight=None):
        draws = torch.poisson(outputs.exp(), generator)
        return (outputs.exp() - draws) / len(outputs) ** 0.5

    def num_terms(self, outputs, targets):
        return len(outputs)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_loss_of_the_users_own(fisher):
    model, loss_fn, (x, y) = make_model(), PoissonLoss(), make_data()
    capture = watch(model, loss_fn, fisher, mc_samples=400)
    output = model(x)
    loss_fn(output, y.double().unsqueeze(1)).backward()
    rate = output.detach().exp()
    residual = rate - y.unsqueeze(1)
    expected = {
        "type-2": rate.mean(0).diag(),
        "mc": rate.mean(0).diag(),
        "empirical": residual.T @ residual / 6,
        "forward-only": torch.eye(3).double(),
    }
    tolerance = {"rtol": 0.1, "atol": 0.1} if fisher == "mc" else CLOSE
    torch.testing.assert_close(factors(capture)["5"][1][0], expected[fisher], **tolerance)


# Several losses, several passes ------------------------------------------------------------------


class Deep(nn.Module):
    """A trunk with two heads: deep supervision."""

    def __init__(self):
        super().__init__()
        self.trunk, self.main, self.aux = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return self.main(hidden), self.aux(hidden)


@pytest.mark.parametrize("overall", [1.0, 0.1])
@pytest.mark.parametrize("order", [1, -1])
def test_several_losses_in_one_objective_add_up_with_their_weights(overall, order):
    """A total of main + 0.3 aux; by hand: sum_n J_n^T H_n J_n at the output of the trunk."""
    torch.manual_seed(0)
    model, loss_fn = Deep().double(), nn.CrossEntropyLoss()
    x, y, z = torch.rand(6, 4).double(), torch.randint(3, (6,)), torch.randint(2, (6,))
    capture = watch(model, loss_fn)
    main, aux = model(x)
    losses = {"main": (main, y), "aux": (aux, z)}
    values = {name: loss_fn(*losses[name]) for name in list(losses)[::order]}
    (overall * (values["main"] + 0.3 * values["aux"])).backward()
    found = factors(capture)
    hidden = model.trunk(x).tanh().detach()
    trunk = torch.zeros(5, 5).double()
    for head, logits, weight in ((model.main, main, 1.0), (model.aux, aux, 0.3)):
        p = logits.detach().softmax(1)
        hessian = weight * (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / 6
        name = "main" if head is model.main else "aux"
        torch.testing.assert_close(found[name][1][0], hessian.sum(0), **CLOSE)
        jacobian = head.weight.detach() * (1 - hidden.square()).unsqueeze(1)
        trunk += (jacobian.mT @ hessian @ jacobian).sum(0)
    torch.testing.assert_close(found["trunk"][1][0], trunk, **CLOSE)
    extended = torch.cat([x, torch.ones(6, 1).double()], dim=1)
    torch.testing.assert_close(found["trunk"][0][0], extended.T @ extended / 6, **CLOSE)


def test_the_empirical_fisher_of_several_losses_is_refused():
    torch.manual_seed(0)
    model, loss_fn = Deep(), nn.CrossEntropyLoss()
    capture = watch(model, loss_fn, "empirical")
    main, aux = model(torch.rand(6, 4))
    total = loss_fn(main, torch.randint(3, (6,))) + loss_fn(aux, torch.randint(2, (6,)))
    with pytest.raises(RuntimeError, match="several losses"):
        total.backward()
    capture.discard()


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(6,), (2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_micro_batches_equal_the_batch(fisher, approximation, reduction, sizes, scale):
    """Gradient accumulation: each mean is weighted by its share, a sum isn't."""
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(reduction=reduction), make_data()
    expected = plain_factors(model, loss_fn, x, y, fisher, approximation)
    capture = watch(model, loss_fn, fisher, approximation)
    for x_m, y_m in zip(x.split(sizes), y.split(sizes), strict=True):
        share = len(x_m) / 6 if reduction == "mean" else 1.0
        (scale * share * loss_fn(model(x_m), y_m)).backward()
    assert_same(factors(capture), expected)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_micro_batches_of_observed_losses(fisher):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    expected = plain_factors(model, loss_fn, x, y, fisher)
    capture = watch(model, loss_fn, fisher)
    for x_m, y_m in zip(x.split((1, 3, 2)), y.split((1, 3, 2)), strict=True):
        capture.observe(model(x_m), y_m, weight=len(x_m))
    assert_same(factors(capture), expected)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_two_backward_passes_through_one_graph_are_two_passes(fisher):
    """Inputs count once; the mean over two equal passes is one of them."""
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    expected = plain_factors(model, loss_fn, x, y, fisher)
    capture = watch(model, loss_fn, fisher)
    loss = loss_fn(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(factors(capture), expected)


def test_mc_samples_are_independent_and_reproducible():
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    first, again = (plain_factors(model, loss_fn, x, y, "mc") for _ in range(2))
    assert_same(first, again, rtol=0, atol=0)
    capture = watch(model, loss_fn, "mc")
    for _ in range(2):
        loss_fn(model(x), y).backward()
    averaged = factors(capture)
    assert not torch.allclose(averaged["5"][1], first["5"][1])


# Batches -----------------------------------------------------------------------------------------


UNBATCHED = {
    "cross-entropy": (nn.CrossEntropyLoss(), torch.tensor(1)),
    "soft targets": (nn.CrossEntropyLoss(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()),
    "squared error": (nn.MSELoss(), torch.arange(4).double()),
    "sum of squares": (nn.MSELoss(reduction="sum"), torch.arange(4).double()),
    "binary": (nn.BCEWithLogitsLoss(), torch.tensor([0.0, 1.0, 1.0, 0.0]).double()),
}


@pytest.mark.parametrize("loss", UNBATCHED)
@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_unbatched_equals_a_batch_of_one(fisher, approximation, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(0), nn.Linear(9, 4)).double()
    batched = nn.Sequential(model[0], nn.Flatten(1), model[2])
    x, (loss_fn, y) = torch.rand(2, 4).double(), UNBATCHED[loss]
    expected = plain_factors(batched, loss_fn, x[None], y[None], fisher, approximation)
    actual = plain_factors(model, loss_fn, x, y, fisher, approximation)
    assert_same(actual, expected)


def test_an_unbatched_example_behind_an_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    i, y, loss_fn = torch.tensor(2), torch.tensor(1), nn.CrossEntropyLoss()
    (_, b) = plain_factors(model, loss_fn, i, y)["2"]
    p = model(i).softmax(0)
    torch.testing.assert_close(b[0], (p.diag() - p.outer(p)).detach(), **CLOSE)


class Graph(nn.Module):
    """A graph network: each node's output depends on its neighbours."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", (torch.rand(6, 6) < 0.4).double())
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.edges @ self.last((self.edges @ self.first(x)).tanh())


MIXING = {
    "graph": Graph,
    "batch normalization": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
    ),
}


@pytest.mark.parametrize("kind", MIXING)
def test_type_2_is_unbiased_where_examples_mix(kind):
    """Columns are those of all examples at once; products of two of these have to cancel."""
    torch.manual_seed(0)
    model, loss_fn = MIXING[kind]().double(), nn.MSELoss()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    capture = watch(model, loss_fn)
    total: dict = {}
    for _ in range(400):
        loss_fn(model(x), y).backward()
        for name, (_, b) in factors(capture).items():
            total[name] = total.get(name, 0) + b[0] / 400
    capture.close()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            outputs = []
            handle = layer.register_forward_hook(lambda m, i, z, seen=outputs: seen.append(z))
            prediction = model(x)
            handle.remove()
            expected = torch.zeros_like(total[name])
            for number in prediction.flatten():
                (g,) = torch.autograd.grad(number, outputs[0], retain_graph=True)
                expected += 2 / y.numel() * g.T @ g
            assert (total[name] - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_an_empty_batch_takes_nothing_away(fisher, approximation):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(reduction="sum"), make_data()
    expected = plain_factors(model, loss_fn, x, y, fisher, approximation)
    capture = watch(model, loss_fn, fisher, approximation)
    loss_fn(model(x), y).backward()
    loss_fn(model(x[:0]), y[:0]).backward()
    assert_same(factors(capture), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_half_precision_models_have_float32_factors(dtype, approximation):
    model, loss_fn, (x, y) = make_model().to(dtype), nn.CrossEntropyLoss(), make_data()
    half = plain_factors(model, loss_fn, x.to(dtype), y, "type-2", approximation)
    exact = plain_factors(model.double(), loss_fn, x.to(dtype).double(), y, "type-2", approximation)
    for name, pair in half.items():
        for one, other in zip(pair, exact[name], strict=True):
            assert one.dtype == torch.float32
            assert (one - other).norm() < 0.05 * other.norm()


def test_weights_of_half_precision_losses_are_summed_in_float32():
    """100 elements with factor 1,000: more than float16 can hold."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(2, 3).half(), nn.CrossEntropyLoss(reduction="none")
    x, y = torch.rand(100, 2).half(), torch.randint(3, (100,))
    expected = plain_factors(model, nn.CrossEntropyLoss(), x, y)
    capture = watch(model, loss_fn)
    (1000 * loss_fn(model(x), y)).sum().backward()
    assert_same(factors(capture), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_autocast(fisher, approximation):
    model, loss_fn, (x, y) = make_model().float(), nn.CrossEntropyLoss(), make_data()
    exact = plain_factors(model, loss_fn, x.float(), y, fisher, approximation)
    capture = watch(model, loss_fn, fisher, approximation)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(model(x.float()), y)
    loss.backward()
    for name, pair in factors(capture).items():
        for one, other in zip(pair, exact[name], strict=True):
            assert one.dtype == torch.float32
            assert (one - other).norm() < 0.05 * other.norm()


class Experts(nn.Module):
    """Each row goes to one of two layers; the other may get none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        chosen = x[:, 0] > 0
        y = torch.empty_like(x)
        y[chosen], y[~chosen] = self.first(x[chosen]), self.second(x[~chosen].tanh())
        return self.head(self.first(y[:0]).sum() + y)


@pytest.mark.parametrize("fisher", FISHERS)
def test_calls_on_no_rows_are_no_harm(fisher):
    model, loss_fn = Experts(), nn.CrossEntropyLoss()
    x, y = torch.rand(5, 4).double() + 1, torch.randint(3, (5,))
    plain = nn.Sequential(model.first, model.head)
    expected = plain_factors(plain, loss_fn, x, y, fisher)
    capture = watch(model, loss_fn, fisher)
    loss_fn(model(x), y).backward()
    assert not capture.bypassed
    assert_same(factors(capture), {"first": expected["0"], "head": expected["1"]})


def test_hooks_are_plain_handles():
    """Nothing else hangs on the modules: no attribute, no buffer, no wrapped forward."""
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    before = [set(vars(module)) for module in model.modules()]
    capture = watch(model, loss_fn)
    assert [set(vars(module)) for module in model.modules()] == before
    assert all(isinstance(handle, RemovableHandle) for handle in capture._handles)
    assert list(model.state_dict()) == list(make_model().state_dict())


@pytest.mark.parametrize("fisher", FISHERS)
def test_transforms_of_torch_func_are_let_be(fisher):
    """The model may be differentiated by them between forward and backward pass."""
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    results = []
    for transform in (False, True):
        capture = watch(model, loss_fn, fisher)
        loss = loss_fn(model(x), y)
        if transform:
            parameters = dict(model.named_parameters())

            def of_one(parameters, x, y):
                outputs = torch.func.functional_call(model, parameters, (x[None],))
                return loss_fn(outputs, y[None])

            gradients = torch.vmap(torch.func.grad(of_one), (None, 0, 0))(parameters, x, y)
            assert gradients["0.weight"].shape == (len(x), *model[0].weight.shape)
            torch.func.jacrev(model)(x)
        loss.backward()
        results.append(factors(capture))
        capture.close()
    assert_same(*results)


@pytest.mark.parametrize(
    ("width", "batch", "approximation", "expected"),
    [(10, 10, "expand", 1), (11, 10, "expand", 2), (25, 10, "reduce", 3), (90, 10, "expand", 4)],
)
def test_automatic_samples_fill_the_output_factor(width, batch, approximation, expected):
    """As many backward passes as rows of B over gradients in a batch, at most 4."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, width).double(), nn.MSELoss()
    capture = watch(model, loss_fn, "mc", approximation, mc_samples="auto")
    for _ in range(2):  # the second as the first
        x = torch.randn(batch, 3, dtype=torch.float64)
        loss_fn(model(x), torch.zeros(batch, width, dtype=torch.float64)).backward()
        ((_, b),) = factors(capture).values()
        assert torch.linalg.matrix_rank(b[0]) == min(width, expected * batch)


def test_automatic_samples_count_positions():
    """Shared positions give gradients of their own, unless they are summed first."""
    for approximation, expected in (("expand", 1), ("reduce", 3)):
        model, loss_fn = nn.Conv1d(2, 12, 3, padding=1).double(), nn.MSELoss()
        capture = watch(model, loss_fn, "mc", approximation, mc_samples="auto")
        x = torch.randn(4, 2, 6, dtype=torch.float64)
        loss_fn(model(x), torch.zeros(4, 12, 6, dtype=torch.float64)).backward()
        assert capture.passes == expected


@pytest.mark.parametrize(
    ("widths", "expected"),
    [((2, 9, 2), 2), ((8, 40, 8, 9), 4), ((30, 8, 17), 3), ((300, 8, 17), 1), ((80, 8, 2, 17), 1)],
)
def test_small_layers_have_no_say_in_automatic_samples(widths, expected):
    """A batch of 8; a layer is small with less than a tenth of the largest one's parameters."""
    model, loss_fn = nn.Sequential(*map(nn.Linear, widths[:-1], widths[1:])), nn.MSELoss()
    capture = watch(model, loss_fn, "mc", mc_samples="auto")
    loss_fn(model(torch.randn(8, widths[0])), torch.zeros(8, widths[-1])).backward()
    assert capture.passes == expected


def test_samples_are_a_number_or_automatic():
    for samples in (0, -1, 1.5, "many"):
        with pytest.raises(ValueError, match=f"mc_samples is {samples}"):
            watch(nn.Linear(2, 2), nn.MSELoss(), "mc", mc_samples=samples)
