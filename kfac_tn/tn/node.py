"""The nodes of a tensor network: what they hold, and the indices along their axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Axes: TypeAlias = tuple[tuple[str, ...], ...]
"""The axes of a tensor. Each is a tuple of named indices, slowest first, as `(g c)` in einops."""


class Constant(Protocol):
    """What a node may hold besides an operand: a symbol that can make its own tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make the tensor."""


@dataclass(frozen=True)
class Operand:
    """A tensor supplied at evaluation. Nodes with equal names hold the same tensor.

    Attributes:
        name: Keyword under which `Network.evaluate` takes the tensor.
    """

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Scalar:
    """A rational factor, kept exact until it meets a dtype.

    Attributes:
        value: The factor.
    """

    value: Fraction
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return str(self.value)

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make the 0-dimensional tensor."""
        return torch.tensor(float(self.value), dtype=dtype, device=device)


@dataclass(frozen=True)
class Delta:
    """The identity matrix: its two indices are equal.

    Attributes:
        size: Number of rows.
    """

    size: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor."""
        return (self.size, self.size)

    def __str__(self) -> str:
        return "delta"

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make the `[size, size]` identity."""
        return torch.eye(self.size, dtype=dtype, device=device)


@dataclass(frozen=True)
class Ones:
    """A vector of ones: nothing depends on its index.

    Attributes:
        size: Number of entries.
    """

    size: int

    @property
    def shape(self) -> tuple[int]:
        """Shape of the tensor."""
        return (self.size,)

    def __str__(self) -> str:
        return "ones"

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make the `[size]` vector."""
        return torch.ones(self.size, dtype=dtype, device=device)


@dataclass(frozen=True)
class Node:
    """A tensor of the network: what it holds, and the indices along its axes.

    Attributes:
        symbol: An `Operand`, or a constant: `IndexPattern`, `Delta`, `Ones`, `Scalar`, or your own.
        axes: One tuple of index names per axis of the tensor.
    """

    symbol: Operand | Constant
    axes: Axes

    @cached_property
    def indices(self) -> tuple[str, ...]:
        """All indices of the node, slowest first."""
        return tuple(index for axis in self.axes for index in axis)

    def __str__(self) -> str:
        return f"{self.symbol}[{format_axes(self.axes)}]"

    def rename(self, names: Mapping[str, str]) -> Node:
        """Return the node with indices renamed."""
        return Node(self.symbol, rename_axes(self.axes, names))

    def expand(self, names: Mapping[str, tuple[str, ...]]) -> Node:
        """Return the node with one or several indices in the place of each.

        Raises:
            ValueError: If one index of a constant, whose axes have one each, is to become several.
        """
        axes = tuple(tuple(name for index in axis for name in names[index]) for axis in self.axes)
        if not isinstance(self.symbol, Operand) and any(len(axis) > 1 for axis in axes):
            raise ValueError(f"the axes of {self} cannot be split into [{format_axes(axes)}]")
        return Node(self.symbol, axes)


def rename_axes(axes: Axes, names: Mapping[str, str]) -> Axes:
    """Axes with those of their indices renamed that have a new name."""
    return tuple(tuple(names.get(index, index) for index in axis) for axis in axes)


def format_axes(axes: Axes) -> str:
    """Axes as in einops: indices, composite axes in parentheses."""
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)
