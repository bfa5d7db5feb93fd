"""Specs of convolutions: what they normalise to, and what is refused."""

import numpy as np
import pytest
import torch

from kfac_tn import tn


def test_spec_is_normalised():
    spec = tn.ConvSpec((2, 4, 8, 9), (6, 2, 3, 4), padding="same", dilation=(1, 3), groups=2)
    assert spec.padding == ((1, 1), (4, 5))
    assert spec.stride == (1, 1)
    assert spec.output_shape == (2, 6, 8, 9)
    explicit = tn.ConvSpec(
        [2, 4, 8, 9], [6, 2, 3, 4], [1, 1], [[1, 1], [4, 5]], [1, 3], 2, output_padding=0
    )
    assert explicit == spec
    assert hash(explicit) == hash(spec)
    size, one = torch.rand(2, 4, 8, 9).shape, np.int64(1)
    others = tn.ConvSpec(size, (6, 2, 3, 4), one, spec.padding, (one, np.int64(3)), 2)
    assert others == spec
    assert type(others.stride[0]) is int
    whole = tn.ConvSpec(size, (6, 2, 3, 4), 1.0, spec.padding, (1, 3.0), 2.0)
    assert whole == spec
    assert {type(n) for n in (whole.groups, *whole.strides, *whole.dilations)} == {int}
    assert tn.ConvSpec((1, 2, 5), (2, 1, 2), transposed=np.bool_(True)).transposed is True
    assert tn.forward(explicit) is tn.forward(spec)
    assert tn.ConvSpec((1, 1, 5), (1, 1, 2), padding="valid").padding == ((0, 0),)
    assert tn.ConvSpec((1, 1, 5, 5), (1, 1, 2, 2), padding=(1,)).padding == ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (2,)}, "input_shape"),
        ({"input_shape": (2, 4, 0, 8)}, "input_shape"),
        ({"input_shape": (2, 4, 8)}, "input_shape=.* has 1 spatial .* has 2"),
        ({"weight_shape": (6, 3, 3, 3)}, r"weight_shape\[1\] must be 4 / 1 = 4"),
        ({"groups": 3}, "groups=3 must divide 4"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 4}, "groups=4 must divide .* the 6"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"stride": (1, 2, 3)}, "stride=.* has 3 entries for 2 dimensions"),
        ({"dilation": -1}, "dilation=-1 must be at least 1"),
        ({"padding": -1}, "padding=-1 must be at least 0"),
        ({"padding": ((0, 1), (-1, 0))}, "padding=.* must be at least 0"),
        ({"padding": ((0, 1, 2), (1, 0))}, r"a pair \(before, after\)"),
        ({"padding": (1, (0, 1))}, r"a pair \(before, after\) per dimension, here 2"),
        ({"padding": "full"}, "padding='full' is neither"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
        ({"dilation": 5}, r"5 \* \(3 - 1\) \+ 1 = 11 positions.* 0 \+ 8 \+ 0 = 8"),
        ({"padding": 8, "padding_mode": "reflect"}, "'reflect' .* 8 >= 8"),
        ({"padding": 9, "padding_mode": "circular"}, "'circular' .* 9 > 8"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror'"),
        ({"output_padding": 1}, "output_padding=1 is for transposed"),
        ({"input_shape": (2, 4, 8.5, 8)}, "input_shape=.* must be integers"),
        ({"weight_shape": (6, 4, 3, 2.9)}, "weight_shape=.* must be integers"),
        ({"groups": 1.5}, "groups=.* must be integers"),
        ({"stride": 1.5}, "stride=.* must be integers"),
        ({"dilation": (1, 1.9)}, "dilation=.* must be integers"),
        ({"padding": 0.5}, "padding=.* must be integers"),
        ({"padding": (1, 0.5)}, "padding=.* must be integers"),
        ({"padding": ((0, 0.5), (1, 1))}, "padding=.* must be integers"),
        ({"output_padding": 0.5}, "output_padding=.* must be integers"),
        ({"input_shape": 4}, "input_shape=4 must be integers"),
        ({"weight_shape": "abcd"}, "weight_shape=.* must be integers"),
        ({"stride": None}, "stride=None must be integers"),
        ({"stride": float("nan")}, "stride=.*nan.* must be integers"),
        ({"padding": None}, "padding=None must be integers"),
        ({"padding": (None, 1)}, "padding=None must be integers"),
        ({"padding": float("inf")}, "padding=.*inf.* must be integers"),
        ({"dilation": None}, "dilation=None must be integers"),
        ({"groups": None}, "groups=.*None.* must be integers"),
        ({"output_padding": None}, "output_padding=None must be integers"),
        ({"transposed": "no"}, "transposed='no' must be True or False"),
        ({"transposed": None}, "transposed=None must be True or False"),
    ],
)
def test_refused_specs(options, message):
    valid = {"input_shape": (2, 4, 8, 8), "weight_shape": (6, 4, 3, 3)}
    with pytest.raises(ValueError, match=message):
        tn.ConvSpec(**{**valid, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_shape": (6, 4, 3, 3)}, r"weight_shape\[0\] must be 4"),
        ({"output_padding": 2, "stride": 2}, r"output_padding=2 .* 2 >= max\(2, 1\)"),
        ({"padding": "same"}, "padding='same': transposed"),
        ({"padding": 5}, r"\(8 - 1\) \* 1 \+ 1 \* \(3 - 1\) \+ 0 \+ 1 - 5 - 5 = 0"),
        ({"padding": 1, "padding_mode": "circular"}, "padding_mode='circular': a transposed"),
    ],
)
def test_refused_transposed_specs(options, message):
    valid = {"input_shape": (2, 4, 8, 8), "weight_shape": (4, 6, 3, 3), "transposed": True}
    with pytest.raises(ValueError, match=message):
        tn.ConvSpec(**{**valid, **options})
