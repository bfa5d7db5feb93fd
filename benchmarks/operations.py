"""Operations of the convolutions of well-known networks: kfac_tn, torch and einconv.

    python benchmarks/operations.py            # writes benchmarks/results/operations.{md,json,png}
    python benchmarks/operations.py --batch 4  # the same, operations_batch_4
    python benchmarks/operations.py --only "VJP, 192@6"     # some cells; writes nothing

For each distinct convolution (`convolutions.py`) and operation, the implementations take turns in
one process, so whatever else the machine does meets all of them; times are medians. Each has a
third of a cell's time: of what takes longest, that may be a single turn. What is planned or
simplified once per shape is done before: einconv's expressions are built, simplified and given
opt_einsum's path in advance. torch means its own functions, and for the factors what packages build
from them: unfold, then a matrix product. Results are compared with torch's, large ones at some
millions of places. Peak memory is that of torch's allocator during one call, operands apart, as its
profiler sees it; a view counts as if it were a copy. Convolutions come in random order: where the
limit of time cuts, it cuts any of them, and the report says how many.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import opt_einsum
import torch
from convolutions import KINDS, Convolution, distinct
from einconv.expressions import (
    convNd_forward,
    convNd_input_vjp,
    convNd_kfac_reduce,
    convNd_kfc,
    convNd_unfold,
    convNd_weight_vjp,
)
from measuring import (
    Call,
    boxes,
    conditions,
    geometric_mean,
    markdown,
    parser,
    peak_bytes,
    seconds,
    take_turns,
    write,
)
from torch import Tensor
from torch.nn import functional as F

from kfac_tn import functional, tn

OPERATIONS = (
    "forward",
    "input VJP",
    "weight VJP",
    "unfold input",
    "KFAC-expand factor",
    "KFAC-reduce factor",
)
OURS, OTHERS = "kfac_tn", ("torch", "einconv")
BATCH = 32
MOST_FLOPS, MOST_BYTES = 5e11, 2.6 * 2**30
"""einconv's: of all products, and of a tensor on the way, of which there may be three at once."""
COMPARED = 2**22
"""Entries of a result that are compared, at most."""


class Setting:
    """A convolution with operands; `calls` makes the operations of one implementation."""

    def __init__(self, conv: Convolution, batch: int, device: str):
        self.conv, self.groups = conv, conv.groups
        self.geometry = {"stride": conv.stride, "padding": conv.padding}
        self.spec = tn.ConvSpec(
            (batch, conv.channels, conv.size, conv.size),
            (conv.out_channels, conv.channels // conv.groups, *conv.kernel_size),
            groups=conv.groups,
            **self.geometry,
        )
        generator = torch.Generator().manual_seed(0)
        shapes = self.spec.input_shape, self.spec.weight_shape, self.spec.output_shape
        self.x, self.w, self.g = (
            torch.randn(shape, generator=generator).to(device) for shape in shapes
        )

    def make(self, implementation: str, operation: str) -> Call:
        """Prepare a call."""
        return getattr(self, implementation)(operation)

    def kfac_tn(self, operation: str) -> Call:
        """By this package."""
        x, w, g, kernel = self.x, self.w, self.g, self.conv.kernel_size
        if operation == "forward":
            return partial(tn.forward(self.spec).simplify().evaluate, input=x, weight=w)
        if operation == "input VJP":
            return partial(tn.input_vjp(self.spec).simplify().evaluate, weight=w, grad_output=g)
        if operation == "weight VJP":
            return partial(tn.weight_vjp(self.spec).simplify().evaluate, input=x, grad_output=g)
        if operation == "unfold input":
            return partial(tn.unfold_input(self.spec).simplify().evaluate, input=x)
        approximation = "expand" if "expand" in operation else "reduce"
        options = {"groups": self.groups, "approximation": approximation, **self.geometry}
        return partial(functional.conv_input_factor, x, kernel, **options)

    def torch(self, operation: str) -> Call:
        """By torch alone."""
        x, w, g, kernel = self.x, self.w, self.g, self.conv.kernel_size
        options = {"groups": self.groups, **self.geometry}
        if operation == "forward":
            return partial(F.conv2d, x, w, **options)
        if operation == "input VJP":
            return partial(torch.nn.grad.conv2d_input, x.shape, w, g, **options)
        if operation == "weight VJP":
            return partial(torch.nn.grad.conv2d_weight, x, w.shape, g, **options)
        if operation == "unfold input":
            return partial(F.unfold, x, kernel, **self.geometry)

        def factor() -> Tensor:
            columns = F.unfold(x, kernel, **self.geometry).unflatten(1, (self.groups, -1))
            if "reduce" in operation:
                rows = columns.mean(-1).transpose(0, 1)
            else:
                rows = columns.permute(1, 0, 3, 2).flatten(1, 2)
            return rows.mT @ rows / rows.shape[1]

        return factor

    def einconv(self, operation: str) -> Call:
        """By einconv's simplified expressions, their contraction path found in advance."""
        x, w, g, kernel = self.x, self.w, self.g, self.conv.kernel_size
        options = {"groups": self.groups, **self.geometry}
        equation, operands, shape = {
            "forward": lambda: convNd_forward.einsum_expression(x, w, **options),
            "input VJP": lambda: convNd_input_vjp.einsum_expression(
                w, g, self.spec.input_size, **options
            ),
            "weight VJP": lambda: convNd_weight_vjp.einsum_expression(x, g, kernel, **options),
            "unfold input": lambda: convNd_unfold.einsum_expression(x, kernel, **self.geometry),
            "KFAC-expand factor": lambda: convNd_kfc.einsum_expression(x, kernel, **options),
            "KFAC-reduce factor": lambda: convNd_kfac_reduce.einsum_expression(
                x, kernel, **options
            ),
        }[operation]()
        operands = [o.to(x.dtype) for o in operands]
        shapes = [tuple(o.shape) for o in operands]
        path, info = opt_einsum.contract_path(equation, *shapes, shapes=True)
        if info.opt_cost > MOST_FLOPS or 4 * info.largest_intermediate > MOST_BYTES:
            raise RuntimeError(
                f"too large: {float(info.opt_cost):.0e} flops, "
                f"{float(info.largest_intermediate):.0e} elements"
            )
        contract = opt_einsum.contract_expression(equation, *shapes, optimize=path)
        return lambda: contract(*operands, backend="torch").reshape(shape)


# ---- measuring -------------------------------------------------------------------------------


def sample(result: Tensor) -> Tensor:
    """Entries of a result all over it, to be compared: their scale differs between packages."""
    entries = result.flatten()[:: 1 + result.numel() // COMPARED].double()
    return entries / entries.norm()


def measure(setting: Setting, operation: str, budget: float, most: int, device: str) -> dict:
    """All implementations of an operation, within about `budget` seconds, in up to `most` turns."""
    row: dict = {"convolution": asdict(setting.conv), "kind": setting.conv.kind}
    row |= {"name": str(setting.conv), "operation": operation, "failed": {}}
    calls: dict[str, Call] = {}
    expected, errors, once, memory = None, {}, {}, {}
    start = perf_counter()
    for name in ("torch", OURS, "einconv"):
        try:
            call = setting.make(name, operation)
            result = call()  # planned, warm
            found, size = sample(result), result.nbytes
            del result
            once[name] = seconds(call)
            memory[name] = max(peak_bytes(call, device), size)
        except Exception as failure:  # whatever it is, it is recorded, and the others go on
            row["failed"][name] = f"{type(failure).__name__}: {failure}"[:200]
            continue
        calls[name] = call
        expected = found if expected is None else expected
        errors[name] = (found - expected).norm().item()
    left = budget - (perf_counter() - start)
    times = take_turns(calls, once, left, most)
    row["seconds"] = {name: statistics.median(t) for name, t in times.items()}
    turns = {name: len(t) for name, t in times.items()}
    return row | {"bytes": memory, "error": errors, "turns": turns}


def chosen(options: argparse.Namespace) -> list[tuple[Convolution, list[str]]]:
    """Convolutions, in random order, and the operations of each to be measured."""
    convolutions = distinct()
    random.Random(0).shuffle(convolutions)
    if options.quick:
        kinds = [[c for c in convolutions if c.kind == kind] for kind in KINDS]
        convolutions = [c for some in kinds for c in sorted(some, key=lambda c: c.size)[1::4][:2]]
    matches = re.compile(options.only).search
    cells = [(conv, [o for o in OPERATIONS if matches(f"{o}, {conv}")]) for conv in convolutions]
    return [(conv, operations) for conv, operations in cells if operations]


def measure_all(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each convolution and operation; stops when the time is up."""
    end = perf_counter() + options.limit_seconds
    convolutions = chosen(options)
    cells = sum(len(operations) for _, operations in convolutions)
    for conv, operations in convolutions:
        setting = Setting(conv, options.batch, options.device)
        for operation in operations:
            left = end - perf_counter()
            if left < 0:
                return
            # What small convolutions leave of their share is the large ones'.
            yield measure(setting, operation, left / cells, options.repetitions, options.device)
            cells -= 1


# ---- reporting -------------------------------------------------------------------------------


def ratios(rows: list[dict], other: str, quantity: str = "seconds") -> list[float]:
    """What another implementation needs, in units of what this package does."""
    return [
        row[quantity][other] / row[quantity][OURS]
        for row in rows
        if other in row[quantity] and OURS in row[quantity]
    ]


def table(rows: list[dict]) -> str:
    """Ratios by operation and kind, as markdown."""
    head = ["operation", "kind", "convolutions"]
    head += [f"{other}: time" for other in OTHERS] + [f"{other}: least" for other in OTHERS]
    head += [f"{other}: memory" for other in OTHERS]
    lines: list[list[object]] = []
    for operation in OPERATIONS:
        for kind in ("all", *KINDS):
            some = [r for r in rows if r["operation"] == operation and kind in ("all", r["kind"])]
            if not some:
                continue
            times = [ratios(some, other) for other in OTHERS]
            memory = [ratios(some, other, "bytes") for other in OTHERS]
            cells = [geometric_mean(t) for t in times]
            cells += [min(t, default=math.nan) for t in times]
            cells += [geometric_mean(m) for m in memory]
            name = f"**{operation}**" if kind == "all" else ""
            lines.append([name, kind, len(some), *cells])
    return markdown(head, lines)


def remarks(rows: list[dict]) -> str:
    """Failures, wrong results, and the cells where another implementation was faster."""
    lines = ["## Slower than another", ""]
    for other in OTHERS:
        found = [(ratios([row], other), row) for row in rows]
        slow = sorted(((r[0], row) for r, row in found if r and r[0] < 0.9), key=lambda s: s[0])
        lines.append(
            f"- {len(slow)} of {sum(bool(r) for r, _ in found)} cells are slower than "
            f"{other} by more than 10 %" + (":" if slow else ".")
        )
        lines += [f"  - {r:.2f}: {row['operation']}, {row['name']}" for r, row in slow[:12]]
    lines += ["", "## Failed or wrong", ""]
    bad = [
        f"- {name}: {row['operation']}, {row['name']}: {reason}"
        for row in rows
        for name, reason in row["failed"].items()
    ]
    bad += [
        f"- {name}: {row['operation']}, {row['name']}: relative error {error:.0e}"
        for row in rows
        for name, error in row["error"].items()
        if not error < 1e-4
    ]
    return "\n".join(lines + (bad or ["Nothing."]))


def plot(rows: list[dict], path: Path) -> None:
    """Boxes of time ratios, a panel for each operation."""
    panels = {
        operation: {
            f"time of {other} / time of kfac_tn": [
                ratios([r for r in rows if (r["operation"], r["kind"]) == (operation, kind)], other)
                for kind in KINDS
            ]
            for other in OTHERS
        }
        for operation in OPERATIONS
    }
    boxes(panels, KINDS, path, "How many times faster kfac_tn is")


def report(rows: list[dict], setting: str) -> str:
    """All of it, as markdown."""
    return (
        f"# Operations of convolutions\n\n{setting}\n\nTime and peak memory of torch and einconv "
        "0.1.0 as multiples of kfac_tn's: geometric means over distinct convolutions, and the "
        f"least. More than 1: kfac_tn is better.\n\n{table(rows)}\n\n{remarks(rows)}"
    )


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__, limit_seconds=660, quick="two of each kind")
    made.add_argument("--batch", type=int, default=BATCH)
    made.add_argument("--only", default="", help="cells whose names match; nothing is written")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    start, rows = perf_counter(), []
    for row in measure_all(options):
        rows.append(row)
        times = ", ".join(f"{n} {1e3 * t:.2f} ms" for n, t in row["seconds"].items())
        print(f"{row['name']}, {row['operation']}: {times}", flush=True)
    if options.only:
        return
    cells = sum(len(operations) for _, operations in chosen(options))
    turns = statistics.median(n for row in rows for n in row["turns"].values())
    setting = (
        f"{conditions(options, start)} {len(rows)} of {cells} cells, drawn at random; half of all "
        f"medians are of {turns:g} turns or fewer."
    )
    name = "operations" if options.batch == BATCH else f"operations_batch_{options.batch}"
    write(options.output, name, setting, rows, report(rows, setting))
    plot(rows, options.output / f"{name}.png")


if __name__ == "__main__":
    main()
