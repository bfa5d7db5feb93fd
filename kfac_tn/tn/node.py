"""The nodes of a tensor network: what they hold, and the indices along their axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from kfac_tn.tn.pattern import IndexPattern

Axes: TypeAlias = tuple[tuple[str, ...], ...]
"""The axes of a tensor. Each is a tuple of named indices, slowest first, as `(g c)` in einops."""


RESERVED = ("self", "memory_limit", "algorithm")
"""Names that no operand has: `Network.evaluate` takes operands beside these, by name."""


class Constant(Protocol):
    """What a node may hold besides an operand: a symbol that can make its own tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make the tensor."""


@dataclass(frozen=True)
class Operand:
    """A tensor supplied at evaluation, or a view of a part of it.

    Nodes with equal names hold the same tensor. A node that holds a view has, in the place of each
    axis that is read through a pattern, the legs of the pattern as axes, kernel position first.

    Attributes:
        name: Keyword under which `Network.evaluate` takes the tensor; none of `RESERVED`.
        patterns: Axes of the tensor, in their order, and the pattern through which each is read.
            What is read must be inside: a view has no zeros. Default: none, the tensor as it is.

    Raises:
        ValueError: If the name is reserved, the axes are not in their order, or a pattern is no
            view.

    Example:
        >>> from kfac_tn.tn import Network
        >>> pairs = IndexPattern(kernel_size=2, output_size=3, input_size=7, stride=2)
        >>> x = Node(Operand("x", ((0, pairs),)), (("k",), ("o",)))
        >>> network = Network.build([x], [("o",), ("k",)], {"k": 2, "o": 3})
        >>> print(network)
        part of x[k o] -> [o k]
        k=2 o=3
        >>> network.evaluate(x=torch.arange(7.0))
        tensor([[0., 1.],
                [2., 3.],
                [4., 5.]])
    """

    name: str
    patterns: tuple[tuple[int, IndexPattern], ...] = ()

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise ValueError(
                f"an operand can't be named {self.name!r}: evaluate() has an argument of this name"
            )
        axes = [axis for axis, _ in self.patterns]
        if axes != sorted(set(axes)) or min(axes, default=0) < 0:
            raise ValueError(f"axes must be in their order, and not negative: {axes}")
        for axis, pattern in self.patterns:
            if not pattern.selects or max(pattern.overhang) > 0:
                raise ValueError(
                    f"axis {axis} of {self.name!r} can't be viewed through {pattern!r}"
                )

    def __str__(self) -> str:
        return f"part of {self.name}" if self.patterns else self.name

    def shape_of(self, axes: Axes, size: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the tensor.

        Args:
            axes: Axes of the node.
            size: Size of each index.

        Raises:
            ValueError: If the legs of a pattern have other sizes, or more than one index each.
        """
        shapes = [tuple(size[index] for index in axis) for axis in axes]
        for axis, pattern in self.patterns:
            legs = [(size,) for size, _ in pattern.legs]
            end = axis + len(legs)
            if shapes[axis:end] != legs:
                raise ValueError(
                    f"axis {axis} of {self.name!r} is read through {pattern!r}, with an index for "
                    f"each of its legs: [{format_axes(axes[axis:end])}] of {shapes[axis:end]} "
                    f"should be of {legs}"
                )
            shapes[axis:end] = [(pattern.input_size,)]
        return tuple(map(prod, shapes))


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
