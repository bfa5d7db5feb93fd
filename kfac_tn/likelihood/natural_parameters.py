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

REDUCTIONS = ("mean", "sum", "none")


class NaturalParameterLikelihood(ABC):
    """A torch loss that is a sum of terms ``c * (A(z) - <T(y), z>)``.

    Holds the loss module itself, not its hyper-parameters: they may change during training.
    """

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self._seen: dict[str, tuple[Tensor, int | None]] = {}  # weights, and their versions
        self._check()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.loss})"

    @property
    def reduction(self) -> str:
        """The loss module's reduction: ``"mean"``, ``"sum"`` or ``"none"``.

        Raises:
            ValueError: It is another by now.
        """
        return check_reduction(self.loss)

    def columns(
        self, outputs: Tensor, targets: Tensor, weight: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the exact root of the loss Hessian; see :meth:`Likelihood.columns`.

        Raises:
            ValueError: The shapes of outputs and targets don't fit; a weight is given although the
                loss is reduced, is not shaped like the unreduced loss, or is negative somewhere; an
                option of the loss can't be honoured (any more).
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
        """What ``"mean"`` divides by, 1 otherwise; see :meth:`Likelihood.num_terms`.

        Raises:
            ValueError: As :meth:`columns`.
        """
        if self.reduction != "mean":
            return 1
        with plain_arithmetic(outputs):
            return self._checked_terms(working(outputs), targets)[1]

    def _coefficient(self, outputs: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """``c`` of each term, reduction and weight included, shaped like the unreduced loss."""
        coefficient, divisor = self._checked_terms(outputs, targets)
        if self.reduction == "none":
            return (
                coefficient if weight is None else coefficient * self._checked(weight, coefficient)
            )
        if weight is not None:
            raise ValueError(
                f"a weight applies to reduction='none' only, but this loss has reduction="
                f"{self.reduction!r} and weighs its terms itself"
            )
        return coefficient / divisor if self.reduction == "mean" else coefficient

    def _checked_terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        self._check()  # again: options may change
        return self._terms(outputs, targets)

    def _check(self) -> None:
        """Refuse options that the loss would refuse when called, or that have no curvature."""
        check_reduction(self.loss)

    def _check_weight(self, name: str) -> None:
        """Refuse one of the loss's own weights that is negative somewhere.

        Its numbers are looked at when it is new or changed: on a GPU that waits for them.
        """
        weight = getattr(self.loss, name)
        # Under a dispatch mode (fake tensors, say) it may have no numbers.
        if weight is None or torch._C._len_torch_dispatch_stack() > 0:
            return
        version = None if weight.is_inference() else weight._version
        seen, of_version = self._seen.get(name, (None, None))
        if seen is weight and of_version == version:
            return
        if (weight < 0).any():
            raise ValueError(
                f"the {name} of {self.loss} is negative somewhere ({float(weight.min()):g}), so "
                f"that its curvature isn't positive semi-definite: give {name}s of 0 or more"
            )
        self._seen[name] = weight, version

    def _checked(self, weight: Tensor, unreduced: Tensor) -> Tensor:
        """What the user's own reduction multiplies by, in the dtype of the unreduced loss."""
        if weight.shape != unreduced.shape:
            raise ValueError(
                f"the weight must have the shape of the unreduced loss, {tuple(unreduced.shape)}, "
                f"but has {tuple(weight.shape)}"
            )
        if (weight < 0).any():
            name = type(self.loss).__name__
            raise ValueError(
                f"the weight that the elements of {self.loss} are multiplied by must not be "
                f"negative: the loss Hessian would have no real root. If these are advantages, the "
                f"policy's Fisher information doesn't depend on them: give the optimizer {name}(), "
                f"call optimizer.observe(outputs, actions) before backward(), and compute the "
                f"objective with another {name}(reduction='none')"
            )
        return weight.detach().to(unreduced.dtype)

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


def check_reduction(loss: Any) -> str:
    """The reduction of a loss, or of a likelihood.

    Raises:
        ValueError: It is none that torch has: whatever isn't known would pass for a sum.
    """
    if loss.reduction not in REDUCTIONS:
        raise ValueError(f"{loss} has reduction={loss.reduction!r}: choose one of {REDUCTIONS}")
    return loss.reduction


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


def each_element(shape: torch.Size) -> Iterator[tuple[EllipsisType | int, ...]]:
    """Index each element of trailing dimensions ``shape``, leaving those before them alone."""
    return ((..., *position) for position in product(*map(range, shape)))


def _diagonal_columns(root: Tensor) -> Iterator[Tensor]:
    """Columns of ``diag(root[n])`` for all examples ``n`` at once."""
    for element in each_element(root.shape[1:]):
        column = torch.zeros_like(root)
        column[element] = root[element]
        yield column
