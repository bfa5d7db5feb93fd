"""Normalizations: a weight and a bias for each channel, hence no Kronecker structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from kfac_tn.functional import common
from kfac_tn.layers.base import GradientFamily


class NormFamily(GradientFamily):
    """``y = normalize(x) * weight + bias``: what is summed over are positions.

    Args:
        normalize: Computes ``normalize(x)`` of a module and its input.
        channels_last: Whether the parameters belong to the last axes instead of the second one.
        axes: Of a single example, if the module takes one without a batch.
    """

    def __init__(
        self, normalize: Callable[[Any, Tensor], Tensor], channels_last: bool, axes: int = 0
    ) -> None:
        self._normalize = normalize
        self._channels_last = channels_last
        self._axes = axes

    def lacks_batch(self, module: Any, x: Tensor) -> bool:  # noqa: D102
        return x.dim() == (len(module.normalized_shape) if self._channels_last else self._axes)

    def per_example_weight_gradient(self, module: Any, x: Tensor, g: Tensor) -> Tensor:  # noqa: D102
        return self._sum(module, self._normalize(module, x).to(g.dtype) * g)

    def per_example_bias_gradient(self, module: Any, g: Tensor) -> Tensor:  # noqa: D102
        return self._sum(module, g)

    def weight_diagonal(  # noqa: D102
        self, module: Any, x: Tensor, g: Tensor, max_memory: int | None = None
    ) -> Tensor:
        # Of an example: itself in another type, normalized, times its gradient.
        needed = 4 * x[0].numel() * common.accumulation_dtype(x).itemsize
        if max_memory is not None and needed > max_memory:
            raise ValueError(
                f"max_memory={max_memory:,} bytes is too little: one example's gradient of "
                f"{module} takes {needed:,}"
            )
        limit = common.UNFOLD_BYTES if max_memory is None else max_memory
        if x.device.type == "cpu":
            limit = min(limit, common.CACHE_BYTES)
        total: Tensor | float = 0.0
        size = max(1, limit // needed)
        for inputs, gradients in zip(x.split(size), g.split(size), strict=True):
            rows = self.per_example_weight_gradient(module, inputs, gradients)
            total = total + rows.square().sum(0)
        return cast(Tensor, total)

    def _sum(self, module: Any, g: Tensor) -> Tensor:
        """Sum over all axes but the first one and those of the parameters."""
        parameters = module.weight if module.weight is not None else module.bias
        last = parameters.ndim
        shared = range(1, g.ndim - last) if self._channels_last else range(2, g.ndim)
        return g.sum(list(shared)) if len(shared) else g


def _batch_norm(module: Any, x: Tensor) -> Tensor:
    return F.batch_norm(
        x, module.running_mean, module.running_var, None, None, False, 0, module.eps
    )


def _instance_norm(module: Any, x: Tensor) -> Tensor:
    use_input_stats = module.training or not module.track_running_stats
    mean, var = (None, None) if use_input_stats else (module.running_mean, module.running_var)
    return F.instance_norm(x, mean, var, None, None, use_input_stats, 0.0, module.eps)


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, None, None, module.eps)


def _group_norm(module: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, module.num_groups, None, None, module.eps)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.normalized_shape, None, module.eps)


NORM_FAMILIES: dict[type[Module], GradientFamily] = {
    torch.nn.BatchNorm1d: NormFamily(_batch_norm, False),
    torch.nn.BatchNorm2d: NormFamily(_batch_norm, False),
    torch.nn.BatchNorm3d: NormFamily(_batch_norm, False),
    torch.nn.InstanceNorm1d: NormFamily(_instance_norm, False, 2),
    torch.nn.InstanceNorm2d: NormFamily(_instance_norm, False, 3),
    torch.nn.InstanceNorm3d: NormFamily(_instance_norm, False, 4),
    torch.nn.GroupNorm: NormFamily(_group_norm, False),
    torch.nn.LayerNorm: NormFamily(_layer_norm, True),
    torch.nn.RMSNorm: NormFamily(_rms_norm, True),
}
"""Batch normalization in evaluation mode, that is: in training mode it has no examples."""
