"""The step that computes a Gram matrix of windows by one of the methods, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from kfac_tn.tn import gemm
from kfac_tn.tn.autocast import full_precision
from kfac_tn.tn.gram.blocks import LITTLE, examples_at_once
from kfac_tn.tn.gram.cells import COPIES, gram_by_cells
from kfac_tn.tn.gram.correlations import (
    MOST_CHANNELS,
    TapCell,
    cells_of_taps,
    gram_by_correlations,
    stretches,
)
from kfac_tn.tn.gram.lags import COPIES as COPIES_OF_LAGS
from kfac_tn.tn.gram.lags import (
    MOST_AXES,
    gram_by_lags,
    lags_of_classes,
)
from kfac_tn.tn.gram.positions import MOST_PAIRS, at_once, gram_by_positions, groups_at_once
from kfac_tn.tn.gram.spectra import (
    PARTS,
    chunks,
    gram_by_spectra,
    most_elements,
    number_of_frequencies,
)
from kfac_tn.tn.gram.symmetric import symmetric_share
from kfac_tn.tn.gram.unfolding import LEAST_CHUNK, division, gram_by_unfolding
from kfac_tn.tn.gram.windows import Windows, amounts
from kfac_tn.tn.steps import COMPUTE, Step
from kfac_tn.tn.steps.step import WIDTH, has_depthwise_kernels

Method: TypeAlias = Callable[[Tensor, tuple[Windows, ...], float], Tensor]

METHODS: dict[str, Method] = {
    "unfolding": gram_by_unfolding,
    "cells": gram_by_cells,
    "correlations": gram_by_correlations,
    "positions": gram_by_positions,
    "lags": gram_by_lags,
    "spectra": gram_by_spectra,
}
"""How to compute the Gram matrix of `[shared, examples, channels, *sizes]` through windows."""

NEAR = 2**22
"""Elements of a chunk that are read from a cache after they are written."""

UNFOLDED_WASTE = 6
"""How much longer convolutions take that are unfolded by torch."""

WRITTEN = 2
"""How often an element of the result is moved: made elsewhere and put where it is, or mirrored."""

LAG = 4
"""How often an element of what correlations result in is moved."""

TRANSFORM = 8
"""How often an element of spectra is moved, from the tensor until they are laid out."""


def applies(method: str, channels: int, windows: tuple[Windows, ...]) -> bool:
    """Whether a method can be used.

    Args:
        method: Its name.
        channels: Number of channels in each group.
        windows: Of each axis; none for a tensor that is no windows.
    """
    if method == "correlations":
        return bool(windows) and channels <= MOST_CHANNELS
    if method == "lags":
        return 0 < len(windows) <= MOST_AXES
    if method == "spectra":
        return bool(windows) and all(window.stride == 1 for window in windows)
    if method == "positions":
        pairs = (channels * prod(window.size for window in windows)) ** 2
        return bool(windows) and pairs <= MOST_PAIRS
    return method != "cells" or bool(windows)


@dataclass(frozen=True)
class WindowGram(Step):
    """Multiply the windows of a tensor with themselves, summed over all their positions.

    Attributes:
        axes: Of the tensor: those that both copies share and the result keeps, those that are
            summed over, those of which each copy has its own, and those with windows. Without
            windows, the last are further ones that are summed over, innermost in memory.
        windows: Of each axis with windows, which may be longer than they say. The result has axes
            `[*shared, *own, *kernels, *own, *kernels]`.
        method: Name of the method.
        scale: What the result is multiplied by.
    """

    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    windows: tuple[Windows, ...]
    method: str
    scale: float = 1.0

    @staticmethod
    def compute(  # type: ignore[override]
        tensor: Tensor,
        axes: tuple[tuple[int, ...], ...],
        windows: tuple[Windows, ...],
        method: str,
        scale: float,
    ) -> Tensor:
        """Multiply."""
        for axis, window in zip(axes[-1], windows, strict=False):
            if window.size < tensor.shape[axis]:
                tensor = tensor.narrow(axis, 0, window.size)  # what lies behind is in no window
        rows = [tensor.shape[axis] for axis in axes[2]]
        rows += [window.kernel_size for window in windows]
        axes, windows = _in_place(tensor, axes, windows, method)
        shared, examples, own, sizes = ([tensor.shape[a] for a in group] for group in axes)
        last = sizes if windows else [prod(sizes)]
        x = tensor.permute([axis for group in axes for axis in group])
        x = x.reshape(prod(shared), prod(examples), prod(own), *last)
        with full_precision(x):  # sums are added up in place, in one precision
            return METHODS[method](x, windows, scale).reshape(*shared, *rows, *rows)

    def estimate(self, *inputs: Tensor) -> Tensor:
        """A tensor like the result."""
        shape = [inputs[0].shape[axis] for axis in self.axes[0]]
        rows = [inputs[0].shape[axis] for axis in self.axes[2]]
        rows += [window.kernel_size for window in self.windows]
        return inputs[0].new_empty(*shape, *rows, *rows)

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions, those included that symmetry saves."""
        return self._flops(inputs[0], 1)

    def work(self, *inputs: Tensor) -> float:
        """Small matrices waste some; of symmetric products, half is saved."""
        work = float(self._flops(inputs[0], WIDTH))
        if self.method == "unfolding":
            _, examples, channels, positions = self._sizes(inputs[0])
            work *= symmetric_share(channels * self._kernel, examples * positions)
        return work

    def convolved(self, *inputs: Tensor) -> float:
        """Types without kernels of their own are unfolded for it."""
        if self.method != "lags":
            return 0
        shared, examples, channels, _ = self._sizes(inputs[0])
        waste = 1 if has_depthwise_kernels(inputs[0]) else UNFOLDED_WASTE
        lags = lags_of_classes(self.windows)
        pairs = sum(prod(lag.positions * lag.number for lag in joint) for joint in lags)
        return 2.0 * waste * shared * examples * pairs * max(channels, WIDTH) ** 2

    def by_blas(self, *inputs: Tensor) -> bool:
        """Whether the products are small, or lie such that they had to be copied."""
        x = inputs[0]
        shared, examples, channels, positions = self._sizes(x)
        rows, terms, aligned = channels, examples * positions, False
        if self.method == "correlations":
            return True
        if self.method == "unfolding":
            groups, chunks = self._chunks(x)
            shared, aligned = shared // groups, True
            rows, terms = channels * self._kernel, examples * positions // chunks
        if self.method == "positions":
            rows, terms = channels * prod(window.size for window in self.windows), examples
        if self.method == "spectra":
            shared, terms = 2, 2 * examples  # several frequencies
        large = x.dtype is torch.float32 and gemm.worth(shared, rows, terms, rows)
        return not large or not (aligned or rows >= gemm.LEAST_COPY)

    def _flops(self, x: Tensor, width: int) -> int:
        shared, examples, channels, positions = self._sizes(x)
        if self.method == "lags":
            pairs = amounts(self.windows, True).border
            return 2 * shared * examples * pairs * max(channels, width) ** 2
        if self.method == "spectra":
            there, frequencies = amounts(self.windows, True), number_of_frequencies(self.windows)
            pairs = 3 * frequencies + there.border
            back = 2 * there.offsets * frequencies * self._chunks_of_spectra(x)
            return 2 * shared * (examples * pairs + back) * max(channels, width) ** 2
        if self.method == "unfolding":
            size = max(channels * self._kernel, width)
            return 2 * shared * size**2 * examples * positions
        if self.method == "cells":
            return 2 * shared * examples * amounts(self.windows).pairs * max(channels, width) ** 2
        if self.method == "positions":
            pairs = max(channels * prod(w.size for w in self.windows), width) ** 2
            total = examples * pairs
            if at_once(channels, self.windows):
                return 2 * shared * (total + pairs * max(self._kernel**2, width))
            for window in self.windows:
                total += pairs * window.kernel_size**2
                pairs = pairs * window.kernel_size**2 // window.size**2
            return 2 * shared * total
        outer = self._rows_and_offsets
        across = sum(count * wide for count, wide in stretches(self.windows[-1], channels))
        rows = sum(count * offsets for count, offsets in outer)
        return 2 * shared * examples * rows * across * channels**2

    def moved(self, *inputs: Tensor) -> int:
        """Elements read and written on the way: copies, and products added to blocks."""
        x = inputs[0]
        shared, examples, channels, positions = self._sizes(x)
        result = shared * (channels * self._kernel) ** 2
        if self.method == "unfolding":
            copied = positions * examples * channels * self._kernel * shared
            apart, added = self._chunks(x)
            view = not self.windows and (1 in (examples, positions) or added == examples)
            times = (2 if self.windows else 1) + 2 * (copied > apart * added * NEAR)
            written = (WRITTEN if self.windows else 0) + 2 * (added - 1)
            return written * result + (0 if view else times * copied)
        if self.method == "cells":
            there = amounts(self.windows)
            rows = self.windows[0].size * shared * examples * channels
            blocks = shared * channels**2 * (there.cells + there.sums)
            return 3 * there.copied * rows + 2 * x.numel() + blocks + WRITTEN * result
        if self.method == "lags":
            there = amounts(self.windows, True)
            all_lags = lags_of_classes(self.windows)
            lags = sum(prod(lag.number for lag in joint) for joint in all_lags)
            once = COPIES_OF_LAGS * x.numel() * len(all_lags)
            blocks = there.cells + there.sums + LAG * lags * self._chunks_of_lags(x)
            return once + shared * channels**2 * blocks + WRITTEN * result
        if self.method == "spectra":
            there, frequencies = amounts(self.windows, True), number_of_frequencies(self.windows)
            transformed = TRANSFORM * 2 * frequencies * shared * examples * channels
            blocks = there.cells + there.sums + LAG * there.offsets + 3 * frequencies
            return x.numel() + transformed + shared * channels**2 * blocks + WRITTEN * result
        if self.method == "positions":
            pairs = shared * channels**2 * self._position_pairs
            copies = 0 if at_once(channels, self.windows) else len(self.windows)
            return pairs + (3 * copies * pairs) // 2 + 2 * result
        across = sum(count * wide for count, wide in stretches(self.windows[-1], channels))
        offsets = sum(number for _, number in self._rows_and_offsets)
        return 8 * x.numel() + 3 * shared * offsets * across * channels**2 + 4 * result

    def launches(self, *inputs: Tensor) -> int:
        """Number of operations on tensors."""
        if self.method == "unfolding":
            return 5 * prod(self._chunks(inputs[0]))
        if self.method == "cells":
            there = amounts(self.windows)
            return 4 * there.cells + 6 * there.offsets + 4 * self._kernel + there.sums
        if self.method == "lags":
            there = amounts(self.windows, True)
            calls = 12 * len(lags_of_classes(self.windows)) * self._chunks_of_lags(inputs[0])
            return calls + 4 * there.cells + 6 * there.offsets + 4 * self._kernel + there.sums
        if self.method == "spectra":
            there, (shared, _, channels, _) = amounts(self.windows, True), self._sizes(inputs[0])
            elements = shared * channels**2
            limit = most_elements(inputs[0].numel(), elements * self._kernel**2)
            products = -(-number_of_frequencies(self.windows) * elements // limit)
            calls = 50 + (10 * products + 8 * PARTS) * self._chunks_of_spectra(inputs[0])
            return calls + 4 * there.cells + 6 * there.offsets + 4 * self._kernel + there.sums
        if self.method == "positions":
            chunks = -(-self._sizes(inputs[0])[0] // self._groups_at_once(inputs[0]))
            return 12 * len(self.windows) + chunks * (3 + 4 * len(self.windows))
        offsets = sum(number for _, number in self._rows_and_offsets)
        taps = sum(prod(len(members) for _, _, members in cells) for cells in self._cells)
        channels = self._sizes(inputs[0])[2]
        products = 3 + 8 * len(stretches(self.windows[-1], channels))
        return offsets * products + 3 * taps + 5 * len(self.windows)

    def held(self, *inputs: Tensor) -> int:
        """Elements held on the way, besides arguments and result."""
        x = inputs[0]
        shared, examples, channels, positions = self._sizes(x)
        if self.method == "unfolding":
            unfolded = positions * examples * channels * self._kernel * shared
            return x.numel() + min(unfolded, max(x.numel(), LEAST_CHUNK))
        if self.method == "cells":
            there = amounts(self.windows)
            grams = (there.cells + there.sums) * shared * channels**2
            result = shared * (channels * self._kernel) ** 2
            copies = min(COPIES * x.numel(), max(x.numel(), LEAST_CHUNK, result // LITTLE))
            return x.numel() + copies + grams
        if self.method == "lags":
            there = amounts(self.windows, True)
            lags = sum(prod(lag.number for lag in joint) for joint in lags_of_classes(self.windows))
            grams = (there.cells + there.sums + lags) * shared * channels**2
            return max(x.numel(), LEAST_CHUNK) + grams
        if self.method == "spectra":
            there, frequencies = amounts(self.windows, True), number_of_frequencies(self.windows)
            grams = (there.cells + there.sums + 3 * there.offsets) * shared * channels**2
            spectra = 2 * frequencies * x.numel() // prod(w.size for w in self.windows)
            chunk = most_elements(x.numel(), shared * (channels * self._kernel) ** 2)
            return spectra // self._chunks_of_spectra(x) + chunk + grams
        if self.method == "positions":
            return 2 * self._groups_at_once(x) * channels**2 * self._position_pairs
        return 2 * x.numel()

    def _groups_at_once(self, x: Tensor) -> int:
        shared, examples, channels, _ = self._sizes(x)
        return groups_at_once((shared, examples, channels), self.windows)

    def _chunks_of_spectra(self, x: Tensor) -> int:
        shared, examples, channels, _ = self._sizes(x)
        return chunks((shared, examples, channels, *(w.size for w in self.windows)), self.windows)

    def _chunks_of_lags(self, x: Tensor) -> int:
        shared, examples, channels, _ = self._sizes(x)
        shape = shared, examples, channels, x.numel() // (shared * examples * channels)
        return -(-examples // examples_at_once(shape, self.windows, COPIES_OF_LAGS))

    @property
    def _position_pairs(self) -> int:
        return prod(window.size for window in self.windows) ** 2

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        """Shared, examples, channels and positions."""
        shared, examples, channels, sizes = (
            prod(x.shape[axis] for axis in group) for group in self.axes
        )
        if self.windows:
            sizes = prod(window.output_size for window in self.windows)
        return shared, examples, channels, sizes

    def _chunks(self, x: Tensor) -> tuple[int, int]:
        """Numbers of chunks whose results are apart, and of those that are added up."""
        shared, examples, channels, positions = self._sizes(x)
        groups, count, rows = division((shared, examples, channels), self.windows, positions)
        outputs = self.windows[0].output_size if self.windows else positions
        return -(-shared // groups), -(-examples // count) * -(-outputs // rows)

    @property
    def _kernel(self) -> int:
        return prod(window.kernel_size for window in self.windows)

    @property
    def _cells(self) -> list[tuple[TapCell, ...]]:
        return list(product(*map(cells_of_taps, self.windows[:-1])))

    @property
    def _rows_and_offsets(self) -> list[tuple[int, int]]:
        """Of each cell, positions along all axes but the last, and offsets."""
        found = []
        for cells in self._cells:
            offsets = [
                window.kernel_size - min(taps) + (max(taps) if axis else 0)
                for axis, ((_, _, taps), window) in enumerate(
                    zip(cells, self.windows, strict=False)
                )
            ]
            found.append((prod(count for _, count, _ in cells), prod(offsets)))
        return found


def _in_place(
    tensor: Tensor, axes: tuple[tuple[int, ...], ...], windows: tuple[Windows, ...], method: str
) -> tuple[tuple[tuple[int, ...], ...], tuple[Windows, ...]]:
    """Axes that are summed over, behind channels, as windows of one position: else all is copied.

    These are the last, where cells are views along the first axis.
    """
    shared, examples, own, last = axes
    behind = [axis for axis in examples if axis > max(own, default=axis)]
    if not windows or not behind or method not in ("cells", "lags", "unfolding"):
        return axes, windows
    if method == "lags" and len(windows) + len(behind) > MOST_AXES:
        return axes, windows
    found = dict(zip(last, windows, strict=True))
    found |= {axis: Windows(0, 1, size := tensor.shape[axis], 1, 1, size) for axis in behind}
    order = sorted(found, key=lambda axis: (method == "cells" and axis in behind, axis))
    others = tuple(axis for axis in examples if axis not in behind)
    return (shared, others, own, tuple(order)), tuple(found[axis] for axis in order)


# torch.compile takes the method as one call, and traces what it does on tensors.
COMPUTE[WindowGram.__name__] = torch.compiler.allow_in_graph(WindowGram.compute)
