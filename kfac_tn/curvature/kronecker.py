"""Kronecker-factored blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kfac_tn.curvature.block import Block, Damping, Scalar
from kfac_tn.curvature.eigen import Bias, EigenBlock, MatrixBlock
from kfac_tn.curvature.eigh import eigh
from kfac_tn.curvature.layout import Layout


def pi_split(
    input_factor: Tensor, grad_output_factor: Tensor, damping: Scalar
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
    return pi_shares(mean_eigenvalue(input_factor), mean_eigenvalue(grad_output_factor), damping)


def pi_shares(
    input_mean: Tensor, grad_output_mean: Tensor, damping: Scalar
) -> tuple[Tensor, Tensor]:
    """``pi_split`` from the factors' mean eigenvalues alone, of any shape."""
    ratio = input_mean / grad_output_mean
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
class KroneckerBlock(MatrixBlock):
    """B (x) A in each group, over a layer's weight and bias.

    Attributes:
        layout: The layer's parameters.
        input_factor: A, ``[G, d_in, d_in]``. With ``bias="joint"`` its last row and column belong
            to the bias.
        grad_output_factor: B, ``[G, d_out, d_out]``.
        bias: ``"joint"``: the bias is a column of the weight. ``"separate"``: it has a block of its
            own, which is B, and no coupling to the weight. Of no matter without bias.
        vectors: How many A is a mean over: examples, with ``"expand"`` times positions. 0: unknown.

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
    vectors: int = 0

    @cached_property
    def _full_input_factor(self) -> Tensor:
        """A with the bias' row and column: a separate bias is joint with no coupling."""
        return self._with_bias(self.input_factor)

    def _with_bias(self, matrix: Tensor) -> Tensor:
        if self.layout.bias_name is None or self.bias == "joint":
            return matrix
        full = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
        full[:, -1, -1] = 1
        return full

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor, EigenBlock]:
        """Eigenvalues of both factors, and the block that has their products."""
        input_values, input_vectors = eigh(self.input_factor)
        output_values, output_vectors = eigh(self.grad_output_factor)
        input_vectors = self._with_bias(input_vectors)
        if input_vectors.shape[-1] > input_values.shape[-1]:
            input_values = torch.nn.functional.pad(input_values, (0, 1), value=1.0)
        values = output_values.unsqueeze(-1) * input_values.unsqueeze(-2)
        block = EigenBlock(self.layout, input_vectors, output_vectors, values, self.bias)
        return input_values, output_values, block

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        matrix = self.layout.to_matrix(v).to(self.grad_output_factor.dtype)
        return self.layout.from_matrix(self.grad_output_factor @ matrix @ self._full_input_factor)

    def eigen(self) -> EigenBlock:  # noqa: D102
        return self._eigen[2]

    def eigenvalues(self) -> Tensor:  # noqa: D102
        return self.eigen().eigenvalues()

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> EigenBlock:  # noqa: D102
        return self.eigen().map_eigenvalues(function)

    def inverse(self, damping: Scalar, split: Damping = "exact") -> Block:  # noqa: D102
        if split == "exact":
            return super().inverse(damping)
        input_values, output_values, block = self._eigen
        shifts = pi_split(self._full_input_factor, self.grad_output_factor, damping)
        damped_inputs = input_values + shifts[0].unsqueeze(-1)
        damped_outputs = output_values + shifts[1].unsqueeze(-1)
        values = damped_outputs.unsqueeze(-1) * damped_inputs.unsqueeze(-2)
        return replace(block, values=values.reciprocal())

    def diagonal(self) -> dict[str, Tensor]:  # noqa: D102
        outputs = self.grad_output_factor.diagonal(dim1=-2, dim2=-1)
        inputs = self._full_input_factor.diagonal(dim1=-2, dim2=-1)
        return self.layout.from_matrix(outputs.unsqueeze(-1) * inputs.unsqueeze(-2))

    def diagonal_in(self, grad_output_vectors: Tensor, input_vectors: Tensor) -> Tensor:  # noqa: D102
        outputs = (grad_output_vectors * (self.grad_output_factor @ grad_output_vectors)).sum(-2)
        inputs = (input_vectors * (self._full_input_factor @ input_vectors)).sum(-2)
        return outputs.unsqueeze(-1) * inputs.unsqueeze(-2)

    def frobenius_norm(self) -> Tensor:  # noqa: D102
        norms = [
            torch.linalg.matrix_norm(factor)
            for factor in (self._full_input_factor, self.grad_output_factor)
        ]
        return torch.linalg.vector_norm(norms[0] * norms[1])

    def scale(self, factor: Scalar) -> KroneckerBlock:  # noqa: D102
        return replace(self, grad_output_factor=factor * self.grad_output_factor)

    def restrict(self, names: Collection[str]) -> KroneckerBlock:  # noqa: D102
        if set(names) >= set(self.names):
            return self
        (name,) = names
        layout, columns = self.layout.restrict(name)
        inputs = self._full_input_factor[:, columns, columns]
        return KroneckerBlock(layout, inputs, self.grad_output_factor, vectors=self.vectors)
