"""What a training step costs with KFAC on its defaults, beside AdamW, amortized over its intervals.

    python benchmarks/step.py            # writes benchmarks/results/step.{md,json,png}

The problems of `training.py`, at its batch sizes, and a small ViT and GPT (`model_zoo.py`, batches
of 8, random data). AdamW is torch's default (on the CPU a loop over the parameters); its fused form
stands beside it. Each optimizer trains its own copy of a model in one process, a few steps at a
time, in turn: whatever else the machine does meets all alike. KFAC's steps are of five kinds, and
each is measured: those that renew nothing, those with statistics, those in which the step rule
measures the curvature along its direction, those in which it looks where the step goes, those with
inverses. Amortized is the first plus what
the others take more, divided by their intervals. (The first steps, in which curvature is renewed
more often, are not in it: their share depends on the length of a training.)
The bound is what no arrangement of KFAC's exact float32 products could beat on the machine at hand:
(AdamW's time + the products alone, bare, by the faster of torch's BLAS and oneDNN) / AdamW's time.
The state is what the optimizer keeps between steps. What is freed stays with the process
(`measuring.keep_memory`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from measuring import keep_memory, machine, markdown, parser, shuffled_batches, write
from model_zoo import PROBLEMS as MODELS
from torch import Tensor, nn
from torch.optim import Optimizer
from training_problems import TASKS

import kfac_tn
from kfac_tn.layers import partition
from kfac_tn.optim import Adaptive
from kfac_tn.optim.adaptive import LOOKS
from kfac_tn.tn.gemm import multiply

OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], Optimizer]] = {
    "AdamW": lambda model, loss_fn: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "AdamW, fused": lambda model, loss_fn: torch.optim.AdamW(
        model.parameters(), lr=1e-3, fused=True
    ),
    "KFAC-expand": lambda model, loss_fn: kfac_tn.KFAC(model, loss_fn, approximation="expand"),
    "KFAC-reduce": lambda model, loss_fn: kfac_tn.KFAC(model, loss_fn, approximation="reduce"),
}
KINDS = ("idle", "statistics", "measurement", "look", "inverses")
NEVER = 10**9
LATE = 200  # steps after which is measured, as far as it matters


@dataclass(frozen=True)
class Task:
    """A model, its loss and endless batches."""

    title: str
    build: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]


def tasks(quick: bool) -> list[Task]:
    """What is trained."""
    found = []
    for make in TASKS.values():
        task = make()
        size = 16 if quick else task.batch_size
        found.append(
            Task(
                task.problem.title,
                task.problem.build,
                task.problem.loss,
                lambda task=task, size=size: shuffled_batches(*task.problem.train, size, seed=0),
            )
        )
    for name in ("ViT", "GPT"):
        model, draw = MODELS[name]
        batch = draw(2 if quick else 8)
        found.append(
            Task(name, model, nn.CrossEntropyLoss, lambda batch=batch: itertools.repeat(batch))
        )
    return found


class Training:
    """One optimizer on one task; counts the seconds of whole steps and of ``step()`` alone."""

    def __init__(self, task: Task, name: str, device: str):
        torch.manual_seed(0)
        self.device = device
        self.model, self.loss_fn = task.build().to(device), task.loss()
        self.optimizer = OPTIMIZERS[name](self.model, self.loss_fn)
        self.batches = task.batches()
        for _ in range(3):  # moments, factors and inverses are there then
            self.run("idle")

    @property
    def intervals(self) -> tuple[int, ...]:
        """Steps between those of each kind but the first."""
        if not isinstance(self.optimizer, kfac_tn.KFAC):
            return (1, 1, 1, 1)
        statistics, inverses = self.optimizer.diagnostics().intervals
        return statistics, Adaptive().interval, LOOKS, inverses

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of steps that there are."""
        return KINDS if isinstance(self.optimizer, kfac_tn.KFAC) else KINDS[:1]

    def run(self, kind: str) -> tuple[float, float]:
        """Milliseconds of a step: of everything, and of ``optimizer.step()``."""
        x, y = (part.to(self.device) for part in next(self.batches))
        if isinstance(self.optimizer, kfac_tn.KFAC) and self.optimizer.steps_taken >= 3:
            self._choose(self.optimizer, kind)
        start = self._now()
        self.optimizer.zero_grad()
        self.loss_fn(self.model(x), y).backward()
        before = self._now()
        self.optimizer.step()
        end = self._now()
        return 1e3 * (end - start), 1e3 * (end - before)

    def _choose(self, optimizer: kfac_tn.KFAC, kind: str) -> None:
        """Set the counter of steps, and what depends on it, to where just this is due."""
        estimator, rule, replay = optimizer._estimator, optimizer._rule, optimizer._replay
        assert isinstance(rule, Adaptive)
        assert replay is not None
        late = 1000 * estimator.intervals[1]
        estimator.steps = late + {"inverses": 0, "look": LOOKS - 1}.get(kind, 1)
        rule.begun = late - LATE  # as far as averages reach then
        estimator.capture.armed = kind == "statistics"
        rule.interval = 1 if kind == "measurement" else NEVER
        replay.armed = kind == "measurement"

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state."""
        return _bytes(self.optimizer.state_dict())


class Products:
    """KFAC's matrix products alone: B^-1 G A^-1 for every layer, of random matrices."""

    kinds = KINDS[:1]

    def __init__(self, task: Task, device: str):
        blocks, _ = partition(task.build())
        self.matrices = [
            tuple(
                torch.randn(b.groups, *shape, device=device)
                for shape in ((rows, rows), (rows, columns), (columns, columns))
            )
            for b in blocks
            for rows, columns in [(b.grad_output_dim, b.input_dim + (b.bias is not None))]
        ]
        self.device = device

    def run(self, kind: str) -> tuple[float, float]:
        """Milliseconds, twice."""
        start = perf_counter()
        for left, middle, right in self.matrices:
            multiply(multiply(left, middle), right)
        if self.device == "cuda":
            torch.cuda.synchronize()
        took = 1e3 * (perf_counter() - start)
        return took, took


def _bytes(state: object) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state
    return sum(map(_bytes, values)) if isinstance(state, dict | list | tuple) else 0


def measure(task: Task, idle: int, budget: float, most: int, device: str) -> list[dict]:
    """A row for each optimizer: medians over the repetitions, of ``idle`` idle steps each."""
    start = perf_counter()
    trainings = {name: Training(task, name, device) for name in OPTIMIZERS}
    runners = {**trainings, "products": Products(task, device)}
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {kind: [] for kind in KINDS} for name in runners
    }
    for repetition in range(most):
        if repetition and (perf_counter() - start) * (1 + 1 / repetition) > budget:
            break
        for name, runner in runners.items():
            for kind in [*["idle"] * idle, *runner.kinds[1:]]:
                times[name][kind].append(runner.run(kind))

    def median(name: str, kind: str, which: int = 0) -> float:
        return statistics.median(each[which] for each in times[name][kind])

    parameters = _bytes([*trainings["AdamW"].model.parameters()])
    rows = []
    for name, training in trainings.items():
        row: dict = {"problem": task.title, "optimizer": name, "idle, ms": median(name, "idle")}
        row["of it in step()"] = median(name, "idle", 1)
        row["ms per step"] = row["idle, ms"]
        for kind, interval in zip(training.kinds[1:], training.intervals, strict=False):
            row[f"{kind}, ms"] = median(name, kind) - row["idle, ms"]
            row["ms per step"] += row[f"{kind}, ms"] / interval
        row["intervals"] = training.intervals
        rows.append(row)
    base = rows[0]["ms per step"]
    for row, training in zip(rows, trainings.values(), strict=True):
        is_kfac = isinstance(training.optimizer, kfac_tn.KFAC)
        row["ratio to AdamW"] = row["ms per step"] / base
        row["bound"] = 1 + median("products", "idle") / base if is_kfac else None
        row["state, in parameters"] = training.state_bytes() / parameters
        row["repetitions"] = len(times["AdamW"]["idle"]) // idle
    return rows


def table(rows: list[dict]) -> str:
    """The numbers, AdamW's intervals left out."""
    head = [
        "problem", "optimizer", "ms per step", "ratio to AdamW", "bound", "idle, ms",
        "of it in step()", "statistics, ms", "measurement, ms", "look, ms", "inverses, ms",
        "intervals", "state, in parameters",
    ]  # fmt: skip

    def cell(row: dict, name: str) -> object:
        value = row.get(name)
        if name == "intervals":
            return " / ".join(map(str, row[name])) if row["bound"] else ""
        return "" if value is None else value

    return markdown(head, [[cell(row, name) for name in head] for row in rows])


def plot(rows: list[dict], path: Path) -> None:
    """The ratios, a group of bars for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = list(dict.fromkeys(row["problem"] for row in rows))
    figure, ax = plt.subplots(figsize=(13, 4.5), layout="constrained")
    for index, name in enumerate(OPTIMIZERS):
        mine = [row for row in rows if row["optimizer"] == name]
        places = [n + 0.2 * (index - 1.5) for n in range(len(titles))]
        ax.bar(places, [row["ratio to AdamW"] for row in mine], 0.19, label=name)
    bounds = [row["bound"] for row in mine]
    label = "AdamW and the exact products"
    places = [n + 0.2 for n in range(len(titles))]
    ax.scatter(places, bounds, s=60, c="black", marker="_", label=label)
    shown = [title.split(" on ")[0].split(",")[0] for title in titles]
    digits = ["\n(digits)" if "digits" in title else "" for title in titles]
    labels = [name + more for name, more in zip(shown, digits, strict=True)]
    ax.set_xticks(range(len(titles)), labels, fontsize=8)
    ax.set_ylabel("time of a step / AdamW's")
    for height in (1, 1.25):
        ax.axhline(height, color="black", linewidth=0.8, linestyle="--")
    ax.grid(axis="y", alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    options_of = parser(__doc__, limit_seconds=600, quick="a few steps, small batches")
    options_of.add_argument("--idle", type=int, default=5, help="idle steps of each turn")
    options_of.set_defaults(repetitions=60)
    options = options_of.parse_args()
    if options.quick:
        options.idle, options.repetitions, options.limit_seconds = 1, 3, 10
    torch.set_num_threads(options.threads)
    keep_memory()
    rows: list[dict] = []
    end, todo = perf_counter() + options.limit_seconds, tasks(options.quick)
    for index, task in enumerate(todo):
        budget = (end - perf_counter()) / (len(todo) - index)
        rows += measure(task, options.idle, budget, options.repetitions, options.device)
        print(table(rows[-len(OPTIMIZERS) :]), flush=True)
    setting = (
        f"Medians of up to {options.repetitions} turns, of {options.idle} idle steps and one of "
        f"each other kind, float32 on {options.device}; {machine(options.device)}."
    )
    report = f"# Cost of a step\n\n{setting}\n\n{table(rows)}"
    write(options.output, "step", setting, rows, report)
    plot(rows, options.output / "step.png")


if __name__ == "__main__":
    main()
