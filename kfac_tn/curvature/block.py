"""What a block of the curvature can do, and the blocks that are no single Kronecker product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Damping: TypeAlias = Literal["exact", "pi"]
Scalar: TypeAlias = "float | Tensor"


class Block(ABC):
    """A symmetric positive semi-definite block of the curvature, over one or more parameters.

    Vectors are dicts by parameter name, their entries shaped ``[*batch, *shape]``: any leading axes
    are those of a batch of vectors. Blocks are immutable.

    All functions of a block (inverse, roots, determinants) are functions of its eigenvalues. The
    tensors it is made of have other names for every kind of block.
    """

    def __getattr__(self, name: str) -> Any:
        """Say which tensors there are; so type checkers let users ask for those of each kind."""
        parts = list(getattr(type(self), "__dataclass_fields__", ()))
        raise AttributeError(f"A {type(self).__name__} has no {name!r}; its parts are {parts}.")

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""

    @abstractmethod
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply with a vector, or a batch of vectors."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """All eigenvalues, not negative, in no particular order."""

    @abstractmethod
    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> Block:
        """The block with the same eigenvectors and functions of the eigenvalues, elementwise."""

    @abstractmethod
    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal, shaped like the parameters."""

    @abstractmethod
    def scale(self, factor: Scalar) -> Block:
        """The block times a number that isn't negative."""

    @abstractmethod
    def add(self, other: Block) -> Block:
        """The sum with a block over the same parameters.

        Raises:
            ValueError: If it isn't of a kind that can be added.
        """

    @abstractmethod
    def restrict(self, names: Collection[str]) -> Block:
        """Rows and columns of some of its parameters.

        Raises:
            ValueError: If that has no structure to exploit.
        """

    def inverse(self, damping: Scalar, split: Damping = "exact") -> Block:
        """(block + damping I)^-1; see ``Curvature.inverse``."""
        if split != "exact":
            raise ValueError(
                f"split={split!r} divides the damping between two Kronecker factors, but the "
                f"eigenvalues of the block of {', '.join(self.names)} are no products of theirs: "
                "use split='exact'."
            )
        return self.map_eigenvalues(lambda values: (values + damping).reciprocal())

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        return torch.stack([entry.sum() for entry in self.diagonal().values()]).sum()

    def frobenius_norm(self) -> Tensor:
        """Root of the sum of all squared entries."""
        return torch.linalg.vector_norm(self.eigenvalues())


@dataclass(frozen=True)
class DiagonalBlock(Block):
    """A diagonal over one parameter.

    Attributes:
        name: Name of the parameter.
        values: The diagonal, shaped like the parameter.

    Example:
        >>> block = DiagonalBlock("scale", torch.tensor([1.0, 3.0]))
        >>> block.inverse(1.0).values
        tensor([0.5000, 0.2500])
    """

    name: str
    values: Tensor

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return (self.name,)

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: self.values * v[self.name].to(self.values.dtype)}

    def eigenvalues(self) -> Tensor:  # noqa: D102
        return self.values.flatten()

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> DiagonalBlock:  # noqa: D102
        return DiagonalBlock(self.name, function(self.values))

    def diagonal(self) -> dict[str, Tensor]:  # noqa: D102
        return {self.name: self.values}

    def scale(self, factor: Scalar) -> DiagonalBlock:  # noqa: D102
        return DiagonalBlock(self.name, factor * self.values)

    def add(self, other: Block) -> DiagonalBlock:  # noqa: D102
        if not isinstance(other, DiagonalBlock):
            raise ValueError(
                f"One curvature has a diagonal for '{self.name}', the other {_kind(other)}."
            )
        return DiagonalBlock(self.name, self.values + other.values)

    def restrict(self, names: Collection[str]) -> DiagonalBlock:  # noqa: D102
        return self

    def inverse(self, damping: Scalar, split: Damping = "exact") -> Block:  # noqa: D102
        return super().inverse(damping)  # there are no two factors to divide it between


def _kind(block: Block) -> str:
    return f"a {type(block).__name__} for {', '.join(block.names)}"
