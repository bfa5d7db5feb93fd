"""What a training step costs with KFAC, beside AdamW, on the models of the main example.

    python benchmarks/step.py            # writes benchmarks/results/step.md and step.json

Both optimizers train their own copy of a model in one process, in alternating blocks of as many
steps as KFAC's inverse interval: so a block holds all the work that the intervals amortize
(statistics, inverses), and whatever else the machine does meets both alike. The ratio is the median
over pairs of blocks of one repetition. Memory is what the optimizer keeps between steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import kfac_tn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from compare_optimizers import describe_machine, shuffled_batches  # noqa: E402
from problems import PROBLEMS, Problem, load_images  # noqa: E402

OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], Optimizer]] = {
    "AdamW": lambda model, loss_fn: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "KFAC-expand": lambda model, loss_fn: kfac_tn.KFAC(model, loss_fn, approximation="expand"),
    "KFAC-reduce": lambda model, loss_fn: kfac_tn.KFAC(model, loss_fn, approximation="reduce"),
}


class Training:
    """One optimizer on one problem; counts the seconds of whole steps and of ``step()`` alone."""

    def __init__(self, problem: Problem, name: str, batch_size: int):
        torch.manual_seed(0)
        self.model, self.loss_fn = problem.build(), problem.loss()
        self.optimizer = OPTIMIZERS[name](self.model, self.loss_fn)
        self.batches: Iterator[tuple[Tensor, Tensor]]
        self.batches = shuffled_batches(*problem.train, batch_size, seed=0)

    def run(self, steps: int) -> tuple[float, float]:
        """Milliseconds per step: of everything, and of ``optimizer.step()``."""
        whole = own = 0.0
        for _ in range(steps):
            x, y = next(self.batches)
            start = perf_counter()
            self.optimizer.zero_grad()
            self.loss_fn(self.model(x), y).backward()
            before = perf_counter()
            self.optimizer.step()
            end = perf_counter()
            whole, own = whole + end - start, own + end - before
        return 1e3 * whole / steps, 1e3 * own / steps

    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state."""
        return _bytes(self.optimizer.state_dict())


def _bytes(state: object) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state
    return sum(map(_bytes, values)) if isinstance(state, dict | list | tuple) else 0


def measure(problem: Problem, batch_size: int, block: int, repetitions: int) -> list[dict]:
    """A row for each optimizer: medians over the repetitions."""
    trainings = {name: Training(problem, name, batch_size) for name in OPTIMIZERS}
    for training in trainings.values():  # the first steps are denser in statistics: amortized away
        training.run(block)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainings}
    for _ in range(repetitions):
        for name, training in trainings.items():
            times[name].append(training.run(block))
    reference = [whole for whole, _ in times["AdamW"]]
    parameters = _bytes([*trainings["AdamW"].model.parameters()])
    return [
        {
            "problem": problem.title,
            "optimizer": name,
            "ms per step": statistics.median(whole for whole, _ in times[name]),
            "of it in step()": statistics.median(own for _, own in times[name]),
            "ratio to AdamW": statistics.median(
                whole / base for (whole, _), base in zip(times[name], reference, strict=True)
            ),
            "state, in parameters": training.state_bytes() / parameters,
        }
        for name, training in trainings.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--block", type=int, default=100, help="steps before the next one's turn")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load_images("digits")
    rows: list[dict] = []
    for build in PROBLEMS.values():
        problem = build(images, "digits")
        rows += measure(problem, options.batch_size, options.block, options.repetitions)
    setting = (
        f"Batches of {options.batch_size}, medians of {options.repetitions} interleaved blocks of "
        f"{options.block} steps; {describe_machine()}."
    )
    head = list(rows[0])
    cells = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "step.md").write_text(f"# Cost of a step\n\n{setting}\n\n{table}\n")
    record = {"setting": setting, "rows": rows}
    (options.output / "step.json").write_text(json.dumps(record, indent=1))
    print(f"{setting}\n\n{table}")


if __name__ == "__main__":
    main()
