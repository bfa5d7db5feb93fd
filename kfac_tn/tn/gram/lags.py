"""The Gram matrix of windows from correlations at all lags: one convolution's weight gradient.

The product of all pairs of positions at a distance, for all distances between kernel positions, is
what the gradient of a convolution's weight is made of, with the tensor as its input and as its
output gradient. Nothing is unfolded or copied for it, and torch's kernels for it are faster than
its products of matrices. What it counts too much, pairs of positions at the border that not all
blocks have, is computed apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from kfac_tn.tn import gemm
from kfac_tn.tn.gram.blocks import assemble, by_offset, examples_at_once
from kfac_tn.tn.gram.windows import JointCell, Windows, displacement, joint_cells
from kfac_tn.tn.steps import ConvolveBackward, Slice

COPIES = 4
"""Copies of a chunk that are made, torch's own included."""

MOST_AXES = 3
"""Axes with windows that torch's convolutions have at most."""


Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Residue class of the first position of a pair, and what leads to the second."""


class Lags(NamedTuple):
    """Positions along one axis at the distance of the stride, and the lags at which they count.

    Attributes:
        first: The first position.
        positions: Number of positions.
        least: The least lag, in dilations.
        number: Number of lags.
    """

    first: int
    positions: int
    least: int
    number: int


def gram_by_lags(x: Tensor, windows: tuple[Windows, ...], scale: float = 1.0) -> Tensor:
    """Correlate the tensor with itself, and put the result into all blocks, but for the borders.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes, one to three.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    return gram_from_lags(x, windows, scale, _all_lags(x, windows))


def gram_from_lags(
    x: Tensor, windows: tuple[Windows, ...], scale: float, all_lags: dict[Key, Tensor]
) -> Tensor:
    """Put the products of all pairs of positions at each lag into the blocks they belong to.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes.
        scale: The result is multiplied by that.
        all_lags: By residue class and lag, `[shared, channels, channels]` each. The dict is emptied
            on the way.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    cells = joint_cells(windows, useless=True)
    slabs = _Slabs(x, windows)
    grams: list[Tensor] = [x] * len(cells)
    for members in by_offset(cells):
        # All pairs, less those of all cells but the largest: what is left is the largest's.
        largest, *others = sorted(members, key=lambda at: -cells[at].pairs)
        grams[largest] = all_lags.pop(_key(cells[largest], windows)).clone()  # the others go
        for at in others:
            grams[at] = slabs.product(cells[at])
            grams[largest] -= grams[at]
    del slabs  # before there is more
    all_lags.clear()
    if scale != 1:
        grams = [gram.mul_(scale) for gram in grams]
    return assemble(x, cells, grams, [window.kernel_size for window in windows])


@lru_cache(maxsize=512)
def lags_of_classes(windows: tuple[Windows, ...]) -> tuple[tuple[Lags, ...], ...]:
    """What to correlate: for each residue class of positions that kernels see, along all axes.

    Along the first axis only lags that aren't negative count: others are mirror images.

    Example:
        >>> lags_of_classes((Windows(-1, 3, 10, 1, 1, 10),))
        ((Lags(first=0, positions=10, least=0, number=3),),)
        >>> lags_of_classes((Windows(-1, 3, 5, 2, 1, 10),))[1]  # positions 0, 2, ... in the middle
        (Lags(first=0, positions=5, least=0, number=2),)
    """
    return tuple(product(*(_classes(w, axis == 0) for axis, w in enumerate(windows))))


def _classes(window: Windows, forward: bool) -> Iterator[Lags]:
    start, kernel_size, _, stride, dilation, size = window
    residues = [k * dilation % stride for k in range(kernel_size)]
    for residue in sorted(set(residues)):
        taps = [k for k in range(kernel_size) if residues[k] == residue]
        first = (start + residue) % stride
        least = 0 if forward else -taps[-1]
        count = len(range(first, size, stride))
        if count:
            yield Lags(first, count, least, kernel_size - taps[0] - least)


def _key(cell: JointCell, windows: tuple[Windows, ...]) -> Key:
    return tuple(first for first, *_ in cell.offset), displacement(cell.offset, windows)


def _all_lags(x: Tensor, windows: tuple[Windows, ...]) -> dict[Key, Tensor]:
    """The products of all pairs of positions, `[shared, c, c']`."""
    shared, _, channels, *_ = x.shape
    images = x.transpose(0, 1).flatten(1, 2)
    chunks = images.split(examples_at_once(x.shape, windows, COPIES))
    lags_last = (*range(3, 3 + len(windows)), 0, 1, 2)
    found: dict[Key, Tensor] = {}
    for lags in lags_of_classes(windows):
        total, *others = (_correlate(chunk, shared, lags, windows) for chunk in chunks)
        for other in others:
            total += other
        total = total.unflatten(0, (shared, channels)).permute(lags_last).contiguous()
        pairs = list(zip(lags, windows, strict=True))
        residues = tuple((lag.first - window.start) % window.stride for lag, window in pairs)
        ways = [
            [(lag.least + at) * window.dilation for at in range(lag.number)]
            for lag, window in pairs
        ]
        for at in product(*(range(lag.number) for lag in lags)):
            found[residues, tuple(way[a] for way, a in zip(ways, at, strict=True))] = total[at]
    return found


def _correlate(
    images: Tensor, shared: int, lags: Sequence[Lags], windows: tuple[Windows, ...]
) -> Tensor:
    """The gradient `[shared * c, c', *lags]` of a convolution's weight."""
    first = images
    padding: list[int] = []
    zeros: list[int] = []
    for axis, (lag, window) in enumerate(zip(lags, windows, strict=True), start=2):
        first = Slice.compute(first, axis, lag.first, lag.positions, window.stride)
        before = -lag.first - lag.least * window.dilation
        last = lag.first + (lag.positions - 1) * window.stride
        after = last + (lag.least + lag.number - 1) * window.dilation - (window.size - 1)
        same = before == after >= 0
        padding.append(before if same else 0)
        zeros[:0] = (0, 0) if same else (before, after)
    if any(zeros):
        images = F.pad(images, zeros)
    return ConvolveBackward.compute(
        images,
        first,
        tuple(window.stride for window in windows),
        tuple(padding),
        tuple(window.dilation for window in windows),
        shared,
        tuple(lag.number for lag in lags),
    )


class _Slabs:
    """Few positions along one axis, copied such that positions along the next follow each other.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes.
    """

    def __init__(self, x: Tensor, windows: tuple[Windows, ...]) -> None:
        self.x, self.windows = x, windows
        self.slabs: dict[tuple[int, int, int], Tensor] = {}

    def product(self, cell: JointCell) -> Tensor:
        """The product of the positions of a cell, `[shared, c, c']`."""
        shares = [c.count / w.size for c, w in zip(cell.cells, self.windows, strict=True)]
        thin = shares.index(min(shares))
        counts = [c.count for c in cell.cells]
        left = self._matrix(thin, [c.first for c in cell.cells], counts)
        right = self._matrix(thin, [c.second for c in cell.cells], counts)
        return gemm.multiply(left.mT, right)

    def _matrix(self, thin: int, firsts: list[int], counts: list[int]) -> Tensor:
        """Positions along all axes, `[shared, positions, channels]`."""
        strides = [window.stride for window in self.windows]
        key = thin, firsts[thin], counts[thin]
        if key not in self.slabs:
            slab = Slice.compute(self.x, 3 + thin, firsts[thin], counts[thin], strides[thin])
            self.slabs[key] = slab.movedim((1, 3 + thin, 2), (-3, -2, -1)).contiguous()
        slab = self.slabs[key]
        others = (axis for axis in range(len(counts)) if axis != thin)
        for at, axis in enumerate(others, start=1):
            slab = Slice.compute(slab, at, firsts[axis], counts[axis], strides[axis])
        return slab.flatten(1, -2)
