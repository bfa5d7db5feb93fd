"""Optimizers: KFAC, KFAC as a preconditioner of another's gradients, and the rules they take."""

from kfac_tn.optim.adaptive import Adaptive
from kfac_tn.optim.damping_rules import DampingRule, DampingSchedule, LevenbergMarquardt
from kfac_tn.optim.diagnostics import log_diagnostics, plot_spectra
from kfac_tn.optim.kfac import KFAC
from kfac_tn.optim.preconditioner import KFACPreconditioner
from kfac_tn.optim.quadratic import QuadraticModel
from kfac_tn.optim.step_rules import Fixed, Graft, KLClip, StepRule

__all__ = [
    "KFAC",
    "Adaptive",
    "DampingRule",
    "DampingSchedule",
    "Fixed",
    "Graft",
    "KFACPreconditioner",
    "KLClip",
    "LevenbergMarquardt",
    "QuadraticModel",
    "StepRule",
    "log_diagnostics",
    "plot_spectra",
]
