"""Embeddings: linear layers without bias on one-hot vectors, with the weight transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfac_tn import functional
from kfac_tn.layers.base import GradientFamily


class EmbeddingFamily(GradientFamily):
    """``torch.nn.Embedding`` on indices ``[N, *shared]``, without ``scale_grad_by_freq``.

    With ``max_norm``, rows are shortened before they are looked up; as torch does, that isn't
    differentiated. The row of ``padding_idx`` has no gradient.
    """

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
