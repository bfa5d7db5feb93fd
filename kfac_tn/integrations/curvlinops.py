"""Curvature as a linear operator of curvlinops (``pip install curvlinops-for-pytorch``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from kfac_tn.curvature.block import Damping
from kfac_tn.curvature.curvature import Curvature
from kfac_tn.integrations.optional import load

# The base class is the same in curvlinops 3 and on its main branch: shapes in and out, `_matmat`,
# `_adjoint`, `device` and `dtype`.
_Base: Any = load("curvlinops._torch_base", "curvlinops-for-pytorch>=3.0.1").PyTorchLinearOperator


class CurvatureOperator(_Base):
    """A curvature that curvlinops can use; made by ``as_linear_operator``.

    ``trace``, ``det``, ``logdet`` and ``frobenius_norm`` are methods, as on curvlinops' main
    branch, and exact.

    Attributes:
        curvature: The curvature.
        names: Names of its parameters, in the order of the operator's rows and columns.
    """

    SELF_ADJOINT = True

    def __init__(self, curvature: Curvature, names: Collection[str]) -> None:
        shapes = [tuple(curvature.shapes[name]) for name in names]
        super().__init__(shapes, shapes)
        self.curvature, self.names = curvature, tuple(names)
        kinds = {(entry.device, entry.dtype) for entry in curvature.diagonal().values()}
        if len(kinds) > 1:
            raise ValueError(
                "A linear operator has one device and one dtype, but this curvature's blocks are "
                f"in {sorted(map(str, kinds))}: take `curvature.to(device, dtype)`."
            )
        ((self._device, self._dtype),) = kinds

    @property
    def device(self) -> torch.device:
        """Where vectors have to be."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What vectors have to be of."""
        return self._dtype

    def _matmat(self, columns: list[Tensor]) -> list[Tensor]:
        """Multiply with entries ``[*shape, K]``, one for each parameter."""
        product = self.curvature @ dict(zip(self.names, columns, strict=True))
        return [product[name] for name in self.names]

    def _adjoint(self) -> CurvatureOperator:
        return self  # inverses in curvlinops ask for it even if SELF_ADJOINT

    def trace(self) -> Tensor:
        """The exact trace, a scalar."""
        return self.curvature.trace()

    def frobenius_norm(self) -> Tensor:
        """The exact Frobenius norm, a scalar."""
        return self.curvature.frobenius_norm()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """The exact logarithm of the determinant of curvature + damping I; see ``Curvature``."""
        return self.curvature.logdet(damping)

    def det(self, damping: float = 0.0) -> Tensor:
        """The exact determinant of curvature + damping I; see ``Curvature``."""
        return self.curvature.det(damping)

    def inverse(self, damping: float, split: Damping = "exact") -> CurvatureOperator:
        """(curvature + damping I)^-1, without iterations; see ``Curvature.inverse``."""
        return CurvatureOperator(self.curvature.inverse(damping, split), self.names)


def as_linear_operator(
    curvature: Curvature, parameters: Iterable[str] | None = None
) -> CurvatureOperator:
    """A curvature as a ``PyTorchLinearOperator`` of curvlinops, for everything that takes one.

    Products, sums and scalings with curvlinops' own operators, its estimators of traces, diagonals,
    norms and spectra, its submatrices and iterative inverses, and SciPy through ``to_scipy``.
    Written for curvlinops 3.0.1 and for its main branch.

    Args:
        curvature: Over P parameters, on one device and in one dtype. Its scale is that of the loss
            as the user computes it, as in curvlinops.
        parameters: Names of those that rows and columns are about, each once, in their order: that
            of the operators this one is to meet. A dict by name, as curvlinops' main branch takes
            it, will do. Default: all, in the order of ``model.named_parameters()`` (frozen ones
            left out).

    Returns:
        The operator of shape ``(P, P)``. It multiplies with vectors ``[P]``,
        matrices ``[P, K]``, and lists with one tensor for each parameter, shaped like it or with
        one axis of K columns more.

    Raises:
        ValueError: If the curvature is in several dtypes or on several devices; for parameters that
            it isn't over, repeated ones, or those whose part of it has no structure
            (``Curvature.submatrix``).
        TypeError: If it is no ``Curvature``, or ``parameters`` a set, which has no order.

    Example:
        >>> import curvlinops, torch, kfac_tn
        >>> model, loss_fn = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> curvature = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2")
        >>> operator = as_linear_operator(curvature)
        >>> operator @ torch.tensor([1.0, 2.0, 3.0])
        tensor([1., 2., 6.])
        >>> ggn = curvlinops.GGNLinearOperator(model, loss_fn, list(model.parameters()), data)
        >>> (ggn - operator) @ torch.tensor([0.0, 0.0, 1.0])  # what the blocks leave out
        tensor([1., 1., 0.])
    """
    if not isinstance(curvature, Curvature):
        raise TypeError(
            f"as_linear_operator takes a kfac_tn.Curvature (of compute_kfac, compute_ekfac), not a "
            f"{type(curvature).__name__}."
        )
    if isinstance(parameters, set | frozenset):
        raise TypeError(
            "parameters is a set, but the operator's rows and columns have an order: give a list."
        )
    if parameters is None:
        parameters = curvature.shapes
    names = parameters if isinstance(parameters, str) else list(parameters)
    return CurvatureOperator(curvature.submatrix(names), names)
