"""Tensor networks as plain data: nodes over named indices, and the indices of the result.

A `Network` is immutable and hashable, so everything expensive about it (simplification, contraction
order, the tensors of its constants) can be cached under the network itself. It is multilinear in
its nodes, and derivatives and curvature are derived by small manipulations that return new
networks: removing a node differentiates, adding one contracts, joining two copies squares.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.node import Axes, Delta, Node, Operand, Scalar, format_axes, rename_axes


@dataclass(frozen=True)
class Network:
    """A product of tensors, summed over every index that is not an output.

    Attributes:
        nodes: The tensors. Their order has no meaning for the result.
        output: Axes of the result. Each index occurs once, and in some node.
        sizes: Pairs of index and size, sorted by index, of exactly the indices of the nodes.

    Raises:
        ValueError: If sizes are missing or contradict a constant's shape, an index occurs twice in
            one tensor, an output index belongs to no node, or the nodes of one operand differ in
            shape.

    Example:
        >>> matrix = Node(Operand("matrix"), (("i",), ("j",)))
        >>> vector = Node(Operand("vector"), (("j",),))
        >>> product = Network.build([matrix, vector], output=[("i",)], sizes={"i": 2, "j": 3})
        >>> print(product)
        matrix[i j] vector[j] -> [i]
        i=2 j=3
        >>> product.evaluate(matrix=torch.ones(2, 3), vector=torch.ones(3))
        tensor([3., 3.])
    """

    nodes: tuple[Node, ...]
    output: Axes
    sizes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        held = {index for node in self.nodes for index in node.indices}
        if missing := held ^ set(self.size):
            raise ValueError(f"sizes must name the indices of the nodes exactly: see {missing}")
        for tensor in (*(node.indices for node in self.nodes), self.output_indices):
            if len(set(tensor)) < len(tensor):
                raise ValueError(f"an index occurs twice in one tensor: {tensor}")
        if unheld := set(self.output_indices) - held:
            raise ValueError(f"output indices that belong to no node: {unheld}")
        shapes: dict[Operand, tuple[int, ...]] = {}
        for node in self.nodes:
            shape = self.shape_of(node.axes)
            if isinstance(node.symbol, Operand):
                expected = shapes.setdefault(node.symbol, shape)
            else:
                expected = tuple(node.symbol.shape)
            if shape != expected:
                raise ValueError(f"{node} has shape {shape}, expected {expected}")

    @classmethod
    def build(
        cls, nodes: Iterable[Node], output: Iterable[tuple[str, ...]], sizes: Mapping[str, int]
    ) -> Network:
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

    # ---- what it is -----------------------------------------------------------------------------

    @cached_property
    def size(self) -> dict[str, int]:
        """Size of each index."""
        return dict(self.sizes)

    @cached_property
    def output_indices(self) -> tuple[str, ...]:
        """The indices of the result, slowest first."""
        return tuple(index for axis in self.output for index in axis)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.shape_of(self.output)

    @cached_property
    def operands(self) -> dict[str, tuple[int, ...]]:
        """Shape of each operand, by name."""
        return {
            node.symbol.name: self.shape_of(node.axes)
            for node in self.nodes
            if isinstance(node.symbol, Operand)
        }

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
        found = [n for n, node in enumerate(self.nodes) if node.symbol == Operand(name)]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} nodes hold the operand {name!r}, expected one; "
                f"the operands are {sorted(self.operands)}"
            )
        return found[0]

    @cached_property
    def _hash(self) -> int:
        return hash((self.nodes, self.output, self.sizes))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        # Hashes of strings differ between processes: what is cached on the instance stays here.
        return Network, (self.nodes, self.output, self.sizes)

    def __str__(self) -> str:
        nodes = " ".join(map(str, self.nodes))
        sizes = " ".join(f"{index}={size}" for index, size in self.sizes)
        return f"{nodes} -> [{format_axes(self.output)}]\n{sizes}"

    # ---- manipulations --------------------------------------------------------------------------

    def rename(self, names: Mapping[str, str]) -> Network:
        """Return the network with indices renamed; two indices given one name become one."""
        return Network.build(
            (node.rename(names) for node in self.nodes),
            rename_axes(self.output, names),
            {names.get(index, index): size for index, size in self.sizes},
        )

    def with_output(self, *output: tuple[str, ...]) -> Network:
        """Return the network with other axes of the result; indices left out are summed over."""
        return Network.build(self.nodes, output, self.size)

    def with_nodes(self, nodes: Iterable[Node]) -> Network:
        """Return the network with other nodes over the same indices."""
        return Network.build(nodes, self.output, self.size)

    def sum_over(self, *indices: str) -> Network:
        """Return the network whose result is summed over some of its indices."""
        axes = (tuple(i for i in axis if i not in indices) for axis in self.output)
        return self.with_output(*axes)

    def scale(self, factor: Fraction) -> Network:
        """Return the network multiplied by a number."""
        return self.with_nodes((*self.nodes, Node(Scalar(Fraction(factor)), ())))

    def replace(self, name: str, other: str) -> Network:
        """Return the network with another operand in the place of one; a JVP does this."""
        at = self.find(name)
        node = Node(Operand(other), self.nodes[at].axes)
        return self.with_nodes((*self.nodes[:at], node, *self.nodes[at + 1 :]))

    def without(self, name: str, *output: tuple[str, ...]) -> Network:
        """Return the network without an operand, and with the given axes of the result.

        This is the coefficient of the operand: the derivative but for its trivial parts, the
        indices that the operand shares with the result, in which the derivative is an identity.
        """
        at = self.find(name)
        return Network.build((*self.nodes[:at], *self.nodes[at + 1 :]), output, self.size)

    def differentiate(self, name: str) -> Network:
        """Return the derivative with respect to an operand that occurs once.

        The operand's axes follow those of the result. An index that operand and result share
        is split in two, held equal by a `Delta`.
        """
        at = self.find(name)
        removed = self.nodes[at]
        shared = [index for index in removed.indices if index in self.output_indices]
        split = dict(zip(shared, self._fresh(shared), strict=True))
        deltas = [Node(Delta(self.size[i]), ((i,), (split[i],))) for i in shared]
        return Network.build(
            (*self.nodes[:at], *self.nodes[at + 1 :], *deltas),
            (*self.output, *rename_axes(removed.axes, split)),
            {**self.size, **{split[i]: self.size[i] for i in shared}},
        )

    def contract_with(self, name: str, *output: tuple[str, ...]) -> Network:
        """Return the network multiplied by an operand shaped like its result.

        Args:
            name: Name of the operand.
            output: Axes of the new result. None: the scalar product.
        """
        nodes = (*self.nodes, Node(Operand(name), self.output))
        return Network.build(nodes, output, self.size)

    def join(
        self, other: Network, share: Collection[str], output: Iterable[tuple[str, ...]]
    ) -> Network:
        """Return the product of two networks.

        Args:
            other: The second network.
            share: Indices that are the same in both. All other indices of the second are primed:
                its `c` is called `c'` in the result.
            output: Axes of the new result.
        """
        renamed = [index for index in other.size if index not in share]
        second = other.rename(dict(zip(renamed, self._fresh(renamed), strict=True)))
        nodes = (*self.nodes, *second.nodes)
        return Network.build(nodes, output, {**self.size, **second.size})

    def _fresh(self, indices: Iterable[str]) -> list[str]:
        """Prime index names until they are none of this network's."""
        fresh = []
        for index in indices:
            name = index + "'"
            while name in self.size:
                name += "'"
            fresh.append(name)
        return fresh

    # ---- evaluation: the work is done further down the house, in `rewrite` and `plan` -----------

    def simplify(self) -> Network:
        """Return an equal network that is cheaper to evaluate (see `kfac_tn.tn.rewrite`)."""
        from kfac_tn.tn.rewrite import simplify

        return simplify(self)

    @property
    def flops(self) -> int:
        """Multiplications and additions of one evaluation; views and copies count nothing."""
        from kfac_tn.tn.plan import cost

        return cost(self).flops

    @property
    def peak_memory(self) -> int:
        """Largest number of elements held at once in an evaluation, result included.

        Operands and constants are not counted. Times the size of an element: bytes.
        """
        from kfac_tn.tn.plan import cost

        return cost(self).peak_memory

    def evaluate(self, **operands: Tensor) -> Tensor:
        """Compute the result, as written: call `simplify` first for speed.

        The contraction is planned once per network, dtype and device. Differentiable, also by
        `torch.func`. The result may be a view of an operand.

        Args:
            operands: The tensors, by name, all of one dtype and device.

        Raises:
            ValueError: If operands are missing, unknown, or differ from the network in shape, or
                from each other in dtype or device.
        """
        from kfac_tn.tn.plan import plan

        dtype, device = self.check(operands)
        return plan(self, dtype, device)(operands)

    def einsum(self, **operands: Tensor) -> tuple[str, list[Tensor], tuple[int, ...]]:
        """Write the network as an einsum equation, for anybody's einsum.

        Args:
            operands: The tensors, by name, all of one dtype and device.

        Returns:
            The equation, its tensors (operands reshaped to one axis per index, and dense
            constants), and the shape to give to the result.

        Raises:
            ValueError: As `evaluate`; or if there are more indices than letters.

        Example:
            >>> matrix = Node(Operand("x"), (("i", "j"),))
            >>> network = Network.build([matrix], output=[("j", "i")], sizes={"i": 2, "j": 3})
            >>> equation, tensors, shape = network.einsum(x=torch.arange(6.0))
            >>> equation, shape
            ('ab->ba', (6,))
            >>> torch.einsum(equation, *tensors).reshape(shape)
            tensor([0., 3., 1., 4., 2., 5.])
        """
        dtype, device = self.check(operands)
        if len(self.sizes) > len(string.ascii_letters):
            raise ValueError(
                f"an equation has {len(string.ascii_letters)} letters, but this network "
                f"{len(self.sizes)} indices: call evaluate(), which has no such limit"
            )
        letter = dict(zip(self.size, string.ascii_letters, strict=False))
        terms, tensors = [], []
        for node in self.nodes:
            if isinstance(node.symbol, Operand):
                tensor = operands[node.symbol.name].reshape([self.size[i] for i in node.indices])
            else:
                tensor = node.symbol.tensor(dtype, device)
            terms.append("".join(letter[index] for index in node.indices))
            tensors.append(tensor)
        result = "".join(letter[index] for index in self.output_indices)
        return f"{','.join(terms)}->{result}", tensors, self.shape

    def check(self, operands: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
        """Check operands against the network.

        Args:
            operands: The tensors, by name.

        Returns:
            Their dtype and device.

        Raises:
            ValueError: As `evaluate`.
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
