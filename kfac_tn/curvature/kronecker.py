"""Blocks of the curvature: Kronecker-factored, eigendecomposed and diagonal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Size, Tensor

Bias: TypeAlias = Literal["joint", "separate"]
Damping: TypeAlias = Literal["exact", "pi"]


def pi_split(
    input_factor: Tensor, grad_output_factor: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    r"""Split a damping between two Kronecker factors.

    (B + sqrt(damping)/pi I) (x) (A + sqrt(damping) pi I), with pi^2 the ratio of the factors' mean
    eigenvalues, is the closest of such products to B (x) A + damping I in a bound on the trace norm
    (Martens & Grosse 2015, Section 6.3).

    Args:
        input_factor: A, ``[G, d_in, d_in]``.
        grad_output_factor: B, ``[G, d_out, d_out]``.
        damping: In the units of B (x) A.

    Returns:
        What to add to the diagonals of A and of B, ``[G]`` each; the square root of the damping
        where a factor is zero and the ratio not defined.

    Example:
        >>> import torch
        >>> A, B = 4 * torch.eye(3).unsqueeze(0), torch.eye(2).unsqueeze(0)
        >>> pi_split(A, B, damping=0.01)
        (tensor([0.2000]), tensor([0.0500]))
    """
    ratio = mean_eigenvalue(input_factor) / mean_eigenvalue(grad_output_factor)
    pi = torch.where((ratio > 0) & ratio.isfinite(), ratio, torch.ones_like(ratio)).sqrt()
    root = damping**0.5
    return root * pi, root / pi


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """Mean eigenvalues of symmetric matrices ``[G, d, d]``: ``[G]``.

    Example:
        >>> import torch
        >>> mean_eigenvalue(torch.diag(torch.tensor([1.0, 3.0])).unsqueeze(0))
        tensor([2.])
    """
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)


@dataclass(frozen=True)
class Layout:
    """How the parameters of a layer lie in its matrix ``[G, d_out, d_in]``.

    The weight is flattened by rows, its rows divided among the groups; the bias is the last column.

    Attributes:
        weight_name: Name of the weight.
        weight_shape: Its shape ``[G * d_out, ...]``.
        bias_name: Name of the bias (shape ``[G * d_out]``), or None.
        groups: G.
    """

    weight_name: str
    weight_shape: Size
    bias_name: str | None = None
    groups: int = 1

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``[G, d_out, d_in]`` of a weight (and bias) by name."""
        weight = tensors[self.weight_name]
        matrix = weight.reshape(self.groups, self.weight_shape[0] // self.groups, -1)
        if self.bias_name is None:
            return matrix
        bias = tensors[self.bias_name].reshape(self.groups, -1, 1)
        return torch.cat([matrix, bias], dim=2)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of ``to_matrix``."""
        if self.bias_name is None:
            return {self.weight_name: matrix.reshape(self.weight_shape)}
        return {
            self.weight_name: matrix[..., :-1].reshape(self.weight_shape),
            self.bias_name: matrix[..., -1].reshape(-1),
        }


class Block(ABC):
    """A square block of the curvature, over one or more parameters.

    Vectors are dicts by parameter name; blocks are immutable.
    """

    @abstractmethod
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply with a vector; each entry has its parameter's shape."""

    @abstractmethod
    def inverse(self, damping: float, split: Damping) -> Block:
        """(block + damping I)^-1."""

    @abstractmethod
    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal, shaped like the parameters."""

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        return torch.stack([entry.sum() for entry in self.diagonal().values()]).sum()


@dataclass(frozen=True)
class KroneckerBlock(Block):
    """B (x) A in each group, over a layer's weight and bias.

    Attributes:
        layout: The layer's parameters.
        input_factor: A, ``[G, d_in, d_in]``. With ``bias="joint"`` its last row and column belong
            to the bias.
        grad_output_factor: B, ``[G, d_out, d_out]``.
        bias: ``"joint"``: the bias is a column of the weight. ``"separate"``: it has a block of its
            own, which is B, and no coupling to the weight. Of no matter without bias.

    Example:
        >>> import torch
        >>> layout = Layout("weight", torch.Size([2, 3]))
        >>> block = KroneckerBlock(layout, torch.eye(3)[None], 2 * torch.eye(2)[None])
        >>> block.trace()
        tensor(12.)
    """

    layout: Layout
    input_factor: Tensor
    grad_output_factor: Tensor
    bias: Bias = "separate"

    @cached_property
    def _full_input_factor(self) -> Tensor:
        """A with the bias' row and column: a separate bias is joint with no coupling."""
        if self.layout.bias_name is None or self.bias == "joint":
            return self.input_factor
        full = torch.nn.functional.pad(self.input_factor, (0, 1, 0, 1))
        full[:, -1, -1] = 1
        return full

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        matrix = self.layout.to_matrix(v)
        return self.layout.from_matrix(self.grad_output_factor @ matrix @ self._full_input_factor)

    def inverse(self, damping: float, split: Damping = "exact") -> EigenBlock:  # noqa: D102
        input_values, input_vectors = torch.linalg.eigh(self._full_input_factor)
        output_values, output_vectors = torch.linalg.eigh(self.grad_output_factor)
        # Rounding makes the smallest eigenvalues of a semi-definite matrix negative.
        input_values, output_values = input_values.clamp(min=0), output_values.clamp(min=0)
        if split == "pi":
            shifts = pi_split(self._full_input_factor, self.grad_output_factor, damping)
            input_values = input_values + shifts[0].unsqueeze(-1)
            output_values = output_values + shifts[1].unsqueeze(-1)
        values = output_values.unsqueeze(-1) * input_values.unsqueeze(-2)
        values = values if split == "pi" else values + damping
        return EigenBlock(self.layout, input_vectors, output_vectors, values.reciprocal())

    def diagonal(self) -> dict[str, Tensor]:  # noqa: D102
        outputs = self.grad_output_factor.diagonal(dim1=-2, dim2=-1)
        inputs = self._full_input_factor.diagonal(dim1=-2, dim2=-1)
        return self.layout.from_matrix(outputs.unsqueeze(-1) * inputs.unsqueeze(-2))


@dataclass(frozen=True)
class EigenBlock(Block):
    """(Q_B (x) Q_A) diag(values) (Q_B (x) Q_A)^T in each group, over a layer's weight and bias.

    Attributes:
        layout: The layer's parameters.
        input_vectors: Q_A, ``[G, d_in, d_in]``, eigenvectors in columns.
        grad_output_vectors: Q_B, ``[G, d_out, d_out]``.
        values: ``[G, d_out, d_in]``.
    """

    layout: Layout
    input_vectors: Tensor
    grad_output_vectors: Tensor
    values: Tensor

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        q_a, q_b = self.input_vectors, self.grad_output_vectors
        rotated = q_b.mT @ self.layout.to_matrix(v) @ q_a
        return self.layout.from_matrix(q_b @ (self.values * rotated) @ q_a.mT)

    def inverse(self, damping: float, split: Damping = "exact") -> EigenBlock:  # noqa: D102
        return replace(self, values=(self.values + damping).reciprocal())

    def diagonal(self) -> dict[str, Tensor]:  # noqa: D102
        squares = self.grad_output_vectors.square() @ self.values @ self.input_vectors.mT.square()
        return self.layout.from_matrix(squares)


@dataclass(frozen=True)
class DiagonalBlock(Block):
    """A diagonal over one parameter.

    Attributes:
        name: Name of the parameter.
        values: The diagonal, shaped like the parameter.
    """

    name: str
    values: Tensor

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: self.values * v[self.name]}

    def inverse(self, damping: float, split: Damping = "exact") -> DiagonalBlock:  # noqa: D102
        return DiagonalBlock(self.name, (self.values + damping).reciprocal())

    def diagonal(self) -> dict[str, Tensor]:  # noqa: D102
        return {self.name: self.values}


def split_vector(v: Tensor, shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """Cut a flat vector into parameters, in their order."""
    pieces = v.split([shape.numel() for shape in shapes.values()])
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }
