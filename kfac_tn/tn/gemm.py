"""Products of float32 matrices on a CPU: by oneDNN, which is up to twice as fast as torch's BLAS.

torch multiplies matrices with the BLAS that it was built with, mostly MKL, which doesn't use all of
every processor (AVX-512 on AMD's, say). Its convolutions are oneDNN's, and so is a linear layer
that its compiler calls, an operator without a derivative. It is taken for large products of plain
tensors that nobody differentiates, transforms, traces or counts; everything else is `torch.bmm`.
On its maker's own processors MKL is the faster one, by a third, and takes all; on AMD's up to
Zen 4, which gain little by AVX-512, it takes what would have to be copied first.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from kfac_tn.tn.pages import on_huge_pages
from kfac_tn.tn.processor import processor
from kfac_tn.tn.unwatched import unwatched

LEAST_PRODUCT = 5 * 2**18
"""Multiplications for each thread, that are worth the longer call.

Twice as many where the first matrix doesn't lie in rows, and where there are several products.
"""

LEAST_SUM = 64
"""Terms of the sums from which on products are worth being put together: several of one batch, or
what is made apart and what it is added to."""

PROCESSOR = processor()

LEAST_COPY = sys.maxsize if PROCESSOR == "zen4" else 96
"""Rows or columns that each element of a matrix meets, for which the matrix may be copied."""

CACHED = 2**20
"""Elements of a product that are still in a cache when they are put where they belong."""


def _find() -> object:
    """The operator; None where torch has been built without it, or has another in its place.

    It and what `_able` asks are torch's own affairs, which other versions may arrange differently.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    one = torch.ones(1, 1)
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        works = bool(operator(one, one, None, "none", [], "") == one)
        _plain(one)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operator if works else None


def multiply(first: Tensor, second: Tensor) -> Tensor:
    """Multiply batches of matrices, as `torch.bmm`.

    Args:
        first: `[batch, rows, sum]`.
        second: `[batch, sum, columns]`.

    Returns:
        `[batch, rows, columns]`.

    Example:
        >>> multiply(torch.ones(1, 2, 3), torch.ones(1, 3, 1))
        tensor([[[3.],
                 [3.]]])
    """
    if first.shape[2] == 1 and first.dtype is second.dtype:
        return (first * second).contiguous()  # BLAS takes twice as long for outer products
    if torch.compiler.is_compiling() or not takes(first, second) or not _able(first, second):
        return torch.bmm(first, second)
    if len(first) == 1 and first.shape[1] * second.shape[2] <= CACHED:
        return _linear(first[0], _laid_out(second[0]), None, "none", [], "").unsqueeze(0)  # type: ignore[operator]
    result = on_huge_pages(first.new_empty(len(first), first.shape[1], second.shape[2]))
    _put(result, first, second, 0.0)
    return result


def add_product(total: Tensor, first: Tensor, second: Tensor, share: float = 1.0) -> None:
    """Add a product to a multiple of matrices, in place: `share * total + first @ second`.

    Args:
        total: `[batch, rows, columns]`.
        first: `[batch, rows, sum]`.
        second: `[batch, sum, columns]`.
        share: What `total` is multiplied with. 0: whatever is there is forgotten.

    Example:
        >>> total = torch.ones(1, 1, 1)
        >>> add_product(total, torch.ones(1, 1, 3), torch.ones(1, 3, 1), 0.5)
        >>> total
        tensor([[[3.5000]]])
    """
    short = share != 0 and first.shape[2] < LEAST_SUM
    if (
        torch.compiler.is_compiling()
        or short
        or not takes(first, second)
        or not _able(total, first, second)
    ):
        if share == 0:
            total.copy_(torch.bmm(first, second))
        elif not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(total):
            total.mul_(share).add_(torch.bmm(first, second))  # vmap has no rule for the other
        else:
            total.baddbmm_(first, second, beta=share)
    else:
        _put(total, first, second, share)


def _put(total: Tensor, first: Tensor, second: Tensor, share: float) -> None:
    """Put products where they belong, some rows at a time: oneDNN has memory of its own for them.

    If fresh, that costs more than the product of thin matrices; what fits a cache is used again.
    """
    once = first.stride(0) == 0 and not first[0].is_contiguous()
    lefts = [first[0].contiguous()] * len(first) if once else first.unbind()
    rows = max(1, CACHED // total.shape[2])
    dense = _is_dense(second)
    for part, a, weight in zip(total.unbind(), lefts, second.mT.unbind(), strict=True):
        laid_out = weight if dense else weight.contiguous()
        for start in range(0, len(a), rows):
            some, to = (a, part) if rows >= len(a) else (m[start : start + rows] for m in (a, part))
            product = _linear(some, laid_out, None, "none", [], "")  # type: ignore[operator]
            if share == 0:
                to.copy_(product)
            elif share == 1:
                to.add_(product)
            else:
                torch.add(product, to, alpha=share, out=to)


def takes(first: Tensor, second: Tensor) -> bool:
    """Whether oneDNN multiplies matrices of such shapes and layouts, if they are on a CPU."""
    batch, rows, terms = first.shape
    columns, in_rows = second.shape[2], first.stride(2) == 1
    if SUITS_BLAS or first.dtype is not torch.float32:
        return False
    if not worth(batch, rows, terms, columns, in_rows):
        return False
    copied = 1 if first.stride(0) == 0 else batch  # what doesn't lie in rows is copied once
    if not in_rows and columns * batch < LEAST_COPY * copied:
        return False
    return rows >= LEAST_COPY or _is_dense(second)


def worth(batch: int, rows: int, terms: int, columns: int, in_rows: bool = True) -> bool:
    """Whether products of float32 matrices are large enough for oneDNN."""
    least = LEAST_PRODUCT * torch.get_num_threads() * (1 if in_rows else 2)
    if batch == 1:
        return rows * columns * terms >= least
    return rows * columns * terms >= 2 * least and terms >= LEAST_SUM


def _able(*tensors: Tensor) -> bool:
    """Whether an operator can be called that autograd and the likes of it know nothing of."""
    return _linear is not None and _plain(*tensors)


def _plain(*tensors: Tensor) -> bool:
    return (
        unwatched(*tensors)
        and all(t.device.type == "cpu" and t.dtype is torch.float32 for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
    )


def _laid_out(second: Tensor) -> Tensor:
    """The transpose, as oneDNN takes it: it has no fast kernel for gaps between rows."""
    return second.mT if _is_dense(second.unsqueeze(0)) else second.mT.contiguous()


def _is_dense(matrices: Tensor) -> bool:
    """Whether the rows of each matrix follow each other without gaps, or its columns do."""
    _, rows, columns = matrices.shape
    return matrices.stride()[1:] in ((columns, 1), (1, rows))


_linear = _find()
SUITS_BLAS = PROCESSOR == "intel" and torch.backends.mkl.is_available()
