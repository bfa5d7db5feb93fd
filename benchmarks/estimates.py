"""The planner's estimates: the constants behind them, and how good the choices are.

    python benchmarks/estimates.py            # writes benchmarks/results/estimates.{md,json,png}

First the constants of `kfac_tn/tn/machine.py`, measured: the pace of a large matrix product, of
elements that are read or written, and what it takes to begin an operation. Then, for convolutions
of well-known networks (`convolutions.py`) and operations of the engine, every algorithm that
applies is timed, but for those estimated to take more than six times as long as the one chosen;
the algorithms of a network take turns. The regret is the chosen one's time over the fastest one's.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from convolutions import distinct
from measuring import geometric_mean, machine, markdown, parser, seconds, take_turns, write

from kfac_tn import tn
from kfac_tn.tn import gemm
from kfac_tn.tn.machine import MACHINES, kind
from kfac_tn.tn.steps import ConvolveBackward

BUILDERS = {
    "forward": tn.forward,
    "input VJP": tn.input_vjp,
    "weight VJP": tn.weight_vjp,
    "expand factor": tn.kfac_expand_input_factor,
    "reduce's means": tn.average_unfolded_input,
}
WORSE = 6.0
MOST_ELEMENTS = 5e8


def constants(device: str) -> dict[str, float]:
    """Seconds of a multiplication or addition, an element, a launch; what BLAS makes of it."""
    a, b = torch.rand(2, 1, 2048, 2048, device=device)
    x = torch.rand(2**24, device=device)
    one = torch.rand(1, device=device)
    fastest = lambda call, number: min(seconds(call, number) for _ in range(5))  # noqa: E731
    images = torch.rand(8, 128, 28, 28, device=device)
    step = ConvolveBackward((1, 1), (1, 1), (1, 1), 1, (3, 3))
    convolved = fastest(lambda: step(images, images), 1) / step.flops(images, images)
    product, blas = fastest(lambda: gemm.multiply(a, b), 1), fastest(lambda: a @ b, 1)
    return {
        "work": product / (2 * 2048**3),
        "blas": blas / product,
        "convolved": convolved,
        "element": fastest(lambda: x + 1, 1) / (2 * x.numel()),
        "launch": fastest(lambda: one + 1, 1000),
    }


def measure(conv, operation: str, batch: int, budget: float, most: int, device: str) -> dict:
    """Times and estimates of the algorithms for one network."""
    spec = tn.ConvSpec(
        (batch, conv.channels, conv.size, conv.size),
        (conv.out_channels, conv.channels // conv.groups, *conv.kernel_size),
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
    )
    network = BUILDERS[operation](spec).simplify()
    chosen = network.plan(device_type=device)
    operands = {n: torch.rand(shape, device=device) for n, shape in network.operands.items()}
    recipes = [
        recipe
        for recipe in (chosen, *chosen.others)
        if recipe.cost.seconds <= WORSE * chosen.cost.seconds
        and recipe.cost.peak_memory < MOST_ELEMENTS
    ]
    calls = {
        r.algorithm: partial(network.evaluate, algorithm=r.algorithm, **operands) for r in recipes
    }
    for call in calls.values():
        call()
    once = {name: seconds(call) for name, call in calls.items()}
    times = take_turns(calls, once, budget, most)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "name": str(conv),
        "operation": operation,
        "chosen": chosen.algorithm,
        "seconds": medians,
        "estimates": {r.algorithm: r.cost.seconds for r in recipes},
        "regret": medians[chosen.algorithm] / min(medians.values()),
    }


def report(rows: list[dict], found: dict[str, float], device: str) -> str:
    """Constants, regrets by operation, the worst choices."""
    kept = MACHINES[kind(device)]._asdict()
    table = [(name, f"{kept[name]:.2g}", f"{found[name]:.2g}") for name in kept]
    lines = [
        "## Constants",
        "",
        markdown(["seconds of (blas: times as long as)", "in the package", "measured here"], table),
    ]
    table = []
    for operation in BUILDERS:
        some = [row for row in rows if row["operation"] == operation]
        several = [row for row in some if len(row["seconds"]) > 1]
        regrets = [row["regret"] for row in several]
        taken = Counter(row["chosen"] for row in some)
        table.append(
            (
                operation,
                len(some),
                ", ".join(f"{name} {count}" for name, count in taken.most_common()),
                len(several),
                sum(regret <= 1.15 for regret in regrets),
                geometric_mean(regrets),
                max(regrets, default=float("nan")),
            )
        )
    head = ["operation", "convolutions", "chosen", "of several algorithms", "within 15 %"]
    lines += ["", "## Choices", "", markdown([*head, "mean regret", "most"], table)]
    worst = sorted(rows, key=lambda row: -row["regret"])[:10]
    lines += ["", "The worst:", ""]
    for row in worst:
        times = ", ".join(
            f"{name} {1e3 * t:.2f} ms (estimate {1e3 * row['estimates'][name]:.2f})"
            for name, t in row["seconds"].items()
        )
        lines.append(f"- {row['regret']:.2f}: {row['operation']}, {row['name']}: {times}")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Measured over estimated times, a colour for each algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 5), layout="constrained")
    for algorithm in tn.ALGORITHMS:
        pairs = [
            (row["estimates"][algorithm], row["seconds"][algorithm])
            for row in rows
            if algorithm in row["seconds"]
        ]
        if pairs:
            axes.loglog(*zip(*pairs, strict=True), ".", label=algorithm, alpha=0.7)
    times = [t for row in rows for t in (*row["seconds"].values(), *row["estimates"].values())]
    ends = [min(times), max(times)]
    axes.loglog(ends, ends, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("estimated seconds")
    axes.set_ylabel("measured seconds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    options_parser = parser(__doc__, 150, "three convolutions")
    options_parser.add_argument("--batch", type=int, default=8)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    convolutions = distinct()
    random.Random(0).shuffle(convolutions)  # what the limit may cut off is any of them
    convolutions = convolutions[:3] if options.quick else convolutions
    found = constants(options.device)
    end, rows = perf_counter() + options.limit_seconds, []
    cells = len(convolutions) * len(BUILDERS)
    for conv in convolutions:
        for operation in BUILDERS:
            left = end - perf_counter()
            if left < 0:
                continue
            budget = left / (cells - len(rows)) / 3
            rows.append(
                measure(conv, operation, options.batch, budget, options.repetitions, options.device)
            )
    if len(rows) < cells:
        print(f"time is up: {cells - len(rows)} of the cells are left out", file=sys.stderr)
    setting = (
        f"Batches of {options.batch}, float32 on {options.device}, medians of up to "
        f"{options.repetitions} interleaved turns, {len(rows)} of {cells} networks; "
        f"{machine(options.device)}."
    )
    text = f"# The planner's estimates\n\n{setting}\n\n{report(rows, found, options.device)}\n"
    write(options.output, "estimates", setting, rows, text)
    plot(rows, options.output / "estimates.png")


if __name__ == "__main__":
    main()
