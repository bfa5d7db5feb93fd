"""The Gram matrix of windows by offsets and cells: one product instead of one for each block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kfac_tn.tn import gemm
from kfac_tn.tn.gram.blocks import assemble, examples_at_once
from kfac_tn.tn.gram.windows import JointCell, Windows, joint_cells
from kfac_tn.tn.steps import Slice

COPIES = 6
"""Copies of a chunk that are made at most at once, roughly, beside the first."""


def gram_by_cells(x: Tensor, windows: tuple[Windows, ...], scale: float = 1.0) -> Tensor:
    """Multiply cells with cells, and put the products into all blocks that they belong to.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes, at least one.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    count = examples_at_once(x.shape, windows, COPIES)
    cells = joint_cells(windows)
    grams: list[Tensor] = []
    for chunk in x.split(count, 1):
        _add_products(grams, cells, _Images(chunk, windows))
    if scale != 1:
        grams = [gram.mul_(scale) for gram in grams]
    return assemble(x, cells, grams, [window.kernel_size for window in windows])


def _add_products(grams: list[Tensor], cells: Sequence[JointCell], images: _Images) -> None:
    """Add the products of some examples; what is copied for them is gone after."""
    for at, cell in enumerate(cells):
        left, right = images.matrices(cell)
        if at < len(grams):
            gemm.add_product(grams[at], left.mT, right)
        else:
            grams.append(gemm.multiply(left.mT, right))


class _Images:
    """A tensor laid out such that some of its rows are a matrix, without a copy.

    Positions along the inner axes are copied once for all rows that are taken of them.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes.
    """

    def __init__(self, x: Tensor, windows: tuple[Windows, ...]) -> None:
        # Rows first, channels last: [shared, rows, examples, *inner sizes, channels].
        self.rows = x.permute(0, 3, 1, *range(4, x.ndim), 2)
        self.stride, *self.strides = (window.stride for window in windows)
        self.copies: dict[object, Tensor] = {}
        self.inner: object = None

    def matrices(self, cell: JointCell) -> tuple[Tensor, Tensor]:
        """The positions of a cell, of both sides, `[shared, positions, channels]`."""
        outer, *inner = cell.cells
        if inner != self.inner:  # cells that share them follow each other
            self.inner, self.copies = inner, {}
        counts = [c.count for c in inner]
        return (
            self._matrix(outer.first, outer.count, [c.first for c in inner], counts),
            self._matrix(outer.second, outer.count, [c.second for c in inner], counts),
        )

    def _matrix(self, first: int, count: int, firsts: list[int], counts: list[int]) -> Tensor:
        at, phase = divmod(first, self.stride)
        key = (phase, *firsts)
        if key not in self.copies:
            part = self.rows if self.stride == 1 else self.rows[:, phase :: self.stride]
            for axis, taken in enumerate(zip(firsts, counts, self.strides, strict=True), start=3):
                part = Slice.compute(part, axis, *taken)
            self.copies[key] = part.contiguous()
        rows = self.copies[key].narrow(1, at, count)
        return rows.reshape(len(rows), -1, rows.shape[-1])
