"""The model pass: no work where none is due, no waiting for the device, nothing held or copied."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_tn
from kfac_tn.capture import Capture
from kfac_tn.curvature.moving import MovingFactors
from kfac_tn.graph import differentiate, find
from kfac_tn.layers import partition

FISHERS = ["mc", "type-2", "empirical", "forward-only"]
APPROXIMATIONS = ["expand", "reduce"]
SYNCHRONIZING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}


class Residual(nn.Module):
    """Two convolutions and a shortcut through a third."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(self.first(x).relu_()) + self.shortcut(x)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Residual(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(4, 4, 1),  # on one position
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def make_data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 2, 8, 8, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


def watch(model, loss_fn, fisher="mc", approximation="expand", **options) -> Capture:
    blocks, others = partition(model, approximation)
    return Capture(blocks, loss_fn, fisher, diagonals=others, **options)


class Dispatched(TorchDispatchMode):
    """All operations that reach the device, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function.overloadpacket.__name__, args, result))
        return result

    @property
    def names(self):
        return Counter(name for name, _, _ in self.calls)


def step(model, loss_fn, x, y, capture=None):
    model.zero_grad()
    with Dispatched() as mode:
        loss_fn(model(x), y).backward()
        if capture is not None:
            capture.take()
    return mode


@pytest.mark.parametrize("fisher", FISHERS)
def test_no_work_on_steps_without_update(fisher):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    plain = step(model, loss_fn, x, y).names
    capture = watch(model, loss_fn, fisher)
    capture.armed = False
    assert step(model, loss_fn, x, y).names == plain
    capture.armed = True
    assert step(model, loss_fn, x, y).names != plain


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_nothing_waits_for_the_device(fisher, approximation, loss_fn):
    model, (x, y) = make_model(), make_data()
    capture = watch(model, loss_fn, fisher, approximation)
    step(model, loss_fn, x, y, capture)  # may set something up
    mode = step(model, loss_fn, x, y, capture)
    assert mode.names.keys() & SYNCHRONIZING == set()


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("samples", [1, 3])
def test_the_extra_pass_computes_no_gradient_of_a_weight(approximation, samples):
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    capture = watch(model, loss_fn, "mc", approximation, mc_samples=samples)
    mode = step(model, loss_fn, x, y, capture)
    masks = Counter(tuple(a[-1]) for name, a, _ in mode.calls if name == "convolution_backward")
    for_weights = sum(count for mask, count in masks.items() if mask[1])
    assert for_weights == 5  # the user's pass: five convolutions
    # The first convolution's output is as deep as it goes; four lie above it.
    assert masks[True, False, False] == 4 * samples


def test_gradients_pass_by():
    """At no time is more than the gradient at hand (and two of branches) in memory."""
    model, loss_fn, (x, _) = make_model(), nn.CrossEntropyLoss(), make_data()
    capture = watch(model, loss_fn)
    output = model(x)
    found = find(output, capture._key)
    alive, seen = [], []

    def receive(call, gradient):
        seen.append((call.block.name, weakref.ref(gradient)))
        alive.append(sum(reference() is not None for _, reference in seen))

    differentiate(output, torch.rand_like(output), found, receive)
    assert max(alive) <= 3
    assert [one.record.block.name for one in found if one.deepest] == ["0"]
    assert sorted(name for name, _ in seen) == sorted(b.name for b in partition(model)[0])


def test_gradients_at_records_are_those_of_autograd():
    model, (x, _) = make_model().double(), make_data()
    capture = watch(model, nn.CrossEntropyLoss())
    outputs = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output}))
    output = model(x.double())
    names = [block.name for block in partition(model)[0] if block.name != "3.first"]  # in place
    column = torch.rand_like(output)
    wanted = torch.autograd.grad(output, [outputs[n] for n in names], column, retain_graph=True)
    found, parameter = {}, model[1].weight
    (of_parameter,) = differentiate(
        output,
        column,
        find(output, capture._key),
        lambda call, gradient: found.update({call.block.name: gradient}),
        [parameter],
    )
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(found[name], gradient)
    torch.testing.assert_close(
        of_parameter, torch.autograd.grad(output, parameter, column, retain_graph=True)[0]
    )


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("fisher", FISHERS)
def test_inputs_are_not_kept_alive(fisher, approximation):
    """When backward is over, the statistics are all there is: no input, not even as a base."""
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    capture = watch(model, loss_fn, fisher, approximation)
    inputs = []
    for block in partition(model)[0]:
        block.modules[0].register_forward_pre_hook(
            lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage()))
        )
    gc.disable()
    try:
        loss_fn(model(x), y).backward()
        alive = [reference() is not None for reference in inputs]
    finally:
        gc.enable()
    assert alive == [True] + [False] * 5  # the first is the user's own
    assert len(capture.take().factors) == 6


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_the_user_may_overwrite_an_input(approximation):
    """A buffer that the next batch is read into: an average over one position is a view of it."""
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), nn.CrossEntropyLoss()
    x, y = torch.rand(4, 3, 1, 1), torch.tensor([0, 1, 1, 0])
    capture = watch(model, loss_fn, "mc", approximation)
    extended = torch.cat([x.flatten(1), torch.ones(4, 1)], dim=1)
    loss_fn(model(x), y).backward()
    x.fill_(9.0)
    (found,) = capture.take().factors.values()
    torch.testing.assert_close(found.input[0], extended.T @ extended / 4)


SIZE = 40


def large_tensors(act) -> int:
    """How many tensors of a factor's size are made."""
    with Dispatched() as mode:
        kept = act()
    results = [r for _, _, r in mode.calls if isinstance(r, torch.Tensor) and r.numel() == SIZE**2]
    del kept
    return len({result.untyped_storage().data_ptr() for result in results})


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("passes", [1, 3])
def test_factors_are_not_copied(approximation, passes):
    """One pass: just what computing the factor takes. More: one buffer for their sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, 5, bias=False), nn.Linear(5, 3, bias=False))
    loss_fn = nn.CrossEntropyLoss()
    capture = watch(model, loss_fn, "mc", approximation)
    x, y = torch.rand(7, SIZE), torch.randint(3, (7,))

    def act():
        for _ in range(passes):
            loss_fn(model(x), y).backward()
        return capture.take()

    alone = large_tensors(lambda: kfac_tn.functional.linear_input_factor(x, approximation="expand"))
    products = {"expand": passes * alone, "reduce": 0}[approximation]
    sums = 0 if (approximation, passes) == ("expand", 1) else 1
    assert large_tensors(act) <= products + sums


def test_averages_of_reduced_factors_are_moved_in_place():
    """Nothing of a factor's size is made: rows are multiplied into the average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, 5, bias=False), nn.Linear(5, 3, bias=False))
    loss_fn, x, y = nn.CrossEntropyLoss(), torch.rand(7, SIZE), torch.randint(3, (7,))
    capture = watch(model, loss_fn, "mc", "reduce")
    block = partition(model, "reduce")[0][0]
    moving = MovingFactors([block], 0.9)

    def act():
        loss_fn(model(x), y).backward()
        taken = capture.take().factors
        (mine,) = (f for b, f in taken.items() if b.name == block.name)
        moving.update({block: mine})
        return mine

    act()  # makes the averages
    storage = moving.input.untyped_storage().data_ptr()
    kept = act()
    with Dispatched() as mode:
        act()
    made = {
        result.untyped_storage().data_ptr()
        for _, _, result in mode.calls
        if isinstance(result, torch.Tensor) and result.numel() == SIZE**2
    }
    assert made == {storage}
    torch.testing.assert_close(kept.input[0], x.T @ x / 7)


def test_optimizer_steps_without_update_are_free_of_curvature():
    """Beside a step without hooks: no operation in forward and backward."""
    model, loss_fn, (x, y) = make_model(), nn.CrossEntropyLoss(), make_data()
    plain = step(model, loss_fn, x, y).names
    optimizer = kfac_tn.KFAC(model, loss_fn, factor_interval=100, inverse_interval=100)
    quiet = 0
    for _ in range(12):
        optimizer.zero_grad()
        quiet += step(model, loss_fn, x, y).names == plain
        optimizer.step()
    assert quiet >= 2
