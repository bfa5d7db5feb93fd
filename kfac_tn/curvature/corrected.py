"""Moving averages of second moments of gradients: EKFAC, and diagonals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_tn.curvature.averages import Moving
from kfac_tn.curvature.exact import EigenFactors
from kfac_tn.functional.blocks import multiply_blocks
from kfac_tn.layers import LayerBlock
from kfac_tn.moments import Basis


class MovingEKFAC(EigenFactors):
    """Eigenvectors of Kronecker factors, with averaged second moments of gradients for eigenvalues.

    These are sum_n (Q_B^T G_n Q_A)^2 over the gradients of single examples (George et al. 2018,
    Eq. 10), renewed with every statistics; of all values they bring the block closest to the exact
    one in Frobenius norm. Until the first ones arrive, the products of the factors' eigenvalues
    stand for them. When the eigenvectors are renewed, the values become the diagonal of the block
    they made, along the new ones: ((Q_B')^T Q_B)^2 v (Q_A^T Q_A')^2, which keeps the trace.
    """

    _COUNTS = ("updates", "inverted", "moment_updates")

    def _forget(self) -> None:
        super()._forget()
        self.moment_updates = [0] * len(self.blocks)

    def update_moments(self, moments: Mapping[LayerBlock, Tensor]) -> None:  # noqa: D102
        for block, new in moments.items():
            slot = self._slot[block]
            self.moment_updates[slot] += 1
            share = self._share(self.moment_updates[slot])
            self.values[slot].lerp_(new.to(self.values.dtype), share)

    def dampen(self, damping: float, relative: bool) -> None:  # noqa: D102
        for slot, block in enumerate(self.blocks):
            if self.inverted[slot]:
                self.shift[slot] = self.damping(block, damping, relative)

    def basis(self, block: LayerBlock) -> Basis | None:  # noqa: D102
        slot = self._slot[block]
        if not self.inverted[slot]:
            return None
        return Basis(self.input_vectors[slot], self.grad_output_vectors[slot])

    def multiply(self, block: LayerBlock, matrix: Tensor) -> Tensor:  # noqa: D102
        slot = self._slot[block]
        if not self.inverted[slot]:
            return super().multiply(block, matrix)
        a, b = self.input_vectors[slot], self.grad_output_vectors[slot]
        rotated = self._rotated(b, matrix.to(a.dtype), a)
        return self._rotated_back(b, self.values[slot] * rotated, a)

    def eigenvalues(self, block: LayerBlock) -> Tensor:  # noqa: D102
        slot = self._slot[block]
        return self.values[slot] if self.inverted[slot] else super().eigenvalues(block)

    def mean_eigenvalues(self, block: LayerBlock) -> Tensor:  # noqa: D102
        slot = self._slot[block]
        if not self.inverted[slot]:
            return super().mean_eigenvalues(block)
        return self.values[slot].sum((-2, -1)) / (self.d_out * self.d_in)

    def _rotate(self, slot: int, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
        if not self.moment_updates[slot]:
            super()._rotate(slot, a, b)
            return
        inputs = (self.input_vectors[slot].mT @ a[1]).square()
        outputs = (self.grad_output_vectors[slot].mT @ b[1]).square()
        self.input_vectors[slot], self.grad_output_vectors[slot] = a[1], b[1]
        left = multiply_blocks(self.values[slot].mT, outputs).mT
        self.values[slot] = multiply_blocks(left, inputs)


class MovingDiagonal(Moving):
    """The diagonal of the block: averaged second moments along unit vectors."""

    values: Tensor  # [blocks, G, d_out, d_in]
    shift: Tensor  # [blocks, G]

    def shapes(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return {"values": (self.groups, self.d_out, self.d_in), "shift": (self.groups,)}

    def update_moments(self, moments: Mapping[LayerBlock, Tensor]) -> None:  # noqa: D102
        for block, new in moments.items():
            if not any(self.updates):
                self._allocate(new)
            slot = self._slot[block]
            self.updates[slot] += 1
            self.inverted[slot] = True
            self.values[slot].lerp_(new.to(self.values.dtype), self._share(self.updates[slot]))

    def dampen(self, damping: float, relative: bool) -> None:  # noqa: D102
        for slot, block in enumerate(self.blocks):
            if self.updates[slot]:
                self.shift[slot] = self.damping(block, damping, relative)

    @staticmethod
    def renew(moving: Sequence[MovingDiagonal], damping: float, relative: bool) -> list[str]:
        """Nothing: the damping is renewed with every statistics."""
        return []

    def basis(self, block: LayerBlock) -> Basis | None:  # noqa: D102
        return Basis()

    def multiply(self, block: LayerBlock, matrix: Tensor) -> Tensor:  # noqa: D102
        return self.values[self._slot[block]] * matrix

    def eigenvalues(self, block: LayerBlock) -> Tensor:  # noqa: D102
        return self.values[self._slot[block]]

    def mean_eigenvalues(self, block: LayerBlock) -> Tensor:  # noqa: D102
        return self.values[self._slot[block]].mean((-2, -1))

    def precondition(self, matrices: Mapping[LayerBlock, Tensor]) -> dict[LayerBlock, Tensor]:  # noqa: D102
        results = {}
        for block, matrix in matrices.items():
            slot = self._slot[block]
            if self.inverted[slot]:
                damped = self.values[slot] + self.shift[slot][:, None, None]
                results[block] = torch.div(matrix.to(damped.dtype), damped, out=damped)
        return results
