"""How far to go along a curvature direction: interchangeable rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

StepRuleName: TypeAlias = Literal["graft", "kl_clip", "fixed"]


@dataclass(frozen=True)
class Proposal:
    """A step that an optimizer is about to take.

    Attributes:
        directions: What curvature proposes, by parameter, for those that have some; the step is
            minus the learning rate times this.
        gradients: Of all parameters: (moving averages of) the loss's gradients.
        references: Of all parameters: the update of a method whose step size is known to be good.
        lrs: Learning rates of all parameters.
    """

    directions: dict[Parameter, Tensor]
    gradients: Mapping[Parameter, Tensor]
    references: Mapping[Parameter, Tensor]
    lrs: Mapping[Parameter, float]


class StepRule(ABC):
    """Scales the directions of a proposal, in place.

    Attributes:
        natural: Whether the directions keep their own length, which wants other learning rates than
            the updates of a first-order method.
    """

    natural = True

    @abstractmethod
    def scale(self, proposal: Proposal) -> None:
        """Change ``proposal.directions`` in place."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers that a run needs to continue."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue where ``state_dict`` was taken."""


class Fixed(StepRule):
    """The direction as it is."""

    def scale(self, proposal: Proposal) -> None:  # noqa: D102
        pass


class Graft(StepRule):
    """The direction of KFAC, for each parameter with the norm of the reference; see ``graft``."""

    natural = False

    def scale(self, proposal: Proposal) -> None:  # noqa: D102
        directions = proposal.directions
        graft(list(directions.values()), [proposal.references[p] for p in directions])


class KLClip(StepRule):
    """The direction, shrunk such that the step's KL estimate has a limit; see ``clip_kl``.

    Args:
        limit: Of lr^2 d^T g over all layers together.

    Raises:
        ValueError: If it isn't positive.
    """

    def __init__(self, limit: float = 1e-3) -> None:
        if not limit > 0:
            raise ValueError(f"kl_clip is {limit}: it must be positive.")
        self.limit = limit

    def scale(self, proposal: Proposal) -> None:  # noqa: D102
        directions = proposal.directions
        gradients = [proposal.gradients[p] for p in directions]
        lrs = [proposal.lrs[p] for p in directions]
        clip_kl(list(directions.values()), gradients, lrs, self.limit)


def step_rule_of(choice: StepRuleName | StepRule, kl_clip: float) -> StepRule:
    """The rule of that name, or the rule itself.

    Raises:
        ValueError: For an unknown name, or a limit that isn't positive.
    """
    rules = {"graft": Graft(), "kl_clip": KLClip(kl_clip), "fixed": Fixed()}
    if isinstance(choice, StepRule):
        return choice
    if choice not in rules:
        raise ValueError(
            f"step_rule is {choice!r}: choose one of {get_args(StepRuleName)}, or give a rule of "
            "kfac_tn.optim.step_rules."
        )
    return rules[choice]


def graft(directions: list[Tensor], references: list[Tensor]) -> None:
    """Give each direction, in place, the Euclidean norm of its reference.

    The direction of one method with the step size of another (Agarwal et al. 2020, arXiv
    2002.11803), for each parameter. A direction that is zero stays so.

    Example:
        >>> import torch
        >>> direction = torch.tensor([3.0, 4.0])
        >>> graft([direction], [torch.tensor([0.0, 1.0])])
        >>> direction
        tensor([0.6000, 0.8000])
    """
    if not directions:
        return
    wanted = torch.stack(torch._foreach_norm(references))
    given = torch.stack(torch._foreach_norm(directions))
    scales = torch.where(given > 0, wanted / given, torch.zeros_like(given))
    torch._foreach_mul_(directions, list(scales.unbind()))


def clip_kl(
    directions: list[Tensor], gradients: list[Tensor], lrs: list[float], limit: float
) -> None:
    """Shrink all directions, in place, such that the step's quadratic KL estimate has a limit.

    With d = F^-1 g a step -lr d changes the model's distribution by about lr^2 d^T g (twice its KL
    divergence); one factor min(1, sqrt(limit / sum lr^2 d^T g)) for all keeps that below the limit
    (Ba, Grosse & Martens 2017, Section 5).

    Example:
        >>> import torch
        >>> direction = torch.tensor([2.0])
        >>> clip_kl([direction], [torch.tensor([2.0])], lrs=[1.0], limit=1.0)
        >>> direction
        tensor([1.])
    """
    if not directions:
        return
    products = torch._foreach_mul(directions, gradients)
    change = torch.stack(
        [lr**2 * product.sum() for lr, product in zip(lrs, products, strict=True)]
    ).sum()
    scale = torch.where(change > limit, (limit / change).sqrt(), torch.ones_like(change))
    torch._foreach_mul_(directions, scale)
