"""Moving averages of Kronecker factors with exact damping, in their eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_tn.curvature.eigh import eigh
from kfac_tn.curvature.moving import KroneckerMoving
from kfac_tn.functional.blocks import multiply_blocks
from kfac_tn.layers import LayerBlock


class EigenFactors(KroneckerMoving):
    """As ``MovingFactors``, but with (B (x) A + damping I)^-1 itself, not a product of inverses.

    In place of the inverses there are the factors' eigenvectors Q_A and Q_B, and by ``values`` the
    products of their eigenvalues: a direction costs four matrix products instead of two, an
    eigendecomposition many times a Cholesky factorization.
    """

    input_vectors: Tensor
    grad_output_vectors: Tensor
    values: Tensor  # [blocks, G, d_out, d_in]
    shift: Tensor  # [blocks, G], the damping

    def shapes(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        shapes = super().shapes()
        return {
            **shapes,
            "input_vectors": shapes["input"],
            "grad_output_vectors": shapes["grad_output"],
            "values": (
                self.groups,
                self.pieces[1] * self.sizes[1],
                self.pieces[0] * self.sizes[0],
            ),
            "shift": (self.groups,),
        }

    @staticmethod
    def renew(moving: Sequence[EigenFactors], damping: float, relative: bool) -> list[str]:  # noqa: D102
        return [name for each in moving for name in each.decompose(damping, relative)]

    def decompose(self, damping: float, relative: bool) -> list[str]:
        """Renew eigenvectors and values of all layers that have factors.

        Args:
            damping: Added to B (x) A.
            relative: In units of each block's mean eigenvalue, not of the loss.

        Returns:
            Names of the layers whose factors can't be decomposed; what they had stays.
        """
        failed = []
        for slot, block in enumerate(self.blocks):
            if not self.updates[slot]:
                continue
            factors = zip((self.input, self.grad_output), (self.d_in, self.d_out), strict=True)
            try:
                decomposed = [self._decompose(each[slot], size) for each, size in factors]
            except torch.linalg.LinAlgError:
                failed.append(block.name)
                continue
            self._rotate(slot, *decomposed)
            self.inverted[slot] = True
            self.shift[slot] = self.damping(block, damping, relative)
        return failed

    def _decompose(self, factor: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[G, d]`` and vectors ``[G * pieces, s, s]``, d being filled up."""
        used = size - (len(factor) // self.groups - 1) * factor.shape[-1]  # of the last piece
        if used < factor.shape[-1]:
            # What is filled up gets eigenvalues unlike any others, so it isn't mixed with the rest.
            factor = factor.clone()
            last = factor.unflatten(0, (self.groups, -1))[:, -1].diagonal(dim1=-2, dim2=-1)
            last[:, used:] = -1 - last.sum(1, keepdim=True)
        values, vectors = eigh(factor)
        return values.view(self.groups, -1), vectors

    def _rotate(self, slot: int, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
        """Set eigenvectors and values of one layer."""
        (a_values, self.input_vectors[slot]), (b_values, self.grad_output_vectors[slot]) = a, b
        self.values[slot] = b_values.unsqueeze(-1) * a_values.unsqueeze(-2)

    def precondition(self, matrices: Mapping[LayerBlock, Tensor]) -> dict[LayerBlock, Tensor]:
        """Multiply with (block + damping I)^-1; layers that have none yet are missing."""
        blocks = [block for block in matrices if self.inverted[self._slot[block]]]
        if not blocks:
            return {}
        slots: Any = slice(None)
        if len(blocks) < len(self.blocks) or tuple(blocks) != self.blocks:
            slots = [self._slot[block] for block in blocks]
        a, b = self.input_vectors[slots], self.grad_output_vectors[slots]
        stacked = torch.stack([matrices[block] for block in blocks]).to(a.dtype)
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        rotated = self._rotated(b, stacked.flatten(0, 1), a)
        rotated /= (self.values[slots] + self.shift[slots][..., None, None]).flatten(0, 1)
        result = self._rotated_back(b, rotated, a).view_as(stacked)
        return dict(zip(blocks, result.unbind(), strict=True))

    def _rotated(self, b: Tensor, matrices: Tensor, a: Tensor) -> Tensor:
        """Q_B^T M Q_A of ``[K, d_out, d_in]``, as large as they are filled up."""
        return multiply_blocks(multiply_blocks(matrices.mT, b).mT, a)

    def _rotated_back(self, b: Tensor, matrices: Tensor, a: Tensor) -> Tensor:
        """Q_B M Q_A^T, ``[K, d_out, d_in]``."""
        return self._both_sides(b.mT, matrices, a.mT)
