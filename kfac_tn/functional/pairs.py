"""Per-example weight gradients, from inputs and output gradients.

Every layer here multiplies, in each group, a matrix with the vectors `a` that it makes of its input
(a convolution unfolds it). So what one example gives the weight on account of one column `g` is
`sum_r g[r] a[r]^T`, a matrix product over positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_tn.functional import common
from kfac_tn.functional.common import accumulation_dtype, cast, concatenate
from kfac_tn.tn import gemm
from kfac_tn.tn.autocast import full_precision

FEW_COLUMNS = 3
"""Columns for each of which torch's kernel may lay out the input anew; more share vectors of it."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer's input and gradients of its output, to be read in chunks.

    Attributes:
        x: Input, examples first.
        g: Back-propagated columns, each `[N, ...]`.
        vectors: Makes `a`, `[n, groups, d_in, R]`, of some examples' input.
        rows: Makes `[v, n, groups, d_out, R]` of some columns.
        shape: `groups`, `d_out`, `d_in` and the number of positions `R`.
        seen: For each entry of a kernel the positions at which it sees more than padding. `d_in`
            is channels times entries.
        direct: Makes the gradients, `[n, groups, d_out, d_in]`, of some examples' input and one
            column of gradients of their output, without vectors. None where nothing does.
        depthwise: Whether oneDNN has a kernel for just that.
        tiles: Makes `[WINDOW, n, groups, d, R / TILE]` of some examples' input, `d_in` being `d`
            times `KERNEL`: see `kfac_tn.functional.winograd`. None where that doesn't apply.
    """

    x: Tensor
    g: Sequence[Tensor]
    vectors: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int, int]
    seen: Callable[[], tuple[tuple[int, ...], ...]]
    direct: Callable[[Tensor, Tensor], Tensor] | None = None
    depthwise: bool = False
    tiles: Callable[[Tensor], Tensor] | None = None

    def read(self, columns: slice, examples: slice) -> Tensor:
        """Rows of some columns and examples; an example's columns follow each other in memory."""
        parts = [cast(g[examples]) for g in self.g[columns]]
        stacked = torch.stack(parts, 1).transpose(0, 1) if len(parts) > 1 else parts[0].unsqueeze(0)
        return self.rows(stacked)

    @property
    def suits_direct(self) -> bool:
        """Whether `direct` is faster than anything that is unfolded, by far for one column."""
        return self.depthwise and len(self.g) <= FEW_COLUMNS and self.by_one_dnn

    @property
    def by_one_dnn(self) -> bool:
        """Whether kernels for convolutions are oneDNN's."""
        if self.x.device.type != "cpu" or accumulation_dtype(self.x) != torch.float32:
            return False
        return torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling()


def per_example_gradients(pair: Pair) -> Tensor:
    """Every column's and every example's weight gradient, `[V, N, groups, d_out, d_in]`."""
    groups, d_out, d_in, positions = pair.shape
    columns, examples = len(pair.g), len(pair.x)
    dtype = accumulation_dtype(pair.x)
    copies = groups * positions * (3 * d_in + columns * d_out) * dtype.itemsize
    size = max(1, common.UNFOLD_BYTES // copies)
    results = []
    with full_precision(pair.x):
        if pair.direct is not None and pair.suits_direct:
            return torch.stack([pair.direct(pair.x, g) for g in pair.g])
        for start in range(0, examples, size):
            chunk = slice(start, start + size)
            vectors = cast(pair.vectors(pair.x[chunk]))
            results.append(products_over_positions(pair.read(slice(None), chunk), vectors))
    return concatenate(results).movedim(2, 0)


def products_over_positions(rows: Tensor, vectors: Tensor) -> Tensor:
    """Products over positions of `[v, n, groups, d_out, R]` and `[n, groups, d_in, R]`.

    Returns:
        `[n, groups, v, d_out, d_in]`.
    """
    columns, examples, groups, d_out, _ = rows.shape
    rows = rows.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
    products = gemm.multiply(rows, vectors.flatten(0, 1).mT)
    return products.reshape(examples, groups, columns, d_out, -1)
