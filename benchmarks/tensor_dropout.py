"""Tensor dropout: what randomized convolutions keep for the backward pass, and what they cost.

    python benchmarks/tensor_dropout.py     # writes benchmarks/results/tensor_dropout.{md,json,png}

Beside `torch.nn.Conv2d`, and beside checkpointing each block of the model, for keep rates from 0.1
to 1. Kept: bytes of everything autograd saves in the forward pass, parameters apart. Noise: the
distance of the gradient of all parameters from the exact one, relative to its norm, as a root mean
square over draws; the cotangent is random, which is the hardest case. Times are of forward and
backward pass, medians of interleaved repetitions in one process.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from measuring import ROOT, describe_machine, markdown, write
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_tn.tn.nn import randomize

ALONG = ("channels", "spatial", "kernel")
KEEP = (0.1, 0.25, 0.5, 0.75, 1.0)


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        return checkpoint(self.block, x, use_reentrant=False)


def block(channels: int, out_channels: int, stride: int = 1, norm: bool = False) -> nn.Module:
    """A 3x3 convolution; with or without normalization; GELU, which doesn't keep its output."""
    conv = nn.Conv2d(channels, out_channels, 3, stride, padding=1)
    return nn.Sequential(conv, *([nn.BatchNorm2d(out_channels)] if norm else []), nn.GELU())


def all_cnn(norm: bool = False) -> nn.Module:
    """All-CNN-C's convolutions up to its head, for 32 x 32 pixels."""
    widths = [(3, 96, 1), (96, 96, 1), (96, 96, 2), (96, 192, 1), (192, 192, 1), (192, 192, 2)]
    return nn.Sequential(*(block(*width, norm=norm) for width in widths))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one 3x3 convolution": (lambda: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), (64, 56, 56)),
    "All-CNN-C with GELU": (all_cnn, (3, 32, 32)),
    "the same with batch norm": (lambda: all_cnn(norm=True), (3, 32, 32)),
}


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself, checkpointed, and randomized in all ways; they share their parameters."""
    models = {"exact": model, "checkpoint": nn.Sequential(*map(Checkpointed, model))}
    parameters = {id(p): p for p in model.parameters()}
    for along in ALONG:
        for keep in KEEP:
            # Deep copies of everything but the parameters.
            randomized = copy.deepcopy(model, dict(parameters))
            models[f"{along} {keep}"] = randomize(randomized, keep, along)
    return models


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd saves, parameters apart."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


def checkpointed_bytes(model: nn.Sequential, x: Tensor) -> int:
    """What checkpointing each block keeps: their inputs (it saves them past the hooks)."""
    inputs = []
    for module in model:
        inputs.append(x)
        x = module(x)
    return sum(x.nbytes for x in inputs)


def gradient(model: nn.Module, x: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of all parameters as one vector."""
    y = model(x)
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(y, list(model.parameters()), cotangent)]
    )


def measure(name: str, batch: int, repetitions: int) -> list[dict]:
    """A row for each variant of a model."""
    torch.manual_seed(0)
    build, shape = MODELS[name]
    # The first layer's input is somebody's output, in general: it needs a gradient.
    model, x = build(), torch.randn(batch, *shape, requires_grad=True)
    cotangent = torch.randn_like(model(x))
    exact = gradient(model, x, cotangent)
    models = variants(model)
    times: dict[str, list[float]] = {variant: [] for variant in models}
    noise: dict[str, list[float]] = {variant: [] for variant in models}
    for _ in range(repetitions + 1):
        for variant, candidate in models.items():
            start = perf_counter()
            result = gradient(candidate, x, cotangent)
            times[variant].append(perf_counter() - start)
            noise[variant].append(((result - exact).norm() / exact.norm()).item() ** 2)
    with_bytes = {
        v: checkpointed_bytes(model, x) if v == "checkpoint" else kept_bytes(m, x)
        for v, m in models.items()
    }
    return [
        {
            "model": name,
            "variant": variant,
            "kept MB": with_bytes[variant] / 1e6,
            "of exact": with_bytes[variant] / with_bytes["exact"],
            "ms": 1e3 * statistics.median(times[variant][1:]),  # the first one warms up
            "time ratio": statistics.median(
                t / e for t, e in zip(times[variant][1:], times["exact"][1:], strict=True)
            ),
            "noise": statistics.fmean(noise[variant]) ** 0.5,
        }
        for variant in models
    ]


def plot(rows: list[dict], path: Path) -> None:
    """Memory, time and noise over the keep rate, a row for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = {"of exact": "kept for backward", "time ratio": "time", "noise": "gradient noise"}
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        len(names),
        len(columns),
        figsize=(12, 3.4 * len(names)),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for name, line in zip(names, axes, strict=True):
        own = {row["variant"]: row for row in rows if row["model"] == name}
        for (column, title), ax in zip(columns.items(), line, strict=True):
            for along, marker in zip(ALONG, "os^", strict=True):
                values = [own[f"{along} {keep}"][column] for keep in KEEP]
                ax.plot(KEEP, values, marker=marker, label=along)
            if column != "noise":
                ax.axhline(1, color="black", linewidth=0.8, label="torch.nn.Conv2d")
                ax.axhline(
                    own["checkpoint"][column],
                    color="tab:red",
                    linestyle="--",
                    label="checkpointing",
                )
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            ax.set_title(f"{name}:\n{title}" + (" / exact" if column != "noise" else ""))
    for ax in axes[-1]:
        ax.set_xlabel("keep rate")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small batch, three repetitions")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, repetitions = (4, 3) if options.quick else (options.batch, options.repetitions)
    rows = [row for name in MODELS for row in measure(name, batch, repetitions)]
    setting = (
        f"Batches of {batch}, float32, medians of {repetitions} interleaved repetitions; "
        f"{describe_machine()}."
    )
    table = markdown(rows[0], [row.values() for row in rows])
    report = f"# Tensor dropout\n\n{setting}\n\n{table}"
    write(options.output, "tensor_dropout", setting, rows, report)
    plot(rows, options.output / "tensor_dropout.png")


if __name__ == "__main__":
    main()
