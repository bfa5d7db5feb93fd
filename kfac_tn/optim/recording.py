"""The batch of a step, recorded by hooks: what model and loss were called with, and how."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle

from kfac_tn.curvature.batches import copied, tensors_of
from kfac_tn.curvature.checks import ModelState
from kfac_tn.graph import Rounds, concerns, depends
from kfac_tn.hooks import WeakHook, alone, recorded, remove
from kfac_tn.optim.randomness import RandomState
from kfac_tn.optim.selection import Output, Selection, mark, selected


@dataclass
class Batch:
    """One call of the model, and of the loss on what it returned."""

    args: tuple
    kwargs: dict
    autocast: tuple[bool, torch.dtype]
    random_state: RandomState
    model_state: ModelState
    parameters: list[Parameter]  # that the call was made with
    outputs: list[weakref.ref[Output]] = field(default_factory=list)  # what the model returned
    selection: Selection | None = None  # what the loss got of it; None until a loss is seen
    loss_args: tuple = ()
    loss_kwargs: Mapping[str, Any] | None = None
    loss: Tensor | None = None
    weight: Tensor | None = None
    chained: bool = False  # whether inputs are the work of the model itself, in an earlier call
    observed: bool = False  # whether it is the user's word that this is the objective's loss
    passed_over: bool = False  # whether gradients were reset while it waited for its backward pass

    def restore(self) -> None:
        """Have random numbers, buffers, attributes and modes as they were before the call."""
        self.random_state.restore()
        self.model_state.restore()

    def may_have_loss(self) -> bool:
        """Whether there is one, or what the model returned can still be differentiated."""
        return self.weight is not None or any(output() is not None for output in self.outputs)


class Recorder:
    """Records what model and loss are called with, in steps in which it is armed.

    Inputs and targets are copied. Several losses of one output are several batches.

    Args:
        model: The model.
        loss_fn: The loss module, called on what the model returns, or elements of it.
        required: Whether a step without a batch is an error.
    """

    def __init__(self, model: Module, loss_fn: Module, required: bool) -> None:
        self.armed = True
        self.required = required
        self._model, self._loss_fn = model, loss_fn
        self._batches: list[Batch] = []
        self._begun: list[Batch] = []  # calls that go on, the innermost last
        self._key = object()  # marks what is left in graphs
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
        self._begun = []
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
                batch.args, batch.kwargs, batch.outputs, batch.selection = (), {}, [], None
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
        self._begun.append(Batch(args, kwargs, autocast, *states, parameters, chained=chained))

    def _after(self, module: Module, args: tuple, output: Any) -> None:
        if module is not self._model or not self.armed or not recorded(self):
            return
        if self._begun:
            self._end(output)

    @torch._disable_dynamo
    def _end(self, output: Any) -> None:
        batch = self._begun.pop()
        outputs = mark(output, self._key)
        if not outputs:
            return
        # Calls that nobody differentiates, as for validation, aren't to pile up until the step.
        self._keep_only([other for other in self._batches if other.may_have_loss()])
        batch.outputs = [weakref.ref(one) for one in outputs]
        self._batches.append(batch)

    def _after_loss(self, module: Module, args: tuple, kwargs: dict, loss: Any) -> None:
        if not self.armed or not recorded(self) or not isinstance(loss, Tensor):
            return
        if not loss.requires_grad:  # computed for its value
            return
        values = dict(kwargs)
        outputs = args[0] if args else values.pop("input")
        batch = self._batch_of(outputs) if isinstance(outputs, Tensor) else None
        if batch is None:
            return
        batch.loss_args, batch.loss_kwargs = copied((args[1:], values))
        batch.loss = loss.detach()
        weigh = WeakHook(self, "_weigh")
        loss.register_hook(lambda gradient: weigh(batch, outputs, gradient))

    def observe(self, outputs: Tensor, targets: Tensor, weight: float) -> None:
        """Take the user's word that a factor of the loss of these outputs is in the objective."""
        if not self.armed or not torch.is_grad_enabled():
            return
        if self._rounds.begins(list(self._model.parameters())):
            self._keep_only([other for other in self._batches if other.weight is None])
        batch = self._batch_of(outputs)
        if batch is None:
            return
        batch.loss_args, batch.loss_kwargs, batch.observed = (copied(targets),), {}, True
        with torch.no_grad(), alone(None):
            batch.loss = self._loss_fn(outputs.detach(), targets)
        accurate = torch.promote_types(outputs.dtype, torch.float32)
        batch.weight = torch.as_tensor(weight, dtype=accurate, device=outputs.device)

    def _batch_of(self, outputs: Tensor) -> Batch | None:
        """The call whose outputs these are, to have a loss of them; None if there is none."""
        found = selected(outputs, self._key)
        if found is None:
            return None
        output, selection = found
        of = (b for b in self._batches if any(output is one() for one in b.outputs))
        batch = next(of, None)
        if batch is None:
            return None
        if batch.selection is not None:  # it has a loss already
            batch = replace(batch, weight=None, observed=False)
            self._batches.append(batch)
        batch.selection = selection
        return batch

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


def _same(ones: list[Parameter], others: list[Parameter]) -> bool:
    """Whether these are the very same, in the same order."""
    return len(ones) == len(others) and all(a is b for a, b in zip(ones, others, strict=True))


def without_batch(consequence: str) -> str:
    """What the user is told where a rule wants the batch of a step and there is none."""
    return (
        "The batch of a step can't be recorded: the loss module wasn't called on what the model "
        "returned as it returned it (a tensor, or one of a tuple or dict; in any precision, shape "
        "or order; all elements, or some of them, none twice), its reduction is 'none', the model "
        "was called with other parameters than its own, or on what it had returned before, so "
        f"{consequence}. Call loss_fn(model(x), y) (of one model that does all of that), or choose "
        "rules that need no batch: step_rule='graft' and a fixed damping."
    )
