"""How much a layer's curvature may lack before its direction is divided: what the default is worth.

    python benchmarks/tolerance.py       # 15 minutes; benchmarks/results/tolerance.{md,json}

Training losses after so many steps, with `Adaptive(tolerance=...)` and nothing else set. Networks
of `training_problems.py`, whose curvature KFAC fits, want a large tolerance; those of
`model_zoo.py`, trained on few random images, and KFAC-reduce, a small one. Losses are medians over
seeds, of the batches of the last tenth of all steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import matplotlib.pyplot as plt
import torch
from measuring import ROOT, machine, markdown, shuffled_batches, write
from model_zoo import PROBLEMS
from torch import Tensor, nn
from training_problems import TASKS

import kfac_tn
from kfac_tn.optim import Adaptive

TOLERANCES = (1.0, 5.0, 10.0, 20.0, 40.0, math.inf)
DEFAULT = 20.0
STEPS = {"digits-autoencoder": 200, "regression": 400, "tabular": 400, "cnn-groupnorm": 60}
FEW = 16  # random images

Training = tuple[nn.Module, nn.Module, Iterator[tuple[Tensor, Tensor]]]


def task(name: str, seed: int) -> Training:
    """A training problem."""
    made = TASKS[name]()
    torch.manual_seed(seed)
    x, y = made.problem.train
    batches = shuffled_batches(x, y, made.batch_size, seed)
    return made.problem.build(), made.problem.loss(), batches


def few_images(name: str, seed: int) -> Training:
    """A model that learns a few random images by heart."""
    build, batch = PROBLEMS[name]
    torch.manual_seed(seed)
    model, data = build(), batch(FEW)
    return model, nn.CrossEntropyLoss(), iter(lambda: data, None)


def train(make: Callable[[int], Training], steps: int, seed: int, **options: object) -> float:
    """The loss at the end."""
    model, loss_fn, batches = make(seed)
    optimizer = kfac_tn.KFAC(model, loss_fn, **options)
    losses = []
    for step, (x, y) in zip(range(steps), batches, strict=False):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-max(1, steps // 10) :])


def draw(rows: list[dict], tolerances: tuple[float, ...], output: Path) -> None:
    """Losses over those of the default, by tolerance."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        medians = {t: statistics.median(of) for t, of in row["losses"].items()}
        ratios = [loss / medians[str(DEFAULT)] for loss in medians.values()]
        axes.plot(range(len(ratios)), ratios, marker="o", label=row["problem"])
    axes.set_xticks(range(len(tolerances)), [f"{tolerance:g}" for tolerance in tolerances])
    axes.set(yscale="log", xlabel="tolerance", ylabel="loss over the default's")
    axes.legend(fontsize="small")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "tolerance.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="of the models of few images")
    parser.add_argument("--quick", action="store_true", help="two steps of few problems")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options, start = parser.parse_args(), perf_counter()
    torch.set_num_threads(options.threads)
    runs: list[tuple[str, Callable[[int], Training], int, dict[str, str]]] = []
    for name, steps in STEPS.items():
        runs.append((name, lambda seed, name=name: task(name, seed), steps, {}))
    for name in ("ViT", "ConvNeXt-like"):
        for approximation in ("expand", "reduce"):
            make = lambda seed, name=name: few_images(name, seed)  # noqa: E731
            chosen = {"approximation": approximation}
            runs.append((f"{name}, {FEW} images, {approximation}", make, options.steps, chosen))
    tolerances, seeds = TOLERANCES, range(options.seeds)
    if options.quick:
        runs, tolerances, seeds = runs[2:3] + runs[-1:], TOLERANCES[-3:], range(1)
    rows = []
    for title, make, steps, chosen in runs:
        steps = 2 if options.quick else steps
        losses = {
            str(tolerance): [
                train(make, steps, seed, step_rule=Adaptive(tolerance=tolerance), **chosen)
                for seed in seeds
            ]
            for tolerance in tolerances
        }
        rows.append({"problem": title, "steps": steps, "losses": losses})
        print(title, {t: f"{statistics.median(of):.2e}" for t, of in losses.items()}, flush=True)
    setting = f"{len(seeds)} seeds, {perf_counter() - start:.0f} s in all; {machine('cpu')}."
    head = ["problem", "steps", *(f"tolerance {tolerance:g}" for tolerance in tolerances)]
    medians = [[f"{statistics.median(of):.2e}" for of in row["losses"].values()] for row in rows]
    named = ([row["problem"], row["steps"]] for row in rows)
    table = markdown(head, ([*name, *cells] for name, cells in zip(named, medians, strict=True)))
    draw(rows, tolerances, options.output)
    lines = [
        "# What a layer's curvature may lack",
        __doc__.split("\n\n")[2].strip(),
        setting,
        table,
        "![Losses](tolerance.png)",
    ]
    write(options.output, "tolerance", setting, rows, "\n\n".join(lines))


if __name__ == "__main__":
    main()
