"""Kronecker factors as laplace-torch takes them: averages over batches, and groups of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kfac_tn.integrations.optional import load

_Kron: Any = load("laplace.utils", "laplace-torch>=0.3").Kron
_KronDecomposed: Any = load("laplace.utils", "laplace-torch>=0.3").KronDecomposed

Factors: TypeAlias = "list[Tensor]"  # of one segment of the flat parameters: [B, A] or [block]


class AveragedKron(_Kron):
    """A ``laplace.utils.Kron`` whose input factors are means over all positions of all examples.

    laplace-torch weighs those of batches by numbers of examples. Where these have different numbers
    of positions, sums are corrected to be means over all of them.

    Args:
        kfacs: Factors of all segments, in order.
        positions: By segment, the number of vectors for each example that its input factor is a
            mean over; None if that isn't known, and examples alone count.
        share: Of all examples, by which input factors are multiplied.
    """

    def __init__(
        self, kfacs: list[Factors], positions: Sequence[float] | None = None, share: float = 1.0
    ) -> None:
        super().__init__(kfacs)
        self.positions, self._share = positions, share
        self._trace = _trace_of_inputs(kfacs)

    @property
    def share(self) -> float:
        """Of all examples by now: when it goes on, laplace-torch discounts what it has in place."""
        now = _trace_of_inputs(self.kfacs)
        return self._share if now == self._trace else self._share * now / self._trace

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, AveragedKron):
            return self.__radd__(other)
        kfacs, mine, theirs = super().__add__(other).kfacs, self.share, other.share
        if self.positions is None or other.positions is None:
            return self._like(kfacs, None, mine + theirs)
        positions = []
        both = zip(self.kfacs, other.kfacs, self.positions, other.positions, strict=True)
        for factors, (ours, others, p, q) in zip(kfacs, both, strict=True):
            vectors = (mine * p + theirs * q) / (mine + theirs)
            if len(factors) == 2 and p != q:
                factors[1] = (p * ours[1] + q * others[1]) / vectors
            positions.append(p if p == q else vectors)
        return self._like(kfacs, positions, mine + theirs)

    def __radd__(self, other: Any) -> Any:
        # What laplace-torch starts with, zeros for each parameter; or what it has loaded.
        return _Kron.__add__(other, self) if _is_started(other) else self

    def __mul__(self, scalar: float | Tensor) -> Any:
        return self._like(super().__mul__(scalar).kfacs, self.positions, self.share)

    __rmul__ = __mul__

    def _like(
        self, kfacs: list[Factors], positions: Sequence[float] | None, share: float
    ) -> AveragedKron:
        return AveragedKron(kfacs, positions, share)


class GroupedKron(AveragedKron):
    """A ``laplace.utils.Kron`` whose segments needn't be the parameters, nor lie in their order.

    A grouped convolution has a segment for each group. That of a transposed one lies by rows of
    output channels, its weight by input channels; its input factor has a leading axis of size 1, so
    that a plain ``Kron``, which doesn't know of any order, can't take it for another.

    Args:
        kfacs: Factors of all segments, in order.
        counts: Number of segments of each parameter.
        order: Where the segments' entries lie among the flat parameters, ``[P]``.
        positions: This and the following as in ``AveragedKron``.
        share: See there.
    """

    def __init__(
        self,
        kfacs: list[Factors],
        counts: Sequence[int],
        order: Tensor,
        positions: Sequence[float] | None = None,
        share: float = 1.0,
    ) -> None:
        super().__init__(kfacs, positions, share)
        self.counts, self.order = tuple(counts), order

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, GroupedKron):
            return self.__radd__(other)
        if self.counts != other.counts or not torch.equal(self.order, other.order):
            raise ValueError("Kronecker factors of different models can't be added.")
        return super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        # zeros for each parameter know nothing of groups
        if _is_started(other) or len(other) != len(self.counts):
            raise ValueError("Kronecker factors with groups and without can't be added.")
        return self

    def _like(
        self, kfacs: list[Factors], positions: Sequence[float] | None, share: float
    ) -> GroupedKron:
        return GroupedKron(kfacs, self.counts, self.order, positions, share)

    def decompose(self, damping: bool = False) -> GroupedKronDecomposed:
        """By the eigenvalues of all factors."""
        plain = self._segments().decompose(damping)
        arrangement = self.counts, self.order
        return GroupedKronDecomposed(
            plain.eigenvectors, plain.eigenvalues, *arrangement, damping=damping
        )

    def _bmm(self, W: Tensor) -> Tensor:
        return self._segments()._bmm(W[..., self.order])[..., self.order.argsort()]

    def logdet(self) -> Tensor:
        """Of all segments."""
        return self._segments().logdet()

    def diag(self) -> Tensor:
        """The diagonal, ``[P]``."""
        return self._segments().diag()[self.order.argsort()]

    def to_matrix(self) -> Tensor:
        """The matrix, ``[P, P]``."""
        back = self.order.argsort()
        return self._segments().to_matrix()[back][:, back]

    def _segments(self) -> Any:
        """One after another, in an order of their own."""
        return _Kron([[f.squeeze(0) if f.ndim == 3 else f for f in each] for each in self.kfacs])


class GroupedKronDecomposed(_KronDecomposed):
    """The eigendecomposition of a ``GroupedKron``, plus a prior precision for each parameter."""

    def __init__(
        self,
        eigenvectors: list[Factors],
        eigenvalues: list[Factors],
        counts: Sequence[int],
        order: Tensor,
        deltas: Tensor | None = None,
        damping: bool = False,
    ) -> None:
        super().__init__(eigenvectors, eigenvalues, deltas, damping)
        self.counts, self.order = tuple(counts), order

    def __add__(self, deltas: Tensor) -> GroupedKronDecomposed:
        if deltas.ndim == 1 and len(deltas) == len(self.counts):
            deltas = deltas.repeat_interleave(torch.tensor(self.counts, device=deltas.device))
        return self._like(super().__add__(deltas))

    __radd__ = __add__

    def __mul__(self, scalar: float | Tensor) -> GroupedKronDecomposed:
        return self._like(super().__mul__(scalar))

    __rmul__ = __mul__

    def _bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        return super()._bmm(W[..., self.order], exponent)[..., self.order.argsort()]

    def diag(self, exponent: float = 1) -> Tensor:
        """The diagonal, ``[P]``, of a power."""
        return super().diag(exponent)[self.order.argsort()]

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """A power, ``[P, P]``."""
        back = self.order.argsort()
        return super().to_matrix(exponent)[back][:, back]

    def _like(self, plain: Any) -> GroupedKronDecomposed:
        arrangement = self.counts, self.order
        return GroupedKronDecomposed(
            plain.eigenvectors, plain.eigenvalues, *arrangement, plain.deltas, plain.damping
        )


def _is_started(kron: Any) -> bool:
    """Whether it has more than the zeros that laplace-torch starts with."""
    return any(bool(factor.any()) for factors in kron.kfacs for factor in factors)


def _trace_of_inputs(kfacs: list[Factors]) -> float:
    """Of all input factors together."""
    return sum(float(f[1].diagonal(dim1=-2, dim2=-1).sum()) for f in kfacs if len(f) == 2)
