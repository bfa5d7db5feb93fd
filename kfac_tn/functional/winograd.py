"""Gradients of kernels that are three wide, with half of the products: Winograd's F(3, 4).

Along the last axis, a gradient is `y[k] = sum_j g[j] x[j + k]`, `k < 3`. Of four `g` and the six
`x` that they meet, these are three sums of four products each; by Winograd's minimal filtering
(Lavin & Gray 2015, arXiv 1509.09308) six products are enough, of linear functions of `g` and of
`x`. `y` is linear in them, so that it is taken of their sums over tiles. The other axes of a kernel
are unfolded as ever: to have two of them this way takes a quarter of the products, but as much
longer to make what is multiplied and what is made of products (measured on a CPU).

In float32, squares of sums with random signs are off by 6e-7, twice what they are without.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

KERNEL = 3
"""Width of a kernel."""

TILE = 4
"""Output gradients of a tile."""

WINDOW = TILE + KERNEL - 1
"""Inputs that a tile meets, and products."""

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
"""Where polynomials are evaluated, besides at infinity: rounding errors are smaller than with
integers, and these are exact as well."""


def transform_gradients(rows: Tensor) -> Tensor:
    """Functions of the tiles of output gradients: `[d, R]` to `[WINDOW, d, R / TILE]`."""
    return _apply(_matrices()[0], rows.reshape(-1, TILE).mT).view(WINDOW, len(rows), -1)


def transform_inputs(windows: Tensor) -> Tensor:
    """Functions of what tiles meet: `[n, C, WINDOW, ...]` to `[WINDOW, n, C, ...]`."""
    rows = windows.movedim(2, 0)
    return _apply(_matrices()[1], rows.reshape(WINDOW, -1)).view(rows.shape)


def transform_products(products: Tensor) -> Tensor:
    """What products give each entry of a kernel: `[WINDOW, ...]` to `[KERNEL, ...]`."""
    return _apply(_matrices()[2], products.flatten(1)).view(KERNEL, *products.shape[1:])


def _apply(matrix: Tensor, columns: Tensor) -> Tensor:
    return matrix.to(columns) @ columns


@lru_cache(maxsize=1)
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """The three, by transposition of the multiplication of polynomials by their values.

    Coefficients `s` of a product are `V^-1 (V g * V h)`, with `V` of as many columns as there are
    coefficients; so `sum_k h[k] y[k] = <x, s>` for all `h` says that `y = V^T (V g * V^-T x)`.
    """
    inputs = torch.linalg.inv(_values(WINDOW)).mT.contiguous()
    return _values(TILE), inputs, _values(KERNEL).mT.contiguous()


def _values(coefficients: int) -> Tensor:
    """The matrix that takes a polynomial's coefficients to its values; at infinity, to the last."""
    powers = range(coefficients)
    rows = [[point**power for power in powers] for point in POINTS]
    rows.append([float(power == coefficients - 1) for power in powers])
    return torch.tensor(rows, dtype=torch.float64)
