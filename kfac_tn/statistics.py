"""From single calls of layers to the Kronecker factors of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn import functional
from kfac_tn.functional import common
from kfac_tn.functional.blocks import block_gram, split_rows
from kfac_tn.hooks import plain
from kfac_tn.layers import LayerBlock
from kfac_tn.tn import gemm

Key = TypeVar("Key")
T = TypeVar("T")
Weight: TypeAlias = float | Tensor
Sums: TypeAlias = "defaultdict[Key, WeightedSum]"

LARGE = 2**18
"""Elements of a factor that may be worth to be computed later."""


@dataclass(frozen=True)
class Gram:
    """A factor that isn't written out yet: the sum over rows ``[N, G, d]`` of their products.

    Example:
        >>> total = torch.ones(1, 2, 2)
        >>> Gram(torch.tensor([[[1.0, 2.0]]])).weighted(4).add_into(total)
        >>> total
        tensor([[[ 5.,  9.],
                 [ 9., 17.]]])
    """

    rows: Tensor

    def weighted(self, weight: Weight) -> Gram:
        """A multiple: rows are weighted the same on both sides, so that it stays symmetric."""
        return Gram(self.rows * weight**0.5)

    def matrix(self) -> Tensor:
        """Write it out, ``[G, d, d]``."""
        return functional.gram(self.rows)

    def add_into(self, total: Tensor, share: float = 1.0) -> None:
        """Add it to ``share * total``, in place; it is never written out on its own."""
        rows = self.rows.to(total.dtype)
        gemm.add_product(total, rows.permute(1, 2, 0), rows.transpose(0, 1), share)


@dataclass(frozen=True)
class Pending:
    """An input factor that is computed when it is wanted: its input, kept until then, is smaller.

    A convolution's factor has ``(C K)^2`` elements: where there are many channels and few
    positions, that of one layer is larger than what the model's whole graph holds. When a step
    averages factors, the graph is gone, and it needs memory for one at a time.

    Attributes:
        block: The layer.
        module: Its module that was called.
        x: With what; a copy.
        vectors: Of how many vectors the factor is a mean.
        bias: Whether these have a trailing 1.
        weight: What the factor is multiplied by.
    """

    block: LayerBlock
    module: Module
    x: Tensor
    vectors: int
    bias: bool
    weight: Weight = 1.0

    def weighted(self, weight: Weight) -> Pending:
        """A multiple."""
        return replace(self, weight=self.weight * weight)

    def matrix(self) -> Tensor:
        """Compute it, ``[G, d, d]``."""
        with plain(self.x.device):
            factor = self.block.family.input_factor(self.module, self.x, self.bias)
        whole = not isinstance(self.weight, Tensor) and self.weight == 1
        return factor if whole else factor.mul_(self.weight)

    def add_into(self, total: Tensor, share: float = 1.0) -> None:
        """Add it to ``share * total``, in place."""
        torch.add(self.matrix().to(total.dtype), total, alpha=share, out=total)

    def witness(self) -> Tensor:
        """The sum of a factor's diagonal over channels, about: not finite where that isn't."""
        return (self.x.norm(dtype=common.accumulation_dtype(self.x)) / self.vectors**0.5).square()


AnyFactor: TypeAlias = Tensor | Gram | Pending


def representative(factor: AnyFactor) -> Tensor:
    """A tensor of the dtype and device that a factor has."""
    if isinstance(factor, Gram):
        return factor.rows
    return (
        factor.x.new_empty(0, dtype=common.accumulation_dtype(factor.x))
        if isinstance(factor, Pending)
        else factor
    )


class Factors:
    """The two Kronecker factors of one block, of one step.

    Args:
        input: A, ``[G, d_in, d_in]``; d_in counts the 1 of the bias if the block has one. Of a
            factor above the limit of its dimension only blocks on its diagonal, ``[G * p, s, s]``
            (see ``kfac_tn.functional.blocks``).
        grad_output: B, ``[G, d_out, d_out]``, or blocks of it.
    """

    def __init__(self, input: AnyFactor, grad_output: AnyFactor) -> None:
        self._both = [input, grad_output]

    @property
    def input(self) -> Tensor:
        """A, ``[G, d_in, d_in]``."""
        return self._matrix(0)

    @property
    def grad_output(self) -> Tensor:
        """B, ``[G, d_out, d_out]``."""
        return self._matrix(1)

    def _matrix(self, which: int) -> Tensor:
        factor = self._both[which]
        if not isinstance(factor, Tensor):
            factor = self._both[which] = factor.matrix()
        return factor

    @property
    def like(self) -> Tensor:
        """A tensor of their dtype and device."""
        return representative(self._both[0])

    def witnesses(self) -> list[Tensor]:
        """What is finite where A and B are; mostly diagonals, since |F_ij|^2 <= F_ii F_jj."""
        found = []
        for factor in self._both:
            if isinstance(factor, Pending):
                found.append(factor.witness())
            elif isinstance(factor, Gram):
                found.append(factor.rows.square().sum(0))
            else:
                found.append(factor.diagonal(dim1=-2, dim2=-1))
        return found

    def average_into(self, input: Tensor, grad_output: Tensor, share: float) -> None:
        """Move averages ``[G, d, d]`` by a share of the way to these factors, in place.

        Large factors of few rows are never written out for it.

        Example:
            >>> a, b = torch.zeros(1, 2, 2), torch.zeros(1, 1, 1)
            >>> factors = Factors(Gram(torch.tensor([[[1.0, 2.0]]])), torch.ones(1, 1, 1))
            >>> factors.average_into(a, b, 0.5)
            >>> a, b
            (tensor([[[0.5000, 1.0000],
                     [1.0000, 2.0000]]]), tensor([[[0.5000]]]))
        """
        for factor, average in zip(self._both, (input, grad_output), strict=True):
            if isinstance(factor, Gram):
                factor.weighted(share).add_into(average, 1 - share)
            else:
                matrix = factor.matrix() if isinstance(factor, Pending) else factor
                average.lerp_(matrix.to(average.dtype), share)


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
    """

    factors: dict[LayerBlock, Factors]
    diagonals: dict[Parameter, Tensor]
    moments: dict[LayerBlock, Tensor]
    counts: dict[LayerBlock, int] = field(default_factory=dict)
    bypassed: set[LayerBlock] = field(default_factory=set)

    def without(self, bypassed: set[LayerBlock]) -> Statistics:
        """The same, without what calls in other passes or processes say of such blocks."""

        def rest(values: dict[LayerBlock, T]) -> dict[LayerBlock, T]:
            return {block: value for block, value in values.items() if block not in bypassed}

        factors, moments, counts = rest(self.factors), rest(self.moments), rest(self.counts)
        return Statistics(factors, self.diagonals, moments, counts, bypassed)


@dataclass(eq=False)
class Call:
    """One call of one module, kept by the autograd node that made its output.

    ``input`` is the mean of a a^T (expand), also as rows or pending, or one average row per example
    (reduce); None once it is counted, since a loss that the user keeps for its value keeps this
    too. ``kept`` is the very input, where each example's gradient will be asked for, with its
    version. ``shared`` is whether its first axis is found not to be that of the examples;
    ``ignored``, whether it has no examples, or tells only a part of its layer's curvature.
    """

    block: LayerBlock
    module: Module
    output_shape: torch.Size
    input: AnyFactor | None
    examples: int
    positions: int
    keeps: bool = False
    shared: bool = False
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


class WeightedSum:
    """sum_i w_i F_i of factors, in one buffer: factors are large, and mostly there is just one.

    A first term is kept as it came until another comes or the result is asked for; then it is
    weighted, and made a matrix if it isn't one. Matrices are the sum's own once they are added, and
    changed in place.

    Example:
        >>> total = WeightedSum()
        >>> total.add(torch.ones(1, 2, 2), 3)
        >>> total.add(Gram(torch.tensor([[[1.0, 2.0]]])), 1)
        >>> total.result(2)
        tensor([[[2.0000, 2.5000],
                 [2.5000, 3.5000]]])
    """

    def __init__(self) -> None:
        self._first: tuple[AnyFactor, Weight] | None = None
        self._buffer: Tensor | None = None

    def add(self, value: AnyFactor, weight: Weight) -> None:
        """Add a term.

        Args:
            value: A matrix (or another tensor), or what one can be made of.
            weight: Not negative; a scalar tensor where a number would cost a synchronization.
        """
        if self._buffer is None and self._first is None:
            self._first = value, weight
            return
        if self._first is not None:
            (first, of_first), self._first = self._first, None
            if isinstance(first, Tensor):
                self._buffer = first.mul_(of_first)
            else:
                self._buffer = first.weighted(of_first).matrix()
        assert self._buffer is not None
        if not isinstance(value, Tensor):
            value.weighted(weight).add_into(self._buffer)
        elif isinstance(weight, Tensor):
            self._buffer.addcmul_(value, weight)
        else:
            self._buffer.add_(value, alpha=weight)

    def result(self, total: Weight) -> AnyFactor:
        """The sum divided by ``total``. It ends here: it can't be added to any more."""
        if self._buffer is not None:
            return self._buffer.div_(total)
        assert self._first is not None
        value, weight = self._first
        if isinstance(weight, int) and isinstance(total, int) and weight == total:
            return value
        weight = weight / total
        return value.mul_(weight) if isinstance(value, Tensor) else value.weighted(weight)


# Combining the calls of a module: to its weight they are further shared positions


def add_inputs(
    sums: Sums[LayerBlock], counts: dict[LayerBlock, int], calls: Iterable[Call]
) -> None:
    """Add sums of a a^T, and the numbers of terms, for each block; each call counts once."""
    rows: dict[tuple[LayerBlock, int], list[tuple[Tensor, int]]] = {}
    for call in calls:
        statistic, call.input = call.input, None
        if statistic is None:
            continue
        if not isinstance(statistic, Tensor) or call.block.approximation == "expand":
            count = call.examples * call.positions
            sums[call.block].add(statistic, 1 if isinstance(statistic, Gram) else count)
            counts[call.block] = counts.get(call.block, 0) + count
        else:  # reduce: average over the positions of all calls before the outer product
            rows.setdefault((call.block, call.examples), []).append((statistic, call.positions))
    for (block, examples), parts in rows.items():
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
        factors.
    """
    if not block.has_factors:
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
