"""Convolutions in any number of dimensions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from kfac_tn import functional
from kfac_tn.functional.networks import Geometry, spatial_sizes
from kfac_tn.functional.rows import (
    conv_grad_output_rows,
    conv_input_rows,
    conv_transpose_input_rows,
)
from kfac_tn.functional.squares import columns_together
from kfac_tn.layers.base import LayerFamily


class _ConvFamily(LayerFamily):
    """What all convolutions share: what is done with their output."""

    def lacks_batch(self, module: Any, x: Tensor) -> bool:
        return x.dim() == len(module.kernel_size) + 1

    def groups(self, module: Any) -> int:
        return module.groups

    def batch_and_positions(self, module: Module, output: Tensor) -> tuple[int, int]:
        shape = _batched(module, output).shape
        return shape[0], math.prod(shape[2:])

    def grad_output_factor(self, module: Any, g: Tensor) -> Tensor:
        return functional.conv_grad_output_factor(
            _batched(module, g), groups=module.groups, approximation="expand"
        )

    def sum_grad_output(self, module: Any, g: Tensor) -> Tensor:
        return functional.conv_sum_grad_output(_batched(module, g), groups=module.groups)

    def grad_output_rows(self, module: Any, g: Tensor) -> Tensor:
        return conv_grad_output_rows(_batched(module, g), groups=module.groups)


class ConvFamily(_ConvFamily):
    """``torch.nn.Conv1d`` to ``Conv3d`` and ``kfac_tn.tn.nn.ConvNd``, with all their options."""

    def input_factor(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.conv_input_factor(
            _batched(module, x), approximation="expand", bias=bias, **_hyper_parameters(module)
        )

    def average_input(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.conv_average_input(
            _batched(module, x), bias=bias, **_hyper_parameters(module)
        )

    def input_rows(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return conv_input_rows(_batched(module, x), bias=bias, **_hyper_parameters(module))

    def per_example_weight_gradient(self, module: Module, x: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        x, g = _batched(module, x), _batched(module, g)
        return functional.conv_per_example_weight_gradient(x, g, **_hyper_parameters(module))

    def columns_together(self, module: Any, g: Tensor, columns: int) -> int:  # noqa: D102
        _, channels, *positions = _batched(module, g).shape
        shape = channels // module.groups, module.weight[0].numel(), math.prod(positions)
        return columns_together(*shape, columns)

    def weight_diagonal(  # noqa: D102
        self, module: Module, x: Tensor, g: Tensor, max_memory: int | None = None
    ) -> Tensor:
        x, g = _batched(module, x), _batched(module, g)
        return functional.conv_weight_diagonal(
            x, g, max_memory=max_memory, **_hyper_parameters(module)
        )

    def columns_diagonal(  # noqa: D102
        self, module: Module, x: Tensor, columns: Sequence[Tensor], max_memory: int | None = None
    ) -> Tensor:
        return functional.conv_weight_diagonal(
            x, columns, max_memory=max_memory, **_hyper_parameters(module)
        )


class ConvTransposeFamily(_ConvFamily):
    """``torch.nn.ConvTranspose1d`` to ``3d`` and ``kfac_tn.tn.nn.ConvTransposeNd``.

    Their ``output_padding`` is that of each call, which may choose another by ``output_size``.
    """

    transposed = True

    def called(self, module: Any, x: Tensor, output: Tensor) -> Any:  # noqa: D102
        extra = _extra(module, x, output)
        if extra == tuple(module.output_padding):
            return module
        called = copy.copy(module)  # with the same parameters
        called.output_padding = extra
        return called

    def input_factor(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.conv_transpose_input_factor(
            _batched(module, x), approximation="expand", bias=bias, **_transposed(module)
        )

    def average_input(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.conv_transpose_average_input(
            _batched(module, x), bias=bias, **_transposed(module)
        )

    def input_rows(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return conv_transpose_input_rows(_batched(module, x), bias=bias, **_transposed(module))

    def per_example_weight_gradient(self, module: Module, x: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        options = _transposed(self.called(module, x, g))
        x, g = _batched(module, x), _batched(module, g)
        return functional.conv_transpose_per_example_weight_gradient(x, g, **options)

    def weight_diagonal(  # noqa: D102
        self, module: Module, x: Tensor, g: Tensor, max_memory: int | None = None
    ) -> Tensor:
        options = _transposed(self.called(module, x, g))
        x, g = _batched(module, x), _batched(module, g)
        return functional.conv_transpose_weight_diagonal(x, g, max_memory=max_memory, **options)


def _extra(module: Any, x: Tensor, output: Tensor) -> tuple[int, ...]:
    """By how many positions an output, or its gradient, is longer than without output padding."""
    options = {**_transposed(module), "output_padding": 0, "transposed": True}
    _, sizes = spatial_sizes(_batched(module, x), Geometry(**options))
    wanted = output.shape[-len(sizes) :]
    return tuple(size - least for size, least in zip(wanted, sizes, strict=True))


def _hyper_parameters(module: Any) -> dict[str, Any]:
    return {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding_mode": module.padding_mode,
    }


def _transposed(module: Any) -> dict[str, Any]:
    return {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "output_padding": module.output_padding,
        "groups": module.groups,
        "dilation": module.dilation,
    }


def _batched(module: Any, x: Tensor) -> Tensor:
    """Give a single example its batch axis."""
    return x.unsqueeze(0) if x.dim() == len(module.kernel_size) + 1 else x
