"""Parameter groups: the default division, and what is allowed in one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.nn import Module

from kfac_tn.curvature.estimator import trainable
from kfac_tn.layers import partition


def default_groups(model: Module, other_lr: float | None) -> list[dict[str, Any]]:
    """All in one group, or the parameters without Kronecker structure in one of their own.

    What is frozen has a place too, for the day when it isn't.
    """
    parameters = list(model.parameters())
    if other_lr is None:
        return [{"params": parameters}]
    with trainable(p for p in parameters if p.is_floating_point()):
        blocks, _ = partition(model)
    layers = {p for block in blocks for p in block.parameters.values()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p in layers]},
        {"params": [p for p in parameters if p not in layers], "lr": other_lr},
    ]
    return [group for group in groups if group["params"]] or groups[:1]


def check_group(group: dict[str, Any], options: Collection[str], model: Module) -> None:
    """Refuse a group with unknown options, values out of range or foreign parameters.

    Raises:
        ValueError: Naming the culprit.
    """
    unknown = group.keys() - set(options) - {"params", "param_names"}
    if unknown:
        raise ValueError(
            f"Parameter groups have no option {sorted(unknown)}: only {sorted(options)} differ "
            "between groups."
        )
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < float("inf"):
            raise ValueError(f"{name} is {group[name]}: it must be in [0, inf).")
    if not 0 < group["damping"] < float("inf"):
        raise ValueError(f"damping is {group['damping']}: it must be positive.")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas are {group['betas']}: two are needed, both in [0, 1).")
    if not set(group["params"]) <= set(model.parameters()):
        raise ValueError("A parameter group has a parameter that isn't the model's.")
