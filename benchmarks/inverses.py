"""Inverses of damped factors: how to compute them, in what company, and how to store them.

    python benchmarks/inverses.py            # writes benchmarks/results/inverses.{md,json,png}

Three questions, each answered by implementations that take turns in one process; times are medians.
What inverts a batch of positive definite matrices of one size fastest, at once or one by one? What
does it save that `kfac_tn` inverts all factors of a model by size, beside a loop over them? What
would a triangle, packed, cost as storage of a symmetric matrix (half the memory), where it is
averaged and where it is applied?
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from measuring import Call, conditions, markdown, parser, seconds, take_turns, write
from torch import Tensor

from kfac_tn.curvature.inverse import damped_inverses

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
COUNTS = (1, 8, 64)
MOST = 2**22  # elements of a batch, if it is of several matrices


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


class Bench:
    """Operands with a fixed seed, and what is left of the time."""

    def __init__(self, device: str, turns: int, limit_seconds: float, cells: int):
        self.device, self.turns, self.cells = device, turns, cells
        self.end = perf_counter() + limit_seconds
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        """Normally distributed."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def factors(self, count: int, size: int) -> Tensor:
        """``[count, size, size]``, positive definite."""
        root = self.random(count, size, size)
        return torch.baddbmm(0.1 * _identity(root), root, root.mT, alpha=1 / size)

    def medians(self, calls: dict[str, Call]) -> dict[str, float]:
        """Median seconds of each, in turns, within this cell's share of the time."""
        for call in calls.values():
            call()
        once = {name: seconds(call) for name, call in calls.items()}
        budget = max(self.end - perf_counter(), 0) / self.cells
        self.cells -= 1
        times = take_turns(calls, once, budget, self.turns)
        return {name: statistics.median(each) for name, each in times.items()}


def kernel(bench: Bench, size: int, count: int) -> dict:
    """Every candidate on one batch, and the package's in a loop over it."""
    batch = bench.factors(count, size)
    exact = torch.cholesky_inverse(torch.linalg.cholesky(batch.double()))
    calls: dict[str, Call] = {}
    errors, failed = {}, {}
    for name, way in CANDIDATES.items():
        try:
            errors[name] = float((way(batch) - exact).norm() / exact.norm())
        except RuntimeError as failure:  # some builds of LAPACK refuse LU of batches in threads
            failed[name] = str(failure).splitlines()[0]
        else:
            calls[name] = partial(way, batch)
    if count > 1:
        calls["one by one"] = lambda: [by_cholesky_inverse(matrix) for matrix in batch]
    row = {"part": "kernels", "size": size, "count": count, "error": errors, "failed": failed}
    return row | {"seconds": bench.medians(calls)}


def model(bench: Bench, name: str) -> dict:
    """All factors of a model by size, and one by one."""
    sizes = [size for *pair, number in MODELS[name] for _ in range(number) for size in pair]
    factors = [bench.factors(1, size) for size in sizes]
    dampings = [torch.full((1,), 1e-3, device=bench.device)] * len(factors)
    calls: dict[str, Call] = {
        "by size": lambda: damped_inverses(factors, dampings),
        "one by one": lambda: [damped_inverses([factor], dampings[:1]) for factor in factors],
    }
    row = {"part": "models", "model": name, "factors": len(sizes)}
    return row | {"seconds": bench.medians(calls)}


def storage(bench: Bench, size: int) -> dict:
    """Squares and packed triangles, averaged, and applied to a matrix."""
    factor, inverse = bench.factors(1, size)[0], bench.factors(1, size)[0]
    gradient = bench.random(min(size, 256), size)
    rows, columns = torch.tril_indices(size, size, device=bench.device)
    places = rows * size + columns
    square = torch.empty(size, size, dtype=torch.long, device=bench.device)
    square[rows, columns] = square[columns, rows] = torch.arange(len(places), device=bench.device)
    average, packed_average = torch.zeros_like(factor), factor.new_zeros(len(places))
    packed_inverse = inverse.view(-1)[places]
    calls: dict[str, Call] = {
        "average, square": lambda: average.lerp_(factor, 0.05),
        "average, packed": lambda: packed_average.lerp_(factor.view(-1)[places], 0.05),
        "apply, square": lambda: gradient @ inverse,
        "apply, packed": lambda: gradient @ packed_inverse[square],
    }
    return {"part": "storage", "size": size, "seconds": bench.medians(calls)}


# ---- reporting -------------------------------------------------------------------------------


def milliseconds(row: dict, names: list[str]) -> list[str]:
    times = row["seconds"]
    return [f"{1e3 * times[name]:.3g}" if name in times else "" for name in names]


def report(setting: str, rows: list[dict]) -> str:
    """All tables."""
    parts = {
        part: [row for row in rows if row["part"] == part]
        for part in ("kernels", "models", "storage")
    }
    names = [*CANDIDATES, "one by one"]
    fastest = sum(
        min(row["error"], key=row["seconds"].__getitem__) == "cholesky_inverse"
        for row in parts["kernels"]
    )
    errors = {
        name: max(row["error"].get(name, 0.0) for row in parts["kernels"]) for name in CANDIDATES
    }
    refused = {
        f"{name} of {row['size']} x {row['count']}: {reason}"
        for row in parts["kernels"]
        for name, reason in row["failed"].items()
    }
    ways = markdown(
        ["size x count", *names],
        [
            [f"{row['size']} x {row['count']}", *milliseconds(row, names)]
            for row in parts["kernels"]
        ],
    )
    company = markdown(
        ["model", "factors", "by size", "one by one"],
        [
            [row["model"], row["factors"], *milliseconds(row, ["by size", "one by one"])]
            for row in parts["models"]
        ],
    )
    kinds = list(parts["storage"][0]["seconds"])
    stored = markdown(
        ["size", *kinds], [[row["size"], *milliseconds(row, kinds)] for row in parts["storage"]]
    )
    return f"""# Inverses

{setting}

## Ways to invert

Milliseconds; "one by one" is `cholesky_inverse` in a loop. The package uses `cholesky_inverse`,
batched: the fastest of the batched ways in {fastest} of {len(parts["kernels"])} rows. Largest
relative errors: {", ".join(f"{name} {error:.0e}" for name, error in errors.items())}.
Failed: {"; ".join(sorted(refused)) or "none"}.

{ways}

## In what company

Milliseconds for all factors of a model, fallbacks and checks included.

{company}

## How to store them

Milliseconds to average a new factor into a stored one, and to apply a stored inverse to a gradient
of up to 256 rows: as a square, and as a packed triangle of half the memory. The package stores
squares.

{stored}"""


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
    options = parser(__doc__, limit_seconds=120, quick="sizes up to 64").parse_args()
    if options.quick:
        options.limit_seconds, options.repetitions = 5, 3
    torch.set_num_threads(options.threads)
    sizes = [size for size in SIZES if size <= 64 or not options.quick]
    batches = [(n, count) for n in sizes for count in COUNTS if count == 1 or count * n**2 <= MOST]
    cells = len(batches) + len(MODELS) + len(sizes)
    bench = Bench(options.device, options.repetitions, options.limit_seconds, cells)
    start = perf_counter()
    rows = [kernel(bench, *batch) for batch in batches]
    rows += [model(bench, name) for name in MODELS]
    rows += [storage(bench, size) for size in sizes]
    setting = conditions(options, start)
    write(options.output, "inverses", setting, rows, report(setting, rows))
    plot([row for row in rows if row["part"] == "kernels"], options.output / "inverses.png")


if __name__ == "__main__":
    main()
