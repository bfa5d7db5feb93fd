"""Moving averages of Kronecker factors and their damped inverses, batched by shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from kfac_tn.curvature.averages import Columns, Moving, joined, or_one
from kfac_tn.curvature.inverse import damped_inverses
from kfac_tn.curvature.kronecker import pi_shares
from kfac_tn.factors import Factors
from kfac_tn.functional.blocks import multiply_blocks
from kfac_tn.layers import LayerBlock
from kfac_tn.tn.gemm import LEAST_PRODUCT, multiply


class KroneckerMoving(Moving):
    """Averages of Kronecker factors.

    Factors above the limit of their dimension are block-diagonal: as if they had so many more
    groups (see ``kfac_tn.functional.blocks``), with zeros where the last one is filled up.
    """

    input: Tensor  # [blocks, G * pieces, s, s]; these two are made by the first update
    grad_output: Tensor

    def __init__(self, blocks: Iterable[LayerBlock], decay: float) -> None:
        super().__init__(blocks, decay)
        self.pieces = self.blocks[0].input_pieces, self.blocks[0].grad_output_pieces
        self.sizes = -(-self.d_in // self.pieces[0]), -(-self.d_out // self.pieces[1])

    def shapes(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        a, b = (
            (self.groups * pieces, size, size)
            for pieces, size in zip(self.pieces, self.sizes, strict=True)
        )
        return {"input": a, "grad_output": b}

    def update(self, factors: Mapping[LayerBlock, Factors]) -> None:  # noqa: D102
        for block, new in factors.items():
            if not any(self.updates):
                self._allocate(new.like)
            slot = self._slot[block]
            self.updates[slot] += 1
            share = self._share(self.updates[slot])
            new.average_into(self.input[slot], self.grad_output[slot], share)

    def factors(self, block: LayerBlock) -> Factors | None:  # noqa: D102
        slot = self._slot[block]
        return Factors(self.input[slot], self.grad_output[slot]) if self.updates[slot] else None

    def multiply(self, block: LayerBlock, matrix: Tensor) -> Tensor:  # noqa: D102
        slot = self._slot[block]
        matrix = matrix.to(self.input.dtype)
        return self._both_sides(self.grad_output[slot], matrix, self.input[slot])

    def _both_sides(self, b: Tensor, matrices: Tensor, a: Tensor) -> Tensor:
        """B^T M A of ``[K, d_out, d_in]``."""
        left = multiply_blocks(matrices.mT, b)[..., : self.d_out].mT
        return multiply_blocks(left, a)[..., : self.d_in]

    def mean_eigenvalues(self, block: LayerBlock) -> Tensor:  # noqa: D102
        of_input, of_output = self._means(self._slot[block])
        return of_input * of_output

    def _means(self, slots: int | slice = slice(None)) -> list[Tensor]:
        """Mean eigenvalues of A and of B, ``[..., G]``."""
        factors = self.input[slots], self.grad_output[slots]
        return [
            factor.diagonal(dim1=-2, dim2=-1).unflatten(-2, (self.groups, -1)).sum((-2, -1)) / size
            for factor, size in zip(factors, (self.d_in, self.d_out), strict=True)
        ]

    def eigenvalues(self, block: LayerBlock) -> Tensor:  # noqa: D102
        slot = self._slot[block]
        a, b = (
            torch.linalg.eigvalsh(each[slot]).clamp(min=0).view(self.groups, -1)
            for each in (self.input, self.grad_output)
        )
        return b.unsqueeze(-1) * a.unsqueeze(-2)

    def shifts(self, damping: float, relative: bool) -> tuple[Tensor, Tensor]:
        """What damping adds to A and B if divided, ``[blocks, G * pieces]`` for each."""
        of_input, of_output = self._means()
        if relative:
            a, b = damping**0.5 * or_one(of_input), damping**0.5 * or_one(of_output)
        else:
            a, b = pi_shares(of_input, of_output, damping)
        return a.repeat_interleave(self.pieces[0], 1), b.repeat_interleave(self.pieces[1], 1)


def noise_share(size: int, vectors: float, noise: float) -> float:
    """What the damping of an average of outer products is multiplied with, for its noise.

    The eigenvalues of a sum of so many products are spread by about the root of their dimension
    over their number (Marchenko & Pastur 1967), and where these are fewer some are zero: there, the
    inverse makes the most of what isn't known at all.

    Example:
        >>> noise_share(10, 1e9, 0.0), noise_share(30, 10, 7.0)
        (1.0, 8.0)
    """
    return (1 + noise * (size / vectors) ** 2) ** 0.5 if vectors else 1.0


class MovingFactors(KroneckerMoving):
    """Averages of the factors and the inverses of both, with the damping divided between them."""

    _COUNTS: ClassVar[tuple[str, ...]] = (*Moving._COUNTS, "inputs", "grad_outputs")

    input_inverse: Tensor
    grad_output_inverse: Tensor

    def count(self, block: LayerBlock, vectors: float, columns: float) -> None:
        """Note of how many vectors the latest factors of a layer are, for each of some columns."""
        slot = self._slot[block]
        self.inputs[slot] = self.decay * self.inputs[slot] + vectors
        self.grad_outputs[slot] = self.decay * self.grad_outputs[slot] + vectors * columns

    def shifts(self, damping: float, relative: bool) -> tuple[Tensor, Tensor]:
        """Of noisy averages more."""
        a, b = super().shifts(damping, relative)
        of_inputs, of_outputs = zip(*map(self._noise, range(len(self.blocks))), strict=True)
        return a * a.new_tensor(of_inputs)[:, None], b * b.new_tensor(of_outputs)[:, None]

    def damping(self, block: LayerBlock, damping: float, relative: bool) -> Tensor:
        """Of noisy averages more."""
        of_input, of_output = self._noise(self._slot[block])
        return super().damping(block, damping * of_input * of_output, relative)

    def _noise(self, slot: int) -> tuple[float, float]:
        return (
            noise_share(self.sizes[0], self.inputs[slot], self.noise),
            noise_share(self.sizes[1], self.grad_outputs[slot], self.noise),
        )

    def _forget(self) -> None:
        super()._forget()
        self.inputs = [0.0] * len(self.blocks)
        self.grad_outputs = [0.0] * len(self.blocks)
        self._operands: dict[int | None, tuple[Tensor, ...]] = {}

    def _allocate(self, like: Tensor) -> None:
        super()._allocate(like)
        self._operands = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        shapes = super().shapes()
        return {
            **shapes,
            "input_inverse": shapes["input"],
            "grad_output_inverse": shapes["grad_output"],
        }

    def precondition(self, matrices: Mapping[LayerBlock, Tensor]) -> dict[LayerBlock, Tensor]:
        """Multiply with the damped inverses: B^-1 M A^-1 for each ``[G, d_out, d_in]``.

        Layers that have no inverse yet are missing in the result.
        """
        columns = {block: (matrix,) for block, matrix in matrices.items()}
        return {block: joined(each) for block, each in self.directions(columns).items()}

    def directions(self, columns: Mapping[LayerBlock, Columns]) -> dict[LayerBlock, Columns]:
        """As ``precondition``, by columns, each contiguous: faster in what is done with them."""
        blocks = [block for block in columns if self.inverted[self._slot[block]]]
        if len(blocks) > 1 and self._gains_from_company:
            everything = tuple(blocks) == self.blocks
            slots: Any = slice(None) if everything else [self._slot[block] for block in blocks]
            stacked = [
                torch.stack(each) for each in zip(*(columns[b] for b in blocks), strict=True)
            ]
            parts = self._products(slots, joined(stacked))
            return dict(zip(blocks, zip(*map(Tensor.unbind, parts), strict=True), strict=True))
        return {
            block: self._products(self._slot[block], joined(columns[block])) for block in blocks
        }

    def room(self) -> Tensor | None:  # noqa: D102
        if not all(self.inverted) or self.pieces != (1, 1):
            return None
        return self.input.new_empty(len(self.blocks), self.groups, self.d_out, self.d_in)

    def directions_of(self, matrices: Tensor) -> list[Columns]:  # noqa: D102
        if len(self.blocks) == 1 or not self._gains_from_company:
            return [
                self._multiplied(matrix, *self._inverses(slot))
                for slot, matrix in enumerate(matrices)
            ]
        parts = self._multiplied(matrices.flatten(0, 1), *self._inverses(None))
        return list(zip(*(part.chunk(len(self.blocks)) for part in parts), strict=True))

    def _inverses(self, slot: int | None) -> tuple[Tensor, ...]:
        """What the matrices of a layer, or of all, are multiplied with: see ``_parts``."""
        if slot not in self._operands:
            inverses = self.grad_output_inverse, self.input_inverse
            chosen = (x.flatten(0, 1) if slot is None else x[slot] for x in inverses)
            self._operands[slot] = self._parts(*chosen)
        return self._operands[slot]

    @cached_property
    def _gains_from_company(self) -> bool:
        """Whether layers are better multiplied together: small ones share the launches.

        Large ones on a CPU don't, and would be copied.
        """
        size = self.d_out * self.d_in * min(self.d_out, self.d_in)
        return not self.input.is_cpu or size < LEAST_PRODUCT

    def _products(self, slots: Any, matrices: Tensor) -> Columns:
        """B^-1 M A^-1 of ``[..., G, d_out, d_in]``, by columns; slots in the leading axis."""
        matrices = matrices.to(self.input.dtype)
        a, b = self.input_inverse[slots], self.grad_output_inverse[slots]
        if matrices.dim() == 3:
            return self._each(b, matrices, a)
        parts = self._each(b.flatten(0, 1), matrices.flatten(0, 1), a.flatten(0, 1))
        return tuple(part.unflatten(0, matrices.shape[:2]) for part in parts)

    def _each(self, b: Tensor, matrices: Tensor, a: Tensor) -> Columns:
        """B^-1 M A^-1 of ``[K, d_out, d_in]``, by columns."""
        if self.pieces != (1, 1):
            result = self._both_sides(b, matrices, a)
            return (result[..., :-1], result[..., -1:]) if self.bias else (result,)
        return self._multiplied(matrices, *self._parts(b, a))

    def _parts(self, b: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        """B^-1, and A^-1 by what its columns make: weights, and the bias if there is one.

        A^-1 is symmetric: its rows are its columns, but without gaps.
        """
        return (b, a[:, :-1].mT, a[:, -1:]) if self.bias else (b, a)

    @staticmethod
    def _multiplied(
        matrices: Tensor, b: Tensor, weights: Tensor, bias: Tensor | None = None
    ) -> Columns:
        left = multiply(b, matrices)
        if bias is None:
            return (multiply(left, weights),)
        # A row from the left is eight times as fast as a column from the right.
        return multiply(left, weights), torch.bmm(bias, left.mT).mT.contiguous()

    @staticmethod
    def renew(moving: Sequence[MovingFactors], damping: float, relative: bool) -> list[str]:  # noqa: D102
        return invert(moving, damping, relative)


def invert(moving: Iterable[MovingFactors], damping: float, relative: bool) -> list[str]:
    """Renew the inverses of all layers that have factors.

    Args:
        moving: Layers of any shapes; factors of one size are inverted together.
        damping: Added to B (x) A, divided between the factors by ``pi_split``.
        relative: The damping is in units of each block's mean eigenvalue, not of the loss.

    Returns:
        Names of the layers with a factor that can't be inverted; their old inverses stay.
    """
    places: list[tuple[MovingFactors, int]] = []
    factors: list[Tensor] = []
    dampings: list[Tensor] = []
    for each in moving:
        slots = [slot for slot, updates in enumerate(each.updates) if updates]
        places += [(each, slot) for slot in slots]
        shifts = each.shifts(damping, relative) if slots else ()
        for slot in slots:
            factors += [each.input[slot], each.grad_output[slot]]
            dampings += [shift[slot] for shift in shifts]
    inverses = iter(damped_inverses(factors, dampings))
    failed = []
    for each, slot in places:
        (a, a_is_good), (b, b_is_good) = next(inverses), next(inverses)
        if a_is_good and b_is_good:
            each.input_inverse[slot], each.grad_output_inverse[slot] = a, b
            each.inverted[slot] = True
        else:
            failed.append(each.blocks[slot].name)
    return failed
