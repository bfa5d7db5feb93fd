"""Moving averages of Kronecker factors and their damped inverses, batched by shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_tn.capture import Factors
from kfac_tn.curvature.inverse import damped_inverses
from kfac_tn.curvature.kronecker import mean_eigenvalue, pi_split
from kfac_tn.layers import LayerBlock


class MovingFactors:
    """The factors of layers of one shape, stacked: averages and damped inverses.

    The average after k updates is sum_j (1 - decay) decay^(k-j) F_j / (1 - decay^k): corrected for
    its start at zero, as Adam's moments are (Kingma & Ba 2015, Section 3).

    Args:
        blocks: Layers with equal groups and factor sizes.
        decay: Of the average, in [0, 1).
    """

    _TENSORS = ("input", "grad_output", "input_inverse", "grad_output_inverse")

    def __init__(self, blocks: Iterable[LayerBlock], decay: float) -> None:
        self.blocks = tuple(blocks)
        self.decay = decay
        self.groups = self.blocks[0].groups
        self._slot = {block: index for index, block in enumerate(self.blocks)}
        self.updates = [0] * len(self.blocks)
        self.inverted = [False] * len(self.blocks)
        self.input: Tensor  # [blocks, G, d_in, d_in]; these four are made by the first update
        self.grad_output: Tensor
        self.input_inverse: Tensor
        self.grad_output_inverse: Tensor

    def update(self, factors: Mapping[LayerBlock, Factors]) -> None:
        """Average new factors in; layers that are missing keep theirs."""
        for block, new in factors.items():
            if not any(self.updates):
                self._allocate(new)
            slot = self._slot[block]
            self.updates[slot] += 1
            share = (1 - self.decay) / (1 - self.decay ** self.updates[slot])
            new.average_into(self.input[slot], self.grad_output[slot], share)

    @property
    def lacks_inverse(self) -> bool:
        """Whether a layer has factors but never had an inverse."""
        return any(
            updates and not inverted
            for updates, inverted in zip(self.updates, self.inverted, strict=True)
        )

    def shifts(self, damping: float, relative: bool) -> tuple[Tensor, Tensor]:
        """What ``invert`` adds to the diagonals of A and B, ``[blocks, G]`` each."""
        if not relative:
            return pi_split(self.input, self.grad_output, damping)
        means = mean_eigenvalue(self.input), mean_eigenvalue(self.grad_output)
        return damping**0.5 * _or_one(means[0]), damping**0.5 * _or_one(means[1])

    def precondition(self, matrices: Mapping[LayerBlock, Tensor]) -> dict[LayerBlock, Tensor]:
        """Multiply with the damped inverses: B^-1 M A^-1 for each ``[G, d_out, d_in]``.

        Layers that have no inverse yet are missing in the result.
        """
        blocks = [block for block in matrices if self.inverted[self._slot[block]]]
        if not blocks:
            return {}
        stacked = torch.stack([matrices[block] for block in blocks]).to(self.input.dtype)
        a, b = self.input_inverse, self.grad_output_inverse
        if len(blocks) < len(self.blocks):
            slots = [self._slot[block] for block in blocks]
            a, b = a[slots], b[slots]
        result = torch.bmm(torch.bmm(b.flatten(0, 1), stacked.flatten(0, 1)), a.flatten(0, 1))
        return dict(zip(blocks, result.view_as(stacked).unbind(), strict=True))

    def factors(self, block: LayerBlock) -> Factors | None:
        """The averages of one layer, or None before its first update."""
        slot = self._slot[block]
        return Factors(self.input[slot], self.grad_output[slot]) if self.updates[slot] else None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By layer name: averages, inverses, and how often they were updated."""
        return {
            block.name: {
                "updates": self.updates[slot],
                "inverted": self.inverted[slot],
                **{name: getattr(self, name)[slot].clone() for name in self._TENSORS},
            }
            for block, slot in self._slot.items()
            if self.updates[slot]
        }

    def check_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse what ``load_state_dict`` can't set.

        Raises:
            ValueError: If a factor's shape isn't the layer's.
        """
        for block in self.blocks:
            if block.name not in state:
                continue
            sizes = block.input_dim + (block.bias is not None), block.grad_output_dim
            for name, size in zip(self._TENSORS, sizes * 2, strict=True):
                shape, wanted = state[block.name][name].shape, (block.groups, size, size)
                if shape != wanted:
                    raise ValueError(
                        f"The state has '{name}' of shape {list(shape)} for layer '{block.name}', "
                        f"which needs {list(wanted)}: it is another model's."
                    )

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Set what ``state_dict`` gave; layers that are missing there start anew.

        Raises:
            ValueError: As ``check_state_dict``; nothing is changed then.
        """
        self.check_state_dict(state)
        mine = {block: state[block.name] for block in self.blocks if block.name in state}
        self.updates = [0] * len(self.blocks)
        self.inverted = [False] * len(self.blocks)
        for block, entry in mine.items():
            if not any(self.updates):
                device = block.weight.device
                new = Factors(entry["input"].to(device), entry["grad_output"].to(device))
                self._allocate(new)
            slot = self._slot[block]
            self.updates[slot], self.inverted[slot] = entry["updates"], entry["inverted"]
            for name in self._TENSORS:
                getattr(self, name)[slot].copy_(entry[name])

    def _allocate(self, like: Factors) -> None:
        self.input, self.grad_output = like.new_zeros(len(self.blocks))
        self.input_inverse = torch.zeros_like(self.input)
        self.grad_output_inverse = torch.zeros_like(self.grad_output)


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


def _or_one(scale: Tensor) -> Tensor:
    """A factor that is zero has no scale of its own."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
