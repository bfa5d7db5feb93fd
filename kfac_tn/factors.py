"""Kronecker factors of a step: matrices, or what they are made of when they are wanted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Module

from kfac_tn import functional
from kfac_tn.functional import common
from kfac_tn.hooks import plain
from kfac_tn.layers import LayerBlock
from kfac_tn.tn import gemm

Weight: TypeAlias = float | Tensor


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
