"""What every family of layers must say about itself: the small interface behind the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from kfac_tn.functional.common import concatenate
from kfac_tn.functional.rows import rotated_second_moment

Approximation = Literal["expand", "reduce"]


class GradientFamily(ABC):  # noqa: B024 (what a family lacks, it says when asked for)
    """How the inputs and output gradients of a kind of module give each example's own gradient.

    The module's parameters must be called ``weight`` and ``bias``. A family is stateless: every
    method takes the module it speaks of. ``x`` is what the module was called with, ``g`` a gradient
    with respect to what it returned.
    """

    def input_of(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The input among the arguments of a call. Default: the first one, or ``input``.

        Raises:
            ValueError: If other arguments change what the module computes.
        """
        return args[0] if args else kwargs["input"]

    def lacks_batch(self, module: Module, x: Tensor) -> bool:
        """Whether an input is a single example's, without an axis of examples. Default: no."""
        return False

    def per_example_weight_gradient(self, module: Module, x: Tensor, g: Tensor) -> Tensor:
        """What each example alone gives the weight: ``[N, *weight.shape]``."""
        raise NotImplementedError(self._lacks("per_example_weight_gradient"))

    def per_example_bias_gradient(self, module: Module, g: Tensor) -> Tensor:
        """What each example alone gives the bias: ``[N, *bias.shape]``."""
        raise NotImplementedError(self._lacks("per_example_bias_gradient"))

    def columns_together(self, module: Module, g: Tensor, columns: int) -> int:
        """Of so many columns, how many ``columns_diagonal`` is to have at once.

        Default: 1, ``weight_diagonal`` gets them one after the other.
        """
        return 1

    def weight_diagonal(
        self, module: Module, x: Tensor, g: Tensor, max_memory: int | None = None
    ) -> Tensor:
        """The sum over examples of squared per-example gradients, shaped like the weight.

        ``max_memory`` bounds what is held on the way, in bytes; None: a default.
        """
        return self.per_example_weight_gradient(module, x, g).square().sum(0)

    def columns_diagonal(
        self, module: Module, x: Tensor, columns: Sequence[Tensor], max_memory: int | None = None
    ) -> Tensor:
        """The sum of ``weight_diagonal`` over some columns.

        Default: it gets them as one tensor, ``[V, N, ...]``.
        """
        return self.weight_diagonal(module, x, torch.stack(list(columns)), max_memory)

    def _lacks(self, method: str) -> str:
        return (
            f"{type(self).__name__} has no {method}(): see kfac_tn.layers.GradientFamily for what "
            "it is to compute"
        )


class LayerFamily(GradientFamily):
    """How the inputs and output gradients of one kind of module give its Kronecker factors.

    A family is stateless: every method takes the module it speaks of. ``x`` is what the module
    was called with, ``g`` a gradient with respect to what it returned; both may lack the batch
    axis where PyTorch allows that. ``a`` is the vector that one weight row is multiplied with at
    one output position (KFAC's input), followed by a 1 when ``bias`` is true.
    """

    transposed: bool = False
    """Whether the weight is ``[G * C_in, C_out, *K]``, as transposed convolutions have it: d_out is
    the second axis then, and d_in all others. Default: ``[G * d_out, *d_in]``."""

    one_hot: bool = False
    """Whether inputs are indices, which stand for one-hot vectors: the mean of their products is
    diagonal, so ``input_factor`` gives ``[G * d_in, 1, 1]``. Default: no."""

    def lacks_block(self, module: Module) -> str | None:
        """Why a module has no Kronecker block, options considered. Default: it has one."""
        return None

    def called(self, module: Module, x: Tensor, output: Tensor) -> Module:
        """The module with the options of one call, if that had others. Default: the module.

        A gradient at the output may stand for it.
        """
        return module

    def constrain(self, module: Module, direction: Tensor) -> None:
        """Clear, in place, what never changes of a weight from a direction. Default: nothing."""

    @abstractmethod
    def groups(self, module: Module) -> int:
        """Number G of independent groups, each with a factor pair of its own."""

    @abstractmethod
    def batch_and_positions(self, module: Module, output: Tensor) -> tuple[int, int]:
        """Number N of examples and R of positions (over which the weight is shared) of a call."""

    @abstractmethod
    def input_factor(self, module: Module, x: Tensor, bias: bool) -> Tensor:
        """KFAC-expand: the mean of a a^T over examples and positions, ``[G, d_in, d_in]``."""

    @abstractmethod
    def average_input(self, module: Module, x: Tensor, bias: bool) -> Tensor:
        """KFAC-reduce: the mean of a over positions, one row per example, ``[N, G, d_in]``."""

    @abstractmethod
    def grad_output_factor(self, module: Module, g: Tensor) -> Tensor:
        """KFAC-expand: the sum of g g^T over examples and positions, ``[G, d_out, d_out]``."""

    @abstractmethod
    def sum_grad_output(self, module: Module, g: Tensor) -> Tensor:
        """KFAC-reduce: the sum of g over positions, one row per example, ``[N, G, d_out]``."""

    def input_rows(self, module: Module, x: Tensor, bias: bool) -> Tensor:
        """The a of all examples and positions, ``[G, N, R, d_in]``: only EKFAC asks for them."""
        raise NotImplementedError(_NO_ROWS.format(type(self).__name__, type(module).__name__))

    def grad_output_rows(self, module: Module, g: Tensor) -> Tensor:
        """The g of all examples and positions, ``[G, N, R, d_out]``: only EKFAC asks for them."""
        raise NotImplementedError(_NO_ROWS.format(type(self).__name__, type(module).__name__))

    def second_moment(
        self,
        module: Module,
        xs: Sequence[Tensor],
        gs: Sequence[Tensor],
        bias: bool,
        input_vectors: Tensor | None,
        grad_output_vectors: Tensor | None,
    ) -> Tensor:
        """Sum over examples of their squared gradients in a basis: ``[G, d_out, d_in]``.

        Args:
            module: The module.
            xs: Inputs of all its calls: to the weight, these are further shared positions.
            gs: Gradients at their outputs.
            bias: Whether the bias' column is part of it.
            input_vectors: See ``kfac_tn.functional.rows.rotated_second_moment``.
            grad_output_vectors: There, too.
        """
        pairs = zip(xs, gs, strict=True)
        inputs = [self.input_rows(self.called(module, x, g), x, bias) for x, g in pairs]
        grad_outputs = [self.grad_output_rows(module, g) for g in gs]
        return rotated_second_moment(
            concatenate(inputs, 2), concatenate(grad_outputs, 2), input_vectors, grad_output_vectors
        )

    def per_example_bias_gradient(self, module: Module, g: Tensor) -> Tensor:  # noqa: D102
        return self.sum_grad_output(module, g).flatten(1)


_NO_ROWS = (
    "{0}, which describes layers of type {1}, doesn't say what each example contributes: implement "
    "its methods input_rows and grad_output_rows, or use KFAC instead of EKFAC."
)
