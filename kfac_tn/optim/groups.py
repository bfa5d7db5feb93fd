"""Parameter groups: the default division, and what is allowed in one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from kfac_tn.curvature.checks import trainable
from kfac_tn.curvature.estimator import CurvatureEstimator
from kfac_tn.curvature.options import Range, check_number, within
from kfac_tn.layers import CurvatureChoice, LayerBlock, check_model, partition
from kfac_tn.optim.adam import check_moments

_NUMBERS: dict[str, Range] = {
    "lr": "in [0, inf)",
    "eps": "in [0, inf)",
    "weight_decay": "in [0, inf)",
    "damping": "positive and finite",
}


def default_groups(
    model: Module, other_lr: float | None, curvature: CurvatureChoice
) -> list[dict[str, Any]]:
    """All in one group, or the parameters without Kronecker structure in one of their own.

    What is frozen has a place too, for the day when it isn't.
    """
    check_model(model)
    parameters = list(model.parameters())
    if other_lr is None:
        return [{"params": parameters}]
    with trainable(p for p in parameters if p.is_floating_point()):
        blocks, _ = partition(model, curvature=curvature)
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
    check_options(group)
    if not set(group["params"]) <= set(model.parameters()):
        raise ValueError("A parameter group has a parameter that isn't the model's.")


def check_options(group: Mapping[str, Any]) -> None:
    """Refuse options that are missing or out of range, before they spoil parameters or state.

    Raises:
        ValueError: Naming the option.
    """
    missing = sorted({"betas", *_NUMBERS} - group.keys())
    if missing:
        raise ValueError(f"A parameter group has no {missing}: KFAC needs these options in each.")
    for name, bounds in _NUMBERS.items():
        check_number(name, group[name], bounds)
    betas = group["betas"]
    two = isinstance(betas, Sequence) and len(betas) == 2
    if not two or not all(within(beta, "in [0, 1)") for beta in betas):
        raise ValueError(f"betas are {betas}: two are needed, both in [0, 1).")


def arranged(
    saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Saved groups in the order of one's own, and their parameters, too, by name.

    Where not all have names, or these are others (of a wrapped model, say), it is by position, as
    in torch.

    Raises:
        ValueError: If parameters of one name are in other groups here.

    Example:
        >>> saved = [{"params": [0, 1], "param_names": ["v", "w"]}]
        >>> arranged(saved, [{"params": [], "param_names": ["w", "v"]}])
        [{'params': [1, 0], 'param_names': ['w', 'v']}]
    """
    if not all("param_names" in group for group in (*saved, *own)):
        return [dict(group) for group in saved]
    names = [list(group["param_names"]) for group in own]
    found = {frozenset(group["param_names"]): group for group in saved}
    if len(found) == len(saved) and found.keys() == {frozenset(each) for each in names}:
        return [_reordered(found[frozenset(each)], each) for each in names]
    here, there = _places(own), _places(saved)
    moved = sorted(name for name in here.keys() & there.keys() if here[name] != there[name])
    if moved:
        raise ValueError(
            f"The state has parameters {moved} in groups with others than here: make the optimizer "
            "with the groups that the state was taken with, in any order."
        )
    return [dict(group) for group in saved]


def _reordered(group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """A group with its parameters in the order of these names."""
    numbers = dict(zip(group["param_names"], group["params"], strict=True))
    return {**group, "params": [numbers[name] for name in names], "param_names": names}


def _places(groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Where parameters are, by name."""
    return {
        name: (row, column)
        for row, group in enumerate(groups)
        for column, name in enumerate(group["param_names"])
    }


class GroupedOptimizer(Optimizer):
    """Parameter groups that together hold all that is trainable in one model."""

    _model: Module
    _estimator: CurvatureEstimator

    def __init__(self, params: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        self._following: list[int] = []  # groups that have no damping of their own
        self._group_of: dict[Parameter, int] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the model: those that a group of ``params`` left out, frozen.

        All that is trainable must have a place then: freeze what is to be in a further group until
        that is added.

        Raises:
            TypeError: For what is no group of parameters; the optimizer is as before then, as for
                the next two.
            ValueError: For a parameter of another model, options out of range, a trainable
                parameter that is still without a group, or a layer in groups of different damping.
            RuntimeError: For a parameter of another shape than before.
        """
        before = list(self.param_groups), list(self._following), self._group_of
        try:
            follows = "damping" not in param_group  # which torch gives it then
            super().add_param_group(param_group)
            check_group(self.param_groups[-1], self.defaults, self._model)
            if follows:
                self._following.append(len(self.param_groups) - 1)
            if hasattr(self, "_estimator"):
                self._index_groups()
                self._estimator.uncovered(anew=True)
                self._grow()
        except BaseException:
            self.param_groups[:], self._following, self._group_of = before
            raise

    def _index_groups(self) -> None:
        """Note who is where.

        Raises:
            ValueError: If a trainable parameter is nowhere.
        """
        group_of = {
            parameter: index
            for index, group in enumerate(self.param_groups)
            for parameter in group["params"]
        }
        missing = [
            name
            for name, p in self._model.named_parameters()
            if p.requires_grad and p not in group_of
        ]
        if missing:
            raise ValueError(
                f"The parameter groups miss trainable parameters {missing}: add them, or freeze "
                "them with requires_grad_(False)."
            )
        self._group_of = group_of
        self._given = 0  # parameters that had a gradient in the last step

    def _following_groups(self) -> list[dict[str, Any]]:
        return [self.param_groups[index] for index in self._following]

    def _group(self, block: LayerBlock) -> int:
        """The group whose damping a layer has."""
        weight, *bias = (self._group_of[p] for p in block.parameters.values())
        groups = self.param_groups
        if bias and groups[bias[0]]["damping"] != groups[weight]["damping"]:
            raise ValueError(
                f"Weight and bias of layer '{block.name}' are one block of the curvature, but in "
                "groups with different damping: give both groups one damping."
            )
        return weight

    def _check_unfrozen(self, anew: bool = False) -> None:
        for parameter in self._estimator.uncovered(anew):
            if parameter.requires_grad and parameter not in self._group_of:
                raise RuntimeError(
                    f"Parameter '{self._name(parameter)}' was frozen (or not there: layers may "
                    "have been replaced) when KFAC was made, and is in no parameter group: "
                    "optimizer.add_param_group({'params': [...]}) makes it train."
                )

    def _grow(self) -> None:
        """Take up what was unfrozen or changed."""
        self._check_unfrozen(anew=self._estimator.outdated())
        self._estimator.grow()

    def _name(self, parameter: Parameter) -> str:
        return next(name for name, p in self._model.named_parameters() if p is parameter)

    def _gradients(self) -> dict[Parameter, Tensor]:
        """What there is to make a step of; nothing if any of it isn't finite."""
        for group in self.param_groups:  # which users and schedulers change
            check_options(group)
        gradients = {
            p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        }
        for parameter, gradient in gradients.items():
            if gradient.is_sparse:
                raise RuntimeError(
                    f"The gradient of '{self._name(parameter)}' is sparse, which KFAC can't use: "
                    "build its module with sparse=False."
                )
        fewer, self._given = len(gradients) < self._given, len(gradients)
        self._check_unfrozen(anew=fewer or not gradients)  # layers may have been replaced
        if len({group["damping"] for group in self.param_groups}) > 1:
            for block in self._estimator.blocks:
                self._group(block)
        if self._estimator.is_sound([*gradients.values()], "; its steps are left out."):
            return gradients
        return {}

    def _lrs(self, parameters: Mapping[Parameter, Any]) -> dict[Parameter, float]:
        """The learning rates of these."""
        lrs = [float(group["lr"]) for group in self.param_groups]
        if len(set(lrs)) == 1:
            return dict.fromkeys(parameters, lrs[0])
        return {p: lrs[self._group_of[p]] for p in parameters}

    def _apply(
        self, updates: Mapping[Parameter, Tensor], factors: Mapping[Parameter, Tensor]
    ) -> None:
        """Decay weights, and subtract updates times learning rates, and times factors if any."""
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p in updates]
            if not chosen:
                continue
            lr = float(group["lr"])
            if group["weight_decay"]:
                torch._foreach_mul_(chosen, 1 - lr * group["weight_decay"])
            plain = [p for p in chosen if p not in factors]
            if plain:
                torch._foreach_add_(plain, [updates[p] for p in plain], alpha=-lr)
            scaled = [p for p in chosen if p in factors] if plain else chosen
            if scaled:
                each, times = [updates[p] for p in scaled], [factors[p] for p in scaled]
                torch._foreach_addcmul_(scaled, each, times, value=-lr)

    def _saved_moments(self, state_dict: Mapping[str, Any]) -> dict[Parameter, dict[str, Any]]:
        """The entries of a state by parameter.

        Raises:
            ValueError: If options or moments are missing or out of range, or a moment hasn't the
                shape of its parameter.
        """
        for group in state_dict["param_groups"]:
            check_options(group)
        mine, saved = (
            [p for group in groups for p in group["params"]]
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        # torch compares the lengths
        entries = {p: state_dict["state"].get(i, {}) for p, i in zip(mine, saved, strict=False)}
        for parameter, entry in entries.items():
            if entry:
                check_moments(self._name(parameter), parameter, entry)
        return entries
