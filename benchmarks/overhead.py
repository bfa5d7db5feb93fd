"""What a call of the engine costs in Python, on top of its work on tensors.

    python benchmarks/overhead.py        # writes benchmarks/results/overhead.{md,json}

A second call with the same convolution, on tiny tensors: spec, network, simplification and plan are
looked up, and the steps run. The calls on tensors that this makes are recorded, and replayed alone,
in alternation with the whole; the difference is what Python costs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from measuring import ROOT, markdown, write
from torch import Tensor
from torch.overrides import TorchFunctionMode

import kfac_tn
from kfac_tn import tn

SHAPE, WEIGHT = (2, 4, 6, 6), (6, 4, 3, 3)
BUILDERS = (
    tn.forward,
    tn.input_vjp,
    tn.weight_vjp,
    tn.unfold_input,
    tn.kfac_expand_input_factor,
    tn.kfac_reduce_input_factor,
    tn.ggn_diagonal,
)


class Recorder(TorchFunctionMode):
    """Keeps every call that makes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call, and keep the call."""
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        if any(isinstance(one, Tensor) for one in made):  # of a backward pass, not all are
            self.calls.append((func, args, kwargs or {}))
        return result


def cases() -> dict[str, Callable[[], Tensor]]:
    """What a user calls, in all: from numbers and tensors to the result."""

    def evaluation(builder: Callable[[tn.ConvSpec], tn.Network]) -> Callable[[], Tensor]:
        network = builder(tn.ConvSpec(SHAPE, WEIGHT, padding=1))
        operands = {name: torch.rand(shape) for name, shape in network.operands.items()}

        def call() -> Tensor:
            spec = tn.ConvSpec(SHAPE, WEIGHT, padding=1)
            return builder(spec).simplify().evaluate(**operands)

        return call

    x = torch.rand(SHAPE)
    named = {f"tn.{builder.__name__}": evaluation(builder) for builder in BUILDERS}
    for approximation in ("expand", "reduce"):
        named[f"functional.conv_input_factor, {approximation}"] = lambda a=approximation: (
            kfac_tn.functional.conv_input_factor(x, 3, padding=1, approximation=a)
        )
    return named


def measure(call: Callable[[], Tensor], repetitions: int) -> dict[str, float]:
    """Microseconds of the whole and of its work on tensors, and their number: medians."""
    call()
    with Recorder() as recorder:
        call()

    def replay() -> None:
        for func, args, kwargs in recorder.calls:
            func(*args, **kwargs)

    whole, alone = [], []
    for _ in range(repetitions):
        for function, times in ((call, whole), (replay, alone)):
            start = perf_counter()
            function()
            times.append(1e6 * (perf_counter() - start))
    whole_us, alone_us = statistics.median(whole), statistics.median(alone)
    return {
        "calls on tensors": len(recorder.calls),
        "whole, us": whole_us,
        "tensors alone, us": alone_us,
        "Python, us": statistics.median(a - b for a, b in zip(whole, alone, strict=True)),
        "ratio": whole_us / alone_us,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {name: measure(call, options.repetitions) for name, call in cases().items()}
    head = ["second call with one spec", *next(iter(rows.values()))]
    cells = [
        [name, *(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values())]
        for name, row in rows.items()
    ]
    setting = (
        f"Input {SHAPE}, weight {WEIGHT}, float32, {options.threads} thread(s); medians of "
        f"{options.repetitions} alternating calls; torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}."
    )
    report = f"# Overhead\n\n{setting}\n\n{markdown(head, cells)}"
    record = [{"call": name, **row} for name, row in rows.items()]
    write(options.output, "overhead", setting, record, report)


if __name__ == "__main__":
    main()
