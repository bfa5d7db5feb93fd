"""Going through a data loader: what is done with each batch, and how far it got."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module

Forward: TypeAlias = Callable[[Module, Any], tuple[Tensor, Any]]


def call_on_pair(model: Module, batch: Any) -> tuple[Tensor, Any]:
    """Take a batch for a pair of inputs and targets: the default ``forward`` of ``compute_...``.

    Args:
        model: The model.
        batch: A tuple or list ``(inputs, targets)``. Inputs of any structure are passed to the
            model as its one argument.

    Returns:
        The model's outputs, and the targets.

    Raises:
        TypeError: If the batch is anything else: which part is what can't be known then.

    Example:
        >>> import torch
        >>> call_on_pair(torch.nn.Identity(), [torch.ones(2), "targets"])
        (tensor([1., 1.]), 'targets')
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        kind = type(batch).__name__
        if isinstance(batch, tuple | list):
            kind += f" of {len(batch)}"
        raise TypeError(
            f"A batch of the loader is a {kind}, not a pair (inputs, targets). Say what to do with "
            "it by forward=..., a function of model and batch that returns outputs and targets: "
            "forward=lambda model, batch: (model(batch['input']), batch['target'])."
        )
    inputs, targets = batch
    return model(inputs), targets


def outputs_and_targets(forward: Forward, model: Module, batch: Any) -> tuple[Any, Any]:
    """What ``forward`` makes of a batch.

    Raises:
        TypeError: If that isn't a pair (a tensor of two rows isn't one).
    """
    pair = forward(model, batch)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        kind = type(pair).__name__
        if isinstance(pair, tuple | list):
            kind += f" of {len(pair)}"
        raise TypeError(
            f"forward returned a {kind}, not a pair (outputs, targets): forward=lambda model, "
            "batch: (model(batch['input']), batch['target'])."
        )
    outputs, targets = pair
    return outputs, targets


def with_progress(loader: Iterable, title: str, progress_bar: bool) -> Iterable:
    """The loader, behind a progress bar on standard error if one is wanted.

    Raises:
        ImportError: If tqdm isn't there to draw it, with the command that installs it.
    """
    if not progress_bar:
        return loader
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress_bar=True needs tqdm: pip install tqdm") from error
    return tqdm(loader, desc=title, unit="batch")


def rows_of(batch: Any, rows: slice | Tensor, count: int) -> Any:
    """A batch of some examples, of the same structure: tensors that have ``count`` rows are cut."""
    return _changed(batch, lambda x: x[rows] if x.shape[:1] == (count,) else x)


def copied(batch: Any) -> Any:
    """A batch whose tensors stay as they are now; what is one tensor twice is one copy twice."""
    copies: dict[Tensor, Tensor] = {}

    def copy_of(x: Tensor) -> Tensor:
        if x not in copies:
            copies[x] = x.detach().clone().requires_grad_(x.requires_grad)
        return copies[x]

    return _changed(batch, copy_of)


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch of any structure."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    _changed(batch, note)
    return found


def _changed(
    batch: Any, change: Callable[[Tensor], Tensor], parts: dict[int, Any] | None = None
) -> Any:
    """A batch of the same structure, with every tensor changed.

    Args:
        batch: The batch.
        change: What is made of a tensor.
        parts: What became of the objects that torch doesn't look into, by their ids: they may refer
            to each other.
    """
    known: dict[int, Any] = {} if parts is None else parts

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, UserDict):  # as transformers' batches are
            part: Any = copy(leaf)
            part.data = {key: _changed(value, change, known) for key, value in leaf.data.items()}
            return part
        if is_dataclass(leaf) and not isinstance(leaf, type):
            if id(leaf) not in known:
                part = known[id(leaf)] = copy(leaf)
                for each in fields(leaf):
                    if hasattr(leaf, each.name):
                        value = _changed(getattr(leaf, each.name), change, known)
                        object.__setattr__(part, each.name, value)  # also of frozen ones
            return known[id(leaf)]
        return change(leaf) if isinstance(leaf, Tensor) else leaf

    whole = (torch.Size,)  # for torch, tuples like others
    return torch.utils._pytree.tree_map(changed, batch, is_leaf=lambda x: isinstance(x, whole))
