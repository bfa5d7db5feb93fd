"""Adam's moments and updates, for whoever wants its step sizes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def adam_updates(
    groups: Iterable[Mapping[str, Any]],
    states: MutableMapping[Any, dict[str, Any]],
    gradients: Mapping[Parameter, Tensor],
) -> tuple[dict[Parameter, Tensor], dict[Parameter, Tensor]]:
    """Update the moments; return the bias-corrected first ones and Adam's updates.

    Args:
        groups: Parameter groups with ``params``, ``betas`` and ``eps``.
        states: ``step`` (on the CPU: read without waiting for a device), ``exp_avg`` and
            ``exp_avg_sq`` of each parameter, as in ``torch.optim.Adam``; made where missing.
        gradients: Of the parameters that take a step.

    Returns:
        m / (1 - beta1^t) and that over sqrt(v / (1 - beta2^t)) + eps (Kingma & Ba 2015), by
        parameter; the learning rate is not in them.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> groups = [{"params": [w], "betas": (0.9, 0.99), "eps": 0.0}]
        >>> moments, updates = adam_updates(groups, {w: {}}, {w: torch.tensor([3.0, -2.0])})
        >>> updates[w]
        tensor([ 1., -1.])
    """
    groups = list(groups)
    for group in groups:
        chosen = [p for p in group["params"] if p in gradients]
        if not chosen:
            continue
        for p in chosen:
            if not states[p]:
                states[p]["step"] = torch.zeros(())
                states[p]["exp_avg"] = torch.zeros_like(p, dtype=accurate(p))
                states[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=accurate(p))
        mine = [states[p] for p in chosen]
        grads = [gradients[p].to(accurate(p)) for p in chosen]
        first = [state["exp_avg"] for state in mine]
        second = [state["exp_avg_sq"] for state in mine]
        beta1, beta2 = group["betas"]
        torch._foreach_add_([state["step"] for state in mine], 1)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    return current_updates(groups, states, gradients)


def current_updates(
    groups: Iterable[Mapping[str, Any]],
    states: Mapping[Any, dict[str, Any]],
    parameters: Container[Parameter],
) -> tuple[dict[Parameter, Tensor], dict[Parameter, Tensor]]:
    """What ``adam_updates`` returned last, computed from the moments as they are."""
    moments: dict[Parameter, Tensor] = {}
    updates: dict[Parameter, Tensor] = {}
    for group in groups:
        chosen = [p for p in group["params"] if p in parameters]
        if not chosen:
            continue
        mine = [states[p] for p in chosen]
        beta1, beta2 = group["betas"]
        first = [state["exp_avg"] for state in mine]
        second = [state["exp_avg_sq"] for state in mine]
        steps = [int(state["step"]) for state in mine]
        corrected = torch._foreach_div(first, [1 - beta1**step for step in steps])
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, group["eps"])
        moments.update(zip(chosen, corrected, strict=True))
        updates.update(zip(chosen, torch._foreach_div(corrected, roots), strict=True))
    return moments, updates


def accurate(parameter: Tensor) -> torch.dtype:
    """The dtype of its moments: squares of gradients underflow in half precision."""
    return torch.promote_types(parameter.dtype, torch.float32)


def cast_moments(states: Mapping[Any, dict[str, Any]]) -> None:
    """Follow parameters whose dtype or device has changed."""
    for parameter, state in states.items():
        for name in state.keys() - {"step"}:
            state[name] = state[name].to(parameter.device, accurate(parameter))
