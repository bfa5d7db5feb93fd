"""Convolutions in any number of dimensions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import Module

from kfac_tn import functional
from kfac_tn.functional.rows import conv_grad_output_rows, conv_input_rows
from kfac_tn.layers.base import LayerFamily


class ConvFamily(LayerFamily):
    """``torch.nn.Conv1d`` to ``Conv3d`` and ``kfac_tn.tn.nn.ConvNd``, with all their options."""

    def groups(self, module: Any) -> int:  # noqa: D102
        return module.groups

    def batch_and_positions(self, module: Module, output: Tensor) -> tuple[int, int]:  # noqa: D102
        shape = _batched(module, output).shape
        return shape[0], math.prod(shape[2:])

    def input_factor(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.conv_input_factor(
            _batched(module, x), approximation="expand", bias=bias, **_hyper_parameters(module)
        )

    def average_input(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return functional.conv_average_input(
            _batched(module, x), bias=bias, **_hyper_parameters(module)
        )

    def grad_output_factor(self, module: Any, g: Tensor) -> Tensor:  # noqa: D102
        return functional.conv_grad_output_factor(
            _batched(module, g), groups=module.groups, approximation="expand"
        )

    def sum_grad_output(self, module: Any, g: Tensor) -> Tensor:  # noqa: D102
        return functional.conv_sum_grad_output(_batched(module, g), groups=module.groups)

    def input_rows(self, module: Module, x: Tensor, bias: bool) -> Tensor:  # noqa: D102
        return conv_input_rows(_batched(module, x), bias=bias, **_hyper_parameters(module))

    def grad_output_rows(self, module: Any, g: Tensor) -> Tensor:  # noqa: D102
        return conv_grad_output_rows(_batched(module, g), groups=module.groups)


def _hyper_parameters(module: Any) -> dict[str, Any]:
    return {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding_mode": module.padding_mode,
    }


def _batched(module: Any, x: Tensor) -> Tensor:
    """Give a single example its batch axis."""
    return x.unsqueeze(0) if x.dim() == len(module.kernel_size) + 1 else x
