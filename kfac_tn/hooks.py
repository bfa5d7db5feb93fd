"""What every hook needs: an owner that it doesn't keep alive, and plain arithmetic."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kfac_tn.tn.autocast import is_enabled


class WeakHook:
    """Calls a method of an object without keeping it alive; copies and pickles are inert."""

    def __init__(self, owner: object | None = None, method: str = "") -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._method = method

    @property
    def __name__(self) -> str:
        """Only ``torch.jit.script`` asks for one, to compile hooks with the model."""
        raise AttributeError(
            "The hooks by which KFAC watches a model can't be compiled by torch.jit.script: call "
            "close() of the optimizer before, or script a new model with this one's state_dict() "
            "(copies have the hooks, too, but these do nothing). torch.jit.trace needs neither."
        )

    def __call__(self, *args: Any) -> None:
        """Call the method, if its owner is still there."""
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            getattr(owner, self._method)(*args)

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()


_only: list[object] = []
"""Owners of hooks that are alone, the innermost last."""


@contextmanager
def alone(owner: object) -> Iterator[None]:
    """Calls within aren't the user's: of all hooks here, only this owner's may notice them.

    Of others that watch the same model or loss, one may wait for a step whose statistics these
    would spoil.
    """
    _only.append(owner)
    try:
        yield
    finally:
        _only.pop()


def recorded(owner: object) -> bool:
    """Whether what is called is the user's, and autograd records it.

    That is, nobody else is ``alone``, and there is no ``torch.no_grad()``, no transform of
    torch.func (tensors that these wrap have no storage to look at, and no graph that ``backward()``
    walks) and no ``torch.jit.trace``, whose graph would have the statistics in it.
    """
    if _only and _only[-1] is not owner:
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    tracing = torch._C._get_tracing_state() is not None
    return not tracing and torch._C._functorch.peek_interpreter_stack() is None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile made as it was written: hooks added since then are called."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unhooked(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Without the user's hooks on parameters, which are for gradients of the user's passes.

    Example:
        >>> import torch
        >>> w = torch.ones((), requires_grad=True)
        >>> _ = w.register_hook(lambda gradient: 100 * gradient)
        >>> with unhooked([w]):
        ...     torch.autograd.grad(2 * w, w)
        (tensor(2.),)
    """
    hooks = [h for p in parameters if (h := p._backward_hooks)]  # dicts that autograd looks into
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, kept, strict=True):
            each.update(before)


def remove(handles: Iterable[RemovableHandle]) -> None:
    """Remove hooks; again is no harm."""
    for handle in handles:
        handle.remove()


class plain:  # noqa: N801 (a context manager, called like a function)
    """No gradients, no autocast: statistics are computed in the precision they are given."""

    def __init__(self, device: torch.device) -> None:
        self._contexts: list[AbstractContextManager[Any]] = [torch.no_grad()]
        if is_enabled(device.type):
            self._contexts.append(torch.autocast(device.type, enabled=False))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exception: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*exception)


def timed(phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the time that a method takes to ``self.seconds[phase]``."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def measured(self: Any, *args: Any) -> Any:
            start = perf_counter()
            result = method(self, *args)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start
            return result

        return measured

    return decorate
