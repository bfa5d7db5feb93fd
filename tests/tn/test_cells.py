"""The doubled pattern by offsets and cells: exact for every option, and taken where it pays."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn.cells import WindowGram, joint_cells, offsets_and_cells
from kfac_tn.tn.plan import recipe

windows = st.tuples(
    st.integers(0, 2), st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3)
)


@given(windows)
def test_cells_tell_each_pair_of_positions_apart_once(window):
    start, kernel_size, output_size, stride, dilation = window
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for cells in offsets_and_cells(window).values():
        for cell in cells:
            for pair in cell.blocks:
                found.setdefault(pair, []).extend(
                    (cell.first + m * stride, cell.second + m * stride) for m in range(cell.count)
                )
    for k, other in itertools.product(range(kernel_size), repeat=2):
        expected = [
            (start + o * stride + k * dilation, start + o * stride + other * dilation)
            for o in range(output_size)
        ]
        assert sorted(found[k, other]) == expected


@given(st.lists(windows, min_size=1, max_size=2))
def test_an_offset_and_its_reverse_are_met_once(several):
    blocks = [
        pairs
        for cells, mirrored in joint_cells(tuple(several))
        for pairs in {
            tuple(zip(*p, strict=True)) for p in itertools.product(*(c.blocks for c in cells))
        }
        for pairs in ([pairs, pairs[::-1]] if mirrored else [pairs])
    ]
    assert len(set(blocks)) == prod(kernel_size**2 for _, kernel_size, *_ in several)


@settings(max_examples=80)
@given(st.data())
def test_equals_unfolding(data):
    dimensions = data.draw(st.integers(1, 3))
    several = tuple(data.draw(windows) for _ in range(dimensions))
    if dimensions == 3:
        several = tuple((a, min(k, 2), min(o, 3), s, d) for a, k, o, s, d in several)
    sizes = [
        a + (o - 1) * s + (k - 1) * d + 1 + data.draw(st.integers(0, 1))
        for a, k, o, s, d in several
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, *sizes, 2, generator=generator, dtype=torch.float64)  # g, c, ..., n
    axes = ((0,), (dimensions + 2,), tuple(range(2, dimensions + 2)), (1,))
    view = x
    for axis, (a, k, o, s, d) in reversed(list(enumerate(several, start=2))):
        index = a + torch.arange(k)[:, None] * d + torch.arange(o) * s
        view = view.index_select(axis, index.flatten()).unflatten(axis, (k, o))
    rows = view.movedim([2 + 2 * j for j in range(dimensions)], list(range(2, dimensions + 2)))
    rows = rows.flatten(dimensions + 2).flatten(1, dimensions + 1)
    expected = rows @ rows.mT
    actual = WindowGram(axes, several)(x).reshape(expected.shape)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


CONVOLUTIONS = {
    "3x3": ((8, 32, 28, 28), 3, {"padding": 1}, True),
    "3x3 grouped": ((4, 64, 20, 20), 3, {"padding": 1, "groups": 2}, True),
    "5x5 dilated": ((4, 64, 28, 28), 5, {"dilation": 2}, True),
    "pointwise": ((4, 32, 20, 20), 1, {}, False),
    "few channels": ((2, 3, 32, 32), 7, {"padding": 3, "stride": 2}, False),
    "no overlap": ((4, 32, 24, 24), 4, {"stride": 4}, False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_planner_takes_cells_where_they_pay(name):
    shape, kernel_size, options, pays = CONVOLUTIONS[name]
    groups = options.get("groups", 1)
    weight_shape = (groups, shape[1] // groups, kernel_size, kernel_size)
    network = tn.kfac_expand_input_factor(tn.ConvSpec(shape, weight_shape, **options)).simplify()
    taken = [type(i.step).__name__ for i in recipe(network).instructions]
    assert ("WindowGram" in taken) == pays
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spatial = {key: value for key, value in options.items() if key != "groups"}
    columns = F.unfold(x, kernel_size, **spatial)
    rows = columns.unflatten(1, (groups, -1)).transpose(0, 1).transpose(1, 2).flatten(2)
    expected = rows @ rows.mT / rows.shape[-1]
    actual = network.evaluate(input=x)
    assert (actual - expected).norm() < 1e-12 * expected.norm()


def test_differentiable_and_under_vmap():
    spec = tn.ConvSpec((4, 48, 20, 20), (1, 48, 3, 3), padding=1)
    network = tn.kfac_expand_input_factor(spec).simplify()
    assert any(type(i.step) is WindowGram for i in recipe(network).instructions)
    x = torch.rand(3, 4, 48, 20, 20, dtype=torch.float64)
    batched = torch.vmap(lambda one: network.evaluate(input=one))(x)
    assert torch.allclose(batched[1], network.evaluate(input=x[1]), rtol=1e-12)
    y = x[0].clone().requires_grad_()
    trace = network.evaluate(input=y).diagonal(dim1=1, dim2=2).sum()
    (gradient,) = torch.autograd.grad(trace, y)
    # The trace is the mean of squares over windows: its gradient is x times how often x is used.
    ones = torch.ones(1, 1, 20, 20, dtype=torch.float64)
    uses = F.fold(F.unfold(ones, 3, padding=1), (20, 20), 3, padding=1)
    assert torch.allclose(gradient, 2 * y.detach() * uses / (4 * 400), rtol=1e-12)
