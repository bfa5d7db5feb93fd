"""Index patterns against a loop over their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_tn.tn import IndexPattern
from kfac_tn.tn.pattern import PADDING_MODES, wrap

FOLD = {
    "zeros": lambda p, size: p,
    "circular": lambda p, size: p + size if p < 0 else p - size if p >= size else p,
    "reflect": lambda p, size: -p if p < 0 else 2 * (size - 1) - p if p >= size else p,
    "replicate": lambda p, size: min(max(p, 0), size - 1),
}


@st.composite
def patterns(draw):
    size = draw(st.integers(2, 7))
    return IndexPattern(
        kernel_size=draw(st.integers(1, 3)),
        output_size=draw(st.integers(1, 3)),
        input_size=size,
        stride=draw(st.integers(1, 3)),
        dilation=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, size - 1)),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
    )


@settings(max_examples=100, deadline=None)
@given(pattern=patterns())
def test_definition(pattern):
    dense = pattern.tensor(torch.float64)
    assert dense.shape == pattern.shape
    assert dense.dtype == torch.float64
    for k in range(pattern.kernel_size):
        for o in range(pattern.output_size):
            position = o * pattern.stride + k * pattern.dilation - pattern.padding
            if position > 2 * pattern.input_size - 2:
                continue  # more than one reflection: no convolution has it
            position = FOLD[pattern.padding_mode](position, pattern.input_size)
            expected = [float(i == position) for i in range(pattern.input_size)]
            assert dense[k, o].tolist() == expected


@settings(max_examples=50, deadline=None)
@given(pattern=patterns(), axis=st.sampled_from("koi"), other=st.sampled_from("koi"))
def test_sums(pattern, axis, other):
    dense = pattern.tensor(torch.float64)
    summed = pattern.sum(axis).sum(other)
    assert summed == pattern.sum(other).sum(axis)
    assert summed.shape == tuple(summed.tensor(torch.float64).shape)
    over = sorted({"koi".index(axis), "koi".index(other)})
    assert (summed.tensor(torch.float64) == dense.sum(over)).all()


@pytest.mark.parametrize("summed", ["", "o", "ki"])
def test_windows_in_zeros_are_equal_wherever_they_are(summed):
    near, far, behind = (
        IndexPattern(2, 2, 3, stride=4, padding=padding, summed=summed) for padding in (6, 9, -5)
    )
    assert near == far
    assert not near.tensor(torch.float64).any()
    assert not behind.tensor(torch.float64).any()
    assert near.overhang == (6, -3)  # all of the input is behind what they see, or before it
    assert behind.overhang == (-3, 6)
    assert IndexPattern(2, 2, 3, stride=4, padding=5).tensor(torch.float64).any()


def test_unknown_padding_mode():
    with pytest.raises(ValueError, match="padding_mode"):
        wrap(torch.arange(3), 3, "mirror")


def test_value():
    pattern = IndexPattern(3, 4, 6)
    assert pattern == IndexPattern(3, 4, 6, stride=1)
    assert hash(pattern) == hash(IndexPattern(3, 4, 6))
    assert (str(pattern), str(pattern.sum("o"))) == ("Pi", "sum_o Pi")


@settings(max_examples=60, deadline=None)
@given(pattern=patterns(), axis=st.sampled_from("ko"))
def test_what_a_pattern_selects(pattern, axis):
    """One input position or none for each position of the legs; with several on it, `wraps`."""
    if pattern.selects:
        assert pattern.tensor(torch.float64).sum(-1).max() <= 1
    dense = pattern.tensor(torch.float64)
    assert [size for size, _ in pattern.legs] == list(dense.shape[:2])
    if not pattern.wraps:
        assert dense.sum(0).max() <= 1  # one kernel position for each output and input
        assert dense.sum(1).max() <= 1
    summed = pattern.sum(axis)
    size = {"k": pattern.kernel_size, "o": pattern.output_size}[axis]
    assert summed.selects == (size == 1)
    assert len(summed.legs) == 1
    assert not pattern.sum("i").selects


def test_negative_padding_skips_positions():
    pattern = IndexPattern(1, 2, 5, stride=2, padding=-1, summed="k")
    assert pattern.tensor(torch.float64).tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
