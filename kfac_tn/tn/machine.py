"""How long a machine takes for what steps are made of: the constants of the planner's estimates.

Only their ratios matter for the planner's choices. `benchmarks/estimates.py` measures them, and how
good the choices are.
"""

from __future__ import annotations

from typing import NamedTuple

from kfac_tn.tn import gemm


class Machine(NamedTuple):
    """Seconds that things take on a type of device.

    Attributes:
        work: A multiplication or addition in a product of large float32 matrices.
        blas: How many times as long they take in torch's BLAS, where `kfac_tn.tn.gemm` has better.
        convolved: One in the gradient of a convolution's weight.
        element: An element that is read or written.
        launch: An operation on tensors, however small, called from Python.
    """

    work: float
    blas: float
    convolved: float
    element: float
    launch: float


MACHINES = {
    "cpu": Machine(work=1 / 380e9, blas=2.2, convolved=1 / 380e9, element=0.45e-9, launch=4e-6),
    "zen4": Machine(work=1 / 210e9, blas=1.1, convolved=1 / 200e9, element=0.5e-9, launch=8e-6),
    "intel": Machine(work=1 / 265e9, blas=1.0, convolved=1 / 165e9, element=0.65e-9, launch=4e-6),
    "cuda": Machine(work=1 / 30e12, blas=1.0, convolved=1 / 10e12, element=2e-12, launch=6e-6),
}
"""By type of device: two cores of AMD's servers, for which MKL, torch's BLAS, is slow; of those
up to Zen 4, for which it is not; of Intel's; a data-centre GPU, by data sheet, not measured.
Of AMD's up to Zen 4, elements and operations are what leads to the best choices: in a step, neither
is read from a cache as where it is measured alone."""


def kind(device_type: str) -> str:
    """Which of ``MACHINES`` stands for a type of device: a CPU for those that are none of them."""
    if device_type == "cuda":
        return device_type
    return gemm.PROCESSOR


def machine(device_type: str) -> Machine:
    """The constants of a type of device."""
    return MACHINES[kind(device_type)]
