"""The parameters of a layer, as one block of the curvature; and those that are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn.layers.base import Approximation, LayerFamily
from kfac_tn.layers.hidden import HiddenLinear
from kfac_tn.layers.registry import FAMILIES

CurvatureKind: TypeAlias = Literal["kfac", "ekfac", "diagonal", "none"]
LargeFactors: TypeAlias = Literal["auto", "blocks", "diagonal"]

MOST_ROWS = 2048
"""Rows of a block of a factor that is cut. To invert one costs the cube of that: six of these a
ninth of what two of 6144 do."""


@dataclass(frozen=True, eq=False)
class LayerBlock:
    """One weight matrix with its bias, and all the modules that apply it.

    Attributes:
        name: Name of the (first) module in the model.
        modules: The modules that share these very parameters; one unless weights are tied.
        family: How their inputs and output gradients give factors.
        approximation: ``"expand"`` or ``"reduce"``.
        weight: The trainable weight, in each group ``[d_out, d_in]`` (see ``family.transposed``).
        bias: The trainable bias, or None.
        weight_name: Name of the weight in ``model.named_parameters()``.
        bias_name: Name of the bias there, or None.
        groups: Number of groups, each with its own factor pair.
        curvature: ``"kfac"``: B (x) A; ``"ekfac"``: its eigenvectors, with second moments of
            gradients for eigenvalues; ``"diagonal"``: the second moments along unit vectors. (A
            layer whose kind is ``"none"`` has no block.)
        max_dim: Dimension above which a factor is cut into pieces, of which only the blocks on the
            diagonal are kept; None: never.
        large_factors: ``"diagonal"``: pieces of one row; ``"blocks"``: as few as have at most
            ``max_dim`` rows, and ``MOST_ROWS``; ``"auto"``: blocks of input factors, diagonals of
            the others.
    """

    name: str
    modules: tuple[Module, ...]
    family: LayerFamily
    approximation: Approximation
    weight: Parameter
    bias: Parameter | None
    weight_name: str
    bias_name: str | None
    groups: int
    curvature: CurvatureKind = "kfac"
    max_dim: int | None = None
    large_factors: LargeFactors = "auto"

    def constrain(self, direction: Tensor) -> None:
        """Clear, in place, what never changes of the weight from a direction."""
        for module in self.modules:
            self.family.constrain(module, direction)

    @property
    def joint_dim(self) -> int:
        """Rows of the input factor, the bias' one included."""
        return self.input_dim + (self.bias is not None)

    @property
    def input_pieces(self) -> int:
        """Into how many pieces the input factor is cut, in each group."""
        if self.has_diagonal_inputs:
            return self.joint_dim
        return self._pieces(self.joint_dim, "diagonal" if self.family.one_hot else "blocks")

    @property
    def has_diagonal_inputs(self) -> bool:
        """Whether nothing but the diagonal of the input factor isn't zero."""
        return self.family.one_hot and self.approximation == "expand"

    @property
    def grad_output_pieces(self) -> int:
        """Into how many pieces the output-gradient factor is cut, in each group."""
        return self._pieces(self.grad_output_dim, "diagonal")

    def _pieces(self, size: int, auto: LargeFactors) -> int:
        if self.max_dim is None or size <= self.max_dim:
            return 1
        kind = auto if self.large_factors == "auto" else self.large_factors
        return size if kind == "diagonal" else -(-size // min(self.max_dim, MOST_ROWS))

    @property
    def has_factors(self) -> bool:
        """Whether it has Kronecker factors."""
        return self.curvature != "diagonal"

    @property
    def input_dim(self) -> int:
        """Rows d_in of the input factor, without the bias' one."""
        return self.weight.numel() // (self.groups * self.grad_output_dim)

    @property
    def grad_output_dim(self) -> int:
        """Rows d_out of the output-gradient factor, in each group."""
        shape = self.weight.shape
        if self.family.transposed:
            return shape[1]
        return shape[0] // self.groups if shape else 1

    def holds(self) -> bool:
        """Whether its modules still apply these very parameters, in the way of their kind.

        Layers that are pruned, reparametrized or changed otherwise don't; frozen ones do.
        """
        for module in self.modules:
            if not self.owned_by(module) or "forward" in vars(module):
                return False
            if FAMILIES.get(type(module)) is not self.family:
                return False
            if isinstance(module, HiddenLinear) and not module.holds():
                return False
        return True

    def owned_by(self, module: Module) -> bool:
        """Whether a module has these very parameters now; in ``functional_call`` it has others."""
        own = module._parameters
        same_bias = self.bias is None or own.get("bias") is self.bias
        return own.get("weight") is self.weight and same_bias

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The block's trainable parameters by name, weight first."""
        named = {self.weight_name: self.weight}
        if self.bias is not None and self.bias_name is not None:
            named[self.bias_name] = self.bias
        return named


@dataclass(frozen=True, eq=False)
class OtherParameter:
    """A trainable parameter without a Kronecker block, and the reason why it has none."""

    name: str
    parameter: Parameter
    reason: str

    def holds(self, model: Module) -> bool:
        """Whether the model still has it under its name: a layer may be one again."""
        path, _, attribute = self.name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return False
        return module._parameters.get(attribute) is self.parameter

    def block(self) -> LayerBlock:
        """A block of its own, of which only a diagonal can be had."""
        return LayerBlock(
            name=self.name,
            modules=(),
            family=FAMILIES[torch.nn.Linear],
            approximation="expand",
            weight=self.parameter,
            bias=None,
            weight_name=self.name,
            bias_name=None,
            groups=1,
            curvature="diagonal",
        )
