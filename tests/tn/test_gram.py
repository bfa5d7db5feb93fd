"""Gram matrices of windows: every method exact for every option, and each taken where it pays."""

import itertools
import sys
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn import gemm
from kfac_tn.tn import plan as plan_module
from kfac_tn.tn.gram import METHODS, WindowGram, Windows
from kfac_tn.tn.gram import unfolding as unfolding_module
from kfac_tn.tn.gram.correlations import cells_of_taps
from kfac_tn.tn.gram.step import applies
from kfac_tn.tn.gram.windows import joint_cells, offsets_and_cells
from kfac_tn.tn.machine import MACHINES


@st.composite
def windows(draw, kernel=5, output=7):
    """Windows that may begin before an axis and end after it, or leave positions over."""
    kernel_size, output_size = draw(st.integers(1, kernel)), draw(st.integers(1, output))
    stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    start = draw(st.integers(-4, 2))
    end = start + (output_size - 1) * stride + (kernel_size - 1) * dilation + 1
    size = max(1, end + draw(st.integers(-4, 2)))
    return Windows(start, kernel_size, output_size, stride, dilation, size)


def positions(window, k):
    return [
        window.start + o * window.stride + k * window.dilation for o in range(window.output_size)
    ]


@given(windows())
def test_cells_hold_each_pair_of_positions_once_but_for_zeros(window):
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for cells in offsets_and_cells(window).values():
        for cell in cells:
            for pair in cell.blocks:
                found.setdefault(pair, []).extend(
                    (cell.first + m * window.stride, cell.second + m * window.stride)
                    for m in range(cell.count)
                )
    inside = range(window.size)
    for k, other in itertools.product(range(window.kernel_size), repeat=2):
        pairs = zip(positions(window, k), positions(window, other), strict=True)
        expected = [pair for pair in pairs if pair[0] in inside and pair[1] in inside]
        assert sorted(found.get((k, other), [])) == expected


@given(windows())
def test_cells_of_taps_hold_each_position_once_but_for_zeros(window):
    found: dict[int, list[int]] = {}
    for first, count, taps in cells_of_taps(window):
        for k in taps:
            found.setdefault(k, []).extend(first + m * window.stride for m in range(count))
    for k in range(window.kernel_size):
        expected = [p for p in positions(window, k) if p in range(window.size)]
        assert sorted(found.get(k, [])) == expected


@given(st.lists(windows(), min_size=1, max_size=2))
def test_an_offset_and_its_reverse_are_met_once(several):
    several = tuple(w._replace(start=0, size=100) for w in several)  # no zeros
    blocks = [
        pairs
        for cell in joint_cells(several)
        for pairs in cell.blocks
        for pairs in ([pairs, pairs[::-1]] if cell.mirrored else [pairs])
    ]
    assert len(set(blocks)) == prod(window.kernel_size**2 for window in several)


def unfolded(x, several):
    """Rows of windows, by indexing with zeros around: `[shared, channels * kernels, columns]`."""
    for axis, w in reversed(list(enumerate(several, start=3))):
        index = torch.tensor([positions(w, k) for k in range(w.kernel_size)])
        inside = (index >= 0) & (index < w.size)
        x = x.index_select(axis, index.clamp(0, w.size - 1).flatten())
        x = x * inside.flatten().view(-1, *[1] * (x.ndim - axis - 1))
        x = x.unflatten(axis, (w.kernel_size, w.output_size))
    kernels = [3 + 2 * j for j in range(len(several))]
    x = x.movedim([2, *kernels], list(range(1, 2 + len(several))))
    return x.flatten(2 + len(several)).flatten(1, 1 + len(several))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))  # some methods apply rarely
@given(st.data())
def test_equals_a_product_of_unfolded_tensors(method, data):
    dimensions = data.draw(st.integers(1, 3))
    limits = {1: (5, 7), 2: (4, 5), 3: (2, 3)}[dimensions]
    several = tuple(data.draw(windows(*limits)) for _ in range(dimensions))
    channels = data.draw(st.integers(1, 3))
    assume(applies(method, channels, several))
    shape = (2, data.draw(st.integers(1, 3)), channels, *(w.size for w in several))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    least = data.draw(st.sampled_from([1, unfolding_module.LEAST_CHUNK]))
    rows = unfolded(x, several)
    with pytest.MonkeyPatch.context() as patch:  # small tensors in chunks, too
        patch.setattr("kfac_tn.tn.gram.unfolding.LEAST_CHUNK", least)
        patch.setattr("kfac_tn.tn.gram.blocks.LEAST_CHUNK", least)
        patch.setattr("kfac_tn.tn.gram.correlations.LEAST_CHUNK", least)
        patch.setattr("kfac_tn.tn.gram.correlations.STRETCH", data.draw(st.sampled_from([2, 28])))
        patch.setattr("kfac_tn.tn.gram.symmetric.BLOCK", data.draw(st.sampled_from([2, 128])))
        patch.setattr("kfac_tn.tn.gram.symmetric.LEAST_SUM", data.draw(st.sampled_from([1, 256])))
        patch.setattr("kfac_tn.tn.gram.symmetric.LEAST_ELEMENTS", 1)
        actual = METHODS[method](x, several)
    torch.testing.assert_close(actual, rows @ rows.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 5, 3, 70), (2, 5, 3, 1), (2, 1, 3, 9), (1, 4, 300, 256)])
def test_without_windows(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = x.movedim(2, 1).flatten(2)
    torch.testing.assert_close(METHODS["unfolding"](x, ()), rows @ rows.mT, rtol=1e-12, atol=1e-12)


CONVOLUTIONS = {
    "3x3": ((8, 32, 28, 28), 3, {"padding": 1}, "lags"),
    "3x3 grouped": ((8, 64, 28, 28), 3, {"padding": 1, "groups": 2}, "lags"),
    "3x3, many examples": ((64, 128, 14, 14), 3, {"padding": 1}, "spectra"),
    "5x5 dilated": ((4, 64, 28, 28), 5, {"dilation": 2, "padding": 4}, "lags"),
    "small": ((32, 256, 4, 4), 3, {"padding": 1}, "cells"),
    "depthwise": ((4, 128, 28, 28), 7, {"padding": 3, "groups": 128}, "correlations"),
    "pointwise": ((4, 32, 20, 20), 1, {}, "unfolding"),
    "few channels": ((2, 3, 32, 32), 7, {"padding": 3, "stride": 2}, "unfolding"),
    "no overlap": ((4, 32, 24, 24), 4, {"stride": 4}, "unfolding"),
}


def expand_network(name):
    shape, kernel_size, options, _ = CONVOLUTIONS[name]
    groups = options.get("groups", 1)
    weight_shape = (groups, shape[1] // groups, kernel_size, kernel_size)
    return tn.kfac_expand_input_factor(tn.ConvSpec(shape, weight_shape, **options)).simplify()


@pytest.fixture(params=sorted(set(MACHINES) - {"cuda"}))
def processor(request, monkeypatch):
    """Each kind that there are constants for; plans made before are forgotten, and those for it."""
    for cache in (plan_module._recipe, plan_module._recipes):
        cache.cache_clear()
    monkeypatch.setattr(gemm, "PROCESSOR", request.param)
    monkeypatch.setattr(gemm, "SUITS_BLAS", request.param == "intel")
    monkeypatch.setattr(gemm, "LEAST_COPY", sys.maxsize if request.param == "zen4" else 96)
    yield
    for cache in (plan_module._recipe, plan_module._recipes):
        cache.cache_clear()


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_planner_takes_what_pays_on_every_processor(name):
    instructions = expand_network(name).plan().instructions
    (gram,) = (i.step for i in instructions if isinstance(i.step, WindowGram))
    assert gram.method == CONVOLUTIONS[name][3]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_all_algorithms_agree(name):
    shape, kernel_size, options, _ = CONVOLUTIONS[name]
    groups = options.get("groups", 1)
    network = expand_network(name)
    recipe = network.plan()
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spatial = {key: value for key, value in options.items() if key != "groups"}
    columns = F.unfold(x, kernel_size, **spatial)
    rows = columns.unflatten(1, (groups, -1)).transpose(0, 1).transpose(1, 2).flatten(2)
    expected = rows @ rows.mT / rows.shape[-1]
    for algorithm in (None, recipe.algorithm, *(other.algorithm for other in recipe.others)):
        actual = network.evaluate(input=x, algorithm=algorithm)
        assert (actual - expected).norm() < 1e-12 * expected.norm(), algorithm


def test_explain_names_the_choice_first(monkeypatch):
    network = expand_network("3x3")
    lines = network.plan().explain().splitlines()
    assert lines[0].split()[:2] == ["algorithm", "estimate"]
    first, *others = (line.split()[0] for line in lines[1:5])
    assert first == "lags"
    assert sorted(others) == ["cells", "spectra", "unfolding"]
    assert lines[5].startswith("  [")
    assert "WindowGram" in lines[5]
    estimates = [float(line.split()[1]) for line in lines[1:5]]
    assert estimates == sorted(estimates)
    assert network.plan("unfolding").algorithm == "unfolding"
    monkeypatch.setenv("KFAC_TN_ALGORITHM", "unfolding")
    assert network.plan().algorithm == "unfolding"
    assert network.plan("cells").algorithm == "cells"  # an argument goes first
    assert tn.forward(tn.ConvSpec((2, 3, 5), (2, 3, 1))).simplify().plan()  # applies nowhere else


def test_algorithms_that_do_not_apply_are_refused(monkeypatch):
    network = expand_network("pointwise")
    x = torch.rand(4, 32, 20, 20)
    with pytest.raises(ValueError, match="'cells' doesn't apply to this network: choose one of"):
        network.evaluate(input=x, algorithm="cells")
    with pytest.raises(ValueError, match=r"'fastest'.* is unknown: choose one of"):
        network.evaluate(input=x, algorithm="fastest")
    monkeypatch.setenv("KFAC_TN_ALGORITHM", "quick")
    with pytest.raises(ValueError, match="KFAC_TN_ALGORITHM"):
        network.evaluate(input=x)


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_bounded(method):
    """Beside the result at most as much as the tensor takes, a copy laid out for it included."""
    sizes = {"correlations": (64, 8, 1, 56, 56), "positions": (512, 64, 1, 7, 7)}
    x = torch.rand(sizes.get(method, (1, 8, 64, 56, 56)))
    window = Windows(-1, 3, x.shape[-1], 1, 1, x.shape[-1])
    most = _peak(lambda: METHODS[method](x, (window, window)))
    assert most <= 2.3 * x.numel()


def _peak(call):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / result.element_size() - result.numel()


@pytest.mark.parametrize("name", ["3x3", "3x3, many examples", "depthwise", "few channels"])
def test_differentiable_and_under_vmap(name):
    network = expand_network(name)
    shape = CONVOLUTIONS[name][0]
    _, kernel_size, options, _ = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    algorithm = CONVOLUTIONS[name][3]
    evaluate = lambda one: network.evaluate(input=one, algorithm=algorithm)  # noqa: E731
    batched = torch.vmap(evaluate)(x)
    assert torch.allclose(batched[1], evaluate(x[1]), rtol=1e-12)
    y = x[0].clone().requires_grad_()
    trace = evaluate(y).diagonal(dim1=1, dim2=2).sum()
    (gradient,) = torch.autograd.grad(trace, y)
    # The trace is the mean of squares over windows: its gradient is x times how often x is used.
    options = {key: value for key, value in options.items() if key != "groups"}
    ones = torch.ones(1, 1, *shape[2:], dtype=torch.float64)
    columns = F.unfold(ones, kernel_size, **options)
    uses = F.fold(columns, shape[2:], kernel_size, **options)
    examples = shape[0] * columns.shape[-1]
    assert torch.allclose(gradient, 2 * y.detach() * uses / examples, rtol=1e-12)
