"""Likelihoods of exponential families in their natural parameters: what they have in common.

Losses are sums of terms ``c * (A(z) - <T(y), z>)``: a coefficient ``c >= 0`` times the negative
log-likelihood, up to constants, of an exponential family with natural parameter ``z``, the model's
outputs. Hence the Hessian is ``c * A''(z) = c * Cov[T]``: it equals the Fisher information, targets
enter it through the coefficient alone, and ``sqrt(c) * (E[T] - T)``, with ``T`` drawn from the
model, is a Monte-Carlo column.

References:
    J. Martens (2020), New insights and perspectives on the natural gradient method, JMLR 21,
    section 9.2 (Fisher = GGN in natural parameters). F. Dangel, F. Kunstner, P. Hennig (2020),
    BackPACK: Packing more into backprop, ICLR, appendix A (back-propagation of a root of the loss
    Hessian).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from types import EllipsisType
from typing import Any

import torch
from torch import Generator, Tensor


class NaturalParameterLikelihood(ABC):
    """A torch loss that is a sum of terms ``c * (A(z) - <T(y), z>)``.

    Holds the loss module itself, not its hyper-parameters: they may change during training.
    """

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.loss})"

    @property
    def reduction(self) -> str:
        """The loss module's reduction: ``"mean"``, ``"sum"`` or ``"none"``."""
        return self.loss.reduction

    def columns(
        self, outputs: Tensor, targets: Tensor, weight: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the exact root of the loss Hessian; see :meth:`Likelihood.columns`.

        Raises:
            ValueError: The shapes of outputs and targets don't fit; a weight is given although the
                loss is reduced, is not shaped like the unreduced loss, or is negative somewhere.
        """
        # Not a generator itself: errors are raised by the call, and no context outlives it.
        with plain_arithmetic(outputs):
            outputs = working(outputs)
            return self._columns(outputs, self._coefficient(outputs, targets, weight).sqrt())

    def sample(
        self,
        outputs: Tensor,
        targets: Tensor,
        generator: Generator | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Draw one Monte-Carlo column; see :meth:`Likelihood.sample`.

        The gradient of a term's negative log-likelihood at a target drawn from the model, times the
        root of the term's coefficient.

        Raises:
            ValueError: As :meth:`columns`.
        """
        with plain_arithmetic(outputs):
            outputs = working(outputs)
            scale = self._coefficient(outputs, targets, weight).sqrt()
            return self._scaled(self._score(outputs, generator), scale)

    def num_terms(self, outputs: Tensor, targets: Tensor) -> Tensor | int:
        """Count the examples under a mean, 1 otherwise; see :meth:`Likelihood.num_terms`."""
        if self.reduction != "mean" or outputs.ndim == 0:
            return 1
        return outputs.shape[0]

    def _coefficient(self, outputs: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """``c`` of each term, reduction and weight included, shaped like the unreduced loss."""
        coefficient, divisor = self._terms(outputs, targets)
        if self.reduction == "none":
            return coefficient if weight is None else coefficient * _checked(weight, coefficient)
        if weight is not None:
            raise ValueError(
                f"a weight applies to reduction='none' only, but this loss has reduction="
                f"{self.reduction!r} and weighs its terms itself"
            )
        return coefficient / divisor if self.reduction == "mean" else coefficient

    @abstractmethod
    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        """Coefficients of the unreduced loss, and what ``"mean"`` divides their sum by."""

    @abstractmethod
    def _columns(self, outputs: Tensor, scale: Tensor) -> Iterator[Tensor]:
        """Columns of a root of ``scale^2 * A''(outputs)``."""

    @abstractmethod
    def _score(self, outputs: Tensor, generator: Generator | None) -> Tensor:
        """``E[T] - T`` for a draw from the model, shaped like ``outputs``."""

    def _scaled(self, score: Tensor, scale: Tensor) -> Tensor:
        """``score``, shaped like outputs, times ``scale``, shaped like the unreduced loss."""
        return score * scale


class ElementwiseLikelihood(NaturalParameterLikelihood):
    """Every output element has a term of its own: the Hessian is diagonal."""

    def _columns(self, outputs: Tensor, scale: Tensor) -> Iterator[Tensor]:
        return _diagonal_columns(scale * self._standard_deviation(outputs))

    @abstractmethod
    def _standard_deviation(self, outputs: Tensor) -> Tensor:
        """``sqrt(A''(outputs))``, elementwise."""


@contextmanager
def plain_arithmetic(outputs: Tensor) -> Iterator[None]:
    """Neither gradients nor autocast, which would compute in half precision."""
    device = outputs.device.type
    autocast = (
        torch.autocast(device, enabled=False)
        if torch.amp.is_autocast_available(device)
        else nullcontext()
    )
    with torch.no_grad(), autocast:
        yield


def working(outputs: Tensor) -> Tensor:
    """Detached, in float32 at least."""
    return outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))


def require_same_shape(outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets that would broadcast."""
    # torch would broadcast a mean squared error, and [N, 1] against [N] isn't what anybody means
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets must have the shape of the outputs, {tuple(outputs.shape)}, but have "
            f"{tuple(targets.shape)}"
        )


def _checked(weight: Tensor, unreduced: Tensor) -> Tensor:
    if weight.shape != unreduced.shape:
        raise ValueError(
            f"the weight must have the shape of the unreduced loss, {tuple(unreduced.shape)}, but "
            f"has {tuple(weight.shape)}"
        )
    if (weight < 0).any():
        raise ValueError(
            "the weight must not be negative: the loss Hessian would have no real root"
        )
    return weight.detach().to(unreduced.dtype)


def each_element(shape: torch.Size) -> Iterator[tuple[EllipsisType | int, ...]]:
    """Index each element of trailing dimensions ``shape``, leaving those before them alone."""
    return ((..., *position) for position in product(*map(range, shape)))


def _diagonal_columns(root: Tensor) -> Iterator[Tensor]:
    """Columns of ``diag(root[n])`` for all examples ``n`` at once."""
    for element in each_element(root.shape[1:]):
        column = torch.zeros_like(root)
        column[element] = root[element]
        yield column
