"""How time and memory of Kronecker factors grow with batch, channels, kernel and resolution.

    python benchmarks/scaling.py            # writes benchmarks/results/scaling.{md,json,png}

One size of a convolution varies at a time, the others stay (stride 1, padding that keeps the
resolution, as many output channels as input channels). The exponent is the slope of a straight line
through logarithms. Beside it stands what is expected: the slope, over the same sizes, of a count of
operations (multiplications and additions, plus ten for each number that is read or written), or
of the bytes that must be held. So expected exponents aren't whole where several terms mix. The
ways take turns in one process; times are medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from convolutions import Convolution
from factors import prepare
from measuring import conditions, markdown, parser, peak_bytes, seconds, take_turns, write
from operations import Setting


@dataclass(frozen=True)
class Size:
    """What varies."""

    batch: int = 8
    channels: int = 32
    kernel: int = 3
    resolution: int = 28

    @property
    def x(self) -> int:
        """Numbers in the input (and in the output)."""
        return self.batch * self.channels * self.resolution**2

    @property
    def rows(self) -> int:
        """Examples times positions."""
        return self.batch * self.resolution**2

    @property
    def d(self) -> int:
        """Size of the input factor."""
        return self.channels * self.kernel**2

    def setting(self, device: str) -> Setting:
        """The convolution with operands."""
        kernel, padding = (self.kernel,) * 2, (self.kernel // 2,) * 2
        conv = Convolution((), self.channels, self.resolution, self.channels, kernel, 1, padding, 1)
        return Setting(conv, self.batch, device)


SWEEPS: dict[str, tuple[Size, ...]] = {
    axis: tuple(replace(base, **{axis: size}) for size in sizes)
    for axis, base, sizes in (
        ("batch", Size(), (2, 4, 8, 16, 32)),
        ("channels", Size(), (16, 32, 64, 128)),
        ("kernel", Size(channels=16), (3, 5, 7, 9)),
        ("resolution", Size(), (14, 28, 56, 112)),
    )
}

MOVE = 10  # operations that a read or written number is worth


@dataclass(frozen=True)
class Way:
    """A factor and how it is got, with what that should take."""

    quantity: str
    name: str
    operations: Callable[[Size], float]
    numbers_held: Callable[[Size], float]

    def __str__(self) -> str:
        return f"{self.quantity}: {self.name}"


def _offsets(size: Size) -> float:
    """Pairs of kernel positions that differ in their distance, each distance once."""
    return ((2 * size.kernel - 1) ** 2 + 1) / 2


WAYS = (
    Way(
        "expand",
        "kfac_tn",
        lambda s: 2 * _offsets(s) * s.rows * s.channels**2 + MOVE * (2 * s.x + s.d**2),
        lambda s: s.x * (1 + (s.kernel - 1) / s.resolution) ** 2 + s.d**2,
    ),
    Way(
        "expand",
        "im2col",
        lambda s: 2 * s.rows * s.d**2 + MOVE * (4 * s.rows * s.d + s.d**2),
        lambda s: 2 * s.rows * s.d + s.d**2,
    ),
    Way(
        "reduce",
        "kfac_tn",
        lambda s: 2 * s.batch * s.d**2 + MOVE * (s.x + 2 * s.batch * s.d + s.d**2),
        lambda s: s.batch * s.d + s.d**2,
    ),
    Way(
        "reduce",
        "im2col",
        lambda s: 2 * s.batch * s.d**2 + MOVE * (2 * s.rows * s.d + s.d**2),
        lambda s: s.rows * s.d + s.batch * s.d + s.d**2,
    ),
    Way(
        "output, expand",
        "kfac_tn",
        lambda s: 2 * s.rows * s.channels**2 + MOVE * (s.x + s.channels**2),
        lambda s: s.channels**2,
    ),
    Way(
        "output, expand",
        "GEMM",
        lambda s: 2 * s.rows * s.channels**2 + MOVE * (3 * s.x + s.channels**2),
        lambda s: s.x + s.channels**2,
    ),
)


def slope(sizes: list[int], values: list[float]) -> float:
    """Of a straight line through logarithms, by least squares."""
    x, y = ([math.log(v) for v in some] for some in (sizes, values))
    return statistics.linear_regression(x, y).slope


# ---- measuring -------------------------------------------------------------------------------


def measure(size: Size, budget: float, most: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each way."""
    setting = size.setting(device)
    calls = {str(way): prepare(setting, way.quantity, way.name) for way in WAYS}
    once, memory = {}, {}
    for name, call in calls.items():
        result = call()
        once[name] = seconds(call)
        memory[name] = max(peak_bytes(call, device), result.nbytes)
    times = take_turns(calls, once, budget, most)
    return {
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "bytes": memory,
    }


def measure_all(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each size; those for which there is no time any more are left out."""
    sweeps = {a: sizes[:3] if options.quick else sizes for a, sizes in SWEEPS.items()}
    end = perf_counter() + options.limit_seconds
    points = [(axis, size) for axis, sizes in sweeps.items() for size in sizes]
    for index, (axis, size) in enumerate(points):
        left = end - perf_counter()
        if left < 0 and not options.quick:
            print(f"time is up: {len(points) - index} sizes are left out", file=sys.stderr)
            return
        # The largest sizes, which come last of each sweep, take most.
        budget = left / (len(points) - index) / 2
        found = measure(size, budget, options.repetitions, options.device)
        yield {"axis": axis, "size": getattr(size, axis), **vars(size), **found}


# ---- reporting -------------------------------------------------------------------------------


def exponents(rows: list[dict]) -> list[list[object]]:
    """Measured and expected, of time and memory, for each way and axis."""
    lines: list[list[object]] = []
    for way in WAYS:
        for axis in SWEEPS:
            some = [row for row in rows if row["axis"] == axis]
            if len(some) < 2:
                continue
            sizes = [row["size"] for row in some]
            at = [Size(*(row[field] for field in Size.__dataclass_fields__)) for row in some]
            lines.append(
                [
                    str(way),
                    axis,
                    f"{sizes[0]} to {sizes[-1]}",
                    slope(sizes, [row["seconds"][str(way)] for row in some]),
                    slope(sizes, [way.operations(size) for size in at]),
                    slope(sizes, [row["bytes"][str(way)] for row in some]),
                    slope(sizes, [way.numbers_held(size) for size in at]),
                ]
            )
    return lines


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory over each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(SWEEPS), figsize=(14, 7), sharey="row", sharex="col", layout="constrained"
    )
    styles = {"kfac_tn": "o-", "im2col": "s--", "GEMM": "s--"}
    colors = {
        quantity: f"C{i}" for i, quantity in enumerate(dict.fromkeys(w.quantity for w in WAYS))
    }
    for line, (quantity, scale) in zip(axes, (("seconds", 1e3), ("bytes", 2**-20)), strict=True):
        for ax, axis in zip(line, SWEEPS, strict=True):
            some = [row for row in rows if row["axis"] == axis]
            for way in WAYS:
                ax.plot(
                    [row["size"] for row in some],
                    [scale * row[quantity][str(way)] for row in some],
                    styles[way.name],
                    color=colors[way.quantity],
                    label=str(way),
                )
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
            if quantity == "bytes":
                ax.set_xlabel(axis)
                ax.set_xticks([row["size"] for row in some], [str(row["size"]) for row in some])
    axes[0, 0].set_ylabel("milliseconds")
    axes[1, 0].set_ylabel("peak MiB")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle("How Kronecker factors scale", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__, limit_seconds=120, quick="three sizes of each").parse_args()
    if options.quick:
        options.limit_seconds, options.repetitions = 8, 3
    torch.set_num_threads(options.threads)
    start, rows = perf_counter(), []
    for row in measure_all(options):
        rows.append(row)
        times = ", ".join(f"{n} {1e3 * t:.2f} ms" for n, t in row["seconds"].items())
        print(f"{row['axis']} {row['size']}: {times}", flush=True)
    setting = conditions(options, start)
    head = ["factor", "grows with", "from, to", "time", "expected", "memory", "expected"]
    base = ", ".join(f"{name} {value}" for name, value in vars(Size()).items())
    report = (
        f"# How Kronecker factors scale\n\n{setting}\n\nExponents: time or memory ~ size^exponent. "
        f"What doesn't vary: {base}; {SWEEPS['kernel'][0].channels} channels where the kernel "
        f"varies.\n\n{markdown(head, exponents(rows))}"
    )
    write(options.output, "scaling", setting, rows, report)
    plot(rows, options.output / "scaling.png")


if __name__ == "__main__":
    main()
