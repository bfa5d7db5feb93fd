"""Averages of curvature along a training run, of layers of one shape together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from kfac_tn.factors import Factors
from kfac_tn.layers import LayerBlock
from kfac_tn.moments import Basis

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
    noise = 0.0  # by how much noisy averages are damped more

    def __init__(self, blocks: Iterable[LayerBlock], decay: float) -> None:
        self.blocks = tuple(blocks)
        self.decay = decay
        self.groups = self.blocks[0].groups
        self.bias = self.blocks[0].bias is not None
        self.d_in, self.d_out = self.blocks[0].joint_dim, self.blocks[0].grad_output_dim
        self._slot = {block: index for index, block in enumerate(self.blocks)}
        self._forget()

    def forget(self, block: LayerBlock) -> None:
        """Begin anew with a layer: what is known of it isn't true any more."""
        for name in self._COUNTS:
            counts = getattr(self, name)
            counts[self._slot[block]] = type(counts[0])()

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
        matrices = {block: joined(each) for block, each in columns.items()}
        return {
            block: (matrix,) if block.bias is None else (matrix[..., :-1], matrix[..., -1:])
            for block, matrix in self.precondition(matrices).items()
        }

    def room(self) -> Tensor | None:
        """A new tensor for ``directions_of``; None if that isn't faster than ``directions``."""
        return None

    def directions_of(self, matrices: Tensor) -> list[Columns]:
        """As ``directions``, of what was put into a ``room``: ``[layers, G, d_out, d_in]``."""
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

    def count(self, block: LayerBlock, vectors: float, columns: float) -> None:  # noqa: B027
        """Note of how many vectors new factors are, for each of some columns."""

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


def joined(columns: Sequence[Tensor]) -> Tensor:
    """The matrix of some columns, side by side."""
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), -1)


def or_one(scale: Tensor) -> Tensor:
    """A block that is zero has no scale of its own."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
