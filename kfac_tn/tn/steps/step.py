"""What a step is."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

WIDTH = 16
"""Rows or columns of a matrix below which a product of matrices takes no less time."""


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

    def estimate(self, *inputs: Tensor) -> Tensor:
        """A tensor like the result, from inputs without data. Default: computes it."""
        return self(*inputs)

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions. Default: none, as of views and copies."""
        return 0

    def work(self, *inputs: Tensor) -> float:
        """Multiplications and additions of a good matrix product that takes as long."""
        return self.flops(*inputs)

    def convolved(self, *inputs: Tensor) -> float:
        """The same by kernels for gradients of convolutions' weights. Default: none."""
        return 0

    def by_blas(self, *inputs: Tensor) -> bool:
        """Whether torch's BLAS does the work, even where oneDNN is faster. Default: no."""
        return False

    def moved(self, *inputs: Tensor) -> int:
        """Elements read and written on the way, besides arguments and result. Default: none."""
        return 0

    def held(self, *inputs: Tensor) -> int:
        """Elements held on the way, besides arguments and result. Default: none."""
        return 0

    def launches(self, *inputs: Tensor) -> int:
        """Number of operations on tensors. Default: one."""
        return 1


def has_depthwise_kernels(tensor: Tensor) -> bool:
    """Whether convolutions of many groups are one operation, for a tensor's dtype and device."""
    return tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
