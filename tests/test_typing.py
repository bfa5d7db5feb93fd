"""What users write, read by a type checker."""

from __future__ import annotations

import pytest

api = pytest.importorskip("mypy.api")

SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset
import kfac_tn

model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
loss_fn = torch.nn.CrossEntropyLoss()
data = TensorDataset(torch.rand(8, 1, 4, 4), torch.randint(2, (8,)))
loader = DataLoader(data, batch_size=4)
optimizer = kfac_tn.KFAC(model, loss_fn)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
for x, y in loader:
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    optimizer.step()
    scheduler.step()
sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, approximation={"0": "reduce"})
done: bool = preconditioner.step()
curvature = kfac_tn.compute_kfac(model, loss_fn, loader, approximation="reduce", fisher="type-2")
factor: torch.Tensor = curvature.blocks["0"].input_factor
named: dict[str, torch.Tensor] = {name: p.detach() for name, p in model.named_parameters()}
product: dict[str, torch.Tensor] = curvature @ named
flat: torch.Tensor = curvature.inverse(damping=1e-3) @ torch.ones(58)
diagonal: dict[str, torch.Tensor] = (2 * curvature + curvature).diagonal()
number: float = curvature.trace().item() + curvature.logdet(damping=1e-3).item()
samples: dict[str, torch.Tensor] = curvature.sample(damping=1e-3, n=10)
exact: dict[str, torch.Tensor] = kfac_tn.compute_ggn_diagonal(model, loss_fn, loader)
gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
spec = kfac_tn.tn.ConvSpec(input_shape=(8, 64, 56, 56), weight_shape=(64, 64, 3, 3), padding=1)
network = kfac_tn.tn.kfac_reduce_input_factor(spec)
value: torch.Tensor = network.simplify().evaluate(input=x)
equation, operands, shape = network.einsum(input=x)
a: torch.Tensor = kfac_tn.functional.conv_input_factor(x, 3, padding="same", approximation="reduce")
"""


@pytest.mark.slow  # half a minute, as long as nothing is cached
def test_what_the_readme_shows_has_types():
    report, _, status = api.run(["--config-file=", "--follow-imports=silent", "-c", SCRIPT])
    assert status == 0, report
