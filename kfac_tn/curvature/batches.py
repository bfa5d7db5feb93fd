"""Going through a data loader: what is done with each batch, and how far it got."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

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
