"""Parameters of no known layer that are broadcast over examples: positions, scales, class tokens.

Where such a parameter meets a tensor with an axis of examples, it is replaced by a view of it with
that axis. Nothing changes but for autograd, where the view's gradient is the examples' own, which
the parameter's would be the sum of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode

from kfac_tn.layers import GradientFamily

Record = Callable[[Parameter, Tensor], None]


class Copies(Module):
    """An own parameter as the bias of a layer that does nothing else."""

    def __init__(self, parameter: Parameter) -> None:
        super().__init__()
        self.bias = parameter


class CopiesFamily(GradientFamily):
    """``g`` is the gradient of ``parameter.expand(N, ...)``."""

    def per_example_bias_gradient(self, module: Any, g: Tensor) -> Tensor:  # noqa: D102
        shape = module.bias.shape
        rest = _rest(module.bias, g.ndim)
        ones = (1,) * (g.ndim - 1 - len(rest))
        return g.sum_to_size(len(g), *ones, *rest).reshape(len(g), *shape)


class WatchCopies(TorchFunctionMode):
    """While it is entered, gives examples copies of parameters where these are broadcast.

    Other uses are left alone.

    Args:
        parameters: To look for.
        record: Takes a parameter and what each example has of it, ``[N, ...]``.
    """

    def __init__(self, parameters: Collection[Parameter], record: Record) -> None:
        super().__init__()
        self._parameters, self._record = frozenset(parameters), record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _BINARY and len(args) == 2:
            args = self._copy(*args), self._copy(*reversed(args))
        result = func(*args, **(kwargs or {}))
        if func in _EXPANSIONS and self._is_watched(args[0]) and _is_broadcast(args[0], result):
            self._record(args[0], result)
        return result

    def _is_watched(self, value: Any) -> bool:
        return isinstance(value, Parameter) and value in self._parameters

    def _copy(self, value: Any, other: Any) -> Any:
        if not self._is_watched(value) or not _is_broadcast(value, other):
            return value
        rest = _rest(value, other.ndim)
        ones = (1,) * (other.ndim - 1 - len(rest))
        copies = cast(Parameter, value).expand(len(other), *ones, *rest)
        self._record(value, copies)
        return copies


def _is_broadcast(parameter: Tensor, other: Any) -> bool:
    """Whether another tensor has a first axis that the parameter has not, or of size one."""
    if not isinstance(other, Tensor) or isinstance(other, Parameter) or other.ndim == 0:
        return False
    return other.ndim > parameter.ndim or (other.ndim == parameter.ndim and parameter.shape[0] == 1)


def _rest(parameter: Tensor, axes: int) -> torch.Size:
    """The parameter's shape without an axis of examples."""
    return parameter.shape if axes > parameter.ndim else parameter.shape[1:]


_BINARY = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_")
    if hasattr(owner, name)
}
_EXPANSIONS = {Tensor.expand, Tensor.expand_as}
