"""Losses as likelihoods: the root of a loss's Hessian with respect to the model's outputs.

The generalised Gauss-Newton matrix of a loss is ``sum_n J_n^T H_n J_n``, with ``J_n`` the Jacobian
of the model's outputs on example ``n`` and ``H_n`` the Hessian of the loss with respect to those
outputs. Whatever back-propagates a root ``H_n = sum_v s_nv s_nv^T`` through the model needs the
loss only for its columns ``s_nv``. Here they are made, exactly or as a Monte-Carlo estimate, for
the loss *as the user computes it*: its reduction, class weights and ignored targets included.
"""

from kfac_tn.likelihood.empirical import empirical_factor
from kfac_tn.likelihood.protocol import Likelihood
from kfac_tn.likelihood.registry import likelihood_of, register_likelihood
from kfac_tn.likelihood.torch_losses import (
    BCEWithLogitsLikelihood,
    CrossEntropyLikelihood,
    MSELikelihood,
    NLLLikelihood,
    PoissonNLLLikelihood,
)

__all__ = [
    "BCEWithLogitsLikelihood",
    "CrossEntropyLikelihood",
    "Likelihood",
    "MSELikelihood",
    "NLLLikelihood",
    "PoissonNLLLikelihood",
    "empirical_factor",
    "likelihood_of",
    "register_likelihood",
]
