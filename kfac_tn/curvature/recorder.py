"""Records the calls of a model's known layers, hidden ones among them, with autograd's nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import LSTM, Module, Parameter, RNNBase

from kfac_tn.curvature.contributions import Call
from kfac_tn.curvature.copies import Copies, CopiesFamily, WatchCopies
from kfac_tn.graph import Found, find, output_edge, remember
from kfac_tn.hidden_watch import HiddenWatch
from kfac_tn.hooks import alone, remove
from kfac_tn.layers import HiddenCall, HiddenLinear, gradient_family, with_hidden

STEPWISE = 4
"""Examples that take as long one after the other as all of them with a recurrence's layers apart
(measured on a CPU: a GRU of 50 times takes 1.4 of the time for 2, 0.8 for 4, and 0.2 for 32)."""

FUSED = 24
"""The same of kernels for all times at once, if these are at most twice as many; half of them if
they are more (an LSTM by oneDNN on a CPU takes 1.4 of the time for 16 examples of 32 times, 0.75
for 32; diagonals 1.4 of it for 24 of 100, 0.9 for 32; single gradients 1.7 for 48 of 200)."""


class Recorder(HiddenWatch):
    """Records calls while a model is called.

    Args:
        model: The model.
        apart: Of modules, whether their hidden layers are computed apart. What isn't said there is
            decided when they are called, once and for all, and added.

    Attributes:
        attributes: Of trainable parameters that may be understood, whether each is a ``"weight"``
            or a ``"bias"``.
        own: Those of no known layer: biases of copies.
        decisions: As given.
    """

    armed = True

    def __init__(self, model: Module, apart: dict[Module, bool]) -> None:
        self.decisions = apart
        modules, self.attributes, self.own = _known(model)
        hidden = [m for m in modules if isinstance(m, HiddenLinear)]
        self._layers = [layer for layer in hidden if layer.weight in self.attributes]
        self._modules = [m for m in modules if self._of(m) and not isinstance(m, HiddenLinear)]
        self._copies = {parameter: Copies(parameter) for parameter in self.own}
        self._key = object()

    @contextmanager
    def records(self) -> Iterator[None]:
        """While the model is called."""
        handles = [
            m.register_forward_hook(cast(Any, self._after_layer), prepend=True, with_kwargs=True)
            for m in self._modules
        ]
        try:
            with ExitStack() as stack:
                if self.own:
                    stack.enter_context(WatchCopies(self.own, self._at_copies))
                stack.enter_context(self.apart())
                yield
        finally:
            remove(handles)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Where a backward pass may call parts of the model again: what they save is the same."""
        handles = self._watch_hidden(self._layers)
        try:
            with alone(self):
                yield
        finally:
            self._leave_all()
            remove(handles)

    def find(self, outputs: Tensor) -> list[Found[Call]]:
        """The calls that outputs depend on."""
        return find(outputs, self._key)

    def parameters_of(self, call: Call) -> list[Parameter]:
        """Parameters that a call gives gradients to."""
        return self._of(call.module)

    def _of(self, module: Module) -> list[Parameter]:
        named = module._parameters.items()
        return [p for name, p in named if p is not None and self.attributes.get(p) == name]

    def _after_layer(self, module: Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        family, edge = gradient_family(module), output_edge(output)
        if family is None or edge is None:
            return
        x = family.input_of(module, args, kwargs)
        self._remember(edge, module, x, output)

    def _before_owner(self, module: Module, args: tuple) -> None:
        if module not in self.decisions:
            faster = _is_faster_apart(module, args)
            if faster is None:
                return
            self.decisions[module] = faster
        if self.decisions[module]:
            super()._before_owner(module, args)

    def _after_hidden(self, call: HiddenCall) -> None:
        repeated = torch._C._current_graph_task_id() != -1
        if repeated or call.packed or not call.layer.holds() or not call.output.requires_grad:
            return
        edge = output_edge(call.output)
        if edge is not None:
            self._remember(edge, call.layer, call.x, call.output, call.within)

    def _remember(
        self,
        edge: GradientEdge,
        module: Module,
        x: Tensor,
        output: Tensor,
        within: Node | None = None,
    ) -> None:
        family = gradient_family(module)
        assert family is not None
        version = None if x.is_inference() else x._version
        call = Call(module, family, x.detach(), version, output.shape)
        remember(edge, self._key, call, x, within)

    def _at_copies(self, parameter: Parameter, copies: Tensor) -> None:
        if copies.requires_grad:
            module = self._copies[parameter]
            call = Call(module, CopiesFamily(), copies.detach(), None, copies.shape)
            remember(get_gradient_edge(copies), self._key, call)


def own_parameters(module: Module) -> list[Parameter]:
    """Those of a module, but not of its submodules."""
    return [p for p in module._parameters.values() if p is not None]


def _known(model: Module) -> tuple[list[Module], dict[Parameter, str], set[Parameter]]:
    """Modules; trainable parameters that may be understood: weight or bias; which no layer has.

    The others are in modules of unknown kinds, have different roles in several, or belong to a
    hidden layer and another one.
    """
    modules, owners_of = with_hidden(model)
    known, own = {}, set()
    for parameter, owners in owners_of.items():
        attributes = {attribute for _, _, attribute in owners}
        understood = {gradient_family(module) is not None for _, module, _ in owners}
        hidden = any(isinstance(module, HiddenLinear) for _, module, _ in owners)
        if parameter.requires_grad and understood == {False}:
            known[parameter] = "bias"
            own.add(parameter)
        elif hidden and len(owners) > 1:
            continue
        elif parameter.requires_grad and understood == {True} and len(attributes) == 1:
            known[parameter] = attributes.pop()
    known = {p: attribute for p, attribute in known.items() if attribute in ("weight", "bias")}
    return [module for _, module in modules], known, own


def _is_faster_apart(module: Module, args: tuple) -> bool | None:
    """Whether hidden layers, apart, take less time than to call a module on each example alone.

    None for no examples. Attention and cells always do, and packed sequences never.
    """
    if not isinstance(module, RNNBase) or not args:
        return True
    x = args[0]
    if not isinstance(x, Tensor):
        return False
    if x.numel() == 0:
        return None
    if x.dim() != 3:  # one example
        return False
    examples, times = x.shape[:2] if module.batch_first else (x.shape[1], x.shape[0])
    fused = isinstance(module, LSTM) and x.dtype == torch.float32 and not module.proj_size
    if fused or x.device.type != "cpu":
        return examples >= max(FUSED, times / 2)
    return examples >= STEPWISE
