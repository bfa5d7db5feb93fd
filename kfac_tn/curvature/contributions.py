"""What calls of modules give their parameters: each example's gradient, or a sum of squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module

from kfac_tn.functional import common
from kfac_tn.layers import GradientFamily


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module.

    Attributes:
        module: The module.
        family: How the call gives each example's gradient.
        x: Its input.
        version: Of the input, which must not have changed when it is used.
        shape: Of its output.
    """

    module: Module
    family: GradientFamily
    x: Tensor
    version: int | None
    shape: torch.Size

    def per_example_gradient(self, attribute: str, g: Tensor, examples: slice) -> Tensor:
        """What some examples each give the weight or the bias, ``[n, *shape]``."""
        if attribute == "bias":
            return self.family.per_example_bias_gradient(self.module, g[examples])
        x = self.x[examples]
        return self.family.per_example_weight_gradient(self.module, x, g[examples])

    def lacks_batch(self) -> bool:
        """Whether it is a call on a single example, which has no axis of its own."""
        return bool(self.shape.numel()) and self.family.lacks_batch(self.module, self.x)

    def check_unchanged(self) -> None:
        """Refuse an input that was overwritten after the call.

        Raises:
            RuntimeError: If it was.
        """
        if self.version is not None and self.x._version != self.version:
            raise RuntimeError(
                f"The input of {self.module} was changed in place after the call: its gradients "
                "can't be computed."
            )


Contributions = Sequence[tuple[Call, Tensor]]
"""Calls of one parameter, each with the gradient at its output."""


def sum_of_squares(
    attribute: str, contributions: Contributions, max_memory: int | None = None
) -> Tensor:
    """Sum over examples of a parameter's squared per-example gradients, shaped like it.

    Raises:
        ValueError: If that takes more than ``max_memory`` bytes.
    """
    if len(contributions) == 1:
        ((call, g),) = contributions
        if attribute == "weight":
            return call.family.weight_diagonal(call.module, call.x, g, max_memory)
    # Gradients of several calls add up before they are squared.
    parameter = cast(Tensor, getattr(contributions[0][0].module, attribute))
    copies = 2 if len(contributions) == 1 else 3  # of one example's, and their square
    needed = copies * parameter.numel() * common.accumulation_dtype(parameter).itemsize
    limit = common.UNFOLD_BYTES if max_memory is None else max_memory
    if max_memory is not None and needed > max_memory:
        raise ValueError(
            f"max_memory={max_memory:,} bytes is too little: one example's gradients of the "
            f"{attribute} of {contributions[0][0].module} take {needed:,}"
        )
    size = max(1, limit // needed)
    total: Tensor | float = 0.0
    for start in range(0, len(contributions[0][1]), size):
        total = total + per_example(
            attribute, contributions, slice(start, start + size)
        ).square().sum(0)
    return cast(Tensor, total)


def per_example(
    attribute: str, contributions: Contributions, examples: slice = slice(None)
) -> Tensor:
    """Each example's gradient of a parameter, ``[n, *shape]``, from all its calls."""
    (call, g), *others = contributions
    total = call.per_example_gradient(attribute, g, examples)
    for call, g in others:
        total = total + call.per_example_gradient(attribute, g, examples)
    return total
