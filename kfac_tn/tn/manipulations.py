"""What can be done with a network: small steps, each of which returns a new one.

A network is multilinear in its nodes. So removing a node differentiates, adding one contracts,
joining two copies squares; renaming an index by another makes the two equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from typing import TypeVar

from kfac_tn.tn.names import add_sizes, fresh
from kfac_tn.tn.node import Axes, Delta, Node, Ones, Operand, Scalar, format_axes, rename_axes
from kfac_tn.tn.structure import Structure

Self = TypeVar("Self", bound="Manipulations")


class Manipulations(Structure):
    """The methods of a `Network` that return another one."""

    def rename(self: Self, names: Mapping[str, str]) -> Self:
        """Return the network with indices renamed; two indices given one name become one.

        Raises:
            ValueError: If there is no index of such a name, two indices made one differ in size,
                or one tensor holds both.
        """
        self.check_known(names)
        sizes: dict[str, int] = {}
        for index, size in self.sizes:
            add_sizes(sizes, {names.get(index, index): size})
        nodes = (node.rename(names) for node in self.nodes)
        return self.build(nodes, rename_axes(self.output, names), sizes)

    def with_output(self: Self, *output: tuple[str, ...]) -> Self:
        """Return the network with other axes of the result; indices left out are summed over."""
        return self.build(self.nodes, output, self.size)

    def with_nodes(self: Self, nodes: Iterable[Node]) -> Self:
        """Return the network with other nodes over the same indices."""
        return self.build(nodes, self.output, self.size)

    def whole(self: Self) -> Self:
        """Return the network with whole operands: patterns that some are read through are nodes.

        `kfac_tn.tn.rewrite.view_operands` does the opposite. What asks for the coefficient of an
        operand (`differentiate`, `replace`, `without`) starts here: the derivative with respect to
        an operand of which a part is read is zero elsewhere.

        Example:
            >>> from kfac_tn import tn
            >>> network = tn.forward(tn.ConvSpec((8, 4, 7), (5, 4, 2), stride=2)).simplify()
            >>> print(network)
            part of input[n c k1 o1] weight[d c k1] -> [n d o1]
            c=4 d=5 k1=2 n=8 o1=3
            >>> print(network.whole())
            input[n c o1'] Pi[k1 o1 o1'] weight[d c k1] -> [n d o1]
            c=4 d=5 k1=2 n=8 o1=3 o1'=7
        """
        nodes, sizes = [], dict(self.size)
        for node in self.nodes:
            if not isinstance(node.symbol, Operand) or not node.symbol.patterns:
                nodes.append(node)
                continue
            axes, patterns = node.axes, []
            for axis, pattern in node.symbol.patterns:
                end = axis + len(pattern.legs)
                legs = axes[axis:end]
                (index,) = fresh(legs[-1], sizes)
                sizes[index] = pattern.input_size
                axes = (*axes[:axis], (index,), *axes[end:])
                patterns.append(Node(pattern, (*legs, (index,))))
            nodes += [Node(Operand(node.symbol.name), axes), *patterns]
        return self if len(nodes) == len(self.nodes) else self.build(nodes, self.output, sizes)

    def sum_over(self: Self, *indices: str) -> Self:
        """Return the network whose result is summed over some of its indices.

        Raises:
            ValueError: If they are no indices of the result.
        """
        if unknown := set(indices) - set(self.output_indices):
            raise ValueError(f"the result [{format_axes(self.output)}] has no indices {unknown}")
        axes = (tuple(i for i in axis if i not in indices) for axis in self.output)
        return self.with_output(*axes)

    def scale(self: Self, factor: Fraction) -> Self:
        """Return the network multiplied by a number."""
        return self.with_nodes((*self.nodes, Node(Scalar(Fraction(factor)), ())))

    def multiply(
        self: Self, name: str, *axes: tuple[str, ...], sizes: Mapping[str, int] | None = None
    ) -> Self:
        """Return the network multiplied by one more operand.

        Args:
            name: Name of the operand.
            axes: Its axes, over indices of the network or new ones.
            sizes: Sizes of the new indices; others may be among them.

        Raises:
            ValueError: If an index has no size, or another one than in the network.
        """
        nodes = (*self.nodes, Node(Operand(name), axes))
        return self.build(nodes, self.output, add_sizes(dict(self.size), sizes or {}))

    def contract_with(
        self: Self, name: str, *output: tuple[str, ...], leading: Mapping[str, int] | None = None
    ) -> Self:
        """Return the network multiplied by an operand shaped like its result.

        Followed by `differentiate`, this is a vector-Jacobian product.

        Args:
            name: Name of the operand.
            output: Axes of the new result. None: the scalar product.
            leading: Further axes of the operand, in front of the others, by name of their index
                and size: several cotangents at once.

        Raises:
            ValueError: If `leading` contradicts the sizes of the network.

        Example:
            >>> from kfac_tn.tn import Network, Node, Operand
            >>> nodes = [Node(Operand("A"), (("i",), ("j",))), Node(Operand("x"), (("j",),))]
            >>> network = Network.build(nodes, [("i",)], {"i": 2, "j": 3})
            >>> print(network.contract_with("y").differentiate("x"))
            A[i j] y[i] -> [j]
            i=2 j=3
        """
        axes = (*((index,) for index in leading or ()), *self.output)
        return self.multiply(name, *axes, sizes=leading).with_output(*output)

    def replace(self: Self, name: str, other: str | Self) -> Self:
        """Return the network with something else in the place of an operand that occurs once.

        Args:
            name: The operand.
            other: Name of another operand of this shape, as in a Jacobian-vector product; or a
                network whose result has this shape, as a factorised kernel. The axes of its result
                have the indices of the operand's, in number and size, or just one, which is then
                split into these. Its other indices are primed if they would clash.

        Raises:
            ValueError: If the operand doesn't occur once, or the shapes do not fit.

        Example:
            >>> from kfac_tn.tn import Network, Node, Operand
            >>> vectors = [Node(Operand("a"), (("i",),)), Node(Operand("b"), (("j",),))]
            >>> outer = Network.build(vectors, [("i",), ("j",)], {"i": 2, "j": 3})
            >>> total = Network.build([Node(Operand("A"), (("k",), ("l",)))], [], {"k": 2, "l": 3})
            >>> print(total.replace("A", outer))
            a[k] b[l] -> []
            k=2 l=3
        """
        self = self.whole()
        at = self.find(name)
        axes, sizes = self.nodes[at].axes, dict(self.size)
        if isinstance(other, str):
            nodes = [Node(Operand(other), axes)]
        else:
            other = other.whole()
            names = other._fit(self, axes)
            inner = [index for index in other.size if index not in names]
            clashing = [index for index in inner if index in sizes]
            new = dict(zip(clashing, fresh(clashing, {*sizes, *inner}), strict=True))
            names |= {index: (new.get(index, index),) for index in inner}
            sizes |= {names[index][0]: other.size[index] for index in inner}
            nodes = [node.expand(names) for node in other.nodes]
        return self.build((*self.nodes[:at], *nodes, *self.nodes[at + 1 :]), self.output, sizes)

    def _fit(self: Self, outer: Self, axes: Axes) -> dict[str, tuple[str, ...]]:
        """What the indices of the result become in the place of another network's axes."""
        lengths = lambda network, axis: [network.size[index] for index in axis]  # noqa: E731
        if self.shape != outer.shape_of(axes) or any(
            len(own) > 1 and lengths(self, own) != lengths(outer, axis)
            for own, axis in zip(self.output, axes, strict=True)
        ):
            sizes = {index: outer.size[index] for axis in axes for index in axis}
            raise ValueError(
                f"a result [{format_axes(self.output)}] of shape {self.shape} doesn't fit in the "
                f"place of [{format_axes(axes)}] with sizes {sizes}"
            )
        names: dict[str, tuple[str, ...]] = {}
        for own, axis in zip(self.output, axes, strict=True):
            parts = [axis] if len(own) == 1 else [(index,) for index in axis]
            names.update(zip(own, parts, strict=True))
        return names

    def without(
        self: Self, name: str, *output: tuple[str, ...], split: Collection[str] = ()
    ) -> Self:
        """Return the network without an operand, and with the given axes of the result.

        This is the coefficient of the operand: the derivative but for its trivial parts, the
        indices that the operand shares with the result, in which the derivative is an identity.

        Args:
            name: The operand, which occurs once.
            output: Axes of the new result. None: it is summed over everything.
            split: Indices in which the identity is wanted: a `Delta` holds each of them equal to
                its primed copy.

        Raises:
            ValueError: If the operand doesn't occur once, or the output has other indices than
                those of the nodes that are left.
        """
        self = self.whole()
        at = self.find(name)
        copies = dict(zip(split, fresh(split, self.size), strict=True))
        deltas = [Node(Delta(self.size[i]), ((i,), (copies[i],))) for i in split]
        sizes = {**self.size, **{copies[i]: self.size[i] for i in split}}
        return self.build((*self.nodes[:at], *self.nodes[at + 1 :], *deltas), output, sizes)

    def differentiate(self: Self, name: str) -> Self:
        """Return the derivative with respect to an operand that occurs once.

        The operand's axes follow those of the result. An index that operand and result share
        is split in two, held equal by a `Delta`. Along an index that nothing else holds, the
        derivative is constant: `Ones`.

        Raises:
            ValueError: If the operand doesn't occur once.

        Example:
            >>> from kfac_tn.tn import Network, Node, Operand
            >>> matrix = Node(Operand("x"), (("n",), ("i",)))
            >>> row_sums = Network.build([matrix], [("n",)], {"n": 2, "i": 3})
            >>> print(row_sums.differentiate("x"))
            ones[i] delta[n n'] -> [n n' i]
            i=3 n=2 n'=2
        """
        self = self.whole()
        removed = self.nodes[self.find(name)]
        shared = [index for index in removed.indices if index in self.output_indices]
        lost = [i for i in removed.indices if i not in shared and len(self.holders(i)) == 1]
        ones = [Node(Ones(self.size[index]), ((index,),)) for index in lost]
        copies = dict(zip(shared, fresh(shared, self.size), strict=True))
        output = (*self.output, *rename_axes(removed.axes, copies))
        return self.with_nodes((*self.nodes, *ones)).without(name, *output, split=shared)

    def join(
        self: Self, other: Self, share: Collection[str], output: Iterable[tuple[str, ...]]
    ) -> Self:
        """Return the product of two networks.

        Args:
            other: The second network. Operands of the same name are the same tensor: `replace`
                them before (`input` by `input_2`) if they are not.
            share: Indices that are the same in both. All other indices of the second are primed:
                its `c` is called `c'` in the result, or `c''` if there is a `c'` already.
            output: Axes of the new result.

        Raises:
            ValueError: If they don't both have the indices to share, in the same sizes.
        """
        self.check_known(share)
        other.check_known(share)
        own = [index for index in other.size if index not in share]
        second = other.rename(dict(zip(own, fresh(own, self.size), strict=True)))
        sizes = add_sizes(dict(self.size), second.size)
        return self.build((*self.nodes, *second.nodes), output, sizes)
