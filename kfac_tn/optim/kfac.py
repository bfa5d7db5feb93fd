"""KFAC as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, get_args, overload

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from kfac_tn.capture import Factors, Fisher
from kfac_tn.curvature.estimator import CurvatureEstimator, all_finite
from kfac_tn.layers import ApproximationChoice
from kfac_tn.likelihood import Likelihood
from kfac_tn.optim.coverage import Coverage, coverage
from kfac_tn.optim.step_rules import StepRule, clip_kl, graft


class KFAC(Optimizer):
    r"""Kronecker-factored approximate curvature: a drop-in optimizer for any model.

    Every step t, for each parameter with gradient g:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        d_t &= \hat B^{-1} \frac{m_t}{1 - \beta_1^t} \hat A^{-1}
        \quad \text{(weight and bias of a layer as one matrix)} \\
        \theta_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \, \theta_{t-1}
        - \text{lr} \frac{\lVert u_t \rVert}{\lVert d_t \rVert} d_t

    with A and B the moving averages of the layer's Kronecker factors and hats for damping
    (``step_rule="graft"``: the direction of KFAC with the step size of Adam, whose learning rates
    transfer). Parameters without Kronecker structure take Adam's step u. Statistics are renewed
    every ``factor_interval`` steps and inverses every ``inverse_interval`` (more often at the
    beginning: whenever a quarter more steps have been taken), by extra backward passes that start
    when ``backward()`` reaches the loss; other steps cost two matrix products per layer more than
    Adam's.

    Hooks of your own on activations (``register_hook``, ``retain_grad``, full backward hooks) see
    the extra passes too: autograd has no way to leave them out. Parameters' gradients don't.

    A step whose gradient isn't finite changes nothing but the counter of warnings. Checkpoints
    (``state_dict``) hold tensors and plain numbers only; a run continues from one bit for bit.

    Args:
        model: The model; every parameter that requires a gradient is trained.
        loss_fn: The loss module that the training loop calls (``CrossEntropyLoss``, ``MSELoss``,
            ``BCEWithLogitsLoss`` or one with the ``kfac_tn.likelihood.Likelihood`` protocol). With
            a functional loss, give its module here and call ``observe(outputs, targets)``.
        lr: Learning rate, of Adam's size for ``"graft"``. Natural-gradient steps (the other two
            rules) want larger ones, such as 0.03 to 0.3.
        betas: Decay of the gradient's first and second moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled (Loshchilov & Hutter 2019); per step ``lr * weight_decay``.
        approximation: ``"expand"`` or ``"reduce"``, a dict by layer name, or a function of
            (name, module). Reduce takes the first axis for the examples, and two calls of a module
            with equally many examples in one loss for calls on the same examples.
        fisher: ``"mc"``, ``"type-2"``, ``"empirical"`` or ``"forward-only"``.
        mc_samples: Samples of the targets for ``"mc"``.
        damping: Added to each block B (x) A, divided between its factors (Martens & Grosse 2015,
            Section 6.3).
        relative_damping: Whether the damping is in units of each block's mean eigenvalue
            tr(A) tr(B) / (d_in d_out), so that one value serves layers and losses of every scale,
            or absolute.
        factor_decay: Decay of the moving averages of A and B, by update; their start is corrected.
        factor_interval: Steps between updates of A and B.
        inverse_interval: Steps between inversions.
        step_rule: ``"graft"``; ``"kl_clip"``: d, shrunk such that lr^2 d^T m stays below
            ``kl_clip`` (over all layers together); ``"fixed"``: d as it is.
        kl_clip: The limit of the rule of that name.
        other_lr: Learning rate of the parameters without Kronecker structure, in a parameter group
            of their own; by default ``lr`` for ``"graft"``, else 1e-3.
        params: Parameter groups with options of their own (``lr``, ``betas``, ``eps``,
            ``weight_decay``), as in ``torch.optim``; together they hold every trainable parameter.
            By default one group, or two with ``other_lr``.
        seed: Of the samples of ``"mc"``; the global random state isn't touched.

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

    def __init__(
        self,
        model: Module,
        loss_fn: Module | Likelihood,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        approximation: ApproximationChoice = "expand",
        fisher: Fisher = "mc",
        mc_samples: int = 1,
        damping: float = 1e-3,
        relative_damping: bool = True,
        factor_decay: float = 0.9,
        factor_interval: int = 20,
        inverse_interval: int = 100,
        step_rule: StepRule = "graft",
        kl_clip: float = 1e-3,
        other_lr: float | None = None,
        params: Iterable[dict[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        if step_rule not in get_args(StepRule):
            raise ValueError(f"step_rule is {step_rule!r}: choose one of {get_args(StepRule)}.")
        if not kl_clip > 0:
            raise ValueError(f"kl_clip is {kl_clip}: it must be positive.")
        if other_lr is not None and params is not None:
            raise ValueError("other_lr and params exclude each other: set lr in the groups.")
        estimator = CurvatureEstimator(
            model,
            loss_fn,
            approximation=approximation,
            fisher=fisher,
            mc_samples=mc_samples,
            damping=damping,
            relative_damping=relative_damping,
            decay=factor_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            seed=seed,
        )
        self._model = model
        self._step_rule, self._kl_clip = step_rule, kl_clip
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        if params is None:
            if other_lr is None and step_rule != "graft":
                other_lr = 1e-3
            params = _default_groups(estimator, other_lr)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._closed_groups = False
        try:
            super().__init__(params, defaults)
            self._check_complete()
        except Exception:
            estimator.capture.close()
            raise
        self._closed_groups = True
        self._estimator = estimator

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
            RuntimeError: If the loss module was never called, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        for parameter, gradient in gradients.items():
            if gradient.is_sparse:
                raise RuntimeError(
                    f"The gradient of '{self._names[parameter]}' is sparse, which KFAC can't use: "
                    "build its module with sparse=False."
                )
        for parameter, name in self._names.items():
            if parameter.grad is not None and parameter not in self._trained:
                self._estimator.warn(
                    f"Parameter '{name}' was frozen when KFAC was made and isn't trained now: make "
                    "a new optimizer."
                )
        if not gradients:
            self._estimator.capture.discard()
            return loss
        if not all_finite(list(gradients.values())):
            self._estimator.capture.discard()
            self._estimator.warn("A gradient isn't finite (NaN or inf); its steps are left out.")
            return loss
        self._estimator.advance()
        moments, updates = self._adam(gradients)
        directions = self._estimator.precondition(moments)
        self._scale(directions, moments, updates)
        updates.update(directions)
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p in updates]
            if not chosen:
                continue
            lr = float(group["lr"])
            if group["weight_decay"]:
                torch._foreach_mul_(chosen, 1 - lr * group["weight_decay"])
            torch._foreach_add_(chosen, [updates[p] for p in chosen], alpha=-lr)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, and with them what was seen of the passes that made them.

        So a step that ``torch.amp.GradScaler`` skips leaves no trace. Call it before the model, or
        right before ``backward()``; not between ``observe`` and ``backward()``.
        """
        super().zero_grad(set_to_none)
        self._estimator.capture.discard()

    def observe(self, outputs: Tensor, targets: Tensor, weight: float = 1.0) -> None:
        """Show a loss that isn't computed by the loss module: after the model, before the step.

        Args:
            outputs: What the model returned, with its graph.
            targets: What the loss compares them with.
            weight: Factor of this loss in the objective, relative to other calls before the step.

        Raises:
            ValueError: If the loss has ``reduction="none"``.
        """
        self._estimator.capture.observe(outputs, targets, weight)

    def coverage(self) -> Coverage:
        """How each parameter is treated and why; prints as a table."""
        estimator = self._estimator
        return coverage(self._model, estimator.blocks, estimator.others, "Adam")

    def factors(self) -> dict[str, Factors]:
        """The moving averages of the Kronecker factors, by layer name; don't modify them."""
        return self._estimator.factors()

    def close(self) -> None:
        """Remove the hooks from model and loss; later steps keep the curvature they have."""
        self._estimator.capture.close()

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.coverage()!r}"

    # Checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of every parameter, the groups, and under ``"curvature"`` the factors.

        Tensors and plain numbers only: ``torch.load(..., weights_only=True)`` reads it.
        """
        return {**super().state_dict(), "curvature": self._estimator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; hyper-parameters of the groups included.

        Raises:
            ValueError: If the state is another optimizer's or another model's; nothing is changed
                then.
        """
        if "curvature" not in state_dict:
            raise ValueError("The state has no 'curvature': it isn't one of KFAC.")
        curvature = state_dict["curvature"]
        self._estimator.check_state_dict(curvature)
        mine, saved = (
            [p for group in groups for p in group["params"]]
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        for parameter, index in zip(mine, saved, strict=False):  # torch compares the lengths
            moment = state_dict["state"].get(index, {}).get("exp_avg", parameter)
            if moment.shape != parameter.shape:
                raise ValueError(
                    f"The state has moments of shape {list(moment.shape)} for parameter "
                    f"'{self._names[parameter]}' of shape {list(parameter.shape)}: it is another "
                    "model's."
                )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvature"})
        self._estimator.load_state_dict(curvature)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "KFAC is tied to its model by hooks and can't be copied or pickled: make a new one for "
            "the copied model and load state_dict() into it."
        )

    # Parameter groups --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only during construction: the groups together hold every trainable parameter.

        Raises:
            ValueError: For a parameter of another model, or options out of range.
            RuntimeError: After construction.
        """
        if self._closed_groups:
            raise RuntimeError(
                "KFAC trains every parameter of its model from the start, so there is none to "
                "add; give groups as KFAC(..., params=[...]), and make a new optimizer when the "
                "model has changed (load_state_dict carries what fits)."
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        unknown = group.keys() - self.defaults.keys() - {"params", "param_names"}
        if unknown:
            raise ValueError(
                f"Parameter groups have no option {sorted(unknown)}: only "
                f"{sorted(self.defaults)} differ between groups."
            )
        for name, low, high in (
            ("lr", 0.0, float("inf")),
            ("eps", 0.0, float("inf")),
            ("weight_decay", 0.0, float("inf")),
        ):
            if not low <= group[name] < high:
                raise ValueError(f"{name} is {group[name]}: it must be in [{low}, {high}).")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas are {group['betas']}: two are needed, both in [0, 1).")
        for parameter in group["params"]:
            if parameter not in self._names:
                raise ValueError("A parameter group has a parameter that isn't the model's.")

    def _check_complete(self) -> None:
        self._trained = {p for group in self.param_groups for p in group["params"]}
        missing = [n for p, n in self._names.items() if p.requires_grad and p not in self._trained]
        if missing:
            raise ValueError(
                f"The parameter groups miss trainable parameters {missing}: add them, or freeze "
                "them with requires_grad_(False)."
            )

    # The parts of a step -----------------------------------------------------------------------

    def _adam(
        self, gradients: dict[Parameter, Tensor]
    ) -> tuple[dict[Parameter, Tensor], dict[Parameter, Tensor]]:
        """Update the moments; return the bias-corrected first ones and Adam's updates."""
        moments: dict[Parameter, Tensor] = {}
        updates: dict[Parameter, Tensor] = {}
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p in gradients]
            if not chosen:
                continue
            for p in chosen:
                if not self.state[p]:
                    self.state[p]["step"] = torch.zeros(())  # on the CPU: read without a sync
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            states = [self.state[p] for p in chosen]
            grads = [gradients[p] for p in chosen]
            first = [state["exp_avg"] for state in states]
            second = [state["exp_avg_sq"] for state in states]
            beta1, beta2 = group["betas"]
            torch._foreach_add_([state["step"] for state in states], 1)
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            steps = [int(state["step"]) for state in states]
            corrected = torch._foreach_div(first, [1 - beta1**step for step in steps])
            roots = torch._foreach_sqrt(second)
            torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
            torch._foreach_add_(roots, group["eps"])
            moments.update(zip(chosen, corrected, strict=True))
            updates.update(zip(chosen, torch._foreach_div(corrected, roots), strict=True))
        return moments, updates

    def _scale(
        self,
        directions: dict[Parameter, Tensor],
        moments: dict[Parameter, Tensor],
        updates: dict[Parameter, Tensor],
    ) -> None:
        """Apply the step rule to the directions, in place."""
        values = list(directions.values())
        if self._step_rule == "graft":
            graft(values, [updates[p] for p in directions])
        elif self._step_rule == "kl_clip":
            lrs = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
            gradients = [moments[p] for p in directions]
            clip_kl(values, gradients, [lrs[p] for p in directions], self._kl_clip)


def _default_groups(estimator: CurvatureEstimator, other_lr: float | None) -> list[dict[str, Any]]:
    """All in one group, or the parameters without Kronecker structure in one of their own."""
    layers = [p for block in estimator.blocks for p in block.parameters.values()]
    others = [other.parameter for other in estimator.others]
    if other_lr is None or not others:
        return [{"params": [*layers, *others]}]
    groups: list[dict[str, Any]] = [{"params": layers}] if layers else []
    return [*groups, {"params": others, "lr": other_lr}]
