"""Factors of one layer against plain unfolding and against other packages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kfac_tn import functional
from kfac_tn.functional import common, networks
from kfac_tn.tn.gram import symmetric

torch.set_num_threads(1)
MODES = ("zeros", "circular", "reflect", "replicate")


def unfolded(x, kernel_size, stride, padding, dilation, groups, mode):
    """Reference: pad, then slice every window. [N, groups, d, positions]."""
    dimensions = x.ndim - 2
    sides = [side for pair in reversed(padding) for side in pair]
    x = F.pad(x, sides, mode="constant" if mode == "zeros" else mode)
    for axis in range(2, 2 + dimensions):
        k, s, d = kernel_size[axis - 2], stride[axis - 2], dilation[axis - 2]
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    windows = x.flatten(2 + dimensions)  # [N, C, *O, K]
    windows = windows.flatten(2, 1 + dimensions).mT  # [N, C, K, O]
    return windows.reshape(len(x), groups, -1, windows.shape[-1])


def reference(columns, approximation, bias):
    if bias:
        columns = torch.cat([columns, torch.ones_like(columns[:, :, :1])], 2)
    if approximation == "reduce":
        columns = columns.mean(-1, keepdim=True)
    scale = len(columns) * columns.shape[-1]
    return torch.einsum("ngap,ngbp->gab", columns, columns) / scale


@st.composite
def convolutions(draw):
    dimensions = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    size, stride, dilation = each(4, 7), each(1, 3), each(1, 2)
    kernel = tuple(
        min(k, (s - 1) // d + 1) for k, s, d in zip(each(1, 3), size, dilation, strict=True)
    )
    before, after = each(0, 2), each(0, 2)
    groups = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), groups * draw(st.integers(1, 2)), *size)
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mode = draw(st.sampled_from(MODES))
    return x, kernel, stride, tuple(zip(before, after, strict=True)), dilation, groups, mode


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [False, True])
@settings(max_examples=30, deadline=None)
@given(convolution=convolutions())
def test_conv_input_factor(approximation, bias, convolution):
    x, *geometry, mode = convolution
    factor = functional.conv_input_factor(
        x, *geometry, approximation=approximation, padding_mode=mode, bias=bias
    )
    expected = reference(unfolded(x, *geometry, mode), approximation, bias)
    torch.testing.assert_close(factor, expected, rtol=1e-12, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(convolution=convolutions())
def test_conv_average_input(convolution):
    x, *geometry, mode = convolution
    rows = functional.conv_average_input(x, *geometry, padding_mode=mode, bias=True)
    expected = unfolded(x, *geometry, mode).mean(-1)
    torch.testing.assert_close(rows[..., :-1], expected, rtol=1e-12, atol=1e-14)
    assert (rows[..., -1] == 1).all()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel_size", [2, 3, (4, 3)])
def test_padding_same_and_modes_agree_with_torch_modules(kernel_size, mode):
    """The unfolded vectors are those that torch's module multiplies its weight with."""
    x = torch.rand(2, 3, 7, 6, dtype=torch.float64)
    layer = torch.nn.Conv2d(3, 4, kernel_size, padding="same", padding_mode=mode).double()
    rows = functional.conv_average_input(
        x, kernel_size, padding="same", padding_mode=mode, bias=True
    )
    weight = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
    expected = layer(x).mean((2, 3))
    torch.testing.assert_close(rows[:, 0] @ weight.T, expected, rtol=1e-12, atol=1e-14)


def test_depthwise_is_every_channel_alone():
    x = torch.rand(2, 5, 8, 8, dtype=torch.float64)
    together = functional.conv_input_factor(x, 3, padding=1, groups=5)
    alone = [functional.conv_input_factor(x[:, c : c + 1], 3, padding=1) for c in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_splitting_the_batch_changes_nothing(approximation):
    x = torch.rand(6, 4, 7, 7, dtype=torch.float64)
    g = torch.rand(6, 4, 5, 5, dtype=torch.float64)
    options = {"groups": 2, "approximation": approximation}

    A = functional.conv_input_factor(x, 3, **options, bias=True)
    parts = [functional.conv_input_factor(p, 3, **options, bias=True) for p in x.split(2)]
    torch.testing.assert_close(sum(parts) / 3, A, rtol=1e-12, atol=0)
    B = functional.conv_grad_output_factor(g, **options)
    parts = [functional.conv_grad_output_factor(p, **options) for p in g.split(4)]
    torch.testing.assert_close(sum(parts), B, rtol=1e-12, atol=0)


@pytest.mark.parametrize("budget", [1, 2000, 20_000])
def test_chunks_change_nothing(monkeypatch, budget):
    x = torch.rand(7, 4, 6, 6, dtype=torch.float64)
    g = torch.rand(7, 8, 2, 2, dtype=torch.float64)
    A = functional.conv_input_factor(x, 3, groups=2)
    B = functional.conv_grad_output_factor(g)
    monkeypatch.setattr(common, "UNFOLD_BYTES", budget)
    torch.testing.assert_close(functional.conv_input_factor(x, 3, groups=2), A, rtol=1e-12, atol=0)
    torch.testing.assert_close(functional.conv_grad_output_factor(g), B, rtol=1e-12, atol=0)


SHAPES = [(3, 8, 5), (3, 8, 1, 2), (2, 4, 3, 3, 3), (3, 64, 2, 3), (40, 512, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_conv_grad_output_factor(shape, groups, approximation):
    g = torch.rand(shape, dtype=torch.float64)
    columns = g.reshape(shape[0], groups, shape[1] // groups, -1)
    if approximation == "reduce":
        columns = columns.sum(-1, keepdim=True)
    factor = functional.conv_grad_output_factor(g, groups, approximation)
    expected = torch.einsum("ngap,ngbp->gab", columns, columns)
    torch.testing.assert_close(factor, expected, rtol=1e-12, atol=0)
    channels_last = g.movedim(1, -1).contiguous().movedim(-1, 1)
    factor = functional.conv_grad_output_factor(channels_last, groups, approximation)
    torch.testing.assert_close(factor, expected, rtol=1e-12, atol=0)


LINEAR_SHAPES = [(4, 5), (4, 3, 5), (7, 2, 3, 5), (4, 3, 50), (50, 4, 300), (150, 256), (3, 300)]


@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_factors(shape, contiguous, approximation, bias):
    x = torch.rand(shape, dtype=torch.float64)
    if not contiguous:
        x = x.mT.contiguous().mT
    columns = x.reshape(len(x), 1, -1, shape[-1]).mT
    factor = functional.linear_input_factor(x, approximation, bias)
    expected = reference(columns, approximation, bias)
    torch.testing.assert_close(factor, expected, rtol=1e-12, atol=0)

    if approximation == "reduce":
        columns = columns.sum(-1, keepdim=True)
    expected = torch.einsum("ngap,ngbp->gab", columns, columns)
    factor = functional.linear_grad_output_factor(x, approximation)
    torch.testing.assert_close(factor, expected, rtol=1e-12, atol=0)


def test_linear_is_a_pointwise_convolution():
    x = torch.rand(3, 4, 6, dtype=torch.float64)
    for approximation in functional.APPROXIMATIONS:
        torch.testing.assert_close(
            functional.linear_input_factor(x.mT, approximation, bias=True),
            functional.conv_input_factor(x, 1, approximation=approximation, bias=True),
        )
        torch.testing.assert_close(
            functional.linear_grad_output_factor(x.mT, approximation),
            functional.conv_grad_output_factor(x, approximation=approximation),
        )


def everything(x):
    """All factors of a tensor [N, 4, 5, 5]."""
    for approximation in functional.APPROXIMATIONS:
        yield functional.conv_input_factor(x, 3, approximation=approximation, bias=True)
        yield functional.conv_grad_output_factor(x, approximation=approximation)
        yield functional.linear_input_factor(x, approximation=approximation, bias=True)
        yield functional.linear_grad_output_factor(x, approximation=approximation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    # 40,000 positions of ones: sums leave float16's range and bfloat16's precision.
    x = torch.ones(2, 4, 100, 200).to(dtype)
    for half, single in zip(everything(x), everything(x.float()), strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, single, rtol=1e-6, atol=0)


def test_autocast_lowers_nothing():
    x = torch.rand(3, 4, 5, 5)
    expected = list(everything(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for factor, without in zip(everything(x), expected, strict=True):
            torch.testing.assert_close(factor, without, rtol=0, atol=0)


@pytest.mark.parametrize("block", [symmetric.BLOCK, 2])
def test_differentiable(monkeypatch, block):
    monkeypatch.setattr(symmetric, "BLOCK", block)
    monkeypatch.setattr(symmetric, "LEAST_SUM", block)
    monkeypatch.setattr(symmetric, "LEAST_ELEMENTS", block)
    x = torch.rand(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(everything(x)), x)


@pytest.mark.parametrize("rows", [1030, 1200])
@pytest.mark.parametrize("size", [256, 300, 512])
def test_gram_in_blocks_is_the_plain_one_and_symmetric(rows, size):
    x = torch.rand(rows, 2, size, dtype=torch.float64)
    gram = functional.gram(x)
    expected = torch.einsum("nga,ngb->gab", x, x)
    torch.testing.assert_close(gram, expected, rtol=1e-12, atol=0)
    assert (gram[:, :100, -100:] == gram[:, -100:, :100].mT).all()


COMPILED = {
    "conv_input_factor": lambda x, a: functional.conv_input_factor(
        x, [3, 2], stride=2, padding=[1, 0], groups=2, approximation=a, bias=True
    ),
    "conv_grad_output_factor": lambda x, a: functional.conv_grad_output_factor(x, 2, a),
    "linear_input_factor": lambda x, a: functional.linear_input_factor(x, a, bias=True),
    "linear_grad_output_factor": functional.linear_grad_output_factor,
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("approximation", functional.APPROXIMATIONS)
def test_compiled_in_one_graph_before_anything_is_cached(name, approximation, monkeypatch):
    """Also for other numbers of examples, for which the compiler has symbols, and in chunks."""
    torch.compiler.reset()
    networks._network.cache_clear()
    compiled = torch.compile(COMPILED[name], backend="eager", fullgraph=True)
    for count in (2, 3, 5):
        x = torch.rand(count, 4, 6, 7, dtype=torch.float64)
        actual = compiled(x, approximation)
        torch.testing.assert_close(actual, COMPILED[name](x, approximation), rtol=1e-12, atol=0)
        monkeypatch.setattr(common, "UNFOLD_BYTES", 4000)


def test_inputs_are_left_alone():
    x = torch.rand(3, 4, 5, 5)
    before = x.clone()
    list(everything(x))
    assert (x == before).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approximation": "mean"}, "approximation"),
        ({"padding_mode": "mirror"}, "padding_mode"),
        ({"padding": -1}, "padding=-1 must be at least 0"),
        ({"padding": "full"}, "padding='full'"),
        ({"padding": (1, 1, 1)}, "padding"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"dilation": 4}, r"kernel_size=3 .* spans 4 \* \(3 - 1\) \+ 1 = 9 .* 0 \+ 8 \+ 0 = 8"),
        ({"kernel_size": 9}, "kernel_size=9"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"groups": 3}, "groups=3 must divide the 4 channels"),
        ({"padding": 8, "padding_mode": "reflect"}, "padding_mode='reflect' .* 8 >= 8"),
        ({"padding": 9, "padding_mode": "circular"}, "padding_mode='circular' .* 9 > 8"),
    ],
)
def test_refused_options(options, message):
    x = torch.rand(2, 4, 8, 8)
    for approximation in functional.APPROXIMATIONS:
        with pytest.raises(ValueError, match=message):
            functional.conv_input_factor(
                x, **{"kernel_size": 3, "approximation": approximation, **options}
            )


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_refused_tensors(approximation):
    options = {"approximation": approximation}
    for x in (torch.rand(4, 8), torch.rand(0, 4, 8), torch.ones(1, 4, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^x"):
            functional.conv_input_factor(x, 1, **options)
        with pytest.raises(ValueError, match=r"^g"):
            functional.conv_grad_output_factor(x, **options)
    for x in (torch.rand(4), torch.rand(0, 4), torch.ones(1, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^x"):
            functional.linear_input_factor(x, **options)
        with pytest.raises(ValueError, match=r"^g"):
            functional.linear_grad_output_factor(x, **options)
    with pytest.raises(ValueError, match="groups=3"):
        functional.conv_grad_output_factor(torch.rand(1, 4, 8), groups=3, **options)
    with pytest.raises(ValueError, match="rows"):
        functional.gram(torch.rand(3, 4))


def test_options_may_be_lists():
    x = torch.rand(2, 4, 8, 8)
    lists = functional.conv_input_factor(x, [3, 3], [1, 2], [[1, 1], [0, 0]], [2, 1])
    assert (lists == functional.conv_input_factor(x, (3, 3), (1, 2), (1, 0), (2, 1))).all()


@st.composite
def plain_convolutions(draw):
    """Two spatial dimensions, symmetric padding with zeros: what other packages take."""
    groups, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    x = torch.rand(2, 2 * groups, 7, 6, dtype=torch.float64)
    options = {
        "kernel_size": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "stride": draw(st.integers(1, 3)),
        "padding": (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        "dilation": dilation,
        "groups": groups,
    }
    return x, options


@settings(max_examples=20, deadline=None)
@given(convolution=plain_convolutions())
def test_agrees_with_einconv(convolution):
    kfc = pytest.importorskip("einconv.expressions.convNd_kfc")
    kfac_reduce = pytest.importorskip("einconv.expressions.convNd_kfac_reduce")
    x, options = convolution
    for approximation, theirs in (("expand", kfc), ("reduce", kfac_reduce)):
        equation, operands, shape = theirs.einsum_expression(x, **options, simplify=True)
        expected = torch.einsum(equation, *operands).reshape(shape)
        if approximation == "expand":  # theirs sums over positions
            ones = torch.ones_like(x[:1, :1])
            plain = {**options, "groups": 1}
            expected /= F.unfold(ones, **_unfold(plain)).shape[-1]
        factor = functional.conv_input_factor(x, **options, approximation=approximation)
        # Their patterns pass through float32 and their scale is exact: the counts are, too.
        torch.testing.assert_close(factor, expected, rtol=1e-6, atol=1e-8)


def _unfold(options):
    return {name: value for name, value in options.items() if name != "groups"}


@settings(max_examples=20, deadline=None)
@given(convolution=plain_convolutions())
def test_agrees_with_curvlinops(convolution):
    theirs = pytest.importorskip("curvlinops.kfac_utils")
    x, options = convolution
    options = {**options, "groups": 1}  # theirs averages over groups
    patches = theirs.extract_patches(x, *options.values())
    averages = theirs.extract_averaged_patches(x, *options.values())
    A = functional.conv_input_factor(x, **options, approximation="expand")
    expected = functional.linear_input_factor(patches, "expand")
    torch.testing.assert_close(A, expected, rtol=1e-10, atol=1e-12)
    rows = functional.conv_average_input(x, **options)
    torch.testing.assert_close(rows[:, 0], averages.reshape(rows[:, 0].shape), rtol=1e-6, atol=1e-8)
