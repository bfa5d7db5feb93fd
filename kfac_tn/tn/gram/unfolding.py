"""The Gram matrix of windows by unfolding: chunk after chunk, each product added in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.gram.symmetric import SymmetricSum
from kfac_tn.tn.gram.windows import Windows, fit, unfold

LEAST_CHUNK = 2**18
"""Elements of a chunk that are never too many: less work would not be worth a launch."""

IN_PLACE = 1024
"""Positions from which on single examples are multiplied where they are, instead of copied."""


def gram_by_unfolding(x: Tensor, windows: tuple[Windows, ...], scale: float = 1.0) -> Tensor:
    """Unfold and multiply, in chunks that hold at most as many elements as the tensor itself.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes. None: `[shared, examples, channels, positions]`, and
            positions themselves are the columns.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    outputs = [window.output_size for window in windows] or [x.shape[3]]
    groups, *_ = division(x.shape[:3], windows, prod(outputs))
    parts = [_gram(part, windows, scale) for part in x.split(groups)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _gram(x: Tensor, windows: tuple[Windows, ...], scale: float) -> Tensor:
    size = x.shape[2] * prod(window.kernel_size for window in windows)
    total = SymmetricSum()
    few: float | None = None
    for columns in _columns(x, windows, size):
        if few is None:  # the smaller of columns and result is scaled
            few = scale if columns.shape[-1] < size else 1.0
        total.add(columns, few)
        del columns  # before the next ones are made
    return total.result(1.0 if few == scale else scale)


def division(
    shape: Sequence[int], windows: tuple[Windows, ...], positions: int
) -> tuple[int, int, int]:
    """How many groups, examples, and outputs along the first axis are unfolded at once.

    Args:
        shape: Shared, examples, channels.
        windows: Of each axis, or none.
        positions: Number of outputs, or of positions if there are no windows.
    """
    shared, examples, channels = shape
    outputs = windows[0].output_size if windows else positions
    if not windows:
        if 1 in (examples, positions):
            return shared, examples, outputs  # a view
        if positions >= max(IN_PLACE, channels):
            return shared, 1, outputs
    elements = prod(window.size for window in windows) if windows else positions
    limit = max(shared * examples * channels * elements, LEAST_CHUNK)
    columns = limit // (channels * prod(window.kernel_size for window in windows))
    if columns >= examples * positions:  # groups are independent: their results needn't be added
        return min(shared, columns // (examples * positions)), examples, outputs
    if columns >= positions or not windows:
        return 1, max(1, columns // positions), outputs
    return 1, 1, max(1, columns * outputs // positions)


def _columns(x: Tensor, windows: tuple[Windows, ...], size: int) -> Iterator[Tensor]:
    """The unfolded tensor, `[shared, d, columns]`, in chunks."""
    outputs = [window.output_size for window in windows] or [x.shape[3]]
    shared = len(x)
    _, count, rows = division(x.shape[:3], windows, prod(outputs))
    for chunk in x.split(count, 1):
        for start in range(0, outputs[0], rows):
            columns = chunk
            if windows:
                first, *others = windows
                first = first._replace(
                    start=first.start + start * first.stride,
                    output_size=min(rows, outputs[0] - start),
                )
                part = (first, *others)
                columns = unfold(fit(chunk, 3, part), 3, part)
            # From [shared, examples, channels, *kernels, *outputs]:
            axes = range(2, columns.ndim)
            kernels, rest = axes[: 1 + len(windows)], axes[1 + len(windows) :]
            yield columns.permute(0, *kernels, 1, *rest).reshape(shared, size, -1)
