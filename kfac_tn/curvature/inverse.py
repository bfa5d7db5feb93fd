"""Robust inverses of damped factors, batched over factors of one size."""

from __future__ import annotations

import torch
from torch import Tensor

# A diagonal this small against the largest entry is rounding error of the dtype at hand; each
# further rung adds a hundred times as much.
_JITTER = {torch.float32: 1e-6, torch.float64: 1e-14}


def damped_inverse(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Invert ``factor + damping * I`` by Cholesky, with a ladder of fallbacks.

    Each matrix that fails is tried again with a jitter on its diagonal, then in float64, then in
    float64 with jitter. What fails there too (NaN, inf, or far from positive semi-definite) is
    reported, for the caller to keep its last good inverse.

    Args:
        factor: Symmetric positive semi-definite matrices ``[batch, d, d]``.
        damping: Non-negative, ``[batch]``, in the units of the factor.

    Returns:
        The inverses ``[batch, d, d]`` and a mask ``[batch]``, true where they are good.

    Example:
        >>> import torch
        >>> inverse, good = damped_inverse(torch.ones(1, 1, 1), torch.tensor([1.0]))
        >>> inverse, good
        (tensor([[[0.5000]]]), tensor([True]))
    """
    inverse, good = _cholesky_inverse(_shifted(factor, damping))
    if bool(good.all()):
        return inverse, good
    size = factor.diagonal(dim1=-2, dim2=-1).mean(-1).abs()
    for dtype, jitter in (
        (factor.dtype, _JITTER[factor.dtype]),
        (torch.float64, 0.0),
        (torch.float64, _JITTER[factor.dtype]),
    ):
        bad = ~good
        shift = (damping[bad] + jitter * size[bad]).to(dtype)
        retried, fixed = _cholesky_inverse(_shifted(factor[bad].to(dtype), shift))
        inverse[bad] = retried.to(factor.dtype)
        good[bad] = fixed & retried.to(factor.dtype).isfinite().all(-1).all(-1)
        if bool(good.all()):
            break
    return inverse, good


def _shifted(factor: Tensor, damping: Tensor) -> Tensor:
    shifted = factor.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    return shifted


def _cholesky_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    root, info = torch.linalg.cholesky_ex(matrix)
    diagonal = root.diagonal(dim1=-2, dim2=-1)
    good = (info == 0) & diagonal.isfinite().all(-1)
    # Where it failed, the diagonal may have zeros, at which cholesky_inverse raises.
    diagonal.masked_fill_(~good.unsqueeze(-1), 1)
    inverse = torch.cholesky_inverse(root)
    return inverse, good & inverse.isfinite().all(-1).all(-1)
