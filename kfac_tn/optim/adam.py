"""Adam's moments and updates, for whoever wants its step sizes."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.columns import is_whole
from kfac_tn.curvature.directions import Room

_ONE = torch.ones(())  # a number would be made a tensor for each parameter
_STATE = ("step", "exp_avg", "exp_avg_sq")


def adam_updates(
    groups: Iterable[Mapping[str, Any]],
    states: MutableMapping[Any, dict[str, Any]],
    gradients: Mapping[Parameter, Tensor],
    corrected: bool = True,
) -> tuple[dict[Parameter, Tensor], dict[Parameter, Tensor]]:
    """Update the moments; return the bias-corrected first ones and Adam's updates.

    In one pass over the memory where torch's fused kernel can be had (on the CPU, for tensors that
    are contiguous and of one dtype), else in eight.

    Args:
        groups: Parameter groups with ``params``, ``betas`` and ``eps``.
        states: ``step`` (on the CPU: read without waiting for a device), ``exp_avg`` and
            ``exp_avg_sq`` of each parameter, as in ``torch.optim.Adam``; made where missing.
        gradients: Of the parameters that take a step.
        corrected: Whether the first moments are wanted corrected, or as they are: the state itself
            (which it also is where the correction is none, rounded). Don't modify them.

    Returns:
        m / (1 - beta1^t) and that over sqrt(v / (1 - beta2^t)) + eps (Kingma & Ba 2015), by
        parameter; the learning rate is not in them.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> groups = [{"params": [w], "betas": (0.5, 0.5), "eps": 0.0}]
        >>> moments, updates = adam_updates(groups, {w: {}}, {w: torch.tensor([3.0, -2.0])})
        >>> updates[w]
        tensor([ 1., -1.])
    """
    moments: dict[Parameter, Tensor] = {}
    updates: dict[Parameter, Tensor] = {}
    for group in groups:
        chosen = [p for p in group["params"] if p in gradients]
        if not chosen:
            continue
        mine = [states[p] or _start(p, states[p]) for p in chosen]
        torch._foreach_add_([state["step"] for state in mine], _ONE, alpha=1)
        for part, among, counts in _by_age(group, chosen, states):
            mine = [states[p] for p in among]
            grads = [gradients[p] for p in among]
            if any(g.dtype is not s["exp_avg"].dtype for g, s in zip(grads, mine, strict=True)):
                grads = [g.to(s["exp_avg"].dtype) for g, s in zip(grads, mine, strict=True)]
            steps, first, second = ([s[name] for s in mine] for name in _STATE)
            left = {count: _left(part, count) for count in set(counts)}
            results = _fused(part, steps, grads, first, second, counts, left)
            if results is None:
                beta1, beta2 = part["betas"]
                torch._foreach_lerp_(first, grads, 1 - beta1)
                torch._foreach_mul_(second, beta2)
                torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            averages = _corrected(first, counts, left) if corrected or results is None else first
            if results is None:
                results = _quotients(part, counts, averages, second)
            moments.update(zip(among, averages if corrected else first, strict=True))
            updates.update(zip(among, results, strict=True))
    return moments, updates


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
        for part, among, counts in _by_age(group, chosen, states):
            mine = [states[p] for p in among]
            left = {count: _left(part, count) for count in set(counts)}
            first = _corrected([state["exp_avg"] for state in mine], counts, left)
            results = _quotients(part, counts, first, [state["exp_avg_sq"] for state in mine])
            moments.update(zip(among, first, strict=True))
            updates.update(zip(among, results, strict=True))
    return moments, updates


def with_longer_averages(
    groups: Iterable[Mapping[str, Any]],
    chosen: Container[Parameter],
    steps: float,
    horizon: float = 0.0,
) -> list[Mapping[str, Any]]:
    """Groups for ``adam_updates`` in which first moments reach back over so many steps, or further.

    Where that grows, no average reaches back over a larger share of its own updates: those of
    parameters that take few steps are as long as if there had been no others, and those that are
    no longer than ``betas`` say don't begin anew.

    Args:
        groups: Parameter groups; they stay as they are. One whose beta1 is 0 wants no average.
        chosen: Whose averages; those of all others are as ``betas`` say.
        steps: 1 / (1 - beta1); 0: averages begin anew, as this step's gradients.
        horizon: By how much that grows with each step, if it does.

    Example:
        >>> import torch
        >>> v, w = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> [group] = [{"params": [v, w], "betas": (0.5, 0.9), "eps": 0.0}]
        >>> [(len(g["params"]), g["betas"]) for g in with_longer_averages([group], {w}, 4)]
        [(1, (0.5, 0.9)), (1, (0.75, 0.9))]
    """
    result: list[Mapping[str, Any]] = []
    for group in groups:
        beta1, beta2 = group["betas"]
        if not beta1 or 0 < steps * (1 - beta1) <= 1:
            result.append(group)
            continue
        longer = [p for p in group["params"] if p in chosen]
        others = [p for p in group["params"] if p not in chosen]
        result.append({**group, "params": others})
        grown = beta1, horizon, steps
        betas = 1 - 1 / (steps or 1), beta2
        result.append({**group, "params": longer, "betas": betas, "grown": grown})
    return result


def lengthened(
    groups: Iterable[Mapping[str, Any]],
    states: Mapping[Any, dict[str, Any]],
    chosen: Container[Parameter],
    steps: float,
    horizon: float = 0.0,
) -> dict[Parameter, float]:
    """How many times further back than ``betas`` say ``with_longer_averages`` made them reach.

    Example:
        >>> import torch
        >>> v, w = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> states = {p: {"step": torch.tensor(8.0)} for p in (v, w)}
        >>> list(lengthened([{"params": [v, w], "betas": (0.5, 0.9)}], states, {w}, 4).values())
        [2.0]
    """
    return {
        p: times
        for group in groups
        if group["betas"][0] and steps * (1 - group["betas"][0]) > 1
        for p in group["params"]
        if p in chosen and states.get(p)
        if (times := _own(steps, horizon, states[p]["step"].item()) * (1 - group["betas"][0])) > 1
    }


def _own(steps: float, horizon: float, count: float) -> float:
    """Over how many steps an average of so many updates reaches back."""
    return min(steps, horizon * count) if horizon else steps


def _by_age(
    group: Mapping[str, Any], chosen: Sequence[Parameter], states: Mapping[Any, dict[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], list[Parameter], list[float]]]:
    """Groups with betas of their own of parameters that had more updates and fewer, and these."""
    counts = [states[p]["step"].item() for p in chosen]
    beta1, beta2 = group["betas"]
    first, horizon, steps = group.get("grown", (beta1, 0.0, 0.0))

    def beta_of(count: float) -> float:
        if not horizon:
            return beta1
        young = horizon * count * (1 - first) <= 1
        return first if young else 1 - 1 / (_own(steps, horizon, count) or 1)

    members: dict[float, list[int]] = {}
    for index, count in enumerate(counts):
        members.setdefault(beta_of(count), []).append(index)
    for beta, among in members.items():
        part = {**group, "betas": (beta, beta2)}
        yield part, [chosen[i] for i in among], [counts[i] for i in among]


def _start(parameter: Parameter, state: dict[str, Any]) -> dict[str, Any]:
    """Make the state of a parameter that takes its first step."""
    state["step"] = torch.zeros(())
    for name in _STATE[1:]:
        state[name] = torch.zeros_like(parameter, dtype=accurate(parameter))
    return state


def freshened(
    moments: Mapping[Parameter, Tensor],
    gradients: Mapping[Parameter, Tensor],
    share: float,
    room: Room | None = None,
) -> dict[Parameter, Tensor]:
    """(1 - share) m + share g: quasi-hyperbolic momentum (Ma & Yarats 2019, arXiv 1810.06801).

    Args:
        moments: m by parameter.
        gradients: g.
        share: Of g.
        room: Where to put the results (of the parameters that it was made for), if anywhere.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> freshened({w: torch.tensor([1.0])}, {w: torch.tensor([3.0])}, 0.5)[w]
        tensor([2.])
    """
    others = list(moments)
    results: dict[Parameter, Tensor] = {}
    if room is not None:
        results, others = room, room.others
        for p, place in room.places:
            m, g = moments[p], gradients[p]
            torch.lerp(m, g if g.dtype is m.dtype else g.to(m.dtype), share, out=place)
    averages = [moments[p] for p in others]
    if share and others:
        current = [gradients[p].to(m.dtype) for p, m in zip(others, averages, strict=True)]
        averages = list(torch._foreach_lerp(averages, current, share))
    results.update(zip(others, averages, strict=True))
    return results


def _corrected(
    first: list[Tensor], counts: list[float], left: Mapping[float, float]
) -> list[Tensor]:
    """First moments over the share of gradients in them, all but what is left of their start."""
    if 2 * max(left.values()) < min(torch.finfo(dtype).eps for dtype in {m.dtype for m in first}):
        return first
    return list(torch._foreach_div(first, [1 - left[count] for count in counts]))


def _left(group: Mapping[str, Any], count: float) -> float:
    r"""What is left of a first moment's start, zero, after so many steps: the product of all beta1.

    Where averages grow, it was 1 - 1 / (horizon s) in the parameter's own step s, since that is
    more than at first:

    .. math::
        \prod_{s = a}^{t} \left(1 - \frac{1}{h s}\right) =
        \frac{\Gamma(t + 1 - 1/h) \, \Gamma(a)}{\Gamma(t + 1) \, \Gamma(a - 1/h)}
    """
    beta1 = group["betas"][0]
    first, horizon, _ = group.get("grown", (beta1, 0.0, 0.0))
    if not beta1 or not horizon:
        return beta1**count
    start = int(1 / (horizon * (1 - first))) + 1
    if count < start:
        return first**count
    after, before = (
        math.lgamma(step - 1 / horizon) - math.lgamma(step) for step in (count + 1, start)
    )
    return first ** (start - 1) * math.exp(after - before)


def _quotients(
    group: Mapping[str, Any], counts: list[float], corrected: list[Tensor], second: list[Tensor]
) -> list[Tensor]:
    """Corrected moments over sqrt(v / (1 - beta2^t)) + eps."""
    beta2 = group["betas"][1]
    roots = torch._foreach_sqrt(second)
    torch._foreach_div_(roots, [(1 - beta2**count) ** 0.5 for count in counts])
    torch._foreach_add_(roots, group["eps"])
    return list(torch._foreach_div(corrected, roots))


def _fused(
    group: Mapping[str, Any],
    steps: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    counts: list[float],
    left: Mapping[float, float],
) -> list[Tensor] | None:
    """Update the moments and return Adam's updates; do nothing where torch's kernel can't.

    It looks at neither strides nor the dtypes of all tensors.
    """
    dtype = grads[0].dtype
    if not all(
        tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous()
        for tensor in (*grads, *first, *second)
    ):
        return None
    updates = [torch.zeros_like(gradient) for gradient in grads]
    beta1, beta2 = group["betas"]
    # The kernel corrects as if beta1 had always been the same.
    shares = {count: (1 - beta1**count) / (1 - left[count]) for count in left}
    alike = len(shares) == 1
    torch._fused_adam_(
        updates,
        grads,
        first,
        second,
        [],
        steps,
        lr=-shares[counts[0]] if alike else -1.0,  # from zero: what is left is the update itself
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    if not alike:
        torch._foreach_mul_(updates, [shares[count] for count in counts])
    return updates


def accurate(parameter: Tensor) -> torch.dtype:
    """The dtype of its moments: squares of gradients underflow in half precision."""
    return torch.promote_types(parameter.dtype, torch.float32)


def check_moments(name: str, parameter: Tensor, entry: Mapping[str, Any]) -> None:
    """Refuse a saved state of a parameter that can't be continued with.

    Shapes are those of a tensor each: torch's fused kernel reads memory that isn't there otherwise.

    Raises:
        ValueError: Naming the parameter, and what is wrong.
    """

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"The state of parameter '{name}' {what}.")

    missing = [each for each in _STATE if each not in entry]
    if missing:
        refuse(f"has no {missing}: it isn't one of KFAC")
    shapes = dict.fromkeys((*_STATE, "previous"), parameter.shape) | {"step": torch.Size()}
    for each, value in entry.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            refuse(f"has {value!r} for '{each}', which is a tensor of floating-point numbers")
        if value.shape != shapes.get(each, value.shape):
            refuse(
                f"has moments of another shape, {list(value.shape)} instead of "
                f"{list(shapes[each])} for '{each}': it is another model's"
            )
        if not value.to(accurate(parameter)).isfinite().all():
            refuse(f"has '{each}' with values that aren't finite (NaN or inf): it is spoiled")
    count = entry["step"].item()
    if count < 0 or not is_whole(count):
        refuse(f"has {count} for 'step', which counts updates: it is spoiled")
    if bool((entry["exp_avg_sq"] < 0).any()):
        refuse("has a negative 'exp_avg_sq', an average of squares: it is spoiled")


def cast_moments(states: Mapping[Any, dict[str, Any]]) -> None:
    """Follow parameters whose dtype or device has changed."""
    for parameter, state in states.items():
        for name in state.keys() - {"step"}:
            state[name] = state[name].to(parameter.device, accurate(parameter))
