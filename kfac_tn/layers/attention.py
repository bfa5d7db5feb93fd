"""Attention's projections: linear layers that no module computes, made visible to hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, MultiheadAttention, Parameter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Record = Callable[[Module, Tensor, Tensor], None]


class Projection(Module):
    """Stands for the linear layer that an attention's weight is, packed or not.

    Args:
        attention: The module that computes it.
        weight: The layer's weight.
        bias: Its bias, or None.

    Attributes:
        attention: As given; no submodule of this one.
    """

    attention: MultiheadAttention
    weight: Parameter
    bias: Parameter | None

    def __init__(
        self, attention: MultiheadAttention, weight: Parameter, bias: Parameter | None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "attention", attention)
        self.weight = weight
        self.register_parameter("bias", bias)

    def _get_name(self) -> str:
        return type(self.attention).__name__

    def holds(self) -> bool:
        """Whether the attention still has these very parameters in their places."""
        own, out = self.attention._parameters, self.attention.out_proj._parameters
        pairs = [(own.get("in_proj_weight"), own.get("in_proj_bias"))]
        pairs += [(own.get(f"{name}_weight"), None) for name in ("q_proj", "k_proj", "v_proj")]
        pairs += [(out.get("weight"), out.get("bias"))]
        return any(weight is self.weight and bias is self.bias for weight, bias in pairs)


def projections(module: Module) -> dict[str, Projection]:
    """The projections of a ``torch.nn.MultiheadAttention``, by name; of any other module none.

    ``in_proj`` (queries, keys and values, one weight) or ``q_proj``, ``k_proj`` and ``v_proj``, and
    ``out_proj``. The packed bias of separate weights is part of none of these.

    Example:
        >>> attention = torch.nn.MultiheadAttention(4, 2)
        >>> {name: tuple(each.weight.shape) for name, each in projections(attention).items()}
        {'in_proj': (12, 4), 'out_proj': (4, 4)}
    """
    if type(module) is not MultiheadAttention:
        return {}
    own = module._parameters
    found: dict[str, Projection] = {}
    for name in ("in_proj", "q_proj", "k_proj", "v_proj"):
        weight = own.get(f"{name}_weight")
        if weight is not None:
            bias = own.get("in_proj_bias") if name == "in_proj" else None
            found[name] = Projection(module, weight, bias)
    out = module.out_proj._parameters
    weight = out.get("weight")
    if weight is not None:
        found["out_proj"] = Projection(module, weight, out.get("bias"))
    return found


class ProjectionsApart(TorchFunctionMode):
    """Computes attention with its projections as calls that can be recorded.

    ``torch.nn.functional.multi_head_attention_forward`` hides them. While this mode is entered,
    they are computed before and after it, and it gets identities in their place. Where queries
    aren't keys, a packed weight is applied whole to either, and what isn't used of the results has
    zero gradients: to the weight, both are positions that share it.

    Args:
        layers: The projections to record, by their weights.
        record: Gets a projection, its input and its output, ``[N, T, d]`` (N = 1 unbatched).

    Example:
        >>> attention = torch.nn.MultiheadAttention(4, 2, dropout=0.0)
        >>> layers = {each.weight: each for each in projections(attention).values()}
        >>> seen, x = [], torch.randn(5, 3, 4)
        >>> with ProjectionsApart(layers, lambda layer, x, y: seen.append(tuple(y.shape))):
        ...     y, _ = attention(x, x, x)
        >>> seen, torch.allclose(y, attention(x, x, x)[0], atol=1e-6)
        ([(3, 5, 12), (3, 5, 4)], True)
    """

    def __init__(self, layers: Mapping[Parameter, Projection], record: Record) -> None:
        super().__init__()
        self._layers, self._record = layers, record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        bound = _SIGNATURE.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        return self._attend(bound.arguments)

    def _attend(self, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        inputs = [given[name] for name in ("query", "key", "value")]
        if given["use_separate_proj_weight"]:
            bias = given["in_proj_bias"]
            biases = (None, None, None) if bias is None else bias.chunk(3)
            projected = [
                self._project(x, given[f"{name}_proj_weight"], part)
                for x, name, part in zip(inputs, "qkv", biases, strict=True)
            ]
        else:
            packed = given["in_proj_weight"], given["in_proj_bias"]
            whole = {id(x): self._project(x, *packed) for x in dict.fromkeys(inputs)}
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
        return self._project(attended, *out).contiguous(), weights  # as users may rely on

    def _project(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """A linear layer on ``[T, N, d]`` or ``[T, d]``, recorded with the examples in front."""
        batched = x.transpose(0, 1) if x.dim() == 3 else x.unsqueeze(0)
        y = F.linear(batched, weight, bias)
        layer = self._layers.get(weight)
        if layer is not None:
            self._record(layer, batched, y)
        return y.transpose(0, 1) if x.dim() == 3 else y.squeeze(0)


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
