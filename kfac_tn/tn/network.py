"""Tensor networks: transform them, evaluate them.

A `Network` is immutable and hashable, so everything expensive about it (simplification, contraction
order, the tensors of its constants) can be cached under the network itself. It is multilinear in
its nodes, and derivatives and curvature are derived by small manipulations that return new
networks: removing a node differentiates, adding one contracts, joining two copies squares.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.tn.names import add_sizes, fresh
from kfac_tn.tn.node import Axes, Delta, Node, Ones, Operand, Scalar, format_axes, rename_axes
from kfac_tn.tn.structure import Structure

if TYPE_CHECKING:
    from kfac_tn.tn.plan import Plan, Recipe
    from kfac_tn.tn.rewrite import Explanation

PLAIN = (Tensor, Parameter)
"""Types of tensors that may meet the constants that are kept; fake tensors, say, may not."""


class Network(Structure):
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
        >>> import torch
        >>> matrix = Node(Operand("matrix"), (("i",), ("j",)))
        >>> vector = Node(Operand("vector"), (("j",),))
        >>> product = Network.build([matrix, vector], output=[("i",)], sizes={"i": 2, "j": 3})
        >>> print(product)
        matrix[i j] vector[j] -> [i]
        i=2 j=3
        >>> product.evaluate(matrix=torch.ones(2, 3), vector=torch.ones(3))
        tensor([3., 3.])
    """

    # ---- manipulations --------------------------------------------------------------------------

    def rename(self, names: Mapping[str, str]) -> Network:
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
        return Network.build(nodes, rename_axes(self.output, names), sizes)

    def with_output(self, *output: tuple[str, ...]) -> Network:
        """Return the network with other axes of the result; indices left out are summed over."""
        return Network.build(self.nodes, output, self.size)

    def with_nodes(self, nodes: Iterable[Node]) -> Network:
        """Return the network with other nodes over the same indices."""
        return Network.build(nodes, self.output, self.size)

    def sum_over(self, *indices: str) -> Network:
        """Return the network whose result is summed over some of its indices.

        Raises:
            ValueError: If they are no indices of the result.
        """
        if unknown := set(indices) - set(self.output_indices):
            raise ValueError(f"the result [{format_axes(self.output)}] has no indices {unknown}")
        axes = (tuple(i for i in axis if i not in indices) for axis in self.output)
        return self.with_output(*axes)

    def scale(self, factor: Fraction) -> Network:
        """Return the network multiplied by a number."""
        return self.with_nodes((*self.nodes, Node(Scalar(Fraction(factor)), ())))

    def multiply(
        self, name: str, *axes: tuple[str, ...], sizes: Mapping[str, int] | None = None
    ) -> Network:
        """Return the network multiplied by one more operand.

        Args:
            name: Name of the operand.
            axes: Its axes, over indices of the network or new ones.
            sizes: Sizes of the new indices; others may be among them.

        Raises:
            ValueError: If an index has no size, or another one than in the network.
        """
        nodes = (*self.nodes, Node(Operand(name), axes))
        return Network.build(nodes, self.output, add_sizes(dict(self.size), sizes or {}))

    def contract_with(
        self, name: str, *output: tuple[str, ...], leading: Mapping[str, int] | None = None
    ) -> Network:
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
            >>> nodes = [Node(Operand("A"), (("i",), ("j",))), Node(Operand("x"), (("j",),))]
            >>> network = Network.build(nodes, [("i",)], {"i": 2, "j": 3})
            >>> print(network.contract_with("y").differentiate("x"))
            A[i j] y[i] -> [j]
            i=2 j=3
        """
        axes = (*((index,) for index in leading or ()), *self.output)
        return self.multiply(name, *axes, sizes=leading).with_output(*output)

    def replace(self, name: str, other: str | Network) -> Network:
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
            >>> vectors = [Node(Operand("a"), (("i",),)), Node(Operand("b"), (("j",),))]
            >>> outer = Network.build(vectors, [("i",), ("j",)], {"i": 2, "j": 3})
            >>> total = Network.build([Node(Operand("A"), (("k",), ("l",)))], [], {"k": 2, "l": 3})
            >>> print(total.replace("A", outer))
            a[k] b[l] -> []
            k=2 l=3
        """
        at = self.find(name)
        axes, sizes = self.nodes[at].axes, dict(self.size)
        if isinstance(other, str):
            nodes = [Node(Operand(other), axes)]
        else:
            names = other._fit(self, axes)
            inner = [index for index in other.size if index not in names]
            clashing = [index for index in inner if index in sizes]
            new = dict(zip(clashing, fresh(clashing, {*sizes, *inner}), strict=True))
            names |= {index: (new.get(index, index),) for index in inner}
            sizes |= {names[index][0]: other.size[index] for index in inner}
            nodes = [node.expand(names) for node in other.nodes]
        return Network.build((*self.nodes[:at], *nodes, *self.nodes[at + 1 :]), self.output, sizes)

    def _fit(self, outer: Network, axes: Axes) -> dict[str, tuple[str, ...]]:
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

    def without(self, name: str, *output: tuple[str, ...], split: Collection[str] = ()) -> Network:
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
        at = self.find(name)
        copies = dict(zip(split, fresh(split, self.size), strict=True))
        deltas = [Node(Delta(self.size[i]), ((i,), (copies[i],))) for i in split]
        sizes = {**self.size, **{copies[i]: self.size[i] for i in split}}
        return Network.build((*self.nodes[:at], *self.nodes[at + 1 :], *deltas), output, sizes)

    def differentiate(self, name: str) -> Network:
        """Return the derivative with respect to an operand that occurs once.

        The operand's axes follow those of the result. An index that operand and result share
        is split in two, held equal by a `Delta`. Along an index that nothing else holds, the
        derivative is constant: `Ones`.

        Raises:
            ValueError: If the operand doesn't occur once.

        Example:
            >>> matrix = Node(Operand("x"), (("n",), ("i",)))
            >>> row_sums = Network.build([matrix], [("n",)], {"n": 2, "i": 3})
            >>> print(row_sums.differentiate("x"))
            ones[i] delta[n n'] -> [n n' i]
            i=3 n=2 n'=2
        """
        removed = self.nodes[self.find(name)]
        shared = [index for index in removed.indices if index in self.output_indices]
        lost = [i for i in removed.indices if i not in shared and len(self.holders(i)) == 1]
        ones = [Node(Ones(self.size[index]), ((index,),)) for index in lost]
        copies = dict(zip(shared, fresh(shared, self.size), strict=True))
        output = (*self.output, *rename_axes(removed.axes, copies))
        return self.with_nodes((*self.nodes, *ones)).without(name, *output, split=shared)

    def join(
        self, other: Network, share: Collection[str], output: Iterable[tuple[str, ...]]
    ) -> Network:
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
        return Network.build((*self.nodes, *second.nodes), output, sizes)

    # ---- evaluation: the work is done further down the house, in `rewrite` and `plan` -----------

    def simplify(self) -> Network:
        """Return an equal network that is cheaper to evaluate (see `kfac_tn.tn.rewrite`)."""
        from kfac_tn.tn.rewrite import simplify

        return simplify(self)

    def explain(self) -> Explanation:
        """Simplify the network, and say which rewrites applied and what each of them saved.

        Returns:
            The explanation, to be printed; `simplified` is what `simplify` returns.
        """
        from kfac_tn.tn.rewrite import explain

        return explain(self)

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

    def plan(self, algorithm: str | None = None, device_type: str = "cpu") -> Recipe:
        """Find the steps of an evaluation, as they are for float32.

        Args:
            algorithm: As for `evaluate`.
            device_type: `"cpu"` (default) or `"cuda"`.

        Returns:
            The steps; its `explain()` says why these, and what others are estimated to cost.

        Raises:
            ValueError: As `evaluate`.
        """
        from kfac_tn.tn.plan import recipe

        return recipe(self, device_type=device_type, algorithm=algorithm)

    def evaluate(
        self, *, memory_limit: Any = None, algorithm: Any = None, **operands: Tensor
    ) -> Tensor:
        """Compute the result, as written: call `simplify` first for speed.

        The contraction is planned once per network, dtype and device. Differentiable, also by
        `torch.func`; seen through by `torch.compile`, in one graph; works on meta and fake tensors.
        Under autocast, products are computed and returned in its lower precision, like those of
        torch. The result may be a view of an operand.

        Args:
            memory_limit: An integer: most elements to hold at once, counted as `peak_memory`. Where
                more would be needed, the network is evaluated in pieces. Default: no limit.
            algorithm: A string: one of `kfac_tn.tn.ALGORITHMS`, instead of the one estimated to be
                fastest. Default: what the environment variable `KFAC_TN_ALGORITHM` names, for all
                networks that it applies to, else the fastest.
            operands: The tensors, by name, all of one dtype and device.

        Raises:
            ValueError: If operands are missing, unknown, or differ from the network in shape, or
                from each other in dtype or device; if `memory_limit` can't be met; or if the
                algorithm is unknown or doesn't apply.
        """
        from kfac_tn.tn.plan import foreign_plan, run

        dtype, device = self.check(operands)
        if memory_limit is not None:
            from kfac_tn.tn.pieces import evaluate_in_pieces

            return evaluate_in_pieces(self, operands, memory_limit, algorithm)
        plain = all(type(tensor) in PLAIN for tensor in operands.values())
        steps = (
            self._plan(dtype, device, algorithm)
            if plain
            else foreign_plan(self, operands, algorithm)
        )
        return run(steps, operands)

    @torch.compiler.assume_constant_result
    def _plan(self, dtype: torch.dtype, device: torch.device, algorithm: str | None) -> Plan:
        """The plan, which `torch.compile` takes for a constant: as a method, with any version."""
        from kfac_tn.tn.plan import plan

        return plan(self, dtype, device, algorithm)

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
            >>> import torch
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

    def draw(self, path: str | PathLike[str], *, simplified: bool = False) -> Path:
        """Draw the network's diagram into a file (see `kfac_tn.tn.draw`). Needs matplotlib.

        Args:
            path: The file. Its ending, `.svg` or `.png`, says which kind; it is replaced.
            simplified: Whether to draw, side by side, the network as it is and simplified, with
                their flops and peak memory. Default: no.

        Returns:
            The path.

        Raises:
            ValueError: If the file has another ending.
            ImportError: If matplotlib isn't installed.
        """
        from kfac_tn.tn.draw import draw

        return draw(self, path, simplified=simplified)

    def to_tikz(self, *, simplified: bool = False, standalone: bool = False) -> str:
        """Write the network's diagram as LaTeX code that needs no package but TikZ.

        Args:
            simplified: As for `draw`. Default: no.
            standalone: Whether to return a document that compiles by itself, instead of a
                `tikzpicture` environment to be included in one. Default: no.

        Returns:
            The code.
        """
        from kfac_tn.tn.draw import to_tikz

        return to_tikz(self, simplified=simplified, standalone=standalone)
