"""The state of all that a model may draw random numbers from."""

from __future__ import annotations

import random
import sys

import torch


class RandomState:
    """The states of the global generators of torch, Python and NumPy, as they are when it is made.

    Stochastic depth, for one, is often drawn by Python or NumPy. The latter is looked at only if
    somebody has imported it.

    Args:
        device: Whose generator is meant, besides the CPU's.

    Example:
        >>> state = RandomState(torch.device("cpu"))
        >>> first = torch.rand(()).item(), random.random()
        >>> state.restore()
        >>> first == (torch.rand(()).item(), random.random())
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        kind = device.type
        self._own = None if kind == "cpu" else torch.get_device_module(kind).get_rng_state(device)
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else (numpy, numpy.random.get_state())

    def restore(self) -> None:
        """Put them all back."""
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            torch.get_device_module(self._device.type).set_rng_state(self._own, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            numpy, state = self._numpy
            numpy.random.set_state(state)
