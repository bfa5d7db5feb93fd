"""What is back-propagated: columns of a root of the loss Hessian, exact, sampled or empirical."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kfac_tn.layers import LayerBlock
from kfac_tn.likelihood import Likelihood, empirical_factor

Samples: TypeAlias = int | Literal["auto"]

MOST_SAMPLES = 4
"""More aren't drawn unless asked for: each is a backward pass."""

_SMALL = 0.1
"""Share of the largest layer's parameters below which a layer has no say in their number."""


def is_whole(value: Any) -> bool:
    """Whether something is a whole number; truth values aren't.

    Example:
        >>> [is_whole(value) for value in (3, 3.0, 2.5, float("inf"), float("nan"), True, None)]
        [True, True, False, False, False, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool) and bool(value % 1 == 0)


def samples_of(choice: Samples, sizes: Mapping[LayerBlock, tuple[int, int]]) -> int:
    """The number chosen; for "auto" so many that B of one batch can have full rank, up to a limit.

    Layers with less than a tenth of the largest one's parameters have no say: a small head wants no
    backward pass more through everything.

    Args:
        choice: A number, or "auto".
        sizes: Examples of each layer, and these times shared positions.

    Raises:
        ValueError: For another choice.
    """
    if choice != "auto":
        if not is_whole(choice) or choice < 1:
            raise ValueError(f"mc_samples is {choice}: it is a whole number, at least 1.")
        return int(choice)
    rows = {
        block: examples if block.approximation == "reduce" else terms
        for block, (examples, terms) in sizes.items()
        if block.has_factors and terms
    }
    parameters = {block: sum(p.numel() for p in block.parameters.values()) for block in rows}
    needed = [
        -(-block.grad_output_dim // (block.grad_output_pieces * rows[block]))
        for block, number in parameters.items()
        if number >= _SMALL * max(parameters.values())
    ]
    return min(max(needed, default=1), MOST_SAMPLES)


def mc_columns(
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    samples: int,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
) -> Iterator[Tensor]:
    """Gradients of the loss for targets drawn from the model: on average, c c^T is its Hessian."""
    for _ in range(samples):
        yield likelihood.sample(outputs, targets, generator, weight) / math.sqrt(samples)


def root_columns(
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    single: bool,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
) -> Iterator[Tensor]:
    """Columns of a root of the loss Hessian, those of all examples together, with random signs.

    Where the model mixes examples, products of the gradients of two of them have no place in the
    sum of g g^T: they cancel on average. Elsewhere there are none, and nothing depends on signs.

    Args:
        likelihood: Of the loss.
        outputs: Of the model.
        targets: As the loss takes them.
        single: Whether the only axis of outputs is that of one example's numbers, also if the loss
            takes them for examples.
        generator: Of the signs.
        weight: As in ``Likelihood.columns``.
    """
    if single:
        weight = None if weight is None else weight.unsqueeze(0)
        columns = likelihood.columns(outputs.unsqueeze(0), targets.unsqueeze(0), weight)
        return (column.squeeze(0) for column in columns)
    columns = likelihood.columns(outputs, targets, weight)
    return (random_signs(column, generator) for column in columns)


def empirical_column(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    single: bool,
) -> Tensor:
    """The gradient of the loss itself, scaled such that sum_n g g^T is the empirical Fisher."""
    with torch.enable_grad():
        predictions = outputs.detach().requires_grad_()
        loss = loss_fn(predictions, targets)
    (gradient,) = torch.autograd.grad(loss, predictions)
    terms = single_factor(likelihood, outputs, targets, single)
    return gradient * torch.as_tensor(terms, dtype=gradient.dtype, device=gradient.device).sqrt()


def single_factor(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor, single: bool
) -> Tensor | int:
    """``empirical_factor``, also of what ``root_columns`` calls single."""
    if single:
        outputs, targets = outputs.unsqueeze(0), targets.unsqueeze(0)
    return empirical_factor(likelihood, outputs.detach(), targets)


def random_signs(column: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Flip whole examples, so that a squared batch gradient has no cross terms on average.

    A layer's factors, sums over examples of g g^T, don't notice.
    """
    signs = torch.empty(column.shape[0], dtype=column.dtype, device=column.device)
    signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    return column * signs.view(-1, *[1] * (column.dim() - 1))
