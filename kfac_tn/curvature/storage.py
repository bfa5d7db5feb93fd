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
    """The inverse of ``pack``.

    Raises:
        ValueError: If entries are missing. What is no state raises whatever comes of it.
    """
    if isinstance(state, dict):
        entries = {name: unpack(entry) for name, entry in state.items() if name != "kind"}
        kind = _KINDS[state["kind"]]
        if missing := [f.name for f in fields(kind) if f.name not in entries]:
            raise ValueError(f"a {kind.__name__} lacks {missing}")
        return kind(**entries)
    if isinstance(state, list):
        parts = tuple(map(unpack, state))
        return parts if _blocks(parts) else Size(parts)
    return state


def parameters(block: Any) -> list[tuple[str, Size]]:
    """Names and shapes of the parameters of a block that has been unpacked.

    Raises:
        ValueError: If these aren't the shapes of its tensors.
    """
    if isinstance(block, DiagonalBlock):
        return [(block.name, block.values.shape)]
    layout = block.layout
    groups, rows, columns = layout.groups, layout.rows, layout.columns
    if groups * rows * columns != layout.weight_shape.numel():
        raise ValueError(f"{layout} can't be divided into its groups")
    if isinstance(block, SumBlock):
        for term in block.terms:
            parameters(term)
        if {term.layout for term in block.terms} != {layout}:
            raise ValueError(f"the terms of a sum must be over {layout}")
    else:
        own = block.bias == "joint" or isinstance(block, EigenBlock)
        width = columns + (own and layout.bias_name is not None)
        tensors = (
            (block.input_factor, block.grad_output_factor)
            if isinstance(block, KroneckerBlock)
            else (block.input_vectors, block.grad_output_vectors, block.values)
        )
        actual = [tuple(tensor.shape) for tensor in tensors]
        shapes = [(groups, width, width), (groups, rows, rows), (groups, rows, width)]
        shared = [(1, *shape[1:]) for shape in shapes[:2]]  # one factor for all groups
        fit = [here in some for here, *some in zip(actual, shapes, shared, strict=False)]
        fit += [here == shape for here, shape in zip(actual[2:], shapes[2:], strict=False)]
        if not all(fit) or groups not in [size for size, *_ in actual]:
            raise ValueError(
                f"tensors over {layout} have shapes {actual}, not {shapes[: len(actual)]}"
            )
    return list(zip(layout.names, (layout.weight_shape, Size([groups * rows])), strict=False))


def _blocks(parts: tuple) -> bool:
    return any(isinstance(part, Block) for part in parts)
