"""KFAC's direction for any other optimizer: preconditions the gradients in place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.nn import Module

from kfac_tn.capture import Fisher
from kfac_tn.columns import Samples
from kfac_tn.curvature.estimator import CurvatureEstimator
from kfac_tn.curvature.intervals import Interval
from kfac_tn.curvature.options import (
    CurvatureOptions,
    OtherCurvature,
    Split,
    check_number,
    overhead_of,
)
from kfac_tn.distributed import ProcessGroup
from kfac_tn.layers import ApproximationChoice, CurvatureChoice, LargeFactors
from kfac_tn.likelihood import Likelihood
from kfac_tn.optim.base import CurvatureUser
from kfac_tn.optim.checkpoints import check_curvature
from kfac_tn.optim.damping_rules import DampingRule, damping_rule_of
from kfac_tn.optim.quadratic import StepRuleName, step_rule_of
from kfac_tn.optim.step_rules import KLClip, Proposal, StepRule, kl_clip_of


class KFACPreconditioner(CurvatureUser):
    """Replaces each layer's gradient by the damped inverse curvature times it.

    Between ``loss.backward()`` and the step of the optimizer one has; parameters without Kronecker
    structure keep their gradient, unless ``other_curvature`` says otherwise. For the curvature, and
    how it follows a model that is changed, see ``KFAC``, whose arguments these are.

    Args:
        model: The model.
        loss_fn: The loss module that the training loop calls.
        step_rule: ``"graft"``: each preconditioned gradient gets the norm that the plain one had,
            so that the optimizer's learning rate stays good. ``"kl_clip"``: shrunk such that
            lr^2 d^T g stays below ``kl_clip``; needs ``lr``. ``"fixed"``: as it is.
        kl_clip: The limit of the rule of that name; None: 1e-3.
        lr: For ``"kl_clip"``: the learning rate of the optimizer; set ``preconditioner.lr`` when it
            changes.
        approximation: See ``KFAC``, as for all that follow.
        curvature: ``"kfac"``, ``"ekfac"``, ``"diagonal"`` or ``"none"``, or by layer.
        max_dim: Dimension above which a factor is only computed in part; None: no limit.
        large_factors: That part: ``"auto"``, ``"blocks"`` or ``"diagonal"``.
        other_curvature: ``"diagonal"``, or None, of the parameters without Kronecker structure.
        fisher: The kind of Fisher.
        mc_samples: Samples for ``fisher="mc"``, or ``"auto"``; see ``KFAC``.
        damping: Added to each block: a number or a function of the step; set
            ``preconditioner.damping`` to change it.
        relative_damping: Whether in units of each block's mean eigenvalue.
        noise_damping: By how much noisy factors are damped more; see ``KFAC``.
        damping_split: ``"pi"`` or ``"exact"``.
        factor_decay: Decay of the factors' moving averages.
        factor_interval: Steps between statistics, or ``"auto"``.
        inverse_interval: Steps between inversions, or ``"auto"``.
        overhead: What a step may cost more with ``"auto"``; None: 0.25.
        seed: Of the samples.
        process_group: The processes that share each batch; call ``step`` once their gradients are
            averaged.

    Raises:
        ValueError: For hyper-parameters out of range, or ``"kl_clip"`` without ``lr``.
        TypeError: For a loss whose likelihood isn't known.

    Example:
        >>> import torch, kfac_tn
        >>> model, loss_fn = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> for _ in range(3):
        ...     sgd.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     good = preconditioner.step()
        ...     sgd.step()
    """

    _other_treatment = "gradient as it is"

    def __init__(
        self,
        model: Module,
        loss_fn: Module | Likelihood,
        *,
        step_rule: StepRuleName | StepRule = "graft",
        kl_clip: float | None = None,
        lr: float | None = None,
        approximation: ApproximationChoice = "expand",
        curvature: CurvatureChoice = "kfac",
        max_dim: int | None = 8192,
        large_factors: LargeFactors = "auto",
        other_curvature: OtherCurvature | None = None,
        fisher: Fisher = "mc",
        mc_samples: Samples = "auto",
        damping: float | Callable[[int], float] | DampingRule = 1e-3,
        relative_damping: bool = True,
        noise_damping: float | None = None,
        damping_split: Split = "pi",
        factor_decay: float = 0.9,
        factor_interval: Interval = 50,
        inverse_interval: Interval = 100,
        overhead: float | None = None,
        seed: int = 0,
        process_group: ProcessGroup = "all",
    ) -> None:
        self._rule = step_rule_of(step_rule, kl_clip_of(kl_clip, step_rule))
        if self._rule.needs_batch:
            raise ValueError("This step rule needs the whole optimizer: use KFAC.")
        self._damping_rule = damping_rule_of(damping)
        if self._damping_rule.needs_batch:
            raise ValueError(
                "The preconditioner doesn't take the steps, so it can't measure them: give a "
                "number or a function of the step as damping, or use KFAC."
            )
        self.lr, self.damping = lr, self._damping_rule.initial
        self._check_options()
        self._model, self._loss_fn = model, loss_fn
        self._options = CurvatureOptions(
            approximation=approximation,
            curvature=curvature,
            max_dim=max_dim,
            large_factors=large_factors,
            other_curvature=other_curvature,
            fisher=fisher,
            mc_samples=mc_samples,
            relative_damping=relative_damping,
            noise_damping=noise_damping,
            damping_split=damping_split,
            factor_decay=factor_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            overhead=overhead_of(overhead, factor_interval, inverse_interval),
            seed=seed,
            process_group=process_group,
        )
        self._prepare()

    def _check_options(self) -> None:
        """Refuse what users set, before it spoils gradients or state.

        Raises:
            ValueError: Naming the option.
        """
        if isinstance(self._rule, KLClip) != (self.lr is not None):
            raise ValueError("step_rule='kl_clip' needs lr, and the other rules take none.")
        check_number("lr", self.lr, "in [0, inf)", None)
        check_number("damping", self.damping, "positive and finite")

    def _prepare(self, covered: Collection[str] = ()) -> None:
        self._estimator = CurvatureEstimator(
            self._model,
            self._loss_fn,
            self._options,
            damping=lambda block: self.damping,
            covered=covered,
        )

    @torch.no_grad()
    def step(self) -> bool:
        """Update the curvature if it is due, and precondition the gradients in place.

        With ``"graft"`` and ``"fixed"`` gradients may still be scaled by ``torch.amp.GradScaler``
        at this point: the map is linear in them. ``"kl_clip"`` measures the step, so call
        ``scaler.unscale_(optimizer)`` before.

        Returns:
            False, with gradients and curvature left as they are, if a gradient isn't finite, or all
            are zero (as of a batch without examples): skip the optimizer's step then, as
            ``torch.amp.GradScaler`` does by itself.

        Raises:
            RuntimeError: If the loss module was never called, or a parameter has another shape than
                before.
            ValueError: If ``lr`` or ``damping`` was set out of range.
        """
        self._check_options()
        self._estimator.check_shapes()
        if not self._estimator.closed and self._estimator.outdated():
            self._estimator.grow()
        # Sparse gradients, of embeddings, are the optimizer's business.
        gradients = {
            p: p.grad
            for p in self._model.parameters()
            if p.grad is not None and not p.grad.is_sparse
        }
        if not gradients or not self._estimator.is_sound([*gradients.values()], ": skip its step."):
            self._estimator.discard()
            return not gradients
        group = {"damping": self.damping}
        self._damping_rule.before_step(self._estimator.steps, [group])
        self.damping = group["damping"]
        self._estimator.cast()
        self._estimator.advance()
        directions = self._estimator.precondition(gradients)
        lrs = dict.fromkeys(gradients, 1.0 if self.lr is None else self.lr)
        self._rule.scale(Proposal(directions, gradients, gradients, lrs, self._estimator))
        for parameter, direction in directions.items():
            gradients[parameter].copy_(direction)
        self._estimator.grow()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and words: ``torch.load(..., weights_only=True)`` reads it."""
        return {**self._estimator.state_dict(), "damping": self.damping}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            ValueError: If the state is of a model with other layers, or of an optimizer, or has
                what isn't finite; nothing is changed then.
        """
        if "damping" not in state_dict:
            raise ValueError("The state has no 'damping': it isn't one of KFACPreconditioner.")
        check_number("damping", state_dict["damping"], "positive and finite")
        check_curvature(state_dict)
        self._estimator.cover(state_dict.get("covered", ()))
        self._estimator.load_state_dict(state_dict)
        self.damping = state_dict["damping"]

    def __getstate__(self) -> dict[str, Any]:
        """All that a copy or a pickle needs; copied with its model, it belongs to that copy."""
        return {**vars(self), "_estimator": self._estimator.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        curvature = state.pop("_estimator")
        vars(self).update(state)
        self._prepare(curvature["covered"])
        self._estimator.adopt(curvature)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n{self.coverage()!r}\n)"
