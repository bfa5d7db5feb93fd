"""How much memory exact diagonals of whole models take: what `max_memory` says, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_tn

MiB = 2**20
N, CLASSES = 16, 10


class Twice(nn.Module):
    """One convolution called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(48, 48, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).tanh())


def head(features: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, CLASSES)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)), (256,)),
    "linear, shared": (
        lambda: nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Flatten(), nn.Linear(2048, 10)),
        (8, 128),
    ),
    "conv": (lambda: nn.Sequential(nn.Conv2d(32, 64, 3), nn.Tanh(), *head(64)), (32, 6, 6)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(64, 128, 3, groups=4), nn.Tanh(), *head(128)),
        (64, 6, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(48, 48, 3), nn.Tanh(), *head(48)),
        (48, 4, 4),
    ),
    "called twice": (lambda: nn.Sequential(Twice(), *head(48)), (48, 4, 4)),
}


@pytest.mark.parametrize("mode", ["exact", "mc"])
@pytest.mark.parametrize("name", MODELS)
def test_peak_of_exact_diagonals(peak_bytes, name, mode):
    """Besides a backward pass and the result; columns times examples times weights are far more."""
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, loss_fn = build(), nn.CrossEntropyLoss()
    x, y = torch.randn(N, *shape), torch.randint(CLASSES, (N,))
    weights = sum(p.numel() for p in model.parameters()) * 4
    largest = max(p.numel() for p in model.parameters()) * 4

    def compute(max_memory):
        return kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)], mode, max_memory=max_memory)

    def backward():
        torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))

    compute(None)  # what is planned once stays
    # Verifying compares one example's gradients with autograd's, of all parameters.
    besides = peak_bytes(backward) + 3 * weights + MiB // 16
    peaks = {}
    for max_memory in (4 * largest, 8 * largest, None):
        peaks[max_memory] = peak_bytes(lambda limit=max_memory: compute(limit))
        if max_memory is not None:
            assert peaks[max_memory] <= besides + max_memory
    assert peaks[4 * largest] <= peaks[None]
    if mode == "exact":
        assert peaks[8 * largest] < CLASSES * N * weights / 2


class Own(nn.Module):
    """Layers of one's own."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(96, 96) / 10 for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = (x @ weight).tanh()
        return x[:, :CLASSES]


@pytest.mark.parametrize("mode", ["exact", "mc"])
def test_peak_of_what_is_differentiated_example_by_example(peak_bytes, mode):
    torch.manual_seed(0)
    model, loss_fn = Own(), nn.CrossEntropyLoss()
    x, y = torch.randn(N, 96), torch.randint(CLASSES, (N,))
    weights = sum(p.numel() for p in model.parameters()) * 4
    largest = weights // 8

    def compute(max_memory):
        return kfac_tn.compute_ggn_diagonal(model, loss_fn, [(x, y)], mode, max_memory=max_memory)

    besides = peak_bytes(lambda: model(x)) + weights + MiB // 16
    limits = (2 * largest, 5 * largest)
    peaks = [peak_bytes(lambda limit=limit: compute(limit)) for limit in (*limits, None)]
    for peak, limit in zip(peaks, limits, strict=False):
        assert peak <= besides + limit
    assert peaks[-1] > besides + limits[0]  # of all weights at once
    if mode == "exact":
        for chunked, whole in zip(compute(limits[0]).values(), compute(None).values(), strict=True):
            torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=0)
    message = rf"max_memory={largest:,} bytes is too little: one example's gradient of 'weights.0'"
    with pytest.raises(ValueError, match=message):
        compute(largest)
