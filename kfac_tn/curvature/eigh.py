"""Eigendecompositions of Kronecker factors, which often have a low rank.

A factor that is the average of N outer products has rank N at most: with a batch or few images,
much less than its dimension d. Then all that differs from zero is found in a sketch A Omega with a
few random columns (Halko, Martinsson & Tropp 2011, Section 4.1), and the rest of the basis by
reflections: O(d^2 r) operations, most of them in products of matrices, instead of O(d^3), half of
them in products of vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 512
"""Dimension from which on a try, at a few percent of the time of what it may save, is worth it."""

SHARE = 8
"""What part of its dimension a low rank is, at the most."""

TRACE = 8
"""What may be lost of the trace at first, in units of its rounding error."""

TOLERANCE = 2
"""What may be lost of the matrix, in norm, in units of the largest eigenvalue's rounding error and
the root of the dimension: a third of what `eigh` loses by rounding."""


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of positive semi-definite matrices, in float64 if need be.

    Rounding makes the smallest eigenvalues of a semi-definite matrix negative; they are zero here.
    Half precision, for which there is no algorithm, is decomposed in float32.

    Args:
        matrix: ``[G, d, d]``.

    Returns:
        Eigenvalues ``[G, d]``, ascending, and eigenvectors ``[G, d, d]`` in columns.

    Example:
        >>> import torch
        >>> values, vectors = eigh(torch.diag(torch.tensor([2.0, 1.0]))[None])
        >>> values
        tensor([[1., 2.]])
    """
    accurate = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    try:
        values, vectors = _of_low_rank(accurate) or torch.linalg.eigh(accurate)
        if not bool(values.isfinite().all() & vectors.isfinite().all()):
            raise torch.linalg.LinAlgError("not finite")
    except torch.linalg.LinAlgError:  # it didn't converge
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype).clamp(min=0), vectors.to(matrix.dtype)


def _of_low_rank(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same from a sketch; None where it doesn't hold all of the matrices, up to rounding."""
    groups, size, _ = matrix.shape
    rank = size // SHARE
    if size < LEAST or not bool(matrix.isfinite().all()):
        return None
    generator = torch.Generator(matrix.device).manual_seed(0)  # the same each time, nobody else's
    columns = torch.randn(size, rank, generator=generator, dtype=matrix.dtype, device=matrix.device)
    inside = torch.linalg.qr(matrix @ columns)[0]
    sketch = matrix @ inside
    whole, held = (
        each.diagonal(dim1=-2, dim2=-1).double().sum(-1) for each in (matrix, inside.mT @ sketch)
    )
    eps = torch.finfo(matrix.dtype).eps
    if not bool(((whole - held).abs() <= TRACE * eps * whole).all()):
        return None
    # What is lost of the trace is the square of how far off the vectors are. So once more (4.4),
    # and what is lost of the matrix itself decides.
    inside = torch.linalg.qr(sketch)[0]
    image = matrix @ inside
    values, rotation = torch.linalg.eigh(inside.mT @ image)
    lost = torch.linalg.matrix_norm(matrix - inside @ image.mT)
    if not bool((lost <= TOLERANCE * size**0.5 * eps * values[..., -1]).all()):
        return None
    vectors = torch.linalg.qr(sketch, mode="complete")[0]  # the same ones, and all others
    outside = vectors[..., rank:]
    zeros = values.new_zeros(groups, size - rank)
    return torch.cat([zeros, values], -1), torch.cat([outside, vectors[..., :rank] @ rotation], -1)
