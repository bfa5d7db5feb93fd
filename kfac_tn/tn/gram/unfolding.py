"""The Gram matrix of windows by unfolding: chunk after chunk, each product added in place.

Whatever is held besides the result, at any time, is no larger than a padded copy of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

from torch import Tensor

from kfac_tn.tn.gram.symmetric import SymmetricSum, rows_at_once
from kfac_tn.tn.gram.windows import Windows, fit, padded_size, unfold

LEAST_CHUNK = 2**18
"""Elements of a chunk that are never too many: less work would not be worth a launch."""

LEAST_TERMS = 512
"""Terms of a chunk's products, at the least, where results are large: each is added to them."""

SCRATCH = 2**17
"""Elements that a product takes besides, whatever its size: a library's own memory."""

IN_PLACE = 2048
"""Positions from which on single, large examples are multiplied where they are."""

AT_ONCE = 2**20
"""Elements of smaller ones that are laid side by side, at the most (of many channels, more): a few
large products are faster than one for each example, and to copy from and to a cache is cheap."""


def gram_by_unfolding(x: Tensor, windows: tuple[Windows, ...], scale: float = 1.0) -> Tensor:
    """Unfold and multiply, in chunks.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes. None: `[shared, examples, channels, positions]`, and
            positions themselves are the columns.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    positions = prod(window.output_size for window in windows) if windows else x.shape[3]
    groups, *at_once = division(tuple(map(int, x.shape[:3])), windows, int(positions))
    if groups >= len(x):
        return _gram(x, windows, at_once, scale)
    size = x.shape[2] * prod(window.kernel_size for window in windows)
    result = x.new_empty(len(x), size, size)
    for start in range(0, len(x), groups):
        part = x[start : start + groups]
        result[start : start + groups] = _gram(part, windows, at_once, scale)
    return result


def _gram(x: Tensor, windows: tuple[Windows, ...], at_once: list[int], scale: float) -> Tensor:
    total = SymmetricSum()
    few: float | None = None
    for columns in _columns(x, windows, *at_once):
        size = columns.shape[1]
        if few is None:  # the smaller of columns and result is scaled
            few = scale if columns.shape[-1] < size else 1.0
        total.add(columns, few)
        del columns  # before the next ones are made
    return total.result(1.0 if few == scale else scale)


def side_by_side(channels: int, positions: int) -> int:
    """How many examples are laid side by side for one product; 1: each is multiplied in place."""
    size = channels * positions
    if positions >= max(IN_PLACE, channels) and size >= LEAST_CHUNK:
        return 1
    return max(1, max(AT_ONCE, 4 * LEAST_TERMS * channels) // size)


@lru_cache(maxsize=512)
def division(
    shape: tuple[int, ...], windows: tuple[Windows, ...], positions: int
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
        most = side_by_side(shared * channels, positions)
        if most == 1:
            return shared, 1, outputs
    kernel = prod(window.kernel_size for window in windows)
    size, padded = channels * kernel, channels * padded_size(windows, positions)
    allowed = shared * examples * padded
    # An example is copied (with zeros around it first), then multiplied, a block of rows at a time.
    rows = rows_at_once(size)
    copied = size * positions + padded * any(max(window.overhang) > 0 for window in windows)
    multiplied, product = (size + rows) * positions, size * rows + SCRATCH
    groups = shared
    while groups > 1:  # independent: their results needn't be added
        count = groups * examples
        held = max(count * copied, count * multiplied + groups * product)
        if held + (groups < shared) * groups * size**2 <= allowed:
            return groups, examples, outputs
        groups //= 2
    share = min(allowed / copied, (allowed - product) / multiplied)  # of examples
    share = share if windows else min(share, most)
    share = max(share, LEAST_CHUNK / (size * positions), min(LEAST_TERMS, size) / positions)
    if share >= 1 or not windows:
        chunks = -(-examples // max(1, int(share)))
        return 1, -(-examples // chunks), outputs
    return 1, 1, max(1, int(share * outputs))


def _columns(
    x: Tensor, windows: tuple[Windows, ...], examples: int, outputs: int
) -> Iterator[Tensor]:
    """The unfolded tensor, `[shared, d, columns]`, in chunks."""
    size = windows[0].output_size if windows else outputs
    for chunk in x.split(examples, 1) if examples < x.shape[1] else (x,):
        for start in range(0, size, outputs):
            yield _unfolded(chunk, windows, start, min(outputs, size - start))


def _unfolded(chunk: Tensor, windows: tuple[Windows, ...], start: int, outputs: int) -> Tensor:
    """Some outputs along the first axis; zeros are put around for them alone."""
    columns = chunk
    if windows:
        first, *others = windows
        first = first._replace(start=first.start + start * first.stride, output_size=outputs)
        part = (first, *others)
        columns = unfold(fit(chunk, 3, part), 3, part)
    # From [shared, examples, channels, *kernels, *outputs]:
    axes = range(2, columns.ndim)
    kernels, rest = axes[: 1 + len(windows)], axes[1 + len(windows) :]
    size = prod(columns.shape[axis] for axis in kernels)
    return columns.permute(0, *kernels, 1, *rest).reshape(len(chunk), size, -1)
