"""KFAC for PyTorch: second-order training and curvature, convolutions as tensor networks."""

from kfac_tn import functional, likelihood, tn
from kfac_tn.curvature.compute import compute_kfac
from kfac_tn.curvature.curvature import Curvature
from kfac_tn.curvature.diagonal import compute_ggn_diagonal
from kfac_tn.curvature.ekfac import compute_ekfac
from kfac_tn.curvature.per_example import compute_per_example_gradients
from kfac_tn.layers import register_layer
from kfac_tn.likelihood import register_likelihood
from kfac_tn.optim import KFAC, KFACPreconditioner

__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "Curvature",
    "KFACPreconditioner",
    "compute_ekfac",
    "compute_ggn_diagonal",
    "compute_kfac",
    "compute_per_example_gradients",
    "functional",
    "likelihood",
    "register_layer",
    "register_likelihood",
    "tn",
]
