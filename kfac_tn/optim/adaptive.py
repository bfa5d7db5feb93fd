"""Natural-gradient steps with a measured learning rate, in a trust region of Adam's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_tn.curvature.intervals import is_due
from kfac_tn.optim.step_rules import Proposal, StepRule


class Adaptive(StepRule):
    r"""The direction of KFAC, as far as the loss's own curvature allows, within a trust region.

    The direction d = F^-1 m scaled by

    .. math::
        t = \min\left(\frac{\text{lr}}{10^{-2}} \, \text{share} \cdot \alpha, \;
        \text{lr} \cdot \text{radius} \, \rho\right), \quad
        \alpha = \frac{d^T m}{d^T G d}

    alpha minimizes the quadratic model -t m^T d + t^2 d^T G d / 2 along d, with G the exact GGN:
    the Kronecker factors F know the curvature's shape, but neither the coupling of layers nor, of
    overparametrized models, its size, by powers of ten. So steps fall with the gradient near a
    minimum, as Newton's do and Adam's don't, which is what lets training converge. rho is the norm
    of Adam's update over that of d (Agarwal et al. 2020, arXiv 2002.11803): far from a minimum the
    quadratic model promises too much, and Adam's steps are of a size that is known to be good.

    d^T G d is measured in steps that ``interval`` tells, by central differences: two forward passes
    without gradients on the batch of the step, a learning rate like that of no other method needs.
    In between, and averaged over measurements, its ratio to d^T F d is kept. Where the batch isn't
    to be had (a loss that no module computes, or not of what the model returns), and until the
    first measurement, steps are those of ``graft``.

    Args:
        share: Of alpha, at the default learning rate: batches are noisy, layers differ.
        radius: Of the trust region, in units of the norm of Adam's step.
        spread: Whether that is one norm for the whole model (0: steps keep their direction), one
            for each layer (1), or between: radii are weighted geometric means of both.
        interval: Steps between measurements; more often at the beginning.
        decay: Of their moving average.

    Raises:
        ValueError: For values out of range.
    """

    natural = False
    needs_batch = True
    without_batch = "takes the steps of 'graft'"

    def __init__(
        self,
        share: float = 0.5,
        radius: float = 2.0,
        spread: float = 0.5,
        interval: int = 20,
        decay: float = 0.7,
    ) -> None:
        if not share > 0:
            raise ValueError(f"share is {share}: it must be positive.")
        if not radius > 0:
            raise ValueError(f"radius is {radius}: it must be positive.")
        if not 0 <= spread <= 1:
            raise ValueError(f"spread is {spread}: it must be in [0, 1].")
        if interval < 1 or interval != int(interval):
            raise ValueError(f"interval is {interval}: it must be a positive whole number.")
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must be in [0, 1).")
        self.share, self.radius, self.spread = share, radius, spread
        self.interval, self.decay = interval, decay
        self.excess = torch.tensor(torch.nan)  # d^T G d / d^T F d; NaN: never measured

    def wants_batch(self, step: int) -> bool:  # noqa: D102
        return is_due(step, self.interval)

    def scale(self, proposal: Proposal) -> Tensor:  # noqa: D102
        if not proposal.directions:
            return torch.ones(())
        parameters = list(proposal.directions)
        directions = [proposal.directions[p] for p in parameters]
        given = torch.stack(torch._foreach_norm(directions))
        adam = torch.stack(torch._foreach_norm([proposal.references[p] for p in parameters]))
        rates = [proposal.lrs[p] for p in parameters]
        # Of learning rates that differ by group, the model sees the ratios.
        largest = max(rates)
        weights = torch.tensor([r / largest if largest else 1.0 for r in rates]).to(given)
        slopes = torch._foreach_mul(directions, [proposal.gradients[p] for p in parameters])
        sums = torch.stack([product.sum() for product in slopes]) * weights

        bound = self.radius * _ratios(proposal, parameters, adam, given, weights, self.spread)
        if proposal.replay is not None:
            trial = torch._foreach_mul(directions, list((bound * weights).unbind()))
            form = proposal.replay.form(
                dict(zip(parameters, trial, strict=True)), proposal.estimator.capture
            )
            self._average(form / (bound.square() * weights * sums).sum())
        excess = self.excess.to(given)
        best = self.share / self.lr * sums.sum() / (excess * (weights * sums).sum())
        scales = torch.where(bound < best, bound, best.expand_as(bound))
        grafted = torch.where(given > 0, adam / given, torch.zeros_like(given))
        scales = torch.where(excess.isfinite(), scales, grafted).nan_to_num(0.0, 0.0, 0.0)
        torch._foreach_mul_(directions, list(scales.unbind()))
        return scales

    def _average(self, measured: Tensor) -> None:
        """Take a measurement in, unless it makes no sense."""
        before = self.excess.to(measured)
        after = torch.where(before.isnan(), measured, before.lerp(measured, 1 - self.decay))
        good = measured.isfinite() & (measured > 0)
        self.excess = torch.where(good, after, before)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"excess": self.excess}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.excess = state["excess"].clone()


def _ratios(
    proposal: Proposal,
    parameters: list[Any],
    adam: Tensor,
    given: Tensor,
    weights: Tensor,
    spread: float,
) -> Tensor:
    """Norms of Adam's update over those of directions: of layers, the model, or between."""
    layers = {p: i for i, b in enumerate(proposal.estimator.curved) for p in b.parameters.values()}
    index = torch.tensor([layers[p] for p in parameters]).to(given.device)
    norms = torch.stack([adam, given]).mul(weights).square()
    by_layer = norms.new_zeros(2, len(proposal.estimator.curved)).index_add_(1, index, norms)
    of_layers, of_model = by_layer[:, index].sqrt(), norms.sum(1).sqrt()
    layer, model = of_layers[0] / of_layers[1], of_model[0] / of_model[1]
    return (layer**spread * model ** (1 - spread)).nan_to_num(0.0, 0.0, 0.0)
