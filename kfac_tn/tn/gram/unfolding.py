"""The Gram matrix of windows by unfolding: chunk after chunk, each product added in place."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.gram.windows import Windows, add_product, fit, unfold

LEAST_CHUNK = 2**18
"""Elements of a chunk that are never too many: less work would not be worth a launch."""

IN_PLACE = 64
"""Positions from which on single examples are multiplied where they are, instead of copied."""

LEAST_BLOCK = 128
"""Rows of the result that are computed at once, at the least, where its symmetry is used."""

LEAST_SUM = 256
"""Terms of the sums from which on to multiply costs more than to mirror the result."""

MOST_BLOCKS = 8
"""Blocks of rows at the most: more would save little."""


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
    size = x.shape[2] * prod(window.kernel_size for window in windows)
    starts: list[int] = []
    blocks: list[Tensor] = []
    few = False
    for columns in _columns(x, windows, size):
        starts = starts or _block_starts(size, columns.shape[-1])
        few = scale != 1 and columns.shape[-1] < size
        for at, (start, end) in enumerate(zip(starts, [*starts[1:], size], strict=True)):
            rows, others = columns[:, start:end], columns[:, :end].mT
            if few:
                rows = rows * scale
            if at < len(blocks):
                add_product(blocks[at], rows, others)
            else:
                blocks.append(torch.bmm(rows, others))
    if scale != 1 and not few:
        blocks = [block.mul_(scale) for block in blocks]
    return blocks[0] if len(blocks) == 1 else _mirrored(starts, blocks)


def division(
    sizes: tuple[int, int, int], elements: int, windows: tuple[Windows, ...], positions: int
) -> tuple[int, int]:
    """How many examples, and how many outputs along the first axis, are unfolded at once.

    Args:
        sizes: Shared, examples, channels.
        elements: Number of elements of the tensor.
        windows: Of each axis, or none.
        positions: Number of outputs, or of positions if there are no windows.
    """
    shared, examples, channels = sizes
    outputs = windows[0].output_size if windows else positions
    if not windows:
        if 1 in (examples, positions):
            return examples, outputs  # a view
        if positions >= max(IN_PLACE, channels):
            return 1, outputs
    limit = max(elements, LEAST_CHUNK)
    columns = limit // (shared * channels * prod(window.kernel_size for window in windows))
    if columns >= positions or not windows:
        return min(examples, max(1, columns // positions)), outputs
    return 1, max(1, columns * outputs // positions)


def _columns(x: Tensor, windows: tuple[Windows, ...], size: int) -> Iterator[Tensor]:
    """The unfolded tensor, `[shared, d, columns]`, in chunks."""
    outputs = [window.output_size for window in windows] or [x.shape[3]]
    shared, examples, channels = x.shape[:3]
    count, rows = division((shared, examples, channels), x.numel(), windows, prod(outputs))
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


def _block_starts(size: int, terms: int) -> list[int]:
    """First rows of the blocks of which only those on and below the diagonal are computed."""
    if size < 2 * LEAST_BLOCK or terms < LEAST_SUM:
        return [0]
    return list(range(0, size, max(LEAST_BLOCK, -(-size // MOST_BLOCKS))))


def symmetric_share(size: int, terms: int) -> float:
    """Share of a symmetric product that is computed."""
    starts = _block_starts(size, terms)
    ends = [*starts[1:], size]
    return sum((end - start) * end for start, end in zip(starts, ends, strict=True)) / size**2


def _mirrored(starts: list[int], blocks: list[Tensor]) -> Tensor:
    """The matrix whose rows up to the diagonal are the blocks, and that is symmetric."""
    size = blocks[-1].shape[-1]
    total = blocks[0].new_empty(len(blocks[0]), size, size)
    for start, block in zip(starts, blocks, strict=True):
        end = start + block.shape[1]
        total[:, start:end, :end] = block
        total[:, :start, start:end] = block[:, :, :start].mT
    return total
