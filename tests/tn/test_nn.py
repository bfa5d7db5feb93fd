"""Modules against torch's, and randomized gradients: unbiased, reproducible, and kept small."""

import copy
import pickle
from itertools import product
from math import prod

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn.nn import ConvNd, ConvTransposeNd, RandomizedConvNd, randomize
from kfac_tn.tn.nn.sampling import Draw
from kfac_tn.tn.pattern import PADDING_MODES

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
F64 = {"dtype": torch.float64}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), **F64)


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


# ---- like torch's ----------------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "strided": {"stride": 2, "padding": 1, "dilation": 2},
    "grouped without bias": {"groups": 2, "bias": False},
    "same": {"padding": "same", "dilation": 2},
    **{mode: {"padding": 1, "padding_mode": mode} for mode in PADDING_MODES[1:]},
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_conv_is_torchs(dimensions, name):
    options = {**OPTIONS[name], **F64}
    size = {1: (9,), 2: (8, 7), 3: (6, 5, 6)}[dimensions]
    theirs = seeded(lambda: CONV[dimensions](4, 6, 3, **options))
    ours = seeded(lambda: ConvNd(4, 6, 3, **options, dimensions=dimensions))
    check_like(ours, theirs, rand(2, 4, *size))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"groups": 2, "dilation": 2, "bias": False},
    ],
    ids=["default", "strided", "grouped without bias"],
)
def test_conv_transpose_is_torchs(dimensions, options):
    options = {**options, **F64}
    theirs = seeded(lambda: CONV_TRANSPOSE[dimensions](4, 6, 2, **options))
    ours = seeded(lambda: ConvTransposeNd(4, 6, (2,) * dimensions, **options))
    check_like(ours, theirs, rand(2, 4, *(4, 3, 3)[:dimensions]))


def check_like(ours, theirs, x):
    """The same parameters from the same draws, state dicts both ways, output, gradients, repr."""
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name])
    assert repr(ours).split("(", 1)[1] == repr(theirs).split("(", 1)[1]
    other = seeded(lambda: copy.deepcopy(ours), 1)
    other.reset_parameters()
    other.load_state_dict(state)
    theirs.load_state_dict(other.state_dict())
    other = pickle.loads(pickle.dumps(other))
    x = x.requires_grad_()
    for module, input in product((ours, other), (x, x[0])):
        actual, expected = module(input), theirs(input)
        assert_close(actual, expected)
        cotangent = rand(*expected.shape, seed=3)
        gradients = torch.autograd.grad(actual, (x, *module.parameters()), cotangent)
        reference = torch.autograd.grad(expected, (x, *theirs.parameters()), cotangent)
        for a, e in zip(gradients, reference, strict=True):
            assert_close(a, e)


def test_output_size_as_torch():
    theirs = seeded(lambda: nn.ConvTranspose2d(2, 3, 3, stride=(2, 3), padding=1, **F64))
    ours = seeded(lambda: ConvTransposeNd(2, 3, (3, 3), stride=(2, 3), padding=1, **F64))
    x = rand(2, 2, 4, 4)
    for size in ((8, 12), (7, 10), (2, 3, 8, 11)):
        assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    for size in ((9, 10), (6, 10), (7, 10, 10)):
        with pytest.raises(ValueError):
            theirs(x, output_size=size)
        with pytest.raises(ValueError, match=r"from \(7, 10\) to \(8, 12\)"):
            ours(x, output_size=size)


@pytest.mark.parametrize("dimensions", [4, 5])
def test_more_dimensions_than_torch(dimensions):
    conv = ConvNd(2, 4, 2, stride=2, groups=2, dimensions=dimensions, **F64)
    x = rand(3, 2, *[3] * dimensions)
    unfolded = tn.functional.unfoldNd(x, 2, stride=2).unflatten(1, (2, -1))
    weight = conv.weight.flatten(1).unflatten(0, (2, -1))
    expected = (weight @ unfolded).flatten(1, 2) + conv.bias[:, None]
    assert_close(conv(x).flatten(2), expected)
    back = ConvTransposeNd(4, 2, 2, stride=2, groups=2, bias=False, dimensions=dimensions, **F64)
    back.load_state_dict({"weight": conv.weight})
    y = rand(*conv(x).shape, seed=1)
    bias = conv.bias.reshape(-1, *[1] * dimensions)
    assert_close((back(y, output_size=x.shape) * x).sum(), (y * (conv(x) - bias)).sum())


def test_asymmetric_padding():
    conv = ConvNd(2, 3, (2, 3), padding=((0, 1), (2, 0)), **F64)
    assert "padding=((0, 1), (2, 0))" in repr(conv)
    x = rand(1, 2, 4, 4)
    expected = F.conv2d(F.pad(x, (2, 0, 0, 1)), conv.weight, conv.bias)
    assert_close(conv(x), expected)
    assert ConvNd(2, 3, (2, 3), padding=((1, 1), (2, 2))).padding == (1, 2)


def test_windows_before_the_input():
    """In the last two dimensions, with room left between the two: only the bias is seen."""
    conv = ConvNd(1, 2, (1, 1, 2), (2, 1, 3), padding=((3, 3), (0, 3), (3, 0)), **F64)
    x = rand(2, 1, 1, 3, 1).requires_grad_()
    padded = F.pad(x, (3, 0, 0, 3, 3, 3))
    expected = F.conv3d(padded, conv.weight, conv.bias, conv.stride)
    assert_close(conv(x), expected)
    leaves = (x, *conv.parameters())
    cotangent = rand(*expected.shape, seed=1)
    ours, theirs = (torch.autograd.grad(y, leaves, cotangent) for y in (conv(x), expected))
    for own, their in zip(ours, theirs, strict=True):
        assert_close(own, their)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3}, "kernel_size=3 leaves the number of dimensions open"),
        ({"kernel_size": (3, 3), "dimensions": 3}, "with dimensions=3 must be one positive number"),
        ({"kernel_size": (3, 0)}, r"kernel_size=\(3, 0\)"),
        ({"kernel_size": 3, "dimensions": 0}, "at least one"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"groups": 3}, "groups=3 must divide in_channels=4 and out_channels=6"),
        ({"groups": 4}, "groups=4 must divide"),
        ({"groups": 0}, "groups=0"),
        ({"stride": 0}, "stride=0"),
        ({"dilation": (1, 2, 3)}, "dilation=.* has 3 entries for 2 dimensions"),
        ({"stride": None}, "stride=None"),
        ({"padding": None}, "padding=None"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "full"}, "padding='full'"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror'"),
    ],
)
def test_refused(options, message):
    for module in (ConvNd, RandomizedConvNd):
        with pytest.raises(ValueError, match=message):
            module(**{"in_channels": 4, "out_channels": 6, "kernel_size": (3, 3), **options})


def test_refused_transposed():
    for options in (
        {"padding_mode": "circular"},
        {"padding": "same"},
        {"output_padding": 1},
        {"groups": 4},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            ConvTransposeNd(4, 6, (3, 3), **options)


# ---- randomized gradients --------------------------------------------------------------------

RANDOMIZED = {
    "1-d": ((2, 2, 4), {"in_channels": 2, "kernel_size": (3,), "padding": 1}),
    "strided": ((2, 3, 5), {"in_channels": 3, "kernel_size": (2,), "stride": 2}),
    "grouped": ((1, 4, 3), {"in_channels": 4, "kernel_size": (2,), "groups": 2}),
    "depthwise": ((2, 4, 3), {"in_channels": 4, "kernel_size": (2,), "groups": 4, "bias": False}),
    "2-d": ((1, 2, 3, 2), {"in_channels": 2, "kernel_size": (2, 2), "dilation": (2, 1)}),
    "circular": (
        (2, 1, 3),
        {"in_channels": 1, "kernel_size": (3,), "padding": 1, "padding_mode": "circular"},
    ),
    "same": ((1, 1, 3), {"in_channels": 1, "kernel_size": (2,), "padding": "same"}),
    "asymmetric": ((1, 2, 2), {"in_channels": 2, "kernel_size": (2,), "padding": ((2, 0),)}),
    "unbatched": ((2, 4), {"in_channels": 2, "kernel_size": (3,)}),
    "4-d": ((1, 2, 2, 1, 2, 1), {"in_channels": 2, "kernel_size": (1, 1, 2, 1), "stride": 2}),
}


def randomized(name, **options):
    shape, geometry = RANDOMIZED[name]
    conv = RandomizedConvNd(out_channels=4, **geometry, **options, **F64)
    return conv, rand(*shape).requires_grad_()


def gradients(conv, x):
    y = conv(x)
    return torch.autograd.grad(y, (x, *conv.parameters()), rand(*y.shape, seed=3))


def each_draw(monkeypatch, conv, x):
    """Probability, and gradients, of each thing that can be drawn."""
    counts = []

    def ask(draw, count):
        counts.append(count)
        return torch.arange(count)

    monkeypatch.setattr(Draw, "__call__", ask)
    gradients(conv, x)
    choices = [
        (count, rate) for count, rate in zip(counts, (conv.keep, conv.keep_output), strict=False)
    ]
    assert sum(counts) <= 10
    for masks in product(*(product((False, True), repeat=count) for count in counts)):
        queue = [torch.tensor(mask).nonzero().flatten() for mask in masks]
        monkeypatch.setattr(Draw, "__call__", lambda draw, count, queue=queue: queue.pop(0))
        probability = prod(
            rate if kept else 1 - rate
            for (_, rate), mask in zip(choices, masks, strict=True)
            for kept in mask
        )
        yield probability, gradients(conv, x)


@pytest.mark.parametrize("keep_output", [1.0, 0.7])
@pytest.mark.parametrize("along", ["channels", "kernel", "spatial"])
@pytest.mark.parametrize("name", RANDOMIZED)
def test_expected_gradient_is_exact(monkeypatch, name, along, keep_output):
    """The sum over everything that can be drawn, weighted with its probability."""
    conv, x = randomized(name, keep=0.4, along=along, keep_output=keep_output)
    exact = gradients(conv.eval(), x)
    if keep_output < 1 and (along, name) == ("spatial", "2-d"):
        conv.keep_output = 1.0  # 2^10 draws are too many for a test
    expected, total = [torch.zeros_like(g) for g in exact], 0.0
    for probability, drawn in each_draw(monkeypatch, conv.train(), x):
        total += probability
        for e, g in zip(expected, drawn, strict=True):
            e += probability * g
        if conv.bias is not None:
            assert_close(drawn[2], exact[2])
        if keep_output == 1:
            assert_close(drawn[0], exact[0])
    assert total == pytest.approx(1)
    for e, g in zip(expected, exact, strict=True):
        assert_close(e, g)


@pytest.mark.parametrize("along", ["channels", "kernel", "spatial"])
def test_gradient_is_the_masked_network(along):
    conv, x = RandomizedConvNd(3, 4, (3, 2), 2, 1, keep=0.5, along=along, **F64), rand(2, 3, 6, 5)
    spec = tn.ConvSpec(x.shape, conv.weight.shape, 2, 1)
    network = tn.randomized_weight_vjp(spec, along)
    shape = network.operands["mask"]
    for seed in range(5):
        torch.manual_seed(seed)
        (gradient,) = torch.autograd.grad(conv(x).sum(), conv.weight)
        torch.manual_seed(seed)
        mask = (torch.rand(prod(shape)) < 0.5).reshape(shape).double() / 0.5
        ones = torch.ones(spec.output_shape, **F64)
        assert_close(gradient, network.evaluate(input=x, grad_output=ones, mask=mask))


@pytest.mark.parametrize("along", ["channels", "kernel", "spatial"])
def test_mean_gradient_and_rate(along):
    """Means over draws come within five standard errors of what is expected."""
    draws, keep = 1500, 0.3
    conv = RandomizedConvNd(8, 2, (3,), keep=keep, along=along, keep_output=0.5, **F64)
    conv.generator = torch.Generator().manual_seed(0)
    x = rand(2, 8, 8).requires_grad_()
    exact = gradients(conv.eval(), x)
    conv.train()
    samples = [gradients(conv, x) for _ in range(draws)]
    for each, target in zip(zip(*samples, strict=True), exact, strict=True):
        each = torch.stack(each)
        error = each.std(0) / draws**0.5
        assert ((each.mean(0) - target).abs() <= 5 * error + 1e-12).all()
    draw = Draw(keep, x.device, conv.generator)
    kept = sum(len(draw(100)) for _ in range(100)) / 10_000
    assert abs(kept - keep) < 5 * (keep * (1 - keep) / 10_000) ** 0.5


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_exact_forward(dimensions, name):
    options = {**OPTIONS[name], **F64}
    theirs = CONV[dimensions](4, 6, 3, **options)
    x = rand(2, 4, *(8, 7, 6)[:dimensions])
    for along in ("channels", "kernel", "spatial"):
        ours = RandomizedConvNd(
            4, 6, 3, **options, dimensions=dimensions, along=along, keep_output=0.5
        )
        ours.load_state_dict(theirs.state_dict())
        assert_close(ours(x), theirs(x))
        exact = [gradients(theirs, x.requires_grad_()) for _ in range(2)]
        ours.eval()
        for expected in exact:
            for a, e in zip(gradients(ours, x), expected, strict=True):
                assert_close(a, e)
            ours.train()
            ours.keep = ours.keep_output = 1


def kept_bytes(function, *tensors, without=()):
    """Bytes of the storages that a function keeps for its backward pass."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*tensors)
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("along", ["channels", "kernel", "spatial"])
def test_only_the_sample_is_kept(monkeypatch, along):
    conv = RandomizedConvNd(8, 4, (2, 2), stride=2, keep=0.25, along=along, keep_output=0.5)
    monkeypatch.setattr(Draw, "__call__", lambda draw, count: torch.arange(count // 4))
    x = torch.rand(4, 8, 16, 16)
    activation = nn.GELU()(x.requires_grad_())
    parameters = (conv.weight, conv.bias)
    assert kept_bytes(conv, activation, without=parameters) == x.nbytes / 4
    exact = nn.Conv2d(8, 4, 2, stride=2)
    assert kept_bytes(exact, activation, without=exact.parameters()) == x.nbytes
    conv.eval()
    assert kept_bytes(conv, activation, without=parameters) == x.nbytes
    conv.train().weight.requires_grad_(False)
    assert kept_bytes(conv, activation, without=parameters) <= x.nbytes
    with torch.no_grad():
        assert kept_bytes(conv, activation) == 0


def test_kernel_keeps_no_copy_of_an_input_that_is_all_touched(monkeypatch):
    conv = RandomizedConvNd(2, 2, (3, 3), padding=1, keep=0.5, along="kernel")
    monkeypatch.setattr(Draw, "__call__", lambda draw, count: torch.tensor([4]))
    x = torch.rand(2, 2, 5, 5)
    assert kept_bytes(conv, x, without=(*conv.parameters(), x)) == 0


def test_randomness_is_reproducible():
    x = torch.rand(2, 32, 6)

    def gradient(conv):
        return torch.autograd.grad(conv(x).sum(), conv.weight)[0]

    conv = RandomizedConvNd(32, 4, (3,))
    torch.manual_seed(5)
    first, second = gradient(conv), gradient(conv)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(gradient(conv), first)

    conv.generator = torch.Generator().manual_seed(7)
    before = torch.get_rng_state()
    first, second = gradient(conv), gradient(conv)
    assert not torch.equal(first, second)
    conv.generator.manual_seed(7)
    assert torch.equal(gradient(conv), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_are_checked():
    for options, message in (
        ({"keep": 0}, "keep=0 must be"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep_output": 0.0}, "keep_output=0.0"),
        ({"along": "batch"}, "along='batch' is none of"),
    ):
        with pytest.raises(ValueError, match=message):
            RandomizedConvNd(2, 2, (3,), **options)
        with pytest.raises(ValueError, match=message):
            randomize(nn.Conv1d(2, 2, 3), **options)
    conv = RandomizedConvNd(2, 2, (3,))
    conv.keep = 2
    with pytest.raises(ValueError, match="keep=2"):
        conv(torch.rand(1, 2, 5))


def test_training_mode_has_first_derivatives_only():
    conv, x = RandomizedConvNd(4, 2, (3,)), torch.rand(1, 4, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(conv(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_under_torch_func():
    conv, x = RandomizedConvNd(8, 4, (3,), along="spatial"), torch.rand(2, 8, 6)

    def loss(parameters):
        return torch.func.functional_call(conv, parameters, (x,)).pow(2).sum()

    torch.manual_seed(0)
    actual = torch.func.grad(loss)(dict(conv.named_parameters()))
    torch.manual_seed(0)
    expected = torch.autograd.grad(loss({}), list(conv.parameters()))
    assert all(map(torch.equal, actual.values(), expected))


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_compiled_in_eval_mode(mode):
    conv, x = (
        RandomizedConvNd(4, 4, (3, 3), padding=1, padding_mode=mode).eval(),
        torch.rand(2, 4, 5, 5),
    )
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(conv, backend="aot_eager", fullgraph=True)(x), conv(x))


def test_in_a_training_step():
    """Under autocast and with activation checkpointing."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GELU(),
        RandomizedConvNd(16, 16, (3, 3), keep=0.5),
        nn.GELU(),
        RandomizedConvNd(16, 4, (3, 3), keep=0.5, along="spatial", keep_output=0.5),
    )
    x = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model(x[:0]).shape == (0, 4, 4, 4)


# ---- converting a model ----------------------------------------------------------------------


def make_model():
    shared = nn.Conv2d(6, 6, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        nn.Sequential(shared, nn.GELU(), shared),
        nn.Conv2d(6, 6, 3, groups=6, bias=False, stride=2).eval(),
        nn.Flatten(2),
        ConvNd(6, 2, (2,), dilation=2),
    )


def test_randomize():
    model = make_model().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    original, state = copy.deepcopy(model), torch.get_rng_state()
    assert randomize(model, keep=0.5, along="spatial", keep_output=0.9) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == list(original.state_dict())
    assert {id(p) for p in model.parameters()} == {
        id(p) for group in optimizer.param_groups for p in group["params"]
    }
    convs = [m for m in model.modules() if isinstance(m, RandomizedConvNd)]
    assert len(convs) == 4
    assert model[1][0] is model[1][2]
    assert not model[2].training
    assert all((c.keep, c.along, c.keep_output) == (0.5, "spatial", 0.9) for c in convs)
    x = rand(2, 3, 8, 8)
    assert_close(model(x), original(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    randomize(model, keep=0.25)  # again, with another rate
    assert model[0].keep == 0.25
    assert model[0].weight is optimizer.param_groups[0]["params"][0]


def test_randomize_a_convolution_and_some_of_a_model():
    conv = nn.Conv1d(2, 3, 3)
    replaced = randomize(conv)
    assert isinstance(replaced, RandomizedConvNd)
    assert replaced.weight is conv.weight
    model = randomize(make_model(), where=lambda name, module: name.startswith("1."))
    assert [n for n, m in model.named_modules() if isinstance(m, RandomizedConvNd)] == ["1.0"]


class OwnConv(nn.Conv2d):
    """A convolution that does something else."""


def hooked():
    conv = nn.Conv2d(3, 3, 1)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.ConvTranspose2d(3, 3, 1), "'1.last', ConvTranspose2d: only Conv1d"),
        (lambda: nn.LazyConv2d(3, 1), "'1.last', LazyConv2d"),
        (lambda: OwnConv(3, 3, 1), "'1.last', OwnConv"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
            "'1.last', Parametrized",
        ),
        (hooked, "'1.last', Conv2d: it has hooks"),
    ],
)
def test_randomize_refuses(build, message):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential())
    model[1].add_module("last", build())
    with pytest.raises(ValueError, match=message):
        randomize(model)
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="the model"):
        randomize(build())
    randomize(model, where=lambda name, module: name != "1.last")
    assert type(model[0]) is RandomizedConvNd
