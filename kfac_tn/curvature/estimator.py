"""Curvature that follows a training run: hooks, moving averages, inverses, and when each is due."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn.capture import Capture, Factors, Fisher, Statistics
from kfac_tn.curvature.compute import layout_of
from kfac_tn.curvature.moving import MovingFactors, invert
from kfac_tn.layers import ApproximationChoice, LayerBlock, partition
from kfac_tn.likelihood import Likelihood


class CurvatureEstimator:
    """What ``KFAC`` and ``KFACPreconditioner`` share: the curvature along a training run.

    Args:
        model: The model.
        loss_fn: The loss module that the training loop calls.
        approximation: See ``KFAC``, as for all further arguments.
        fisher: The kind of Fisher.
        mc_samples: Samples for ``fisher="mc"``.
        damping: Added to the curvature.
        relative_damping: Whether in units of each block's mean eigenvalue.
        decay: Of the factors' moving averages.
        factor_interval: Steps between statistics.
        inverse_interval: Steps between inversions.
        seed: Of the Monte-Carlo samples.

    Raises:
        ValueError: For a hyper-parameter out of its range, or a model without trainable parameters.
        TypeError: For a loss whose likelihood isn't known.
    """

    def __init__(
        self,
        model: Module,
        loss_fn: Module | Likelihood,
        *,
        approximation: ApproximationChoice,
        fisher: Fisher,
        mc_samples: int,
        damping: float,
        relative_damping: bool,
        decay: float,
        factor_interval: int,
        inverse_interval: int,
        seed: int,
    ) -> None:
        if not damping > 0:
            raise ValueError(f"damping is {damping}: it must be positive.")
        if not 0 <= decay < 1:
            raise ValueError(f"factor_decay is {decay}: it must be in [0, 1).")
        for name, interval in (
            ("factor_interval", factor_interval),
            ("inverse_interval", inverse_interval),
        ):
            if interval < 1 or interval != int(interval):
                raise ValueError(f"{name} is {interval}: it must be a positive whole number.")
        self.blocks, self.others = partition(model, approximation)
        if not self.blocks and not self.others:
            raise ValueError("The model has no trainable parameter.")
        self.damping, self.relative_damping = damping, relative_damping
        self.factor_interval, self.inverse_interval = factor_interval, inverse_interval
        self.steps = 0
        self._seed = seed
        self._generators: dict[str, torch.Generator] = {}
        self._warned: set[str] = set()
        self.capture = Capture(self.blocks, loss_fn, fisher, mc_samples, generator=self._generator)
        shapes: dict[tuple, list[LayerBlock]] = {}
        for block in self.blocks:
            input_dim = block.input_dim + (block.bias is not None)
            weight = block.weight
            key = (block.groups, block.grad_output_dim, input_dim, weight.dtype, weight.device)
            shapes.setdefault(key, []).append(block)
        self._layouts = {block: layout_of(block) for block in self.blocks}
        self._moving = [MovingFactors(blocks, decay) for blocks in shapes.values()]

    def advance(self) -> None:
        """End a step: average its statistics in, renew inverses that are due, and arm the hooks.

        Raises:
            RuntimeError: If no call of the loss was ever seen.
        """
        if not self.capture.seen_loss:
            raise RuntimeError(
                "The loss was never called, so there is no curvature: call the very loss module "
                "that was given (not a copy, nor its functional form), or call "
                "observe(outputs, targets) between the model and backward()."
            )
        statistics = self.finite(self.capture.take())
        for moving in self._moving:
            moving.update(
                {b: statistics.factors[b] for b in moving.blocks if b in statistics.factors}
            )
        due = self._due(self.inverse_interval)
        wanting = [moving for moving in self._moving if due or moving.lacks_inverse]
        for name in invert(wanting, self.damping, self.relative_damping):
            self.warn(
                f"The factors of layer '{name}' can't be inverted: its last good inverse stays in "
                "use."
            )
        self.steps += 1
        self.capture.armed = self._due(self.factor_interval)

    def finite(self, statistics: Statistics) -> Statistics:
        """The statistics, or none at all if any of them isn't finite."""
        tensors = [t for f in statistics.factors.values() for t in (f.input, f.grad_output)]
        if tensors and not all_finite(tensors):
            self.warn("The curvature of a batch isn't finite (NaN or inf); it was left out.")
            return Statistics({}, {})
        return statistics

    def precondition(self, gradients: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """Multiply with the damped inverse curvature: B^-1 G A^-1, by parameter.

        Only for layers all of whose trainable parameters have a gradient. Layers that have no
        curvature yet are missing in the result, and the user is told once.
        """
        matrices: dict[LayerBlock, Tensor] = {}
        for block, layout in self._layouts.items():
            if all(parameter in gradients for parameter in block.parameters.values()):
                named = {name: gradients[p] for name, p in block.parameters.items()}
                matrices[block] = layout.to_matrix(named)
        results: dict[LayerBlock, Tensor] = {}
        for moving in self._moving:
            results.update(
                moving.precondition({b: matrices[b] for b in moving.blocks if b in matrices})
            )
        for block in matrices.keys() - results.keys():
            self.warn(
                f"Layer '{block.name}' has a gradient, but no call of it was seen by the loss: it "
                "is trained without curvature. Was its weight used without calling the module, or "
                "is there another loss?"
            )
        return {
            block.parameters[name]: value.to(block.weight.dtype)
            for block, matrix in results.items()
            for name, value in self._layouts[block].from_matrix(matrix).items()
        }

    def factors(self) -> dict[str, Factors]:
        """The averaged factors of every layer that has some, by layer name."""
        found = {b.name: moving.factors(b) for moving in self._moving for b in moving.blocks}
        return {name: factors for name, factors in found.items() if factors is not None}

    def warn(self, message: str) -> None:
        """Warn, once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers: factors, inverses, step, and the state of the randomness."""
        factors: dict[str, Any] = {}
        for moving in self._moving:
            factors.update(moving.state_dict())
        generators = {device: g.get_state() for device, g in self._generators.items()}
        return {"steps": self.steps, "factors": factors, "generators": generators}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that isn't of this model.

        Raises:
            ValueError: If the state is of a model with other layers.
        """
        unknown = state["factors"].keys() - {block.name for block in self.blocks}
        if unknown:
            raise ValueError(f"The state has factors of layers {sorted(unknown)}, unknown here.")
        for moving in self._moving:
            moving.check_state_dict(state["factors"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken.

        Raises:
            ValueError: If the state is of a model with other layers; nothing is changed then.
        """
        self.check_state_dict(state)
        for moving in self._moving:
            moving.load_state_dict(state["factors"])
        self.steps = state["steps"]
        for device, generator_state in state["generators"].items():
            self._generator(torch.device(device)).set_state(generator_state.cpu())
        self.capture.discard()
        self.capture.armed = self._due(self.factor_interval)

    def _due(self, interval: int) -> bool:
        early, end = early_steps(interval)
        return self.steps in early or (self.steps >= end and self.steps % interval == 0)

    def _generator(self, device: torch.device) -> torch.Generator:
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[key]


@lru_cache
def early_steps(interval: int) -> tuple[frozenset[int], int]:
    """Steps at which something is due before its interval is reached, and where that phase ends.

    Early curvature changes fast and there is nothing to average yet; so the gap is a quarter of the
    steps taken until then, one at first.

    Example:
        >>> early, end = early_steps(3)
        >>> sorted(early), end
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12], 12)
    """
    steps, step = {0}, 0
    while (gap := max(1, step // 4)) < interval:
        step += gap
        steps.add(step)
    return frozenset(steps), step


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no element is NaN or inf: as a rule, one number crosses to the host."""
    norms = torch._foreach_norm(tensors)
    if bool(torch.stack([norm.to(norms[0]) for norm in norms]).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)  # a square may overflow
