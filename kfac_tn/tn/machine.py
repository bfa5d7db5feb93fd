"""How long a machine takes for what steps are made of: the constants of the planner's estimates.

Only their ratios matter for the planner's choices. `benchmarks/estimates.py` measures them, and how
good the choices are.
"""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """Seconds that things take on a type of device.

    Attributes:
        work: A multiplication or addition in a product of large float32 matrices.
        convolved: The same in the gradient of a convolution's weight.
        element: An element that is read or written.
        launch: An operation on tensors, however small, called from Python.
    """

    work: float
    convolved: float
    element: float
    launch: float


MACHINES = {
    "cpu": Machine(work=1 / 170e9, convolved=1 / 340e9, element=0.45e-9, launch=4e-6),
    "cuda": Machine(work=1 / 30e12, convolved=1 / 10e12, element=2e-12, launch=6e-6),
}
"""By type of device: two cores of a server; a data-centre GPU, by data sheet, not measured."""


def machine(device_type: str) -> Machine:
    """The constants of a type of device; of the CPU for those that are none of the above."""
    return MACHINES.get(device_type, MACHINES["cpu"])
