"""From single calls of layers to the Kronecker factors of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn.factors import AnyFactor, Factors, Gram, Pending, WeightedSum
from kfac_tn.functional import common
from kfac_tn.functional.blocks import block_gram, split_rows
from kfac_tn.layers import LayerBlock

Key = TypeVar("Key")
T = TypeVar("T")
Sums: TypeAlias = "defaultdict[Key, WeightedSum]"

LARGE = 2**18
"""Elements of a factor that may be worth to be computed later."""


@dataclass(frozen=True)
class Statistics:
    """What the passes since the last call of ``Capture.take`` say about the curvature.

    Attributes:
        factors: By block; blocks that took no part are missing.
        diagonals: By parameter: an estimate of the Fisher's diagonal, shaped like the parameter.
        moments: By block: second moments of per-example gradients in its basis,
            ``[G, d_out, d_in]``, of those blocks that have one.
        counts: By block: the number of vectors its input factor is a mean over.
        bypassed: Blocks whose weight was used without a call, too: nothing is known of their
            curvature, and what was known isn't true any more.
        columns: Extra backward passes for each of the user's, of which B is a mean; at least 1.
    """

    factors: dict[LayerBlock, Factors]
    diagonals: dict[Parameter, Tensor]
    moments: dict[LayerBlock, Tensor]
    counts: dict[LayerBlock, int] = field(default_factory=dict)
    bypassed: set[LayerBlock] = field(default_factory=set)
    columns: float = 1.0

    def without(self, bypassed: set[LayerBlock]) -> Statistics:
        """The same, without what calls in other passes or processes say of such blocks."""

        def rest(values: dict[LayerBlock, T]) -> dict[LayerBlock, T]:
            return {block: value for block, value in values.items() if block not in bypassed}

        factors, moments, counts = rest(self.factors), rest(self.moments), rest(self.counts)
        return replace(self, factors=factors, moments=moments, counts=counts, bypassed=bypassed)


@dataclass(eq=False)
class Call:
    """One call of one module, kept by the autograd node that made its output.

    ``input`` is the mean of a a^T (expand), also as rows or pending, or one average row per example
    (reduce); None once it is counted, since a loss that the user keeps for its value keeps this
    too. ``kept`` is the very input, where each example's gradient will be asked for, with its
    version. ``shared`` is whether its first axis is found not to be that of the examples;
    ``packed``, whether it has positions of several examples on it; ``ignored``, whether it has no
    examples, or tells only a part of its layer's curvature.
    """

    block: LayerBlock
    module: Module
    output_shape: torch.Size
    input: AnyFactor | None
    examples: int
    positions: int
    keeps: bool = False
    shared: bool = False
    packed: bool = False
    ignored: bool = False
    kept: tuple[Tensor, int | None] | None = None

    def keep(self, x: Tensor) -> None:
        """Keep the input, until ``release``."""
        self.keeps, self.kept = True, (x.detach(), _version(x))

    def release(self) -> None:
        """Forget the input."""
        self.kept = None

    def ignore(self) -> None:
        """Take no part in any statistics."""
        self.ignored, self.keeps, self.input = True, False, None
        self.release()

    def kept_input(self) -> Tensor:
        """The input, as it was.

        Raises:
            RuntimeError: If it was changed in place (training would fail there, too), or belongs to
                an earlier step.
        """
        name = self.block.name
        if self.kept is None:
            raise RuntimeError(
                f"Layer '{name}' was called before an earlier step, whose inputs aren't kept, but "
                "its graph is differentiated again: EKFAC and diagonals need the model to be "
                "called anew."
            )
        x, version = self.kept
        if version != _version(x):
            raise RuntimeError(
                f"The input of layer '{name}' was changed in place after its call, but EKFAC and "
                "diagonals need it as it was: use the operation that isn't in-place there."
            )
        return x

    def grad_output_statistic(self, gradient: Tensor) -> Tensor | Gram:
        """The sum of g g^T (expand), also as rows, or one summed row per example (reduce)."""
        block, family, pieces = self.block, self.block.family, self.block.grad_output_pieces
        gradient = gradient.reshape(self.output_shape)
        few = _few_rows(self.examples, self.positions, block.grad_output_dim // pieces)
        if few or block.approximation == "reduce":
            rows = _cut(_own(family.sum_grad_output(self.module, gradient), gradient), pieces)
            return rows if block.approximation == "reduce" else Gram(rows)
        if pieces == 1:
            return family.grad_output_factor(self.module, gradient)
        per_example = gradient.numel() // self.examples
        return block_gram(
            (
                family.grad_output_rows(self.module, part).flatten(1, 2)
                for part in _chunks(gradient, self.examples, per_example)
            ),
            pieces,
        )


# Combining the calls of a module: to its weight they are further shared positions


def add_inputs(
    sums: Sums[LayerBlock], counts: dict[LayerBlock, int], calls: Mapping[Call, int]
) -> None:
    """Add sums of a a^T, and the numbers of terms, for each block; each call counts once.

    Of calls with one number the positions are shared by examples of one loss.
    """
    rows: dict[tuple[LayerBlock, int, int], list[tuple[Tensor, int]]] = {}
    for call, number in calls.items():
        statistic, call.input = call.input, None
        if statistic is None:
            continue
        if not isinstance(statistic, Tensor) or call.block.approximation == "expand":
            count = call.examples * call.positions
            sums[call.block].add(statistic, 1 if isinstance(statistic, Gram) else count)
            counts[call.block] = counts.get(call.block, 0) + count
        else:  # reduce: average over the positions of all calls before the outer product
            key = call.block, call.examples, number
            rows.setdefault(key, []).append((statistic, call.positions))
    for (block, examples, _), parts in rows.items():
        average, positions = parts[0]
        for further, more in parts[1:]:
            positions += more
            average = torch.lerp(average, further, more / positions)
        sums[block].add(Gram(average), 1)
        counts[block] = counts.get(block, 0) + examples


def add_grad_outputs(
    sums: Sums[LayerBlock], statistics: Iterable[tuple[Call, Tensor | Gram]], weight: Tensor
) -> None:
    """Add the output-gradient factor of each block, weighted, from the statistics of its calls."""
    rows: dict[tuple[LayerBlock, int], Tensor] = {}
    for call, statistic in statistics:
        if isinstance(statistic, Gram) or call.block.approximation == "expand":
            sums[call.block].add(statistic, weight)
        else:  # reduce: sum over the positions of all calls before the outer product
            key = (call.block, call.examples)
            rows[key] = rows[key] + statistic if key in rows else statistic
    for (block, _), total in rows.items():
        sums[block].add(Gram(total), weight)


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None where autograd doesn't count."""
    return None if x.is_inference() else x._version


def input_statistic(
    block: LayerBlock, module: Module, x: Tensor, counts: tuple[int, int], joint: bool = True
) -> AnyFactor | None:
    """The mean of a a^T of a call (expand), also as rows, or one average row per example (reduce).

    Args:
        block: The layer.
        module: Its module that was called.
        x: With what.
        counts: Examples, and positions of each.
        joint: Whether ``a`` has a trailing 1 for the layer's bias, if it has one.

    Returns:
        Matrices; rows ``[N, G, d]`` for reduce. With expand, rows whose outer products are summed
        (and to be divided by their number) where these are fewer numbers than the matrix; or large
        matrices to be computed later, where the input is smaller. None for a layer that has no
        factors, and of no examples.
    """
    if not block.has_factors or not counts[0]:
        return None
    family, bias, pieces = block.family, joint and block.bias is not None, block.input_pieces
    x = x.detach()
    examples, positions = counts
    few = _few_rows(examples, positions, (block.input_dim + bias) // pieces)
    if few or block.approximation == "reduce":
        rows = _cut(_own(family.average_input(module, x, bias), x), pieces)
        return rows if block.approximation == "reduce" else Gram(rows)
    if pieces == 1 and not block.has_diagonal_inputs and _smaller(x, block, bias):
        return Pending(block, module, x.clone(), examples * positions, bias)
    if pieces == 1 or block.has_diagonal_inputs:
        return _own(family.input_factor(module, x, bias), x)
    parts = _chunks(x, examples, block.groups * positions * (block.input_dim + bias))
    chunks = (family.input_rows(module, part, bias).flatten(1, 2) for part in parts)
    return block_gram(chunks, pieces).div_(examples * positions)


def _few_rows(examples: int, positions: int, size: int) -> bool:
    """Whether no position is shared and rows take less memory than their products.

    Then to average (or sum) over positions gives the very rows of KFAC-expand.
    """
    return positions == 1 and examples < size


def _smaller(x: Tensor, block: LayerBlock, bias: bool) -> bool:
    """Whether an input takes less memory than its factor, which is large."""
    factor = block.groups * (block.input_dim + bias) ** 2
    return factor >= LARGE and x.nbytes < factor * common.accumulation_dtype(x).itemsize


def _own(statistic: Tensor, x: Tensor) -> Tensor:
    """A copy of what is a view of a tensor: the user may overwrite that, or want it freed."""
    shared = statistic.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return statistic.clone() if shared else statistic


def _cut(rows: Tensor, pieces: int) -> Tensor:
    """``[N, G, d]`` to ``[N, G * pieces, s]``."""
    return rows if pieces == 1 else split_rows(rows, pieces).flatten(1, 2)


def _chunks(x: Tensor, examples: int, per_example: int) -> tuple[Tensor, ...]:
    """Examples in chunks of so many elements that two copies stay within bounds."""
    size = common.UNFOLD_BYTES // (2 * per_example * common.accumulation_dtype(x).itemsize)
    return (x,) if size >= examples else x.split(max(1, size))
