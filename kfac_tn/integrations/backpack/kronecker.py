"""Kronecker factors, and their eigenvectors with second moments along them."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import Module

from kfac_tn.curvature.compute import check_finite
from kfac_tn.curvature.eigen import Bias
from kfac_tn.curvature.eigh import eigh
from kfac_tn.functional import common, gram
from kfac_tn.functional.rows import rotated_second_moment
from kfac_tn.integrations.backpack.diagonals import BackpackFisher, FisherExtension, diagonals
from kfac_tn.layers import Approximation, GradientFamily, LayerFamily


class KroneckerFactors(NamedTuple):
    """B (x) A in each group, B first as in BackPACK.

    Attributes:
        grad_output: B, ``[G, d_out, d_out]``.
        input: A, ``[G, d_in, d_in]``; ``[G, 1, 1]`` ones for a bias.
    """

    grad_output: Tensor
    input: Tensor


class EigenFactors(NamedTuple):
    """(Q_B (x) Q_A) diag(values) (Q_B (x) Q_A)^T in each group.

    Attributes:
        grad_output_vectors: Q_B, ``[G, d_out, d_out]``, eigenvectors in columns.
        input_vectors: Q_A, ``[G, d_in, d_in]``; ones ``[G, 1, 1]`` for a bias.
        values: ``[G, d_out, d_in]``.
    """

    grad_output_vectors: Tensor
    input_vectors: Tensor
    values: Tensor


class _KroneckerExtension(FisherExtension):
    """Kronecker factors of layers, diagonals of normalizations."""

    field: str  # where results are saved
    approximation: Approximation

    def __init__(
        self,
        fisher: BackpackFisher = "mc",
        mc_samples: int = 1,
        bias: Bias = "separate",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(self.field, fisher, mc_samples, generator)
        if bias not in get_args(Bias):
            raise ValueError(f"bias is {bias!r}: choose one of {get_args(Bias)}.")
        self.bias = bias

    def _quantities(
        self, module: Module, family: GradientFamily, x: Tensor, columns: Tensor, names: set[str]
    ) -> dict[str, Any]:
        if not isinstance(family, LayerFamily) or family.one_hot:
            return diagonals(module, family, x, columns, names)
        joint = self.bias == "joint" and names == {"weight", "bias"}
        g = columns.flatten(0, 1)  # to B, several columns are further examples
        if self.approximation == "expand":
            b = family.grad_output_factor(module, g)
        else:
            b = gram(family.sum_grad_output(module, g))
        ones = b.new_ones(len(b), 1, 1)
        saved: dict[str, Any] = {"bias": None}  # joint: it is part of its weight's
        if "weight" in names:
            if self.approximation == "expand":
                a = family.input_factor(module, x, joint)
            else:
                a = gram(family.average_input(module, x, joint)) / columns.shape[1]
            saved["weight"] = self._block(module, family, x, columns, KroneckerFactors(b, a), joint)
        if not joint and "bias" in names:
            saved["bias"] = self._block(module, family, None, columns, KroneckerFactors(b, ones))
        return saved

    def _block(
        self,
        module: Module,
        family: LayerFamily,
        x: Tensor | None,
        columns: Tensor,
        factors: KroneckerFactors,
        joint: bool = False,
    ) -> Any:
        """What is saved for a weight, or (x is None) a bias."""
        return factors


class KFACExpand(_KroneckerExtension):
    """``kfac_expand``: KFAC's Kronecker factors, for weights whose shared positions' losses add up.

    On a weight ``KroneckerFactors(B, A)``, per group, of the scale that ``kfac_tn.functional``
    documents: B carries that of the loss, A is a mean; their order is BackPACK's. A weight's row is
    flattened as in ``weight.flatten(1)`` (transposed convolutions: of each group, input channels,
    then kernel positions). On a bias ``(B, 1)``. On the parameters of normalizations, which have no
    Kronecker structure, the GGN's diagonal as a tensor. (Grosse & Martens 2016, arXiv 1602.01407.)

    Args:
        fisher: ``"mc"`` (default): targets drawn from the model; ``"type-2"``: exact, a column for
            each output of an example; ``"empirical"``: gradients at the true targets.
        mc_samples: Default: 1.
        bias: ``"separate"`` (default), or ``"joint"``: a bias is coupled to its weight, whose A has
            a last row and column for it, and itself has None.
        generator: Source of randomness (on the model's device); by default the global one.

    Raises:
        NotImplementedError: During ``backward()``, for what ``kfac_tn.integrations.backpack`` says.
        TypeError: During ``backward()``, for a loss whose likelihood isn't known.
        ValueError: For unknown options; normalization by a batch's own statistics; an empty batch.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> model = extend(torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2),
        ...                                    torch.nn.Flatten(), torch.nn.Linear(6, 2)))
        >>> loss_fn = extend(torch.nn.CrossEntropyLoss())
        >>> with backpack(KFACExpand(fisher="type-2")):
        ...     loss_fn(model(torch.rand(8, 4, 3, 3)), torch.arange(8) % 2).backward()
        >>> B, A = model[0].weight.kfac_expand
        >>> B.shape, A.shape
        (torch.Size([2, 3, 3]), torch.Size([2, 18, 18]))
    """

    field = "kfac_expand"
    approximation = "expand"


class KFACReduce(_KroneckerExtension):
    """``kfac_reduce``: KFAC's Kronecker factors, for weights whose shared positions are averaged.

    As ``KFACExpand``, but inputs are averaged and output gradients summed over positions before the
    outer products (Eschenhagen et al. 2023, arXiv 2311.00636), which is cheaper.

    Args:
        fisher: This and the following as in ``KFACExpand``.
        mc_samples: Default: 1.
        bias: Default: ``"separate"``.
        generator: Default: the global one.

    Raises:
        NotImplementedError: This and the following as ``KFACExpand``.
        TypeError: See there.
        ValueError: See there.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> model = extend(torch.nn.Sequential(torch.nn.Conv1d(1, 2, 2, padding_mode="circular",
        ...                                                    padding=1), torch.nn.Flatten()))
        >>> loss_fn = extend(torch.nn.MSELoss())
        >>> with backpack(KFACReduce(bias="joint")):
        ...     loss_fn(model(torch.rand(8, 1, 3)), torch.rand(8, 8)).backward()
        >>> [factor.shape for factor in model[0].weight.kfac_reduce], model[0].bias.kfac_reduce
        ([torch.Size([1, 2, 2]), torch.Size([1, 3, 3])], None)
    """

    field = "kfac_reduce"
    approximation = "reduce"


class EKFAC(_KroneckerExtension):
    """``ekfac``: the eigenvectors of KFAC's factors, and second moments of gradients along them.

    On a weight ``EigenFactors(Q_B, Q_A, values)``, per group: values are the sums over examples and
    columns of (Q_B^T G Q_A)^2, so that the block's trace is that of the GGN (George et al. 2018,
    Eq. 10). Both are of the same batch and, for ``"mc"``, the same samples. On a bias (Q_B, 1,
    values); on the parameters of normalizations the GGN's diagonal as a tensor.

    Args:
        approximation: ``"expand"`` (default) or ``"reduce"``: of the factors whose eigenvectors are
            taken.
        fisher: This and the following as in ``KFACExpand``.
        mc_samples: Default: 1.
        bias: Default: ``"separate"``.
        generator: Default: the global one.

    Raises:
        NotImplementedError: This and the following as ``KFACExpand``.
        TypeError: See there.
        ValueError: See there; and during ``backward()``, for factors that aren't finite.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> model, loss_fn = extend(torch.nn.Linear(3, 2)), extend(torch.nn.CrossEntropyLoss())
        >>> with backpack(EKFAC(fisher="type-2")):
        ...     loss_fn(model(torch.rand(8, 3)), torch.arange(8) % 2).backward()
        >>> model.weight.ekfac.values.shape, model.bias.ekfac.values.shape
        (torch.Size([1, 2, 3]), torch.Size([1, 2, 1]))
    """

    field = "ekfac"

    def __init__(
        self,
        approximation: Approximation = "expand",
        fisher: BackpackFisher = "mc",
        mc_samples: int = 1,
        bias: Bias = "separate",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(fisher, mc_samples, bias, generator)
        common.check_approximation(approximation)
        self.approximation = approximation

    def _block(
        self,
        module: Module,
        family: LayerFamily,
        x: Tensor | None,
        columns: Tensor,
        factors: KroneckerFactors,
        joint: bool = False,
    ) -> EigenFactors:
        check_finite(str(module), *factors)
        (_, q_b), (_, q_a) = eigh(factors.grad_output), eigh(factors.input)
        if x is None:
            sums = family.sum_grad_output(module, columns.flatten(0, 1))  # [V N, G, d_out]
            values = (sums.transpose(0, 1) @ q_b).square().sum(1).unsqueeze(-1)
            return EigenFactors(q_b, q_a, values)
        _, positions = family.batch_and_positions(module, columns[0])
        groups, d_out, d_in = len(q_b), q_b.shape[-1], q_a.shape[-1]
        written = 2 * groups * (positions * (d_in + d_out) + d_in * d_out)
        size = max(1, common.UNFOLD_BYTES // (written * q_a.itemsize))
        values = q_b.new_zeros(groups, d_out, d_in)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            a = family.input_rows(module, x[part], joint)
            for column in columns:
                g = family.grad_output_rows(module, column[part])
                values += rotated_second_moment(a, g, q_a, q_b)
        return EigenFactors(q_b, q_a, values)
