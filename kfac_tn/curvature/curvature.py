"""The curvature of a model: a block-diagonal matrix over its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar, cast, get_args

import torch
from torch import Size, Tensor

from kfac_tn.curvature.kronecker import Block, Damping, split_vector

Vector = TypeVar("Vector", Tensor, dict[str, Tensor])


@dataclass(frozen=True)
class Curvature:
    """A block-diagonal approximation of the GGN (the Fisher) over all trainable parameters.

    The scale is that of the loss as the user computes it. A vector is a dict by parameter name
    (each entry shaped like its parameter) or one flat vector ``[P]``, parameters in the order of
    ``model.named_parameters()``; results come in the same form.

    Attributes:
        blocks: By layer name for layers, by parameter name for parameters without Kronecker
            structure.
        shapes: Shape of each parameter, in the order of the flat vector.

    Example:
        >>> import torch, kfac_tn
        >>> model, loss_fn = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> curvature = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2")
        >>> curvature @ torch.tensor([1.0, 2.0, 3.0])
        tensor([1., 2., 6.])
        >>> curvature.inverse(damping=1.0) @ torch.tensor([1.0, 2.0, 3.0])
        tensor([0.5000, 1.0000, 1.0000])
    """

    blocks: dict[str, Block]
    shapes: dict[str, Size]

    def __matmul__(self, v: Vector) -> Vector:
        """Multiply with a vector (dict or flat).

        Raises:
            ValueError: If names or shapes aren't those of the parameters.
        """
        if isinstance(v, Tensor):
            size = sum(shape.numel() for shape in self.shapes.values())
            if v.shape != (size,):
                raise ValueError(
                    f"A flat vector here has shape [{size}] (all parameters, in order), "
                    f"not {list(v.shape)}."
                )
            product = self @ split_vector(v, self.shapes)
            return torch.cat([entry.reshape(-1) for entry in product.values()])
        self._check(v)
        products: dict[str, Tensor] = {}
        for block in self.blocks.values():
            products.update(block @ v)
        return cast(Vector, {name: products[name] for name in self.shapes})

    def inverse(self, damping: float, split: Damping = "exact") -> Curvature:
        """(curvature + damping I)^-1, block by block.

        Args:
            damping: Positive; in the units of the curvature.
            split: ``"exact"``: what the formula says, by eigendecompositions of the factors.
                ``"pi"``: the damping is divided between the factors of each Kronecker block
                (Martens & Grosse 2015, Section 6.3), as optimizers do because it is cheaper.

        Raises:
            ValueError: If the damping isn't positive or ``split`` unknown.
        """
        if not damping > 0:
            raise ValueError(f"damping is {damping}: it must be positive.")
        if split not in get_args(Damping):
            raise ValueError(f"split is {split!r}: choose one of {get_args(Damping)}.")
        blocks = {name: block.inverse(damping, split) for name, block in self.blocks.items()}
        return Curvature(blocks, self.shapes)

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal by parameter name, each entry shaped like its parameter."""
        entries: dict[str, Tensor] = {}
        for block in self.blocks.values():
            entries.update(block.diagonal())
        return {name: entries[name] for name in self.shapes}

    def trace(self) -> Tensor:
        """The sum of all diagonal entries, a scalar."""
        return torch.stack([block.trace() for block in self.blocks.values()]).sum()

    def to_dense(self) -> Tensor:
        """The matrix ``[P, P]``, in the order of the flat vector: for small models and tests."""
        entry = next(iter(self.diagonal().values()))
        size = sum(shape.numel() for shape in self.shapes.values())
        eye = torch.eye(size, dtype=entry.dtype, device=entry.device)
        return torch.stack([self @ row for row in eye], dim=1)

    def _check(self, v: Mapping[str, Tensor]) -> None:
        if v.keys() != self.shapes.keys():
            raise ValueError(
                "A vector needs one entry for each parameter: missing "
                f"{sorted(self.shapes.keys() - v.keys())}, unknown "
                f"{sorted(v.keys() - self.shapes.keys())}."
            )
        for name, shape in self.shapes.items():
            if v[name].shape != shape:
                raise ValueError(
                    f"Entry '{name}' has shape {list(v[name].shape)}, its parameter {list(shape)}."
                )
