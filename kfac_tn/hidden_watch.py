"""Hooks that show the linear layers within other modules, as if they were modules that are called.

These modules compute them in functions of torch, out of sight. Where statistics are due, or each
example's gradients, they compute the same with the hidden layers apart.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.nn import Module
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from kfac_tn.hooks import WeakHook, recorded
from kfac_tn.layers import attention, recurrent
from kfac_tn.layers.hidden import HiddenCall, HiddenLayers, HiddenLinear


class HiddenApart(TorchFunctionMode):
    """While it is entered, computes attention and recurrences with their linear layers apart.

    Args:
        layers: The hidden layers, and whom to tell of their calls.

    Example:
        >>> from kfac_tn.layers.attention import attention_layers
        >>> attention = torch.nn.MultiheadAttention(4, 2, dropout=0.0)
        >>> hidden = {each.weight: each for each in attention_layers(attention).values()}
        >>> seen, x = [], torch.randn(5, 3, 4)
        >>> with HiddenApart(HiddenLayers(hidden, lambda call: seen.append(call.output.shape))):
        ...     y, _ = attention(x, x, x)
        >>> [tuple(shape) for shape in seen], torch.allclose(y, attention(x, x, x)[0], atol=1e-6)
        ([(3, 5, 12), (3, 5, 4)], True)
    """

    def __init__(self, layers: HiddenLayers) -> None:
        super().__init__()
        self._layers = layers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _COMPUTED:
            return self._compute(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @torch._disable_dynamo  # a graph for each number of steps, in pieces between records
    def _compute(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return _COMPUTED[func](self._layers, *args, **kwargs)


_COMPUTED = {F.multi_head_attention_forward: attention.attend, **recurrent.COMPUTED}


class HiddenWatch:
    """Calls ``_after_hidden`` for hidden layers, as hooks of modules are called for these."""

    armed: bool

    @abstractmethod
    def _after_hidden(self, call: HiddenCall) -> None:
        """A hidden layer was called."""

    def _watch_hidden(self, modules: Iterable[Module]) -> list[RemovableHandle]:
        """Watch the owners of the hidden layers among some modules."""
        hidden = [module for module in modules if isinstance(module, HiddenLinear)]
        self._hidden = {each.weight: each for each in hidden}
        self._entered: list[tuple[Module, HiddenApart]] = []  # owners at work
        handles: list[RemovableHandle] = []
        for module in {each.owner: None for each in hidden}:
            before, after = WeakHook(self, "_before_owner"), WeakHook(self, "_after_owner")
            handles += [
                module.register_forward_pre_hook(cast(Any, before)),
                module.register_forward_hook(cast(Any, after), always_call=True),
            ]
        return handles

    def _before_owner(self, module: Module, args: tuple) -> None:
        """Make its layers visible; in backward passes too, where checkpointing repeats it."""
        if self.armed and recorded(self):
            self._enter(module)

    def _after_owner(self, module: Module, args: tuple, output: Any) -> None:
        if self._entered and self._entered[-1][0] is module:
            self._leave()

    def _leave_all(self) -> None:
        """Leave what is still at work: a KeyboardInterrupt there calls no hooks."""
        while self._entered:
            if torch.overrides._get_current_function_mode() is self._entered[-1][1]:
                self._leave()
            else:  # whoever entered more leaves by themselves
                self._entered.pop()

    @torch._disable_dynamo
    def _enter(self, module: Module) -> None:
        mode = HiddenApart(HiddenLayers(self._hidden, self._after_hidden))
        self._entered.append((module, mode))
        mode.__enter__()

    @torch._disable_dynamo
    def _leave(self) -> None:
        self._entered.pop()[1].__exit__(None, None, None)
