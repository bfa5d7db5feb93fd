"""KFAC of models with transposed convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn import testing
from kfac_tn.testing import relative_error

TOLERANCE = 1e-10


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 2, (2, 3), padding=(0, 1), dilation=(2, 1)),
    ).double()


def as_convolution(layer: nn.ConvTranspose2d) -> nn.Conv2d:
    """The same function, for stride 1: a convolution with the flipped kernel."""
    ins, outs, groups = layer.in_channels, layer.out_channels, layer.groups
    padding = [
        d * (k - 1) - p
        for k, d, p in zip(layer.kernel_size, layer.dilation, layer.padding, strict=True)
    ]
    twin = nn.Conv2d(
        ins, outs, layer.kernel_size, padding=padding, dilation=layer.dilation, groups=groups
    ).double()
    twin.load_state_dict({"weight": native_to_conv(layer.weight, groups), "bias": layer.bias})
    return twin


def native_to_conv(weight: torch.Tensor, groups: int) -> torch.Tensor:
    weight = weight.detach().unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flip(2, 3)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_trained_like_the_convolution_that_it_is(approximation):
    torch.manual_seed(0)
    options = {"padding": 1, "dtype": torch.float64}
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, groups=2, **options),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 2, 2, dilation=2, **options),
    )
    twin = nn.Sequential(as_convolution(model[0]), nn.Tanh(), as_convolution(model[2]))
    x = torch.rand(5, 4, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x))
    y, loss_fn = torch.rand_like(model(x)), nn.MSELoss()
    for net in (model, twin):
        optimizer = kfac_tn.KFAC(net, loss_fn, approximation=approximation, fisher="type-2")
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_fn(net(x), y)
            loss.backward()
            optimizer.step()
    for index, groups in ((0, 2), (2, 1)):
        weight = native_to_conv(model[index].weight, groups)
        assert (
            relative_error(weight, twin[index].weight.detach()) < 1e-8
        )  # after roots and Cholesky
        assert relative_error(model[index].bias.detach(), twin[index].bias.detach()) < 1e-8


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_algebra_in_the_native_layout(bias, approximation):
    torch.manual_seed(0)
    model, loss_fn = decoder(), nn.MSELoss()
    x = torch.rand(5, 4, 3, 3, dtype=torch.float64)
    data = [(x, torch.rand_like(model(x)))]
    options = {"approximation": approximation, "bias": bias, "fisher": "type-2"}
    curvature = kfac_tn.compute_kfac(model, loss_fn, data, **options)
    dense = curvature.to_dense()
    v = torch.rand(len(dense), dtype=torch.float64)
    assert relative_error(curvature @ v, dense @ v) < TOLERANCE
    eye = torch.eye(len(dense), dtype=torch.float64)
    expected = torch.linalg.solve(dense + 0.1 * eye, v)
    assert relative_error(curvature.inverse(damping=0.1) @ v, expected) < TOLERANCE
    diagonal = curvature.diagonal()
    expected = torch.cat([diagonal[name].flatten() for name, _ in model.named_parameters()])
    assert relative_error(expected, dense.diagonal()) < TOLERANCE
    # By its definition: entry (c, d, k), (c', d', k') of a group is B[d, d'] A[(c, k), (c', k')].
    block = curvature.blocks["0"]
    a = block.input_factor[1][:18, :18].unflatten(1, (2, 9)).unflatten(0, (2, 9))
    expected = torch.einsum("cxey,df->cdxefy", a, block.grad_output_factor[1])
    size = model[0].weight[2:].numel()
    start = model[0].weight[:2].numel()
    actual = dense[start : start + size, start : start + size]
    assert relative_error(actual, expected.reshape(size, size)) < TOLERANCE


class Upsampling(nn.Module):
    """Transposed convolutions that are told what size to return, by position or by name."""

    def __init__(self, padded: bool, twice: bool = False):
        super().__init__()
        extra = {"output_padding": (1, 2)} if padded else {}
        options = {"stride": (2, 3), "padding": 1, "groups": 2, **extra}
        self.up = nn.ConvTranspose2d(4, 6, 3, **options)
        self.more = kfac_tn.tn.nn.ConvTransposeNd(6, 2, (2, 3), stride=2, output_padding=(0, 1))
        self.padded, self.twice = padded, twice

    def forward(self, x):
        small = self.up(x) if self.twice else 0
        sizes = [(6, 9), (12, 20)]
        x = self.up(x) if self.padded else self.up(x, sizes[0])
        x = self.more(x.tanh()) if self.padded else self.more(x.tanh(), output_size=sizes[1])
        return x if not self.twice else x + small.mean((1, 2, 3), keepdim=True)


def upsampling(twice: bool = False):
    torch.manual_seed(0)
    model = Upsampling(padded=False, twice=twice).double()
    twin = Upsampling(padded=True).double()
    twin.load_state_dict(model.state_dict())
    x = torch.rand(5, 4, 3, 3, dtype=torch.float64)
    return model, twin, x, torch.rand_like(model(x))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_output_size_at_the_call_is_that_output_padding(approximation):
    model, twin, x, y = upsampling()
    torch.testing.assert_close(model(x), twin(x))
    options = {"approximation": approximation, "fisher": "type-2"}
    actual, expected = (
        kfac_tn.compute_kfac(net, nn.MSELoss(), [(x, y)], **options) for net in (model, twin)
    )
    torch.testing.assert_close(actual.to_dense(), expected.to_dense(), rtol=1e-10, atol=1e-14)
    assert model.up.output_padding == (0, 0)


def test_calls_of_different_output_sizes():
    """EKFAC, its trace the GGN's, diagonals and per-example gradients of both calls together."""
    model, _, x, y = upsampling(twice=True)
    loss_fn = nn.MSELoss()
    ekfac = kfac_tn.compute_ekfac(model, loss_fn, [(x, y)], fisher="type-2")
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)])
    ggn = testing.dense_ggn(model, loss_fn, x, y)
    names = [name for name, _ in model.named_parameters()]
    flat = torch.cat([diagonal[name].flatten() for name in names])
    torch.testing.assert_close(flat, ggn.diagonal(), rtol=1e-10, atol=1e-14)
    for layer in ("up", "more"):
        own = testing.diagonal_block(ggn, model, (f"{layer}.weight", f"{layer}.bias"))
        assert relative_error(ekfac.blocks[layer].trace(), own.trace()) < TOLERANCE
    gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
    for example in range(len(x)):
        model.zero_grad()
        (loss_fn(model(x[example : example + 1]), y[example : example + 1]) / len(x)).backward()
        for name, parameter in model.named_parameters():
            assert relative_error(gradients[name][example], parameter.grad) < TOLERANCE


def test_trains_an_autoencoder():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 1, 3, padding=1),
    )
    before = copy.deepcopy(model.state_dict())
    x, loss_fn = torch.rand(16, 1, 8, 8), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_fn(model(x), x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all((before[name] != value).any() for name, value in model.state_dict().items())
