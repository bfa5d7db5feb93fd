"""The batch of a step, kept to compute the loss or its curvature once more."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from kfac_tn.capture import Capture
from kfac_tn.curvature.batches import copied, tensors_of
from kfac_tn.curvature.checks import restored
from kfac_tn.distributed import Processes
from kfac_tn.graph import concerns, depends
from kfac_tn.hooks import WeakHook, alone, recorded, remove, uncompiled
from kfac_tn.likelihood import likelihood_of
from kfac_tn.optim.randomness import RandomState


@dataclass
class _Batch:
    """One call of the model, and of the loss on what it returned."""

    args: tuple
    kwargs: dict
    autocast: tuple[bool, torch.dtype]
    random_state: RandomState
    output: Tensor | None = None  # until the loss is seen
    shape: torch.Size | None = None  # in which the loss got it
    loss_args: tuple = ()
    loss_kwargs: Mapping[str, Any] | None = None
    loss: Tensor | None = None
    weight: Tensor | None = None
    chained: bool = False  # whether inputs are the work of the model itself, in an earlier call
    passed_over: bool = False  # whether gradients were reset while it waited for its backward pass


class Replay:
    """Records what model and loss are called with, in steps in which it is armed.

    The objective is taken to be the loss (of several calls the mean or sum, as the loss reduces,
    weighted as in the user's objective). A factor of all of it cancels, be it a gradient scaler's.
    Random numbers, buffers and autocast are as in the recorded call, and afterwards as before.
    Inputs and targets are copied.

    Args:
        model: The model.
        loss_fn: The loss module, called on what the model returns, or on a view of another shape.
        required: Whether a step without a batch is an error.
        processes: Over which the objective is a mean.

    Raises:
        ValueError: For a loss without a module, or with ``reduction="none"``.
    """

    def __init__(
        self,
        model: Module,
        loss_fn: object,
        required: bool = True,
        processes: Processes | None = None,
    ) -> None:
        if not isinstance(loss_fn, Module) or getattr(loss_fn, "reduction", "none") == "none":
            raise ValueError(
                "This rule computes the loss once more, so it needs a loss module with reduction "
                "'mean' or 'sum'."
            )
        self.armed = True
        self.required = required
        self._processes = processes or Processes(None)
        self.forward_mode, self.inner_graph = True, False
        self._model, self._loss_fn = model, loss_fn
        self._batches: list[_Batch] = []
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

    @classmethod
    def where_possible(
        cls, model: Module, loss_fn: object, required: bool, processes: Processes
    ) -> Replay | None:
        """One, or none for a loss of which there can be none, unless that is an error."""
        try:
            return cls(model, loss_fn, required, processes)
        except ValueError:
            if required:
                raise
            return None

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

    def _keep_only(self, batches: list[_Batch]) -> None:
        for batch in self._batches:
            if not any(batch is kept for kept in batches):
                batch.args, batch.kwargs, batch.output = (), {}, None
                batch.loss_args, batch.loss_kwargs, batch.loss = (), None, None
        self._batches = batches

    def check(self) -> bool:
        """Whether there is a batch.

        Raises:
            RuntimeError: If the loss was computed from something else than the output of one call
                of the model, and a batch is required.
        """
        seen = [batch for batch in self._batches if batch.weight is not None]
        self._keep_only([] if any(batch.chained for batch in seen) else seen)
        if self.required and not self._batches:
            raise RuntimeError(without_batch("the rule that needs it can't go on"))
        return bool(self._batches)

    def change(self, capture: Capture, closure: Callable[[], float] | None = None) -> float:
        """How much the objective has changed since the batch was recorded.

        By the user's closure if there is one: it knows the whole objective.
        """
        before = self._total([cast(Tensor, batch.loss) for batch in self._batches])
        if closure is None:
            return float(self.loss(capture) - before)
        with torch.enable_grad(), self._undisturbed(capture), self._as_recorded(self._batches[0]):
            after = self._processes.mean(torch.as_tensor(closure()).detach().to(before))
            return float(after - before)

    def loss(self, capture: Capture) -> Tensor:
        """The objective at the parameters as they are now."""
        losses = []
        with torch.no_grad(), self._undisturbed(capture):
            for batch in self._batches:
                with self._as_recorded(batch):
                    losses.append(self._loss_of(batch, self._outputs(batch)))
        return self._total(losses)

    def gram(self, vectors: Sequence[Mapping[Parameter, Tensor]], capture: Capture) -> Tensor:
        """``v_i^T G v_j`` with the exact GGN of the objective, ``[V, V]``.

        Needs products with the Jacobian alone (Martens & Grosse 2015, Appendix C), by forward mode;
        by two backward passes for models with an operation that lacks it.
        """
        grams = []
        with self._undisturbed(capture):
            for batch in self._batches:
                # of attention's kernels, only the plain one can be differentiated twice
                with self._as_recorded(batch), sdpa_kernel(SDPBackend.MATH):
                    outputs, tangents = self._push_forward(batch, vectors)
                    grams.append(self._loss_gram(batch, outputs, tangents))
        return self._total(grams)

    def form(self, vector: Mapping[Parameter, Tensor], factors: Tensor, capture: Capture) -> Tensor:
        """``v^T G v`` with the GGN of the objective, by central differences of the outputs.

        Two forward passes, which every model has; as accurate as two thirds of the digits are. The
        parameters are moved by that fraction of their norm, and put back.

        Args:
            vector: v, but for a positive factor of each entry.
            factors: These, ``[entries]``.
            capture: Whose hooks are to notice nothing.
        """
        parameters, directions = [p.detach() for p in vector], list(vector.values())
        start = [p.clone() for p in parameters]
        enabled, dtype = self._batches[0].autocast
        coarse = torch.finfo(dtype).eps if enabled else 0.0
        fraction = max(coarse, *(torch.finfo(p.dtype).eps for p in parameters)) ** (1 / 3)
        sizes = [torch.stack(torch._foreach_norm(each)) for each in (start, directions)]
        step = fraction * sizes[0].float().norm() / (factors * sizes[1]).float().norm()
        steps = (step * factors).unbind()
        ends: list[list[Tensor]] = []
        with torch.no_grad(), self._undisturbed(capture):
            try:
                for sign in (1, -1):
                    for p, before, v, t in zip(parameters, start, directions, steps, strict=True):
                        torch.addcmul(before, v, t, value=sign, out=p)
                    ends.append([])
                    for batch in self._batches:
                        with self._as_recorded(batch):
                            ends[-1].append(self._outputs(batch).clone())
            finally:
                torch._foreach_copy_(parameters, start)
            forms = []
            for batch, high, low in zip(self._batches, *ends, strict=True):
                with self._as_recorded(batch):
                    tangent = (high - low) / (2 * step).to(high.dtype)
                    forms.append(self._loss_gram(batch, (high + low) / 2, [tangent])[0, 0])
        return self._total(forms)

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
        own = set(self._model.parameters())
        chained = any(depends(x, own) for x in tensors_of((args, kwargs)) if x.grad_fn is not None)
        args, kwargs = copied((args, kwargs))
        batch = _Batch(args, kwargs, autocast, RandomState(device), chained=chained)
        self._batches.append(batch)

    def _after(self, module: Module, args: tuple, output: Any) -> None:
        if module is not self._model or not self.armed or not recorded(self):
            return
        if self._batches and isinstance(output, Tensor):
            self._batches[-1].output = output

    def _after_loss(self, module: Module, args: tuple, kwargs: dict, loss: Any) -> None:
        if not self.armed or not recorded(self) or not isinstance(loss, Tensor):
            return
        values = dict(kwargs)
        outputs = args[0] if args else values.pop("input")
        weigh = WeakHook(self, "_weigh")
        for batch in self._batches:
            if batch.output is not None and _is_view(outputs, batch.output):
                batch.output, batch.shape = None, outputs.shape
                batch.loss_args, batch.loss_kwargs = copied((args[1:], values))
                batch.loss = loss.detach()
                if loss.requires_grad:
                    loss.register_hook(
                        lambda gradient, batch=batch: weigh(batch, outputs, gradient)
                    )
                return

    def _weigh(self, batch: _Batch, outputs: Tensor, gradient: Tensor) -> None:
        """On a loss: the factor that it has in the objective, added up over backward calls."""
        if not concerns(outputs, self._model.parameters()):
            return
        accurate = torch.promote_types(gradient.dtype, torch.float32)
        seen = gradient.detach().to(accurate).sum()
        batch.weight = seen if batch.weight is None else batch.weight + seen

    # Tools -------------------------------------------------------------------------------------

    def _outputs(self, batch: _Batch) -> Tensor:
        """What the model returns now; it has a graph within if it differentiates something itself.

        As forces are an energy's gradient in the inputs.
        """
        args, kwargs = copied((batch.args, batch.kwargs))
        model = self._model
        apart = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        try:
            with torch.set_grad_enabled(self.inner_graph), apart:
                return model(*args, **kwargs).reshape(batch.shape).detach()
        except RuntimeError:
            if self.inner_graph:
                raise
        self.inner_graph = True
        batch.random_state.restore()
        return self._outputs(batch)

    @torch.enable_grad()
    def _loss_gram(self, batch: _Batch, outputs: Tensor, tangents: Sequence[Tensor]) -> Tensor:
        """``t_i^T H t_j`` with the Hessian of the loss in the outputs, ``[T, T]``."""
        outputs = outputs.detach().requires_grad_()
        normalized = getattr(likelihood_of(self._loss_fn), "normalized", lambda outputs: outputs)
        loss = self._loss_of(batch, normalized(outputs))
        (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)
        rows = []
        for tangent in tangents:
            (row,) = torch.autograd.grad(gradient, outputs, tangent, retain_graph=True)
            rows.append(torch.stack([(row * other).sum() for other in tangents]))
        return torch.stack(rows)

    def _loss_of(self, batch: _Batch, outputs: Tensor) -> Tensor:
        return self._loss_fn(outputs, *batch.loss_args, **(batch.loss_kwargs or {}))

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        weights = torch.stack([cast(Tensor, batch.weight) for batch in self._batches])
        whole = weights.max() if self._loss_fn.reduction == "sum" else weights.sum()
        total = sum((w / whole * v for w, v in zip(weights, values, strict=True)), torch.zeros(()))
        return self._processes.mean(cast(Tensor, total))

    def _push_forward(
        self, batch: _Batch, vectors: Sequence[Mapping[Parameter, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        model = getattr(self._model, "_orig_mod", self._model)  # what torch.compile wraps
        if isinstance(model, DistributedDataParallel):  # whose passes would be synchronized
            model = model.module
        names = {p: name for name, p in model.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def call(given: tuple[tuple, dict], parameters: dict[str, Tensor]) -> Tensor:
            batch.random_state.restore()
            everything = {**{n: b.clone() for n, b in buffers.items()}, **parameters}
            outputs = torch.func.functional_call(model, everything, *given)
            return outputs.reshape(batch.shape)

        def on_copies() -> Callable[[dict[str, Tensor]], Tensor]:
            return partial(call, copied((batch.args, batch.kwargs)))

        at = {names[p]: p.detach() for p in vectors[0]}
        named = [{names[p]: v.to(p.dtype) for p, v in vector.items()} for vector in vectors]
        if self.forward_mode:
            try:
                with torch.no_grad():
                    pushed = [torch.func.jvp(on_copies(), (at,), (t,))[:2] for t in named]
                return pushed[0][0], [tangent for _, tangent in pushed]
            except (NotImplementedError, RuntimeError):
                self.forward_mode = False
        with torch.enable_grad():
            primals = {name: value.clone().requires_grad_() for name, value in at.items()}
            outputs = on_copies()(primals)
            dummy = torch.zeros_like(outputs, requires_grad=True)
            inputs = list(primals.values())
            pulled = torch.autograd.grad(
                outputs, inputs, dummy, create_graph=True, materialize_grads=True
            )
            tangents = [
                torch.autograd.grad(
                    pulled, dummy, [tangent[name] for name in primals], retain_graph=True
                )[0]
                for tangent in named
            ]
        return outputs.detach(), tangents

    @contextmanager
    def _undisturbed(self, capture: Capture) -> Iterator[None]:
        """Nobody else notices: hooks off, modules and randomness as before, nothing compiled."""
        armed, self.armed = self.armed, False
        capture_armed, capture.armed = capture.armed, False
        random_state = RandomState(next(self._model.parameters()).device)
        # Attention has another way without gradients, in eval mode, that lacks forward mode.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        with restored(self._model), uncompiled(), alone(None):
            try:
                yield
            finally:
                self.armed, capture.armed = armed, capture_armed
                torch.backends.mha.set_fastpath_enabled(fast)
                random_state.restore()

    @contextmanager
    def _as_recorded(self, batch: _Batch) -> Iterator[None]:
        batch.random_state.restore()
        enabled, dtype = batch.autocast
        kind = next(self._model.parameters()).device.type
        with torch.autocast(kind, dtype, enabled=enabled):
            yield


def _is_view(tensor: Tensor, base: Tensor) -> bool:
    """Whether a tensor is another, or has its elements in the same order in another shape."""
    if tensor is base:
        return True
    whole = tensor.is_contiguous() and base.is_contiguous() and tensor.numel() == base.numel()
    return whole and tensor.data_ptr() == base.data_ptr()


def without_batch(consequence: str) -> str:
    """What the user is told where a rule wants the batch of a step and there is none."""
    return (
        "The batch of a step can't be recorded: the loss module wasn't called on the model's "
        "output itself (or a view of it with another shape), that is not the only one (several "
        "outputs, or several losses), its reduction is 'none', or the model was called on what it "
        f"had returned before, so {consequence}. Call loss_fn(model(x), y) (of one model that does "
        "all calls), or choose rules that need no batch: step_rule='graft' and a fixed damping."
    )
