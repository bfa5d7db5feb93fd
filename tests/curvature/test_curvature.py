"""The algebra of a whole model's curvature, and compute_kfac, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn import testing
from kfac_tn.curvature.block import DiagonalBlock
from kfac_tn.curvature.layout import split_vector

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class Net(nn.Module):
    """A grouped convolution, a layer without Kronecker structure, an unused and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.head(self.frozen(self.norm(self.conv(x))).tanh().mean((2, 3)))


def problem(*batches: int):
    torch.manual_seed(0)
    model, loss_fn = Net().double(), nn.CrossEntropyLoss()
    shapes = batches or (4,)
    data = [(torch.rand(n, 2, 4, 4).double(), torch.randint(3, (n,))) for n in shapes]
    return model, loss_fn, data


def curvature_of(*batches: int, **options):
    model, loss_fn, data = problem(*batches)
    options = {"fisher": "type-2", "generator": torch.Generator().manual_seed(1), **options}
    return model, kfac_tn.compute_kfac(model, loss_fn, data, **options)


def flat(entries):
    return torch.cat([entry.flatten() for entry in entries.values()])


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_blocks_are_the_definition_and_the_rest_is_zero(bias, approximation):
    model, curvature = curvature_of(bias=bias, approximation=approximation)
    dense = curvature.to_dense()
    block = {names: testing.diagonal_block(dense, model, names) for names in NAMES}
    conv, head = curvature.blocks["conv"], curvature.blocks["head"]
    a, b = conv.input_factor, conv.grad_output_factor
    expected = torch.block_diag(*[torch.kron(b[g], a[g][:18, :18][:9, :9]) for g in range(2)])
    torch.testing.assert_close(block["conv.weight",], expected, **CLOSE)
    torch.testing.assert_close(block["conv.bias",], torch.block_diag(*b), **CLOSE)
    expected = torch.kron(head.grad_output_factor[0], head.input_factor[0])
    torch.testing.assert_close(block["head.weight",], expected, **CLOSE)
    norm = curvature.blocks["norm.weight"]
    assert isinstance(norm, DiagonalBlock)
    torch.testing.assert_close(block["norm.weight",], norm.values.diag(), **CLOSE)
    assert (norm.values > 0).all()
    # What couples weight and bias, and what couples layers:
    coupled = testing.diagonal_block(dense, model, ("conv.weight", "conv.bias"))[:36, 36:]
    assert bool(coupled.any()) is (bias == "joint")
    total = sum(float(part.square().sum()) for part in block.values())
    off_diagonal = 2 * float(coupled.square().sum())
    assert float(dense.square().sum()) == pytest.approx(total + off_diagonal)
    assert not block["unused.weight",].any()
    assert not block["unused.bias",].any()


NAMES = [
    (name,)
    for name in (
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "unused.weight",
        "unused.bias",
        "head.weight",
    )
]


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_algebra_is_that_of_the_dense_matrix(bias):
    model, curvature = curvature_of(bias=bias)
    dense = curvature.to_dense()
    assert list(curvature.shapes) == list(testing.trainable(model))
    torch.testing.assert_close(dense, dense.T, **CLOSE)
    assert torch.linalg.eigvalsh(dense).min() > -1e-12
    v = torch.rand(len(dense)).double()
    torch.testing.assert_close(curvature @ v, dense @ v, **CLOSE)
    pieces = v.split([shape.numel() for shape in curvature.shapes.values()])
    named = {
        name: piece.view(shape)
        for piece, (name, shape) in zip(pieces, curvature.shapes.items(), strict=True)
    }
    product = curvature @ dict(reversed(named.items()))  # the order of a dict doesn't matter
    assert {name: p.shape for name, p in product.items()} == curvature.shapes
    torch.testing.assert_close(flat(product), dense @ v, **CLOSE)
    torch.testing.assert_close(flat(curvature.diagonal()), dense.diagonal(), **CLOSE)
    torch.testing.assert_close(curvature.trace(), dense.trace(), **CLOSE)
    for damping in (1e-3, 1.0):
        inverse = (dense + damping * torch.eye(len(dense)).double()).inverse()
        ours = curvature.inverse(damping)
        torch.testing.assert_close(ours.to_dense(), inverse, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ours @ v, inverse @ v, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(flat(ours.diagonal()), inverse.diagonal())
        torch.testing.assert_close(ours.trace(), inverse.trace())


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.zeros(3), r"shape \[\d+\].*not \[3\]"),
        (torch.zeros(1, 90), "flat vector"),
        (
            {"conv.weight": torch.zeros(4, 1, 3, 3), "nose": torch.zeros(1)},
            "missing.*unknown.*nose",
        ),
    ],
)
def test_vectors_that_do_not_fit_are_refused(v, message):
    _, curvature = curvature_of()
    with pytest.raises(ValueError, match=message):
        curvature @ v


@pytest.mark.parametrize("v", [[1.0], 2.0, "weight"], ids=["list", "number", "string"])
def test_what_is_no_vector_is_refused(v):
    _, curvature = curvature_of()
    for refused in (v, curvature):
        with pytest.raises(TypeError, match=r"a dict by parameter name or a flat tensor.* not a"):
            curvature @ refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.long])
def test_vectors_of_another_dtype_are_multiplied_in_that_of_the_curvature(dtype):
    """As gradients of a model in half precision, whose curvature is in float32."""
    _, curvature = curvature_of()
    v = torch.arange(curvature._size()).to(dtype)
    expected = curvature @ v.double()
    torch.testing.assert_close(curvature @ v, expected)
    named = {n: e.to(dtype) for n, e in split_vector(v.double(), curvature.shapes).items()}
    torch.testing.assert_close(flat(curvature @ named), expected)
    diagonal = kfac_tn.compute_kfac(*problem(), fisher="type-2", curvature="diagonal")
    assert (diagonal @ v).dtype == torch.float64


def test_a_wrong_shape_is_named():
    _, curvature = curvature_of()
    v = {name: torch.zeros(shape) for name, shape in curvature.shapes.items()}
    v["head.weight"] = v["head.weight"].T
    with pytest.raises(ValueError, match=r"'head.weight' has shape \[4, 3\]"):
        curvature @ v


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": -1.0}, {"damping": torch.nan}])
def test_damping_must_be_positive(options):
    with pytest.raises(ValueError, match="damping"):
        curvature_of()[1].inverse(**options)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'even'"):
        curvature_of()[1].inverse(1.0, split="even")


# compute_kfac ------------------------------------------------------------------------------------


def test_approximations_by_layer():
    _, expand = curvature_of(approximation="expand")
    _, reduce = curvature_of(approximation="reduce")
    choice = {"conv": "reduce", "head": "expand", "unused": "expand"}
    for mixed in (choice, lambda name, module: choice[name]):
        _, curvature = curvature_of(approximation=mixed)
        for name in ("input_factor", "grad_output_factor"):
            actual = getattr(curvature.blocks["conv"], name)
            assert torch.equal(actual, getattr(reduce.blocks["conv"], name))
            assert not torch.equal(actual, getattr(expand.blocks["conv"], name))


@pytest.mark.parametrize(("approximation", "each"), [("expand", 16), ("reduce", 1)])
def test_blocks_tell_of_how_many_vectors_they_are(approximation, each):
    _, curvature = curvature_of(4, 3, approximation=approximation)
    vectors = {name: curvature.blocks[name].vectors for name in ("conv", "head", "unused")}
    assert vectors == {"conv": 7 * each, "head": 7, "unused": 0}
    bias = curvature.submatrix(["conv.bias"]).blocks["conv"]
    assert bias.vectors == 7 * each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approximation": {"conv": "reduce"}}, "approximation"),
        ({"approximation": "both"}, "'both'"),
        ({"fisher": "type-1"}, "'type-1'"),
        ({"mc_samples": 0}, "mc_samples is 0"),
        ({"bias": "none"}, "'none'"),
        ({"fisher": "forward-only"}, r"\['norm.weight', 'norm.bias'\]"),
    ],
)
def test_unknown_options_are_refused(options, message):
    model, loss_fn, data = problem()
    with pytest.raises(ValueError, match=message):
        kfac_tn.compute_kfac(model, loss_fn, data, **options)
    assert not any(module._forward_hooks for module in [loss_fn, *model.modules()])


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "none"),
        (nn.L1Loss(), TypeError, "L1Loss"),
        (nn.functional.cross_entropy, TypeError, "function"),
    ],
)
def test_losses_without_curvature_are_refused(loss_fn, error, message):
    model, _, data = problem()
    with pytest.raises(error, match=message):
        kfac_tn.compute_kfac(model, loss_fn, data)


def test_no_data_and_no_parameters_are_refused():
    model, loss_fn, data = problem()
    with pytest.raises(ValueError, match="empty"):
        kfac_tn.compute_kfac(model, loss_fn, [])
    with pytest.raises(ValueError, match="no trainable parameter"):
        kfac_tn.compute_kfac(model.requires_grad_(False), loss_fn, data)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_results_that_are_not_finite_are_refused(bad):
    model, loss_fn, data = problem()
    data[0][0][0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="isn't finite"):
        kfac_tn.compute_kfac(model, loss_fn, data)


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "mc", "forward-only"])
def test_model_loss_and_randomness_are_left_as_they_were(fisher):
    model, loss_fn, data = problem()
    model.norm.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    kfac_tn.compute_kfac(model, loss_fn, data, fisher=fisher, generator=generator)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in [loss_fn, *model.modules()])


COMPUTE = {
    "kfac": kfac_tn.compute_kfac,
    "ekfac": kfac_tn.compute_ekfac,
    "diagonal": kfac_tn.compute_ggn_diagonal,
    "gradients": lambda model, loss_fn, data: kfac_tn.compute_per_example_gradients(
        model, loss_fn, *data[0]
    ),
}


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_weights_that_calls_normalize_in_place_are_as_before(compute, kind):
    if kind is nn.EmbeddingBag and compute in ("kfac", "ekfac"):
        pytest.skip("which has no factors")
    model = nn.Sequential(kind(6, 4, max_norm=0.1), nn.Flatten(), nn.Linear(4, 2)).double()
    before = model[0].weight.detach().clone()
    indices = torch.arange(5) if kind is nn.Embedding else torch.arange(5)[:, None]
    COMPUTE[compute](model, nn.CrossEntropyLoss(), [(indices, torch.randint(2, (5,)))] * 2)
    assert torch.equal(model[0].weight, before)


class Reassigned(nn.Module):
    """Counts by making a new buffer, not by changing the old one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x


@pytest.mark.parametrize("compute", COMPUTE)
def test_buffers_that_calls_in_training_mode_change_are_as_before(compute):
    torch.manual_seed(0)
    scaled = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    norms = [nn.BatchNorm1d(4)] if compute == "kfac" else []
    model = nn.Sequential(scaled, *norms, Reassigned(), nn.Linear(4, 2)).double()
    data = [(torch.rand(5, 3).double(), torch.randint(2, (5,)))] * 2
    model.register_buffer("expanded", torch.zeros(()).expand(3))
    loss = model(data[0][0]).sum()
    buffers = dict(model.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    COMPUTE[compute](model, nn.CrossEntropyLoss(), data)
    loss.backward()
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in buffers.items())


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("how", ["wrapped", "in place", "layers"])
def test_models_that_were_compiled_before_have_the_curvature_that_they_had(compute, how):
    """What torch.compile made in an earlier call knows nothing of hooks."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    model[2].requires_grad_(False)  # its diagonal would be a random estimate
    data = [(torch.rand(5, 3).double(), torch.randint(2, (5,)))]

    def numbers(model):
        torch.manual_seed(0)
        result = COMPUTE[compute](model, nn.CrossEntropyLoss(), data)
        result = result if isinstance(result, dict) else result.diagonal()
        return flat(result)

    expected = numbers(model)
    if how == "layers":
        compiled = nn.Sequential(*(torch.compile(layer, backend="aot_eager") for layer in model))
    elif how == "wrapped":
        compiled = torch.compile(model, backend="aot_eager")
    else:
        compiled = model
        compiled.compile(backend="aot_eager")
    compiled(data[0][0]).sum().backward()
    torch.testing.assert_close(numbers(compiled), expected, **CLOSE)


@pytest.mark.parametrize("compute", COMPUTE)
def test_empty_batches_take_nothing_away(compute):
    torch.manual_seed(0)
    model, loss_fn = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
        nn.MSELoss(),
    )
    full, empty = ((torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (5, 0))
    if compute == "gradients":
        gradients = COMPUTE[compute](model, loss_fn, [empty])
        assert all(gradients[name].shape == (0, *p.shape) for name, p in model.named_parameters())
        return
    results = []
    for data in ([full], [empty, full, empty]):
        torch.manual_seed(0)
        result = COMPUTE[compute](model, loss_fn, data)
        results.append(flat(result if isinstance(result, dict) else result.diagonal()))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    with pytest.raises(ValueError, match="loader is empty"):
        COMPUTE[compute](model, loss_fn, [empty])


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.LazyLinear(2), "'0.weight' is not initialized yet: run the lazy model once before"),
        (nn.Linear(3, 2, dtype=torch.complex64), "'0.weight' has dtype torch.complex64: only real"),
        (nn.Linear(3, 2, device="meta"), "'0.weight' is on the meta device.*to_empty"),
    ],
    ids=["lazy", "complex", "meta"],
)
def test_parameters_without_a_shape_or_values_and_complex_ones_are_refused(
    compute, module, message
):
    data = [(torch.rand(5, 3), torch.rand(5, 2))]
    with pytest.raises(ValueError, match=message):
        COMPUTE[compute](nn.Sequential(module), nn.MSELoss(), data)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("use", [lambda model: model.forward, lambda model: model.parameters()])
def test_what_is_no_module_is_refused(compute, use):
    model, loss_fn, data = problem()
    with pytest.raises(TypeError, match=r"give the torch.nn.Module itself"):
        COMPUTE[compute](use(model), loss_fn, data)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("compute", COMPUTE)
def test_torchscript_is_refused_by_name(compute):
    data = [(torch.rand(5, 3), torch.rand(5, 2))]
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match=r"Module '1' is in TorchScript \(Linear\)"):
        COMPUTE[compute](model, nn.MSELoss(), data)
    with pytest.raises(TypeError, match="TorchScript"):
        kfac_tn.KFAC(model, nn.MSELoss())


class Detached(nn.Linear):
    """Computed without a graph."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("compute", COMPUTE)
def test_outputs_without_a_graph_are_refused_not_taken_for_flat(compute):
    data = [(torch.rand(5, 3), torch.rand(5, 2))]
    with pytest.raises(ValueError, match=r"outputs have no graph.*no_grad"):
        COMPUTE[compute](nn.Sequential(Detached(3, 2)), nn.MSELoss(), data)


class Functional(nn.Module):
    """A layer that is called, used without a call, or both."""

    def __init__(self, called: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.called = nn.Linear(3, 3), nn.Linear(3, 2), called
        self.double()

    def forward(self, x):
        h = nn.functional.linear(x, self.layer.weight, self.layer.bias).tanh()
        return self.head(h + self.layer(x) if self.called else h)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("called", [True, False])
def test_weights_used_without_their_module_are_refused_or_right(compute, called):
    model, loss_fn = Functional(called), nn.MSELoss()
    x, y = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    if "kfac" in compute:
        with pytest.raises(ValueError, match=r"layers \['layer'\] are used by other ways"):
            COMPUTE[compute](model, loss_fn, [(x, y)])
        return
    result = flat(COMPUTE[compute](model, loss_fn, [(x, y)]))
    if compute == "diagonal":
        expected = testing.dense_ggn(model, loss_fn, x, y).diagonal()
        torch.testing.assert_close(result, expected, **CLOSE)
        choice = {"layer": "none", "head": "kfac"}
        curvature = kfac_tn.compute_kfac(model, loss_fn, [(x, y)], curvature=choice)
        assert set(curvature.blocks) == {"layer.weight", "layer.bias", "head"}


class IntoItself(nn.Module):
    """What is made with a layer's weight alone is an input of the layer's very call."""

    def __init__(self, kind: str, always: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.kind, self.always = kind, always
        self.double()

    def forward(self, x):
        if not self.always and not (x > 0).all():
            return self.head(self.layer(x).tanh())
        if self.kind == "at once":
            h = nn.functional.linear(x, self.layer.weight)
        elif self.kind == "bias":
            h = x + self.layer.bias
        elif self.kind == "twice":
            h = self.layer(nn.functional.linear(x, self.layer.weight).tanh()).tanh()
        elif self.kind == "positions":
            h = torch.stack([nn.functional.linear(x, self.layer.weight), x], 1).cos()
            return self.head(self.layer(h).tanh().sum(1))
        else:
            return self.head(x * self.layer(self.layer.weight).sum())
        return self.head(self.layer(h).tanh())


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("kind", ["at once", "bias", "twice", "positions", "itself"])
def test_weights_used_for_the_input_of_their_own_call_are_refused_or_right(compute, kind):
    """In the second batch only: the first is what tells which calls say all."""
    model, loss_fn = IntoItself(kind, always=False), nn.MSELoss()
    x, y = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    batches = [(x - 0.5, y), (x, y)]
    if "kfac" in compute:
        with pytest.raises(ValueError, match=r"layers \['layer'\] are used by other ways"):
            COMPUTE[compute](model, loss_fn, batches)
        return
    if compute == "diagonal":
        expected = sum(testing.dense_ggn(model, loss_fn, *batch).diagonal() for batch in batches)
        result = flat(COMPUTE[compute](model, loss_fn, batches))
        torch.testing.assert_close(result, expected / 2, **CLOSE)


def test_recurrent_layers_are_no_input_of_themselves():
    """Their own outputs, transformed in between, are an input like any other."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = x.requires_grad_()
            for _ in range(3):
                h = torch.cat([self.layer(h).tanh(), h[:, :0]], 1) + x
            return self.head(self.layer(h.sin()))

    torch.manual_seed(0)
    model, batch = Recurrent().double(), (torch.rand(5, 3).double(), torch.rand(5, 2).double())
    curvature = kfac_tn.compute_kfac(model, nn.MSELoss(), [batch])
    assert set(curvature.blocks) == {"layer", "head"}


def test_hooks_are_removed_after_an_error_in_the_loader():
    model, loss_fn, data = problem()

    def broken():
        yield data[0]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        kfac_tn.compute_kfac(model, loss_fn, broken())
    assert not any(module._forward_hooks for module in [loss_fn, *model.modules()])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_under_no_grad_and_keeps_the_mode(context):
    model, loss_fn, data = problem()
    model.eval()
    options = {"fisher": "empirical", "generator": torch.Generator().manual_seed(0)}
    expected = kfac_tn.compute_kfac(model, loss_fn, data, **options)
    with context():
        options["generator"].manual_seed(0)
        actual = kfac_tn.compute_kfac(model, loss_fn, data, **options)
    assert torch.equal(actual.to_dense(), expected.to_dense())
    assert not model.training


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_different_size_count_by_their_terms(fisher, reduction):
    """Also where the targets that are ignored make the number of terms another."""
    model, _, data = problem(1, 5, 2)
    model.norm.requires_grad_(False)
    loss_fn = nn.CrossEntropyLoss(reduction=reduction, ignore_index=2)
    data[1][1][:3] = 2
    whole = [tuple(torch.cat(part) for part in zip(*data, strict=True))]
    split, joined = (
        kfac_tn.compute_kfac(model, loss_fn, each, fisher=fisher).to_dense()
        for each in (data, whole)
    )
    assert testing.relative_error(split, joined) < 1e-10


def test_diagonals_of_batches_of_different_weight():
    """One example in each batch: the squared gradients of type-2 columns are exact then."""
    model, _, data = problem(1, 1, 1, 1)
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]).double())
    data = [(x, torch.tensor([label])) for (x, _), label in zip(data, (0, 1, 2, 1), strict=True)]
    diagonal = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2").diagonal()
    whole = [torch.cat(part) for part in zip(*data, strict=True)]
    ggn = testing.dense_ggn(model, loss_fn, *whole)
    for name in ("norm.weight", "norm.bias"):
        expected = testing.diagonal_block(ggn, model, (name,)).diagonal()
        torch.testing.assert_close(diagonal[name], expected, rtol=1e-9, atol=1e-12)


def test_many_terms_in_half_precision_do_not_overflow():
    """The number of terms is a weight: 65,536 is infinite in float16."""
    model, loss_fn = nn.Linear(2, 1).half(), nn.MSELoss()
    data = [(torch.ones(70_000, 2).half(), torch.zeros(70_000, 1).half())]
    block = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2").blocks[""]
    assert block.input_factor.dtype == torch.float32
    torch.testing.assert_close(block.input_factor, torch.ones(1, 2, 2))
    torch.testing.assert_close(block.grad_output_factor, torch.tensor([[[2.0]]]), rtol=0.01, atol=0)


def test_unused_layers_of_half_precision_models_have_zero_blocks_of_the_same_dtype():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]).bfloat16()

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            return self.layers[0](x)

    data = [(torch.ones(3, 2).bfloat16(), torch.zeros(3, 2).bfloat16())]
    curvature = kfac_tn.compute_kfac(First(), nn.MSELoss(), data)
    assert curvature.diagonal()["layers.1.weight"].dtype == torch.float32
    assert not curvature.diagonal()["layers.1.weight"].any()


def test_complex_parameters_are_refused():
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex"):
        kfac_tn.compute_kfac(model, nn.MSELoss(), [(torch.rand(1, 2), torch.rand(1, 2))])


# An independent implementation, where it is right ------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), (4,)


def cnn():
    layers = (
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return nn.Sequential(*layers), (2, 5, 7)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["ce", "mse"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_agrees_with_curvlinops(make, approximation, fisher, loss_fn, bias):
    """Its KFAC of ungrouped, undilated, zero-padded convolutions and linear layers under a mean.

    Not compared, since it is wrong or missing there: groups, dilation, other paddings, class
    weights, ignored targets, modules that are called twice.
    """
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model, shape = make()
    model = model.double()
    y = torch.randint(3, (6,))
    if isinstance(loss_fn, nn.MSELoss):
        y = torch.rand(6, 3).double()
    x = torch.rand(6, *shape).double()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    theirs = curvlinops.KFACLinearOperator(
        model,
        loss_fn,
        list(model.parameters()),
        data,
        fisher_type=fisher,
        kfac_approx=approximation,
        separate_weight_and_bias=bias == "separate",
        check_deterministic=False,
    )
    ours = kfac_tn.compute_kfac(
        model, loss_fn, data, fisher=fisher, approximation=approximation, bias=bias
    ).to_dense()
    expected = theirs @ torch.eye(len(ours)).double()
    if fisher == "empirical" and isinstance(loss_fn, nn.MSELoss):
        expected = expected / 3  # its examples are single outputs, with gradients of their sum
    assert testing.relative_error(ours, expected) < 1e-9


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["mc", "type-2", "empirical"])
def test_kfac_of_log_softmax_and_nll_is_that_of_cross_entropy(approximation, fisher):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
    x, y = torch.randn(6, 1, 5, 5).double(), torch.tensor([0, 2, 1, -100, 0, 1])
    weight = torch.tensor([1.0, 3.0, 0.5]).double()
    options = {"approximation": approximation, "fisher": fisher}
    cross_entropy, nll = (cls(weight=weight) for cls in (nn.CrossEntropyLoss, nn.NLLLoss))
    expected, actual = (
        kfac_tn.compute_kfac(model, loss_fn, [(x, y)], generator=torch.manual_seed(0), **options)
        for model, loss_fn in (
            (nn.Sequential(body), cross_entropy),
            (nn.Sequential(body, nn.LogSoftmax(1)), nll),
        )
    )
    for name, block in expected.blocks.items():
        for factor in ("input_factor", "grad_output_factor"):
            ours, theirs = getattr(actual.blocks[name], factor), getattr(block, factor)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
