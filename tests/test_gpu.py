"""What must not depend on the device: the same numbers on a GPU as on the CPU."""

import copy

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn.testing import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", groups=2),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Flatten(2),
        nn.Linear(9, 6),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()


def make_data(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(3, (8,), generator=generator).to(device)


def train(device: str, steps: int, **options) -> tuple[nn.Module, nn.Module, kfac_tn.KFAC]:
    model, loss_fn = make_model().to(device), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, factor_interval=2, inverse_interval=3, **options)
    x, y = make_data(device)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return model, loss_fn, optimizer


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_training_agrees_with_the_cpu(approximation, fisher):
    options = {"approximation": approximation, "fisher": fisher}
    (expected, *_), (actual, *_) = (train(device, 6, **options) for device in ("cpu", "cuda"))
    for name, parameter in expected.named_parameters():
        error = relative_error(actual.get_parameter(name).detach().cpu(), parameter.detach())
        assert error < 1e-6, name


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_curvature_agrees_with_the_cpu(approximation):
    results = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device).eval()
        model[2].requires_grad_(False)
        options = {"approximation": approximation, "fisher": "type-2"}
        data = [make_data(device)]
        curvature = kfac_tn.compute_kfac(model, nn.CrossEntropyLoss(), data, **options)
        results.append(curvature.to_dense().cpu())
    assert relative_error(results[1], results[0]) < 1e-10


def test_monte_carlo_training_continues_bit_for_bit():
    model, loss_fn, optimizer = train("cuda", 5)
    other, other_loss_fn = copy.deepcopy(model), nn.CrossEntropyLoss()
    resumed = kfac_tn.KFAC(other, other_loss_fn, factor_interval=2, inverse_interval=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    x, y = make_data("cuda")
    for net, loss, chosen in ((model, loss_fn, optimizer), (other, other_loss_fn, resumed)):
        for _ in range(3):
            chosen.zero_grad()
            loss(net(x), y).backward()
            chosen.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_grad_scaler_and_autocast():
    torch.manual_seed(0)
    model, loss_fn = make_model().float().cuda(), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, factor_interval=1, inverse_interval=1)
    scaler = torch.amp.GradScaler("cuda")
    x, y = (
        tensor.float() if tensor.is_floating_point() else tensor for tensor in make_data("cuda")
    )
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = loss_fn(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.factors()
