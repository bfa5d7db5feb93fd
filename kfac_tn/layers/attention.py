"""Attention's projections as linear layers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, MultiheadAttention
from torch.nn import functional as F

from kfac_tn.layers.hidden import HiddenLayers, HiddenLinear


def attention_layers(module: Module) -> dict[str, HiddenLinear]:
    """The projections of a ``torch.nn.MultiheadAttention``, by name; of any other module none.

    ``in_proj`` (queries, keys and values, one weight) or ``q_proj``, ``k_proj`` and ``v_proj``, and
    ``out_proj``. The packed bias of separate weights is part of none of these.

    Example:
        >>> attention = torch.nn.MultiheadAttention(4, 2)
        >>> {name: tuple(each.weight.shape) for name, each in attention_layers(attention).items()}
        {'in_proj': (12, 4), 'out_proj': (4, 4)}
    """
    if type(module) is not MultiheadAttention:
        return {}
    layers = {
        "in_proj": HiddenLinear(module, "in_proj_weight", "in_proj_bias"),
        **{name: HiddenLinear(module, f"{name}_weight") for name in ("q_proj", "k_proj", "v_proj")},
        "out_proj": HiddenLinear(module, "out_proj.weight", "out_proj.bias"),
    }
    return {name: layer for name, layer in layers.items() if layer.weight is not None}


def attend(layers: HiddenLayers, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward``, its projections applied by ``layers``.

    They are computed before and after it, and it gets identities in their place. Where queries
    aren't keys, a packed weight is applied whole to either, and what isn't used of the results has
    zero gradients: to the weight, both are positions that share it.
    """
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    inputs = [given[name] for name in ("query", "key", "value")]
    if given["use_separate_proj_weight"]:
        bias = given["in_proj_bias"]
        biases = (None, None, None) if bias is None else bias.chunk(3)
        projected = [
            _project(layers, x, given[f"{name}_proj_weight"], part)
            for x, name, part in zip(inputs, "qkv", biases, strict=True)
        ]
    else:
        packed = given["in_proj_weight"], given["in_proj_bias"]
        whole = {id(x): _project(layers, x, *packed) for x in dict.fromkeys(inputs)}
        projected = [whole[id(x)].chunk(3, -1)[part] for part, x in enumerate(inputs)]
    like = projected[0]
    identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    changed = {
        **dict(zip(("query", "key", "value"), projected, strict=True)),
        **dict.fromkeys(("in_proj_weight", "in_proj_bias", "out_proj_bias")),
        **{f"{name}_proj_weight": identity for name in ("q", "k", "v", "out")},
        "use_separate_proj_weight": True,
    }
    attended, weights = F.multi_head_attention_forward(**{**given, **changed})
    out = given["out_proj_weight"], given["out_proj_bias"]
    return _project(layers, attended, *out).contiguous(), weights  # as users may rely on


def _project(layers: HiddenLayers, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on ``[T, N, d]`` or ``[T, d]``, recorded with the examples in front."""
    batched = x.transpose(0, 1) if x.dim() == 3 else x.unsqueeze(0)
    y = layers.apply(batched, weight, bias)
    return y.transpose(0, 1) if x.dim() == 3 else y.squeeze(0)


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
