"""Blocks as plain containers of tensors, and functions of all their tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Size, Tensor

from kfac_tn.curvature.block import Block, DiagonalBlock
from kfac_tn.curvature.eigen import EigenBlock, SumBlock
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.curvature.layout import Layout

_KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (DiagonalBlock, EigenBlock, KroneckerBlock, Layout, SumBlock)
}


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A block with its tensors replaced by functions of them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(part, function) for part in value) if _blocks(value) else value
    if is_dataclass(value):
        entries = {f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)}
        return replace(value, **entries)  # type: ignore[type-var]
    return value


def pack(value: Any) -> Any:
    """A block as dicts, lists, tensors, strings and numbers, as ``torch.load`` takes safely."""
    if is_dataclass(value):
        entries = {f.name: pack(getattr(value, f.name)) for f in fields(value)}
        return {"kind": type(value).__name__, **entries}
    if isinstance(value, tuple):
        return [pack(part) for part in value]
    return value.detach() if isinstance(value, Tensor) else value


def unpack(state: Any) -> Any:
    """The inverse of ``pack``."""
    if isinstance(state, dict):
        entries = {name: unpack(entry) for name, entry in state.items() if name != "kind"}
        return _KINDS[state["kind"]](**entries)
    if isinstance(state, list):
        parts = tuple(map(unpack, state))
        return parts if _blocks(parts) else Size(parts)
    return state


def _blocks(parts: tuple) -> bool:
    return any(isinstance(part, Block) for part in parts)
