"""Moving averages of Kronecker factors and their damped inverses, batched by shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from kfac_tn.curvature.inverse import damped_inverses
from kfac_tn.curvature.kronecker import pi_shares
from kfac_tn.functional.blocks import multiply_blocks
from kfac_tn.layers import LayerBlock
from kfac_tn.moments import Basis
from kfac_tn.statistics import Factors
from kfac_tn.tn.gemm import LEAST_PRODUCT, multiply

Columns: TypeAlias = "tuple[Tensor, ...]"


class Moving(ABC):
    """The curvature of layers of one shape, stacked: averages, and what a direction is made with.

    An average after k updates is sum_j (1 - decay) decay^(k-j) F_j / (1 - decay^k): corrected for
    its start at zero, as Adam's moments are (Kingma & Ba 2015, Section 3).

    Args:
        blocks: Layers with equal groups and factor sizes, all of them with a bias, or none.
        decay: Of the averages, in [0, 1).
    """

    _COUNTS: ClassVar[tuple[str, ...]] = ("updates", "inverted")

    def __init__(self, blocks: Iterable[LayerBlock], decay: float) -> None:
        self.blocks = tuple(blocks)
        self.decay = decay
        self.groups = self.blocks[0].groups
        self.bias = self.blocks[0].bias is not None
        self.d_in, self.d_out = self.blocks[0].joint_dim, self.blocks[0].grad_output_dim
        self._slot = {block: index for index, block in enumerate(self.blocks)}
        self._forget()

    def _forget(self) -> None:
        self.updates = [0] * len(self.blocks)
        self.inverted = [False] * len(self.blocks)

    # What a kind of curvature must say ---------------------------------------------------------

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors held for each layer, by attribute, and their shapes."""

    @staticmethod
    @abstractmethod
    def renew(moving: Sequence[Any], damping: float, relative: bool) -> list[str]:
        """Renew what is renewed every inverse interval, for all layers that have statistics.

        Args:
            moving: Layers of any shapes, all of this kind.
            damping: Added to each block.
            relative: The damping is in units of each block's mean eigenvalue, not of the loss.

        Returns:
            Names of the layers where that is impossible; what they had stays.
        """

    @abstractmethod
    def precondition(self, matrices: Mapping[LayerBlock, Tensor]) -> dict[LayerBlock, Tensor]:
        """Multiply each ``[G, d_out, d_in]`` with the inverse of the damped block.

        Layers that have no inverse yet are missing in the result.
        """

    def directions(self, columns: Mapping[LayerBlock, Columns]) -> dict[LayerBlock, Columns]:
        """As ``precondition``, of and by columns: those of the weight, and the bias' if any."""
        matrices = {block: _joined(each) for block, each in columns.items()}
        return {
            block: (matrix,) if block.bias is None else (matrix[..., :-1], matrix[..., -1:])
            for block, matrix in self.precondition(matrices).items()
        }

    def room(self) -> Tensor | None:
        """Where matrices of all layers lie for ``directions_of``, if it takes them from there."""
        return None

    def directions_of(self, matrices: Tensor) -> list[Columns]:
        """As ``directions`` of what was put into ``room``, ``[layers, G, d_out, d_in]``."""
        columns = {block: (matrix,) for block, matrix in zip(self.blocks, matrices, strict=True)}
        return list(self.directions(columns).values())

    @abstractmethod
    def multiply(self, block: LayerBlock, matrix: Tensor) -> Tensor:
        """Multiply ``[G, d_out, d_in]`` with the block of a layer, without damping."""

    @abstractmethod
    def mean_eigenvalues(self, block: LayerBlock) -> Tensor:
        """Of the block of a layer: ``[G]``."""

    @abstractmethod
    def eigenvalues(self, block: LayerBlock) -> Tensor:
        """Of the block of a layer, ``[G, d_out, d_in]``.

        Raises:
            torch.linalg.LinAlgError: If they can't be computed.
        """

    def update(self, factors: Mapping[LayerBlock, Factors]) -> None:  # noqa: B027
        """Average new factors in; layers that are missing keep theirs."""

    def update_moments(self, moments: Mapping[LayerBlock, Tensor]) -> None:  # noqa: B027
        """Average new second moments in."""

    def dampen(self, damping: float, relative: bool) -> None:  # noqa: B027
        """Renew the damping where that costs nothing: whenever there are new statistics."""

    def basis(self, block: LayerBlock) -> Basis | None:
        """Along which second moments of a layer are wanted, if they are."""
        return None

    def factors(self, block: LayerBlock) -> Factors | None:
        """The averages of one layer, or None if it has none (yet)."""
        return None

    # What they have in common ------------------------------------------------------------------

    @property
    def lacks_inverse(self) -> bool:
        """Whether a layer has statistics but never had an inverse."""
        return any(
            updates and not inverted
            for updates, inverted in zip(self.updates, self.inverted, strict=True)
        )

    def known(self, block: LayerBlock) -> bool:
        """Whether a layer has statistics."""
        return self.updates[self._slot[block]] > 0

    def damping(self, block: LayerBlock, damping: float, relative: bool) -> Tensor:
        """What is added to the block of a layer, ``[G]``."""
        means = self.mean_eigenvalues(block)
        return damping * (or_one(means) if relative else torch.ones_like(means))

    def memory(self, block: LayerBlock) -> int:
        """Bytes held for a layer."""
        tensors = [getattr(self, name)[self._slot[block]] for name in self.shapes()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By layer name: averages, inverses, and how often they were updated."""
        return {
            block.name: {
                **{name: getattr(self, name)[slot] for name in self._COUNTS},
                **{name: getattr(self, name)[slot].clone() for name in self.shapes()},
            }
            for block, slot in self._slot.items()
            if self.updates[slot]
        }

    def check_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse what ``load_state_dict`` can't set.

        Raises:
            ValueError: If a layer's state is of another kind of curvature, or a shape isn't the
                layer's.
        """
        shapes = self.shapes()
        for block in self.blocks:
            if block.name not in state:
                continue
            if state[block.name].keys() != {*self._COUNTS, *shapes}:
                raise ValueError(
                    f"The state has another kind of curvature for layer '{block.name}': it is of "
                    "another damping_split, or curvature was chosen otherwise."
                )
            for name, wanted in shapes.items():
                shape = state[block.name][name].shape
                if shape != wanted:
                    raise ValueError(
                        f"The state has '{name}' of shape {list(shape)} for layer '{block.name}', "
                        f"which needs {list(wanted)}: it is another model's."
                    )

    def fits(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether what was saved of a layer is here, and of the size that it has now."""
        shapes = self.shapes()
        mine = any(block.name == name for block in self.blocks)
        return mine and all(entry[each].shape == shape for each, shape in shapes.items())

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Set what ``state_dict`` gave; layers that are missing there start anew.

        Raises:
            ValueError: As ``check_state_dict``; nothing is changed then.
        """
        self.check_state_dict(state)
        self._forget()
        for slot, block in enumerate(self.blocks):
            if block.name not in state:
                continue
            entry = state[block.name]
            if not any(self.updates):
                like = next(iter(entry[name] for name in self.shapes()))
                self._allocate(like.to(block.weight.device))
            for name in self._COUNTS:
                getattr(self, name)[slot] = entry[name]
            for name in self.shapes():
                getattr(self, name)[slot].copy_(entry[name])

    def _allocate(self, like: Tensor) -> None:
        """Make room, with the first statistics."""
        for name, shape in self.shapes().items():
            setattr(self, name, like.new_zeros(len(self.blocks), *shape))

    def _share(self, updates: int) -> float:
        """The share of the latest statistics in their average."""
        return (1 - self.decay) / (1 - self.decay**updates)


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
                self._allocate(new.diagonals()[0])
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


class MovingFactors(KroneckerMoving):
    """Averages of the factors and the inverses of both, with the damping divided between them."""

    input_inverse: Tensor
    grad_output_inverse: Tensor

    def _forget(self) -> None:
        super()._forget()
        self._room: Tensor | None = None
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
        return {block: _joined(each) for block, each in self.directions(columns).items()}

    def directions(self, columns: Mapping[LayerBlock, Columns]) -> dict[LayerBlock, Columns]:
        """As ``precondition``, by columns, each contiguous: faster in what is done with them."""
        blocks = [block for block in columns if self.inverted[self._slot[block]]]
        if len(blocks) > 1 and self._gains_from_company:
            everything = tuple(blocks) == self.blocks
            slots: Any = slice(None) if everything else [self._slot[block] for block in blocks]
            stacked = [
                torch.stack(each) for each in zip(*(columns[b] for b in blocks), strict=True)
            ]
            parts = self._products(slots, _joined(stacked))
            return dict(zip(blocks, zip(*map(Tensor.unbind, parts), strict=True), strict=True))
        return {
            block: self._products(self._slot[block], _joined(columns[block])) for block in blocks
        }

    def room(self) -> Tensor | None:  # noqa: D102
        if self._room is None and all(self.inverted) and self.pieces == (1, 1):
            self._room = self.input.new_empty(len(self.blocks), self.groups, self.d_out, self.d_in)
        return self._room

    def directions_of(self, matrices: Tensor) -> list[Columns]:  # noqa: D102
        if len(self.blocks) == 1 or not self._gains_from_company:
            return [
                self._multiplied(matrix, *self._inverses(slot))
                for slot, matrix in enumerate(matrices)
            ]
        parts = self._multiplied(matrices.flatten(0, 1), *self._inverses(None))
        each = (part.unflatten(0, matrices.shape[:2]).unbind() for part in parts)
        return list(zip(*each, strict=True))

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


def _joined(columns: Sequence[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), -1)


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


def or_one(scale: Tensor) -> Tensor:
    """A block that is zero has no scale of its own."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
