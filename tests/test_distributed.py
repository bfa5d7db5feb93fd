"""Two processes with half of each batch take the steps of one with all of it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import kfac_tn
from kfac_tn.distributed import Processes
from kfac_tn.optim import LevenbergMarquardt

EAGER = {"factor_interval": 2, "inverse_interval": 2}
# What a step measures is exact, so that one process is an oracle.
CASES: dict[str, dict[str, Any]] = {
    "fixed": {"step_rule": "fixed", "lr": 0.1},
    "adaptive": {},
    "graft": {"step_rule": "graft"},
    "kl_clip": {"step_rule": "kl_clip", "lr": 0.1},
    "quadratic": {"step_rule": "quadratic"},
    "reduce": {"approximation": "reduce"},
    "exact damping": {"damping_split": "exact"},
    "Levenberg-Marquardt": {"damping": LevenbergMarquardt(interval=1)},
    "EKFAC": {"curvature": "ekfac"},
    "diagonal": {"curvature": "diagonal"},
    "empirical": {"fisher": "empirical"},
    "forward-only": {"fisher": "forward-only"},
    "auto": {"factor_interval": "auto", "inverse_interval": "auto"},
    "blocks": {"max_dim": 4, "large_factors": "blocks"},
}
SUMS = ["fixed", "adaptive"]
STEPS, WORLD = 6, 2


class Net(nn.Module):
    """Convolution, attention's input layer alike, and a layer that not every process calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.sometimes = nn.Linear(4, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, use: bool = True, function: bool = False) -> Tensor:
        x = self.norm(self.conv(x).tanh().mean(2)).tanh()
        x = nn.functional.linear(x, self.sometimes.weight) if function else x
        return self.head((self.sometimes(x) if use else x).flatten(1))


def data(step: int, examples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(examples, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (examples,), generator=generator)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def train(
    model: nn.Module, reduction: str = "mean", rank: int | None = None, **options: Any
) -> tuple[dict[str, Tensor], kfac_tn.KFAC]:
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    options = {"fisher": "type-2", **EAGER, **copy.deepcopy(options)}
    optimizer = kfac_tn.KFAC(model, loss_fn, **options)
    for step in range(STEPS):
        x, y = data(step)
        if rank is not None:
            x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    values = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: value.clone() for name, value in values.items()}, optimizer


def work(rank: int, folder: str) -> None:
    """What each process does: all cases, and what of it is to be compared."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    results: dict[str, Any] = {}
    for name, options in CASES.items():
        results[name] = train(DistributedDataParallel(net()), rank=rank, **options)[0]
    for name in SUMS:
        model = DistributedDataParallel(net())
        results[f"sum, {name}"] = train(model, "sum", rank, **CASES[name])[0]
    model = net()  # averages its gradients itself
    for p in model.parameters():
        p.register_hook(lambda g: Processes("all").mean(g.clone()))
    results["by hand"] = train(model, rank=rank)[0]
    alone = train(net(), rank=rank, process_group=None)[0]
    results["alone"] = alone
    results["mc"] = [train(DistributedDataParallel(net()), rank=rank, fisher="mc")[0]]
    results["mc"].append(_samples(rank))
    results["unequal"] = _unequal(rank)
    results["columns"] = _columns(rank)
    results["bypassed"] = _bypassed(rank)
    results["preconditioner"] = _preconditioned(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.barrier()


def _samples(rank: int) -> Tensor:
    """Random numbers that a process draws for its targets."""
    optimizer = kfac_tn.KFAC(net(), nn.CrossEntropyLoss())
    return torch.rand(4, generator=optimizer._estimator._generator(torch.device("cpu")))


def _unequal(rank: int) -> dict[str, Tensor]:
    """Five examples and three, a layer that only one of them calls, and a batch with NaN in one."""
    model = DistributedDataParallel(net(), find_unused_parameters=True)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, fisher="type-2", factor_interval=1)
    for step in range(STEPS):
        x, y = data(step)
        part = slice(0, 5) if rank == 0 else slice(5, 8)
        optimizer.zero_grad()
        x = x[part] / (0 if step == 3 and rank == 1 else 1)
        loss_fn(model(x, use=rank == 0), y[part]).backward()
        optimizer.step()
    factors = {f"A of {n}": f.input for n, f in optimizer.factors().items()}
    return factors | {n: p.detach() for n, p in model.named_parameters()}


def _columns(rank: int) -> dict[str, Any]:
    """As many samples as few examples need, and as many examples do: B has its noise from both."""
    model, loss_fn = DistributedDataParallel(net()), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, approximation="reduce", factor_interval=1)
    for step in range(3):
        x, y = data(step)
        part = slice(0, 7) if rank == 0 else slice(7, 8)
        optimizer.zero_grad()
        loss_fn(model(x[part]), y[part]).backward()
        columns = optimizer._estimator.capture.passes
        optimizer.step()
    return {"columns": columns} | {n: p.detach() for n, p in model.named_parameters()}


def _bypassed(rank: int) -> dict[str, Tensor]:
    """A layer whose weight one process uses without a call, too, once it had factors."""
    model, loss_fn = DistributedDataParallel(net()), nn.CrossEntropyLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, fisher="type-2", factor_interval=1)
    for step in range(3):
        x, y = (each.chunk(WORLD)[rank] for each in data(step))
        optimizer.zero_grad()
        loss_fn(model(x, function=rank == 1 and step == 2), y).backward()
        optimizer.step()
    factors = {f"A of {n}": f.input for n, f in optimizer.factors().items()}
    return factors | {n: p.detach() for n, p in model.named_parameters()}


def _preconditioned(rank: int) -> dict[str, Tensor]:
    model, loss_fn = DistributedDataParallel(net()), nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, fisher="type-2", **EAGER)
    x, y = (each.chunk(WORLD)[rank] for each in data(0))
    loss_fn(model(x), y).backward()
    preconditioner.step()
    return {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join(filter(None, (str(Path(kfac_tn.__file__).parents[1]), *sys.path)))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("name", CASES)
def test_world_size_changes_nothing(results, name):
    expected, _ = train(net(), **CASES[name])
    # central differences are as accurate as two thirds of the digits
    loose = "step_rule" not in CASES[name]
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if loose else {"rtol": 1e-10, "atol": 1e-12}
    for each in results:
        assert_equal(each[name], expected, **tolerance)
    assert_equal(results[0][name], results[1][name])


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_averaged_over_processes(results, name):
    """As its gradients are, whatever the loss: a factor of both that directions don't feel."""
    expected, _ = train(net(), "sum", **CASES[name])
    for each in results:
        assert_equal(each[f"sum, {name}"], expected, rtol=1e-6, atol=1e-8)
    assert_equal(results[0][f"sum, {name}"], results[1][f"sum, {name}"])


def test_gradients_averaged_by_hand(results):
    expected, _ = train(net())
    for each in results:
        assert_equal(each["by hand"], expected, rtol=1e-6, atol=1e-8)


def test_processes_that_train_models_of_their_own(results):
    for rank, each in enumerate(results):
        assert_equal(each["alone"], train(net(), rank=rank)[0])


def test_samples_differ_and_steps_do_not(results):
    (one, samples), (other, others) = (each["mc"] for each in results)
    assert_equal(one, other)
    assert not torch.equal(samples, others)


def test_unequal_shares_and_layers_that_one_process_calls(results):
    """Steps agree; input factors are means over all examples that the layer saw."""
    one, other = (each["unequal"] for each in results)
    assert_equal(one, other)
    assert all(value.isfinite().all() for value in one.values())
    model = net()
    optimizer = kfac_tn.KFAC(model, loss_fn := nn.CrossEntropyLoss(), factor_interval=1)
    x, y = data(0)
    loss_fn(model(x), y).backward()
    optimizer.step()
    first = optimizer.factors()["conv"].input
    assert one["A of module.conv"].shape == first.shape
    assert "A of module.sometimes" in one


def test_numbers_of_samples_differ_and_steps_do_not(results):
    one, other = ({**each["columns"]} for each in results)
    assert one.pop("columns") != other.pop("columns")
    assert_equal(one, other)


def test_a_layer_that_one_process_uses_without_a_call_has_no_factors_in_any(results):
    one, other = (each["bypassed"] for each in results)
    assert_equal(one, other)
    assert {n for n in one if n[0] == "A"} == {"A of module.conv", "A of module.head"}


def test_the_preconditioner_averages_too(results):
    model, loss_fn = net(), nn.CrossEntropyLoss()
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn, fisher="type-2", **EAGER)
    x, y = data(0)
    loss_fn(model(x), y).backward()
    preconditioner.step()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for each in results:
        assert_equal(each["preconditioner"], expected, rtol=1e-10, atol=1e-12)


def test_groups_are_groups_and_sharded_weights_are_refused():
    for wrong in ("some", 2):
        with pytest.raises(ValueError, match="process_group is"):
            kfac_tn.KFAC(net(), nn.CrossEntropyLoss(), process_group=wrong)
    sharded = net()
    sharded.head.weight.__class__ = type("DTensor", (nn.Parameter,), {})
    with pytest.raises(ValueError, match=r"'head.weight' is sharded over processes \(DTensor\)"):
        kfac_tn.KFAC(sharded, nn.CrossEntropyLoss())


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
    sys.stderr.flush()
    os._exit(0)  # gloo's threads and its groups' may end in any order: now and then by an abort
