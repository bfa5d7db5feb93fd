"""Sums of squared per-example weight gradients, by the algorithm that suits a layer's shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kfac_tn.functional import common, winograd
from kfac_tn.functional.common import accumulation_dtype, cast
from kfac_tn.functional.pairs import Pair, products_over_positions
from kfac_tn.functional.winograd import KERNEL
from kfac_tn.tn import gemm
from kfac_tn.tn.autocast import full_precision

LARGE = 2**22
"""Multiplications of an example's gradients that are worth products of their own."""

ENOUGH = 5
"""Columns that are worth being held, so that an input is unfolded once for all of them: half of
what ten classes have."""

FEW = 8
"""Gradients of a chunk that are squared and added one by one: so many launches cost less than to
write their squares."""

LONG = 64
"""Positions for each input of few outputs, up to which products of matrices beat torch's kernel."""

ROWS = 768
"""Rows of output gradients, of several columns, that are multiplied at once."""

SQUARING = 16
"""Positions whose products take as long as to write a gradient and to add its square (measured on a
CPU: 22 at 512 channels, whose gradient is larger than the cache, 3 at 256)."""

TILING = 256
"""Positions whose products take as long as to make a gradient of products of tiles (measured on a
CPU: of 1024 positions, tiles take 0.7 to 0.85 of the time, for 256 nearly as long as without)."""

PAIRING = 16
"""Products that take as long as to multiply and add one pair of numbers."""

Algorithm = Callable[[Pair, int], Tensor]


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
    limit = common.UNFOLD_BYTES if max_memory is None else max_memory
    if max_memory is not None:
        _check_memory(pair, max_memory)
    with full_precision(pair.x):
        return ALGORITHMS[algorithm or choose(pair, limit)](pair, limit)


def choose(pair: Pair, limit: int) -> str:
    """The algorithm that is the fastest by the count of products.

    - `"one position"`: `(g a^T)^2` is `g^2 (a^2)^T`, so that all gradients take one product.
    - `"positions"`: pairs of positions, summed over columns first; see `_pairs_of_positions`.
    - `"direct"`: gradients by torch's own kernels, nothing unfolded.
    - `"tiles"`: each gradient, by half of the products.
    - `"gradients"`: each gradient, from vectors `a` that its columns share.
    """
    _, d_out, d_in, positions = pair.shape
    columns = len(pair.g)
    if positions == 1:
        return "one position"
    if pair.suits_direct:
        return "direct"
    if is_for_pairs(d_out, d_in, positions, columns) and sum(_bytes_of_pairs(pair, limit)) <= limit:
        return "positions"
    if _is_for_tiles(pair) and sum(_bytes_of_tiles(pair)) <= limit:
        return "tiles"
    # To unfold takes time with `d_in R`, once for all columns; torch's kernel loses time with its
    # result, `d_out d_in`.
    direct = pair.direct is not None and columns == 1 and positions > d_out
    return "direct" if direct and pair.by_one_dnn else "gradients"


def columns_together(d_out: int, d_in: int, positions: int, columns: int) -> int:
    """Of so many columns, how many are squared faster at once than one after the other.

    All where they are summed over first, or where a few outputs share an input that is unfolded.
    One where that saves nothing: it is the output gradients that are laid out anew.
    """
    if positions == 1 or is_for_pairs(d_out, d_in, positions, columns):
        return columns
    if d_out <= FEW:
        return columns if positions <= LONG * d_in else 1
    return min(columns, ENOUGH) if d_out <= 2 * d_in else 1


def is_for_pairs(d_out: int, d_in: int, positions: int, columns: int) -> bool:
    """Whether it takes fewer products to sum over columns first, of all pairs of positions."""
    pairs = positions * (positions + 1) / 2
    made = PAIRING * (1 / d_out + columns / d_in)  # of either side, for each product
    return positions > 1 and pairs * (1 + made) < columns * (positions + SQUARING)


def _is_for_tiles(pair: Pair) -> bool:
    """Whether half of the products take longer than all that is made of and for the others."""
    _, d_out, d_in, positions = pair.shape
    columns = len(pair.g)
    if pair.tiles is None or not _is_large(pair, columns) or not pair.by_one_dnn:
        return False
    made = PAIRING * (1 / d_in + 1 / (d_out * columns))  # of either side, for each product
    return positions * (1 / 2 - made) > TILING


# ---- algorithms ------------------------------------------------------------------------------


def _one_position(pair: Pair, limit: int) -> Tensor:
    total: Tensor | None = None
    for vectors, columns, examples in _chunks(pair, limit):
        g = pair.read(columns, examples).squeeze(-1).square().sum(0).permute(1, 2, 0)
        x = vectors.squeeze(-1).square().transpose(0, 1)
        total = gemm.multiply(g, x) if total is None else total.baddbmm_(g, x)
    assert total is not None
    return total


def _gradients(pair: Pair, limit: int) -> Tensor:
    if _is_large(pair, len(pair.g)):
        return _large_gradients(pair, limit)
    total = _zeros(pair)
    for vectors, columns, examples in _chunks(pair, limit):
        gradients = products_over_positions(pair.read(columns, examples), vectors)
        _add_squares(total, gradients)
    return total


def _large_gradients(pair: Pair, limit: int) -> Tensor:
    """Example by example, in blocks of `d_in` that stay in a cache until they are squared."""
    total = _zeros(pair)
    for vectors, columns, examples in _chunks(pair, limit):
        width = columns.stop - columns.start
        blocks = -(-width * total[0].nbytes // (common.CACHE_BYTES // 2))
        size = -(-total.shape[-1] // blocks)
        rows = pair.read(columns, examples)
        for n, example in enumerate(vectors):
            for group, a in enumerate(example):
                g = rows[:, n, group].flatten(0, 1)
                for first in range(0, total.shape[-1], size):
                    block = slice(first, first + size)
                    for gradient in _multiply(g, a[block]).chunk(width):
                        total[group, :, block].addcmul_(gradient, gradient)
    return total


def _zeros(pair: Pair) -> Tensor:
    groups, d_out, d_in, _ = pair.shape
    return pair.x.new_zeros((groups, d_out, d_in), dtype=accumulation_dtype(pair.x))


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return gemm.multiply(a.unsqueeze(0), b.mT.unsqueeze(0)).squeeze(0)


def _tiles(pair: Pair, limit: int) -> Tensor:
    """Example by example, by half of the products; see `kfac_tn.functional.winograd`."""
    assert pair.tiles is not None
    groups, d_out, d_in, _ = pair.shape
    total = _zeros(pair)
    sums = total.view(groups, KERNEL, d_out, d_in // KERNEL)
    width = _columns_of_tiles(pair, limit)
    for n in range(len(pair.x)):
        example = slice(n, n + 1)
        tiles = pair.tiles(pair.x[example])[:, 0]
        for columns in _slices(len(pair.g), width):
            rows = pair.read(columns, example)[:, 0]
            for group in range(groups):
                g = winograd.transform_gradients(rows[:, group].flatten(0, 1))
                products = gemm.multiply(g, tiles[:, group].mT)
                gradients = winograd.transform_products(products)
                for gradient in gradients.unflatten(1, (-1, d_out)).unbind(1):
                    sums[group].addcmul_(gradient, gradient)
    return sums.movedim(1, -1).flatten(2)


def _direct(pair: Pair, limit: int) -> Tensor:
    assert pair.direct is not None
    total = _zeros(pair)
    size = max(1, _share(pair, limit) // _bytes_of_direct(pair))
    for examples in _slices(len(pair.x), size):
        for g in pair.g:
            _add_squares(total, pair.direct(pair.x[examples], g[examples]).unsqueeze(2))
    return total


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    """Add squares of gradients, `[n, groups, v, d_out, d_in]`."""
    if gradients.shape[0] * gradients.shape[2] > FEW:
        total += gradients.square().sum((0, 2))
        return
    for gradient in gradients.movedim(2, 1).flatten(0, 1):
        total.addcmul_(gradient, gradient)


def _pairs_of_positions(pair: Pair, limit: int) -> Tensor:
    """`sum_v (sum_r g_v[r] a[r])^2 = sum_rs (sum_v g_v[r] g_v[s]) a[r] a[s]`.

    So columns are summed over before anything is multiplied with the input, and examples by the
    product. Of two positions in either order, one is enough. Where an entry of a kernel sees
    nothing but padding, its `a` is zero: entries that see the same positions take these alone.
    """
    total, seen, positions = _zeros(pair), pair.seen(), pair.shape[-1]
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for entry, visible in enumerate(seen):
        if visible:
            alike[visible].append(entry)
    index = lambda numbers: torch.tensor(numbers, device=total.device)  # noqa: E731
    parts = total.unflatten(2, (-1, len(seen)))
    sums = {v: total.new_zeros(parts[..., e].mT.flatten(2).shape) for v, e in alike.items()}
    example, fixed = _bytes_of_pairs(pair, limit)
    chunks = -(-len(pair.x) // max(1, (limit - fixed) // example))
    size = -(-len(pair.x) // chunks)  # of each chunk, about the same
    for start in range(0, len(pair.x), size):
        chunk = slice(start, start + size)
        # Examples last: [groups, entries, channels, R, n] and [V, groups, d_out, R, n].
        a = cast(pair.vectors(pair.x[chunk])).unflatten(2, (-1, len(seen)))
        a = a.permute(1, 3, 2, 4, 0).contiguous()
        g = pair.read(slice(None), chunk).permute(0, 2, 3, 4, 1).contiguous()
        g_pairs = _multiply_pairs(g)
        g_pairs[:, :, positions:] *= 2  # of different positions, in either order
        for visible, entries in alike.items():
            x, rows = a, g_pairs
            if len(entries) < len(seen):
                x = x.index_select(1, index(entries))
            if len(visible) < positions:
                x = x.index_select(3, index(visible))
                rows = rows.index_select(2, index(_numbers(visible, positions)))
            _add_products(sums[visible], rows, x.flatten(1, 2), _share(pair, limit // 4))
    for visible, entries in alike.items():
        parts[..., entries] += sums[visible].unflatten(2, (len(entries), -1)).mT
    return total.clamp_(min=0)  # what cancels may leave less than nothing


def _multiply_pairs(rows: Tensor) -> Tensor:
    """Products of all pairs of positions, each once, by their distance; summed over columns.

    `[V, groups, d, R, n]` to `[groups, d, R (R + 1) / 2, n]`.
    """
    _, *shape, positions, examples = rows.shape
    products = rows.new_zeros(*shape, positions * (positions + 1) // 2, examples)
    first = 0
    for count in range(positions, 0, -1):  # of pairs at the next distance
        for row in rows:
            left, right = row[:, :, :count], row[:, :, positions - count :]
            products[:, :, first : first + count].addcmul_(left, right)
        first += count
    return products


def _numbers(visible: Sequence[int], positions: int) -> list[int]:
    """Where the pairs of some positions are among those of all, in the same order."""
    numbers = []
    for distance in range(len(visible)):
        for left, right in zip(visible, visible[distance:], strict=False):
            apart = right - left
            numbers.append(apart * positions - apart * (apart - 1) // 2 + left)
    return numbers


def _add_products(total: Tensor, g_pairs: Tensor, x: Tensor, share: int) -> None:
    """Add the products with all pairs of `x`, made for as much of it at once as stays in a cache.

    `[groups, d_out, pairs, n]` and `[groups, d, R, n]` to `[groups, d_out, d]`.
    """
    size = max(1, share // g_pairs[:, 0].nbytes)
    for first in range(0, x.shape[1], size):
        block = slice(first, first + size)
        pairs = _multiply_pairs(x[None, :, block])
        for group in range(len(total)):
            products = _multiply(g_pairs[group].flatten(1), pairs[group].flatten(1))
            total[group, :, block] += products


ALGORITHMS: dict[str, Algorithm] = {
    "one position": _one_position,
    "positions": _pairs_of_positions,
    "direct": _direct,
    "tiles": _tiles,
    "gradients": _gradients,
}


# ---- memory ----------------------------------------------------------------------------------


def _chunks(pair: Pair, limit: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """Vectors, `[n, groups, d_in, R]`, with each chunk of columns, and whose they are."""
    width, size = _chunk_sizes(pair, limit)
    for examples in _slices(len(pair.x), size):
        vectors = cast(pair.vectors(pair.x[examples]))
        for columns in _slices(len(pair.g), width):
            yield vectors, columns, examples


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _chunk_sizes(pair: Pair, limit: int) -> tuple[int, int]:
    """Numbers of columns and of examples whose gradients are computed at once."""
    columns = len(pair.g)
    _, _, d_in, positions = pair.shape
    example, gradient = _bytes_of_gradients(pair)
    share = _share(pair, limit)
    if _is_large(pair, columns):  # gradients of one example at a time
        width = min(columns, ROWS // pair.shape[1], (limit - example) // gradient)
        width = max(1, width)
        rows = width * gradient * positions // (positions + d_in)  # of all examples at once
        return width, max(1, min(share // example, (limit - width * gradient) // (example + rows)))
    width = min(columns, max(1, min(share, limit - example) // gradient))
    size = min(share // (width * gradient), limit // (example + width * gradient))
    return width, max(1, size)


def _share(pair: Pair, limit: int) -> int:
    """Bytes of what is to be read again at once: on a CPU, it had better stay in the cache."""
    return min(limit, common.CACHE_BYTES) if pair.x.device.type == "cpu" else limit


def _is_large(pair: Pair, columns: int) -> bool:
    """Whether the gradients of an example are worth a call of their own."""
    _, d_out, d_in, positions = pair.shape
    return positions > 1 and columns * d_out * d_in * positions >= LARGE


def _bytes_of_gradients(pair: Pair) -> tuple[int, int]:
    """Of an example: its unfolded input, and what that takes; of a gradient: it and its square."""
    groups, d_out, d_in, positions = pair.shape
    size = groups * accumulation_dtype(pair.x).itemsize
    return (
        3 * size * d_in * positions,
        2 * size * d_out * (positions + (d_in if positions > 1 else 0)),
    )


def _bytes_of_direct(pair: Pair) -> int:
    """Of an example: its gradient and what that is made of, each with a copy."""
    groups, d_out, d_in, positions = pair.shape
    size = 2 * accumulation_dtype(pair.x).itemsize
    return size * (groups * d_out * (d_in + positions) + pair.x[0].numel())


def _bytes_of_tiles(pair: Pair) -> tuple[int, int]:
    """Of an example: what it meets, twice transformed, and sums; of a gradient: what it is made of.

    That is its rows, twice laid out and transformed; and products, with oneDNN's own of one point.
    """
    groups, d_out, d_in, positions = pair.shape
    size = accumulation_dtype(pair.x).itemsize
    return (
        size * groups * d_in * (3 * positions // 2 + 3 * d_out),
        size * d_out * (4 * positions + 4 * d_in),
    )


def _columns_of_tiles(pair: Pair, limit: int) -> int:
    example, gradient = _bytes_of_tiles(pair)
    return max(1, min(len(pair.g), ROWS // pair.shape[1], (limit - example) // gradient))


def _bytes_of_pairs(pair: Pair, limit: int) -> tuple[int, int]:
    """Of an example: what is unfolded, laid out anew and multiplied; of all: products, results."""
    groups, d_out, d_in, positions = pair.shape
    size = groups * accumulation_dtype(pair.x).itemsize
    pairs = positions * (positions + 1) // 2
    copies = positions * (4 * d_in + 2 * len(pair.g) * d_out)
    return size * (copies + pairs * (2 * d_out + 1)), 3 * size * d_out * d_in + limit // 4


def _check_memory(pair: Pair, max_memory: int) -> None:
    needed = sum(_bytes_of_gradients(pair))
    if max_memory < needed:
        groups, d_out, d_in, _ = pair.shape
        raise ValueError(
            f"max_memory={max_memory:,} bytes is too little: one gradient, of shape "
            f"{groups, d_out, d_in}, takes {needed:,}"
        )
