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
