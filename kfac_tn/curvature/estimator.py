"""Curvature that follows a training run: hooks, moving averages, inverses, and when each is due."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn.capture import Capture
from kfac_tn.curvature.averages import Moving
from kfac_tn.curvature.checks import (
    all_finite,
    refuse_other_shapes,
    sum_of_norms,
    trainable,
)
from kfac_tn.curvature.directions import Room, precondition
from kfac_tn.curvature.division import Division
from kfac_tn.curvature.exact import EigenFactors
from kfac_tn.curvature.intervals import intervals, is_due, model_work
from kfac_tn.curvature.options import CurvatureOptions
from kfac_tn.curvature.states import description, refuse_other
from kfac_tn.distributed import Processes, average
from kfac_tn.hooks import timed
from kfac_tn.layers import LayerBlock
from kfac_tn.likelihood import Likelihood
from kfac_tn.moments import Basis
from kfac_tn.statistics import Statistics


class CurvatureEstimator(Division):
    """What ``KFAC`` and ``KFACPreconditioner`` share: the curvature along a training run.

    It follows its model: parameters unfrozen later get blocks (``grow``), layers that are pruned or
    reparametrized lose theirs, and a change of dtype or device takes the curvature along
    (``cast``). Layers frozen later keep what they have. Steps without statistics, which are to cost
    next to nothing, don't look for changed layers.

    Args:
        model: The model.
        loss_fn: The loss module that the training loop calls.
        options: All else that has to be said.
        damping: What is added to a layer's curvature, asked for whenever inverses are renewed.
            Layers are inverted together if their ``group`` is the same.
        group: A number for each layer; layers with one number have the same damping.
        covered: Names of parameters that have a place even if they are frozen.

    Raises:
        ValueError: For a model without trainable parameters.
        TypeError: For a loss whose likelihood isn't known.
    """

    def __init__(
        self,
        model: Module,
        loss_fn: Module | Likelihood,
        options: CurvatureOptions,
        damping: Callable[[LayerBlock], float],
        group: Callable[[LayerBlock], int] = lambda block: 0,
        covered: Collection[str] = (),
    ) -> None:
        self.processes = Processes(options.process_group)
        self.steps = 0
        self.seed = int(options.seed)
        self._walked = -1  # the step in which the model was last searched for what is new
        self._renewed: dict[str, tuple[int, int]] = {}  # steps of statistics, inverses
        self.seconds: dict[str, float] = {}
        self._automatic = 1, 1  # intervals, until the first statistics say more
        self._loss_fn = loss_fn
        self._generators: dict[torch.device, torch.Generator] = {}  # of this step
        self._warned: set[str] = set()
        self.closed = False
        super().__init__(model, options, damping, group, covered)
        if not self.blocks and not self.others:
            raise ValueError("The model has no trainable parameter.")
        self.capture = self._watch()

    def _watch(self) -> Capture:
        fisher, samples = self.options.fisher, self.options.mc_samples
        capture = Capture(
            self.blocks,
            self._loss_fn,
            fisher,
            samples,
            self._measured,
            self._generator,
            self._basis,
        )
        capture.seconds = self.seconds
        return capture

    def _basis(self, block: LayerBlock) -> Basis | None:
        return self._moving_of[block].basis(block)

    def uncovered(self, anew: bool = False) -> list[Parameter]:
        """Parameters of the model that have no place here, because they were frozen.

        The model is searched in steps with statistics (it takes its time), or ``anew`` now.
        """
        if anew or (self.capture.armed and self._walked != self.steps):
            self._uncovered = [p for p in self._model.parameters() if p not in self._covered]
            self._walked = self.steps
        return self._uncovered

    def outdated(self) -> bool:
        """Whether layers were changed such that their blocks aren't theirs; for the statistics."""
        if not self.capture.armed:
            return False
        held = all(block.holds() for block in self.blocks)
        return not held or not all(other.holds(self._model) for other in self.others)

    def check_shapes(self) -> None:
        """Refuse parameters whose data was replaced by some of another shape.

        Raises:
            RuntimeError: Naming one, for it has averages of the shape that it had.
        """
        try:
            refuse_other_shapes(self._model, self._shapes)
        except RuntimeError:
            self.discard()  # such statistics can't be added to others
            raise

    def discard(self) -> None:
        """Forget what was seen since the last step, the samples that were drawn included."""
        self.capture.discard()
        self._generators.clear()

    def close(self) -> None:
        """Remove the hooks; the curvature stays as it is."""
        self.closed = True
        self.capture.close()

    # Following the model -----------------------------------------------------------------------

    def grow(self) -> bool:
        """Divide the model anew if there are new parameters or changed layers; true if it was.

        What is known of the other layers stays. A layer whose bias was unfrozen starts anew: its
        input factor has a further row. If the model as it is is refused, all stays as it was.
        """
        new = any(p.requires_grad for p in self.uncovered())
        if self.closed or not (new or self.outdated()):
            return False
        self.check_shapes()
        self._divide_anew(self._covered)  # layers frozen in the meantime may return
        return True

    def cover(self, names: Collection[str]) -> None:
        """Make room for parameters of these names, also if they are frozen; nothing is lost."""
        named = [p for name, p in self._model.named_parameters() if name in names]
        if not self._covered.issuperset(named):
            self._divide_anew(self._covered.union(named))

    def _divide_anew(self, parameters: Collection[Parameter]) -> None:
        """Divide the model as if these were trainable; layers keep what is known of them."""
        state, before = self._factors_state(), dict(vars(self))
        try:
            with trainable(parameters):
                self._divide()
        except BaseException:
            vars(self).update(before)  # dividing makes everything new, and changes nothing
            raise
        self._load_factors(state)
        seen_loss = self.capture.seen_loss
        self.capture.close()
        self.capture = self._watch()
        self.capture.seen_loss = seen_loss

    # A step ------------------------------------------------------------------------------------

    @timed("averages and inverses")
    def advance(self) -> None:
        """End a step: average its statistics in, renew inverses that are due, and arm the hooks.

        Raises:
            RuntimeError: If no call of the loss was ever seen.
        """
        if not self.capture.seen_loss:
            raise RuntimeError(
                "The loss was never called, so there is no curvature: call the very loss module "
                "that was given (not a copy, nor its functional form, nor within a transform of "
                "torch.func), or call observe(outputs, targets) between the model and backward()."
            )
        statistics = self._average() if self.capture.armed else Statistics({}, {}, {})
        due, relative = is_due(self.steps, self.intervals[1]), self.options.relative_damping
        wanting: dict[tuple[type[Moving], float], list[Moving]] = {}
        for moving in self._moving:
            if due or moving.lacks_inverse:
                key = type(moving), self._damping(moving.blocks[0])
                wanting.setdefault(key, []).append(moving)
        fresh = {block.name for block in (*statistics.factors, *statistics.moments)}
        self._note(fresh, wanting.values())
        for (kind, damping), movings in wanting.items():
            if relative:
                self._warn_of_rounding(damping, movings[0].blocks[0])
            for name in kind.renew(movings, damping, relative):
                self.warn(
                    f"The factors of layer '{name}' can't be inverted: its last good inverse stays "
                    "in use."
                )
        if statistics.moments:
            for moving in self._moving:
                moving.dampen(self._damping(moving.blocks[0]), relative)
        self.steps += 1
        self._generators.clear()
        self.capture.armed = is_due(self.steps, self.intervals[0])

    def _warn_of_rounding(self, damping: float, block: LayerBlock) -> None:
        """Gradients are rounded, and where there is no curvature all is divided by the damping."""
        dtype = torch.promote_types(block.weight.dtype, torch.float32)
        if damping < torch.finfo(dtype).eps:
            self.warn(
                f"A damping of {damping:.2g} (of the mean eigenvalue) is below the precision of "
                f"{dtype}: directions of layer '{block.name}' and others may be rounding errors. "
                f"Choose {torch.finfo(dtype).eps:.1g} at least, or train in float64."
            )

    def _average(self) -> Statistics:
        """Average the statistics of a step in, and return them."""
        self._plan()
        others = {parameter: block.name for parameter, block in self._own.items()}
        statistics = average(self.capture.take(), self.processes, self.blocks, others)
        statistics = self.finite(statistics)
        for parameter, diagonal in statistics.diagonals.items():
            block = self._own[parameter]
            named = {block.name: diagonal}
            statistics.moments[block] = self._layouts[block][0].to_matrix(named)
        for block in statistics.bypassed:  # whose gradients aren't those of its calls alone
            self._moving_of[block].forget(block)
            self._renewed.pop(block.name, None)
        for moving in self._moving:
            moving.update(
                {b: statistics.factors[b] for b in moving.blocks if b in statistics.factors}
            )
            for b in moving.blocks:
                if b in statistics.factors:
                    moving.count(b, statistics.counts[b], statistics.columns)
            moving.update_moments(
                {b: statistics.moments[b] for b in moving.blocks if b in statistics.moments}
            )
        return statistics

    def _note(self, fresh: set[str], wanting: Iterable[list[Moving]]) -> None:
        """Remember when statistics and inverses of each layer were renewed."""
        inverted = {block.name for movings in wanting for m in movings for block in m.blocks}
        for name in fresh | (inverted & self._renewed.keys()):
            statistics, inverses = self._renewed.get(name, (0, 0))
            self._renewed[name] = (
                self.steps if name in fresh else statistics,
                self.steps if name in inverted else inverses,
            )

    def is_sound(self, gradients: list[Tensor], advice: str) -> bool:
        """Whether there is a step to make of these; if not, a warning tells why.

        Zeros alone are gradients of a batch without examples, or all of whose targets are ignored
        (or of a perfect fit): momentum isn't to go on as if they said something.
        """
        if not gradients:
            return True
        norm = sum_of_norms(gradients)
        if not math.isfinite(norm):
            self.warn(f"A gradient isn't finite (NaN or inf){advice}")
        elif norm == 0 and not any(bool(gradient.any()) for gradient in gradients):
            self.warn(
                "All gradients are zero (is the batch empty, or are all its targets ignored?)"
                f"{advice}"
            )
        else:
            return True
        return False

    def finite(self, statistics: Statistics) -> Statistics:
        """The statistics, or none at all if any of them isn't finite."""
        tensors = [d for factors in statistics.factors.values() for d in factors.witnesses()]
        tensors += [*statistics.moments.values(), *statistics.diagonals.values()]
        if tensors and not all_finite(tensors):
            self.warn("The curvature of a batch isn't finite (NaN or inf); it was left out.")
            return Statistics({}, {}, {}, bypassed=statistics.bypassed)
        return statistics

    def room(self, parameters: Sequence[Parameter]) -> Room:
        """Where to put gradients of these for ``precondition``; the same memory each time."""
        key = [*map(id, parameters), *(all(moving.inverted) for moving in self._moving)]
        if self._room is None or key != self._room[0]:
            self._room = key, Room(self._moving, self._layouts, parameters)
        return self._room[1].copy()

    @timed("products")
    def precondition(self, gradients: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """Multiply with the damped inverse curvature: B^-1 G A^-1, by parameter, in its precision.

        Only for layers all of whose trainable parameters have a gradient. Layers that have no
        curvature yet are missing in the result, and the user is told once.
        """
        return precondition(self._moving, self._layouts, gradients, self.warn)

    def ages(self, block: LayerBlock) -> tuple[int, int]:
        """Steps taken since the last statistics of a layer, and since its last inverses."""
        statistics, inverses = self._renewed.get(block.name, (0, 0))
        return self.steps - 1 - statistics, self.steps - 1 - inverses

    def warn(self, message: str) -> None:
        """Warn, once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and words: factors, inverses, step, and what they are of."""
        return {
            "steps": self.steps,
            "seed": self.seed,
            "armed": self.capture.armed,
            "intervals": self._automatic,
            "renewed": dict(self._renewed),
            "factors": self._factors_state(),
            "covered": [n for n, p in self._model.named_parameters() if p in self._covered],
            **description(self.curved, self.options.fisher),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that isn't of this model, or of other curvature than this.

        What ``fisher="mc"`` samples is what ``"type-2"`` computes: each continues from the other.

        Raises:
            ValueError: If the state is of a model with other layers, or its averages are of another
                matrix.
        """
        refuse_other(state, self.curved, self.options.fisher)
        for moving in self._moving:
            moving.check_state_dict(state["factors"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken.

        Raises:
            ValueError: If the state is of a model with other layers; nothing is changed then.
        """
        self.check_state_dict(state)
        self.adopt(state)

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, of a copy: its model may have changed since.

        As in ``grow``, what isn't known any more of a layer starts anew.
        """
        self._load_factors(state["factors"])
        self._room = None
        self.steps = state["steps"]
        self.seed = state.get("seed", self.seed)
        self.discard()
        self.capture.armed = state["armed"]
        self._automatic = tuple(state["intervals"])
        self._renewed = {name: tuple(steps) for name, steps in state["renewed"].items()}

    @property
    def intervals(self) -> tuple[int, int]:
        """Steps between statistics and between inversions, as they are now."""
        given = self.options.factor_interval, self.options.inverse_interval
        statistics, inverses = (
            automatic if interval == "auto" else interval
            for interval, automatic in zip(given, self._automatic, strict=True)
        )
        return statistics, inverses

    def _plan(self) -> None:
        """Set automatic intervals from the sizes of the step that is ending."""
        if "auto" not in (self.options.factor_interval, self.options.inverse_interval):
            return
        sizes = {block.name: size for block, size in self.capture.sizes.items()}
        seen = self.processes.gather((sizes, self.capture.passes))
        exact = self._kinds["kfac"] is EigenFactors
        work = model_work(self.blocks, seen, exact)
        if work.model:
            self._automatic = intervals(work, self.options.overhead)

    def _generator(self, device: torch.device) -> torch.Generator:
        """Samples of a step's own, which nothing but its number decides: no state to save."""
        if device not in self._generators:
            own = self.seed * 2654435761 + self.processes.rank * 1000003 + self.steps
            self._generators[device] = torch.Generator(device).manual_seed(own % 2**32)
        return self._generators[device]
