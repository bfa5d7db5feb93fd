"""How far to go along a curvature direction: interchangeable rules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.curvature.estimator import CurvatureEstimator
from kfac_tn.curvature.options import check_number
from kfac_tn.optim.replay import Replay

KL_CLIP = 1e-3
"""The limit of ``KLClip`` where nobody says otherwise."""


@dataclass(frozen=True)
class Proposal:
    """A step that an optimizer is about to take.

    Attributes:
        directions: What curvature proposes, by parameter, for those that have some; the step is
            minus the learning rate times this.
        gradients: Of all parameters: (moving averages of) the loss's gradients.
        references: Of all parameters: the update of a method whose step size is known to be good.
        lrs: Learning rates of all parameters.
        estimator: The curvature.
        states: What an optimizer keeps for each parameter; a rule may add to it.
        replay: The batch of this step, if the rule wants it.
        waiting: Where factors of the directions are put until the step is taken; None: directions
            are multiplied at once.
        current: Gradients of this step alone, of all parameters; None: no step is taken, only
            looked at, and a rule learns nothing from it.
        reaches: How many times further back than ``betas`` say the averages in ``gradients`` reach,
            where that is further.
    """

    directions: dict[Parameter, Tensor]
    gradients: Mapping[Parameter, Tensor]
    references: Mapping[Parameter, Tensor]
    lrs: Mapping[Parameter, float]
    estimator: CurvatureEstimator
    states: MutableMapping[Any, dict[str, Any]] = field(default_factory=dict)
    replay: Replay | None = None
    waiting: list[Tensor] | None = None
    current: Mapping[Parameter, Tensor] | None = None
    reaches: Mapping[Parameter, float] = field(default_factory=dict)

    def multiply(self, factors: Tensor) -> None:
        """Multiply the directions, each with a factor of its own or all with one, now or later."""
        if self.waiting is not None:
            self.waiting.append(factors)
        elif self.directions:
            each = list(factors.unbind()) if factors.dim() else factors
            torch._foreach_mul_(list(self.directions.values()), each)

    def factors(self) -> dict[Parameter, Tensor]:
        """What is waiting, by parameter."""
        if not self.waiting or not self.directions:
            return {}
        product = math.prod(self.waiting[1:], start=self.waiting[0])
        each = product.unbind() if product.dim() else [product] * len(self.directions)
        return dict(zip(self.directions, each, strict=True))


class StepRule(ABC):
    """Scales the directions of a proposal, in place; every optimizer needs a rule of its own.

    Attributes:
        lr: The learning rate that it wants by default.
        natural: Whether it wants learning rates that aren't Adam's, so that parameters without
            curvature need one of their own.
        own_momentum: Whether directions are of the gradient as it is, not of its moving average.
        needs_batch: Whether it ever computes with the batch.
        any_length: Whether it gives directions a length that theirs has no part in, so that they,
            and ``Proposal.gradients``, may be of moments that aren't corrected for their start.
        horizon: By how much ``reach`` grows with each step, where it does.
        factor: By what the user's objective is larger than its loss, as far as that was measured.
        without_batch: What follows where there is none, for a message; empty: an error.
    """

    lr = 1e-2
    natural = True
    own_momentum = False
    needs_batch = False
    any_length = False
    horizon = 0.0
    factor: Tensor | float = 1.0
    without_batch = ""

    @property
    def may_wait(self) -> bool:
        """Whether directions may be multiplied later than in ``scale``; see ``Scaling``."""
        return False

    def wants_batch(self, step: int) -> bool:
        """Whether this step's batch is needed; steps are counted from 0."""
        return False

    def reach(self, step: int) -> float:
        """Over how many steps the moving average of gradients reaches back, if ``betas`` say less.

        0: it begins anew, as this step's gradient.
        """
        return 1.0

    def join(self, step: int) -> None:  # noqa: B027
        """Parameters take their first step that hadn't been there: nothing is known of them."""

    def at_once(self, step: int) -> float:
        """Share of this step's own gradient in what directions are of, besides that average."""
        return 0.0

    @abstractmethod
    def scale(self, proposal: Proposal) -> Tensor:
        """Change ``proposal.directions`` in place; return the factors, ``[directions]`` or one.

        (A rule that ``may_wait`` has ``proposal.multiply`` do it.)
        """

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and words that a run needs to continue."""
        return {}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another kind of rule.

        Raises:
            ValueError: If it has other entries than this rule's, or a tensor is none there, or a
                number.
        """
        needed = self.state_dict().keys()
        if needed != state.keys():
            raise ValueError(
                f"The state is of another step rule: it has {sorted(state)}, but "
                f"{type(self).__name__} needs {sorted(needed)}. Make the optimizer with the "
                "step_rule that the state was taken with."
            )
        for name, mine in self.state_dict().items():
            for kind in (Tensor, Real):
                if isinstance(mine, kind) and not isinstance(state[name], kind):
                    raise ValueError(
                        f"The state of the step rule has {state[name]!r} for '{name}', where "
                        f"{type(self).__name__} has {mine!r}: it is damaged."
                    )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue where ``state_dict`` was taken."""


class Scaling(StepRule):
    """A rule that does nothing but multiply each direction by a number.

    So that can wait until parameters are changed anyway: one pass over the memory less.
    """

    @abstractmethod
    def factors(self, proposal: Proposal) -> Tensor:
        """A factor for each of ``proposal.directions``, which stay as they are: ``[directions]``.

        Of no directions: of any shape.
        """

    def scale(self, proposal: Proposal) -> Tensor:  # noqa: D102
        factors = self.factors(proposal)
        proposal.multiply(factors)
        return factors

    @property
    def may_wait(self) -> bool:
        """Not where a ``scale`` of one's own, or a trust region, looks at what was multiplied."""
        return type(self).scale is Scaling.scale and not self.own_momentum


class Fixed(StepRule):
    """The direction as it is."""

    def scale(self, proposal: Proposal) -> Tensor:  # noqa: D102
        return torch.ones(())


class Graft(Scaling):
    """The direction of KFAC, for each parameter with the norm of another update; see ``graft``.

    Args:
        to: ``"adam"``, or ``"sgd"``: the bias-corrected moving average of the gradient, whose
            learning rates are those of SGD with momentum 0 (the average has weights of sum 1).

    Raises:
        ValueError: For another name.
    """

    def __init__(self, to: str = "adam") -> None:
        if to not in ("adam", "sgd"):
            raise ValueError(f"Grafting to {to!r} is unknown: choose 'adam' or 'sgd'.")
        self.to = to
        self.any_length = to == "adam"
        self.natural = to == "sgd"

    def factors(self, proposal: Proposal) -> Tensor:  # noqa: D102
        directions = proposal.directions
        references = proposal.references if self.to == "adam" else proposal.gradients
        return _grafts(list(directions.values()), [references[p] for p in directions])


class KLClip(StepRule):
    """The direction, shrunk such that the step's KL estimate has a limit; see ``clip_kl``.

    Args:
        limit: Of lr^2 d^T g over all layers together.

    Raises:
        ValueError: If it isn't positive.
    """

    def __init__(self, limit: float = KL_CLIP) -> None:
        check_number("kl_clip", limit, "positive")
        self.limit = limit

    def scale(self, proposal: Proposal) -> Tensor:  # noqa: D102
        directions = proposal.directions
        gradients = [proposal.gradients[p] for p in directions]
        lrs = [proposal.lrs[p] for p in directions]
        return clip_kl(list(directions.values()), gradients, lrs, self.limit)


def kl_clip_of(choice: float | None, step_rule: object) -> float:
    """The limit chosen for the rule ``"kl_clip"``, or the default.

    Raises:
        ValueError: For one that isn't positive, or given with another rule.
    """
    if choice is None:
        return KL_CLIP
    check_number("kl_clip", choice, "positive")
    if step_rule != "kl_clip":
        other = repr(step_rule) if isinstance(step_rule, str) else type(step_rule).__name__
        raise ValueError(
            f"kl_clip={choice} is for step_rule='kl_clip', but step_rule is {other}: leave it out."
        )
    return choice


def graft(directions: list[Tensor], references: list[Tensor]) -> Tensor:
    """Give each direction, in place, the Euclidean norm of its reference; return the factors.

    The direction of one method with the step size of another (Agarwal et al. 2020, arXiv
    2002.11803), for each parameter. A direction that is zero stays so.

    Example:
        >>> import torch
        >>> direction = torch.tensor([3.0, 4.0])
        >>> _ = graft([direction], [torch.tensor([0.0, 1.0])])
        >>> direction
        tensor([0.6000, 0.8000])
    """
    scales = _grafts(directions, references)
    if directions:
        torch._foreach_mul_(directions, list(scales.unbind()))
    return scales


def _grafts(directions: list[Tensor], references: list[Tensor]) -> Tensor:
    """The factors of ``graft``."""
    if not directions:
        return torch.ones(())
    wanted, given = torch.stack(torch._foreach_norm([*references, *directions])).chunk(2)
    return torch.where(given > 0, wanted / given, 0)


def clip_kl(
    directions: list[Tensor], gradients: list[Tensor], lrs: list[float], limit: float
) -> Tensor:
    """Shrink all directions, in place, such that the step's KL estimate has a limit.

    With d = F^-1 g a step -lr d changes the model's distribution by about lr^2 d^T g (twice its KL
    divergence); one factor min(1, sqrt(limit / sum lr^2 d^T g)) for all keeps that below the limit
    (Ba, Grosse & Martens 2017, Section 5).

    Example:
        >>> import torch
        >>> direction = torch.tensor([2.0])
        >>> _ = clip_kl([direction], [torch.tensor([2.0])], lrs=[1.0], limit=1.0)
        >>> direction
        tensor([1.])
    """
    if not directions:
        return torch.ones(())
    products = torch._foreach_mul(directions, gradients)
    change = torch.stack(
        [lr**2 * product.sum() for lr, product in zip(lrs, products, strict=True)]
    ).sum()
    scale = torch.where(change > limit, (limit / change).sqrt(), torch.ones_like(change))
    torch._foreach_mul_(directions, scale)
    return scale


def moderate(
    updates: Mapping[Parameter, Tensor],
    chosen: Iterable[Parameter],
    lrs: Mapping[Parameter, float],
    limit: float,
) -> None:
    """Shrink, in place, updates whose learning rate is above a limit to that.

    Layers that have no curvature yet take Adam's updates, for which a natural gradient's learning
    rate is too large.
    """
    for parameter in chosen:
        if lrs[parameter] > limit:
            updates[parameter].mul_(limit / lrs[parameter])


def limit_norm(
    directions: Mapping[Parameter, Tensor], lrs: Mapping[Parameter, float], limit: float
) -> None:
    """Shrink directions, in place, to a norm of the step of ``limit`` times the parameters'.

    One factor for all, from the norms of all together.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> direction = torch.tensor([0.0, 10.0])
        >>> limit_norm({w: direction}, {w: 0.5}, limit=0.1)
        >>> direction
        tensor([0., 1.])
    """
    values, parameters = list(directions.values()), [p.detach() for p in directions]
    factors = torch.tensor([lrs[p] for p in directions])
    given = torch.stack(torch._foreach_norm(values)) * factors.to(values[0])
    size = torch.stack(torch._foreach_norm(parameters)).norm().to(given)
    norm = given.norm()
    scale = torch.where(norm > limit * size, limit * size / norm, 1.0)
    torch._foreach_mul_(values, scale)


class TrustRegion:
    """A limit on how far one step changes the model's distribution, for whatever rule scales it.

    A direction d = F^-1 m scaled by s changes it by about lr^2 s^2 d^T m (twice the KL divergence,
    damping included), summed over parameters: that costs no product with F. Above the limit all
    directions are shrunk by one factor, as in ``clip_kl``. After a rule that adds momentum to the
    directions, F is the product of the Kronecker factors.

    Args:
        limit: Of that sum.

    Raises:
        ValueError: If it isn't positive.
    """

    def __init__(self, limit: float) -> None:
        check_number("trust_region", limit, "positive")
        self.limit = limit

    def scale(self, proposal: Proposal, rule: StepRule) -> Tensor:
        """Apply the rule, and shrink what it made where that is too far."""
        directions = proposal.directions
        if not directions:
            return rule.scale(proposal)
        values = list(directions.values())
        lrs = torch.tensor([proposal.lrs[p] for p in directions]).square()
        if rule.own_momentum:
            scales = rule.scale(proposal)
            scaled = {p: proposal.lrs[p] * d for p, d in directions.items()}
            forms = proposal.estimator.quadratic_forms(scaled)
            change = torch.stack(list(forms.values())).sum()
        else:
            products = torch._foreach_mul(values, [proposal.gradients[p] for p in directions])
            sums = torch.stack([product.sum() for product in products])
            scales = rule.scale(proposal)
            change = (lrs.to(sums) * scales.to(sums).square() * sums).sum()
        factor = torch.where(change > self.limit, (self.limit / change).sqrt(), 1.0)
        proposal.multiply(factor)
        return scales * factor.to(scales.device)
