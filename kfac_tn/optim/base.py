"""What the optimizer and the preconditioner have in common: a model, and its curvature."""

from __future__ import annotations

from typing import ClassVar, NoReturn

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn.curvature.estimator import CurvatureEstimator
from kfac_tn.factors import Factors
from kfac_tn.optim.coverage import Coverage, coverage
from kfac_tn.optim.diagnostics import Diagnostics, diagnose
from kfac_tn.optim.replay import Replay


class CurvatureUser:
    """Shows the curvature of a training run, and follows losses that no module computes."""

    _model: Module
    _estimator: CurvatureEstimator
    _replay: Replay | None = None
    _other_treatment: ClassVar[str]  # of parameters without Kronecker structure

    def observe(self, outputs: Tensor, targets: Tensor, weight: float = 1.0) -> None:
        """Show a loss that isn't computed by the loss module: after the model, before the step.

        Rules that compute the loss once more do so by the loss module. How far steps go by default
        is measured where the gradient turns out to be that of this loss, times the weight;
        elsewhere (of a penalty, too, or a surrogate as of policy gradients) steps are grafted.

        Args:
            outputs: What the model returned, or elements of it, with its graph.
            targets: What the loss compares them with.
            weight: Factor of this loss in the objective.

        Raises:
            ValueError: If the loss has ``reduction="none"``, for outputs without a graph, or a
                weight that isn't in [0, inf).
        """
        self._estimator.capture.observe(outputs, targets, weight)
        if self._replay is not None:
            self._replay.observe(outputs, targets, weight)

    def coverage(self) -> Coverage:
        """How each parameter is treated and why; prints as a table."""
        estimator = self._estimator
        treatment = estimator.options.other_curvature or self._other_treatment
        return coverage(self._model, estimator.blocks, estimator.others, treatment)

    def factors(self) -> dict[str, Factors]:
        """The moving averages of the Kronecker factors, by layer name; don't modify them."""
        return self._estimator.factors()

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """What curvature and steps look like now, by layer; prints as a table.

        Costs nothing in training. The last step is computed anew, from the moments, with the
        learning rate as it is now. See ``kfac_tn.optim.diagnostics`` for the numbers, for
        ``log_diagnostics``, which writes them to TensorBoard, and for ``plot_spectra``.
        """
        return diagnose(self._estimator, self._last_steps())

    @property
    def steps_taken(self) -> int:
        """Steps that weren't left out."""
        return self._estimator.steps

    def _last_steps(self) -> dict[Parameter, Tensor] | None:
        return None

    def close(self) -> None:
        """Remove the hooks from model and loss; later steps keep the curvature they have."""
        self._estimator.close()
        if self._replay is not None:
            self._replay.close()

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"A shallow copy of {type(self).__name__} would watch the same model twice: use "
            "copy.deepcopy, which copies the model too, or state_dict()."
        )
