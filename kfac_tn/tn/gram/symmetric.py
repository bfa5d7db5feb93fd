"""Sums of matrices times their own transposes: every entry once, the rest mirrored."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from kfac_tn.tn import gemm
from kfac_tn.tn.pages import on_huge_pages

BLOCK = 64
"""Rows of a result that are computed at once, at the least, up to the diagonal.

What is right of it is mirrored. On a CPU that takes up to a third less time. A GPU would rather
make one large product.
"""

LEAST_BLOCKS = 4
"""Blocks of rows of a result that is large enough: fewer would save little."""

MOST_ROWS = 256
"""Rows of a block at the most: the product is made apart, and more would not be faster."""

LEAST_SUM = 512
"""Terms of the sums from which on to multiply costs more than to mirror the result."""

LEAST_ELEMENTS = 2**18
"""Rows times terms from which on it costs more than the calls for several blocks."""


MOST_COPIED = 2**18
"""Elements that are copied at once, to be read from a cache."""

LEAST_CHUNK = 64
"""Terms that are at least."""


class SymmetricSum:
    """A sum of matrices times their own transposes, in blocks of rows up to the diagonal.

    What is right of the diagonal waits for the result: nothing else is held.

    Example:
        >>> import torch
        >>> total = SymmetricSum()
        >>> total.add(torch.tensor([[[1.0], [2.0]]]))
        >>> total.add(torch.tensor([[[0.0], [1.0]]]))
        >>> total.result()
        tensor([[[1., 2.],
                 [2., 5.]]])
    """

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._rows: list[tuple[int, int]] = []
        self._lower = False

    def add(self, columns: Tensor, scale: float = 1.0) -> None:
        """Add `scale * columns @ columns.mT`, where columns are `[groups, d, terms]`."""
        for chunk in _in_rows(columns):
            if self._whole is None:
                self._start(chunk, columns.shape[2], scale)
            else:
                for start, end in self._rows:
                    to = end if self._lower else chunk.shape[1]
                    left = _scaled(chunk[:, start:end], scale)
                    gemm.add_product(self._whole[:, start:end, :to], left, chunk[:, :to].mT)

    def _start(self, columns: Tensor, terms: int, scale: float) -> None:
        groups, size, _ = columns.shape
        on_cpu = columns.device.type == "cpu"
        starts = _starts(size, terms) if on_cpu else [0]
        self._lower = len(starts) > 1
        if not self._lower:
            self._whole = gemm.multiply(_scaled(columns, scale), columns.mT)
            if (
                on_cpu and size >= 2 * BLOCK
            ):  # what is added may be made apart first: not all at once
                starts = list(range(0, size, rows_at_once(size)))
        self._rows = list(zip(starts, [*starts[1:], size], strict=True))
        if self._lower:
            self._whole = on_huge_pages(columns.new_empty(groups, size, size))
            for start, end in self._rows:
                left = _scaled(columns[:, start:end], scale)
                gemm.add_product(self._whole[:, start:end, :end], left, columns[:, :end].mT, 0)

    def result(self, scale: float = 1.0) -> Tensor:
        """The sum, `[groups, d, d]`, times a factor; nothing can be added to it any more."""
        assert self._whole is not None
        if not self._lower:
            return self._whole if scale == 1 else self._whole.mul_(scale)
        for start, end in self._rows:
            block = self._whole[:, start:end, :end]
            if scale != 1:
                block.mul_(scale)
            self._whole[:, :start, start:end] = block[:, :, :start].mT
        return self._whole


def symmetric_share(size: int, terms: int) -> float:
    """Share of a product with its own transpose that is computed on a CPU."""
    starts = _starts(size, terms)
    ends = [*starts[1:], size]
    return sum((end - start) * end for start, end in zip(starts, ends, strict=True)) / size**2


def rows_at_once(size: int) -> int:
    """Rows of a result that are computed at once, if it is large."""
    return max(BLOCK, min(-(-size // LEAST_BLOCKS), MOST_ROWS)) if size >= 2 * BLOCK else size


def _starts(size: int, terms: int) -> list[int]:
    if size < 2 * BLOCK or terms < LEAST_SUM or size * terms < LEAST_ELEMENTS:
        return [0]
    return list(range(0, size, rows_at_once(size)))


def _in_rows(columns: Tensor) -> Iterator[Tensor]:
    """Chunks of the terms, copied for a product that wants them to follow each other in memory."""
    groups, size, _ = columns.shape
    if columns.stride(2) == 1 or not (
        columns.device.type == "cpu" and gemm.takes(columns, columns.mT)
    ):
        yield columns
        return
    for chunk in columns.split(max(LEAST_CHUNK, MOST_COPIED // (groups * size)), 2):
        yield chunk.contiguous()


def _scaled(rows: Tensor, scale: float) -> Tensor:
    return rows if scale == 1 else rows * scale
