"""What of an optimizer with curvature is saved, copied and pickled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from kfac_tn.columns import is_whole
from kfac_tn.optim.adam import cast_moments
from kfac_tn.optim.base import CurvatureUser
from kfac_tn.optim.groups import GroupedOptimizer, arranged
from kfac_tn.optim.step_rules import StepRule

_COPIED = (
    "_model",
    "_loss_fn",
    "_options",
    "_rule",
    "_damping_rule",
    "_following",
    "_other_lr",
    "_trust_region",
)


def _are_counts(value: Any, size: int = 1) -> bool:
    """Whether something is so many numbers of steps."""
    return len(value) == size and all(is_whole(each) and each >= 0 for each in value)


_CURVATURE: dict[str, Callable[[Any], bool]] = {
    "steps": lambda value: _are_counts([value]),
    "armed": lambda value: isinstance(value, bool),
    "intervals": lambda value: _are_counts(value, 2),
    "renewed": lambda value: all(_are_counts(steps, 2) for steps in value.values()),
    "factors": lambda value: all(isinstance(layer, Mapping) for layer in value.values()),
}


def check_curvature(state: Mapping[str, Any]) -> None:
    """Refuse a saved curvature in which something is missing, or isn't finite.

    Raises:
        ValueError: Naming it.
    """
    for name, good in _CURVATURE.items():
        if name not in state:
            raise ValueError(f"The state's curvature has no '{name}': it isn't one of KFAC.")
        try:
            fine = good(state[name])
        except (AttributeError, TypeError):  # no mapping, or nothing that has a length
            fine = False
        if not fine:
            raise ValueError(
                f"The state's curvature has {state[name]!r} for '{name}': it is damaged."
            )
    for layer, entry in state["factors"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and not value.isfinite().all():
                raise ValueError(
                    f"The state has '{name}' of layer '{layer}' with values that aren't finite "
                    "(NaN or inf): it is spoiled."
                )


class Checkpoints(CurvatureUser, GroupedOptimizer):
    """Saves moments, curvature and the step rule's state; copies belong to the model's copy."""

    _rule: StepRule

    @abstractmethod
    def _prepare(self, covered: Collection[str] = ()) -> None:
        """Start to watch the model."""

    @abstractmethod
    def _arm_replay(self) -> None:
        """Have the batch of the next step recorded, if that is wanted."""

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter, the groups, and under ``"curvature"`` the factors.

        Tensors, numbers and words only: ``torch.load(..., weights_only=True)`` reads it.
        """
        return {
            **super().state_dict(),
            "curvature": self._estimator.state_dict(),
            "rule": self._rule.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; hyper-parameters of the groups included.

        Where parameters have names (``named_parameters()`` was given), in the state too, groups and
        their parameters may be in another order. All others are told by their positions.

        Raises:
            ValueError: If the state is another optimizer's, another step rule's or another model's,
                has parameters of the same names in other groups, or something in it is missing, of
                another shape, out of range or not finite; nothing is changed then.
        """
        for name in ("curvature", "rule", "param_groups", "state"):
            if name not in state_dict:
                raise ValueError(f"The state has no '{name}': it isn't one of KFAC.")
        groups = arranged(state_dict["param_groups"], self.param_groups)
        state_dict = {**state_dict, "param_groups": groups}
        curvature = state_dict["curvature"]
        check_curvature(curvature)
        self._rule.check_state_dict(state_dict["rule"])
        entries = self._saved_moments(state_dict)
        named = self._model.named_parameters()
        placed = {name for name, p in named if p in self._group_of}
        self._estimator.cover(placed.intersection(curvature.get("covered", ())))
        self._estimator.check_state_dict(curvature)
        ours = ("curvature", "rule")
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ours})
        for parameter, entry in entries.items():
            # torch casts to the parameter's dtype, and shares the rest with what was given.
            self.state[parameter] = {name: value.clone() for name, value in entry.items()}
        cast_moments(self.state)
        self._estimator.load_state_dict(curvature)
        self._rule.load_state_dict(state_dict["rule"])
        self._arm_replay()

    def __getstate__(self) -> dict[str, Any]:
        """All that a copy or a pickle needs; copied with its model, it belongs to that copy."""
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in _COPIED},
            "_estimator": self._estimator.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the model of the copy; also how torch sets what ``load_state_dict`` read."""
        curvature = state.pop("_estimator", None)
        super().__setstate__(state)
        if curvature is not None:
            self._prepare(curvature["covered"])
            self._estimator.adopt(curvature)
            self._arm_replay()
