"""The steps that evaluate a network: pure, differentiable functions of tensors, equal by value.

A step's attributes are plain numbers, so that a plan is plain data: `compute` is a function of the
tensors and of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from kfac_tn.tn.steps.adjoints import Collect, Fold, Scatter
from kfac_tn.tn.steps.arithmetic import Apply, Multiply, Product, Scale, Sum
from kfac_tn.tn.steps.convolutions import Convolve, ConvolveBackward, ConvolveTransposed
from kfac_tn.tn.steps.step import Step
from kfac_tn.tn.steps.sums import ApplyJointly, JointMatrix, Runs, SumClasses
from kfac_tn.tn.steps.views import Arrange, Expand, Flip, Gather, Pad, Slice, Window

__all__ = [
    "COMPUTE",
    "Apply",
    "ApplyJointly",
    "Arrange",
    "Collect",
    "Convolve",
    "ConvolveBackward",
    "ConvolveTransposed",
    "Expand",
    "Flip",
    "Fold",
    "Gather",
    "JointMatrix",
    "Multiply",
    "Pad",
    "Product",
    "Runs",
    "Scale",
    "Scatter",
    "Slice",
    "Step",
    "Sum",
    "SumClasses",
    "Window",
]


def _kinds(step: type[Step]) -> Iterator[type[Step]]:
    for kind in step.__subclasses__():
        yield kind
        yield from _kinds(kind)


COMPUTE: dict[str, Callable[..., Tensor]] = {kind.__name__: kind.compute for kind in _kinds(Step)}
"""What computes each kind of step, by its name."""
