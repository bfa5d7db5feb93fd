"""What a training step costs with KFAC, beside AdamW, amortized over its intervals.

    python benchmarks/step.py            # writes benchmarks/results/step.{md,json,png}

The models of the main example (`examples/problems.py`, batches of 256), and a small ViT and GPT
(`model_zoo.py`, batches of 8, random data). The optimizers train each their own copy of a model in
one process, in alternating blocks of as many steps as KFAC's inverse interval: so a block holds all
the work that the intervals amortize (statistics, inverses), and whatever else the machine does
meets all alike. The ratio is the median over pairs of blocks of one repetition. The state is what
the optimizer keeps between steps.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from measuring import machine, markdown, parser, shuffled_batches, write
from model_zoo import PROBLEMS as MODELS
from problems import PROBLEMS, load_images
from torch import Tensor, nn
from torch.optim import Optimizer

import kfac_tn

OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], Optimizer]] = {
    "AdamW": lambda model, loss_fn: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "KFAC-expand": lambda model, loss_fn: kfac_tn.KFAC(model, loss_fn, approximation="expand"),
    "KFAC-reduce": lambda model, loss_fn: kfac_tn.KFAC(model, loss_fn, approximation="reduce"),
}


@dataclass(frozen=True)
class Task:
    """A model, its loss and endless batches."""

    title: str
    build: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]


def tasks(quick: bool) -> list[Task]:
    """What is trained."""
    images = load_images("digits")
    found = []
    for build in PROBLEMS.values():
        problem = build(images, "digits")
        found.append(
            Task(
                problem.title,
                problem.build,
                problem.loss,
                lambda problem=problem: shuffled_batches(*problem.train, 256, seed=0),
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

    def run(self, steps: int) -> tuple[float, float]:
        """Milliseconds per step: of everything, and of ``optimizer.step()``."""
        whole = own = 0.0
        for _ in range(steps):
            x, y = (part.to(self.device) for part in next(self.batches))
            start = perf_counter()
            self.optimizer.zero_grad()
            self.loss_fn(self.model(x), y).backward()
            before = perf_counter()
            self.optimizer.step()
            end = perf_counter()
            whole, own = whole + end - start, own + end - before
        return 1e3 * whole / steps, 1e3 * own / steps

    def skip_start(self) -> None:
        """Leave out KFAC's first steps, in which curvature is renewed more often: set the counter.

        How often over a whole training depends on its length.
        """
        state = self.optimizer.state_dict()
        if "curvature" in state:
            state["curvature"]["steps"] = 1000
            self.optimizer.load_state_dict(state)

    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state."""
        return _bytes(self.optimizer.state_dict())


def _bytes(state: object) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state
    return sum(map(_bytes, values)) if isinstance(state, dict | list | tuple) else 0


def measure(task: Task, block: int, budget: float, most: int, device: str) -> list[dict]:
    """A row for each optimizer: medians over the repetitions."""
    start = perf_counter()
    trainings = {name: Training(task, name, device) for name in OPTIMIZERS}
    for training in trainings.values():
        training.run(3)
        training.skip_start()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainings}
    for repetition in range(most):
        if repetition and (perf_counter() - start) * (1 + 1 / repetition) > budget:
            break
        for name, training in trainings.items():
            times[name].append(training.run(block))
    reference = [whole for whole, _ in times["AdamW"]]
    parameters = _bytes([*trainings["AdamW"].model.parameters()])
    return [
        {
            "problem": task.title,
            "optimizer": name,
            "ms per step": statistics.median(whole for whole, _ in times[name]),
            "of it in step()": statistics.median(own for _, own in times[name]),
            "ratio to AdamW": statistics.median(
                whole / base for (whole, _), base in zip(times[name], reference, strict=True)
            ),
            "state, in parameters": training.state_bytes() / parameters,
            "blocks": len(times[name]),
        }
        for name, training in trainings.items()
    ]


def plot(rows: list[dict], path: Path) -> None:
    """The ratios, a group of bars for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = list(dict.fromkeys(row["problem"] for row in rows))
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    for index, name in enumerate(OPTIMIZERS):
        values = [row["ratio to AdamW"] for row in rows if row["optimizer"] == name]
        ax.bar([n + 0.27 * (index - 1) for n in range(len(titles))], values, 0.25, label=name)
    ax.set_xticks(range(len(titles)), [title.replace(", ", ",\n") for title in titles])
    ax.set_ylabel("time of a step / AdamW's")
    ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
    ax.grid(axis="y", alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    options_of = parser(__doc__, limit_seconds=400, quick="short blocks, small batches")
    options_of.add_argument("--block", type=int, default=100, help="steps before the next's turn")
    options_of.set_defaults(repetitions=15)
    options = options_of.parse_args()
    if options.quick:
        options.block, options.limit_seconds = 5, 10
    torch.set_num_threads(options.threads)
    rows: list[dict] = []
    end, todo = perf_counter() + options.limit_seconds, tasks(options.quick)
    for index, task in enumerate(todo):
        budget = (end - perf_counter()) / (len(todo) - index)
        rows += measure(task, options.block, budget, options.repetitions, options.device)
        print(markdown(rows[-1], [row.values() for row in rows[-len(OPTIMIZERS) :]]), flush=True)
    setting = (
        f"Medians of up to {options.repetitions} interleaved blocks of {options.block} steps, "
        f"float32 on {options.device}; {machine(options.device)}."
    )
    table = markdown(rows[0], [row.values() for row in rows])
    write(options.output, "step", setting, rows, f"# Cost of a step\n\n{setting}\n\n{table}")
    plot(rows, options.output / "step.png")


if __name__ == "__main__":
    main()
