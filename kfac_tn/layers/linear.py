"""Linear layers, with any number of leading axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from kfac_tn import functional
from kfac_tn.functional.rows import linear_grad_output_rows, linear_input_rows
from kfac_tn.functional.squares import columns_together
from kfac_tn.layers.base import LayerFamily


class LinearFamily(LayerFamily):
    """``torch.nn.Linear`` on ``[N, *shared, d_in]``: axes between first and last share the weight.

    KFAC-reduce takes the first axis for the batch; for sequences that come as ``[T, N, d]``, use
    ``"expand"`` (which treats all leading axes alike) or put the batch first.
    """

    def lacks_batch(self, module: Module, x: Tensor) -> bool:  # noqa: D102
        return x.dim() == 1

    def groups(self, module: Module) -> int:  # noqa: D102
        return 1

    def batch_and_positions(self, module: Module, output: Tensor) -> tuple[int, int]:  # noqa: D102
        shape = _batched(output).shape
        return shape[0], math.prod(shape[1:-1])

    def input_factor(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.linear_input_factor(_batched(x), "expand", bias=bias)

    def average_input(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.linear_average_input(_batched(x), bias=bias)

    def grad_output_factor(self, module: Module, g: Tensor) -> Tensor:  # noqa: D102
        return functional.linear_grad_output_factor(_batched(g), "expand")

    def sum_grad_output(self, module: Module, g: Tensor) -> Tensor:  # noqa: D102
        return functional.linear_sum_grad_output(_batched(g))

    def input_rows(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return linear_input_rows(_batched(x), bias)

    def grad_output_rows(self, module: Module, g: Tensor) -> Tensor:  # noqa: D102
        return linear_grad_output_rows(_batched(g))

    def per_example_weight_gradient(self, module: Module, x: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return functional.linear_per_example_weight_gradient(_batched(x), _batched(g))

    def columns_together(self, module: Any, g: Tensor, columns: int) -> int:  # noqa: D102
        d_in, positions = module.weight.shape[1], math.prod(g.shape[1:-1])
        return columns_together(g.shape[-1], d_in, positions, columns)

    def weight_diagonal(  # noqa: D102
        self, module: Module, x: Tensor, g: Tensor, max_memory: int | None = None
    ) -> Tensor:
        return functional.linear_weight_diagonal(_batched(x), _batched(g), max_memory)

    def columns_diagonal(  # noqa: D102
        self, module: Module, x: Tensor, columns: Sequence[Tensor], max_memory: int | None = None
    ) -> Tensor:
        return functional.linear_weight_diagonal(x, columns, max_memory)


def _batched(x: Tensor) -> Tensor:
    """Give a single vector its batch axis."""
    return x.unsqueeze(0) if x.dim() == 1 else x
