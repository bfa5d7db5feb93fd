"""Optimizers: KFAC, and KFAC as a preconditioner of another optimizer's gradients."""

from kfac_tn.optim.kfac import KFAC
from kfac_tn.optim.preconditioner import KFACPreconditioner

__all__ = ["KFAC", "KFACPreconditioner"]
