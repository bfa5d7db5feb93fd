"""How parameters lie in vectors and matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Size, Tensor


@dataclass(frozen=True)
class Layout:
    """How the parameters of a layer lie in its matrix ``[G, d_out, d_in]``.

    The weight is flattened by rows, its rows divided among the groups; the bias is the last column.

    Attributes:
        weight_name: Name of the weight.
        weight_shape: Its shape ``[G * d_out, ...]``; transposed: ``[G * C_in, d_out, ...]``.
        bias_name: Name of the bias (shape ``[G * d_out]``), or None.
        groups: G.
        transposed: Whether the weight's second axis is that of the rows, and its first one the
            slowest of the columns.
    """

    weight_name: str
    weight_shape: Size
    bias_name: str | None = None
    groups: int = 1
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weight, and of the bias if there is one."""
        return (self.weight_name,) if self.bias_name is None else (self.weight_name, self.bias_name)

    @cached_property
    def rows(self) -> int:
        """d_out, the number of rows in each group."""
        shape = self.weight_shape
        if self.transposed:
            return shape[1]
        return shape[0] // self.groups if shape else 1

    @cached_property
    def columns(self) -> int:
        """Number of columns, that of the bias aside."""
        return self.weight_shape.numel() // (self.groups * self.rows)

    @property
    def _channels_first(self) -> tuple[int, int, int]:
        """A transposed weight in each group: input channels, rows, kernel positions."""
        channels = self.weight_shape[0] // self.groups
        return channels, self.rows, self.columns // channels

    def to_columns(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        """The columns of a weight, and that of the bias: ``[*batch, G, d_out, columns]`` each."""
        batch = weight.shape[: weight.ndim - len(self.weight_shape)]
        rows = self.rows
        if self.transposed:
            weight = weight.reshape(*batch, self.groups, *self._channels_first).transpose(-3, -2)
        columns = weight.reshape(*batch, self.groups, rows, self.columns)
        if bias is None:
            return (columns,)
        return columns, bias.reshape(*batch, self.groups, rows, 1)

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``[*batch, G, d_out, d_in]`` of a weight (and bias) by name, ``[*batch, *shape]``."""
        columns = self.to_columns(*(tensors[name] for name in self.names))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of ``to_matrix``."""
        if self.bias_name is None:
            return self.from_columns(matrix)
        return self.from_columns(matrix[..., :-1], matrix[..., -1:])

    def from_columns(self, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
        """As ``from_matrix``, of the weight's columns and the bias' in tensors of their own."""
        batch = weight.shape[:-3]
        if self.transposed:
            channels, rows, kernel = self._channels_first
            weight = weight.reshape(*batch, self.groups, rows, channels, kernel).transpose(-3, -2)
        named = {self.weight_name: weight.reshape((*batch, *self.weight_shape))}
        if self.bias_name is not None:
            assert bias is not None
            named[self.bias_name] = bias.reshape(*batch, self.groups * self.rows)
        return named

    def restrict(self, name: str) -> tuple[Layout, slice]:
        """The layout of the weight or the bias alone, and its columns in the matrix."""
        if name == self.weight_name:
            columns = slice(None) if self.bias_name is None else slice(-1)
            return replace(self, bias_name=None), columns
        return Layout(name, Size([self.groups * self.rows]), None, self.groups), slice(-1, None)


def split_vector(v: Tensor, shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """Cut flat vectors ``[*batch, P]`` into parameters ``[*batch, *shape]``, in their order."""
    pieces = v.split([shape.numel() for shape in shapes.values()], dim=-1)
    return {
        name: piece.reshape((*v.shape[:-1], *shape))
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def join_vector(v: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> Tensor:
    """The inverse of ``split_vector``."""
    pieces = []
    for name, shape in shapes.items():
        batch = v[name].shape[: v[name].ndim - len(shape)]
        pieces.append(v[name].reshape(*batch, shape.numel()))
    return torch.cat(pieces, dim=-1)
