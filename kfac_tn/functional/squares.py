"""Sums of squared per-example weight gradients, by the algorithm that suits a layer's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kfac_tn.functional import common
from kfac_tn.functional.common import accumulation_dtype, cast, full_precision
from kfac_tn.functional.pairs import Pair, products_over_positions
from kfac_tn.tn import gemm

LARGE = 2**22
"""Multiplications of an example's gradients that are worth products of their own."""

FEW = 8
"""Gradients of a chunk that are squared and added one by one: so many launches cost less than to
write their squares."""

SQUARING = 16
"""Positions whose products take as long as to write a gradient and to add its square (measured on a
CPU: 22 at 512 channels, whose gradient is larger than the cache, 3 at 256)."""

Algorithm = Callable[[Pair, Tensor, int], None]


def sum_squared_gradients(
    pair: Pair, max_memory: int | None = None, algorithm: str | None = None
) -> Tensor:
    """Sum over columns and examples of squared weight gradients, `[groups, d_out, d_in]`.

    Args:
        pair: The layer's input and gradients of its output.
        max_memory: Most bytes to hold besides these and the result. Default:
            `common.UNFOLD_BYTES`, or what one gradient takes if that is more.
        algorithm: One of `ALGORITHMS` that applies. Default: as `choose` says.

    Raises:
        ValueError: If one gradient takes more than `max_memory`.
    """
    groups, d_out, d_in, _ = pair.shape
    limit = common.UNFOLD_BYTES if max_memory is None else max_memory
    if max_memory is not None:
        _check_memory(pair, max_memory)
    algorithm = algorithm or choose(pair, limit)
    total = pair.x.new_zeros((groups, d_out, d_in), dtype=accumulation_dtype(pair.x))
    with full_precision(pair.x):
        ALGORITHMS[algorithm](pair, total, limit)
    return total


def choose(pair: Pair, limit: int) -> str:
    """The algorithm that is the fastest by the count of products.

    - `"one position"`: `(g a^T)^2` is `g^2 (a^2)^T`, so that all gradients take one product.
    - `"positions"`: pairs of positions, summed over columns first; see `_pairs_of_positions`.
    - `"direct"`: each gradient by torch's own kernel, nothing unfolded.
    - `"gradients"`: each gradient, from vectors `a` that its columns share.
    """
    _, d_out, _, positions = pair.shape
    columns = len(pair.g)
    if positions == 1:
        return "one position"
    if is_for_pairs(positions, columns) and sum(_bytes_of_pairs(pair)) <= limit:
        return "positions"
    # To unfold takes time with `d_in R`; torch's kernel loses time with its result, `d_out d_in`.
    direct = pair.direct is not None and positions > columns * d_out
    return "direct" if direct and _is_for_one_dnn(pair.g) else "gradients"


def is_for_pairs(positions: int, columns: int) -> bool:
    """Whether it takes fewer products to sum over columns first, of all pairs of positions."""
    return positions > 1 and positions * (positions + 1) < 2 * columns * (positions + SQUARING)


def _is_for_one_dnn(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling()


# ---- algorithms ------------------------------------------------------------------------------


def _one_position(pair: Pair, total: Tensor, limit: int) -> None:
    for vectors, rows in _chunks(pair, limit):
        squares = rows.squeeze(-1).square().sum(0)
        total.baddbmm_(squares.permute(1, 2, 0), vectors.squeeze(-1).square().transpose(0, 1))


def _gradients(pair: Pair, total: Tensor, limit: int) -> None:
    if _is_large(pair, len(pair.g)):
        _large_gradients(pair, total, limit)
        return
    for vectors, rows in _chunks(pair, limit):
        gradients = products_over_positions(rows, vectors)
        examples, _, columns = gradients.shape[:3]
        if examples * columns > FEW:
            total += gradients.square().sum((0, 2))
            continue
        for gradient in gradients.movedim(2, 1).flatten(0, 1):
            total.addcmul_(gradient, gradient)


def _large_gradients(pair: Pair, total: Tensor, limit: int) -> None:
    """Example by example, in blocks that stay in the cache until they are squared.

    With `d_in` first: so the smaller factor is the one that a library lays out anew.
    """
    squares = total.new_zeros(total.mT.shape)
    for vectors, rows in _chunks(pair, limit):
        gradients = len(rows) * total[0].nbytes
        blocks = -(-2 * gradients // common.CACHE_BYTES)
        for group, parts in enumerate(squares):
            for block, square in zip(
                vectors[:, group].chunk(blocks, 1), parts.chunk(blocks), strict=True
            ):
                for n, a in enumerate(block):
                    products = _multiply(a, rows[:, n, group].flatten(0, 1))
                    for gradient in products.unflatten(1, (len(rows), -1)).unbind(1):
                        square.addcmul_(gradient, gradient)
    total += squares.mT


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return gemm.multiply(a.unsqueeze(0), b.mT.unsqueeze(0)).squeeze(0)


def _direct(pair: Pair, total: Tensor, limit: int) -> None:
    assert pair.direct is not None
    for n in range(len(pair.x)):
        for g in pair.g[:, n : n + 1]:
            gradient = pair.direct(pair.x[n : n + 1], g)
            total.addcmul_(gradient, gradient)


def _pairs_of_positions(pair: Pair, total: Tensor, limit: int) -> None:
    """`sum_v (sum_r g_v[r] a[r])^2 = sum_rs (sum_v g_v[r] g_v[s]) a[r] a[s]`.

    So columns are summed over before anything is multiplied with the input, and examples by the
    product. Of two positions in either order, one is enough; pairs come by their distance, of which
    each is a slice.
    """
    positions = pair.shape[-1]
    example, fixed = _bytes_of_pairs(pair)
    chunks = -(-len(pair.x) // max(1, (limit - fixed) // example))
    size = -(-len(pair.x) // chunks)  # of each chunk, about the same
    for start in range(0, len(pair.x), size):
        chunk = slice(start, start + size)
        # Examples last: [groups, d_in, R, n] and [groups, V, d_out, R, n].
        a = cast(pair.vectors(pair.x[chunk])).permute(1, 2, 3, 0).contiguous()
        g = cast(pair.rows(pair.g[:, chunk])).permute(2, 0, 3, 4, 1).contiguous()
        for distance in range(positions):
            left, right = slice(positions - distance), slice(distance, None)
            input_pairs = (a[:, :, left] * a[:, :, right]).flatten(2)
            pairs = (g[:, :, :, left] * g[:, :, :, right]).sum(1).flatten(2)
            if distance:
                pairs *= 2
            for group in range(len(total)):
                total[group] += _multiply(pairs[group], input_pairs[group])
    total.clamp_(min=0)  # what cancels may leave less than nothing


ALGORITHMS: dict[str, Algorithm] = {
    "one position": _one_position,
    "positions": _pairs_of_positions,
    "direct": _direct,
    "gradients": _gradients,
}


# ---- memory ----------------------------------------------------------------------------------


def _chunks(pair: Pair, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Vectors, `[n, groups, d_in, R]`, with each chunk of rows, `[v, n, groups, d_out, R]`."""
    columns, examples = pair.g.shape[:2]
    width, size = _chunk_sizes(pair, limit)
    for start in range(0, examples, size):
        chunk = slice(start, start + size)
        vectors = cast(pair.vectors(pair.x[chunk]))
        for first in range(0, columns, width):
            yield vectors, cast(pair.rows(pair.g[first : first + width, chunk]))


def _chunk_sizes(pair: Pair, limit: int) -> tuple[int, int]:
    """Numbers of columns and of examples whose gradients are computed at once."""
    columns = len(pair.g)
    example, gradient = _bytes_of_gradients(pair)
    # A CPU squares gradients best as long as they are in its cache.
    share = min(limit, common.CACHE_BYTES) if pair.x.device.type == "cpu" else limit
    width = min(columns, max(1, min(share, limit - example) // gradient))
    if _is_large(pair, columns):  # gradients of one example at a time
        return width, max(1, min(share, limit - width * gradient) // example)
    size = min(share // (width * gradient), limit // (example + width * gradient))
    return width, max(1, size)


def _is_large(pair: Pair, columns: int) -> bool:
    """Whether the gradients of an example are worth a call of their own."""
    _, d_out, d_in, positions = pair.shape
    return columns * d_out * d_in * positions >= LARGE


def _bytes_of_gradients(pair: Pair) -> tuple[int, int]:
    """Of an example: its unfolded input, and what that takes; of a gradient: it and its square."""
    groups, d_out, d_in, positions = pair.shape
    size = groups * accumulation_dtype(pair.x).itemsize
    return (
        3 * size * d_in * positions,
        2 * size * d_out * (positions + (d_in if positions > 1 else 0)),
    )


def _bytes_of_pairs(pair: Pair) -> tuple[int, int]:
    """Of an example: what is unfolded, laid out anew and multiplied; of all of them: the result."""
    groups, d_out, d_in, positions = pair.shape
    size = groups * accumulation_dtype(pair.x).itemsize
    example = size * positions * (4 * d_in + (3 * len(pair.g) + 2) * d_out)
    return example, 2 * size * d_out * d_in


def _check_memory(pair: Pair, max_memory: int) -> None:
    needed = sum(_bytes_of_gradients(pair))
    if max_memory < needed:
        groups, d_out, d_in, _ = pair.shape
        raise ValueError(
            f"max_memory={max_memory:,} bytes is too little: one gradient, of shape "
            f"{groups, d_out, d_in}, takes {needed:,}"
        )
