"""Ordinary models on which other KFACs crash, skip something, or are silently wrong.

Each docstring says what was measured with others. Float64, and exact unless said otherwise.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfac_tn
from kfac_tn.capture import Capture
from kfac_tn.layers import LinearFamily, partition

pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
EAGER = {"factor_interval": 1, "inverse_interval": 1}
EXACT = ["type-2", "empirical", "forward-only"]
APPROXIMATIONS = ["expand", "reduce"]


def watch(model, loss_fn, fisher="type-2", approximation="expand"):
    generator = torch.Generator().manual_seed(0)
    blocks, _ = partition(model, approximation)
    return Capture(blocks, loss_fn, fisher, generator=lambda device: generator)


def factors(model, loss_fn, x, y, fisher="type-2", approximation="expand"):
    """{layer: (A, B)} of one ordinary forward and backward pass."""
    capture = watch(model, loss_fn, fisher, approximation)
    loss_fn(model(x), y).backward()
    return taken(capture)


def taken(capture):
    found = capture.take().factors
    return {block.name: (each.input, each.grad_output) for block, each in found.items()}


def assert_same(actual, expected):
    assert actual
    assert actual.keys() == expected.keys()
    for name in expected:
        for one, other in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def train(model, loss_fn, optimizer, x, y, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
    return loss


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Convolutions ------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": (2, {"kernel_size": 3}),
    "grouped": (2, {"kernel_size": 3, "groups": 2}),
    "depthwise": (2, {"kernel_size": 3, "groups": 4, "padding": 1}),
    "dilated": (2, {"kernel_size": 2, "dilation": (2, 3), "stride": (1, 2)}),
    "same": (2, {"kernel_size": 3, "padding": "same"}),
    "same, even kernel": (2, {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)}),
    "circular": (2, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    "reflect": (2, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect", "groups": 2}),
    "replicate": (2, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2}),
    "1-d": (1, {"kernel_size": 3, "stride": 2, "groups": 2}),
    "1-d same": (1, {"kernel_size": 4, "padding": "same"}),
    "3-d": (3, {"kernel_size": (1, 2, 2), "padding": (0, 1, 0), "groups": 2}),
    "3-d same, circular": (3, {"kernel_size": 2, "padding": "same", "padding_mode": "circular"}),
}


def patches(layer, x):
    """[N, G, d_in, R]: what each weight row is multiplied with, read off the layer itself.

    With the i-th unit vector for a weight row, the output is the i-th entry of all patches.
    """
    with torch.no_grad():
        probe = copy.deepcopy(layer)
        probe.bias.zero_()
        rows = []
        for index in range(probe.weight[0].numel()):
            probe.weight.zero_()
            probe.weight.flatten(1)[:, index] = 1
            rows.append(probe(x).flatten(2)[:, :: layer.out_channels // layer.groups])
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize(("dimension", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_convolutions(dimension, options, approximation):
    """Crashes, wrong by 28 to 95%, or not supported.

    Others: grouped or dilated: a crash, or silently wrong, groups averaged (59-95% error).
    padding="same": a ValueError. Circular, reflect: 28-47% wrong. 1-d and 3-d: missing.
    """
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimension - 1]
    layer = kind(4, 8, **options).double()
    x = torch.rand(3, 4, *(7, 6, 4)[:dimension]).double()
    model, loss_fn = nn.Sequential(layer, nn.Tanh(), nn.Flatten()), nn.MSELoss()
    hidden = layer(x)
    y = torch.rand(3, hidden[0].numel()).double()
    ((a, b),) = factors(model, loss_fn, x, y, "empirical", approximation).values()
    groups = layer.groups
    unfolded = patches(layer, x)
    assert unfolded.shape[1] == groups
    unfolded = F.pad(unfolded, (0, 0, 0, 1), value=1.0)  # the bias
    output = layer(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss_fn(output.tanh().flatten(1), y), output)
    g = g.view(3, groups, 8 // groups, -1)
    if approximation == "reduce":
        unfolded, g = unfolded.mean(3, keepdim=True), g.sum(3, keepdim=True)
    positions = unfolded.shape[3]
    expected_a = torch.einsum("ngir,ngjr->gij", unfolded, unfolded) / (3 * positions)
    expected_b = 3 * torch.einsum("ngir,ngjr->gij", g, g)
    torch.testing.assert_close(a, expected_a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b, expected_b, rtol=1e-9, atol=1e-12)
    optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER)
    before = values(model)
    train(model, loss_fn, optimizer, x, y)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# Weights that are used several times -------------------------------------------------------------


class Shared(nn.Module):
    """Applies one weight to several inputs, in different ways that are the same mathematically."""

    def __init__(self, how: str, layer: nn.Module, out: int):
        super().__init__()
        self.how, self.layer = how, layer
        if how == "tied modules":
            self.again = copy.deepcopy(layer)
            self.again.weight, self.again.bias = layer.weight, layer.bias
        self.head = nn.Linear(out, 3)

    def forward(self, x):  # [N, 2, ...]
        if self.how == "one call":
            hidden = self.layer(torch.cat(x.unbind(1), dim=-1) if x.dim() == 4 else x)
            parts = hidden.chunk(2, dim=-1) if x.dim() == 4 else hidden.unbind(1)
        else:
            second = self.again if self.how == "tied modules" else self.layer
            parts = self.layer(x[:, 0]), second(x[:, 1])
        return self.head((parts[0].tanh() - 2 * parts[1].sigmoid()).flatten(1))


@pytest.mark.parametrize("how", ["two calls", "tied modules"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_module_called_twice_and_weights_tied_between_modules(how, kind, fisher, approximation):
    """114% wrong; tied weights are stepped once for each module. Here: calls are positions."""
    torch.manual_seed(0)
    layer, out = nn.Linear(4, 5), 5
    x = torch.rand(6, 2, 4).double()
    if kind == "convolution":  # its patches don't overlap, so the inputs can be concatenated
        layer, out = nn.Conv1d(4, 5, 2, stride=2), 15
        x = torch.rand(6, 2, 4, 6).double()
    expected_model = Shared("one call", layer, out).double()
    model = Shared(how, copy.deepcopy(layer), out).double()
    model.load_state_dict(expected_model.state_dict(), strict=False)
    y, loss_fn = torch.randint(3, (6,)), nn.CrossEntropyLoss()
    torch.testing.assert_close(model(x), expected_model(x))
    actual = factors(model, loss_fn, x, y, fisher, approximation)
    expected = factors(expected_model, loss_fn, x, y, fisher, approximation)
    assert set(actual) == {"layer", "head"}
    assert_same(actual, expected)
    # ... and stepped once:
    options = {"fisher": fisher, "approximation": approximation, "lr": 0.01, **EAGER}
    for each in (model, expected_model):
        train(each, loss_fn, kfac_tn.KFAC(each, loss_fn, **options), x, y)
    for name, parameter in expected_model.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_two_forward_passes_into_one_loss(fisher, approximation):
    """Siamese networks: only the last pass was seen, or inputs and gradients didn't match."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.rand(6, 2, 4).double(), torch.randint(3, (6,))
    loss_fn = nn.CrossEntropyLoss()
    capture = watch(trunk, loss_fn, fisher, approximation)
    loss_fn(trunk(x[:, 0]) + trunk(x[:, 1]), y).backward()
    actual = taken(capture)
    capture.close()
    capture = watch(trunk, loss_fn, fisher, approximation)
    loss_fn(trunk(x).sum(1), y).backward()
    assert_same(actual, taken(capture))


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_calls_with_different_numbers_of_positions(fisher, approximation):
    """As above: one call at two positions and one at three are five positions."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y, loss_fn = torch.rand(6, 5, 4).double(), torch.randint(3, (6,)), nn.CrossEntropyLoss()
    expected = factors(nn.Sequential(trunk, Sum()), loss_fn, x, y, fisher, approximation)
    capture = watch(trunk, loss_fn, fisher, approximation)
    loss_fn(trunk(x[:, :2]).sum(1) + trunk(x[:, 2:]).sum(1), y).backward()
    assert_same(taken(capture), {name[2:]: each for name, each in expected.items()})


class Sum(nn.Module):
    """Over positions."""

    def forward(self, x):
        return x.sum(1)


@pytest.mark.parametrize("fisher", EXACT)
def test_two_forward_passes_concatenated_into_one_loss(fisher):
    """As above, for halves of a batch (with expand, or halves of different size)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y, loss_fn = torch.rand(6, 4).double(), torch.randint(3, (6,)), nn.CrossEntropyLoss()
    for sizes, approximation in (((3, 3), "expand"), ((2, 4), "expand"), ((2, 4), "reduce")):
        expected = factors(model, loss_fn, x, y, fisher, approximation)
        capture = watch(model, loss_fn, fisher, approximation)
        loss_fn(torch.cat([model(part) for part in x.split(sizes)]), y).backward()
        assert_same(taken(capture), expected)
        capture.close()


class Language(nn.Module):
    """Embedding and output layer share their weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.output = nn.Linear(4, 7)
        self.output.weight = self.embedding.weight
        self.double()

    def forward(self, x):
        return self.output(self.hidden(self.embedding(x)).tanh()).mT


def test_a_weight_tied_to_an_embedding_is_stepped_once():
    """Stepped twice, by two blocks. Here: once, by Adam, and the table says why."""
    model, loss_fn = Language(), nn.CrossEntropyLoss()
    x = torch.randint(7, (4, 6))
    optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.01, betas=(0.9, 0.98), **EAGER)
    reasons = {row.parameter: (row.treatment, row.why) for row in optimizer.coverage()}
    assert reasons["embedding.weight"][0] == "Adam"
    assert "shared with Linear 'output', another kind of layer" in reasons["embedding.weight"][1]
    assert reasons["hidden.weight"][0] == "KFAC-expand"
    twin = Language()
    adam = torch.optim.AdamW([twin.embedding.weight], 0.01, (0.9, 0.98), weight_decay=0)
    loss_fn(twin(x), x).backward()
    adam.step()
    train(model, loss_fn, optimizer, x, x, steps=1)
    torch.testing.assert_close(model.embedding.weight, twin.embedding.weight)
    assert model.output.weight is model.embedding.weight


class TiedByHand(Language):
    """As ``Language``, but no module computes the output layer; a linear layer is used twice."""

    def __init__(self):
        super().__init__()
        del self.output
        self.last = nn.Linear(4, 4).double()

    def forward(self, x):
        h = self.hidden(self.embedding(x)).tanh()
        h = self.last(h + F.linear(h, self.hidden.weight)).tanh()
        return F.linear(h, self.embedding.weight).mT


@pytest.mark.parametrize("fisher", [*EXACT, "mc"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_weights_that_are_used_without_their_module_too_have_no_part_of_a_curvature(
    fisher, curvature
):
    """Taken for what its module's calls tell, which is a part. Here: as without Kronecker factors.

    Compared with a model whose layers have no block by choice.
    """
    if fisher == "forward-only" and curvature != "kfac":
        pytest.skip("no gradients")
    x, loss_fn = torch.randint(7, (4, 6)), nn.CrossEntropyLoss()
    options = {"fisher": fisher, "lr": 0.01, **EAGER}
    used = {"embedding": "none", "hidden": "none", "last": curvature}
    models = TiedByHand(), TiedByHand()
    optimizers = [
        kfac_tn.KFAC(model, loss_fn, curvature=choice, **options)
        for model, choice in zip(models, (curvature, used), strict=True)
    ]
    with pytest.warns(RuntimeWarning, match=r"'(hidden|embedding)'.*without calling the module"):
        train(models[0], loss_fn, optimizers[0], x, x)
    train(models[1], loss_fn, optimizers[1], x, x)
    assert_same(
        {"all": values(models[0]).values()},
        {"all": values(models[1]).values()},
    )
    if curvature == "kfac":
        assert list(optimizers[0].factors()) == ["last"]


@pytest.mark.parametrize("fisher", [*EXACT, "mc"])
def test_weights_replaced_for_a_call_are_not_those_of_the_layer(fisher):
    """torch.func.functional_call with twice the weights: the layer's calls tell of those."""
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    results = []
    for curvature in ("kfac", {"0": "none", "2": "kfac"}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        loss_fn = nn.CrossEntropyLoss()
        options = {**EAGER, "step_rule": "graft"}  # which never calls the model itself
        optimizer = kfac_tn.KFAC(model, loss_fn, curvature=curvature, fisher=fisher, **options)

        def call(x, model=model):
            twice = {"0.weight": 2 * model[0].weight, "0.bias": 2 * model[0].bias}
            return torch.func.functional_call(model, twice, x)

        if curvature == "kfac":
            with pytest.warns(RuntimeWarning, match="'0'.*functional_call"):
                train(call, loss_fn, optimizer, x, y)
        else:
            train(call, loss_fn, optimizer, x, y)
        assert list(optimizer.factors()) == ["2"]
        results.append({"all": values(model).values()})
    assert_same(*results)


# Losses ------------------------------------------------------------------------------------------

LOSSES = {
    "class weights": (nn.CrossEntropyLoss, {"weight": torch.tensor([0.2, 5.0, 1.0]).double()}),
    "ignore_index": (nn.CrossEntropyLoss, {"ignore_index": 1}),
    "label smoothing": (nn.CrossEntropyLoss, {"label_smoothing": 0.2}),
    "pos_weight": (nn.BCEWithLogitsLoss, {"pos_weight": torch.tensor([0.2, 5.0, 1.0]).double()}),
    "element weights": (nn.BCEWithLogitsLoss, {"weight": torch.tensor([0.2, 5.0, 1.0]).double()}),
}


@pytest.mark.parametrize(("kind", "options"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_options_of_losses_count(kind, options, reduction):
    """Class weights: 5x off; ignore_index and pos_weight: ignored.

    Here: B of the last layer is the loss's own Hessian, by autograd.
    """
    torch.manual_seed(0)
    loss_fn = kind(**options, reduction=reduction)
    model, x = nn.Linear(4, 3).double(), torch.rand(6, 4).double()
    y = torch.tensor([0, 1, 2, 1, 0, 0])
    if kind is nn.BCEWithLogitsLoss:
        y = F.one_hot(y, 3).double()
    ((_, b),) = factors(model, loss_fn, x, y).values()
    logits = model(x).detach()
    hessian = torch.autograd.functional.hessian(lambda z: loss_fn(z, y), logits)
    torch.testing.assert_close(b[0], torch.einsum("ninj->ij", hessian), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "mc"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_mean_loss_is_the_sum_divided_by_its_count(fisher, approximation):
    """B was off by 1/B^2 under a mean loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double()
    x, y = torch.rand(5, 2, 4).double(), torch.randint(3, (5,))
    mean, total = (
        factors(model, nn.CrossEntropyLoss(reduction=r), x, y, fisher, approximation)
        for r in ("mean", "sum")
    )
    assert_same(mean, {name: (a, b / 5) for name, (a, b) in total.items()})


# Architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_transformer_encoder_layer(training, approximation):
    """Crashes. Here: every parameter is trained, in train and in eval mode."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(encoder, nn.Linear(8, 3)).double().train(training)
    x, y = torch.rand(4, 5, 8).double(), torch.rand(4, 5, 3).double()
    loss_fn = nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.01, approximation=approximation, **EAGER)
    before = values(model)
    first = train(model, loss_fn, optimizer, x, y, steps=1)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert train(model, loss_fn, optimizer, x, y, steps=20) < first
    attention = {"0.self_attn.in_proj", "0.self_attn.out_proj"}
    assert set(optimizer.factors()) == {*attention, "0.linear1", "0.linear2", "1"}
    with torch.no_grad():
        model.eval()(x)  # torch's fast path


class Partial(nn.Module):
    """An unused, a frozen and a sometimes-used layer; normalization; a free parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)
        self.frozen = nn.Linear(2, 4).requires_grad_(False)
        self.sometimes, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head, self.free = nn.Linear(4, 3), nn.Parameter(torch.ones(4))
        self.double()

    def forward(self, x, use=True):
        x = self.frozen(self.bn(self.conv(x)).mean((2, 3))).tanh()
        return self.head((self.sometimes(x) if use else x) * self.free)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "mc", "forward-only"])
def test_unused_frozen_and_eval_mode_layers_and_other_parameters(training, fisher):
    """Crashes on the first three; parameters of unsupported layers were never updated."""
    model, loss_fn = Partial().train(training), nn.CrossEntropyLoss()
    x, y = torch.rand(6, 1, 4, 4).double(), torch.randint(3, (6,))
    optimizer = kfac_tn.KFAC(model, loss_fn, fisher=fisher, **EAGER)
    for use in (False, True, False, True):
        before = values(model)
        optimizer.zero_grad()
        loss_fn(model(x, use), y).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            stands = "frozen" in name or "unused" in name or ("sometimes" in name and not use)
            assert torch.equal(parameter, before[name]) is stands, name
    assert set(optimizer.factors()) == {"conv", "sometimes", "head"}
    treatments = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert treatments["bn.weight"] == treatments["free"] == "Adam"
    assert treatments["frozen.weight"] == "none"


class Thrice(nn.Module):
    """Changes the number of features, too."""

    def forward(self, x):
        return torch.cat([3 * x, -x], dim=1)


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_the_users_own_hooks_change_inputs_and_outputs(fisher, approximation):
    """A layer's factors are those of what it computed, not of what hooks made of that."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(3, 4), Thrice(), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3), nn.ReLU()
    ).double()
    hooked = nn.Sequential(copy.deepcopy(plain[0]), nn.Tanh(), copy.deepcopy(plain[4]))
    hooked[0].register_forward_hook(lambda module, args, output: Thrice()(output))
    norm = copy.deepcopy(plain[3])
    hooked[2].register_forward_pre_hook(lambda module, args: (norm(args[0]),))
    hooked[2].register_forward_hook(lambda module, args, output: (output.relu(),))
    hooked.append(nn.Identity())
    hooked[3].register_forward_pre_hook(lambda module, args: args[0])
    x, y, loss_fn = torch.rand(4, 3).double(), torch.randint(3, (4,)), nn.CrossEntropyLoss()
    expected = factors(plain, loss_fn, x, y, fisher, approximation)
    actual = factors(hooked, loss_fn, x, y, fisher, approximation)
    assert_same({"0": actual["0"], "4": actual["2"]}, expected)


@pytest.mark.parametrize("step_rule", ["adaptive", "quadratic"])
def test_hooks_on_the_inputs_of_the_model_act_once_when_its_batch_is_used_again(step_rule):
    ends = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.MSELoss()
        x, y = torch.rand(6, 3).double(), torch.rand(6, 2).double()
        if hooked:
            model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        optimizer = kfac_tn.KFAC(model.double(), loss_fn, step_rule=step_rule, **EAGER)
        train(model, loss_fn, optimizer, x if hooked else 2 * x, y, steps=4)
        ends.append(values(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear 2-d", "linear 3-d", "linear 4-d"])
def test_in_place_activations(fisher, approximation, bias, kind):
    """Full backward hooks crash on in-place ReLU; tensor hooks see the gradient behind it.

    A linear layer on more than two axes returns a view, whose graph an in-place change rewrites.
    """
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        if kind == "conv":
            layers = [
                nn.Conv2d(2, 3, 2, bias=bias),
                nn.ReLU(inplace),
                nn.Conv2d(3, 3, 2, bias=bias),
            ]
            x, size = torch.rand(4, 2, 4, 4).double(), 12
        else:
            layers = [nn.Linear(3, 5, bias=bias), nn.ReLU(inplace), nn.Linear(5, 3, bias=bias)]
            shape = {"linear 2-d": (), "linear 3-d": (2,), "linear 4-d": (2, 2)}[kind]
            x, size = torch.rand(4, *shape, 3).double(), 3 * 2 ** len(shape)
        layers += [nn.LeakyReLU(0.1, inplace), nn.Flatten(), nn.Linear(size, 3)]
        model = nn.Sequential(*layers).double()
        y = torch.randint(3, (4,))
        results.append(factors(model, nn.CrossEntropyLoss(), x, y, fisher, approximation))
    assert_same(results[1], results[0])
    assert len(results[0]) == 3


def test_one_infinite_batch_does_not_poison_the_factors():
    """One inf in a batch stays in the running averages for ever."""
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), nn.MSELoss()
    twin = copy.deepcopy(model)
    x, y = torch.rand(6, 3), torch.rand(6, 2)
    bad = x.clone()
    bad[0, 0] = torch.inf
    optimizer, twin_optimizer = (
        kfac_tn.KFAC(m, loss_fn, fisher="type-2", **EAGER) for m in (model, twin)
    )
    train(model, loss_fn, optimizer, x, y, steps=1)
    with pytest.warns(RuntimeWarning, match="isn't finite"):
        train(model, loss_fn, optimizer, bad, y, steps=1)
    train(model, loss_fn, optimizer, x, y, steps=1)
    # The other optimizer watches the same loss, but never sees this model: no interference.
    train(twin, loss_fn, twin_optimizer, x, y, steps=2)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


# Training loops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2)])
def test_micro_batches_make_the_same_steps(fisher, approximation, reduction, sizes):
    """Gradient accumulation changed the result."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double()
    twin = copy.deepcopy(model)
    x, y = torch.rand(6, 2, 4).double(), torch.randint(3, (6,))
    loss_fn, twin_loss = (nn.CrossEntropyLoss(reduction=reduction) for _ in range(2))
    options = {"fisher": fisher, "approximation": approximation, "lr": 0.01, **EAGER}
    train(model, loss_fn, kfac_tn.KFAC(model, loss_fn, **options), x, y, steps=3)
    optimizer = kfac_tn.KFAC(twin, twin_loss, **options)
    for _ in range(3):
        optimizer.zero_grad()
        for x_m, y_m in zip(x.split(sizes), y.split(sizes), strict=True):
            share = len(x_m) / len(x) if reduction == "mean" else 1.0
            (twin_loss(twin(x_m), y_m) * share).backward()
        optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def scaled_run(kind, model, scaler, batches, fisher="type-2"):
    loss_fn = nn.CrossEntropyLoss()
    preconditioner = None
    if kind == "optimizer":
        optimizer = kfac_tn.KFAC(model, loss_fn, lr=0.01, fisher=fisher, **EAGER)
    else:
        preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, fisher=fisher, **EAGER)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y, factor in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y) * factor
        (scaler.scale(loss) if scaler else loss).backward()
        if preconditioner is not None:
            preconditioner.step()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return (preconditioner or optimizer).factors()


@pytest.mark.parametrize("kind", ["optimizer", "preconditioner"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "mc"])
def test_gradient_scaling(kind, fisher):
    """The scaler raises, or its factor gets into the curvature.

    Here: the same steps, and an overflow, whose step the scaler skips, leaves no trace.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    twin, good = copy.deepcopy(model), [(torch.rand(6, 4).double(), torch.randint(3, (6,)), 1.0)]
    overflow = [(good[0][0], good[0][1], torch.inf)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    expected = scaled_run(kind, model, None, 3 * good, fisher)
    if fisher != "mc" and kind == "preconditioner":
        with pytest.warns(RuntimeWarning, match="skip its step"):
            actual = scaled_run(kind, twin, scaler, good + overflow + 2 * good, fisher)
    elif fisher != "mc":
        actual = scaled_run(kind, twin, scaler, good + overflow + 2 * good, fisher)
    else:  # a skipped batch has drawn its samples
        actual = scaled_run(kind, twin, scaler, 3 * good, fisher)
    assert scaler.get_scale() == (2.0**14 if fisher == "mc" else 2.0**13)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    for name, each in expected.items():
        torch.testing.assert_close(actual[name].input, each.input, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(actual[name].grad_output, each.grad_output)


def test_unscaling_and_clipping_before_the_step():
    """scaler.unscale_(optimizer) and clip_grad_norm_, as in PyTorch's recipes."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    x, y = torch.rand(6, 4).double(), torch.randint(3, (6,))
    results = []
    for scaler in (torch.amp.GradScaler("cpu"), None):
        twin = copy.deepcopy(model)
        optimizer = kfac_tn.KFAC(twin, loss_fn, step_rule="fixed", fisher="type-2", **EAGER)
        loss = loss_fn(twin(x), y)
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        scaler.step(optimizer) if scaler else optimizer.step()
        results.append(values(twin))
        optimizer.close()
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-9, atol=1e-12)


class Checkpointed(nn.Module):
    """A part of it is checkpointed, or not (None)."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.block = nn.Sequential(
            nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(5, 4)
        )
        self.double()

    def forward(self, x):
        hidden = self.first(x).tanh()
        if self.reentrant is None:
            return self.head(self.block(hidden))
        return self.head(checkpoint(self.block, hidden, use_reentrant=self.reentrant))


@pytest.mark.parametrize("fisher", [*EXACT, "mc"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_activation_checkpointing(fisher, approximation):
    """Inputs were counted twice: the layers run again during the backward pass."""
    x, y = torch.rand(6, 4).double(), torch.randint(3, (6,))
    results, gradients = [], []
    for model in (Checkpointed(), Checkpointed(reentrant=False)):
        torch.manual_seed(1)
        results.append(factors(model, nn.CrossEntropyLoss(), x, y, fisher, approximation))
        gradients.append([p.grad for p in model.parameters()])
    assert_same(results[1], results[0])
    assert len(results[0]) == 4
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_layers_that_run_again_for_checkpointing_are_not_watched_again(monkeypatch):
    """Nor is the time spent for nothing."""
    model, loss_fn = Checkpointed(reentrant=False), nn.CrossEntropyLoss()
    capture = watch(model, loss_fn)
    calls = []
    plain = LinearFamily.input_factor
    monkeypatch.setattr(
        LinearFamily, "input_factor", lambda *args: calls.append(args[1]) or plain(*args)
    )
    loss_fn(model(torch.rand(6, 4).double()), torch.randint(3, (6,))).backward()
    assert len(calls) == len(taken(capture)) == 4


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_activation_checkpointing_in_compute_kfac(approximation):
    """There the extra pass starts outside of any backward pass."""
    data = [(torch.rand(6, 4).double(), torch.randint(3, (6,)))]
    results = []
    for model in (Checkpointed(), Checkpointed(reentrant=False)):
        options = {"fisher": "type-2", "approximation": approximation}
        curvature = kfac_tn.compute_kfac(model.eval(), nn.CrossEntropyLoss(), data, **options)
        results.append(curvature.to_dense())
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fisher", [*EXACT, "mc"])
def test_reentrant_checkpointing_is_refused_rather_than_wrong(fisher):
    """Its layers run without a graph: they were skipped in silence."""
    model, loss_fn = Checkpointed(reentrant=True), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, fisher=fisher)
    loss = loss_fn(model(torch.rand(6, 4).double()), torch.randint(3, (6,)))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()
    assert optimizer.factors() == {}


@pytest.mark.parametrize("fisher", [*EXACT, "mc"])
def test_reentrant_checkpointing_of_the_whole_model_is_refused_too(fisher):
    """Where gradients of the input are all that the graph shows."""
    model, loss_fn = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, fisher=fisher)
    x = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    loss = loss_fn(checkpoint(model, x, use_reentrant=True), torch.randint(3, (6,)))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()
    assert optimizer.factors() == {}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("outside", [True, False], ids=["wrapped model", "inner model"])
def test_distributed_data_parallel(process_group, outside):
    """An unmodified DDP wrapper is refused. Here with a world of one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(True), nn.Flatten(), nn.Linear(9, 3)).double()
    twin = copy.deepcopy(model)
    x, y = torch.rand(6, 2, 4).double(), torch.randint(3, (6,))
    losses = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    wrapped = nn.parallel.DistributedDataParallel(twin)
    optimizer = kfac_tn.KFAC(model, losses[0], **EAGER)
    parallel = kfac_tn.KFAC(wrapped if outside else twin, losses[1], **EAGER)
    train(model, losses[0], optimizer, x, y, steps=3)
    train(wrapped, losses[1], parallel, x, y, steps=3)
    prefix = "module." if outside else ""
    assert set(parallel.factors()) == {f"{prefix}{name}" for name in optimizer.factors()}
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_checkpoints_hold_the_whole_state():
    """They lose the factors, or fail torch.load(weights_only=True): see tests/optim."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, **EAGER)
    train(model, loss_fn, optimizer, torch.rand(6, 4), torch.randint(3, (6,)))
    state = optimizer.state_dict()["curvature"]["factors"][""]
    assert torch.equal(state["input"], optimizer.factors()[""].input)


def test_an_average_of_the_weights_next_to_the_model():
    """Copies of the model (EMA, SWA) reported to the optimizer, or couldn't be made."""
    torch.manual_seed(0)
    model, loss_fn = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        nn.CrossEntropyLoss(),
    )
    twin = copy.deepcopy(model)
    x, y = torch.rand(6, 4), torch.randint(3, (6,))
    optimizer, twin_optimizer = (kfac_tn.KFAC(m, loss_fn, **EAGER) for m in (model, twin))
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        train(model, loss_fn, optimizer, x, y, steps=1)
        average.update_parameters(model)
        loss_fn(average(x), y).backward()
    train(twin, loss_fn, twin_optimizer, x, y, steps=3)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
