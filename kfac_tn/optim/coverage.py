"""The table that says how each parameter of a model is treated, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.nn import Module

from kfac_tn.layers import LayerBlock, OtherParameter


@dataclass(frozen=True)
class Row:
    """One parameter: its name, shape, treatment, and the reason for it."""

    parameter: str
    shape: tuple[int, ...]
    treatment: str
    why: str


class Coverage(tuple[Row, ...]):
    """Rows, one for each parameter of a model; prints as a table."""

    def __repr__(self) -> str:
        header = Row("parameter", (), "treatment", "why")
        rows = [
            (row.parameter, "shape" if row is header else str(list(row.shape)), row.treatment)
            for row in (header, *self)
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            + "  "
            + full.why
            for row, full in zip(rows, (header, *self), strict=True)
        )


def coverage(
    model: Module,
    blocks: Iterable[LayerBlock],
    others: Iterable[OtherParameter],
    other_treatment: str,
) -> Coverage:
    """The table for a model divided into blocks and others.

    Args:
        model: The model.
        blocks: Its layers with Kronecker factors.
        others: Its other trainable parameters.
        other_treatment: What happens to those, in a word or two.
    """
    rows: dict[str, Row] = {}
    for block in blocks:
        sizes = f"{block.grad_output_dim} x {block.input_dim + (block.bias is not None)}"
        what = "factors" if block.has_factors else "second moments"
        why = f"{block.modules[0]._get_name()}: {what} {sizes}"
        if block.groups > 1:
            why += f" in {block.groups} groups"
        if block.has_factors:
            why += _cut("input", block.input_pieces, block.joint_dim, block)
            why += _cut("output", block.grad_output_pieces, block.grad_output_dim, block)
        if len(block.modules) > 1:
            why += f", shared by {len(block.modules)} modules"
        for name, parameter in block.parameters.items():
            treatment = (
                f"{block.curvature.upper()}-{block.approximation}"
                if block.has_factors
                else "diagonal"
            )
            rows[name] = Row(name, tuple(parameter.shape), treatment, why)
    for other in others:
        shape = tuple(other.parameter.shape)
        rows[other.name] = Row(other.name, shape, other_treatment, other.reason)
    return Coverage(
        rows.get(name, Row(name, tuple(parameter.shape), "none", "frozen"))
        for name, parameter in model.named_parameters()
    )


def _cut(side: str, pieces: int, size: int, block: LayerBlock) -> str:
    """What is said of a factor that is larger than its limit."""
    if pieces == 1:
        return ""
    if side == "input" and block.has_diagonal_inputs:
        return ", the input's a diagonal"
    rows = -(-size // pieces)
    part = "diagonal" if rows == 1 else f"{pieces} diagonal blocks of {rows}"
    return f", the {side}'s only its {part} (above max_dim={block.max_dim})"
