"""Learning rate and momentum from the quadratic model of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.curvature.intervals import is_due
from kfac_tn.curvature.options import check_number, check_whole
from kfac_tn.optim.adaptive import Adaptive
from kfac_tn.optim.step_rules import Fixed, Graft, KLClip, Proposal, StepRule, limit_norm

StepRuleName: TypeAlias = Literal["adaptive", "graft", "kl_clip", "fixed", "quadratic"]


class QuadraticModel(StepRule):
    """Learning rate and momentum that minimize the quadratic model of the loss.

    The step is minus u = alpha d + mu u', with d the direction and u' the step before; alpha and mu
    minimize -g^T u + u^T (G + lambda I) u / 2, G the exact GGN on the batch and lambda the damping
    (Martens & Grosse 2015, Section 7), both times the factor of the loss in the objective, if that
    can be told. The learning rate of the group is a factor on top: the model
    is that of one batch, so where batches are small, take 0.1 or less. Of learning rates that
    differ by group, the model sees the ratios.

    Args:
        interval: Steps between computations of alpha and mu, which take two products with the
            Jacobian; more often at the beginning. They are kept in between.
        momentum: Whether to use u'; else mu is 0.
        relative_norm: Limit on the norm of the step over that of the parameters, all layers
            together, above which the step is shrunk. Early in training the GGN of a deep network is
            so small that the model's minimum is far outside of where the model holds: without this
            limit the loss of a CNN can rise by powers of ten in the first step. None: no limit.

    Raises:
        ValueError: If the interval isn't a positive whole number, or the limit not positive.
    """

    factor: Tensor
    lr = 1.0
    own_momentum = True
    needs_batch = True

    def __init__(
        self, interval: int = 1, momentum: bool = True, relative_norm: float | None = 0.3
    ) -> None:
        check_number("relative_norm", relative_norm, "positive", None)
        check_whole("interval", interval)
        self.interval, self.momentum, self.relative_norm = interval, momentum, relative_norm
        self.coefficients = torch.zeros(2, dtype=torch.float64)
        self.factor = torch.ones(())

    def wants_batch(self, step: int) -> bool:  # noqa: D102
        return is_due(step, self.interval)

    def scale(self, proposal: Proposal) -> Tensor:  # noqa: D102
        directions, states = proposal.directions, proposal.states
        if not directions:
            return torch.ones(())
        before = {
            p: states[p].get("previous", torch.zeros_like(d)) if self.momentum else 0 * d
            for p, d in directions.items()
        }
        if proposal.replay is not None:
            vectors = [_in_proportion(each, proposal.lrs) for each in (directions, before)]
            slopes = [
                torch.stack([(proposal.gradients[p] * v).sum() for p, v in vector.items()]).sum()
                for vector in vectors
            ]
            capture = proposal.estimator.capture
            gram, factor = proposal.replay.gram(vectors, slopes[0], capture)
            self.factor = torch.where(factor.isnan(), self.factor, factor)
            gram = gram.double() + damping_gram(vectors, proposal.estimator.dampings()).double()
            self.coefficients = minimize(gram, torch.stack(slopes).double() / self.factor)
        alpha, mu = self.coefficients.unbind()
        for p, d in directions.items():
            d.mul_(alpha.to(d)).add_(before[p] * mu.to(d))
        if self.relative_norm is not None:
            limit_norm(directions, proposal.lrs, self.relative_norm)
        for p, d in directions.items():
            states[p]["previous"] = d  # itself: a trust region may shrink it yet
        return torch.ones(())

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"coefficients": self.coefficients, "factor": self.factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.coefficients, self.factor = state["coefficients"].clone(), state["factor"].clone()


def _in_proportion(
    vector: dict[Parameter, Tensor], lrs: Mapping[Parameter, float]
) -> dict[Parameter, Tensor]:
    """A vector as it is stepped along, but for the largest learning rate of its parameters."""
    largest = max(lrs[p] for p in vector)
    if not largest:
        return vector
    return {p: v if lrs[p] == largest else v * (lrs[p] / largest) for p, v in vector.items()}


def damping_gram(
    vectors: Sequence[Mapping[Parameter, Tensor]], dampings: Mapping[Parameter, Tensor]
) -> Tensor:
    """``v_i^T Lambda v_j`` with a damping ``[G]`` for each parameter's groups: ``[V, V]``."""
    rows = [{p: v.reshape(len(dampings[p]), -1) for p, v in each.items()} for each in vectors]
    entries = [
        torch.stack([(dampings[p] * (one[p] * other[p]).sum(1)).sum() for p in one]).sum()
        for one in rows
        for other in rows
    ]
    return torch.stack(entries).view(len(rows), len(rows))


def minimize(gram: Tensor, slopes: Tensor) -> Tensor:
    """The coefficients c that minimize -slopes^T c + c^T gram c / 2, for two directions.

    A direction that is zero, or parallel to the other, does no harm.

    Example:
        >>> import torch
        >>> minimize(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]))
        tensor([0.5000, 0.0000])
    """
    size = gram.diagonal().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    scaled = gram / size.outer(size)
    correlation = scaled[0, 1]
    diagonal = scaled.diagonal() + 1e-9
    determinant = diagonal[0] * diagonal[1] - correlation.square()
    b = slopes / size
    solved = torch.stack(
        [diagonal[1] * b[0] - correlation * b[1], diagonal[0] * b[1] - correlation * b[0]]
    )
    return torch.where(determinant > 0, solved / determinant, 0.0) / size


def step_rule_of(choice: StepRuleName | StepRule, kl_clip: float) -> StepRule:
    """The rule of that name, or the rule itself.

    Raises:
        ValueError: For an unknown name, or a limit that isn't positive.
    """
    rules: dict[str, StepRule] = {
        "adaptive": Adaptive(),
        "graft": Graft(),
        "kl_clip": KLClip(kl_clip),
        "fixed": Fixed(),
        "quadratic": QuadraticModel(),
    }
    if isinstance(choice, StepRule):
        return choice
    if choice not in rules:
        raise ValueError(
            f"step_rule is {choice!r}: choose one of {get_args(StepRuleName)}, or give a rule of "
            "kfac_tn.optim."
        )
    return rules[choice]
