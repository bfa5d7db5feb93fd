"""Kronecker factors of linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_tn.functional.common import (
    CACHE_BYTES,
    cast,
    cast_chunks,
    check,
    check_approximation,
    concatenate,
    split,
)
from kfac_tn.functional.products import append_one, average_gram, border, gram, sum_grams
from kfac_tn.tn.autocast import full_precision


def linear_input_factor(x: Tensor, approximation: str = "expand", bias: bool = False) -> Tensor:
    """Input factor of a linear layer, with or without shared positions.

    Args:
        x: Input, `[N, *shared, d_in]`.
        approximation: `"expand"` (default) or `"reduce"`; the same without shared positions.
        bias: Whether to append a 1 to every vector. Default: no.

    Returns:
        `[1, d, d]`, `d = d_in`, plus 1 with `bias`. The first axis is that of groups, as
        convolutions have. An average over examples (and positions).

    Raises:
        ValueError: If `x` has fewer than two axes or is empty.

    Example:
        >>> linear_input_factor(torch.tensor([[1.0], [3.0]]), bias=True)
        tensor([[[5., 2.],
                 [2., 1.]]])
    """
    if check_approximation(approximation) == "reduce":
        rows = linear_average_input(x, bias)
        return average_gram(rows)
    check(x, "x", "[N, *shared, d_in]", 2)
    count, size = x[..., 0].numel(), x.shape[-1]
    if bias and (count < size or x.numel() <= _CACHED):  # else better copy the factor
        return _gram_of_positions(append_one(x)).div_(count)
    factor = _gram_of_positions(x).div_(count)
    return border(factor, _mean_of_positions(x)) if bias else factor


def linear_average_input(x: Tensor, bias: bool = False) -> Tensor:
    """Mean over shared positions of a linear layer's input: the rows of KFAC-reduce.

    Args:
        x: Input, `[N, *shared, d_in]`.
        bias: Whether to append a 1 to every row. Default: no.

    Returns:
        `[N, 1, d]`, with `d` as in `linear_input_factor`.

    Raises:
        ValueError: As `linear_input_factor`.

    Example:
        >>> linear_average_input(torch.tensor([[[1.0], [3.0]]]), bias=True)
        tensor([[[2., 1.]]])
    """
    check(x, "x", "[N, *shared, d_in]", 2)
    rows = _sum_positions(x) / x[0, ..., 0].numel()
    return append_one(rows) if bias else rows


def linear_grad_output_factor(g: Tensor, approximation: str = "expand") -> Tensor:
    """Output-gradient factor of a linear layer, with or without shared positions.

    Args:
        g: Back-propagated columns of the loss Hessian's root, `[N, *shared, d_out]`.
        approximation: `"expand"` (default) or `"reduce"`.

    Returns:
        `[1, d_out, d_out]`; the first axis is that of groups. A sum: the scale is in `g`.

    Raises:
        ValueError: If `g` has fewer than two axes or is empty.

    Example:
        >>> linear_grad_output_factor(torch.ones(2, 3, 1)).item()
        6.0
        >>> linear_grad_output_factor(torch.ones(2, 3, 1), approximation="reduce").item()
        18.0
    """
    if check_approximation(approximation) == "reduce":
        return gram(linear_sum_grad_output(g))
    check(g, "g", "[N, *shared, d_out]", 2)
    return _gram_of_positions(g)


def linear_sum_grad_output(g: Tensor) -> Tensor:
    """Sum over shared positions of a linear layer's output gradients: the rows of KFAC-reduce.

    Args:
        g: Back-propagated columns, `[N, *shared, d_out]`.

    Returns:
        `[N, 1, d_out]`.

    Raises:
        ValueError: As `linear_grad_output_factor`.

    Example:
        >>> linear_sum_grad_output(torch.ones(1, 3, 2))
        tensor([[[3., 3.]]])
    """
    check(g, "g", "[N, *shared, d_out]", 2)
    return _sum_positions(g)


# ---- how it is computed ----------------------------------------------------------------------

_CACHED = CACHE_BYTES // 8  # elements of an input: to append a 1 is faster than to the factor


def _gram_of_positions(x: Tensor) -> Tensor:
    """Sum of outer products of all vectors `[..., d]`: `[1, d, d]`."""
    with full_precision(x):
        return sum_grams(_chunks(x), lambda chunk: _rows(chunk).mT.unsqueeze(0))


def _mean_of_positions(x: Tensor) -> Tensor:
    """Mean of all vectors `[..., d]`: `[1, d]`."""
    total = torch.stack([_rows(chunk).sum(0) for chunk in _chunks(x)]).sum(0, keepdim=True)
    return total / x[..., 0].numel()


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Chunks whose positions are put in a row one chunk at a time, should that take a copy."""
    return cast_chunks(x.flatten(0, -2)) if x.is_contiguous() else split(x, x[0].numel())


def _rows(chunk: Tensor) -> Tensor:
    return cast(chunk).reshape(-1, chunk.shape[-1])


def _sum_positions(x: Tensor) -> Tensor:
    """Sum over all axes but the first and the last: `[N, 1, d]`."""
    shared = list(range(1, x.ndim - 1))
    if not shared:
        return cast(x).unsqueeze(1)
    sums = concatenate([cast(chunk).sum(shared) for chunk in cast_chunks(x)])
    return sums.unsqueeze(1)
