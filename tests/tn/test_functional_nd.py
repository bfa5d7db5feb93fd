"""Convolutions of any dimension against torch's, against plain loops, and under torch.func."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacfwd, jacrev, vmap
from torch.nn import functional as F

from kfac_tn.tn.functional import conv_transposeNd, convNd, foldNd, unfoldNd
from kfac_tn.tn.pattern import PADDING_MODES

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def rand(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def assert_same_with_gradients(ours, reference, *tensors):
    """Equal results and equal gradients of one random function of them."""
    actual, expected = ours(*tensors), reference(*tensors)
    assert actual.is_contiguous()
    assert_close(actual, expected)
    cotangent = rand(*expected.shape, seed=1, grad=False)
    gradients = [torch.autograd.grad(y, tensors, cotangent) for y in (actual, expected)]
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e)


@st.composite
def convolutions(draw, least=1, most=3, transposed=False):
    """Tensors and options, `padding` a tuple of numbers."""
    dimensions = draw(st.integers(least, most))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    size = each(3, 6) if dimensions < 4 else each(2, 3)
    options = {"stride": each(1, 3), "padding": each(0, 1), "dilation": each(1, 2)}
    spans = zip(each(1, 3), size, options["dilation"], strict=True)
    kernel = tuple(min(k, (s - 1) // d + 1) for k, s, d in spans)
    groups, c, d = (draw(st.integers(1, 2)) for _ in range(3))
    options["groups"] = groups
    channels = groups * c, groups * d
    weight = (groups * d, c, *kernel)
    if transposed:
        kernel = tuple(max(k, 2) for k in kernel)
        weight = (groups * c, d, *kernel)
        steps = zip(each(0, 2), options["stride"], options["dilation"], strict=True)
        options["output_padding"] = tuple(min(e, max(s, d) - 1) for e, s, d in steps)
    batch = () if draw(st.booleans()) else (draw(st.integers(1, 2)),)
    x, w = rand(*batch, channels[0], *size, seed=2), rand(*weight, seed=3)
    return x, w, rand(channels[1], seed=4), options


@settings(max_examples=40, deadline=None)
@given(conv=convolutions())
def test_conv_as_torch(conv):
    x, weight, bias, options = conv
    reference = CONV[weight.ndim - 2]
    assert_same_with_gradients(
        lambda *t: convNd(*t, **options), lambda *t: reference(*t, **options), x, weight, bias
    )


@settings(max_examples=40, deadline=None)
@given(conv=convolutions(transposed=True))
def test_conv_transpose_as_torch(conv):
    x, weight, bias, options = conv
    reference = CONV_TRANSPOSE[weight.ndim - 2]
    assert_same_with_gradients(
        lambda *t: conv_transposeNd(*t, **options),
        lambda *t: reference(*t, **options),
        x,
        weight,
        bias,
    )


def by_loops(x, weight, stride, padding, dilation, groups):
    """One product for each kernel position, in any number of dimensions."""
    kernel, dimensions = weight.shape[2:], weight.ndim - 2
    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    size = [
        (i - d * (k - 1) - 1) // s + 1
        for i, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    w, total = weight.unflatten(0, (groups, -1)), 0
    for position in product(*map(range, kernel)):
        at = [
            slice(k * d, k * d + (o - 1) * s + 1, s)
            for k, d, o, s in zip(position, dilation, size, stride, strict=True)
        ]
        taps = x[(slice(None), slice(None), *at)].unflatten(1, (groups, -1))
        total = total + torch.einsum("ngc...,gdc->ngd...", taps, w[(..., *position)])
    assert total.ndim == dimensions + 3
    return total.flatten(1, 2)


@settings(max_examples=15, deadline=None)
@given(conv=convolutions(least=4, most=5))
def test_four_and_five_dimensions(conv):
    x, weight, bias, options = conv
    x = x.detach().reshape(-1, *x.shape[-weight.ndim + 1 :]).requires_grad_()
    assert_same_with_gradients(
        lambda *t: convNd(*t, bias.detach(), **options),
        lambda *t: by_loops(*t, **options) + bias.detach().reshape(-1, *[1] * (weight.ndim - 2)),
        x,
        weight,
    )


@settings(max_examples=15, deadline=None)
@given(conv=convolutions(least=4, most=5))
def test_transposed_is_the_adjoint_in_four_and_five_dimensions(conv):
    x, weight, _, options = conv
    x = x.reshape(-1, *x.shape[-weight.ndim + 1 :])
    y = by_loops(x, weight, **options)
    cotangent = rand(*y.shape, seed=1)
    (expected,) = torch.autograd.grad(y, x, cotangent)
    rest = [
        i - ((o - 1) * s + d * (k - 1) + 1 - 2 * p)
        for i, o, k, s, d, p in zip(
            x.shape[2:],
            y.shape[2:],
            weight.shape[2:],
            options["stride"],
            options["dilation"],
            options["padding"],
            strict=True,
        )
    ]
    # What the strides leave over at the end of the input is output padding.
    actual = conv_transposeNd(cotangent, weight, output_padding=tuple(rest), **options)
    assert_close(actual, expected)


def one_hot(channels, kernel):
    """Weight of the convolution that unfolds: one output channel for each entry of a window."""
    return torch.eye(channels * prod(kernel), dtype=torch.float64).reshape(-1, channels, *kernel)


@settings(max_examples=30, deadline=None)
@given(conv=convolutions())
def test_unfold_and_fold(conv):
    x, weight, _, options = conv
    kernel, dimensions = tuple(weight.shape[2:]), weight.ndim - 2
    del options["groups"]
    w = one_hot(x.shape[-dimensions - 1], kernel)

    def reference(x):
        return CONV[dimensions](x, w, **options).flatten(-dimensions)

    assert_same_with_gradients(lambda x: unfoldNd(x, kernel, **options), reference, x)
    columns = rand(*reference(x).shape, seed=5)
    _, transpose = torch.func.vjp(reference, x)
    assert_same_with_gradients(
        lambda c: foldNd(c, x.shape[-dimensions:], kernel, **options),
        lambda c: transpose(c)[0],
        columns,
    )
    if dimensions == 2:
        expected = F.unfold(x, kernel, **options)
        assert_close(unfoldNd(x, kernel, **options), expected)
        size = x.shape[-2:]
        folded = F.fold(columns, size, kernel, **options)
        assert_close(foldNd(columns, size, kernel, **options), folded)


def test_unfold_in_four_dimensions():
    x = rand(2, 2, 3, 4, 3, 2)
    options = {"dilation": (1, 2, 1, 1), "padding": (0, 1, 1, 0), "stride": (1, 1, 2, 1)}
    expected = by_loops(x, one_hot(2, (2, 2, 2, 2)), groups=1, **options).flatten(2)
    columns = unfoldNd(x, 2, **options)
    assert_close(columns, expected)
    back = foldNd(columns, x.shape[2:], 2, **options)
    (expected,) = torch.autograd.grad(columns, x, columns.detach())
    assert_close(back, expected)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_padding(mode):
    x, weight = rand(2, 2, 5, 4), rand(3, 2, 3, 2)
    torch_mode = "constant" if mode == "zeros" else mode
    for padding in ((1, 2), ((1, 0), (2, 3)), "same", [[0, 1], [1, 0]], 1, (1,)):
        before, after = {
            (1, 2): ((1, 2), (1, 2)),
            ((1, 0), (2, 3)): ((1, 2), (0, 3)),
            "same": ((1, 0), (1, 1)),
            1: ((1, 1), (1, 1)),
            (1,): ((1, 1), (1, 1)),
        }.get(padding if not isinstance(padding, list) else None, ((0, 1), (1, 0)))
        sides = (before[1], after[1], before[0], after[0])
        assert_same_with_gradients(
            lambda x, w, p=padding: convNd(x, w, padding=p, padding_mode=mode),
            lambda x, w, s=sides: F.conv2d(F.pad(x, s, mode=torch_mode), w),
            x,
            weight,
        )
    assert_close(convNd(x, weight, padding="valid"), F.conv2d(x, weight))
    assert_close(convNd(x, weight, padding="same", dilation=2).shape, torch.Size([2, 3, 5, 4]))


FUNCTIONS = {
    "grouped": (
        lambda x, w: convNd(x, w, stride=2, padding=1, groups=2),
        (2, 4, 4, 3),
        (2, 2, 3, 2),
    ),
    "circular": (
        lambda x, w: convNd(x, w, padding=1, padding_mode="circular"),
        (1, 1, 4),
        (2, 1, 3),
    ),
    "transposed": (
        lambda x, w: conv_transposeNd(x, w, stride=2, output_padding=1, dilation=2),
        (2, 2, 3),
        (2, 1, 2),
    ),
    "4-d": (
        lambda x, w: convNd(x, w, padding=((0, 1),) * 4),
        (1, 1, 2, 2, 2, 2),
        (1, 1, 2, 2, 2, 1),
    ),
    "unfold and fold": (
        lambda x, w: foldNd(unfoldNd(x, (2, 2)) * w, (3, 3), (2, 2)),
        (1, 2, 3, 3),
        (1, 8, 4),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name):
    function, *shapes = FUNCTIONS[name]
    tensors = [rand(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(
        function, tensors, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_transformed_twice(outer, inner):
    x, weight = rand(1, 2, 3, 3, grad=False), rand(2, 1, 2, 2, grad=False)

    def loss(convolve):
        return lambda x, w: convolve(x, w, groups=2, padding=1).pow(3).sum()

    for argnums in (0, 1):
        actual, expected = (
            outer(inner(loss(f), argnums), argnums)(x, weight) for f in (convNd, F.conv2d)
        )
        assert_close(actual, expected)


def test_batched_by_vmap():
    x, weight = rand(3, 2, 2, 5, grad=False), rand(3, 4, 2, 3, grad=False)
    assert_close(vmap(convNd)(x, weight), vmap(F.conv1d)(x, weight))
    assert_close(vmap(convNd, (None, 0))(x[0], weight), vmap(F.conv1d, (None, 0))(x[0], weight))
    per_example = vmap(jacrev(lambda w, x: convNd(x, w).sum()), (None, 0))(weight[0], x)
    expected = vmap(jacrev(lambda w, x: F.conv1d(x, w).sum()), (None, 0))(weight[0], x)
    assert_close(per_example, expected)


def test_only_operands_are_kept_for_backward():
    x, weight = rand(2, 3, 8, 8), rand(4, 3, 3, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        convNd(x, weight, padding=1)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("kernel", [(1,), (2,), (3,), (6,)])
@pytest.mark.parametrize("dilation", [1, 3])
def test_results_are_their_own(kernel, dilation):
    """In-place changes to a result leave the operand alone, also where a view would do."""
    if (kernel[0] - 1) * dilation >= 6:
        kernel, dilation = (6,), 1
    x = rand(1, 1, 6, grad=False)
    before = x.clone()
    columns = unfoldNd(x, kernel, dilation)
    unfolded = columns.clone()
    columns += 1
    foldNd(unfolded, 6, kernel, dilation).add_(1)
    assert torch.equal(x, before)
    assert torch.equal(unfolded + 1, columns)


def test_memory_formats_and_dtypes():
    x, weight = rand(2, 3, 6, 5), rand(4, 3, 3, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.complex128):
        w = weight.detach().to(dtype).requires_grad_()
        actual = convNd(x.to(dtype), w)
        assert actual.dtype == dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(actual, F.conv2d(x.to(dtype), w), rtol=tolerance, atol=tolerance)
    x = (x + 1j * rand(2, 3, 6, 5, seed=7)).detach().requires_grad_()
    weight = (weight - 2j * rand(4, 3, 3, 3, seed=8)).detach().requires_grad_()
    gradients = [
        torch.autograd.grad(f(x, weight).abs().sum(), (x, weight)) for f in (convNd, F.conv2d)
    ]
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected)
    x = x.detach().real.contiguous(memory_format=torch.channels_last)
    assert_close(convNd(x, weight.real), F.conv2d(x, weight.real))


def test_autocast():
    x, weight, bias = (
        t.detach().float().requires_grad_() for t in (rand(2, 3, 5), rand(4, 3, 3), rand(4))
    )
    gradients = []
    for function in (convNd, F.conv1d):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, weight, bias)
        assert y.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y.sum(), (x, weight, bias)))
    for actual, expected in zip(*gradients, strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert convNd(x.double(), weight.double()).dtype == torch.float64


def test_empty_batch():
    x, weight, bias = rand(0, 2, 5, 5), rand(3, 2, 3, 3), rand(3)
    for function, shape in ((convNd, (0, 3, 3, 3)), (F.conv2d, (0, 3, 3, 3))):
        y = function(x, weight, bias)
        assert y.shape == shape
        dx, dw, db = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert dx.shape == x.shape
        assert not dw.any()
        assert not db.any()
    assert unfoldNd(x, 3).shape == (0, 18, 9)
    assert foldNd(unfoldNd(x, 3), (5, 5), 3).shape == x.shape


COMPILED = {
    "convolution": lambda x, w: convNd(x, w, stride=[2, 1], padding=1, groups=2),
    "transposed": lambda x, w: conv_transposeNd(x, w, padding=1, groups=2),
    "unfold and fold": lambda x, w: foldNd(unfoldNd(x, [3, 3]) * w.sum(), (5, 5), [3, 3]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    """Without a graph break; by a backend that needs no compiler of C++."""
    function, x, weight = COMPILED[name], rand(2, 4, 5, 5), rand(4, 2, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(x, weight), function(x, weight)
    assert_close(actual, expected)
    gradients = [torch.autograd.grad(y.sin().sum(), (x, weight)) for y in (actual, expected)]
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e)


def test_tensors_without_data():
    shape = (2, 3, 4, 4, 4, 4)
    x, weight = (torch.empty(s, device="meta") for s in ((2, 2, 5, 5, 5, 5), (3, 2, 2, 2, 2, 2)))
    assert convNd(x, weight).shape == shape
    with torch._subclasses.FakeTensorMode():
        assert convNd(torch.rand(2, 2, 5), torch.rand(3, 2, 2)).shape == (2, 3, 4)
        assert foldNd(unfoldNd(torch.rand(2, 2, 5), (2,)), (5,), 2).shape == (2, 2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convNd(rand(2, 3, 5), rand(4, 2, 3)), r"weight_shape\[1\] must be 3"),
        (
            lambda: convNd(rand(3, 5), rand(4, 3, 2, 2)),
            "input of shape .3, 5. must have 4 axes, or 3",
        ),
        (lambda: convNd(rand(1, 3, 5), rand(4, 3, 2), rand(3)), r"bias of shape \(3,\) .* \(4,\)"),
        (lambda: convNd(rand(1, 3, 5), rand(4, 3, 7)), "spans .* = 7 positions"),
        (lambda: convNd(rand(1, 3, 5), rand(4, 3, 2), padding="full"), "neither 'same' nor"),
        (lambda: convNd(rand(1, 3, 5), rand(4, 3, 2), padding="same", stride=2), "needs stride 1"),
        (lambda: convNd(rand(1, 3, 5), rand(4, 3, 2).float()), "share dtype"),
        (
            lambda: convNd(rand(1, 3, 5), rand(4, 3, 2), rand(4).float()),
            "bias has dtype torch.float32, weight torch.float64",
        ),
        (
            lambda: conv_transposeNd(rand(1, 3, 5), rand(3, 4, 2), rand(4) + 0j),
            "bias has dtype torch.complex128, weight torch.float64",
        ),
        (
            lambda: conv_transposeNd(rand(1, 3, 5), rand(3, 2, 2), output_padding=1),
            "output_padding=1",
        ),
        (lambda: conv_transposeNd(rand(1, 2, 5), rand(3, 2, 2)), r"weight_shape\[0\] must be 2"),
        (lambda: unfoldNd(rand(1, 2, 5), 0), "kernel_size=0 must be"),
        (lambda: unfoldNd(rand(1, 5), 2), "kernel_size=2"),
        (lambda: unfoldNd(rand(1, 2, 5), (2.5,)), "kernel_size=.* must be integers"),
        (lambda: unfoldNd(rand(1, 2, 5), 6), "spans .* = 6 positions"),
        (lambda: foldNd(rand(1, 6, 3), 4, 2), "leave the number of dimensions open"),
        (
            lambda: foldNd(rand(1, 5, 3), (4,), 2),
            r"multiple of prod\(kernel_size\) = 2 rows, got 5",
        ),
        (lambda: foldNd(rand(1, 6, 4), (4,), 2), r"columns.* \(1, 6, 4\).* expects \(1, 6, 3\)"),
        (lambda: foldNd(rand(1, 6, 4), (4, 4), (2,)), "differ in their dimensions"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_compiled_for_batches_of_several_sizes():
    """The second size makes the compiler see symbols, of which no plan can be made."""
    torch._dynamo.reset()
    convolve = torch.compile(lambda x, w: convNd(x, w, padding=1), backend="eager", fullgraph=True)
    weight = torch.rand(4, 3, 3, 3)
    for count in (2, 3, 5):
        x = torch.rand(count, 3, 8, 8)
        expected = F.conv2d(x, weight, padding=1)
        torch.testing.assert_close(convolve(x, weight), expected)
