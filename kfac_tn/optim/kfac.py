"""KFAC as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Module, Parameter

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
from kfac_tn.optim.adam import (
    adam_updates,
    cast_moments,
    current_updates,
    freshened,
    lengthened,
    with_longer_averages,
)
from kfac_tn.optim.checkpoints import Checkpoints
from kfac_tn.optim.damping_rules import DampingRule, damping_rule_of, reduction_ratio
from kfac_tn.optim.groups import default_groups
from kfac_tn.optim.quadratic import StepRuleName, step_rule_of
from kfac_tn.optim.recording import without_batch
from kfac_tn.optim.replay import Replay
from kfac_tn.optim.step_rules import Proposal, StepRule, TrustRegion, kl_clip_of, moderate


class KFAC(Checkpoints):
    r"""Kronecker-factored approximate curvature: a drop-in optimizer for any model.

    Every step t, for each parameter with gradient g:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        n_t &= (1 - \nu) \frac{m_t}{1 - \beta_1^t} + \nu g, \quad
        d_t = \hat B^{-1} n_t \hat A^{-1}
        \quad \text{(weight and bias of a layer as one matrix)} \\
        \theta_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, \theta_{t-1}
        - \text{lr} \, s_t d_t

    with A and B the moving averages of the layer's Kronecker factors, hats for damping, nu and s
    of the ``step_rule``. By default nu is 0.2, and steps go as far as the quadratic model of the
    loss promises progress, its curvature measured along d, but within a trust region of the norm
    of 4 u; as training goes on, beta1 grows such that m reaches back over a fifth of all steps (of
    a parameter that is used in some only: of these), and begins anew where steps go uphill (see
    ``kfac_tn.optim.Adaptive``). Other parameters take Adam's step u. Statistics are renewed every
    ``factor_interval`` steps and inverses every ``inverse_interval`` (more often at the beginning:
    whenever a quarter more steps have been taken), by extra backward passes that start when
    ``backward()`` reaches the loss; other steps cost two matrix products per layer more than
    Adam's.

    Layers that are pruned, reparametrized or given another ``forward``, or whose weight is used
    without calling the layer, lose their curvature, and frozen ones that are unfrozen get one: with
    the next statistics, since other steps don't look at the model. Until then, up to
    ``factor_interval`` steps, a layer is trained with the curvature that it had.

    Hooks of your own on activations (``register_hook``, ``retain_grad``, full backward hooks) see
    the extra passes too: autograd has no way to leave them out. Parameters' gradients don't.

    A step whose gradient isn't finite, or all zeros (as of an empty batch, or one whose targets are
    all ignored), changes nothing but the counter of warnings. Checkpoints
    (``state_dict``) hold tensors, numbers and words only; a run continues from one bit for bit.

    Args:
        model: The model; every parameter that requires a gradient is trained.
        loss_fn: The loss module that the training loop calls (``CrossEntropyLoss``, ``NLLLoss``,
            ``MSELoss``, ``BCEWithLogitsLoss``, ``PoissonNLLLoss``, or one with the
            ``kfac_tn.likelihood.Likelihood`` protocol). With
            a functional loss, give its module here and call ``observe(outputs, targets)``.
        lr: Learning rate, of Adam's size for ``"adaptive"`` and ``"graft"``. Natural-gradient steps
            (``"kl_clip"``, ``"fixed"``) want 0.03 to 0.3. Default: 1e-2; for ``"quadratic"`` 1.
        betas: Decay of the gradient's first and second moments; with ``"adaptive"`` the least of
            the first, in layers with curvature.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled (Loshchilov & Hutter 2019); per step ``lr * weight_decay``.
        approximation: ``"expand"`` or ``"reduce"``, a dict by layer name, or a function of
            (name, module). Reduce takes the first axis for the examples, and two calls of a module
            with equally many examples in one loss for calls on the same examples.
        curvature: ``"kfac"``: B (x) A. ``"ekfac"``: its eigenvectors Q_B (x) Q_A, renewed with the
            inverses, and for eigenvalues the second moments of each example's gradient along them,
            renewed with the statistics (George et al. 2018). ``"diagonal"``: second moments of
            each example's gradients as they are. By layer in the ways of ``approximation``, which
            tells on top of which factors EKFAC is, so both can be chosen. The first axis is that of
            the examples for the latter two, and inputs are kept until the backward pass. Default:
            ``"kfac"``, which costs least. ``"none"``: as if it had no Kronecker structure.
            Embeddings have blocks, too: a small character language model was at test loss 1.496 and
            1.502 after 400 steps (two seeds), with ``"none"`` for its embedding at 1.504 and 1.505.
        max_dim: Dimension above which a factor is computed only in part: inverses cost its cube.
            8192: half a GB with its inverse, below the size of a vocabulary. None: no limit.
        large_factors: That part: ``"blocks"`` along the diagonal, of at most ``max_dim`` rows (and
            2048: each costs its cube), or the ``"diagonal"``; ``"auto"``: blocks of input factors,
            the diagonal of the others (of a vocabulary, where it was as good as the whole; hidden
            layers want blocks).
        other_curvature: Of parameters without Kronecker structure: None (default): they take Adam's
            updates; ``"diagonal"``: squares of the samples' gradients, averaged, estimate the
            Fisher's diagonal, and they take part in the step rule; for ``"mc"`` and ``"type-2"``.
        fisher: ``"mc"``, ``"type-2"`` (exact, wants the examples on an axis of their own; right on
            average where the model mixes them, as batch normalization does), ``"empirical"`` (the
            gradients of your own pass, penalties on activations included) or ``"forward-only"``
            (KFAC alone).
        mc_samples: Samples of the targets for ``"mc"`` (else a number is refused), each a backward
            pass. ``"auto"``: as many as give B of one batch full rank, at most 4: more than one for
            layers with more outputs than the batch has examples (and positions), small heads aside.
        damping: Added to each block B (x) A: a number, a function of the number of steps taken, or
            a rule of ``kfac_tn.optim``, such as ``LevenbergMarquardt()``. Acts on the
            option of that name of the parameter groups that have none of their own.
        relative_damping: Whether the damping is in units of each block's mean eigenvalue
            tr(A) tr(B) / (d_in d_out), so that one value serves layers and losses of every scale,
            or absolute.
        noise_damping: By how much factors that are averages of few vectors are damped more: A and B
            each by sqrt(1 + noise_damping (d / N)^2), of dimension d and N vectors in the average.
            Eigenvalues that are too small, for want of data alone, would make steps too large.
            0: not at all. None: 10 (see ``benchmarks/results/noise_damping``). Only layers with
            ``curvature="kfac"`` and ``damping_split="pi"``; without any, a number is refused.
        damping_split: ``"pi"``: divided between the factors (Martens & Grosse 2015, Section 6.3);
            ``"exact"``: added to B (x) A, at several times the cost of inverses and products.
            EKFAC and diagonals add it to their eigenvalues.
        factor_decay: Decay of the moving averages of A and B, by update; their start is corrected.
        factor_interval: Steps between updates of A and B, or ``"auto"``: as many as keep a step's
            cost below ``overhead``, by counting operations (``kfac_tn.curvature.intervals``).
        inverse_interval: Steps between inversions, or ``"auto"``.
        overhead: What a step may cost more than the model's own passes. None: 0.25. Only with
            ``"auto"``; without any, a number is refused.
        step_rule: ``"adaptive"``; ``"graft"``: s = |u| / |d|; ``"kl_clip"``: d, shrunk such that
            lr^2 d^T m stays below ``kl_clip`` (over all layers together); ``"fixed"``: s = 1;
            ``"quadratic"``: s and momentum from the exact GGN. Or a rule of ``kfac_tn.optim``.
        kl_clip: The limit of the rule of that name. None: 1e-3. With another, a number is refused.
        trust_region: Limit on lr^2 d^T F d, above which steps are shrunk; by default none.
        other_lr: Learning rate of the parameters without Kronecker structure, in a parameter group
            of their own; by default ``lr`` for ``"adaptive"`` and ``"graft"``, else 1e-3.
        params: Parameter groups with options of their own (``lr``, ``betas``, ``eps``,
            ``weight_decay``, ``damping``), as in ``torch.optim``; together they hold every
            trainable parameter. By default one group, or two with ``other_lr``.
        seed: Of the samples of ``"mc"``; the global random state isn't touched.
        process_group: The processes of ``torch.distributed`` that share each batch and average
            their gradients: statistics and measurements are averaged over them, so that all take
            the same step. ``"all"`` (default) there are, a group, or None: each trains for itself.

    Raises:
        ValueError: For hyper-parameters out of range, parameter groups that miss a trainable
            parameter or have a foreign one.
        TypeError: For a loss whose likelihood isn't known.

    Example:
        >>> import torch, kfac_tn
        >>> model, loss_fn = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> optimizer = kfac_tn.KFAC(model, loss_fn)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = loss_fn(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
    """

    _other_treatment = "Adam"

    def __init__(
        self,
        model: Module,
        loss_fn: Module | Likelihood,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
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
        step_rule: StepRuleName | StepRule = "adaptive",
        kl_clip: float | None = None,
        trust_region: float | None = None,
        other_lr: float | None = None,
        params: Iterable[dict[str, Any]] | None = None,
        seed: int = 0,
        process_group: ProcessGroup = "all",
    ) -> None:
        self._rule = step_rule_of(step_rule, kl_clip_of(kl_clip, step_rule))
        self._damping_rule = damping_rule_of(damping)
        self._trust_region = None if trust_region is None else TrustRegion(trust_region)
        if other_lr is not None and params is not None:
            raise ValueError("other_lr and params exclude each other: set lr in the groups.")
        check_number("other_lr", other_lr, "in [0, inf)", None)
        group_lr = other_lr  # others with curvature of their own need none
        other_lr = 1e-3 if other_lr is None and self._rule.natural else other_lr
        self._model, self._loss_fn, self._other_lr = model, loss_fn, other_lr
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
        defaults = {
            "lr": self._rule.lr if lr is None else lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": self._damping_rule.initial,
        }
        if params is None:
            params = default_groups(model, group_lr if other_curvature else other_lr, curvature)
        super().__init__(params, defaults)
        self._prepare()

    def _prepare(self, covered: Collection[str] = ()) -> None:
        """Start to watch the model; of what is frozen, these parameters have a place, too."""
        self._index_groups()
        self._estimator = CurvatureEstimator(
            self._model,
            self._loss_fn,
            self._options,
            damping=lambda block: self.param_groups[self._group(block)]["damping"],
            group=self._group,
            covered=covered,
        )
        if self._damping_rule.needs_batch or self._rule.needs_batch:
            required = self._damping_rule.needs_batch or not self._rule.without_batch
            try:
                self._replay = Replay.where_possible(
                    self._model, self._loss_fn, required, self._estimator.processes
                )
            except ValueError:
                self.close()
                raise
        self._arm_replay()

    # The user's side ---------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Computes the loss anew, with its backward pass, and returns it; optional.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: If the loss module was never called, a gradient is sparse, or a parameter
                has another shape than before. Also what the model raises when it is called once
                more, for a measurement (where memory runs out, say): the parameters are as before
                then, but the gradient is in the averages, and the step counts.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._estimator.check_shapes()
        if not self._estimator.closed and self._estimator.outdated():
            self._grow()
        gradients = self._gradients()
        if not gradients:
            self._discard()
            return loss
        if self._estimator.cast():
            cast_moments(self.state)
        taken = self._estimator.steps
        self._damping_rule.before_step(taken, self._following_groups())
        recorded = self._replay is not None and self._replay.armed and self._replay.check()
        measured = self._damping_rule.wants_ratio(taken)
        before = {p: p.clone() for p in gradients} if measured else None
        self._estimator.advance()
        if taken and not all(self.state[p] for p in gradients):
            self._rule.join(taken)
        moments, updates = adam_updates(
            self._averaging(taken),
            self.state,
            gradients,
            corrected=not self._rule.any_length,
        )
        lrs = self._lrs(updates)
        fresh = 1.0 if self._rule.own_momentum else self._rule.at_once(taken)
        slopes = gradients
        if fresh != 1:
            room = self._estimator.room(list(moments))
            slopes = freshened(moments, gradients, fresh, room)
        replay = self._replay if recorded and self._rule.wants_batch(taken) else None
        if replay is None and self._rule.wants_batch(taken) and not self._estimator.closed:
            self._estimator.warn(without_batch(self._rule.without_batch))
        factors = self._direct(slopes, updates, lrs, gradients, replay)
        self._apply(updates, factors)
        if before is not None and self._replay is not None:
            factor = self._rule.factor
            ratio = reduction_ratio(
                self._replay, self._estimator, gradients, before, closure, factor
            )
            self._damping_rule.after_step(ratio, self._following_groups())
        self._arm_replay()
        self._grow()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, and with them what was seen of the passes that made them.

        So a step that ``torch.amp.GradScaler`` skips leaves no trace. Call it anywhere in the loop
        but between ``observe`` and ``backward()``.
        """
        super().zero_grad(set_to_none)
        # New hooks wouldn't know of calls whose loss is still to come: the step takes up changes.
        waiting = self._estimator.capture.called
        self._estimator.discard()
        if self._replay is not None:
            self._replay.discard_gradients()
        if not waiting:
            self._grow()

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.coverage()!r}"

    # The parts of a step -----------------------------------------------------------------------

    def _discard(self) -> None:
        """Forget what was seen since the last step."""
        self._estimator.discard()
        if self._replay is not None:
            self._replay.discard()

    def _arm_replay(self) -> None:
        if self._replay is not None:
            self._replay.discard()
            wanting = self._damping_rule.wants_ratio, self._rule.wants_batch
            self._replay.armed = any(wants(self._estimator.steps) for wants in wanting)

    def _averaging(self, step: int) -> list[Mapping[str, Any]]:
        """Parameter groups with the betas of a step, counted from 0."""
        reach, horizon = self._rule.reach(step), self._rule.horizon
        return with_longer_averages(self.param_groups, self._estimator.layer_of, reach, horizon)

    def _direct(
        self,
        slopes: dict[Parameter, Tensor],
        updates: dict[Parameter, Tensor],
        lrs: dict[Parameter, float],
        current: dict[Parameter, Tensor] | None = None,
        replay: Replay | None = None,
    ) -> dict[Parameter, Tensor]:
        """Replace Adam's updates by KFAC's wherever there is curvature.

        Returns:
            What some of them have still to be multiplied with.
        """
        estimator = self._estimator
        reach = self._rule.reach(estimator.steps - 1)
        proposal = Proposal(
            directions=estimator.precondition(slopes),
            gradients=slopes,
            references=updates,
            lrs=lrs,
            estimator=estimator,
            states=self.state,
            replay=replay,
            waiting=[] if self._rule.may_wait else None,
            current=current,
            reaches=lengthened(
                self.param_groups, self.state, estimator.layer_of, reach, self._rule.horizon
            ),
        )
        directions = proposal.directions
        if self._trust_region is None:
            self._rule.scale(proposal)
        else:
            self._trust_region.scale(proposal, self._rule)
        if self._other_lr is not None and len(directions) < len(updates):
            own = self._options.other_curvature is None
            others = {other.parameter for other in self._estimator.others if own}
            moderate(updates, updates.keys() - directions.keys() - others, lrs, self._other_lr)
        updates.update(directions)
        return proposal.factors()

    def _last_steps(self) -> dict[Parameter, Tensor]:
        gradients = {p: p.grad for p in self._group_of if p.grad is not None}
        last = self._estimator.steps - 1
        fresh = self._rule.at_once(last)  # of gradients, which may be gone by now
        taken = [p for p in (gradients if fresh else self._group_of) if self.state[p]]
        groups = self._averaging(last)
        moments, updates = current_updates(groups, self.state, set(taken))
        lrs = self._lrs(updates)
        if self._rule.own_momentum:
            updates |= {p: s["previous"] for p in taken if "previous" in (s := self.state[p])}
        else:
            slopes = freshened(moments, gradients, fresh)
            for p, factor in self._direct(slopes, updates, lrs).items():
                updates[p].mul_(factor)
        return {p: -lrs[p] * update for p, update in updates.items()}
