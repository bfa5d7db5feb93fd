"""Natural-gradient steps with a measured learning rate, in a trust region of Adam's size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kfac_tn.curvature.intervals import is_due
from kfac_tn.curvature.options import check_number, check_whole
from kfac_tn.optim.step_rules import Proposal, Scaling

MOST = 1e30
"""By which a direction is divided at most."""

LOOKS = 5  # steps between looks at how far one goes and where, which wait for the device


class Adaptive(Scaling):
    r"""The direction of KFAC, as far as the loss's own curvature allows, within a trust region.

    The direction d = F^-1 n, of n = (1 - fresh) m + fresh g with the moving average m of the
    gradient g, scaled by

    .. math::
        t = \min\left(\frac{\text{lr}}{10^{-2}} \, \text{share} \cdot \alpha, \;
        \text{lr} \cdot \text{radius} \, \rho\right), \quad
        \alpha = \frac{d^T n}{d^T G d}

    alpha minimizes the quadratic model -t n^T d + t^2 d^T G d / 2 along d, with G the exact GGN:
    the Kronecker factors F know the curvature's shape, but neither the coupling of layers nor, of
    overparametrized models, its size, by powers of ten. So steps fall with the gradient near a
    minimum, as Newton's do and Adam's don't, which is what lets training converge. rho is the norm
    of Adam's update over that of d (Agarwal et al. 2020, arXiv 2002.11803): far from a minimum the
    quadratic model promises too much, and Adam's steps are of a size that is known to be good.

    d^T G d is measured in steps that ``interval`` tells, by central differences: two forward passes
    without gradients on the batch of the step, a learning rate like that of no other method needs.
    In between, and averaged over measurements, its ratio to d^T F d is kept, which counts as 1
    where it is less: where a model that fits all is saturated, the curvature on a batch all but
    vanishes, and returns a few steps away; that of F, averaged over steps, is the better guide.

    Where the batch isn't to be had (of a loss that is not of elements of what the model returns, or
    was shown to ``observe`` but isn't what is differentiated), and until the first measurement,
    steps have the lengths of ``graft``'s.

    That is one number for all layers. But of single layers F may have next to nothing of the
    curvature, so that their directions are all that is left of a step: of keys with KFAC-reduce,
    whose gradients' sum over positions is zero; of layers whose examples hardly differ, as at the
    beginning in transformers, or behind batch normalization. It shows: with r and H the gradient
    and the Hessian of the loss in the outputs, G = J^T H J and g = J^T r, by Cauchy and Schwarz

    .. math::
        d^T G d \ge \frac{(d^T g)^2}{r^T H^{+} r}

    for each layer's part of d. Where that is more than ``tolerance`` times d^T F d = d^T n, the
    layer's direction is divided by what it is more; averaged over measurements, as the other is.

    Nothing anneals alpha. Where the noise of batches dominates, the gradient after a step tells
    that half of it or less would have gained more; but training on such steps ends at a higher
    loss: progress in directions of low curvature is worth the noise in the others (the bias of
    short horizons, Wu et al. 2018, arXiv 1803.02021).

    m reaches back over a growing number of steps, R times as many as ``betas`` say: in step t

    .. math::
        \beta_{1,t} = 1 - \frac{1 - \beta_1}{R}, \quad
        R = \max\left(1, \; \text{horizon} \cdot t \, (1 - \beta_1)\right)

    That averages noise away as iterates' averages do, without a second copy of the parameters and
    without knowing when training ends (steps along an average of gradients are those of an average
    of iterates: Defazio 2020, arXiv 2010.00406), and where there is no noise and curvature differs
    by direction it is Nesterov's growing momentum (1983). Each gradient is spread over as many
    steps as m reaches back; so the share of alpha grows with R, to 1 / fresh times what it was.
    (As long as it grows, each has the same weight in all steps together, as with momentum that is a
    sum, not an average.) What is used at once doesn't: with l for t in units of share alpha, the
    mean of all parameters' in the last step that was looked at, every fifth,

    .. math::
        n = (1 - \nu) m + \nu g, \quad \nu = \frac{\text{fresh}}{\max(1, l)}

    so that noise has no more of alpha than at the beginning. Where the trust region, not curvature,
    limits steps, l remains small, and nu as large as it was.

    Old gradients outlive a loss that falls exponentially. Steps then go uphill, by the gradient of
    their own batch; where noise decides, they don't, for they have a share of that. So when one
    does, m begins anew as the next gradient (the restarts of O'Donoghue & Candes 2015, arXiv
    1204.3982), and all else with it: t is counted from there.

    Args:
        share: Of alpha, at the default learning rate and with m as ``betas`` say.
        radius: Of the trust region, in units of the norm of Adam's step.
        spread: Whether that is one norm for the whole model (0: steps keep their direction), one
            for each layer (1), or between: radii are weighted geometric means of both.
        interval: Steps between measurements; more often at the beginning.
        decay: Of their moving average.
        fresh: Share of the step's own gradient, at most (quasi-hyperbolic momentum, Ma & Yarats
            2019, arXiv 1810.06801; Nesterov's is 1 - beta1). An average alone lags behind: where
            steps are as large as curvature allows, it swings from one side of a valley to the
            other.
        horizon: Share of the steps since m began, or a parameter joined, over which it reaches
            back, if that is further than ``betas`` say; 0: always as they say. Not of parameters
            that take Adam's steps, nor where beta1 is 0.
        tolerance: Of what F lacks, by layer; ``math.inf``: whatever that is. Small regressions,
            whose layers lack up to ten times what F has of them, train better so: with 1 they end
            at 4 to 6 times the loss, where a CNN with group normalization, and models of few
            examples, gain from less than the default (``benchmarks/tolerance.py``).

    Raises:
        ValueError: For values out of range.
    """

    factor: Tensor
    natural = False
    needs_batch = True
    without_batch = "the step rule takes the steps of 'graft'"

    def __init__(
        self,
        share: float = 1.0,
        radius: float = 4.0,
        spread: float = 0.5,
        interval: int = 50,
        decay: float = 0.7,
        fresh: float = 0.2,
        horizon: float = 0.2,
        tolerance: float = 20.0,
    ) -> None:
        check_number("share", share, "positive and finite")
        check_number("radius", radius, "positive")
        check_whole("interval", interval)
        check_number("decay", decay, "in [0, 1)")
        for name, value in {"spread": spread, "fresh": fresh, "horizon": horizon}.items():
            check_number(name, value, "in [0, 1]")
        check_number("tolerance", tolerance, "positive")
        self.tolerance = tolerance
        self.lacking = torch.ones(0)  # by layer, 1 where that is nothing; NaN: never measured
        self._lacks = False  # anywhere
        self.share, self.radius, self.spread = share, radius, spread
        self.fresh, self.horizon = fresh, horizon
        self.interval, self.decay = interval, decay
        self.excess = torch.tensor(torch.nan)  # d^T G d / d^T F d; NaN: never measured
        self.factor = torch.ones(())  # of the user's objective: G and F are without
        self.begun, self.anew = 0, -1  # the step that t is counted from; where m begins anew
        self.length = self._length = 0.0  # t over share alpha, when last looked at, and before
        self._looked = 0  # the step that came next

    def wants_batch(self, step: int) -> bool:  # noqa: D102
        return is_due(step, self.interval)

    def reach(self, step: int) -> float:  # noqa: D102
        if step == self.anew:
            return 0.0
        return max(1.0, self.horizon * (step - self.begun + 1))

    def join(self, step: int) -> None:  # noqa: D102
        self.begun, self.length = step, 0.0

    def at_once(self, step: int) -> float:  # noqa: D102
        return self.fresh / max(1.0, self.length if step >= self._looked else self._length)

    def factors(self, proposal: Proposal) -> Tensor:  # noqa: D102
        if not proposal.directions:
            return torch.ones(())
        parameters, directions = list(proposal.directions), list(proposal.directions.values())
        layers = [proposal.estimator.layer_of[p] for p in parameters]
        if self._lacks:
            known = self._known(layers, directions[0])[layers].nan_to_num(1.0)
            torch._foreach_div_(directions, list(known.unbind()))
        adam, given, bound, weights = self._bounds(proposal, layers)
        best: float | Tensor = self.share / self.lr
        if weights is not None or proposal.replay is not None:
            sums = _slopes(directions, [proposal.gradients[p] for p in parameters])
            if proposal.replay is not None:
                current = proposal.current or proposal.gradients
                slopes = _slopes(directions, [current[p] for p in parameters])
                form, decrement = self._measure(proposal, bound, weights, slopes)
                change = self._lack(layers, sums, slopes, decrement)
                if change is not None:
                    torch._foreach_div_(directions, list(change.to(directions[0]).unbind()))
                    sums, slopes = sums / change, slopes / change
                    adam, given, bound, _ = self._bounds(proposal, layers)
                    form, _ = self._measure(proposal, bound, weights, slopes)
                weighted = sums if weights is None else weights * sums
                self._average(form / (bound * bound * weighted).sum())
            if weights is not None:
                best = best * (weights * sums).sum() / (weights.square() * sums).sum()
        excess = self.excess.to(given)
        alpha = (excess * self.factor.to(given)).reciprocal() * best
        reach = torch.minimum(bound, alpha * self._growth(proposal, given))
        scales = torch.where(excess.isnan(), adam / given, reach)
        scales = scales.nan_to_num(0.0, 0.0, 0.0)  # of directions that are zero
        self._look(proposal, scales, alpha, weights)
        return scales.to(directions[0])

    def _bounds(
        self, proposal: Proposal, layers: list[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Norms of Adam's update and of the direction, the trust region's factor, and weights."""
        parameters = list(proposal.directions)
        references = [proposal.references[p] for p in parameters]
        norms = torch._foreach_norm([*references, *proposal.directions.values()])
        # Where F is all but zero, squares of directions overflow in single precision.
        adam, given = torch.stack(norms).double().view(2, -1).unbind()
        weights = _weights([proposal.lrs[p] for p in parameters], given)
        seen = torch.stack([adam, given])
        ratios = _ratios(seen if weights is None else seen * weights, layers, self.spread)
        return adam, given, ratios.mul_(self.radius), weights

    def _measure(
        self, proposal: Proposal, bound: Tensor, weights: Tensor | None, slopes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``d^T G d`` along what the trust region allows, and the loss's decrement."""
        assert proposal.replay is not None
        bounds = bound if weights is None else bound * weights
        slope, capture = (slopes * bounds).sum(), proposal.estimator.capture
        form, factor, decrement = proposal.replay.form(proposal.directions, bounds, slope, capture)
        self.factor = torch.where(factor.isnan(), self.factor.to(factor), factor)
        return form, decrement

    def _known(self, layers: list[int], like: Tensor) -> Tensor:
        """What was measured of all layers so far; NaN of those that are new."""
        known = self.lacking.to(like)
        missing = max(0, max(layers) + 1 - len(known))
        return torch.nn.functional.pad(known, (0, missing), value=math.nan)

    def _lack(
        self, layers: list[int], sums: Tensor, slopes: Tensor, decrement: Tensor
    ) -> Tensor | None:
        """Measure what F lacks of each layer's curvature: what is more than ``tolerance`` times.

        Args:
            layers: Of the parameters.
            sums: ``d^T n`` of each.
            slopes: ``d^T g`` of each, with the step's own gradient.
            decrement: Of the loss.

        Returns:
            By how much more than before directions are to be divided, for each parameter; None if
            by nothing.
        """
        if math.isinf(self.tolerance):
            return None
        places, before = torch.tensor(layers, device=sums.device), self._known(layers, sums)
        divisor = before.nan_to_num(1.0)  # of directions as they are
        model, own = (
            torch.zeros_like(divisor).index_add(0, places, values) * divisor
            for values in (sums, slopes)
        )
        least = (own / self.factor.to(own)).square() / (decrement.to(own) * model)
        now = (least / self.tolerance).nan_to_num(1.0, MOST, 1.0).clamp(1.0, MOST)
        after = torch.where(before.isnan(), now, before.lerp(now, 1 - self.decay))
        # Layers without a gradient in this step remain as they were.
        self.lacking = before.index_copy(0, places, after[places])
        change = (after / divisor)[places]
        lacks, changes = torch.stack([(self.lacking > 1).any(), (change != 1).any()]).tolist()
        self._lacks = lacks
        return change if changes else None

    def _growth(self, proposal: Proposal, like: Tensor) -> float | Tensor:
        """By how much the share of alpha has grown: one number, or one for each direction."""
        most = 1 / self.fresh if self.fresh else math.inf
        growths = [min(proposal.reaches.get(p, 1.0), most) for p in proposal.directions]
        return growths[0] if min(growths) == max(growths) else torch.tensor(growths).to(like)

    def _look(
        self, proposal: Proposal, scales: Tensor, alpha: Tensor, weights: Tensor | None
    ) -> None:
        """See how far the step goes, and have averages begin anew if that is uphill."""
        step = proposal.estimator.steps  # the next one
        # Of young averages there is nothing to forget; their start is corrected for, besides.
        old = proposal.reaches or self.anew == self.begun
        if proposal.current is None or not old or step % LOOKS:
            return
        current = [proposal.current[p] for p in proposal.directions]
        slopes = _slopes(list(proposal.directions.values()), current) * scales
        slope = (slopes if weights is None else slopes * weights).sum()
        length = (scales / alpha).mean().nan_to_num(0.0)
        downhill, found = torch.stack([slope, length]).tolist()
        self._length, self._looked, self.length = self.length, step, found
        if downhill < 0:
            self.join(step)
            self.anew = step

    def _average(self, measured: Tensor) -> None:
        """Take a measurement in, unless it makes no sense; F is never too large."""
        good = measured.isfinite() & (measured > 0)
        measured = measured.clamp(min=1.0)
        before = self.excess.to(measured)
        after = torch.where(before.isnan(), measured, before.lerp(measured, 1 - self.decay))
        self.excess = torch.where(good, after, before)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        counts = {"begun": self.begun, "anew": self.anew, "length": self.length}
        tensors = {"excess": self.excess, "factor": self.factor, "lacking": self.lacking}
        return {**tensors, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.excess, self.factor = state["excess"].clone(), state["factor"].clone()
        self.lacking = state["lacking"].clone()
        self._lacks = bool((self.lacking > 1).any())
        self.begun, self.anew = state["begun"], state["anew"]
        self.length = self._length = state["length"]


def _slopes(directions: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """The products of directions with gradients, one number each."""
    products = torch._foreach_mul(directions, gradients)
    return torch.stack([product.sum() for product in products]).double()


def _weights(lrs: list[float], like: Tensor) -> Tensor | None:
    """Of learning rates that differ by group, the model sees the ratios; None if all are one."""
    largest = max(lrs)
    if not largest or min(lrs) == largest:
        return None
    return torch.tensor([lr / largest for lr in lrs]).to(like)


def _ratios(norms: Tensor, layers: list[int], spread: float) -> Tensor:
    """Norms of Adam's update over those of directions: of layers, the model, or between.

    Args:
        norms: Of both, ``[2, parameters]``.
        layers: Numbers of the parameters' layers.
        spread: Share of the layers'.
    """
    company, exponents = _company(tuple(layers), spread, norms.dtype, norms.device)
    above, below = (norms.square() @ company).sqrt().unbind()
    ratios = (above / below).pow(exponents)
    return (ratios[:-1] * ratios[-1]).nan_to_num(0.0, 0.0, 0.0)


@lru_cache(maxsize=8)
def _company(
    layers: tuple[int, ...], spread: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which parameters are of one's layer, and last of one's model: ``[parameters, ... + 1]``.

    And the exponent that each of these has in a mean.
    """
    places = torch.tensor(layers)
    same = torch.nn.functional.pad(places == places.unsqueeze(1), (0, 1), value=True)
    exponents = torch.tensor([spread] * len(layers) + [1 - spread], dtype=dtype, device=device)
    return same.to(device, dtype), exponents
