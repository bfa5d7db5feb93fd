"""The calls that a model's parameters take part in, and each example's gradients from them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn.curvature.batches import Forward, call_on_pair, outputs_and_targets, rows_of
from kfac_tn.curvature.checks import check_graph, refuse_if_not_exact
from kfac_tn.curvature.contributions import Call, Contributions, per_example
from kfac_tn.curvature.recorder import Recorder, own_parameters
from kfac_tn.functional import common
from kfac_tn.graph import bypassing, differentiate
from kfac_tn.hooks import plain, unhooked
from kfac_tn.layers import batch_hint, check_parameters

FEW = 3
"""Examples that tell what a model does to many: one with others before and behind."""

CHUNK = 2**18
"""Elements that are compared at once."""


class Calls:
    """The calls of known layers in one forward pass of a model.

    Args:
        model: The model.
        batch: A batch of data.
        forward: What to do with it. Default: to call the model with the inputs of a pair.
        apart: See ``Recorder``: the same for all batches that are to be treated alike.

    Attributes:
        outputs: What the model returned, ``[N, ...]``.
        targets: What it should have.
        unknown: Names of trainable parameters that (also) belong to modules of unknown kinds, which
            don't just broadcast them, or are used without a call, or whose calls don't have the
            examples on the first axis.
        seen_in_few: Whether ``verify`` has seen it in a pass of a few examples.

    Raises:
        ValueError: If batch normalization in training mode makes examples depend on each other, or
            tensor dropout makes gradients random, for outputs that have no graph, or for a
            parameter as ``check_parameters`` says.
        TypeError: If the model's output isn't a tensor with a batch axis.
    """

    def __init__(
        self,
        model: Module,
        batch: Any,
        forward: Forward = call_on_pair,
        apart: dict[Module, bool] | None = None,
    ) -> None:
        check_parameters(model)
        refuse_if_not_exact(model)
        self._model, self._batch, self._forward = model, batch, forward
        self.seen_in_few = False
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._recorder = recorder = Recorder(model, {} if apart is None else apart)
        with recorder.records():
            outputs, self.targets = outputs_and_targets(forward, model, batch)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            raise TypeError(
                "The model must return one tensor with examples first, but returned a "
                f"{type(outputs).__name__}: take it out of that by forward=..., as in "
                "forward=lambda model, batch: (model(batch[0])['logits'], batch[1])."
            )
        check_graph(outputs)
        self.outputs = outputs
        self._found = recorder.find(outputs)
        self._counts = Counter(
            p
            for one in self._found
            if one.record.shape.numel()
            for p in recorder.parameters_of(one.record)
        )
        known: dict[Tensor, Parameter] = {p: p for p in recorder.attributes}
        elsewhere = bypassing(outputs, self._found, known, recorder.parameters_of)
        elsewhere |= {
            parameter  # of a call whose first axis can't be that of the examples
            for one in self._found
            if one.record.shape.numel()
            and not one.record.x.shape[:1] == one.record.shape[:1] == outputs.shape[:1]
            for parameter in recorder.parameters_of(one.record)
        }
        unbatched = {c.module for one in self._found if (c := one.record).lacks_batch()}
        elsewhere |= {p for module in unbatched for p in own_parameters(module)}
        self._unbatched = [name for name, m in model.named_modules() if m in unbatched]
        elsewhere |= recorder.own - self._counts.keys()
        self.unknown = {
            name
            for name, p in self.parameters.items()
            if p not in recorder.attributes or p in elsewhere
        }

    def __len__(self) -> int:
        return len(self.outputs)

    @property
    def input_bytes(self) -> int:
        """What the inputs of all calls take; they are kept."""
        return sum(one.record.x.nbytes for one in self._found)

    def backward(
        self,
        column: Tensor,
        receive: Callable[[str, str, Contributions], None],
        parameters: Sequence[Parameter] = (),
    ) -> tuple[Tensor | None, ...]:
        """Back-propagate a column to all calls.

        Args:
            column: Shaped like the outputs.
            receive: Takes a parameter's name, whether it is a ``"weight"`` or a ``"bias"``, and
                calls with the gradients at their outputs: for each parameter once, as soon as all
                its calls have theirs. Parameters that aren't reached are left out.
            parameters: Whose gradient, summed over examples, is wanted, too.

        Returns:
            The gradients of ``parameters``.
        """
        recorder = self._recorder
        names = {parameter: name for name, parameter in self.parameters.items()}
        waiting: dict[Parameter, list[tuple[Call, Tensor]]] = defaultdict(list)

        def hand_over(parameter: Parameter) -> None:
            name = names[parameter]
            if name not in self.unknown:
                receive(name, recorder.attributes[parameter], waiting.pop(parameter))

        def at_call(call: Call, gradient: Tensor) -> None:
            if not gradient.numel():  # of no examples
                return
            call.check_unchanged()
            gradient = common.cast(gradient.detach().reshape(call.shape))
            with plain(gradient.device):
                for parameter in recorder.parameters_of(call):
                    waiting[parameter].append((call, gradient))
                    if len(waiting[parameter]) == self._counts[parameter]:
                        hand_over(parameter)

        if not self.outputs.requires_grad or not (self._found or parameters):
            return (None,) * len(parameters)
        column = column.to(self.outputs.dtype)
        with recorder.apart():
            gradients = differentiate(self.outputs, column, self._found, at_call, parameters)
        with plain(column.device):
            for parameter in list(waiting):  # some of whose calls the column doesn't reach
                hand_over(parameter)
        return gradients

    def verify(self) -> None:
        """Find out which calls really give their parameters' per-example gradients.

        Back-propagates random numbers from one example alone: no other example may receive any, and
        its gradients must be those of autograd. That fails for examples on another axis, and for
        parameters that are used without calling their module. These join ``unknown``. A few
        examples tell it, if the model does to them what it does in the batch.
        """
        few = self._few()
        if few is not None:
            few.verify()
            self.unknown |= few.unknown
            self.seen_in_few = True
            return
        probe = len(self) // 2  # with others before and behind
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(self.outputs[0].shape, generator=generator)
        column = torch.zeros_like(self.outputs)
        column[probe] = numbers.to(column)
        names = [name for name in self.parameters if name not in self.unknown]
        actual: dict[str, Tensor] = {}

        def receive(name: str, attribute: str, contributions: Contributions) -> None:
            if any(g[:probe].any() or g[probe + 1 :].any() for _, g in contributions):
                return
            with suppress(NotImplementedError):  # a family that knows of Kronecker factors alone
                example = slice(probe, probe + 1)
                actual[name] = per_example(attribute, contributions, example)[0]

        parameters = [self.parameters[name] for name in names]
        gradients = self.backward(column, receive, parameters)
        for name, expected in zip(names, gradients, strict=True):
            if expected is None and name not in actual:
                continue
            if (
                expected is None
                or name not in actual
                or not _close(actual.pop(name), _dense(expected))
            ):
                self.unknown.add(name)

    def _few(self) -> Calls | None:
        """The calls of another forward pass, of the first, a middle and the last example.

        None if there are no more, if they can't be had, or if their outputs aren't the same but for
        rounding: then they depend on other examples, or on random numbers.
        """
        count = len(self)
        if count <= FEW or self.outputs.device.type != "cpu":  # elsewhere errors may be fatal
            return None
        rows = torch.tensor([0, count // 2, count - 1])
        try:
            batch = rows_of(self._batch, rows, count)
            few = Calls(self._model, batch, self._forward, self._recorder.decisions)
        except Exception:  # such batches can't be cut
            return None
        expected = self.outputs.detach()[rows]
        rounding = 100 * torch.finfo(expected.dtype).eps
        return few if _close(few.outputs.detach(), expected, rounding) else None

    def alone(
        self, n: int, names: Sequence[str]
    ) -> Callable[[Tensor, Sequence[str]], list[Tensor]]:
        """The way of parameters whose calls tell nothing: run the model on one example alone.

        Args:
            n: The example's number: in each tensor of the batch that has N rows, the row.
            names: Of the parameters.

        Returns:
            A function of a column ``[1, ...]`` and some of the names, which returns the gradients.

        Raises:
            ValueError: When the example alone has another output than in its batch, or none.
        """
        row = slice(n, n + 1)
        try:
            outputs, _ = self._forward(self._model, rows_of(self._batch, row, len(self)))
        except Exception as error:
            raise ValueError(
                f"Parameters {list(names)} are differentiated example by example, but the model "
                f"can't be called on one example alone ({type(error).__name__}: {error}). Masks, "
                "offsets and whatever else has a row for each example must be part of the batch, "
                "with the examples first. Freeze these parameters to leave them out."
                + batch_hint(self._unbatched)
            ) from error
        expected = self.outputs[row].detach()
        if not isinstance(outputs, Tensor) or not _close(outputs.detach(), expected):
            if not self.outputs.isfinite().all():
                raise ValueError(
                    "The model's outputs aren't finite: look for NaN or inf in the data, or the "
                    "parameters."
                )
            raise ValueError(
                f"Parameters {list(names)} are differentiated example by example, but the model's "
                "output for one example alone differs from that in its batch: some module is "
                "random (call model.eval() for dropout), mixes examples, or has them on another "
                "axis than the first. Freeze these parameters to leave them out."
                + batch_hint(self._unbatched)
            )

        def gradients(column: Tensor, names: Sequence[str]) -> list[Tensor]:
            parameters = [self.parameters[name] for name in names]
            with unhooked(parameters):
                found = torch.autograd.grad(
                    outputs,
                    parameters,
                    column.to(outputs.dtype),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            return [_dense(gradient) for gradient in found]

        return gradients


def _dense(gradient: Tensor) -> Tensor:
    """A gradient, also one of an embedding with sparse gradients."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    if actual.shape != expected.shape:
        return False
    if tolerance is None:
        tolerance = min(0.1, 10 * torch.finfo(expected.dtype).eps ** 0.5)
    # In chunks: a difference as large as a weight is fresh memory each time.
    chunks = zip(actual.flatten().split(CHUNK), expected.flatten().split(CHUNK), strict=True)
    difference = torch.stack([(a - b).norm() for a, b in chunks]).norm()
    return bool(difference <= tolerance * expected.norm())
