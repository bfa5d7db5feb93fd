"""Per-example weight gradients and sums of their squares, from inputs and output gradients.

Every layer here multiplies, in each group, a matrix with the vectors `a` that it makes of its input
(a convolution unfolds it). So what one example gives the weight on account of one column `g` is
`sum_r g[r] a[r]^T`, a matrix product over positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_tn.functional import common
from kfac_tn.functional.common import accumulation_dtype, cast, concatenate, full_precision

FEW = 8
"""Gradients of a chunk that are squared and added one by one: so many launches cost less than to
write their squares."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer's input and gradients of its output, to be read in chunks.

    Attributes:
        x: Input, examples first.
        g: Back-propagated columns, `[V, N, ...]`.
        vectors: Makes `a`, `[n, groups, d_in, R]`, of some examples' input.
        rows: Makes `[v, n, groups, d_out, R]` of some columns.
        shape: `groups`, `d_out`, `d_in` and the number of positions `R`.
    """

    x: Tensor
    g: Tensor
    vectors: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int, int]


def per_example_gradients(pair: Pair) -> Tensor:
    """Every column's and every example's weight gradient, `[V, N, groups, d_out, d_in]`."""
    groups, d_out, d_in, positions = pair.shape
    columns, examples = pair.g.shape[:2]
    dtype = accumulation_dtype(pair.x)
    copies = groups * positions * (3 * d_in + columns * d_out) * dtype.itemsize
    size = max(1, common.UNFOLD_BYTES // copies)
    results = []
    with full_precision(pair.x):
        for start in range(0, examples, size):
            chunk = slice(start, start + size)
            vectors = cast(pair.vectors(pair.x[chunk]))
            results.append(_gradients(cast(pair.rows(pair.g[:, chunk])), vectors))
    return concatenate(results).movedim(2, 0)


def sum_squared_gradients(pair: Pair, max_memory: int | None = None) -> Tensor:
    """Sum over columns and examples of squared weight gradients, `[groups, d_out, d_in]`.

    Args:
        pair: The layer's input and gradients of its output.
        max_memory: Most bytes to hold besides these and the result. Default:
            `common.UNFOLD_BYTES`, or what one gradient takes if that is more.

    Raises:
        ValueError: If one gradient takes more than `max_memory`.
    """
    add = _add_products_of_squares if pair.shape[-1] == 1 else _add_squares_of_products
    columns, examples = pair.g.shape[:2]
    width, size = _chunks(pair, max_memory)
    groups, d_out, d_in, _ = pair.shape
    total = pair.x.new_zeros((groups, d_out, d_in), dtype=accumulation_dtype(pair.x))
    with full_precision(pair.x):
        for start in range(0, examples, size):
            chunk = slice(start, start + size)
            vectors = cast(pair.vectors(pair.x[chunk]))
            for first in range(0, columns, width):
                add(total, cast(pair.rows(pair.g[first : first + width, chunk])), vectors)
    return total


def _chunks(pair: Pair, max_memory: int | None) -> tuple[int, int]:
    """Numbers of columns and of examples whose gradients are computed at once."""
    groups, d_out, d_in, positions = pair.shape
    columns = pair.g.shape[0]
    itemsize = accumulation_dtype(pair.x).itemsize
    # Of an example: its unfolded input, and what that takes; of a gradient: itself and its square.
    example = 3 * itemsize * groups * d_in * positions
    gradient = 2 * itemsize * groups * d_out * (positions + (d_in if positions > 1 else 0))
    limit = common.UNFOLD_BYTES if max_memory is None else max_memory
    if max_memory is not None and max_memory < example + gradient:
        raise ValueError(
            f"max_memory={max_memory:,} bytes is too little: one gradient, of shape "
            f"{groups, d_out, d_in}, takes {example + gradient:,}"
        )
    # A CPU squares gradients best as long as they are in its cache.
    share = min(limit, common.CACHE_BYTES) if pair.x.device.type == "cpu" else limit
    width = min(columns, max(1, min(share, limit - example) // gradient))
    size = min(share // (width * gradient), limit // (example + width * gradient))
    return width, max(1, size)


def _gradients(rows: Tensor, vectors: Tensor) -> Tensor:
    """Products over positions of `[v, n, groups, d_out, R]` and `[n, groups, d_in, R]`.

    Returns:
        `[n, groups, v, d_out, d_in]`.
    """
    columns, examples, groups, d_out, _ = rows.shape
    rows = rows.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
    products = torch.bmm(rows, vectors.flatten(0, 1).mT)
    return products.reshape(examples, groups, columns, d_out, -1)


def _add_squares_of_products(total: Tensor, rows: Tensor, vectors: Tensor) -> None:
    gradients = _gradients(rows, vectors)
    examples, _, columns = gradients.shape[:3]
    if examples * columns > FEW:
        total += gradients.square().sum((0, 2))
        return
    for gradient in gradients.movedim(2, 1).flatten(0, 1):
        total.addcmul_(gradient, gradient)


def _add_products_of_squares(total: Tensor, rows: Tensor, vectors: Tensor) -> None:
    """Without shared positions, `(g a^T)^2` is `g^2 (a^2)^T`: one product for all gradients."""
    squares = rows.squeeze(-1).square().sum(0)
    total.baddbmm_(squares.permute(1, 2, 0), vectors.squeeze(-1).square().transpose(0, 1))
