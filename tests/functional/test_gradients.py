"""Per-example gradients and diagonals against torch.func, memory bounds, and what is refused."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.nn import functional as F

from kfac_tn import functional
from kfac_tn.functional import common, gradients, networks, pairs, squares, torch_kernels

torch.set_num_threads(1)
TOLERANCE = 1e-10
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


def reference(layer, x, g, weight):
    """Per-example gradients [V, N, *weight.shape], by automatic differentiation."""
    loss = lambda weight, x, g: (layer(x[None], weight)[0] * g).sum()  # noqa: E731
    per_example = vmap(grad(loss), (None, 0, 0))
    return torch.stack([per_example(weight, x, column) for column in g])


def check(layer, weight_shape, x, gradient, diagonal):
    weight = rand(*weight_shape)
    g = rand(3, *layer(x, weight).shape)
    expected = reference(layer, x, g, weight)
    for columns, wanted in ((g, expected), (g[0], expected[0])):
        actual = gradient(x, columns)
        assert actual.shape == wanted.shape
        assert (actual - wanted).norm() <= TOLERANCE * wanted.norm()
        wanted = wanted.square().flatten(0, -1 - len(weight_shape)).sum(0)
        actual = diagonal(x, columns)
        assert actual.shape == wanted.shape
        assert (actual - wanted).norm() <= TOLERANCE * wanted.norm()


@st.composite
def convolutions(draw, transposed, tiled=False):
    """A layer as a function, its weight's shape, an input, and the arguments of our functions.

    Tiled: such that along the last axis, kernels of three take steps of one, to whole tiles.
    """
    dimensions = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    size, stride, dilation = each(2, 6), each(1, 3), each(1, 2)
    kernel = tuple(
        min(k, (s - 1) // d + 1) for k, s, d in zip(each(1, 3), size, dilation, strict=True)
    )
    before, after = each(0, 1), each(0, 1)
    if tiled:
        tiles = draw(st.sampled_from([4, 8]))
        width = tiles if transposed else tiles + 2 - before[-1] - after[-1]
        size, kernel = (*size[:-1], width), (*kernel[:-1], 3)
        stride, dilation = (*stride[:-1], 1), (*dilation[:-1], 1)
    groups, ins, outs = (draw(st.integers(1, 3)) for _ in range(3))
    x = rand(draw(st.integers(1, 4)), groups * ins, *size)
    if transposed:
        # No more padding than leaves an output.
        padding = tuple(
            min(p, ((s - 1) * r + d * (k - 1)) // 2)
            for p, s, r, d, k in zip(each(0, 2), size, stride, dilation, kernel, strict=True)
        )
        extra = tuple(
            min(e, max(s, d) - 1) for e, s, d in zip(each(0, 2), stride, dilation, strict=True)
        )
        options = (stride, padding, extra, groups, dilation)
        layer = lambda x, w: CONV_TRANSPOSE[dimensions](x, w, None, *options)  # noqa: E731
        return layer, (groups * ins, outs, *kernel), x, (kernel, *options)
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    padding = tuple(zip(before, after, strict=True))
    sides = [side for pair in reversed(padding) for side in pair]
    pad_mode = "constant" if mode == "zeros" else mode

    def layer(x, w):
        x = F.pad(x, sides, pad_mode)
        return CONV[dimensions](x, w, None, stride, 0, dilation, groups)

    return (
        layer,
        (groups * outs, ins, *kernel),
        x,
        (kernel, stride, padding, dilation, groups, mode),
    )


@settings(max_examples=15, deadline=None)
@given(convolution=convolutions(transposed=False), budget=st.sampled_from([None, 1000, 10_000]))
def test_convolutions(convolution, budget):
    layer, weight_shape, x, options = convolution
    with pytest.MonkeyPatch.context() as patch:
        if budget is not None:
            patch.setattr(common, "UNFOLD_BYTES", budget)
            patch.setattr(common, "CACHE_BYTES", budget // 3)
        check(
            layer,
            weight_shape,
            x,
            lambda x, g: functional.conv_per_example_weight_gradient(x, g, *options),
            lambda x, g: functional.conv_weight_diagonal(x, g, *options),
        )


@settings(max_examples=15, deadline=None)
@given(convolution=convolutions(transposed=True), budget=st.sampled_from([None, 1000, 10_000]))
def test_transposed_convolutions(convolution, budget):
    layer, weight_shape, x, options = convolution
    with pytest.MonkeyPatch.context() as patch:
        if budget is not None:
            patch.setattr(common, "UNFOLD_BYTES", budget)
            patch.setattr(common, "CACHE_BYTES", budget // 3)
        check(
            layer,
            weight_shape,
            x,
            lambda x, g: functional.conv_transpose_per_example_weight_gradient(x, g, *options),
            lambda x, g: functional.conv_transpose_weight_diagonal(x, g, *options),
        )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "algorithm", ["positions", "direct", "gradients", "large gradients", "tiles"]
)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_each_way_to_sum_squares(algorithm, transposed, data):
    """Forced, whatever suits the shape; several positions, as none but one way takes a single."""
    layer, weight_shape, x, options = data.draw(convolutions(transposed, algorithm == "tiles"))
    budget = data.draw(st.sampled_from([None, 1000, 10_000]))
    applied = []

    def choose(pair, limit):
        assert algorithm != "tiles" or pair.tiles is not None
        if pair.shape[-1] == 1 or (algorithm == "direct" and pair.direct is None):
            return chosen(pair, limit)
        applied.append(algorithm)
        return algorithm.removeprefix("large ")

    chosen = squares.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squares, "choose", choose)
        if algorithm == "large gradients":
            patch.setattr(squares, "LARGE", 0)
        if budget is not None:
            patch.setattr(common, "UNFOLD_BYTES", budget)
            patch.setattr(common, "CACHE_BYTES", budget // 3)
        name = "conv_transpose" if transposed else "conv"
        check(
            layer,
            weight_shape,
            x,
            lambda x, g: getattr(functional, f"{name}_per_example_weight_gradient")(x, g, *options),
            lambda x, g: getattr(functional, f"{name}_weight_diagonal")(x, g, *options),
        )
    assume(applied)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_depthwise_convolutions_by_a_kernel_of_their_own(data):
    """In float32, for which there is one: also of several outputs per channel, and wide kernels."""

    def draw(low, high):
        return data.draw(st.integers(low, high))

    dimensions, channels, per_channel = draw(1, 2), draw(1, 20), draw(1, 5)
    kernel = tuple(draw(1, 8) for _ in range(dimensions))
    paddings = tuple((draw(0, (k - 1) // 2), draw(0, (k - 1) // 2)) for k in kernel)
    stride, sizes = tuple(draw(1, 3) for _ in kernel), [k + draw(0, 9) for k in kernel]
    mode = data.draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    x = rand(draw(1, 5), channels, *sizes)
    sides = [side for pair in reversed(paddings) for side in pair]
    weight = rand(channels * per_channel, 1, *kernel)

    def layer(x, w):
        x = F.pad(x, sides, "constant" if mode == "zeros" else mode)
        return CONV[dimensions](x, w, None, stride, groups=channels)

    options = (kernel, stride, paddings, 1, channels, mode)
    g = rand(draw(1, 4), *layer(x, weight).shape)
    expected = reference(layer, x, g, weight)
    for function, wanted in (
        (functional.conv_per_example_weight_gradient, expected),
        (functional.conv_weight_diagonal, expected.square().sum((0, 1))),
    ):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            actual = function(x.to(dtype), g.to(dtype), *options)
            assert actual.dtype == dtype
            assert actual.shape == wanted.shape
            assert (actual - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("columns", [1, pairs.FEW_COLUMNS + 1])
def test_depthwise_convolutions_are_taken_to_their_kernel(columns, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has been built without oneDNN")
    called = []
    original = torch_kernels._depthwise
    monkeypatch.setattr(
        torch_kernels, "_depthwise", lambda *a: called.append(a) or original(*a), raising=True
    )
    x, g = torch.randn(4, 6, 9, 9), torch.randn(columns, 4, 6, 9, 9)
    functional.conv_weight_diagonal(x, g, 5, padding=2, groups=6)
    functional.conv_per_example_weight_gradient(x, g, 5, padding=2, groups=6)
    assert bool(called) == (columns == 1)


def test_columns_in_a_sequence():
    x, g = rand(2, 4, 6, 5), rand(3, 2, 6, 6, 5)
    expected = functional.conv_weight_diagonal(x, g, 3, padding=1, groups=2)
    actual = functional.conv_weight_diagonal(x, list(g), 3, padding=1, groups=2)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match=r"^g "):
        functional.conv_weight_diagonal(x, [g], 3, padding=1, groups=2)
    x, g = rand(2, 3, 5), rand(4, 2, 3, 6)
    actual = functional.linear_weight_diagonal(x, tuple(g))
    torch.testing.assert_close(actual, functional.linear_weight_diagonal(x, g))


CHOICES = {
    # input, output gradients, kernel size: in ResNet-18, from the first layers to the last
    "direct": ((2, 16, 16, 16), (1, 2, 32, 16, 16), 3),
    "tiles": ((2, 64, 32, 32), (3, 2, 64, 32, 32), 3),
    "gradients": ((2, 64, 8, 8), (9, 2, 128, 8, 8), 3),
    "positions": ((2, 64, 4, 4), (9, 2, 128, 4, 4), 3),
    "one position": ((2, 64, 1, 1), (9, 2, 128, 1, 1), 3),
}


@pytest.mark.parametrize("algorithm", CHOICES)
def test_float32_is_as_accurate_as_it_can_be(algorithm):
    """The way that suits a shape against float64; positive gradients, and ones that cancel."""
    x_shape, g_shape, kernel_size = CHOICES[algorithm]
    torch.manual_seed(0)
    for draw in (torch.rand, torch.randn):
        x, g = draw(x_shape), draw(g_shape)
        actual = functional.conv_weight_diagonal(x, g, kernel_size, padding=1)
        expected = functional.conv_weight_diagonal(x.double(), g.double(), kernel_size, padding=1)
        assert (actual >= 0).all()
        assert (actual - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("algorithm", CHOICES)
def test_choices(algorithm, monkeypatch):
    x_shape, g_shape, kernel_size = CHOICES[algorithm]
    called = []
    for name, function in squares.ALGORITHMS.items():
        monkeypatch.setitem(
            squares.ALGORITHMS, name, lambda *a, n=name, f=function: called.append(n) or f(*a)
        )
    functional.conv_weight_diagonal(torch.rand(x_shape), torch.rand(g_shape), kernel_size, 1, 1)
    assert called == [algorithm]


def test_all_columns_of_one_position_take_one_product():
    """However large it is."""
    x, g = torch.rand(32, 3072), torch.rand(9, 32, 512)
    pair = gradients._linear_pair(x, g)
    columns, examples = squares._chunk_sizes(pair, common.UNFOLD_BYTES)
    assert columns == 9
    assert examples >= 32


@pytest.mark.parametrize(
    ("d_out", "d_in", "positions", "together"),
    [
        (512, 4608, 16, 9),  # summed over first
        (10, 512, 1, 9),
        (1, 49, 16, 9),  # depthwise: an unfolded input for all
        (1, 9, 1024, 1),  # by torch's own kernel
        (64, 576, 1024, squares.ENOUGH),
        (512, 128, 64, 1),
    ],
)
def test_columns_that_are_squared_at_once(d_out, d_in, positions, together):
    assert squares.columns_together(d_out, d_in, positions, 9) == together
    pairs = squares.is_for_pairs(d_out, d_in, positions, 9)
    assert pairs == (positions == 16 and d_out > 1)


@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (6, 7, 5), (3, 2, 4, 5), (40, 3, 50)])
@pytest.mark.parametrize("d_out", [1, 7, 60])
def test_linear(shape, d_out):
    functions = functional.linear_per_example_weight_gradient, functional.linear_weight_diagonal
    check(F.linear, (d_out, shape[-1]), rand(*shape), *functions)


@settings(max_examples=40, deadline=None)
@given(convolution=convolutions(transposed=True))
def test_factors_of_transposed_convolutions(convolution):
    """The vectors `a` by their definition: the output's derivative with respect to the weight."""
    layer, (_, outs, *_), x, options = convolution
    groups, weight = options[4], rand(*convolution[1])
    # In chunks: those of all outputs at once may take gigabytes.
    jacobian = torch.func.jacrev(lambda w: layer(x, w), chunk_size=256)(weight)
    # [N, (G d), *O, (G c), d', *K], of which only equal groups and channels d matter.
    columns = jacobian.flatten(2, 1 + x.ndim - 2).unflatten(1, (groups, outs))[:, :, 0]
    columns = columns.unflatten(3, (groups, -1))[:, :, :, :, :, 0].flatten(4)  # [N, G, O, G, c K]
    vectors = torch.stack([columns[:, group, :, group] for group in range(groups)], 1)
    for approximation in functional.APPROXIMATIONS:
        a = vectors if approximation == "expand" else vectors.mean(2, keepdim=True)
        for bias in (False, True):
            if bias:
                a = F.pad(a, (0, 1), value=1.0)
            expected = torch.einsum("ngra,ngrb->gab", a, a) / (len(a) * a.shape[2])
            actual = functional.conv_transpose_input_factor(
                x, *options, approximation=approximation, bias=bias
            )
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_bias_diagonals():
    g = rand(4, 6, 3, 2)
    expected = g.sum((2, 3)).square().sum(0)
    torch.testing.assert_close(functional.conv_bias_diagonal(g), expected)
    expected = g.sum((1, 2)).square().sum(0)
    torch.testing.assert_close(functional.linear_bias_diagonal(g), expected)


BOUNDED = {
    "conv": lambda x, g, m: functional.conv_weight_diagonal(x, g, 3, padding=1, max_memory=m),
    "grouped": lambda x, g, m: functional.conv_weight_diagonal(
        x, g, 3, padding=1, groups=8, padding_mode="circular", max_memory=m
    ),
    "depthwise": lambda x, g, m: functional.conv_weight_diagonal(
        x, g, 3, padding=1, groups=32, max_memory=m
    ),
    "1x1": lambda x, g, m: functional.conv_weight_diagonal(x, g, 1, max_memory=m),
    "transposed": lambda x, g, m: functional.conv_transpose_weight_diagonal(
        x, g, 3, padding=1, max_memory=m
    ),
    "linear": lambda x, g, m: functional.linear_weight_diagonal(x, g, max_memory=m),
    "linear, no positions": lambda x, g, m: functional.linear_weight_diagonal(
        x.flatten(1), g.flatten(2), max_memory=m
    ),
}


@pytest.mark.parametrize("max_memory", [3 * 2**20, 2**23, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BOUNDED)
def test_max_memory_is_a_bound(peak_bytes, name, dtype, max_memory):
    size = 4 if "no positions" in name else 24
    x, g = torch.rand(6, 32, size, size).to(dtype), torch.rand(5, 6, 32, size, size).to(dtype)
    result = BOUNDED[name](x, g, max_memory)
    assert result.dtype == torch.float32
    peak = peak_bytes(lambda: BOUNDED[name](x, g, max_memory))
    bound = max_memory or common.UNFOLD_BYTES
    assert peak <= bound + 2 * result.numel() * 4


@pytest.mark.parametrize("max_memory", [15 * 2**20, None])
def test_max_memory_is_a_bound_for_tiles(peak_bytes, max_memory):
    x, g = torch.rand(3, 32, 64, 64), torch.rand(4, 3, 32, 64, 64)
    function = lambda: functional.conv_weight_diagonal(x, g, 3, 1, 1, max_memory=max_memory)  # noqa: E731
    limit = max_memory or common.UNFOLD_BYTES
    pair = gradients._conv_pair(x, g.unbind(), (3, 3), networks.Geometry(3, 1, 1, 1, 1))
    assert squares.choose(pair, limit) == "tiles"
    assert squares.choose(pair, 2**23) != "tiles"
    result = function()
    assert peak_bytes(function) <= limit + 2 * result.numel() * 4


def test_too_little_memory_is_refused():
    x, g = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 6, 6)
    with pytest.raises(ValueError, match=r"max_memory=1,000 bytes .* one gradient"):
        functional.conv_weight_diagonal(x, g, 3, max_memory=1000)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 4, 5, 6), {}),
        ((3, 4, 6, 6), {}),
        ((2, 4, 6), {}),
        ((1, 1, 2, 4, 6, 6), {}),
        ((2, 3, 6, 6), {"groups": 2}),
    ],
)
def test_output_gradients_of_something_else_are_refused(shape, options):
    x = torch.rand(2, 4, 8, 8)
    for function in (
        functional.conv_per_example_weight_gradient,
        functional.conv_weight_diagonal,
        functional.conv_transpose_weight_diagonal,
    ):
        with pytest.raises(ValueError, match=r"^g "):
            function(x, torch.rand(shape), 3, **options)
    with pytest.raises(ValueError, match=r"^g "):
        functional.linear_weight_diagonal(x, torch.rand(2, 4, 7, 3))


COMPILED = {
    "conv": lambda x, g: functional.conv_per_example_weight_gradient(x, g, 3, groups=2),
    "conv diagonal": lambda x, g: functional.conv_weight_diagonal(x, g, 3, groups=2),
    "transposed": lambda x, g: functional.conv_transpose_weight_diagonal(
        x, F.pad(g, (2, 2, 2, 2)), 3, groups=2
    ),
    "linear": lambda x, g: functional.linear_weight_diagonal(x[:, :, :5, :4], g),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph(name):
    torch.compiler.reset()
    networks._network.cache_clear()
    compiled = torch.compile(COMPILED[name], backend="eager", fullgraph=True)
    for count in (2, 3, 4):
        x, g = rand(count, 4, 7, 6), rand(3, count, 4, 5, 4)
        torch.testing.assert_close(compiled(x, g), COMPILED[name](x, g), rtol=1e-12, atol=0)


def test_differentiable():
    x, g = rand(2, 2, 4).requires_grad_(), rand(2, 2, 2, 3).requires_grad_()
    functions = functional.conv_per_example_weight_gradient, functional.conv_weight_diagonal
    for function in functions:
        assert torch.autograd.gradcheck(lambda x, g, f=function: f(x, g, 2), (x, g))
