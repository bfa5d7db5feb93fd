"""Hooks that show the projections within attention, as if they were modules that are called."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from kfac_tn.hooks import WeakHook, recorded
from kfac_tn.layers.attention import Projection, ProjectionsApart


class AttentionWatch:
    """Calls ``_after_layer`` for projections, as hooks of modules call it for these."""

    armed: bool

    @abstractmethod
    def _after_layer(self, module: Module, args: tuple, kwargs: dict, output: Any) -> None:
        """A layer was called."""

    def _watch_attention(self, modules: Iterable[Module]) -> list[RemovableHandle]:
        """Watch the attentions that have projections among some modules."""
        hidden = [module for module in modules if isinstance(module, Projection)]
        self._projections = {each.weight: each for each in hidden}
        self._entered: list[tuple[Module, ProjectionsApart]] = []  # attentions at work
        handles: list[RemovableHandle] = []
        for module in {each.attention: None for each in hidden}:
            before, after = WeakHook(self, "_before_attention"), WeakHook(self, "_after_attention")
            handles += [
                module.register_forward_pre_hook(cast(Any, before)),
                module.register_forward_hook(cast(Any, after), always_call=True),
            ]
        return handles

    def _before_attention(self, module: Module, args: tuple) -> None:
        """Make its projections visible; in backward passes too, where checkpointing repeats it."""
        if self.armed and recorded(self):
            self._enter(module)

    def _after_attention(self, module: Module, args: tuple, output: Any) -> None:
        if self._entered and self._entered[-1][0] is module:
            self._leave()

    @torch._disable_dynamo
    def _enter(self, module: Module) -> None:
        mode = ProjectionsApart(self._projections, self._after_projection)
        self._entered.append((module, mode))
        mode.__enter__()

    @torch._disable_dynamo
    def _leave(self) -> None:
        self._entered.pop()[1].__exit__(None, None, None)

    def _after_projection(self, module: Module, x: Tensor, output: Tensor) -> None:
        self._after_layer(module, (x,), {}, output)
