"""KFAC passes of whole models beside forward and backward: kfac_tn and other packages.

    python benchmarks/models.py            # writes benchmarks/results/models.{md,json,png}

For each model (`model_zoo.py`, batches of 32, Monte-Carlo Fisher with one sample), as multiples of
forward + backward with gradients of all parameters:

- step: a training step's forward + backward with the hooks armed, the extra backward pass and
  averaging the factors over steps included. So the extra work is this minus 1. BackPACK's KFAC
  works in this way too, without the averages.
- pass: the curvature alone, as `compute_kfac` on one batch: forward, the Fisher's backward,
  factors; no gradients for a step. curvlinops and nngeometry work in this way.

What a package can't do is left out for it, as far as it lets itself be told: curvlinops and
nngeometry are given the linear layers and 2d convolutions only. What it refuses nevertheless is
printed as refused, with what it says; so is a package that isn't installed
(`pip install backpack-for-pytorch curvlinops-for-pytorch nngeometry`). The ways take turns in one
process, each on a model of its own; times are medians. On a shared machine, the fastest turns tell
what it takes while nobody else fills the caches. What is freed stays with the process
(`measuring.keep_memory`). Memory is the largest that is allocated during the pass, plus the
parameters. The factors that result are part of it, and listed too; averages that an optimizer keeps
between steps are there before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch
from measuring import (
    Call,
    conditions,
    keep_memory,
    markdown,
    parser,
    peak_bytes,
    seconds,
    take_turns,
    write,
)
from model_zoo import PROBLEMS
from torch import nn

import kfac_tn
from kfac_tn.capture import Capture
from kfac_tn.curvature.moving import MovingFactors
from kfac_tn.layers import LayerBlock, partition

BASE = "forward + backward"


class Setting:
    """A model, a batch and the loss."""

    def __init__(self, name: str, batch: int, device: str):
        torch.manual_seed(0)
        build, draw = PROBLEMS[name]
        self.model, (x, y) = build().to(device), draw(batch)
        self.x, self.y = x.to(device), y.to(device)
        self.loss_fn = nn.CrossEntropyLoss()

    def train(self) -> None:
        """Forward and backward; the gradients go at once."""
        self.loss_fn(self.model(self.x), self.y).backward()
        self.model.zero_grad(set_to_none=True)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """What every package has KFAC for."""
        kinds = nn.Linear, nn.Conv2d
        return {n: m for n, m in self.model.named_modules() if isinstance(m, kinds)}


def _base(setting: Setting) -> Call:
    return setting.train


def _our_step(approximation: str) -> Callable[[Setting], Call]:
    def prepare(setting: Setting) -> Call:
        blocks, _ = partition(setting.model, approximation)
        capture = Capture(blocks, setting.loss_fn, "mc")
        moving = {block: MovingFactors([block], decay=0.9) for block in blocks}

        def call() -> None:
            setting.train()
            for block, factors in capture.take().factors.items():
                moving[block].update({block: factors})

        return call

    return prepare


def _our_pass(approximation: str) -> Callable[[Setting], Call]:
    def prepare(setting: Setting) -> Call:
        data = [(setting.x, setting.y)]
        model, loss_fn = setting.model, setting.loss_fn
        return lambda: kfac_tn.compute_kfac(model, loss_fn, data, approximation, "mc")

    return prepare


def _curvlinops(approximation: str) -> Callable[[Setting], Call]:
    def prepare(setting: Setting) -> Call:
        from curvlinops import KFACLinearOperator

        layers = setting.layers.values()
        parameters = [p for layer in layers for p in layer.parameters(recurse=False)]

        def call() -> object:
            operator = KFACLinearOperator(
                setting.model,
                setting.loss_fn,
                parameters,
                [(setting.x, setting.y)],
                check_deterministic=False,
                fisher_type="mc",
                kfac_approx=approximation,
                separate_weight_and_bias=False,
                # of tokens: one for each position; of images as many as examples
                num_per_example_loss_terms=setting.y[0].numel(),
            )
            operator.compute_kronecker_factors()
            return operator

        return call

    return prepare


def _backpack(setting: Setting) -> Call:
    from backpack import backpack, extend
    from backpack.extensions import KFAC

    model, loss_fn = extend(setting.model, use_converter=True), extend(setting.loss_fn)

    def call() -> None:
        with backpack(KFAC(mc_samples=1)):
            loss_fn(model(setting.x), setting.y).backward()
        for parameter in model.parameters():
            parameter.grad = None
            if hasattr(parameter, "kfac"):
                del parameter.kfac

    return call


def _nngeometry(setting: Setting) -> Call:
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatKFAC
    from torch.utils.data import DataLoader, TensorDataset

    layers = LayerCollection()
    for layer in setting.layers.values():
        layers.add_layer_from_model(setting.model, layer)
    loader = DataLoader(TensorDataset(setting.x, setting.y), batch_size=len(setting.x))
    variant = "classif_logits" if setting.y.dim() == 1 else "segmentation_logits"
    return lambda: FIM_MonteCarlo(
        setting.model, loader, PMatKFAC, variant, device=setting.x.device, layer_collection=layers
    )


WAYS: dict[str, Callable[[Setting], Call]] = {
    BASE: _base,
    "kfac_tn expand, step": _our_step("expand"),
    "kfac_tn reduce, step": _our_step("reduce"),
    "BackPACK, step": _backpack,
    "kfac_tn expand, pass": _our_pass("expand"),
    "kfac_tn reduce, pass": _our_pass("reduce"),
    "curvlinops expand, pass": _curvlinops("expand"),
    "curvlinops reduce, pass": _curvlinops("reduce"),
    "nngeometry expand, pass": _nngeometry,
}


# ---- measuring -------------------------------------------------------------------------------


def measure(name: str, batch: int, budget: float, most: int, device: str) -> dict:
    """All ways over one model, within about `budget` seconds, in up to `most` turns."""
    start = perf_counter()
    row: dict = {"model": name, "batch": batch, "refused": {}}
    calls: dict[str, Call] = {}
    once, memory = {}, {}
    for way, prepare in WAYS.items():
        setting = Setting(name, batch, device)
        row["parameter bytes"] = sum(p.nbytes for p in setting.model.parameters())
        try:
            call = prepare(setting)
            call()
            memory[way] = peak_bytes(call, device) + row["parameter bytes"]
            once[way] = seconds(call)
            calls[way] = call
        except Exception as failure:  # whatever it is, it is recorded, and the others go on
            reason = f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
            row["refused"][way] = reason[:200]
    left = max(budget - (perf_counter() - start), 0)
    times = take_turns(calls, once, left, most)
    row["seconds"] = {way: statistics.median(t) for way, t in times.items()}
    row["fastest"] = {way: min(t) for way, t in times.items()}
    row["turns"] = {way: len(t) for way, t in times.items()}
    row["bytes"] = memory
    blocks, others = partition(setting.model)
    sizes = [(b.groups, n) for b in blocks for n in (_input_size(b), b.grad_output_dim)]
    row["factor bytes"] = sum(4 * groups * n**2 for groups, n in sizes)
    row["without a block"] = sorted({other.reason.split()[0] for other in others})
    return row


def _input_size(block: LayerBlock) -> int:
    return block.input_dim + (block.bias is not None)


def measure_all(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each model; those that are left when the time is up are left out."""
    end = perf_counter() + options.limit_seconds
    for index, name in enumerate(options.models):
        left = end - perf_counter()
        if left < 0 and not options.quick:
            print(f"time is up: without {options.models[index:]}", file=sys.stderr)
            return
        # ResNet-18 is the largest by far.
        share = 0.5 if name == "ResNet-18" else 1 / (len(options.models) - index)
        yield measure(name, options.batch, share * left, options.repetitions, options.device)


# ---- reporting -------------------------------------------------------------------------------

BARS = {"expand": 1.6, "reduce": 1.15}


def bars(rows: list[dict]) -> list[tuple]:
    """What must hold for ResNet-18 at batch 32, in each of the ways in which it can be counted."""
    lines: list[tuple] = []
    for row in rows:
        if row["model"] != "ResNet-18":
            continue
        base, peak = row["seconds"][BASE], row["bytes"][BASE]
        for approximation, bar in BARS.items():
            step, alone = (f"kfac_tn {approximation}, {what}" for what in ("step", "pass"))
            other = row["seconds"].get(f"curvlinops {approximation}, pass", float("nan")) / base
            fastest = row["fastest"][alone] / row["fastest"][BASE]
            cases = [
                (f"pass (curvlinops here: {other:.2f})", row["seconds"][alone] / base, bar),
                ("pass, fastest turns of both", fastest, bar),
                ("extra time of a step", row["seconds"][step] / base - 1, bar),
                ("whole step", row["seconds"][step] / base, bar),
                ("peak memory of a step", row["bytes"][step] / peak, 1.2),
            ]
            for what, value, limit in cases:
                holds = "yes" if value <= limit else "**no**"
                lines.append((f"{approximation}: {what}", f"<= {limit:g}", value, holds))
    return lines


def ratio_table(rows: list[dict], quantity: str) -> str:
    """What each way takes in units of forward + backward."""
    lines = []
    for row in rows:
        base = row[quantity][BASE]
        shown = f"{1e3 * base:.1f} ms" if quantity == "seconds" else f"{base / 2**20:.0f} MiB"
        cells = [
            row[quantity][way] / base if way in row[quantity] else "refused"
            for way in WAYS
            if way != BASE
        ]
        factors = [row["factor bytes"] / base] if quantity == "bytes" else []
        lines.append([row["model"], shown, *cells, *factors])
    head = ["model", BASE, *(way for way in WAYS if way != BASE)]
    head += ["all factors"] if quantity == "bytes" else []
    return markdown(head, lines)


def remarks(rows: list[dict]) -> str:
    """What is refused, and what has no Kronecker block in this package."""
    lines = [
        f"- {way}, {row['model']}: {reason}"
        for row in rows
        for way, reason in row["refused"].items()
    ]
    lines = lines or ["Nothing."]
    lines += ["", "Layers without a Kronecker block in kfac_tn:", ""]
    return "\n".join(
        [*lines, *(f"- {row['model']}: {', '.join(row['without a block'])}" for row in rows)]
    )


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory of each way, a group of bars for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(13, 8), sharex=True, layout="constrained")
    ways = [way for way in WAYS if way != BASE]
    for ax, quantity in zip(axes, ("seconds", "bytes"), strict=True):
        for index, way in enumerate(ways):
            places = [n + (index - (len(ways) - 1) / 2) * 0.8 / len(ways) for n in range(len(rows))]
            values = [row[quantity].get(way, 0) / row[quantity][BASE] for row in rows]
            ax.bar(places, values, 0.8 / len(ways), label=way, color=f"C{index}")
        ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
        ax.grid(axis="y", alpha=0.3)
        ax.set_ylabel("time" if quantity == "seconds" else "peak memory")
    axes[1].set_xticks(range(len(rows)), [row["model"] for row in rows])
    axes[0].legend(ncols=4, fontsize="small")
    figure.suptitle(
        "KFAC passes in units of forward + backward (no bar: refused)", x=0.01, ha="left"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    options_of = parser(__doc__, limit_seconds=300, quick="small models, batches of 2")
    options_of.add_argument("--models", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    options_of.add_argument("--batch", type=int, default=32)
    options = options_of.parse_args()
    if options.quick:
        options.models, options.batch = ["U-Net-like", "ViT", "GPT", "MLP"], 2
        options.limit_seconds, options.repetitions = 10, 3
    torch.set_num_threads(options.threads)
    keep_memory()
    start, rows = perf_counter(), []
    for row in measure_all(options):
        rows.append(row)
        base = row["seconds"][BASE]
        ratios = ", ".join(f"{way} {t / base:.2f}" for way, t in row["seconds"].items())
        print(f"{row['model']}, {1e3 * base:.1f} ms: {ratios}", flush=True)
        for way, reason in row["refused"].items():
            print(f"    {way} refused: {reason}", flush=True)
    setting = conditions(options, start)
    claims = markdown(["what must hold for ResNet-18", "bar", "measured", "holds"], bars(rows))
    report = (
        f"# KFAC passes of whole models\n\n{setting}\n\nIn units of forward + backward. A step "
        "is a training step with the curvature's extra work; a pass makes the curvature alone.\n\n"
        f"## What must hold\n\n{claims}\n\n## Time\n\n{ratio_table(rows, 'seconds')}\n\n"
        f"## Peak memory\n\n{ratio_table(rows, 'bytes')}\n\n## Refused\n\n{remarks(rows)}"
    )
    write(options.output, "models", setting, rows, report)
    plot(rows, options.output / "models.png")


if __name__ == "__main__":
    main()
