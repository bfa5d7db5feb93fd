"""Robust inverses of damped factors, batched by size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# A diagonal this small against the largest entry is rounding error of the dtype at hand; each
# further rung adds a hundred times as much.
_JITTER = {torch.float32: 1e-6, torch.float64: 1e-14}

# Elements of a batch: small matrices share launches; large ones, which gain nothing from company,
# don't need their memory at the same time.
_BATCH = 2**20


def damped_inverses(
    factors: Sequence[Tensor], dampings: Sequence[Tensor]
) -> list[tuple[Tensor, bool]]:
    """Invert many ``factor + damping * I``: equal sizes together, one wait for the device in all.

    By Cholesky, which is the fastest at every size (``benchmarks/inverses.py``). Each matrix that
    fails is tried again with a jitter on its diagonal, then in float64, then in float64 with
    jitter. What fails there too (NaN, inf, or far from positive semi-definite) is reported, for the
    caller to keep its last good inverse; its neighbours don't notice.

    Args:
        factors: Symmetric positive semi-definite matrices ``[G, d, d]``, each with its own G, d,
            dtype (float32 or float64) and device.
        dampings: Non-negative, ``[G]`` each, in the units of their factor.

    Returns:
        For each factor its inverses ``[G, d, d]``, and whether all of them are good.

    Example:
        >>> import torch
        >>> factors = [torch.tensor([[[0.0]], [[3.0]]]), torch.full((1, 1, 1), torch.nan)]
        >>> dampings = [torch.ones(2), torch.ones(1)]
        >>> (inverse, good), (_, other_good) = damped_inverses(factors, dampings)
        >>> inverse.flatten(), good, other_good
        (tensor([1.0000, 0.2500]), True, False)
    """
    first: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in _batches(factors):
        shift = torch.cat([dampings[index] for index in batch])
        inverse, good = _cholesky_inverse(torch.cat([factors[index] for index in batch]), shift)
        sizes = [len(factors[index]) for index in batch]
        parts = zip(inverse.split(sizes), good.split(sizes), strict=True)
        first.update(zip(batch, parts, strict=True))
    masks = [first[index][1].all() for index in range(len(factors))]
    all_good = torch.stack([mask.to(masks[0].device) for mask in masks]).tolist() if masks else []
    return [
        (first[index][0], True) if good else _retry(factors[index], dampings[index], *first[index])
        for index, good in enumerate(all_good)
    ]


def _batches(factors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of what is inverted in one call."""
    filled: dict[tuple, tuple[list[int], int]] = {}
    for index, factor in enumerate(factors):
        kind = (factor.shape[-1], factor.dtype, factor.device)
        batch, size = filled.get(kind, ([], 0))
        if batch and size + factor.numel() > _BATCH:
            yield batch
            batch, size = [], 0
        filled[kind] = [*batch, index], size + factor.numel()
    yield from (batch for batch, _ in filled.values())


def _retry(factor: Tensor, damping: Tensor, inverse: Tensor, good: Tensor) -> tuple[Tensor, bool]:
    """Climb the ladder with the matrices that aren't good yet."""
    scale = factor.diagonal(dim1=-2, dim2=-1).mean(-1).abs()
    jitter = _JITTER[factor.dtype]
    for dtype, share in ((factor.dtype, jitter), (torch.float64, 0.0), (torch.float64, jitter)):
        bad = ~good
        shift = (damping[bad] + share * scale[bad]).to(dtype)
        retried, fixed = _cholesky_inverse(factor[bad].to(dtype), shift)
        inverse[bad] = retried.to(factor.dtype)
        good[bad] = fixed & inverse[bad].isfinite().all(-1).all(-1)
        if bool(good.all()):
            return inverse, True
    return inverse, False


def _cholesky_inverse(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of ``matrix + shift * I`` (the matrix is overwritten), and which are good."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    # LAPACK's columns are our rows, of a symmetric matrix: nothing has to be laid out anew, and in
    # place nothing is copied either, which would take as long as the arithmetic.
    root, info = matrix.mT, torch.empty(len(matrix), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(root, out=(root, info))
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    good = (info == 0) & diagonal.isfinite().all(-1)
    # Where it failed, the diagonal may have zeros, at which cholesky_inverse raises.
    diagonal.masked_fill_(~good.unsqueeze(-1), 1)
    torch.cholesky_inverse(root, out=root)
    # Its diagonal is that of L^-T L^-1, squares of all there is: all is finite if that is.
    return matrix, good & diagonal.isfinite().all(-1)
