"""The batch of a step, recorded by hooks: what model and loss were called with, and how."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle

from kfac_tn.curvature.batches import copied, tensors_of
from kfac_tn.curvature.checks import ModelState
from kfac_tn.graph import Rounds, concerns, depends
from kfac_tn.hooks import WeakHook, recorded, remove
from kfac_tn.optim.randomness import RandomState


@dataclass
class Batch:
    """One call of the model, and of the loss on what it returned."""

    args: tuple
    kwargs: dict
    autocast: tuple[bool, torch.dtype]
    random_state: RandomState
    model_state: ModelState
    parameters: list[Parameter]  # that the call was made with
    output: Tensor | None = None  # until a loss is seen
    known: weakref.ref[Tensor] | None = None  # then, for further losses
    version: int | None = None  # of the output
    shape: torch.Size | None = None  # in which the loss got it
    loss_args: tuple = ()
    loss_kwargs: Mapping[str, Any] | None = None
    loss: Tensor | None = None
    weight: Tensor | None = None
    chained: bool = False  # whether inputs are the work of the model itself, in an earlier call
    passed_over: bool = False  # whether gradients were reset while it waited for its backward pass

    def restore(self) -> None:
        """Have random numbers, buffers, attributes and modes as they were before the call."""
        self.random_state.restore()
        self.model_state.restore()

    def holds(self, outputs: Tensor) -> bool:
        """Whether a tensor is what the model returned, as it was then, or a view of all of it."""
        base = self.known() if self.known is not None else self.output
        return base is not None and _is_view(outputs, base) and _version(base) == self.version


class Recorder:
    """Records what model and loss are called with, in steps in which it is armed.

    Inputs and targets are copied. Several losses of one output are several batches.

    Args:
        model: The model.
        loss_fn: The loss module, called on what the model returns, or on a view of another shape.
        required: Whether a step without a batch is an error.
    """

    def __init__(self, model: Module, loss_fn: Module, required: bool) -> None:
        self.armed = True
        self.required = required
        self._model, self._loss_fn = model, loss_fn
        self._batches: list[Batch] = []
        self._rounds = Rounds()
        self._handles: list[RemovableHandle] = [
            # before the user's own, which act again when the model is called again
            model.register_forward_pre_hook(
                cast(Any, WeakHook(self, "_before")), prepend=True, with_kwargs=True
            ),
            model.register_forward_hook(cast(Any, WeakHook(self, "_after"))),
            loss_fn.register_forward_hook(
                cast(Any, WeakHook(self, "_after_loss")), with_kwargs=True
            ),
        ]
        weakref.finalize(self, remove, self._handles)

    def close(self) -> None:
        """Remove the hooks, and forget."""
        remove(self._handles)
        self.discard()

    def discard(self) -> None:
        """Forget what was seen since the last step, even if a loss of it is kept."""
        self._keep_only([])

    def discard_gradients(self) -> None:
        """Forget batches whose gradients are reset; others may be about to have theirs."""
        waiting = [b for b in self._batches if b.weight is None and not b.passed_over]
        for batch in waiting:
            batch.passed_over = True
        self._keep_only(waiting)

    def _keep_only(self, batches: list[Batch]) -> None:
        for batch in self._batches:
            if not any(batch is kept for kept in batches):
                batch.args, batch.kwargs, batch.output, batch.known = (), {}, None, None
                batch.loss_args, batch.loss_kwargs, batch.loss = (), None, None
        self._batches = batches

    def check(self) -> bool:
        """Whether there is a batch.

        Raises:
            RuntimeError: If the loss was computed from something else than the output of one call
                of the model, and a batch is required.
        """
        seen = [batch for batch in self._batches if batch.weight is not None]
        own = list(self._model.parameters())
        strange = any(batch.chained or not _same(batch.parameters, own) for batch in seen)
        self._keep_only([] if strange else seen)
        if self.required and not self._batches:
            raise RuntimeError(without_batch("the rule that needs it can't go on"))
        return bool(self._batches)

    # Hooks -------------------------------------------------------------------------------------

    def _before(self, module: Module, args: tuple, kwargs: dict) -> None:
        if module is not self._model or not self.armed or not recorded(self):
            return
        if not any(p.requires_grad for p in module.parameters()):  # it is another model's loss
            return
        self._begin(args, kwargs)

    @torch._disable_dynamo
    def _begin(self, args: tuple, kwargs: dict) -> None:
        device = next(self._model.parameters()).device
        kind = device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        # The model may change its inputs in place, and so may whoever fills in the next batch.
        parameters = list(self._model.parameters())
        own = set(parameters)
        chained = any(depends(x, own) for x in tensors_of((args, kwargs)) if x.grad_fn is not None)
        args, kwargs = copied((args, kwargs))
        states = RandomState(device), ModelState(self._model)
        self._batches.append(Batch(args, kwargs, autocast, *states, parameters, chained=chained))

    def _after(self, module: Module, args: tuple, output: Any) -> None:
        if module is not self._model or not self.armed or not recorded(self):
            return
        if self._batches and isinstance(output, Tensor):
            self._batches[-1].output, self._batches[-1].version = output, _version(output)

    def _after_loss(self, module: Module, args: tuple, kwargs: dict, loss: Any) -> None:
        if not self.armed or not recorded(self) or not isinstance(loss, Tensor):
            return
        if not loss.requires_grad:  # computed for its value
            return
        values = dict(kwargs)
        outputs = args[0] if args else values.pop("input")
        batch = next((batch for batch in self._batches if batch.holds(outputs)), None)
        if batch is None:
            return
        if batch.output is None:  # it has a loss already
            batch = replace(batch, weight=None)
            self._batches.append(batch)
        else:
            batch.known, batch.output = weakref.ref(batch.output), None
        batch.shape = outputs.shape
        batch.loss_args, batch.loss_kwargs = copied((args[1:], values))
        batch.loss = loss.detach()
        weigh = WeakHook(self, "_weigh")
        loss.register_hook(lambda gradient: weigh(batch, outputs, gradient))

    def _weigh(self, batch: Batch, outputs: Tensor, gradient: Tensor) -> None:
        """On a loss: the factor that it has in the objective, added up over backward calls."""
        parameters = list(self._model.parameters())
        if not concerns(outputs, parameters):
            return
        if self._rounds.begins(parameters):
            self._keep_only([other for other in self._batches if other.weight is None])
        accurate = torch.promote_types(gradient.dtype, torch.float32)
        seen = gradient.detach().to(accurate).sum()
        batch.weight = seen if batch.weight is None else batch.weight + seen


def _is_view(tensor: Tensor, base: Tensor) -> bool:
    """Whether a tensor is another, or has its elements in the same order in another shape."""
    if tensor is base:
        return True
    whole = tensor.is_contiguous() and base.is_contiguous() and tensor.numel() == base.numel()
    return whole and tensor.data_ptr() == base.data_ptr()


def _version(tensor: Tensor) -> int | None:
    """How often it was changed in place; None where autograd doesn't count."""
    return None if tensor.is_inference() else tensor._version


def _same(ones: list[Parameter], others: list[Parameter]) -> bool:
    """Whether these are the very same, in the same order."""
    return len(ones) == len(others) and all(a is b for a, b in zip(ones, others, strict=True))


def without_batch(consequence: str) -> str:
    """What the user is told where a rule wants the batch of a step and there is none."""
    return (
        "The batch of a step can't be recorded: the loss module wasn't called on the model's "
        "output itself (or a view of it with another shape) as the model returned it (it may have "
        "been changed in place), that is not the only one (several outputs), its reduction is "
        "'none', the model was called with other parameters than its own, or on what it had "
        f"returned before, so {consequence}. Call loss_fn(model(x), y) (of one model that does "
        "all of that), or choose rules that need no batch: step_rule='graft' and a fixed damping."
    )
