"""What a step is."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A function of one or more tensors, followed by the step's attributes."""

    @staticmethod
    def compute(*inputs: Tensor) -> Tensor:
        """Compute the step from its tensors and its attributes."""
        raise NotImplementedError

    @property
    def attributes(self) -> tuple[object, ...]:
        """The attributes, in the order in which `compute` takes them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the step."""
        return self.compute(*inputs, *self.attributes)  # type: ignore[arg-type]

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions. Default: none, as of views and copies."""
        return 0

    def moved(self, *inputs: Tensor) -> int:
        """Elements read and written on the way, besides arguments and result. Default: none."""
        return 0

    @property
    def launches(self) -> int:
        """Number of operations on tensors. Default: one."""
        return 1
