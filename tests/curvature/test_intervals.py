"""Intervals from a budget: the arithmetic, and what becomes of it in training."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kfac_tn
from kfac_tn.curvature.intervals import LONGEST, Pace, Work, intervals, layer_work
from kfac_tn.layers import partition


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Tanh(), nn.Flatten()),
        nn.Linear(4 * 36, 3, bias=False),
    )


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("fisher", "passes"), [("mc", 1), ("type-2", 2), ("forward-only", 0)])
def test_work_is_that_of_torchs_flop_counter(approximation, fisher, passes):
    """The model's passes (the first layer's input needs no gradient), and the factors."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    x, y = torch.rand(8, 2, 6, 6, requires_grad=True), torch.randint(3, (8,))
    options = {"factor_interval": "auto", "inverse_interval": "auto", "fisher": fisher}
    optimizer = kfac_tn.KFAC(model, loss_fn, approximation=approximation, **options)
    capture = optimizer._estimator.capture
    loss_fn(model(x), y).backward()
    assert capture.passes == passes
    blocks = optimizer._estimator.blocks
    assert capture.sizes == {blocks[0]: (8, 8 * 36), blocks[1]: (8, 8)}
    works = {b: layer_work(b, *size, capture.passes) for b, size in capture.sizes.items()}
    optimizer.close()
    with FlopCounterMode(display=False) as counter:
        loss_fn(model(x), y).backward()
    assert sum(work.model for work in works.values()) == counter.get_total_flops()
    conv, linear = works.values()
    rows = 8 * 36 if approximation == "expand" else 8
    assert conv.statistics == 2 * rows * (18**2 + passes * 4**2) + passes * conv.model / 3
    assert linear.statistics == 2 * 8 * (144**2 + passes * 3**2) + passes * linear.model / 3
    assert linear.products == 2 * (144 * 3 * 3 + 144 * 144 * 3)


@pytest.mark.parametrize("overhead", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("products", [0.0, 10.0])
def test_the_budget_is_kept(overhead, products):
    work = Work(model=1000.0, products=products, statistics=3000.0, inverses=9000.0)
    statistics, inverses = intervals(work, overhead)
    spent = work.statistics / statistics + work.inverses / inverses + products
    assert spent <= overhead * work.model
    rarer = work.statistics / (statistics - 1) + work.inverses / (inverses - 1) + products
    assert rarer > 0.9 * overhead * work.model


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Work(model=1000.0, products=1e9, statistics=25.0, inverses=50.0), (1, 2)),
        (Work(model=1000.0), (1, 1)),
        (Work(model=1.0, statistics=1e9, inverses=1e9), (LONGEST, 2 * LONGEST)),
        (Work(), (LONGEST, 2 * LONGEST)),
    ],
)
def test_extremes(work, expected):
    assert intervals(work, 0.25) == expected


def run(model, optimizer, loss_fn, steps, start=0, n=16):
    seen = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(n, 2, 6, 6, generator=generator)
        y = torch.randint(3, (n,), generator=generator)
        optimizer.zero_grad()
        if optimizer._estimator.capture.armed:
            seen.append(step)
        loss_fn(model(x), y).backward()
        optimizer.step()
    return seen


def make(**options):
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    auto = {"factor_interval": "auto", "inverse_interval": "auto", **options}
    return model, kfac_tn.KFAC(model, loss_fn, **auto), loss_fn


def test_training_is_dense_first_then_as_sparse_as_the_budget_says():
    model, optimizer, loss_fn = make(overhead=1.0)
    seen = run(model, optimizer, loss_fn, 500)
    interval = optimizer._estimator.intervals[0]
    (first, *_), (last, *_) = seen[:1], seen[-1:]
    assert 2 < interval < 100
    assert seen[:4] == [0, 1, 2, 3]
    assert first == 0
    assert last - seen[-2] == interval
    sparse = make(overhead=0.25)
    run(*sparse[:2], sparse[2], 1)
    assert sparse[1]._estimator.intervals[0] > interval
    large = make(overhead=1.0)
    run(*large[:2], large[2], 1, n=64)
    assert large[1]._estimator.intervals[1] < optimizer._estimator.intervals[1]


@pytest.mark.parametrize("mixed", [{}, {"factor_interval": 7}, {"inverse_interval": 9}])
def test_one_may_be_given_and_both_continue_from_a_checkpoint(mixed):
    model, optimizer, loss_fn = make(**mixed)
    run(model, optimizer, loss_fn, 11)
    given = (mixed.get("factor_interval"), mixed.get("inverse_interval"))
    for interval, expected in zip(optimizer._estimator.intervals, given, strict=True):
        assert expected in (None, interval)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    twin, twin_optimizer, twin_loss = make(**mixed)
    twin.load_state_dict(states[0])
    twin_optimizer.load_state_dict(states[1])
    assert twin_optimizer._estimator.intervals == optimizer._estimator.intervals
    expected = run(model, optimizer, loss_fn, 20, start=11)
    assert run(twin, twin_optimizer, twin_loss, 20, start=11) == expected
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor_interval": "often"}, "factor_interval is 'often'"),
        ({"inverse_interval": 0}, "inverse_interval is 0"),
        ({"overhead": 0.0}, "overhead is 0.0"),
        ({"noise_damping": -1.0}, "noise_damping is -1.0"),
        ({"noise_damping": float("nan")}, "noise_damping is nan"),
        ({"noise_damping": "much"}, "noise_damping is 'much'"),
        ({"noise_damping": 1.0, "damping_split": "exact"}, "noise_damping=1.0 is for layers"),
        ({"noise_damping": 1.0, "curvature": "ekfac"}, "noise_damping=1.0 is for layers"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_grouped_layers_count_each_group():
    (grouped,), _ = partition(nn.Conv1d(4, 8, 1, groups=4, bias=False))
    (single,), _ = partition(nn.Conv1d(1, 2, 1, bias=False))
    one, four = layer_work(single, 3, 6, 1), layer_work(grouped, 3, 6, 1)
    for name in ("model", "products", "statistics", "inverses"):
        assert getattr(four, name) == 4 * getattr(one, name)


@pytest.mark.parametrize("exact", [False, True])
def test_work_of_other_kinds_of_curvature(exact):
    """EKFAC costs more than exact damping, a diagonal needs no inverse, pieces cost their share."""

    def work(**options):
        (block,), _ = partition(torch.nn.Linear(63, 64), **options)
        return layer_work(block, 8, 24, 2, exact)

    kfac, ekfac, diagonal = (work(curvature=kind) for kind in ("kfac", "ekfac", "diagonal"))
    assert kfac.model == ekfac.model == diagonal.model
    assert ekfac.statistics > kfac.statistics
    assert (
        ekfac.inverses
        == layer_work(partition(torch.nn.Linear(63, 64))[0][0], 8, 24, 2, True).inverses
    )
    assert diagonal.inverses == 0 < diagonal.products < kfac.products
    halves = work(max_dim=32, large_factors="blocks")
    assert halves.products * 2 == kfac.products
    assert halves.inverses < kfac.inverses
    assert work(max_dim=32).inverses < halves.inverses


FIELDS = ("model", "products", "statistics", "inverses")


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv1d(3, 4, 2), nn.Linear(600, 500)])
def test_launches_count_per_layer_and_elements_per_size(layer):
    """What is small costs as much in a layer of any size; what is read grows with it."""
    (block,), _ = partition(layer)
    plain = layer_work(block, 3, 6, 1)
    launches = layer_work(block, 3, 6, 1, pace=Pace(launch=1.0))
    (tiny,), _ = partition(nn.Linear(1, 1))
    expected = [
        getattr(layer_work(tiny, 3, 6, 1, pace=Pace(launch=1.0)), name)
        - getattr(layer_work(tiny, 3, 6, 1), name)
        for name in FIELDS
    ]
    added = [getattr(launches, name) - getattr(plain, name) for name in FIELDS]
    assert added == pytest.approx(expected)
    assert min(added) > 0
    entries = layer_work(block, 3, 6, 1, pace=Pace(element=1.0)).products - plain.products
    size = block.weight.numel() + block.bias.numel()
    assert entries == pytest.approx(4 * size)


def test_slow_linear_layers_leave_more_budget():
    """Only the model's own products and factorizations are torch's BLAS'."""
    (linear,), _ = partition(nn.Linear(300, 200, bias=False))
    (conv,), _ = partition(nn.Conv1d(300, 200, 1, bias=False))
    for block, factor in ((linear, 3.0), (conv, 1.0)):
        plain, slow = (layer_work(block, 8, 64, 0, pace=Pace(blas=blas)) for blas in (1.0, 3.0))
        assert slow.model == pytest.approx(factor * plain.model)
        assert slow.inverses == pytest.approx(3 * plain.inverses)
        assert (slow.products, slow.statistics) == (plain.products, plain.statistics)
