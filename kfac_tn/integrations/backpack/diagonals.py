"""Diagonals and per-example gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from numbers import Real
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor
from torch.nn import Module

from kfac_tn.columns import is_whole
from kfac_tn.functional import common
from kfac_tn.integrations.backpack.backpropagation import ColumnExtension
from kfac_tn.layers import ConvFamily, ConvTransposeFamily, GradientFamily, LinearFamily
from kfac_tn.likelihood import Likelihood

BackpackFisher: TypeAlias = Literal["mc", "type-2", "empirical"]


class FisherExtension(ColumnExtension):
    """Columns according to a Fisher."""

    def __init__(
        self,
        savefield: str,
        fisher: BackpackFisher,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(savefield)
        if fisher not in get_args(BackpackFisher):
            raise ValueError(f"fisher is {fisher!r}: choose one of {get_args(BackpackFisher)}.")
        if not is_whole(mc_samples) or mc_samples < 1:
            raise ValueError(f"mc_samples is {mc_samples}: it is a whole number, at least 1.")
        self.fisher, self.mc_samples, self.generator = fisher, int(mc_samples), generator
        self.needs_columns = fisher != "empirical"

    def _loss_columns(
        self, likelihood: Likelihood, outputs: Tensor, targets: Any, weight: Tensor | None
    ) -> Iterable[Tensor]:
        if self.fisher == "type-2":
            yield from likelihood.columns(outputs, targets, weight)
            return
        for _ in range(self.mc_samples):
            sample = likelihood.sample(outputs, targets, self.generator, weight)
            yield sample / math.sqrt(self.mc_samples)


class DiagGGNExactTN(FisherExtension):
    """``diag_ggn_exact_tn``: the exact diagonal of the GGN, shaped like the parameter.

    Sums over back-propagated columns and examples of squared gradients (Dangel et al. 2020,
    arXiv 1912.10985). The scale is that of the loss as it is differentiated.

    Args:
        max_memory: Most bytes to hold for squaring gradients of one layer. Default: 64 MiB, or
            what a single gradient takes if that is more. (The columns are held besides.)

    Raises:
        NotImplementedError: During ``backward()``, for what ``kfac_tn.integrations.backpack`` says.
        TypeError: During ``backward()``, for a loss whose likelihood isn't known.
        ValueError: For normalization by a batch's own statistics; a ``max_memory`` too small; an
            empty batch.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> model = extend(torch.nn.Linear(2, 1, bias=False))
        >>> loss_fn = extend(torch.nn.MSELoss(reduction="sum"))
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> with backpack(DiagGGNExactTN()):
        ...     loss_fn(model(x), torch.zeros(2, 1)).backward()
        >>> model.weight.diag_ggn_exact_tn.round(decimals=3)
        tensor([[20.,  8.]])
    """

    def __init__(self, max_memory: int | None = None) -> None:
        super().__init__("diag_ggn_exact_tn", "type-2")
        self.max_memory = _positive(max_memory)

    def _quantities(
        self, module: Module, family: GradientFamily, x: Tensor, columns: Tensor, names: set[str]
    ) -> dict[str, Any]:
        return diagonals(module, family, x, columns, names, self.max_memory)


class DiagGGNMCTN(FisherExtension):
    """``diag_ggn_mc_tn``: an unbiased estimate of the GGN's diagonal, shaped like the parameter.

    Args:
        mc_samples: Samples of the targets from the model; the error falls with their square root.
            Default: 1.
        max_memory: As in ``DiagGGNExactTN``.
        generator: Source of randomness (on the model's device); by default the global one.

    Raises:
        NotImplementedError: This and the following as ``DiagGGNExactTN``.
        TypeError: See there.
        ValueError: See there; and for ``mc_samples`` that are no whole number, at least 1.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> model, loss_fn = extend(torch.nn.Linear(2, 3)), extend(torch.nn.CrossEntropyLoss())
        >>> with backpack(DiagGGNMCTN(mc_samples=10)):
        ...     loss_fn(model(torch.rand(4, 2)), torch.tensor([0, 1, 2, 0])).backward()
        >>> model.weight.diag_ggn_mc_tn.shape, model.bias.diag_ggn_mc_tn.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(
        self,
        mc_samples: int = 1,
        max_memory: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__("diag_ggn_mc_tn", "mc", mc_samples, generator)
        self.max_memory = _positive(max_memory)

    def _quantities(
        self, module: Module, family: GradientFamily, x: Tensor, columns: Tensor, names: set[str]
    ) -> dict[str, Any]:
        return diagonals(module, family, x, columns, names, self.max_memory)


class BatchGradTN(ColumnExtension):
    """``grad_batch_tn``: each example's own gradient, ``[N, *shape]``.

    Rows add up to ``.grad``: they carry the ``1 / N`` of a mean loss, and whatever else the loss is
    multiplied by before ``backward()``. Any loss module does, and any function besides modules
    that treats examples independently.

    Raises:
        NotImplementedError: During ``backward()``, for what ``kfac_tn.integrations.backpack`` says.
        ValueError: For normalization by a batch's own statistics; an empty batch.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> model = extend(torch.nn.Linear(2, 1, bias=False))
        >>> loss_fn = extend(torch.nn.L1Loss(reduction="sum"))
        >>> with backpack(BatchGradTN()):
        ...     loss_fn(model(torch.eye(2)), torch.full((2, 1), -9.0)).backward()
        >>> model.weight.grad_batch_tn
        tensor([[[1., 0.]],
        <BLANKLINE>
                [[0., 1.]]])
    """

    needs_columns = False
    needs_likelihood = False

    def __init__(self) -> None:
        super().__init__("grad_batch_tn")

    def _quantities(
        self, module: Module, family: GradientFamily, x: Tensor, columns: Tensor, names: set[str]
    ) -> dict[str, Any]:
        (g,) = columns
        gradients = {}
        if "weight" in names:
            gradients["weight"] = family.per_example_weight_gradient(module, x, g)
        if "bias" in names:
            gradients["bias"] = family.per_example_bias_gradient(module, g)
        return gradients


def diagonals(
    module: Module,
    family: GradientFamily,
    x: Tensor,
    columns: Tensor,
    names: set[str],
    max_memory: int | None = None,
) -> dict[str, Tensor]:
    """Sums over columns and examples of squared gradients of a weight and a bias."""
    saved = {}
    if "weight" in names:
        # These take all columns at once, and unfold inputs once; families of one's own needn't.
        many = type(family) in (LinearFamily, ConvFamily, ConvTransposeFamily)
        parts = [columns] if many else columns
        terms = [family.weight_diagonal(module, x, part, max_memory) for part in parts]
        saved["weight"] = torch.stack(terms).sum(0)
    if "bias" in names:
        saved["bias"] = _bias_diagonal(module, family, columns.flatten(0, 1), max_memory)
    return saved


def _bias_diagonal(
    module: Module, family: GradientFamily, g: Tensor, max_memory: int | None
) -> Tensor:
    """The sum of squared gradients of a bias, from output gradients of all columns' examples."""
    parameter = cast(Tensor, module.bias)
    needed = 2 * parameter.numel() * common.accumulation_dtype(parameter).itemsize  # and its square
    limit = common.UNFOLD_BYTES if max_memory is None else max_memory
    if max_memory is not None and needed > max_memory:
        raise ValueError(
            f"max_memory={max_memory:,} bytes is too little: one example's gradient of the bias of "
            f"{module} takes {needed:,}"
        )
    squares = (
        family.per_example_bias_gradient(module, part).square().sum(0)
        for part in g.split(max(1, limit // needed))
    )
    return reduce(torch.add, squares)


def _positive(max_memory: int | None) -> int | None:
    """A number of bytes, perhaps given as ``1e9``."""
    if max_memory is None:
        return None
    number = isinstance(max_memory, Real) and not isinstance(max_memory, bool)
    if not number or not 1 <= max_memory < float("inf"):
        raise ValueError(f"max_memory is {max_memory}: it must be a positive number of bytes.")
    return int(max_memory)
