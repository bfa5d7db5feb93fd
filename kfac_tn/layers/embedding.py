"""Embeddings: linear layers without bias on one-hot vectors, with the weight transposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from kfac_tn import functional
from kfac_tn.functional.common import concatenate
from kfac_tn.functional.embedding import embedding_second_moment
from kfac_tn.functional.rows import linear_grad_output_rows
from kfac_tn.layers.base import LayerFamily


class EmbeddingFamily(LayerFamily):
    """``torch.nn.Embedding`` on indices ``[N, *shared]``, without ``scale_grad_by_freq``.

    A is over indices, B over the embedding's width. KFAC-expand's A is exactly diagonal: how
    frequent each index is. KFAC-reduce takes the first axis for the examples. With ``max_norm``,
    rows are shortened before they are looked up; as torch does, that isn't differentiated. An index
    that is ``padding_idx`` stands for a vector of zeros. EKFAC on reduce's A, whose rank is at most
    the number of examples, has eigenvectors that mix all indices: rows that aren't looked up move
    too, but for that of padding.

    Indices that all examples share, as those of positions ``[T]`` or ``[1, T]``, have gradients
    summed over examples: with targets drawn, or signs, at random their squares are right on
    average. Reduce takes the first axis of ``[T]`` for examples; give it ``[1, T]``. A module that
    is called with both, shared indices and each example's own, counts the shared ones once.
    """

    transposed = True
    one_hot = True

    def lacks_batch(self, module: Module, x: Tensor) -> bool:  # noqa: D102
        return x.dim() == 0

    def lacks_block(self, module: Any) -> str | None:  # noqa: D102
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True: its gradient isn't that of the loss"
        return "sparse=True: its gradient is no matrix" if module.sparse else None

    def constrain(self, module: Any, direction: Tensor) -> None:  # noqa: D102
        if module.padding_idx is not None:  # where eigenvectors mix it in by rounding
            direction[module.padding_idx] = 0

    def groups(self, module: Module) -> int:  # noqa: D102
        return 1

    def batch_and_positions(self, module: Module, output: Tensor) -> tuple[int, int]:  # noqa: D102
        shape = _batched(output).shape
        return shape[0], math.prod(shape[1:-1])

    def input_factor(self, module: Any, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.embedding_input_factor(x, module.weight, module.padding_idx)

    def average_input(self, module: Any, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        x = x.reshape(1) if x.ndim == 0 else x
        return functional.embedding_average_input(x, module.weight, module.padding_idx)

    def grad_output_factor(self, module: Module, g: Tensor) -> Tensor:  # noqa: D102
        return functional.linear_grad_output_factor(_batched(g), "expand")

    def sum_grad_output(self, module: Module, g: Tensor) -> Tensor:  # noqa: D102
        return functional.linear_sum_grad_output(_batched(g))

    def grad_output_rows(self, module: Module, g: Tensor) -> Tensor:  # noqa: D102
        return linear_grad_output_rows(_batched(g))

    def second_moment(  # noqa: D102
        self,
        module: Any,
        xs: Sequence[Tensor],
        gs: Sequence[Tensor],
        bias: bool,
        input_vectors: Tensor | None,
        grad_output_vectors: Tensor | None,
    ) -> Tensor:
        gs = [linear_grad_output_rows(_batched(g)).squeeze(0) for g in gs]
        indices = concatenate([x.reshape(g.shape[:2]) for x, g in zip(xs, gs, strict=True)], 1)
        return embedding_second_moment(
            indices,
            concatenate(gs, 1),
            module.num_embeddings,
            module.padding_idx,
            input_vectors,
            grad_output_vectors,
        )

    def per_example_weight_gradient(self, module: Any, x: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return functional.embedding_per_example_weight_gradient(
            x, g, module.num_embeddings, module.padding_idx
        )

    def weight_diagonal(  # noqa: D102
        self, module: Any, x: Tensor, g: Tensor, max_memory: int | None = None
    ) -> Tensor:
        return functional.embedding_weight_diagonal(
            x, g, module.num_embeddings, module.padding_idx, max_memory
        )


def _batched(x: Tensor) -> Tensor:
    """Give a single vector its batch axis."""
    return x.unsqueeze(0) if x.dim() == 1 else x
