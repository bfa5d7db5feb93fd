"""The likelihoods of torch's own losses.

They are sums of terms ``c * (A(z) - <T(y), z>)``: a coefficient ``c >= 0`` times the negative
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


class _NaturalParameterLikelihood(ABC):
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
        with _plain_arithmetic(outputs):
            outputs = _working(outputs)
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
        with _plain_arithmetic(outputs):
            outputs = _working(outputs)
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


class CrossEntropyLikelihood(_NaturalParameterLikelihood):
    r"""The categorical likelihood of :class:`torch.nn.CrossEntropyLoss`.

    Outputs are logits ``[N, C]``, ``[N, C, d1, ...]`` or ``[C]``; targets class indices (the same
    shape without ``C``) or probabilities (the same shape). Every option counts: ``weight`` w,
    ``ignore_index``, ``label_smoothing`` ε, ``reduction``. With ``p = softmax(z)``, the Hessian at
    one position is ``c (diag(p) - p p^T)`` with

        c = (1 - ε) w_t + ε mean(w),    w_t = w_y (class index) or sum_k w_k q_k (probabilities q),

    0 if the target is ignored. ``"mean"`` divides by the sum of ``w_y`` over targets that aren't
    ignored, for probabilities by the number of positions.

    Positions (``d1, ...``) are independent terms, so each has exact columns of its own, zero
    elsewhere: else a model that mixes positions would bring in cross terms between them. That makes
    ``C - 1`` columns (the rank) per position; with many of either, a Monte-Carlo column, which
    costs one backward pass however many there are, is the cheap choice. So it is if positions were
    flattened into the first dimension (``[N * T, C]``): what happens to be one example for the loss
    is then not independent in the model, and only Monte-Carlo columns have no cross terms on
    average.

    If all targets are ignored, the mean loss is NaN, and so are the columns.

    Example:
        >>> loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, -100])
        >>> likelihood = CrossEntropyLikelihood(loss)
        >>> root = torch.stack(list(likelihood.columns(logits, labels)))
        >>> root.shape  # two columns for three classes
        torch.Size([2, 4, 3])
        >>> p = logits.softmax(1)[0]
        >>> hessian = (p.diag() - p.outer(p)) / 3  # mean over the targets that count
        >>> torch.allclose(root[:, 0].T @ root[:, 0], hessian, atol=1e-6)
        True
        >>> int(likelihood.num_terms(logits, labels))
        3

    References:
        The root is ours: see the comment in :func:`_softmax_columns`. The usual one, ``C`` columns
        ``sqrt(p_v) (e_v - p)``, is in Dangel et al. (2020), appendix A.
    """

    def num_terms(self, outputs: Tensor, targets: Tensor) -> Tensor | int:
        """What ``"mean"`` divides by (see the class), 1 otherwise.

        Raises:
            ValueError: The shapes of outputs and targets don't fit.
        """
        with _plain_arithmetic(outputs):
            return self._terms(_working(outputs), targets)[1] if self.reduction == "mean" else 1

    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        class_dim = _class_dim(outputs)
        num_classes = outputs.shape[class_dim]
        positions = outputs.shape[:class_dim] + outputs.shape[class_dim + 1 :]
        class_weight = (
            outputs.new_ones(num_classes)
            if self.loss.weight is None
            else self.loss.weight.to(outputs.dtype)
        )
        smoothing = self.loss.label_smoothing

        if targets.shape == outputs.shape and targets.is_floating_point():
            probabilities = targets.to(outputs.dtype).movedim(class_dim, -1)
            target_weight = (probabilities * class_weight).sum(-1)
            coefficient = (1 - smoothing) * target_weight + smoothing * class_weight.mean()
            return coefficient, target_weight.numel()

        if targets.shape != positions:
            raise ValueError(
                f"for outputs of shape {tuple(outputs.shape)}, targets must be class indices of "
                f"shape {tuple(positions)} or floating-point probabilities of the shape of the "
                f"outputs, but are of shape {tuple(targets.shape)} and {targets.dtype}"
            )
        labels = targets.long()
        counts = labels != self.loss.ignore_index
        # ignore_index may lie outside of the classes (-100, 255): look up any class instead. (take:
        # indexing with a scalar tensor would fetch it to the host.)
        target_weight = class_weight.take(labels.masked_fill(~counts, 0)) * counts
        coefficient = (1 - smoothing) * target_weight + smoothing * class_weight.mean() * counts
        return coefficient, target_weight.sum()

    def _columns(self, outputs: Tensor, scale: Tensor) -> Iterator[Tensor]:
        root_probabilities = outputs.softmax(_class_dim(outputs)).sqrt()
        return _softmax_columns(root_probabilities, scale)

    def _score(self, outputs: Tensor, generator: Generator | None) -> Tensor:
        class_dim = _class_dim(outputs)
        probabilities = outputs.softmax(class_dim)
        # Of independent exponential clocks with rates p, clock k rings first with probability p_k.
        # (torch.multinomial would synchronise with the host, to check the probabilities.)
        clocks = torch.empty_like(probabilities).exponential_(generator=generator)
        labels = (probabilities / clocks).argmax(class_dim, keepdim=True)
        return probabilities - torch.zeros_like(probabilities).scatter_(class_dim, labels, 1.0)

    def _scaled(self, score: Tensor, scale: Tensor) -> Tensor:
        return score * scale.unsqueeze(_class_dim(score))


class _ElementwiseLikelihood(_NaturalParameterLikelihood):
    """Every output element has a term of its own: the Hessian is diagonal."""

    def _columns(self, outputs: Tensor, scale: Tensor) -> Iterator[Tensor]:
        return _diagonal_columns(scale * self._standard_deviation(outputs))

    @abstractmethod
    def _standard_deviation(self, outputs: Tensor) -> Tensor:
        """``sqrt(A''(outputs))``, elementwise."""


class MSELikelihood(_ElementwiseLikelihood):
    """The Gaussian likelihood of :class:`torch.nn.MSELoss`.

    Outputs and targets ``[N, ...]``, of one shape. The Hessian is ``2 / M`` times the identity,
    ``M`` the number of elements for ``"mean"``, else 1. One exact column per output element of an
    example.

    Example:
        >>> likelihood = MSELikelihood(torch.nn.MSELoss())
        >>> for column in likelihood.columns(torch.zeros(2, 4), torch.ones(2, 4)):
        ...     print(column[0])
        tensor([0.5000, 0.0000, 0.0000, 0.0000])
        tensor([0.0000, 0.5000, 0.0000, 0.0000])
        tensor([0.0000, 0.0000, 0.5000, 0.0000])
        tensor([0.0000, 0.0000, 0.0000, 0.5000])

    References:
        Martens (2020), section 9.2; Dangel et al. (2020), appendix A.
    """

    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        _require_same_shape(outputs, targets)
        # (z - y)^2 is twice the negative log-likelihood of a Gaussian of unit variance
        return torch.full_like(outputs, 2), outputs.numel()

    def _standard_deviation(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def _score(self, outputs: Tensor, generator: Generator | None) -> Tensor:
        return torch.empty_like(outputs).normal_(generator=generator)


class BCEWithLogitsLikelihood(_ElementwiseLikelihood):
    """The Bernoulli likelihood of :class:`torch.nn.BCEWithLogitsLoss`.

    Outputs (logits) and targets (probabilities) ``[N, ...]``, of one shape, to which the loss's
    ``weight`` and ``pos_weight`` broadcast. The Hessian is diagonal, with entries
    ``weight * (1 - y + pos_weight * y) * sigmoid(z) * sigmoid(-z)``, for ``"mean"`` over the number
    of elements. One exact column per output element of an example.

    Example:
        >>> loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
        >>> targets = torch.tensor([[0.0], [1.0]])
        >>> (column,) = BCEWithLogitsLikelihood(loss).columns(torch.zeros(2, 1), targets)
        >>> (column**2).flatten()  # sigmoid(0) * sigmoid(-0) = 1 / 4
        tensor([0.1250, 0.3750])

    References:
        Martens (2020), section 9.2; Dangel et al. (2020), appendix A.
    """

    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        _require_same_shape(outputs, targets)
        targets = targets.to(outputs.dtype)
        coefficient = torch.ones_like(outputs)
        if self.loss.pos_weight is not None:
            coefficient = 1 - targets + self.loss.pos_weight.to(outputs.dtype) * targets
        if self.loss.weight is not None:
            coefficient = coefficient * self.loss.weight.to(outputs.dtype)
        return coefficient, outputs.numel()

    def _standard_deviation(self, outputs: Tensor) -> Tensor:
        # not 1 - sigmoid(z): it cancels for large z
        return (outputs.sigmoid() * (-outputs).sigmoid()).sqrt()

    def _score(self, outputs: Tensor, generator: Generator | None) -> Tensor:
        probabilities = outputs.sigmoid()
        # torch.bernoulli raises (on CUDA, aborts) on NaN, which is for the caller to deal with
        uniform = torch.empty_like(outputs).uniform_(generator=generator)
        return probabilities - (uniform < probabilities).to(outputs.dtype)


@contextmanager
def _plain_arithmetic(outputs: Tensor) -> Iterator[None]:
    """Neither gradients nor autocast, which would compute in half precision."""
    device = outputs.device.type
    autocast = (
        torch.autocast(device, enabled=False)
        if torch.amp.is_autocast_available(device)
        else nullcontext()
    )
    with torch.no_grad(), autocast:
        yield


def _working(outputs: Tensor) -> Tensor:
    """Detached, in float32 at least."""
    return outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))


def _class_dim(outputs: Tensor) -> int:
    return 0 if outputs.ndim == 1 else 1


def _require_same_shape(outputs: Tensor, targets: Tensor) -> None:
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


def _each(shape: torch.Size) -> Iterator[tuple[EllipsisType | int, ...]]:
    """Index each element of trailing dimensions ``shape``, leaving those before them alone."""
    return ((..., *position) for position in product(*map(range, shape)))


def _diagonal_columns(root: Tensor) -> Iterator[Tensor]:
    """Columns of ``diag(root[n])`` for all examples ``n`` at once."""
    for element in _each(root.shape[1:]):
        column = torch.zeros_like(root)
        column[element] = root[element]
        yield column


def _softmax_columns(root_probabilities: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """Columns of a root of ``scale^2 (diag(p) - p p^T)`` at each position.

    Args:
        root_probabilities: ``sqrt(p)``, shaped like the outputs: ``[N, C, d1, ...]`` or ``[C]``.
        scale: Without the ``C``.
    """
    # With the unit vector s = sqrt(p), diag(p) - p p^T = diag(s) (I - s s^T) diag(s). An
    # orthonormal basis of the complement of s, the range of the projection in the middle, are all
    # columns but the first of the Householder reflection I - u u^T / (1 + s_0), u = s + e_0, which
    # takes s to -e_0. So C - 1 columns do; nothing is divided by less than 1; no probability is too
    # small.
    num_classes = root_probabilities.shape[_class_dim(root_probabilities)]
    for position in _each(root_probabilities.shape[2:]):
        s = root_probabilities[position]  # [N, C] or [C]
        diagonal = s * scale[position].unsqueeze(-1)
        u = s.clone()
        u[..., 0] += 1
        for v in range(1, num_classes):
            basis_vector = -u * (s[..., v] / u[..., 0]).unsqueeze(-1)
            basis_vector[..., v] += 1
            column = torch.zeros_like(root_probabilities)
            column[position] = diagonal * basis_vector
            yield column
