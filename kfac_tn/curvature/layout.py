"""How parameters lie in vectors and matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor


@dataclass(frozen=True)
class Layout:
    """How the parameters of a layer lie in its matrix ``[G, d_out, d_in]``.

    The weight is flattened by rows, its rows divided among the groups; the bias is the last column.

    Attributes:
        weight_name: Name of the weight.
        weight_shape: Its shape ``[G * d_out, ...]``.
        bias_name: Name of the bias (shape ``[G * d_out]``), or None.
        groups: G.
    """

    weight_name: str
    weight_shape: Size
    bias_name: str | None = None
    groups: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weight, and of the bias if there is one."""
        return (self.weight_name,) if self.bias_name is None else (self.weight_name, self.bias_name)

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``[*batch, G, d_out, d_in]`` of a weight (and bias) by name, ``[*batch, *shape]``."""
        weight = tensors[self.weight_name]
        batch = weight.shape[: weight.ndim - len(self.weight_shape)]
        rows, columns = self.weight_shape[0] // self.groups, self.weight_shape[1:].numel()
        matrix = weight.reshape(*batch, self.groups, rows, columns)
        if self.bias_name is None:
            return matrix
        bias = tensors[self.bias_name].reshape(*batch, self.groups, rows, 1)
        return torch.cat([matrix, bias], dim=-1)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of ``to_matrix``."""
        batch = matrix.shape[:-3]
        if self.bias_name is None:
            return {self.weight_name: matrix.reshape(*batch, *self.weight_shape)}
        return {
            self.weight_name: matrix[..., :-1].reshape(*batch, *self.weight_shape),
            self.bias_name: matrix[..., -1].reshape(*batch, self.weight_shape[0]),
        }

    def restrict(self, name: str) -> tuple[Layout, slice]:
        """The layout of the weight or the bias alone, and its columns in the matrix."""
        if name == self.weight_name:
            columns = slice(None) if self.bias_name is None else slice(-1)
            return Layout(name, self.weight_shape, None, self.groups), columns
        return Layout(name, self.weight_shape[:1], None, self.groups), slice(-1, None)


def split_vector(v: Tensor, shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """Cut flat vectors ``[*batch, P]`` into parameters ``[*batch, *shape]``, in their order."""
    pieces = v.split([shape.numel() for shape in shapes.values()], dim=-1)
    return {
        name: piece.reshape(*v.shape[:-1], *shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def join_vector(v: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> Tensor:
    """The inverse of ``split_vector``."""
    pieces = []
    for name, shape in shapes.items():
        batch = v[name].shape[: v[name].ndim - len(shape)]
        pieces.append(v[name].reshape(*batch, shape.numel()))
    return torch.cat(pieces, dim=-1)
