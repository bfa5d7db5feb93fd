"""Moving averages of Kronecker factors with exact damping, in their eigenbasis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_tn.capture import Factors
from kfac_tn.curvature.kronecker import mean_eigenvalue
from kfac_tn.curvature.moving import MovingFactors
from kfac_tn.layers import LayerBlock


class EigenFactors(MovingFactors):
    """As ``MovingFactors``, but with (B (x) A + damping I)^-1 itself, not a product of inverses.

    In place of the inverses there are the factors' eigenvectors Q_A and Q_B, and by ``values`` the
    reciprocals of the products of their eigenvalues plus damping: a direction costs four matrix
    products instead of two, an eigendecomposition many times a Cholesky factorization.
    """

    values: Tensor  # [blocks, G, d_out, d_in]

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
            a, b = self.input[slot], self.grad_output[slot]
            try:
                (a_values, a_vectors), (b_values, b_vectors) = map(_eigh, (a, b))
            except torch.linalg.LinAlgError:
                failed.append(block.name)
                continue
            scale = mean_eigenvalue(a) * mean_eigenvalue(b)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            shift = damping * (scale if relative else torch.ones_like(scale))
            damped = b_values.unsqueeze(-1) * a_values.unsqueeze(-2) + shift.view(-1, 1, 1)
            self.input_inverse[slot], self.grad_output_inverse[slot] = a_vectors, b_vectors
            self.values[slot] = damped.reciprocal()
            self.inverted[slot] = True
        return failed

    def precondition(self, matrices: Mapping[LayerBlock, Tensor]) -> dict[LayerBlock, Tensor]:
        """Multiply with (B (x) A + damping I)^-1; layers that have none yet are missing."""
        blocks = [block for block in matrices if self.inverted[self._slot[block]]]
        if not blocks:
            return {}
        slots = [self._slot[block] for block in blocks]
        a, b = self.input_inverse[slots], self.grad_output_inverse[slots]
        stacked = torch.stack([matrices[block] for block in blocks]).to(a.dtype)
        result = b @ (self.values[slots] * (b.mT @ stacked @ a)) @ a.mT
        return dict(zip(blocks, result.unbind(), strict=True))

    def state_dict(self) -> dict[str, dict[str, Any]]:  # noqa: D102
        state = super().state_dict()
        for block, slot in self._slot.items():
            if block.name in state:
                state[block.name]["values"] = self.values[slot].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:  # noqa: D102
        super().load_state_dict(state)
        for block, slot in self._slot.items():
            if block.name in state:
                self.values[slot] = state[block.name]["values"].to(self.values)

    def _allocate(self, like: Factors) -> None:
        super()._allocate(like)
        shape = *self.grad_output.shape[:-1], self.input.shape[-1]
        self.values = self.input.new_zeros(shape)


def decompose(moving: Iterable[EigenFactors], damping: float, relative: bool) -> list[str]:
    """``EigenFactors.decompose`` for all; see there."""
    return [name for each in moving for name in each.decompose(damping, relative)]


def _eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not negative, and eigenvectors; in float64 where float32 doesn't converge."""
    try:
        values, vectors = torch.linalg.eigh(factor)
        if not bool(values.isfinite().all() & vectors.isfinite().all()):
            raise torch.linalg.LinAlgError("not finite")
    except torch.linalg.LinAlgError:
        values, vectors = (each.to(factor) for each in torch.linalg.eigh(factor.double()))
    return values.clamp(min=0), vectors
