"""Tensor networks: transform them, evaluate them.

A `Network` is immutable and hashable, so everything expensive about it (simplification, contraction
order, the tensors of its constants) can be cached under the network itself. Derivatives and
curvature are derived by small manipulations (`kfac_tn.tn.manipulations`) that return new networks.
"""

from __future__ import annotations

import string
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.tn.manipulations import Manipulations
from kfac_tn.tn.node import Operand

if TYPE_CHECKING:
    from kfac_tn.tn.plan import Plan, Recipe
    from kfac_tn.tn.rewrite import Explanation

PLAIN = (Tensor, Parameter)
"""Types of tensors that may meet the constants that are kept; fake tensors, say, may not."""


class Network(Manipulations):
    """A product of tensors, summed over every index that is not an output.

    Attributes:
        nodes: The tensors. Their order has no meaning for the result.
        output: Axes of the result. Each index occurs once, and in some node.
        sizes: Pairs of index and size, sorted by index, of exactly the indices of the nodes.

    Raises:
        ValueError: If sizes are missing, no whole numbers of at least 1, or contradict a constant's
            shape, an index occurs twice in one tensor, an output index belongs to no node, or the
            nodes of one operand differ in shape.

    Example:
        >>> from kfac_tn.tn import Node
        >>> matrix = Node(Operand("matrix"), (("i",), ("j",)))
        >>> vector = Node(Operand("vector"), (("j",),))
        >>> product = Network.build([matrix, vector], output=[("i",)], sizes={"i": 2, "j": 3})
        >>> print(product)
        matrix[i j] vector[j] -> [i]
        i=2 j=3
        >>> product.evaluate(matrix=torch.ones(2, 3), vector=torch.ones(3))
        tensor([3., 3.])
    """

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

            return evaluate_in_pieces(self.whole(), operands, memory_limit, algorithm)
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
            The equation, its tensors (operands sliced and reshaped to one axis per index, and
            dense constants), and the shape to give to the result.

        Raises:
            ValueError: As `evaluate`; or if there are more indices than letters.

        Example:
            >>> from kfac_tn.tn import Node
            >>> matrix = Node(Operand("x"), (("i", "j"),))
            >>> network = Network.build([matrix], output=[("j", "i")], sizes={"i": 2, "j": 3})
            >>> equation, tensors, shape = network.einsum(x=torch.arange(6.0))
            >>> equation, shape
            ('ab->ba', (6,))
            >>> torch.einsum(equation, *tensors).reshape(shape)
            tensor([0., 3., 1., 4., 2., 5.])
        """
        from kfac_tn.tn.planner.patterns import view

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
                tensor = operands[node.symbol.name]
                for axis, pattern in reversed(node.symbol.patterns):
                    tensor = view(pattern, axis, -pattern.padding)(tensor)
                tensor = tensor.reshape([self.size[i] for i in node.indices])
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
