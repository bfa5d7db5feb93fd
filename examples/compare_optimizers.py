"""SGD, Adam, KFAC-expand and KFAC-reduce side by side, in steps and in seconds.

Run from the root of the repository:

    python examples/compare_optimizers.py            # scikit-learn's digits, 3 to 4 minutes
    python examples/compare_optimizers.py --quick    # the same in little, well under a minute

Two problems are trained, a convolutional classifier and a deep autoencoder. SGD and Adam have the
best of a grid of learning rates, KFAC its defaults. All start from the same weights and see the
same batches in the same order. The runs take turns in slices of half a second and each has a clock
that counts its training steps only. That spreads the moods of a machine over all runs, but other
programs on the same cores can still ruin the clock: the report says so where it can tell.

Written to the output folder: `results.md`, `results.json` (with all curves) and `curves.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from problems import DATASETS, PROBLEMS, Problem, load_images
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import kfac_tn

OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module, Any], Optimizer]] = {
    "SGD": lambda model, loss_fn, lr: torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True
    ),
    "Adam": lambda model, loss_fn, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "KFAC-expand": lambda model, loss_fn, lr: kfac_tn.KFAC(model, loss_fn, approximation="expand"),
    "KFAC-reduce": lambda model, loss_fn, lr: kfac_tn.KFAC(model, loss_fn, approximation="reduce"),
}
COLORS = {"SGD": "#6b7280", "Adam": "#2563eb", "KFAC-expand": "#dc2626", "KFAC-reduce": "#f59e0b"}
SLICE = 0.5  # seconds of training before the next run's turn and between evaluations
EVALUATED = 5000  # training examples in the training loss: all of digits, part of larger sets


# -------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Point:
    """One evaluation: when on the run's own clock, and what it found."""

    step: int
    seconds: float
    train_loss: float
    test: float


def shuffled_batches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless full batches of reshuffled epochs, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(x))
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // size * size].split(size):
            yield x[rows], y[rows]


class Run:
    """A model trained by one optimizer, on a clock that stands still outside of training steps.

    Args:
        problem: What to train.
        optimizer: One of `OPTIMIZERS`.
        lr: Its learning rate; None for those that choose their steps themselves.
        batch_size: Examples per step.
        seed: Determines the initial weights and the order of the batches.
    """

    def __init__(
        self, problem: Problem, optimizer: str, lr: float | None, batch_size: int, seed: int
    ):
        torch.manual_seed(seed)
        self.problem, self.name, self.lr = problem, optimizer, lr
        self.model, self.loss_fn = problem.build(), problem.loss()
        self.optimizer = OPTIMIZERS[optimizer](self.model, self.loss_fn, lr)
        self.batches = shuffled_batches(*problem.train, batch_size, seed)
        self.steps, self.seconds, self.loss, self.diverged = 0, 0.0, math.nan, False
        self.curve: list[Point] = []
        self.evaluate()

    @property
    def label(self) -> str:
        """Name and learning rate."""
        return self.name if self.lr is None else f"{self.name}, lr {self.lr:g}"

    @property
    def final_loss(self) -> float:
        """The last training loss; infinite if the run diverged."""
        return math.inf if self.diverged else self.curve[-1].train_loss

    @property
    def best_loss(self) -> float:
        """The lowest training loss of all evaluations."""
        return min(point.train_loss for point in self.curve)

    def seconds_to(self, loss: float) -> float | None:
        """When an evaluation first found a training loss this low; None if none did."""
        return next((point.seconds for point in self.curve if point.train_loss <= loss), None)

    def advance(self, seconds: float) -> None:
        """Train for so long by the run's own clock, or until the loss is not finite any more."""
        end = self.seconds + seconds
        while self.seconds < end and not self.diverged:
            x, y = next(self.batches)
            start = perf_counter()
            self.optimizer.zero_grad()
            loss = self.loss_fn(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.seconds += perf_counter() - start
            self.steps += 1
            self.loss = loss.item()
            self.diverged = not math.isfinite(self.loss)

    def evaluate(self) -> None:
        """Add a point to the curve, unless the run diverged."""
        x, y = self.problem.train
        self.model.eval()
        train_loss = self._average(self.loss_fn, x[:EVALUATED], y[:EVALUATED])
        test = self._average(self.problem.measure, *self.problem.test)
        self.model.train()
        self.diverged = self.diverged or not math.isfinite(train_loss)
        if not self.diverged:
            self.curve.append(Point(self.steps, self.seconds, train_loss, test))

    @torch.no_grad()
    def _average(self, measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
        parts = zip(x.split(1000), y.split(1000), strict=True)
        return sum(measure(self.model(a), b).item() * len(a) for a, b in parts) / len(x)


def compete(runs: Sequence[Run], seconds: float) -> None:
    """Train all runs for so long each, in turns, evaluating each after every turn."""
    # What the very first steps of a process pay (threads, allocator) is nobody's fault.
    Run(runs[0].problem, "SGD", lr=1e-3, batch_size=64, seed=0).advance(0.1)
    turns = max(4, round(seconds / SLICE))
    with ExitStack() as stack:
        bars = [
            stack.enter_context(
                tqdm(
                    total=seconds,
                    desc=f"{run.label:>16}",
                    position=position,
                    disable=None,  # where nobody is looking
                    bar_format="{desc} |{bar:30}| {n:5.1f}/{total:.0f} s{postfix}",
                )
            )
            for position, run in enumerate(runs)
        ]
        for turn in range(1, turns + 1):
            for run, bar in zip(runs, bars, strict=True):
                # Up to a fixed moment: a slow last step is paid for in the next turn.
                run.advance(seconds * turn / turns - run.seconds)
                run.evaluate()
                bar.set_postfix_str(
                    "diverged" if run.diverged else f"loss {run.final_loss:.2e}", refresh=False
                )
                bar.update(min(run.seconds, seconds) - bar.n)


# ------------------------------------------------------------------------------------ report


Results = Sequence[tuple[Problem, Sequence[Run]]]


def best_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """By optimizer, the run with the lowest final training loss."""
    names = dict.fromkeys(run.name for run in runs)
    return {
        name: min((run for run in runs if run.name == name), key=lambda run: run.final_loss)
        for name in names
    }


def target_loss(runs: Sequence[Run]) -> float | None:
    """The lowest final training loss of an optimizer with a tuned learning rate."""
    losses = [run.final_loss for run in runs if run.lr is not None and not run.diverged]
    return min(losses, default=None)


def uneven_clock(runs: Sequence[Run]) -> bool:
    """Whether the runs of one optimizer, whose steps cost the same, differ much in speed."""
    speeds: dict[str, list[float]] = {}
    for run in runs:
        if not run.diverged:  # too short to tell
            speeds.setdefault(run.name, []).append(run.steps / run.seconds)
    return any(max(of_one) > 1.25 * min(of_one) for of_one in speeds.values())


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the table and the JSON file say about each run."""
    target, best = target_loss(runs), best_runs(runs)
    return [
        {
            "optimizer": run.name,
            "lr": run.lr,
            "best_lr": run is best[run.name],
            "diverged": run.diverged,
            "steps": run.steps,
            "seconds": run.seconds,
            "final_train_loss": None if run.diverged else run.final_loss,
            "best_train_loss": run.best_loss,
            "test": None if run.diverged else run.curve[-1].test,
            "seconds_to_target": None if target is None else run.seconds_to(target),
            "curve": [asdict(point) for point in run.curve],
        }
        for run in runs
    ]


def markdown_table(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The summary of one problem as an aligned markdown table."""

    def cells(row: dict[str, Any]) -> list[str]:
        test = "diverged" if row["diverged"] else format(row["test"], ".4g")
        lr = "default" if row["lr"] is None else f"{row['lr']:g}{' *' if row['best_lr'] else ''}"
        reached = row["seconds_to_target"]
        return [
            row["optimizer"],
            lr,
            str(row["steps"]),
            f"{row['seconds']:.1f}",
            "diverged" if row["diverged"] else f"{row['final_train_loss']:.3e}",
            f"{row['best_train_loss']:.3e}",
            test,
            "-" if reached is None else f"{reached:.1f}",
        ]

    head = ["optimizer", "lr", "steps", "seconds", "final train loss", "best train loss"]
    head += [metric, "seconds to target"]
    lines = [head, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    # Names to the left, numbers to the right.
    align = [str.ljust] + [str.rjust] * (len(head) - 1)
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    padded = [[a(c, w) for a, c, w in zip(align, line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def describe_machine() -> str:
    """Processor, threads and versions: what the seconds depend on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        said = {key.strip(): value.strip() for key, _, value in lines}
        cpu = said.get("model name", cpu)
        if "cpu family" in said:  # names in virtual machines leave out the generation
            cpu += f" (family {said['cpu family']}, model {said.get('model', '?')})"
    bound = ", bound to cores" if os.environ.get("OMP_PROC_BIND", "false") != "false" else ""
    return (
        f"{cpu}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}{bound}, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"kfac_tn {kfac_tn.__version__}"
    )


def report(results: Results, setting: str, output: Path) -> str:
    """Write `results.md` and `results.json`, and return the former's text."""
    sections: list[str] = [f"Setting: {setting}."]
    record: dict[str, Any] = {}
    for problem, runs in results:
        rows, target = summarize(runs), target_loss(runs)
        sections += [f"## {problem.title}", markdown_table(rows, problem.metric)]
        uneven = uneven_clock(runs)
        if uneven:
            sections.append(
                "**The machine was busy**: the same steps took different times. Don't compare "
                "these seconds; repeat on a quiet machine, or with `--threads 1`."
            )
        record[problem.title] = {
            "metric": problem.metric,
            "target": target,
            "uneven_clock": uneven,
            "runs": rows,
        }
    sections.append(
        "\\* best learning rate of the grid. Target: the lowest final training loss of SGD and "
        "Adam; reached when an evaluation first finds it."
    )
    text = "\n\n".join(sections) + "\n"
    (output / "results.md").write_text(f"# Optimizers compared\n\n{text}\n![Curves](curves.png)\n")
    (output / "results.json").write_text(
        json.dumps({"setting": setting, "problems": record}, indent=1, allow_nan=False)
    )
    return text


def draw_runs(ax: Axes, runs: Sequence[Run], clock: str) -> None:
    """Training loss over `clock` ("step" or "seconds"), the rest of the grid in the background."""
    best = best_runs(runs)
    for run in runs:
        strong = run is best[run.name]
        label = run.label + (" (diverged)" if run.diverged else "")
        ax.plot(
            [getattr(point, clock) for point in run.curve],
            [point.train_loss for point in run.curve],
            color=COLORS[run.name],
            # On layers without weight sharing both KFACs are the same: dashes show both.
            linestyle=(0, (3, 1.5)) if run.name == "KFAC-reduce" else "-",
            linewidth=(2.4 if run.lr is None else 1.8) if strong else 0.8,
            alpha=1.0 if strong else 0.3,
            zorder=(4 if run.lr is None else 3) if strong else 2,
            label=label if strong else None,
        )
    ax.set_yscale("log")
    # A diverging run may go anywhere; the picture is about the others.
    ax.set_ylim(top=2 * max(run.curve[0].train_loss for run in runs))
    ax.set_xlim(left=0)
    ax.grid(color="0.9", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)


def draw(results: Results, setting: str, path: Path) -> None:
    """One row of two panels for each problem: loss over steps, and over seconds."""
    figure, axes = plt.subplots(
        len(results), 2, figsize=(11, 4.2 * len(results) + 0.6), squeeze=False, sharey="row"
    )
    for (over_steps, over_seconds), (problem, runs) in zip(axes, results, strict=True):
        draw_runs(over_steps, runs, "step")
        draw_runs(over_seconds, runs, "seconds")
        over_steps.set_title(problem.title, loc="left", fontweight="bold")
        over_steps.set(xlabel="steps", ylabel="training loss")
        over_seconds.set(xlabel="seconds of training")
        target = target_loss(runs)
        if target is not None:
            style = {"color": "0.3", "linewidth": 1.0, "linestyle": ":", "zorder": 1}
            over_seconds.axhline(target, label="best of SGD and Adam at the end", **style)
        over_seconds.plot([], [], color="0.8", linewidth=0.8, label="other learning rates")
        over_seconds.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none")
    figure.text(0.01, 0.005, setting, fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=150)


# -------------------------------------------------------------------------------------- main


def learning_rates(problem: Problem, optimizer: str, quick: bool) -> Sequence[float | None]:
    """The grid of this optimizer (its middle if quick), or a single None if it needs none."""
    grid = problem.learning_rates.get(optimizer)
    if grid is None:
        return [None]
    return [grid[len(grid) // 2]] if quick else grid


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="digits", help="all but digits need torchvision")
    add("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    add("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    add("--seconds", type=float, help="training time of each run (default: 10; quick: 1)")
    add("--batch-size", type=int, default=256)
    add("--threads", type=int, help="default: torch's; 1 is steadier on a shared machine")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a second for each run, one learning rate each")
    add("--output", type=Path, default=Path("outputs/compare_optimizers"))
    add("--show", action="store_true", help="open the picture in a window")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (1.0 if options.quick else 10.0)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print, write, draw."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    images = load_images(options.dataset)
    setting = (
        f"{options.seconds:g} s for each run, batches of {options.batch_size}, "
        f"seed {options.seed}; {describe_machine()}"
    )
    results: list[tuple[Problem, list[Run]]] = []
    for name in options.problems:
        problem = PROBLEMS[name](images, options.dataset)
        runs = [
            Run(problem, optimizer, lr, options.batch_size, options.seed)
            for optimizer in options.optimizers
            for lr in learning_rates(problem, optimizer, options.quick)
        ]
        print(f"{problem.title}: {len(runs)} runs", flush=True)
        compete(runs, options.seconds)
        results.append((problem, runs))

    options.output.mkdir(parents=True, exist_ok=True)
    print(f"\n{report(results, setting, options.output)}")
    picture = options.output / "curves.png"
    draw(results, setting, picture)
    print(f"Picture: {picture}")
    if options.show:
        plt.show()


if __name__ == "__main__":
    main()
