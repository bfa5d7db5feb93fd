"""A model divided into layers that have curvature, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn.curvature.averages import Moving
from kfac_tn.curvature.checks import trainable
from kfac_tn.curvature.compute import layout_of
from kfac_tn.curvature.corrected import MovingDiagonal, MovingEKFAC
from kfac_tn.curvature.directions import Layouts, Room
from kfac_tn.curvature.exact import EigenFactors
from kfac_tn.curvature.moving import KroneckerMoving, MovingFactors
from kfac_tn.curvature.options import NOISE, CurvatureOptions
from kfac_tn.factors import Factors
from kfac_tn.layers import LayerBlock, partition


class Division:
    """The blocks of a model, stacked by shape, with the averages of their curvature.

    Args:
        model: The model.
        options: How its curvature is approximated.
        damping: What is added to a layer's curvature.
        group: A number for each layer; layers with one number have the same damping.
        covered: Names of parameters that have a place even if they are frozen.
    """

    def __init__(
        self,
        model: Module,
        options: CurvatureOptions,
        damping: Callable[[LayerBlock], float],
        group: Callable[[LayerBlock], int],
        covered: Collection[str],
    ) -> None:
        self.options = options
        self._kinds: dict[str, type[Moving]] = {
            "kfac": EigenFactors if options.damping_split == "exact" else MovingFactors,
            "ekfac": MovingEKFAC,
            "diagonal": MovingDiagonal,
        }
        self._model, self._damping, self._group = model, damping, group
        self._shapes: dict[Parameter, torch.Size] = {}
        named = dict(model.named_parameters()) if covered else {}
        with trainable(named[name] for name in covered):
            self._divide()

    def _divide(self) -> None:
        """Find the blocks of the model as it is, and make room for their factors."""
        options = self.options
        kinds = options.approximation, options.curvature, options.max_dim, options.large_factors
        self.blocks, self.others = partition(self._model, *kinds)
        options.check(self.blocks)
        diagonal = options.other_curvature == "diagonal"
        self._measured = [o for o in self.others if diagonal and o.parameter.numel()]
        self._own = {other.parameter: other.block() for other in self._measured}
        self.curved = [*self.blocks, *self._own.values()]  # all that may have curvature
        self.layer_of = {p: i for i, b in enumerate(self.curved) for p in b.parameters.values()}
        self._covered = set(self.layer_of)
        self._covered.update(other.parameter for other in self.others)
        self._layouts: Layouts = {b: (layout_of(b), b.parameters) for b in self.curved}
        self._uncovered = [p for p in self._model.parameters() if p not in self._covered]
        here = [p for p in self._model.parameters() if p in self._covered]
        self._shapes = {p: self._shapes.get(p, p.shape) for p in here}
        self._stack()

    def _stack(self) -> None:
        """Group layers of one shape, whose matrices are multiplied and inverted together."""
        shapes: dict[tuple, list[LayerBlock]] = {}
        for block in self.curved:
            sizes = block.groups, block.grad_output_dim, block.joint_dim, block.bias is not None
            pieces = block.input_pieces, block.grad_output_pieces
            place = block.weight.dtype, block.weight.device
            key = (block.curvature, *sizes, *pieces, *place, self._group(block))
            shapes.setdefault(key, []).append(block)
        self._moving = [
            self._kinds[kind](blocks, self.options.factor_decay)
            for (kind, *_), blocks in shapes.items()
        ]
        for moving in self._moving:
            noise = self.options.noise_damping
            moving.noise = NOISE if noise is None else noise
        self._room: tuple[list[int], Room] | None = None
        self._moving_of = {block: moving for moving in self._moving for block in moving.blocks}
        self._places = {p: (p.dtype, p.device) for p in self._covered}

    def cast(self) -> bool:
        """Take the curvature along when parameters changed dtype or device; true if any did."""
        if all(
            p.dtype == dtype and p.device == device for p, (dtype, device) in self._places.items()
        ):
            return False
        state = self._factors_state()
        for block in self.curved:
            like = block.weight
            dtype = torch.promote_types(like.dtype, torch.float32)
            state[block.name] = {
                key: value.to(like.device, dtype) if isinstance(value, Tensor) else value
                for key, value in state.get(block.name, {}).items()
            }
        self._stack()
        for moving in self._moving:
            moving.load_state_dict({name: entry for name, entry in state.items() if entry})
        return True

    # What is known ---------------------------------------------------------------------------

    def dampings(self) -> dict[Parameter, Tensor]:
        """What is added to the curvature of a layer, not relative: ``[G]``, by parameter."""
        result: dict[Parameter, Tensor] = {}
        for block, _ in self.known():
            result.update(dict.fromkeys(block.parameters.values(), self.damping(block)))
        return result

    def damping(self, block: LayerBlock) -> Tensor:
        """What is added to the curvature of a layer that has some, not relative: ``[G]``."""
        relative = self.options.relative_damping
        return self._moving_of[block].damping(block, self._damping(block), relative)

    def known(self) -> Iterator[tuple[LayerBlock, Moving]]:
        """Every layer that has curvature, and that."""
        for moving in self._moving:
            yield from ((block, moving) for block in moving.blocks if moving.known(block))

    def damped_factors(self) -> Iterator[tuple[LayerBlock, Factors, tuple[Tensor, Tensor]]]:
        """Every layer that has factors, these, and what is added to their diagonals: ``[G]``."""
        for moving in self._moving:
            if not isinstance(moving, KroneckerMoving) or not any(moving.updates):
                continue
            relative = self.options.relative_damping
            a, b = moving.shifts(self._damping(moving.blocks[0]), relative)
            for slot, block in enumerate(moving.blocks):
                factors = moving.factors(block)
                if factors is not None:
                    yield block, factors, (a[slot], b[slot])

    def quadratic_forms(self, vectors: Mapping[Parameter, Tensor]) -> dict[str, Tensor]:
        """``v^T F v`` of every layer that has curvature F and is in ``vectors``: scalars."""
        forms: dict[str, Tensor] = {}
        for block, moving in self.known():
            named = {n: vectors[p] for n, p in block.parameters.items() if p in vectors}
            if len(named) == len(block.parameters):
                matrix = self._layouts[block][0].to_matrix(named)
                product = moving.multiply(block, matrix)
                forms[block.name] = (product * matrix.to(product.dtype)).sum()
        return forms

    def factors(self) -> dict[str, Factors]:
        """The averaged factors of every layer that has some, by layer name."""
        found = {b.name: moving.factors(b) for moving in self._moving for b in moving.blocks}
        return {name: factors for name, factors in found.items() if factors is not None}

    def _factors_state(self) -> dict[str, Any]:
        factors: dict[str, Any] = {}
        for moving in self._moving:
            factors.update(moving.state_dict())
        return factors

    def _load_factors(self, factors: Mapping[str, Mapping[str, Any]]) -> None:
        """Set those that are of a layer as it is now."""
        for moving in self._moving:
            moving.load_state_dict(
                {name: entry for name, entry in factors.items() if moving.fits(name, entry)}
            )
