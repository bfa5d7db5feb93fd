"""Whom `training.py` compares: each optimizer as a user would set it up, and its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from training_problems import Task

import kfac_tn

OURS = "KFAC"


@dataclass(frozen=True)
class Competitor:
    """An optimizer, the learning rates it is tried with, and the schedules.

    Args:
        make: From a model, a task and a learning rate: optimizers that together train all
            parameters. Raises what tells why there are none.
        learning_rates: The grid, ascending.
        note: What the report says of it.
        schedules: Tried with the best learning rates.
        large_batch: Whether its steps take closures, and `Task.large_batch` examples.
    """

    make: Callable[[nn.Module, Task, float], list[Optimizer]]
    learning_rates: tuple[float, ...]
    note: str
    schedules: tuple[str, ...] = ("constant", "cosine")
    large_batch: bool = False


def sgd(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, fused=True)]


def adamw(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
    return _adamw(model.parameters(), lr)


def muon(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | nn.RNNBase)]
    chosen = [p for m in linear for p in m.parameters(recurse=False) if p.ndim == 2]
    others = _without(model, chosen)
    if sum(p.numel() for p in chosen) < sum(p.numel() for p in others):
        raise NotImplementedError("most parameters aren't 2-d weights of linear layers or LSTMs")
    if not hasattr(torch.optim, "Muon"):
        raise NotImplementedError(f"torch {torch.__version__} has no Muon: install 2.9 or newer")
    made = torch.optim.Muon(chosen, lr=lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    return [made, *_adamw(others, lr)]


def lbfgs(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
    limits = {"max_iter": 5, "max_eval": 25}
    return [torch.optim.LBFGS(model.parameters(), lr=lr, line_search_fn="strong_wolfe", **limits)]


def singd(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
    from singd.optim.optimizer import SINGD

    kinds = SINGD.SUPPORTED_MODULES
    chosen = [p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()]
    made = SINGD(model, params=chosen, lr=lr, loss_average=task.loss_average)
    return [made, *_adamw(_without(model, chosen), 1e-3)]


def kfac(model: nn.Module, loss_fn: nn.Module) -> list[Optimizer]:
    """Ours: nothing set."""
    return [kfac_tn.KFAC(model, loss_fn)]


def _adamw(parameters: Iterable[Tensor], lr: float) -> list[Optimizer]:
    parameters = list(parameters)
    if not parameters:
        return []
    return [torch.optim.AdamW(parameters, lr=lr, weight_decay=0, fused=True)]


def _without(model: nn.Module, chosen: Sequence[Tensor]) -> list[Tensor]:
    known = set(map(id, chosen))
    return [p for p in model.parameters() if id(p) not in known]


COMPETITORS = {
    "SGD": Competitor(
        sgd,
        (3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        "Nesterov momentum 0.9; torch's fused form",
    ),
    "AdamW": Competitor(adamw, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1), "torch's fused form"),
    "Muon": Competitor(
        muon,
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
        "torch's, scaled to match AdamW's steps, for the weights of linear and recurrent layers; "
        "AdamW with the same learning rate for all else; left out where that is more",
    ),
    "LBFGS": Competitor(
        lbfgs,
        (0.1, 1.0),
        "strong Wolfe line search, 5 iterations per batch, on all data or larger batches, so that "
        "its steps don't compare; the learning rate is the line search's start",
        ("constant",),
        large_batch=True,
    ),
    "singd": Competitor(
        singd,
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
        "its defaults but the learning rate; AdamW at 1e-3 for what it doesn't support",
    ),
}
