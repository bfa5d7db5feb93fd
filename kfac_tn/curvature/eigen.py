"""Blocks whose eigenvectors are Kronecker products: EKFAC, and functions of Kronecker blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kfac_tn.curvature.block import Block, Scalar
from kfac_tn.curvature.layout import Layout

Bias: TypeAlias = Literal["joint", "separate"]


class MatrixBlock(Block):
    """A block over a layer's weight and bias, a matrix ``[d_out, d_in]`` in each group."""

    layout: Layout

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self.layout.names

    @abstractmethod
    def eigen(self) -> EigenBlock:
        """The block by its eigendecomposition."""

    @abstractmethod
    def diagonal_in(self, grad_output_vectors: Tensor, input_vectors: Tensor) -> Tensor:
        """The diagonal in another basis Q_B (x) Q_A: ``[G, d_out, d_in]``."""

    @abstractmethod
    def restrict(self, names: Collection[str]) -> MatrixBlock:
        """Rows and columns of some of its parameters."""

    @abstractmethod
    def scale(self, factor: Scalar) -> MatrixBlock:
        """The block times a number that isn't negative."""

    def add(self, other: Block) -> SumBlock:  # noqa: D102
        if not isinstance(other, MatrixBlock) or other.layout != self.layout:
            raise ValueError(
                f"The blocks of {', '.join(self.names)} aren't over the same parameters in the "
                "same groups."
            )
        return SumBlock(self.layout, (*_terms(self), *_terms(other)))


@dataclass(frozen=True)
class EigenBlock(MatrixBlock):
    """(Q_B (x) Q_A) diag(values) (Q_B (x) Q_A)^T in each group, over a layer's weight and bias.

    EKFAC (George et al. 2018) is such a block: the eigenvectors of KFAC's factors, with the second
    moments of the gradients along them for eigenvalues. So is each function of a Kronecker block.

    Attributes:
        layout: The layer's parameters.
        input_vectors: Q_A, ``[G, d_in, d_in]``, eigenvectors in columns; d_in counts the bias.
        grad_output_vectors: Q_B, ``[G, d_out, d_out]``.
        values: ``[G, d_out, d_in]``.
        bias: ``"separate"``: the bias is not coupled to its weight, and the last column of Q_A is
            its own, the last unit vector. ``"joint"``: it is. Of no matter without bias.

    Example:
        >>> layout = Layout("weight", torch.Size([1, 2]))
        >>> eye, values = torch.eye(2)[None], torch.tensor([[[1.0, 4.0]]])
        >>> block = EigenBlock(layout, eye, torch.eye(1)[None], values)
        >>> block.map_eigenvalues(torch.sqrt) @ {"weight": torch.ones(1, 2)}
        {'weight': tensor([[1., 2.]])}
    """

    layout: Layout
    input_vectors: Tensor
    grad_output_vectors: Tensor
    values: Tensor
    bias: Bias = "separate"

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        q_a, q_b = self.input_vectors, self.grad_output_vectors
        rotated = q_b.mT @ self.layout.to_matrix(v).to(q_a.dtype) @ q_a
        return self.layout.from_matrix(q_b @ (self.values * rotated) @ q_a.mT)

    def eigen(self) -> EigenBlock:  # noqa: D102
        return self

    def eigenvalues(self) -> Tensor:  # noqa: D102
        return self.values.flatten()

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> EigenBlock:  # noqa: D102
        return replace(self, values=function(self.values))

    def diagonal(self) -> dict[str, Tensor]:  # noqa: D102
        squares = self.grad_output_vectors.square() @ self.values @ self.input_vectors.mT.square()
        return self.layout.from_matrix(squares)

    def diagonal_in(self, grad_output_vectors: Tensor, input_vectors: Tensor) -> Tensor:  # noqa: D102
        outputs = (grad_output_vectors.mT @ self.grad_output_vectors).square()
        inputs = (input_vectors.mT @ self.input_vectors).square()
        return outputs @ self.values @ inputs.mT

    def trace(self) -> Tensor:  # noqa: D102
        return self.values.sum()

    def scale(self, factor: Scalar) -> EigenBlock:  # noqa: D102
        return replace(self, values=factor * self.values)

    def restrict(self, names: Collection[str]) -> EigenBlock:  # noqa: D102
        if set(names) >= set(self.names):
            return self
        (name,) = names
        layout, columns = self.layout.restrict(name)
        if self.bias == "joint" and name == self.layout.weight_name:
            raise ValueError(
                f"The block couples {' and '.join(self.names)}, and the part of the first one has "
                "no known eigenvectors: take both, or compute the curvature with bias='separate'."
            )
        if self.bias == "joint":  # one column, so that the eigenvectors of B are its own
            squares = self.input_vectors[:, columns].square()
            values = (self.values * squares).sum(-1, keepdim=True)
            one = torch.ones_like(values[:, :1])
            return EigenBlock(layout, one, self.grad_output_vectors, values)
        return EigenBlock(
            layout,
            self.input_vectors[:, columns, columns],
            self.grad_output_vectors,
            self.values[..., columns],
        )


@dataclass(frozen=True)
class SumBlock(MatrixBlock):
    """The exact sum of Kronecker or eigendecomposed blocks over the same layer.

    Its products, diagonal, trace and norm are exact. Since a sum of Kronecker products is no
    Kronecker product, it has no eigendecomposition of that form: its eigenvalues, inverse, roots,
    determinants and samples are refused.

    Attributes:
        layout: The layer's parameters.
        terms: What is summed.
    """

    layout: Layout
    terms: tuple[MatrixBlock, ...]

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        products = [term @ v for term in self.terms]
        return {name: sum_of([product[name] for product in products]) for name in self.names}

    def eigen(self) -> EigenBlock:  # noqa: D102
        raise ValueError(
            f"The block of {' and '.join(self.names)} is a sum of Kronecker products, which is "
            "none itself: it has no eigendecomposition that is cheaper than a dense one. Solve "
            "with it by conjugate gradients (`curvature @ v`), or use `to_dense()` if it is small."
        )

    def eigenvalues(self) -> Tensor:  # noqa: D102
        return self.eigen().eigenvalues()

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> Block:  # noqa: D102
        return self.eigen().map_eigenvalues(function)

    def inverse(self, damping: Scalar, split: str = "exact") -> Block:  # noqa: D102
        return self.eigen()

    def diagonal(self) -> dict[str, Tensor]:  # noqa: D102
        diagonals = [term.diagonal() for term in self.terms]
        return {name: sum_of([diagonal[name] for diagonal in diagonals]) for name in self.names}

    def diagonal_in(self, grad_output_vectors: Tensor, input_vectors: Tensor) -> Tensor:  # noqa: D102
        return sum_of([t.diagonal_in(grad_output_vectors, input_vectors) for t in self.terms])

    def frobenius_norm(self) -> Tensor:  # noqa: D102
        # The inner product of one term with all: its eigenvalues times the others' diagonal there.
        bases = [term.eigen() for term in self.terms]
        inner = [
            (basis.values * self.diagonal_in(basis.grad_output_vectors, basis.input_vectors)).sum()
            for basis in bases
        ]
        return sum_of(inner).sqrt()

    def scale(self, factor: Scalar) -> SumBlock:  # noqa: D102
        return replace(self, terms=tuple(term.scale(factor) for term in self.terms))

    def restrict(self, names: Collection[str]) -> MatrixBlock:  # noqa: D102
        first, *others = (term.restrict(names) for term in self.terms)
        for other in others:
            first = first.add(other)
        return first


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(tensors).sum(0)


def _terms(block: MatrixBlock) -> tuple[MatrixBlock, ...]:
    return block.terms if isinstance(block, SumBlock) else (block,)
