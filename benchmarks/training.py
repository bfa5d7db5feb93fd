"""KFAC on its defaults against tuned optimizers: seconds and steps to the best loss of them all.

    python benchmarks/training.py        # 25 minutes; benchmarks/results/training.{md,json,png}

or, each problem for as long as it deserves, by several processes (seconds per run and problem are
in `training_problems.py`; everything takes about 45 times that), then one report of their parts:

    python benchmarks/training.py --seconds-scale 1 --threads 1 --problems cnn --output part-1
    python benchmarks/training.py --report part-1/training.json part-2/training.json

Each competitor has the best of a grid of learning rates, with a constant or a cosine schedule,
found by successive halving on the first seed: all learning rates for a short time, the best two
longer, with both schedules, and these again for the full time (a short time tells little of what
they end at). The best setting then trains for the full time from each seed, beside KFAC. All runs
of a seed start from the same weights and see the same batches in the same order.

The runs of a problem take turns in slices of at most a quarter of a second. Each has a clock that
counts its training steps only; after every slice the loss on a fixed part of the training set is
recorded. So all have the same seconds, and whatever else the machine does meets all alike. Steps
are forward and backward passes. The seconds per run follow from `--limit-seconds` and from what
the search took; the report states them. A run that raises or diverges is recorded as failed.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from measuring import ROOT, machine, shuffled_batches
from measuring import seconds as seconds_of
from torch import Tensor
from training_competitors import COMPETITORS, OURS, Competitor, kfac
from training_problems import TASKS, Task
from training_report import draw, merged, summarize, write_report

SLICE = 0.25  # seconds of training before the next run's turn, at most
TURNS = 64  # at least so many in the final runs, so that short ones are resolved in time and steps
ROUNDS = (1 / 12, 1 / 5, 1.0)  # of the full time: all learning rates, twice the best two
BALLAST = 1.25  # wall-clock seconds per second of training that the first plan assumes


# ---- runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Which optimizer, and how; KFAC has its defaults."""

    name: str
    lr: float | None = None
    schedule: str = "constant"

    def __str__(self) -> str:
        return self.name if self.lr is None else f"{self.name}, lr {self.lr:g}, {self.schedule}"


@dataclass
class Run:
    """A model in training, on a clock that stands still outside of training steps.

    Args:
        task: What to train.
        setting: Optimizer, learning rate and schedule.
        seed: Determines the initial weights and the order of the batches.
        horizon: Seconds after which a cosine schedule has come down to nothing.
    """

    task: Task
    setting: Setting
    seed: int
    horizon: float
    steps: int = 0
    seconds: float = 0.0
    failure: str | None = None
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, steps, loss

    def __post_init__(self) -> None:
        """Initial weights, the optimizers, and the first evaluation."""
        task, setting = self.task, self.setting
        torch.manual_seed(self.seed)
        self.model, self.loss_fn = task.problem.build(), task.problem.loss()
        self.large = setting.lr is not None and COMPETITORS[setting.name].large_batch
        if setting.lr is None:
            self.optimizers = kfac(self.model, self.loss_fn)
        else:
            self.optimizers = COMPETITORS[setting.name].make(self.model, task, setting.lr)
        self.groups = [(g, g["lr"]) for o in self.optimizers for g in o.param_groups]
        x, y = task.problem.train
        size = task.large_batch or len(x) if self.large else task.batch_size
        self.batches = shuffled_batches(x, y, size, self.seed)
        self.evaluate()

    @property
    def final_loss(self) -> float:
        """Of the last evaluation; infinite if the run failed."""
        return math.inf if self.failure else self.curve[-1][2]

    def advance(self, until: float) -> None:
        """Train up to this time of the run's own clock, unless it fails."""
        try:
            while self.seconds < until and not self.failure:
                x, y = next(self.batches)
                start = perf_counter()
                try:
                    loss = self._step(x, y)
                finally:
                    self.seconds += perf_counter() - start
                if not math.isfinite(float(loss)):
                    self.failure = f"the loss was {float(loss)} in step {self.steps}"
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        if self.setting.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * min(1.0, self.seconds / self.horizon)))
            for group, lr in self.groups:
                group["lr"] = factor * lr

        def closure() -> Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = self.loss_fn(self.model(x), y)
            loss.backward()
            self.steps += 1
            return loss

        if self.large:
            return self.optimizers[0].step(closure).detach()
        loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def measure(self) -> float:
        """The loss on the fixed part of the training set."""
        x, y = (part[: self.task.evaluated] for part in self.task.problem.train)
        self.model.eval()
        loss = self.task.problem.loss()(self.model(x), y).item()  # its own: KFAC watches the other
        self.model.train()
        return loss

    def evaluate(self) -> None:
        """Add a point to the curve; an infinite loss once the run failed."""
        if not self.failure and self.curve and self.curve[-1][1] == self.steps:
            loss = self.curve[-1][2]  # a step longer than the slice: nothing new
        elif not self.failure:
            try:
                loss = self.measure()
            except Exception as error:
                self.failure = f"{type(error).__name__}: {error}"
            else:
                if not math.isfinite(loss):
                    self.failure = f"the loss was {loss} after step {self.steps}"
        self.curve.append((self.seconds, self.steps, math.inf if self.failure else loss))

    def close(self) -> None:
        """Let model and optimizer go; the curve stays."""
        del self.model, self.loss_fn, self.optimizers, self.groups, self.batches


def compete(runs: Sequence[Run], seconds: float, deadline: float, turns: int = 0) -> float:
    """Train all runs in turns.

    Args:
        runs: All of one task.
        seconds: Of training, for each.
        deadline: By `perf_counter`; when it has passed, all stop after the same turn.
        turns: At least so many, with an evaluation after each; if none, there is one at the end.

    Returns:
        How long each trained.
    """
    all_turns = max(turns, math.ceil(seconds / SLICE))
    for turn in range(1, all_turns + 1):
        for run in runs:
            # Up to a fixed moment: a slow last step is paid for in the next turn.
            run.advance(seconds * turn / all_turns)
            if turns:
                run.evaluate()
        if perf_counter() > deadline:
            break
    for run in runs:
        if not turns:
            run.evaluate()
        run.close()
    return seconds * turn / all_turns


# ---- search ----------------------------------------------------------------------------------


def search(
    task: Task, name: str, competitor: Competitor, seconds: float, deadline: float
) -> tuple[Setting, list[dict[str, Any]]]:
    """The best setting of a competitor, and what was tried.

    Raises:
        RuntimeError: If each run failed.
    """
    tried: list[dict[str, Any]] = []
    settings = [Setting(name, lr) for lr in competitor.learning_rates]
    for share in ROUNDS:
        if len(settings) == 1 and (share == 1 or len(competitor.schedules) == 1):
            return settings[0], tried  # there is no choice left
        runs = [Run(task, setting, 0, share * seconds) for setting in settings]
        compete(runs, share * seconds, deadline)
        runs.sort(key=lambda run: run.final_loss)
        tried += [
            {
                **asdict(run.setting),
                "seconds": run.seconds,
                "steps": run.steps,
                "loss": run.final_loss,
                "failure": run.failure,
            }
            for run in runs
        ]
        if runs[0].failure:
            raise RuntimeError(f"each run of the search failed, the last with: {runs[-1].failure}")
        best = [run.setting for run in runs if not run.failure]
        if share == ROUNDS[0]:
            settings = [Setting(name, s.lr, way) for s in best[:2] for way in competitor.schedules]
        else:
            settings = best
    return best[0], tried


def planned_seconds(competitors: Mapping[str, Competitor], seeds: int, wall: float) -> float:
    """Seconds of training per final run such that search and final runs of a task fit in `wall`."""
    total = float(seeds)
    for competitor in competitors.values():
        grid = len(competitor.learning_rates)
        best = min(2, grid) * len(competitor.schedules)
        total += seeds + ROUNDS[0] * grid + (ROUNDS[1] + ROUNDS[2]) * best
    return wall / (BALLAST * total)


def benchmark(
    task: Task,
    competitors: Mapping[str, Competitor],
    seeds: int,
    turns: int,
    end: float,
    given: float | None = None,
) -> dict[str, Any]:
    """One problem: search, final runs, summary.

    Ends at about `end` (by `perf_counter`), or takes the given seconds of training per run.
    """
    start = perf_counter()
    plan = given or planned_seconds(competitors, seeds, end - start)
    # What the very first steps pay (threads, allocator, plans) is nobody's disadvantage.
    for setting in (Setting("AdamW", 1e-3), Setting(OURS)):
        warm = Run(task, setting, 0, horizon=1.0)
        warm.advance(min(0.3, plan))
        evaluation = min(seconds_of(warm.measure) for _ in range(4))
    chosen: list[Setting] = []
    tried: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    # The final runs keep their part even if the search takes longer than planned.
    search_end = math.inf if given else start + 0.5 * (end - start)
    for name, competitor in competitors.items():
        try:
            best, found = search(task, name, competitor, plan, search_end)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"
            print(f"  {name} is left out: {left_out[name]}", flush=True)
            continue
        print(f"  {best}", flush=True)
        chosen.append(best)
        tried += found
    settings = [*chosen, Setting(OURS)]
    number = len(settings) * seeds
    # What each run has by the wall's clock, less its evaluations: at most half of it.
    wall = max(0.1, (end - perf_counter()) / (1.05 * number))
    turns = max(4, min(turns, int(wall / (2 * evaluation))))
    seconds = max(0.5 * wall, min(wall - turns * evaluation, wall / (1 + evaluation / SLICE)))
    if given:
        seconds, turns, end = given, TURNS, math.inf
    runs: list[Run] = []
    for seed in range(seeds):
        for setting in settings:
            try:
                runs.append(Run(task, setting, seed, seconds))
            except Exception as error:
                left_out[setting.name] = f"{type(error).__name__}: {error}"
    print(f"  {len(runs)} runs of {seconds:.1f} s", flush=True)
    trained = compete(runs, seconds, end + 0.1 * (end - start), turns)
    return summarize(task, settings, runs, seconds, trained, tried, left_out)


# ---- the script ------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--threads", type=int, default=2)
    add("--limit-seconds", type=float, help="for everything (default: 1500; quick: 25)")
    add("--seconds-scale", type=float, help="each problem's own seconds per run, times this")
    add("--report", type=Path, nargs="+", metavar="JSON", help="merge these results, train nothing")
    add("--seeds", type=int, help="default: 3; quick: 1")
    add("--problems", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--quick", action="store_true", help="one learning rate, one seed, a fraction of a second")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.limit_seconds = options.limit_seconds or (25.0 if options.quick else 1500.0)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, train, write after each problem."""
    start = perf_counter()
    options = parse_arguments(arguments)
    if options.report:
        setting, rows = merged(options.report, [TASKS[name]().problem.title for name in TASKS])
        write_report(options.output, setting, COMPETITORS, rows)
        draw(rows, setting, options.output / "training.png")
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # others' deprecations; what matters is in the results
    competitors = {
        name: replace(c, learning_rates=c.learning_rates[1:2]) if options.quick else c
        for name, c in COMPETITORS.items()
    }
    limited = f"{options.limit_seconds:g} s for everything"
    if options.seconds_scale:
        limited = f"seconds of each problem times {options.seconds_scale:g}"
    setting = f"{options.seeds} seed(s); {limited}; {machine('cpu')}"
    rows: list[dict[str, Any]] = []
    turns = 8 if options.quick else TURNS
    # Room for drawing, and for steps under way when the time is up.
    end = start + 0.94 * options.limit_seconds
    shares = {name: TASKS[name]().share for name in options.problems}
    for index, name in enumerate(options.problems):
        now = perf_counter()
        if now >= end and not options.seconds_scale:
            print(f"{name}: no time left", flush=True)
            continue
        share = shares[name] / sum(shares[later] for later in options.problems[index:])
        task = TASKS[name]()
        given = options.seconds_scale and options.seconds_scale * task.seconds
        until = now + share * (end - now)
        print(task.problem.title, "" if given else f"{until - now:.0f} s", flush=True)
        try:
            rows.append(benchmark(task, competitors, options.seeds, turns, until, given))
        except Exception:
            traceback.print_exc()
            print(f"{name}: no result", file=sys.stderr, flush=True)
            continue
        write_report(options.output, setting, competitors, rows)
    if not rows:
        raise SystemExit("no result")
    print((options.output / "training.md").read_text())
    draw(rows, setting, options.output / "training.png")
    print(f"{perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
