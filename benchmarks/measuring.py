"""What the benchmarks share: fair timings, peak memory, tables, boxes, writing results."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report each of its starts

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from compare_optimizers import describe_machine, shuffled_batches  # noqa: E402, F401

SHORTEST = 2e-3  # seconds of a timing; faster calls are repeated within one

Call = Callable[[], Any]


def seconds(call: Call, number: int = 1) -> float:
    """Time per call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = perf_counter()
    for _ in range(number):
        call()
    synchronize()
    return (perf_counter() - start) / number


def keep_memory() -> None:
    """Have what is freed stay with the process, where the allocator is glibc's.

    By default it gives large tensors back to the system when they are freed, and gets fresh memory
    for the next: how long that takes is the system's affair. In a virtual machine whose host takes
    back what is free, it may be seconds per gigabyte at one time and next to nothing at another.
    Allocators that PyTorch's tuning guide recommends (jemalloc, tcmalloc) keep it, too, as does
    its own one for GPUs.
    """
    mmap_max, trim_threshold = -4, -1  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never


def take_turns(
    calls: Mapping[str, Call], once: Mapping[str, float], budget: float, most: int
) -> dict[str, list[float]]:
    """Times of each call, in up to ``most`` rounds: whatever else the machine does meets all.

    Args:
        calls: By name.
        once: About the seconds that one call takes, by name; its fastest turn tells better.
        budget: Seconds for all; each call has an equal share, and at least one turn.
        most: Number of rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    share = budget / max(len(calls), 1)
    names = list(calls)
    for turn in range(most):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            duration = max(min([once[name], *times[name]]), SHORTEST)
            if times[name] and (len(times[name]) + 1) * duration > share:
                continue
            times[name].append(seconds(calls[name], math.ceil(SHORTEST / once[name])))
    return times


def peak_bytes(call: Call, device: str) -> int:
    """Largest number of bytes allocated during a call, its result included."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    del result
    return peak


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean, or NaN of nothing."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


# ---- reporting -------------------------------------------------------------------------------


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; numbers with two digits after the point."""
    head = list(head)
    lines = [head, ["---"] * len(head)]
    lines += [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def boxes(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    kinds: Sequence[str],
    path: Path,
    title: str,
    columns: int = 3,
) -> None:
    """Boxes of ratios on a logarithmic axis.

    Args:
        panels: By the title of a panel, then by the name in the legend: ratios for each kind.
        kinds: Labels along the horizontal axis.
        path: File to write.
        title: Above all.
        columns: Panels side by side.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    shape = math.ceil(len(panels) / columns), columns
    figure, axes = plt.subplots(
        *shape, figsize=(13, 3.5 * shape[0]), sharex=True, squeeze=False, layout="constrained"
    )
    for (heading, panel), ax in zip(panels.items(), axes.flat, strict=False):
        width = 0.8 / len(panel)
        for index, (name, values) in enumerate(panel.items()):
            shift = (index - (len(panel) - 1) / 2) * width
            drawn = ax.boxplot(
                values,
                positions=[n + shift for n in range(len(kinds))],
                widths=0.85 * width,
                whis=(0, 100),
                patch_artist=True,
                medianprops={"color": "black"},
            )
            for box in drawn["boxes"]:
                box.set(facecolor=colors[name], alpha=0.7)
        ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
        ax.grid(axis="y", alpha=0.3)
        ax.set_title(heading)
        ax.set_xticks(range(len(kinds)), kinds, rotation=20)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name], alpha=0.7) for name in names]
    figure.legend(handles, names, loc="outside upper right", ncols=len(names))
    figure.suptitle(f"{title} (boxes: quartiles, whiskers: extremes)", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parser(doc: str | None, limit_seconds: float, quick: str) -> argparse.ArgumentParser:
    """The options that the benchmarks share."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repetitions", type=int, default=9, help="turns, if time allows")
    made.add_argument("--limit-seconds", type=float, default=limit_seconds)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return made


def machine(device: str) -> str:
    """What the numbers depend on: device, threads, versions."""
    name = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return name + describe_machine()


def conditions(options: argparse.Namespace, start: float) -> str:
    """How it was measured, for benchmarks with the options of ``parser`` (and ``batch``)."""
    batch = f"Batches of {options.batch}, f" if hasattr(options, "batch") else "F"
    return (
        f"{batch}loat32 on {options.device}, medians of up to {options.repetitions} interleaved "
        f"turns, {perf_counter() - start:.0f} s in all; {machine(options.device)}."
    )


def write(output: Path, name: str, setting: str, rows: list[dict], report: str) -> None:
    """The report as ``name.md``, all that was measured as ``name.json``; print the report."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.md").write_text(report + "\n")
    record = {"setting": setting, "rows": rows}
    (output / f"{name}.json").write_text(json.dumps(record, indent=1))
    print(f"\n{report}")
