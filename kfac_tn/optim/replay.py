"""The loss of a recorded batch, or its curvature, computed once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from kfac_tn.capture import Capture
from kfac_tn.curvature.batches import copied
from kfac_tn.curvature.checks import restored
from kfac_tn.distributed import Processes
from kfac_tn.hooks import alone, uncompiled
from kfac_tn.likelihood import likelihood_of
from kfac_tn.optim.randomness import RandomState
from kfac_tn.optim.recording import Batch, Recorder
from kfac_tn.optim.selection import Selection

TOLERANCE = 0.05
"""By how much slopes may differ that are one; those of central differences are less precise."""

CONJUGATE_GRADIENTS = 10
"""Steps to solve for what reduces the loss most in the outputs, each of which is cheap."""


class Replay(Recorder):
    """The objective of a recorded step, at other parameters; and its curvature.

    The objective is taken to be the loss (of several calls the mean or sum, as the loss reduces,
    weighted as in the user's objective). A factor of all of it isn't in it, be it the user's or a
    gradient scaler's; the user's is found where gradients are those of the objective alone.
    Random numbers, buffers, attributes, modes and autocast are as in the recorded call, and
    afterwards as before.

    Args:
        model: The model.
        loss_fn: The loss module, called on what the model returns, or elements of it.
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
        super().__init__(model, loss_fn, required)
        self._processes = processes or Processes(None)
        self.forward_mode, self.inner_graph = True, False

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

    def gram(
        self,
        vectors: Sequence[Mapping[Parameter, Tensor]],
        slope: Tensor,
        capture: Capture,
    ) -> tuple[Tensor, Tensor]:
        """``v_i^T G v_j`` with the exact GGN of the objective, ``[V, V]``.

        Needs products with the Jacobian alone (Martens & Grosse 2015, Appendix C), by forward mode;
        by two backward passes for models with an operation that lacks it.

        Args:
            vectors: v.
            slope: That of the user's objective along the first: the product with its gradient.
            capture: Whose hooks are to notice nothing.

        Returns:
            That, and the factor of the user's objective, which G is without: see ``_factor``.
        """
        grams, slopes = [], []
        with self._undisturbed(capture):
            for batch in self._batches:
                # of attention's kernels, only the plain one can be differentiated twice
                with self._as_recorded(batch), sdpa_kernel(SDPBackend.MATH):
                    outputs, tangents = self._push_forward(batch, vectors)
                    gram, own = self._loss_gram(*self._loss_gradient(batch, outputs), tangents)
                    grams.append(gram)
                    slopes.append(own[0])
        return self._total(grams), self._factor(self._total(slopes), slope)

    def form(
        self,
        vector: Mapping[Parameter, Tensor],
        factors: Tensor,
        slope: Tensor,
        capture: Capture,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``v^T G v`` with the GGN of the objective, by central differences of the outputs.

        Two forward passes, which every model has; as accurate as two thirds of the digits are. The
        parameters are moved by that fraction of their norm, and put back.

        Args:
            vector: v, but for a positive factor of each entry.
            factors: These, ``[entries]``.
            slope: That of the user's objective along v.
            capture: Whose hooks are to notice nothing.

        Returns:
            That, and the factor of the user's objective, which G is without: see ``_factor``; NaN
            both where the gradient isn't that of a loss that the user observed. And what
            ``_decrement`` of the loss is.
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
            forms, slopes, decrements = [], [], []
            for batch, high, low in zip(self._batches, *ends, strict=True):
                with self._as_recorded(batch):
                    tangent = (high - low) / (2 * step).to(high.dtype)
                    outputs, gradient = self._loss_gradient(batch, (high + low) / 2)
                    gram, own = self._loss_gram(outputs, gradient, [tangent])
                    forms.append(gram[0, 0])
                    slopes.append(own[0])
                    decrements.append(self._decrement(outputs, gradient))
        factor, form = self._factor(self._total(slopes), slope), self._total(forms)
        if any(batch.observed for batch in self._batches):  # is it the objective's at all?
            form = torch.where(factor.isnan(), torch.nan, form)
        return form, factor, self._total(decrements)

    # Tools -------------------------------------------------------------------------------------

    def _outputs(self, batch: Batch) -> Tensor:
        """What the model returns now; it has a graph within if it differentiates something itself.

        As forces are an energy's gradient in the inputs.
        """
        args, kwargs = copied((batch.args, batch.kwargs))
        model = self._model
        apart = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        try:
            with torch.set_grad_enabled(self.inner_graph), apart:
                return cast(Selection, batch.selection).of(model(*args, **kwargs)).detach()
        except RuntimeError:
            if self.inner_graph:
                raise
        self.inner_graph = True
        batch.restore()
        return self._outputs(batch)

    @torch.enable_grad()
    def _loss_gradient(self, batch: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs as a leaf, and the gradient of the loss in them, to be differentiated again."""
        accurate = torch.promote_types(outputs.dtype, torch.float32)  # products underflow in half
        outputs = outputs.detach().to(accurate).requires_grad_()
        normalized = getattr(likelihood_of(self._loss_fn), "normalized", lambda outputs: outputs)
        loss = self._loss_of(batch, normalized(outputs))
        (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)
        return outputs, gradient

    def _loss_gram(
        self, outputs: Tensor, gradient: Tensor, tangents: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``t_i^T H t_j`` with the Hessian of the loss in the outputs, and ``t_i^T g``."""
        tangents = [tangent.to(gradient.dtype) for tangent in tangents]
        slopes = torch.stack([(gradient.detach() * tangent).sum() for tangent in tangents])
        rows = []
        for tangent in tangents:
            (row,) = torch.autograd.grad(gradient, outputs, tangent, retain_graph=True)
            rows.append(torch.stack([(row * other).sum() for other in tangents]))
        return torch.stack(rows), slopes

    def _decrement(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        """``g^T H^+ g`` with gradient and Hessian of the loss in the outputs, by CG.

        A few steps, which end below it. For cross-entropy with index targets it is the mean of
        (1 - p) / p over their probabilities p.
        """
        left = direction = gradient.detach()
        size = left.square().sum()
        total = torch.zeros_like(size)
        for _ in range(CONJUGATE_GRADIENTS):
            (image,) = torch.autograd.grad(gradient, outputs, direction, retain_graph=True)
            curvature = (direction * image).sum()
            length = torch.where(curvature > 0, size / curvature, 0.0)
            total, left = total + length * size, left - length * image
            before, size = size, left.square().sum()
            direction = left + direction * (size / before).nan_to_num(0.0, 0.0, 0.0)
        return total

    def _loss_of(self, batch: Batch, outputs: Tensor) -> Tensor:
        return self._loss_fn(outputs, *batch.loss_args, **(batch.loss_kwargs or {}))

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        weights, whole = self._weights()
        total = sum((w / whole * v for w, v in zip(weights, values, strict=True)), torch.zeros(()))
        return self._processes.mean(cast(Tensor, total))

    def _weights(self) -> tuple[Tensor, Tensor]:
        """The factors of the losses, and that of their mean (or sum) as one loss."""
        weights = torch.stack([cast(Tensor, batch.weight) for batch in self._batches])
        return weights, weights.max() if self._loss_fn.reduction == "sum" else weights.sum()

    def _factor(self, replayed: Tensor, slope: Tensor) -> Tensor:
        """By what the user's objective is larger than the loss; NaN where that can't be told.

        The loss's weight in what was differentiated, if the user's gradient is that of this: a
        gradient scaler's factor is in the one and not in the other, gradients may have been
        clipped, or be those of a penalty, too.

        Args:
            replayed: The slope of the loss along some direction.
            slope: That of the user's gradient.
        """
        _, whole = self._weights()
        whole = self._processes.mean(whole)
        expected = whole * replayed.to(whole)
        same = (slope.to(whole) - expected).abs() <= TOLERANCE * expected.abs()
        return torch.where(same & (whole > 0), whole, torch.nan)

    def _push_forward(
        self, batch: Batch, vectors: Sequence[Mapping[Parameter, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        model = getattr(self._model, "_orig_mod", self._model)  # what torch.compile wraps
        if isinstance(model, DistributedDataParallel):  # whose passes would be synchronized
            model = model.module
        names = {p: name for name, p in model.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def call(given: tuple[tuple, dict], parameters: dict[str, Tensor]) -> Tensor:
            everything = {**{n: b.clone() for n, b in buffers.items()}, **parameters}
            outputs = torch.func.functional_call(model, everything, *given)
            return cast(Selection, batch.selection).of(outputs)

        def on_copies() -> Callable[[dict[str, Tensor]], Tensor]:
            batch.restore()
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
    def _as_recorded(self, batch: Batch) -> Iterator[None]:
        batch.restore()
        enabled, dtype = batch.autocast
        kind = next(self._model.parameters()).device.type
        with torch.autocast(kind, dtype, enabled=enabled):
            yield
