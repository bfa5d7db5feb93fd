"""The protocol by which a loss says what its likelihood is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Generator, Tensor


class Likelihood(Protocol):
    """What curvature needs to know of a loss. Implement it to teach the package one of yours.

    Nothing has to be inherited: a loss (an ``nn.Module`` as a rule) that has these four members is
    understood wherever a loss is taken. ``examples/custom_likelihood.py`` is a worked example.

    ``outputs`` are what the loss is given first: the model's predictions, ``[N, ...]`` with
    examples first, or one unbatched prediction where the loss takes one. Columns are detached,
    shaped like ``outputs``, on its device, in its dtype (float32 for half and bfloat16). They carry
    the whole scale of the loss as the user configured it, the ``1 / M`` of a mean included. Avoid
    host synchronisations (``.item()``, ``if tensor``) here: the methods run during training.

    For a loss that isn't the negative log-likelihood of a family in its natural parameters, put the
    Fisher information of the outputs wherever "Hessian" is written: it is positive semi-definite
    always, which a Hessian needn't be.
    """

    @property
    def reduction(self) -> str:
        """``"mean"``, ``"sum"`` or ``"none"``; an attribute will do."""
        ...

    def columns(
        self, outputs: Tensor, targets: Tensor, weight: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the exact root of the loss Hessian.

        Args:
            outputs: The model's predictions.
            targets: As the loss takes them.
            weight: For ``reduction="none"`` only: what the user's own reduction multiplies each
                element of the unreduced loss by, shaped like that, not negative. ``None``: ones.

        Returns:
            V tensors shaped like ``outputs``, such that ``sum_v s_v[n] s_v[n]^T`` is the Hessian of
            the loss with respect to ``outputs[n]``, for every example ``n``.
        """
        ...

    def sample(
        self,
        outputs: Tensor,
        targets: Tensor,
        generator: Generator | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Draw one Monte-Carlo column.

        Args:
            outputs: The model's predictions.
            targets: As the loss takes them.
            generator: Source of randomness, on the device of ``outputs``.
            weight: As in :meth:`columns`.

        Returns:
            ``s``, shaped like ``outputs``, with ``E[s] = 0``, ``E[s[n] s[n]^T]`` the Hessian of the
            loss with respect to ``outputs[n]``, and independent examples.
        """
        ...

    def num_terms(self, outputs: Tensor, targets: Tensor) -> Tensor | int:
        """Count the terms that the reduction averages, ``M``; 1 if it doesn't.

        That is what it divides their sum by, and so the weight of a batch in the mean over several.
        The empirical Fisher is ``M * sum_n g_n g_n^T`` with ``g_n`` the gradient of the reduced
        loss on account of example ``n`` (see ``empirical_factor`` for torch's elementwise losses).
        A tensor where a number would cost a host synchronisation.
        """
        ...
