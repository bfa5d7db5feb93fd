"""How damping changes during training: interchangeable rules.

A rule acts on the option ``"damping"`` of parameter groups, so what it does is seen there, is saved
with them, and may be overridden there at any time. Groups that were given a damping of their own
keep it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.curvature.estimator import CurvatureEstimator
from kfac_tn.curvature.options import check_number, check_whole
from kfac_tn.optim.replay import Replay

Groups: TypeAlias = Sequence[dict[str, Any]]


class DampingRule(ABC):
    """Changes the damping of parameter groups.

    Attributes:
        initial: The damping to begin with.
        needs_batch: Whether the loss is ever to be computed once more.
    """

    initial: float
    needs_batch = False

    def before_step(self, step: int, groups: Groups) -> None:  # noqa: B027
        """Act at the beginning of a step, counted from 0."""

    def wants_ratio(self, step: int) -> bool:
        """Whether ``after_step`` is to be called for this step."""
        return False

    def after_step(self, ratio: float, groups: Groups) -> None:  # noqa: B027
        """Act on how much of the predicted change of the loss a step has reached."""


class FixedDamping(DampingRule):
    """One damping for ever.

    Raises:
        ValueError: If it isn't positive.
    """

    def __init__(self, damping: float) -> None:
        self.initial = check_damping(damping)


class DampingSchedule(DampingRule):
    """A function of the step.

    Args:
        function: From the number of steps taken to a damping.

    Raises:
        ValueError: At the beginning or in the step in question, if what it returns isn't positive.

    Example:
        >>> schedule = DampingSchedule(lambda step: 0.1 / (1 + step))
        >>> groups = [{"damping": schedule.initial}]
        >>> schedule.before_step(4, groups)
        >>> groups
        [{'damping': 0.02}]
    """

    def __init__(self, function: Callable[[int], float]) -> None:
        self._function = function
        self.initial = check_damping(function(0))

    def before_step(self, step: int, groups: Groups) -> None:  # noqa: D102
        for group in groups:
            group["damping"] = check_damping(self._function(step))


class LevenbergMarquardt(DampingRule):
    """Less damping while the quadratic model predicts the loss well, more where it doesn't.

    Every ``interval`` steps the loss is computed once more, on the same batch after the step. Its
    change over the predicted one, g^T s + s^T F s / 2 for a step s, is the reduction ratio. Above
    3/4 damping is multiplied by ``decay^interval``, below 1/4 divided by it (Martens & Grosse 2015,
    Section 6.5).

    Args:
        initial: The damping to begin with.
        decay: By step; the paper's 19/20.
        interval: Steps between evaluations; the paper's 5.
        minimum: Damping never falls below; float32 has seven digits, and what has no curvature is
            divided by it.
        maximum: Nor rises above.

    Raises:
        ValueError: For values out of range.

    Example:
        >>> rule = LevenbergMarquardt(1.0, decay=0.5, interval=2)
        >>> groups = [{"damping": 1.0}]
        >>> rule.after_step(0.9, groups)
        >>> groups
        [{'damping': 0.25}]
    """

    needs_batch = True

    def __init__(
        self,
        initial: float = 1e-3,
        decay: float = 0.95,
        interval: int = 5,
        minimum: float = 1e-6,
        maximum: float = 1e4,
    ) -> None:
        for name, value in {"initial": initial, "minimum": minimum, "maximum": maximum}.items():
            check_number(name, value, "positive")
        if not minimum <= initial <= maximum:
            raise ValueError(
                f"initial damping is {initial}: it must be positive, and in [{minimum}, {maximum}]."
            )
        check_number("decay", decay, "in (0, 1)")
        check_whole("interval", interval)
        self.initial, self.decay, self.interval = initial, decay, interval
        self.minimum, self.maximum = minimum, maximum

    def wants_ratio(self, step: int) -> bool:  # noqa: D102
        return step % self.interval == self.interval - 1

    def after_step(self, ratio: float, groups: Groups) -> None:  # noqa: D102
        factor = self.decay**self.interval
        if ratio > 0.75:
            change = factor
        elif ratio >= 0.25:
            return
        else:  # also for NaN
            change = 1 / factor
        for group in groups:
            group["damping"] = min(max(group["damping"] * change, self.minimum), self.maximum)


def reduction_ratio(
    replay: Replay,
    estimator: CurvatureEstimator,
    gradients: Mapping[Parameter, Tensor],
    before: Mapping[Parameter, Tensor],
    closure: Callable[[], float] | None = None,
    factor: Tensor | float = 1.0,
) -> float:
    """The change of the loss over the predicted one, g^T s + s^T F s / 2, F from the factors.

    -1 if the quadratic model didn't promise anything.

    Args:
        replay: The batch of the step.
        estimator: The factors.
        gradients: The loss's at the beginning of the step, by parameter.
        before: The parameters then.
        closure: The user's, by which the loss is computed if there is one.
        factor: Of the loss in the objective, which is in its gradients and not in F.
    """
    change = replay.change(estimator.capture, closure)
    if closure is not None:
        change /= float(factor)
    steps = {p: p - start for p, start in before.items()}
    linear = torch.stack([(gradients[p] * s).sum() for p, s in steps.items()]).sum() / factor
    forms = [form.to(linear) for form in estimator.quadratic_forms(steps).values()]
    predicted = float(linear + torch.stack(forms).sum() / 2 if forms else linear)
    return change / predicted if predicted < 0 else -1.0


def damping_rule_of(choice: float | Callable[[int], float] | DampingRule) -> DampingRule:
    """The rule itself, or one for a number or a function of the step.

    Raises:
        ValueError: For a number that isn't positive.
    """
    if isinstance(choice, DampingRule):
        return choice
    return DampingSchedule(choice) if callable(choice) else FixedDamping(choice)


def check_damping(damping: float) -> float:
    """The damping, or an error.

    Raises:
        ValueError: If it isn't positive and finite, or no number.
    """
    check_number("damping", damping, "positive and finite")
    return damping
