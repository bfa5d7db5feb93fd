"""Inverses of damped factors: how to compute them, in what company, and how to store them.

    python benchmarks/inverses.py            # writes benchmarks/results/inverses.{md,json,png}

Three questions, each answered by implementations that take turns in one process; times are medians.
What inverts a batch of positive definite matrices of one size fastest, at once or one by one? What
does it save that `kfac_tn` inverts all factors of a model by size, beside a loop over them? What
would a triangle, packed, cost as storage of a symmetric matrix (half the memory), where it is
averaged and where it is applied?
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from kfac_tn.curvature.inverse import damped_inverses

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from compare_optimizers import describe_machine  # noqa: E402

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
COUNTS = (1, 8, 64)
MOST = 2**22  # elements of a batch, if it is of several matrices
SHORTEST = 2e-3  # seconds of a timing; faster calls are repeated within one

Call = Callable[[], object]


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)


def by_cholesky_inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix)[0])


def by_cholesky_solve(matrix: Tensor) -> Tensor:
    return torch.cholesky_solve(_identity(matrix), torch.linalg.cholesky_ex(matrix)[0])


def by_triangular_solve(matrix: Tensor) -> Tensor:
    root = torch.linalg.cholesky_ex(matrix)[0]
    inverse_root = torch.linalg.solve_triangular(root, _identity(matrix), upper=False)
    return inverse_root.mT @ inverse_root


def by_inv(matrix: Tensor) -> Tensor:
    return torch.linalg.inv_ex(matrix)[0]


def by_eigh(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors / values.unsqueeze(-2)) @ vectors.mT


CANDIDATES: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky_inverse": by_cholesky_inverse,
    "cholesky_solve": by_cholesky_solve,
    "solve_triangular": by_triangular_solve,
    "linalg.inv": by_inv,
    "eigh": by_eigh,
}

# Sizes (input side, output side) and number of layers, the bias' row included.
MODELS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "deep autoencoder (digits)": (
        (65, 64, 1), (65, 32, 1), (33, 16, 1), (17, 8, 1), (9, 16, 1), (17, 32, 1), (33, 64, 2),
    ),
    "small transformer (4 blocks of width 64)": (
        (65, 192, 4), (65, 64, 4), (65, 256, 4), (257, 64, 4), (65, 96, 1),
    ),
    "CIFAR ResNet-18, first two stages": (
        (27, 64, 1), (576, 64, 4), (576, 128, 1), (1152, 128, 3), (64, 128, 1),
    ),
}  # fmt: skip


class Setting:
    """Random positive definite matrices on a device; the seed is fixed."""

    def __init__(self, device: str):
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def factors(self, count: int, size: int) -> Tensor:
        """``[count, size, size]``, of full rank with a damping of 0.1."""
        root = torch.randn(count, size, size, generator=self.generator).to(self.device)
        return torch.baddbmm(0.1 * _identity(root), root, root.mT, alpha=1 / size)

    def seconds(self, call: Call, number: int) -> float:
        """Time per call."""
        synchronize = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        synchronize()
        start = perf_counter()
        for _ in range(number):
            call()
        synchronize()
        return (perf_counter() - start) / number

    def medians(self, calls: dict[str, Call], turns: int) -> dict[str, float]:
        """Median seconds of each, measured in turns."""
        for call in calls.values():
            call()
        once = {name: self.seconds(call, 1) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(turns):
            order = list(calls)
            shift = turn % len(order)
            for name in order[shift:] + order[:shift]:
                number = math.ceil(SHORTEST / once[name])
                times[name].append(self.seconds(calls[name], number))
        return {name: statistics.median(each) for name, each in times.items()}


def kernel(setting: Setting, turns: int, size: int, count: int) -> dict:
    """Every candidate on one batch, and the package's in a loop over it."""
    batch = setting.factors(count, size)
    exact = batch.double().inverse()
    calls: dict[str, Call] = {name: partial(way, batch) for name, way in CANDIDATES.items()}
    errors = {
        name: float((way(batch) - exact).norm() / exact.norm()) for name, way in CANDIDATES.items()
    }
    if count > 1:
        calls["one by one"] = lambda: [by_cholesky_inverse(matrix) for matrix in batch]
    seconds = setting.medians(calls, turns)
    return {"size": size, "count": count, "error": errors, "seconds": seconds}


def model(setting: Setting, turns: int, name: str) -> dict:
    """All factors of a model by size, and one by one."""
    sizes = [size for *pair, number in MODELS[name] for _ in range(number) for size in pair]
    factors = [setting.factors(1, size) for size in sizes]
    dampings = [torch.full((1,), 1e-3, device=setting.device)] * len(factors)
    calls: dict[str, Call] = {
        "by size": lambda: damped_inverses(factors, dampings),
        "one by one": lambda: [damped_inverses([factor], dampings[:1]) for factor in factors],
    }
    return {"model": name, "factors": len(sizes), "seconds": setting.medians(calls, turns)}


def storage(setting: Setting, turns: int, size: int) -> dict:
    """Squares and packed triangles, averaged, and applied to a matrix."""
    factor, inverse = setting.factors(1, size)[0], setting.factors(1, size)[0]
    gradient = torch.randn(min(size, 256), size, generator=setting.generator).to(setting.device)
    rows, columns = torch.tril_indices(size, size, device=setting.device)
    places = rows * size + columns
    square = torch.empty(size, size, dtype=torch.long, device=setting.device)
    square[rows, columns] = square[columns, rows] = torch.arange(len(places), device=setting.device)
    average, packed_average = torch.zeros_like(factor), factor.new_zeros(len(places))
    packed_inverse = inverse.view(-1)[places]
    calls: dict[str, Call] = {
        "average, square": lambda: average.lerp_(factor, 0.05),
        "average, packed": lambda: packed_average.lerp_(factor.view(-1)[places], 0.05),
        "apply, square": lambda: gradient @ inverse,
        "apply, packed": lambda: gradient @ packed_inverse[square],
    }
    return {"size": size, "seconds": setting.medians(calls, turns)}


# ---- reporting -------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def report(record: dict) -> str:
    """All tables."""
    names = [*CANDIDATES, "one by one"]
    fastest = sum(
        min(CANDIDATES, key=row["seconds"].__getitem__) == "cholesky_inverse"
        for row in record["kernels"]
    )
    ways = table(
        ["size x count", *names],
        [
            [f"{row['size']} x {row['count']}"]
            + [milliseconds(row["seconds"].get(name)) for name in names]
            for row in record["kernels"]
        ],
    )
    errors = {name: max(row["error"][name] for row in record["kernels"]) for name in CANDIDATES}
    company = table(
        ["model", "factors", "by size", "one by one"],
        [
            [row["model"], str(row["factors"]), *map(milliseconds, row["seconds"].values())]
            for row in record["models"]
        ],
    )
    kinds = list(record["storage"][0]["seconds"])
    stored = table(
        ["size", *kinds],
        [
            [str(row["size"]), *(milliseconds(row["seconds"][kind]) for kind in kinds)]
            for row in record["storage"]
        ],
    )
    return f"""# Inverses

{record["setting"]}

## Ways to invert

Milliseconds; "one by one" is `cholesky_inverse` in a loop. The package uses `cholesky_inverse`,
batched: the fastest of the batched ways in {fastest} of {len(record["kernels"])} rows. Largest
relative errors: {", ".join(f"{name} {error:.0e}" for name, error in errors.items())}.

{ways}

## In what company

Milliseconds for all factors of a model, fallbacks and checks included.

{company}

## How to store them

Milliseconds to average a new factor into a stored one, and to apply a stored inverse to a gradient
of up to 256 rows. The package stores squares: see what a packed triangle, half as large, would add.

{stored}
"""


def plot(rows: list[dict], path: Path) -> None:
    """Time over size, for each count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(COUNTS), figsize=(13, 4.5), sharey=True, layout="constrained"
    )
    for count, ax in zip(COUNTS, axes, strict=True):
        some = [row for row in rows if row["count"] == count]
        for name in [*CANDIDATES, "one by one"]:
            points = [(r["size"], 1e3 * r["seconds"][name]) for r in some if name in r["seconds"]]
            if points:
                style = "k--" if name == "one by one" else "o-"
                ax.plot(*zip(*points, strict=True), style, label=name, markersize=4)
        ax.set(xscale="log", yscale="log", xlabel="size", title=f"{count} at once")
        ax.set_xticks([row["size"] for row in some], [row["size"] for row in some], rotation=40)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle("Inverses of batches of positive definite matrices, float32")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--largest", type=int, default=max(SIZES), help="largest size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting, turns = Setting(options.device), options.repetitions
    sizes = tuple(size for size in SIZES if size <= options.largest)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    record: dict = {
        "setting": f"float32 on {device}, medians of {turns} interleaved turns; "
        f"{describe_machine()}."
    }
    batches = [(n, count) for n in sizes for count in COUNTS if count == 1 or count * n**2 <= MOST]
    record["kernels"] = [kernel(setting, turns, *batch) for batch in batches]
    record["models"] = [model(setting, turns, name) for name in MODELS]
    record["storage"] = [storage(setting, turns, size) for size in sizes]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "inverses.json").write_text(json.dumps(record, indent=1))
    (options.output / "inverses.md").write_text(report(record))
    plot(record["kernels"], options.output / "inverses.png")
    print(report(record))


if __name__ == "__main__":
    main()
