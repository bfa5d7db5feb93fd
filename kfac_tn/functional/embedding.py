"""Embeddings: linear layers on one-hot vectors, none of which is ever written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_tn.functional import common
from kfac_tn.functional.common import accumulation_dtype, cast
from kfac_tn.functional.rows import multiply_rows


def embedding_input_factor(x: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Expand input factor of an embedding, which is diagonal: how frequent each index is.

    It is that of a linear layer on one-hot vectors (on zeros for `padding_idx`).

    Args:
        x: Indices of any shape and integer type.
        weight: The embedding's, `[V, d]`; gives number, type and device of the result.
        padding_idx: The row that gets no gradient. Default: none.

    Returns:
        The diagonal as blocks of one row (see `kfac_tn.functional.blocks`), `[V, 1, 1]`, in float32
        at least. An average over examples and positions.

    Raises:
        ValueError: If `x` is empty.

    Example:
        >>> embedding_input_factor(torch.tensor([2, 0, 2, 2]), torch.zeros(3, 5)).flatten()
        tensor([0.2500, 0.0000, 0.7500])
    """
    if x.numel() == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} is empty: skip such batches")
    return _shares(x.reshape(1, -1), weight, padding_idx).view(-1, 1, 1)


def embedding_average_input(x: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Mean over shared positions of the one-hot vectors: the rows of KFAC-reduce.

    Args:
        x: Indices, `[N, *shared]`, of any integer type.
        weight: As in `embedding_input_factor`, as is the next.
        padding_idx: Default: none.

    Returns:
        `[N, 1, V]`, in float32 at least.

    Raises:
        ValueError: If `x` has no axis or is empty.

    Example:
        >>> embedding_average_input(torch.tensor([[2, 0], [1, 1]]), torch.zeros(3, 5)).squeeze(1)
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 1.0000, 0.0000]])
    """
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"x must be [N, *shared] and not empty, got shape {tuple(x.shape)}")
    return _shares(x, weight, padding_idx).unsqueeze(1)


def embedding_per_example_weight_gradient(
    x: Tensor, g: Tensor, num_embeddings: int, padding_idx: int | None = None
) -> Tensor:
    """What each example alone gives the weight of an embedding.

    Args:
        x: Indices, `[N, *shared]`, of any integer type.
        g: Gradients of the output, `[N, *shared, d]`.
        num_embeddings: Rows V of the weight.
        padding_idx: The row that gets no gradient. Default: none.

    Returns:
        `[N, V, d]`.

    Raises:
        ValueError: If `g` isn't shaped like the output for `x`.

    Example:
        >>> x, g = torch.tensor([[1, 1], [0, 1]]), torch.ones(2, 2, 1)
        >>> embedding_per_example_weight_gradient(x, g, num_embeddings=2).squeeze(-1)
        tensor([[0., 2.],
                [1., 1.]])
    """
    _check(x, g)
    keys, rows = _keys(x, num_embeddings), cast(g).reshape(-1, g.shape[-1])
    total = rows.new_zeros(len(x) * num_embeddings, g.shape[-1])
    result = total.index_add_(0, keys, rows).view(len(x), num_embeddings, -1)
    return _without_padding(result, padding_idx)


def embedding_weight_diagonal(
    x: Tensor,
    g: Tensor,
    num_embeddings: int,
    padding_idx: int | None = None,
    max_memory: int | None = None,
) -> Tensor:
    """Sum over examples of squared per-example gradients of an embedding's weight.

    Gradients of equal indices of an example are summed before they are squared; what isn't looked
    up takes neither time nor memory.

    Args:
        x: Indices, `[N, *shared]`, of any integer type.
        g: Gradients of the output, `[N, *shared, d]`.
        num_embeddings: Rows V of the weight.
        padding_idx: The row that gets no gradient. Default: none.
        max_memory: Most bytes to hold besides these and the result; examples come in chunks.
            Default: 64 MiB, or what one example takes if that is more.

    Returns:
        `[V, d]`.

    Raises:
        ValueError: If `g` isn't shaped like the output for `x`, or one example takes more than
            `max_memory`.

    Example:
        >>> x, g = torch.tensor([[1, 1], [0, 1]]), torch.ones(2, 2, 1)
        >>> embedding_weight_diagonal(x, g, num_embeddings=2).squeeze(-1)
        tensor([1., 5.])
    """
    _check(x, g)
    width = g.shape[-1]
    # Of each position: its gradient in another type and sorted, sums, their squares, indices.
    needed = g[0].numel() // width * (4 * width * accumulation_dtype(g).itemsize + 64)
    if max_memory is not None and needed > max_memory:
        raise ValueError(
            f"max_memory={max_memory:,} bytes is too little: one example's gradient of an "
            f"embedding takes {needed:,}"
        )
    size = max(1, (common.UNFOLD_BYTES if max_memory is None else max_memory) // needed)
    total = g.new_zeros(num_embeddings, width, dtype=accumulation_dtype(g))
    for indices, gradients in _chunks(x, g, size):
        # Neither a result of unknown size (a synchronization) nor one row for each of V indices.
        keys, order = _keys(indices, num_embeddings).sort()
        different = torch.ones_like(keys)
        different[0] = 0
        different[1:] = keys[1:] != keys[:-1]
        segments = different.cumsum(0)
        rows = cast(gradients).reshape(-1, width)[order]
        sums = torch.zeros_like(rows).index_add_(0, segments, rows)
        owners = torch.zeros_like(keys).scatter_(0, segments, keys % num_embeddings)
        total.index_add_(0, owners, sums.square_())  # rows that are left over are zero
    return _without_padding(total, padding_idx)


def embedding_second_moment(
    x: Tensor,
    g: Tensor,
    num_embeddings: int,
    padding_idx: int | None,
    input_vectors: Tensor | None,
    grad_output_vectors: Tensor | None,
) -> Tensor:
    """Sum over examples of the squared entries of their gradients in an eigenbasis.

    As `kfac_tn.functional.rows.rotated_second_moment`, of which one-hot vectors would be the input.

    Args:
        x: Indices, `[N, *shared]`, of any integer type.
        g: Gradients of the output, `[N, *shared, d]`.
        num_embeddings: Rows V of the weight.
        padding_idx: The row that gets no gradient, or None.
        input_vectors: Q_A, `[1, V, V]`, or the blocks of a block-diagonal matrix (see
            `kfac_tn.functional.blocks`); None, or blocks of one row: unit vectors.
        grad_output_vectors: Q_B, `[1, d, d]` or blocks, or None.

    Returns:
        `[1, d, V]`; as much larger as blocks were filled up.

    Raises:
        ValueError: If `g` isn't shaped like the output for `x`.

    Example:
        >>> x, g = torch.tensor([[1, 1], [0, 1]]), torch.ones(2, 2, 1)
        >>> embedding_second_moment(x, g, 2, None, None, None)
        tensor([[[1., 5.]]])
    """
    _check(x, g)
    rows = cast(g).reshape(1, len(x), -1, g.shape[-1])
    rotated = multiply_rows(rows, grad_output_vectors).squeeze(0)
    x = x.reshape(len(x), -1)
    if input_vectors is None or input_vectors.shape[-1] == 1:
        squares = embedding_weight_diagonal(x, rotated, num_embeddings, padding_idx)
        return squares.mT.unsqueeze(0)
    gradients = embedding_per_example_weight_gradient(x, rotated, num_embeddings, padding_idx)
    return multiply_rows(gradients.mT.unsqueeze(0), input_vectors).square().sum(1)


# ---- how it is computed ----------------------------------------------------------------------


def _check(x: Tensor, g: Tensor) -> None:
    if x.ndim < 1 or g.shape[:-1] != x.shape or x.numel() == 0:
        raise ValueError(
            f"x of shape {tuple(x.shape)} must be [N, *shared], and g of shape {tuple(g.shape)} "
            "[N, *shared, d], neither of them empty"
        )


def _shares(x: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    """How frequent each index is in each row: `[N, V]`."""
    shape, dtype = (len(x), len(weight)), accumulation_dtype(weight)
    x = x.reshape(len(x), -1).long()
    # Counts are exact in float32 up to 2^24 positions of an example, a share added up isn't.
    counts = torch.zeros(shape, dtype=dtype, device=x.device)
    counts.scatter_add_(1, x, torch.ones_like(x, dtype=dtype))
    if padding_idx is not None:
        counts[:, padding_idx] = 0
    return counts.div_(x.shape[1])


def _keys(x: Tensor, num_embeddings: int) -> Tensor:
    """The place of each index among those of all examples, `[N * R]`."""
    places = torch.arange(len(x), device=x.device).unsqueeze(1) * num_embeddings
    return (x.reshape(len(x), -1) + places).flatten()


def _chunks(x: Tensor, g: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(size), g.split(size), strict=True)


def _without_padding(gradient: Tensor, padding_idx: int | None) -> Tensor:
    """`[..., V, d]` with zeros for the row of padding, in place."""
    if padding_idx is not None:
        gradient[..., padding_idx, :] = 0
    return gradient
