"""What a model must be, whatever is wanted of it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.nn import Module
from torch.nn.parameter import is_lazy


def check_model(model: Module) -> None:
    """Refuse what is no module, such as ``model.parameters()``, by habit.

    Raises:
        TypeError: Saying what it is.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model is a {type(model).__name__}: give the torch.nn.Module itself.")


def batch_hint(names: Collection[str]) -> str:
    """What else to say of an error where these layers were called with single examples.

    Example:
        >>> batch_hint([])
        ''
    """
    if not names:
        return ""
    return (
        f" Layers {sorted(names)} were called with a single example, without an axis of examples: "
        "give the model a batch (of one: x.unsqueeze(0), with its target)."
    )


def check_parameters(model: Module) -> None:
    """Refuse parameters that nothing here can be had of.

    Raises:
        TypeError: If the model is no module, or has one in TorchScript.
        ValueError: Naming one of a lazy module, that has no shape yet, one that has no storage yet,
            a sharded or a complex one.
    """
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"Module {name!r} is in TorchScript ({module.original_name}), which hides what its "
                "layers are called with: give the module that it was made of, or use torch.compile."
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"Parameter '{name}' is not initialized yet: run the lazy model once before."
            )
        if parameter.is_meta:
            raise ValueError(
                f"Parameter '{name}' is on the meta device, without values: materialize the model "
                "before (model.to_empty(device=...), then initialize or load it)."
            )
        if type(parameter).__name__ in ("DTensor", "FlatParameter"):
            raise ValueError(
                f"Parameter '{name}' is sharded over processes ({type(parameter).__name__}): only "
                "whole weights have curvature here; use DistributedDataParallel, not FSDP."
            )
        if parameter.requires_grad and not parameter.is_floating_point():
            raise ValueError(
                f"Parameter '{name}' has dtype {parameter.dtype}: only real floating-point "
                "parameters can be trained here."
            )
