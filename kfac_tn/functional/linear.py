"""Kronecker factors of linear layers."""

from __future__ import annotations

from torch import Tensor

from kfac_tn.functional.common import (
    accumulation_dtype,
    append_one,
    border,
    cast,
    check,
    check_approximation,
    gram,
)


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
        >>> import torch
        >>> linear_input_factor(torch.tensor([[1.0], [3.0]]), bias=True)
        tensor([[[5., 2.],
                 [2., 1.]]])
    """
    if check_approximation(approximation) == "reduce":
        rows = linear_average_input(x, bias)
        return gram(rows) / len(rows)
    check(x, "x", "[N, *shared, d_in]", 2)
    rows = cast(x.reshape(-1, 1, x.shape[-1]))
    factor = gram(rows) / len(rows)
    return border(factor, rows.mean(0)) if bias else factor


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
        >>> import torch
        >>> linear_average_input(torch.tensor([[[1.0], [3.0]]]), bias=True)
        tensor([[[2., 1.]]])
    """
    check(x, "x", "[N, *shared, d_in]", 2)
    rows = x.reshape(len(x), -1, x.shape[-1]).mean(1, keepdim=True, dtype=accumulation_dtype(x))
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
        >>> import torch
        >>> linear_grad_output_factor(torch.ones(2, 3, 1)).item()
        6.0
        >>> linear_grad_output_factor(torch.ones(2, 3, 1), approximation="reduce").item()
        18.0
    """
    if check_approximation(approximation) == "reduce":
        return gram(linear_sum_grad_output(g))
    check(g, "g", "[N, *shared, d_out]", 2)
    return gram(g.reshape(-1, 1, g.shape[-1]))


def linear_sum_grad_output(g: Tensor) -> Tensor:
    """Sum over shared positions of a linear layer's output gradients: the rows of KFAC-reduce.

    Args:
        g: Back-propagated columns, `[N, *shared, d_out]`.

    Returns:
        `[N, 1, d_out]`.

    Raises:
        ValueError: As `linear_grad_output_factor`.

    Example:
        >>> import torch
        >>> linear_sum_grad_output(torch.ones(1, 3, 2))
        tensor([[[3., 3.]]])
    """
    check(g, "g", "[N, *shared, d_out]", 2)
    return g.reshape(len(g), -1, g.shape[-1]).sum(1, keepdim=True, dtype=accumulation_dtype(g))
