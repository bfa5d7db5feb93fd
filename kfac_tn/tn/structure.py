"""What a tensor network is: nodes over named indices, and the indices of the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor

from kfac_tn.tn.node import Axes, Node, Operand, format_axes

Self = TypeVar("Self", bound="Structure")


@dataclass(frozen=True)
class Structure:
    """The data of a `Network`, checked, comparable, hashable and printable.

    Attributes:
        nodes: The tensors. Their order has no meaning for the result.
        output: Axes of the result. Each index occurs once, and in some node.
        sizes: Pairs of index and size, sorted by index, of exactly the indices of the nodes.
        size: Size of each index. This and what follows is derived, and computed once: at
            construction, where `torch.compile` doesn't look (it knows no `cached_property`'s lock).
        output_indices: The indices of the result, slowest first.
        shape: Shape of the result.
        operands: Shape of each operand, by name.

    Raises:
        ValueError: If sizes are missing, no whole numbers of at least 1, or contradict a constant's
            shape, an index occurs twice in one tensor, an output index belongs to no node, or the
            nodes of one operand differ in shape.
    """

    nodes: tuple[Node, ...]
    output: Axes
    sizes: tuple[tuple[str, int], ...]
    size: dict[str, int] = field(init=False, repr=False, compare=False)
    output_indices: tuple[str, ...] = field(init=False, repr=False, compare=False)
    shape: tuple[int, ...] = field(init=False, repr=False, compare=False)
    operands: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def derive(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        derive("size", dict(self.sizes))
        derive("output_indices", tuple(index for axis in self.output for index in axis))
        if wrong := {i: n for i, n in self.sizes if not isinstance(n, Integral) or n < 1}:
            raise ValueError(f"sizes must be whole numbers, at least 1: not {wrong}")
        held = {index for node in self.nodes for index in node.indices}
        if missing := held ^ set(self.size):
            raise ValueError(f"sizes must name the indices of the nodes exactly: see {missing}")
        for tensor in (*(node.indices for node in self.nodes), self.output_indices):
            if len(set(tensor)) < len(tensor):
                raise ValueError(f"an index occurs twice in one tensor: {tensor}")
        if unheld := set(self.output_indices) - held:
            raise ValueError(f"output indices that belong to no node: {unheld}")
        shapes: dict[str, tuple[int, ...]] = {}
        for node in self.nodes:
            shape = self.shape_of(node.axes)
            if isinstance(node.symbol, Operand):
                shape = node.symbol.shape_of(node.axes, self.size)
                expected = shapes.setdefault(node.symbol.name, shape)
            else:
                expected = tuple(node.symbol.shape)
            if shape != expected:
                raise ValueError(f"{node} has shape {shape}, expected {expected}")
        derive("shape", self.shape_of(self.output))
        derive("operands", shapes)

    @classmethod
    def build(
        cls: type[Self],
        nodes: Iterable[Node],
        output: Iterable[tuple[str, ...]],
        sizes: Mapping[str, int],
    ) -> Self:
        """Make a network, dropping the sizes of indices that no node holds.

        Args:
            nodes: The tensors.
            output: Axes of the result. Empty axes are dropped.
            sizes: Size of each index, at least of those the nodes hold.
        """
        nodes = tuple(nodes)
        held = {index for node in nodes for index in node.indices}
        kept = tuple(sorted((index, size) for index, size in sizes.items() if index in held))
        return cls(nodes, tuple(tuple(axis) for axis in output if axis), kept)

    def shape_of(self, axes: Axes) -> tuple[int, ...]:
        """Shape of a tensor with the given axes."""
        return tuple(prod(self.size[index] for index in axis) for axis in axes)

    def holders(self, index: str) -> tuple[int, ...]:
        """Positions of the nodes that hold an index."""
        return tuple(n for n, node in enumerate(self.nodes) if index in node.indices)

    def find(self, name: str) -> int:
        """Position of the node that holds an operand.

        Raises:
            ValueError: If no node or several hold it.
        """
        symbols = enumerate(node.symbol for node in self.nodes)
        found = [n for n, held in symbols if isinstance(held, Operand) and held.name == name]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} nodes hold the operand {name!r}, expected one; "
                f"the operands are {sorted(self.operands)}"
            )
        return found[0]

    def axes_of(self, name: str) -> Axes:
        """Axes of the node that holds an operand.

        Raises:
            ValueError: If no node or several hold it, or it holds but a part of the operand.
        """
        node = self.nodes[self.find(name)]
        if node.symbol != Operand(name):
            raise ValueError(
                f"[{format_axes(node.axes)}] are the axes of a part of {name!r}: "
                f"call whole().axes_of({name!r})"
            )
        return node.axes

    def check_known(self, indices: Iterable[str]) -> None:
        """Check that there are indices of these names.

        Raises:
            ValueError: If one is unknown.
        """
        if unknown := set(indices) - set(self.size):
            raise ValueError(f"there are no indices {unknown} among {sorted(self.size)}")

    def check(self, operands: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
        """Check operands against the network.

        Args:
            operands: The tensors, by name.

        Returns:
            Their dtype and device.

        Raises:
            ValueError: As `Network.evaluate`.
        """
        if operands.keys() != self.operands.keys():
            raise ValueError(
                f"this network takes the operands {sorted(self.operands)}, got {sorted(operands)}"
            )
        if not operands:
            raise ValueError("this network has no operands: there is nothing to evaluate")
        first, reference = next(iter(operands.items()))
        if not (reference.is_floating_point() or reference.is_complex()):
            raise ValueError(f"operand {first!r} has dtype {reference.dtype}: use floating point")
        for name, tensor in operands.items():
            if tuple(tensor.shape) != self.operands[name]:
                raise ValueError(
                    f"operand {name!r} has shape {tuple(tensor.shape)}, this network expects "
                    f"{self.operands[name]}"
                )
            if tensor.dtype != reference.dtype or tensor.device != reference.device:
                raise ValueError(
                    f"operands must share dtype and device: {name!r} is {tensor.dtype} on "
                    f"{tensor.device}, {first!r} is {reference.dtype} on {reference.device}"
                )
        return reference.dtype, reference.device

    @cached_property
    def _hash(self) -> int:
        return hash((self.nodes, self.output, self.sizes))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        # Hashes of strings differ between processes: what is cached on the instance stays here.
        return type(self), (self.nodes, self.output, self.sizes)

    def __str__(self) -> str:
        nodes = " ".join(map(str, self.nodes))
        sizes = " ".join(f"{index}={size}" for index, size in self.sizes)
        return f"{nodes} -> [{format_axes(self.output)}]\n{sizes}"
