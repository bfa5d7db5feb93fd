"""The scale of the empirical Fisher."""

from __future__ import annotations

from torch import Tensor

from kfac_tn.likelihood.natural_parameters import ElementwiseLikelihood
from kfac_tn.likelihood.protocol import Likelihood


def empirical_factor(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor | int:
    """What makes ``sum_n g_n g_n^T`` the empirical Fisher, ``g_n`` on account of example ``n``.

    The number of terms under a mean. But all elements of an example that an elementwise loss
    averages are one term here, so that it is the mean over examples of the outer product of the
    gradient that each would have alone.

    Args:
        likelihood: That of the loss.
        outputs: The model's predictions.
        targets: As the loss takes them.

    Returns:
        The factor; 1 if nothing is averaged.

    Example:
        >>> import torch
        >>> from kfac_tn.likelihood import likelihood_of
        >>> outputs, likelihood = torch.zeros(4, 3), likelihood_of(torch.nn.MSELoss())
        >>> likelihood.num_terms(outputs, outputs), empirical_factor(likelihood, outputs, outputs)
        (12, 4)
    """
    if isinstance(likelihood, ElementwiseLikelihood) and likelihood.reduction == "mean":
        return len(outputs) if outputs.ndim else 1
    return likelihood.num_terms(outputs, targets)
