"""Kronecker factors of the convolutions of well-known networks: kfac_tn and the ways of others.

    python benchmarks/factors.py            # writes benchmarks/results/factors.{md,json,png}

For each distinct convolution (`convolutions.py`): the input factor (reduce, expand) and the factor
of the output gradients (reduce, expand), by

- kfac_tn: `kfac_tn.functional`;
- im2col: unfold, one matrix product for each group;
- einconv 0.1.0: its simplified expression, contracted along opt_einsum's path, both found before;
- curvlinops 3.0.1: its own patches (unfolded, or averaged with einconv's patterns) and einsum;
  left out where there are groups, over which it averages: another quantity;
- GEMM, for output gradients: as curvlinops, rows of all positions below each other, one product
  for each group;
- floor, for reduce: reading the input once (its sums over positions) and the product of rows of the
  factor's size. Not a way to get the factor: what it can't be faster than.

The ways take turns in one process; times are medians. Batches are of 32 by default, which needs a
machine with some gigabytes (im2col holds 2.5 for a depthwise layer of ConvNeXt); `--batch 8` writes
`factors_batch_8`. Every result is compared with im2col's, up to its scale. Memory is the largest
that is allocated during a call, its result included, the input not.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from convolutions import KINDS, Convolution, distinct
from curvlinops.kfac_utils import extract_averaged_patches, extract_patches
from einops import einsum, rearrange
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
from operations import Setting
from torch import Tensor

from kfac_tn import functional

BATCH = 32
"""Examples; those of another number get a table of their own."""

LARGE = 4e6
"""Bytes of padded input and result, beside which a library's own memory for a product is little."""

OURS = "kfac_tn"
OTHERS = {  # the first is what results are compared with
    "reduce": ("im2col", "einconv", "curvlinops", "floor"),
    "expand": ("im2col", "einconv", "curvlinops"),
    "output, reduce": ("GEMM",),
    "output, expand": ("GEMM",),
}
QUANTITIES = tuple(OTHERS)


class NotComparableError(Exception):
    """Another quantity is computed, or none."""


def prepare(setting: Setting, quantity: str, name: str) -> Call:
    """A call that gives the factor."""
    approximation = quantity.split()[-1]
    if quantity.startswith("output"):
        g, groups = setting.g, setting.groups
        if name == OURS:
            return partial(functional.conv_grad_output_factor, g, groups, approximation)
        return partial(_output_by_gemm, g, groups, approximation)
    if name == "floor":
        return partial(_floor, setting.x, setting.conv)
    if name == "curvlinops":
        if setting.groups > 1:
            raise NotComparableError("averages over groups")
        return partial(_curvlinops, setting.x, setting.conv, approximation)
    source = {OURS: setting.kfac_tn, "im2col": setting.torch, "einconv": setting.einconv}[name]
    return source(f"KFAC-{approximation} factor")


def _curvlinops(x: Tensor, conv: Convolution, approximation: str) -> Tensor:
    extract = extract_patches if approximation == "expand" else extract_averaged_patches
    rows = extract(x, conv.kernel_size, conv.stride, conv.padding, dilation=1, groups=1)
    rows = rearrange(rows, "batch ... d_in -> (batch ...) d_in")
    return einsum(rows, rows, "b i,b j -> i j").div_(len(rows))


def _output_by_gemm(g: Tensor, groups: int, approximation: str) -> Tensor:
    if approximation == "reduce":
        rows = g.sum((2, 3)).unflatten(1, (groups, -1)).transpose(0, 1)
    else:
        rows = rearrange(g, "n (groups c) o1 o2 -> groups (n o1 o2) c", groups=groups)
    return rows.mT @ rows


def _floor(x: Tensor, conv: Convolution) -> Tensor:
    means = x.sum((2, 3)).unflatten(1, (conv.groups, -1))
    size = means.shape[2] * conv.kernel_size[0] * conv.kernel_size[1]
    rows = x.new_ones(conv.groups, len(x), size)
    return rows.mT @ rows


# ---- measuring -------------------------------------------------------------------------------


def measure(setting: Setting, quantity: str, budget: float, most: int, device: str) -> dict:
    """All ways to one factor, within about `budget` seconds, in up to `most` turns."""
    conv = setting.conv
    row: dict = {"convolution": asdict(conv), "kind": conv.kind, "name": str(conv)}
    row |= {"quantity": quantity, "failed": {}}
    calls: dict[str, Call] = {}
    once, memory, errors, expected = {}, {}, {}, None
    for name in (OTHERS[quantity][0], OURS, *OTHERS[quantity][1:]):
        try:
            call = prepare(setting, quantity, name)
            first = seconds(call)
            result = call()
            once[name] = first if first > budget else seconds(call)
            memory[name] = max(peak_bytes(call, device), result.nbytes)
        except Exception as failure:  # whatever it is, it is recorded, and the others go on
            row["failed"][name] = f"{type(failure).__name__}: {failure}"[:200]
            continue
        calls[name] = call
        if name == "floor":
            continue
        flat = result.flatten().double()
        flat = flat / flat.norm()  # the packages' factors differ in their scale
        expected = flat if expected is None else expected
        errors[name] = (flat - expected).norm().item()
        row["result bytes"] = result.nbytes
        del result, flat
    times = take_turns(calls, once, budget, most)
    padded = math.prod(conv.size + 2 * padding for padding in conv.padding)
    row["padded bytes"] = 4 * setting.x.shape[:2].numel() * padded
    row["seconds"] = {name: statistics.median(t) for name, t in times.items()}
    row["turns"] = {name: len(t) for name, t in times.items()}
    return row | {"bytes": memory, "error": errors}


def measure_all(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each convolution and factor; stops when the time is up."""
    convolutions = distinct()
    random.Random(0).shuffle(convolutions)  # what the limit may cut off is any of them
    if options.quick:
        kinds = [[c for c in convolutions if c.kind == kind] for kind in KINDS]
        convolutions = [
            c for some in kinds for c in sorted(some, key=lambda c: c.size)[len(some) // 2 :][:1]
        ]
    end = perf_counter() + options.limit_seconds
    cells = len(convolutions) * len(QUANTITIES)
    for conv in convolutions:
        setting = Setting(conv, options.batch, options.device)
        for quantity in QUANTITIES:
            left = end - perf_counter()
            if left < 0 and not options.quick:
                print(f"time is up: {cells} of the cells are left out", file=sys.stderr)
                return
            # Preparing, checking and the memory take longer than the turns.
            yield measure(setting, quantity, left / cells / 3, options.repetitions, options.device)
            cells -= 1


# ---- reporting -------------------------------------------------------------------------------


def ratios(rows: list[dict], other: str, quantity: str = "seconds") -> list[float]:
    """What another way needs, in units of what this package does."""
    return [
        row[quantity][other] / row[quantity][OURS]
        for row in rows
        if other in row[quantity] and OURS in row[quantity]
    ]


def of(rows: list[dict], quantity: str, holds: Callable[[dict], bool] = lambda c: True) -> list:
    """The rows of one factor whose convolution has a property."""
    return [r for r in rows if r["quantity"] == quantity and holds(r["convolution"])]


def _wide(conv: dict) -> bool:
    """Stride 1, kernels of 3 at least, 32 channels of a group at least."""
    channels = conv["channels"] // conv["groups"]
    return conv["stride"] == 1 and channels >= 32 and min(conv["kernel_size"]) >= 3


def _wide_or_grouped(conv: dict) -> bool:
    """The same, with the channels of all groups, and kernels of 1 x 3 too."""
    return conv["stride"] == 1 and conv["channels"] >= 32 and max(conv["kernel_size"]) >= 3


def _depthwise_7(conv: dict) -> bool:
    return conv["groups"] == conv["channels"] and tuple(conv["kernel_size"]) == (7, 7)


def bars(rows: list[dict]) -> list[tuple]:
    """What must hold: what, the bar, the number, how many convolutions meet it, whether it does."""
    reduce, expand = of(rows, "reduce"), of(rows, "expand")
    floors = [1 / ratio for ratio in ratios(reduce, "floor")]
    allowed = {row["name"]: row["padded bytes"] + row["result bytes"] for row in expand}
    memory = {
        row["name"]: row["bytes"][OURS] / allowed[row["name"]]
        for row in expand
        if OURS in row["bytes"]
    }
    large = [ratio for name, ratio in memory.items() if allowed[name] >= LARGE]
    found = [
        ("reduce: im2col / ours", 20, geometric_mean, ratios(reduce, "im2col")),
        ("reduce: im2col / ours", 1, min, ratios(reduce, "im2col")),
        ("reduce: einconv / ours", 6, geometric_mean, ratios(reduce, "einconv")),
        ("reduce: einconv / ours", 1, min, ratios(reduce, "einconv")),
        ("reduce: curvlinops / ours", 1, min, ratios(reduce, "curvlinops")),
        ("reduce: ours / floor", 2, geometric_mean, floors),
        ("reduce: ours / floor", 2, max, floors),
        *(
            (f"expand: im2col / ours, {which}", bar, geometric_mean, ratios(some, "im2col"))
            for which, bar, some in (
                ("stride 1, k >= 3 x 3, C / groups >= 32", 3, of(rows, "expand", _wide)),
                ("stride 1, k >= 1 x 3, C >= 32", 3, of(rows, "expand", _wide_or_grouped)),
                ("depthwise 7 x 7", 10, of(rows, "expand", _depthwise_7)),
            )
        ),
        ("expand: im2col / ours", 0.95, min, ratios(expand, "im2col")),
        ("expand: einconv / ours", 0.95, min, ratios(expand, "einconv")),
        ("expand: memory / (padded input + result)", 1, geometric_mean, [*memory.values()]),
        ("expand: memory / (padded input + result)", 1, max, [*memory.values()]),
        ("expand: the same where these are 4 MB at least", 1, max, large),
    ]
    for name in ("output, reduce", "output, expand"):
        values = ratios(of(rows, name), "GEMM")
        found.append((f"{name}: GEMM / ours", 1, geometric_mean, values))
        found.append((f"{name}: GEMM / ours", 0.95, min, values))
    table = []
    for what, bar, gather, values in found:
        if not values:
            continue
        value = float(gather(values))
        at_most = "ours /" in what or "memory" in what or "the same" in what
        meets = [v <= bar if at_most else v >= bar for v in (value, *values)]
        how = {geometric_mean: "geometric mean", min: "least", max: "most"}[gather]
        limit = f"{'<=' if at_most else '>='} {bar:g}"
        holds = "yes" if meets[0] else "**no**"
        table.append((what, how, limit, value, f"{sum(meets[1:])} of {len(values)}", holds))
    return table


def reach(rows: list[dict]) -> str:
    """What the floor itself would reach: no way to the factor can be faster beside the others."""
    lines = []
    for other in ("im2col", "einconv"):
        found = [
            row["seconds"][other] / row["seconds"]["floor"]
            for row in of(rows, "reduce")
            if {other, "floor"} <= row["seconds"].keys()
        ]
        if found:
            lines.append(f"- reduce: {other} / floor: {geometric_mean(found):.2f} (geometric mean)")
    return "\n".join(["The most that the reduce factor's ratios could be:", "", *lines])


def ratio_table(rows: list[dict]) -> str:
    """Ratios by factor and kind."""
    others = list(dict.fromkeys(name for names in OTHERS.values() for name in names))
    lines: list[list[object]] = []
    for quantity in QUANTITIES:
        for kind in ("all", *KINDS):
            some = [r for r in of(rows, quantity) if kind in ("all", r["kind"])]
            if not some:
                continue
            cells: list[object] = [f"**{quantity}**" if kind == "all" else "", kind, len(some)]
            for measure in ("seconds", "bytes"):
                for other in others:
                    found = ratios(some, other, measure)
                    if measure == "bytes" and other == "floor":
                        continue
                    spread = f" ({min(found):.2f})" if found and measure == "seconds" else ""
                    cells.append(f"{geometric_mean(found):.2f}{spread}" if found else "")
            lines.append(cells)
    head = ["factor", "kind", "convolutions", *(f"{other}: time (least)" for other in others)]
    head += [f"{other}: memory" for other in others if other != "floor"]
    return markdown(head, lines)


def remarks(rows: list[dict]) -> str:
    """The cells that are slowest beside others, and what failed or is wrong."""
    lines = []
    for quantity, others in OTHERS.items():
        for other in others:
            found = [(ratios([row], other), row["name"]) for row in of(rows, quantity)]
            limit = 0.5 if other == "floor" else 0.95
            slow = sorted((r[0], name) for r, name in found if r and r[0] < limit)
            many = sum(bool(r) for r, _ in found)
            lines.append(
                f"- {quantity}: {len(slow)} of {many} take more than {1 / limit:.2f} times "
                f"{other}'s time"
                + (": " if slow else "")
                + "; ".join(f"{1 / r:.2f} ({name})" for r, name in slow[:8])
            )
    lines += ["", "## Left out, failed or wrong", ""]
    failed: dict[str, int] = {}
    for row in rows:
        for name, reason in row["failed"].items():
            key = f"{name}, {row['quantity']}: {reason}"
            failed[key] = failed.get(key, 0) + 1
    lines += [f"- {reason} ({count} convolutions)" for reason, count in failed.items()]
    wrong = [
        f"- {name}, {row['quantity']}, {row['name']}: relative difference {error:.0e} to im2col"
        for row in rows
        for name, error in row["error"].items()
        if not error < 1e-4
    ]
    return "\n".join([*lines, *(wrong or ["- Results that differ by more than 1e-4: none."])])


def plot(rows: list[dict], path: Path) -> None:
    """Boxes of time ratios by kind."""
    panels = {
        quantity: {
            f"{other} / kfac_tn": [
                ratios([r for r in of(rows, quantity) if r["kind"] == kind], other)
                for kind in KINDS
            ]
            for other in others
        }
        for quantity, others in OTHERS.items()
    }
    boxes(panels, KINDS, path, "Time in units of kfac_tn's", columns=2)


def main() -> None:
    """Measure, print, write."""
    options_of = parser(__doc__, limit_seconds=600, quick="one convolution of each kind")
    options_of.add_argument("--batch", type=int, default=BATCH)
    options = options_of.parse_args()
    if options.quick:
        options.limit_seconds, options.repetitions = 15, 3
    torch.set_num_threads(options.threads)
    start, rows = perf_counter(), []
    for row in measure_all(options):
        rows.append(row)
        times = ", ".join(f"{n} {1e3 * t:.2f} ms" for n, t in row["seconds"].items())
        print(f"{row['name']}, {row['quantity']}: {times}", flush=True)
    setting = conditions(options, start)
    claims = markdown(
        ["what must hold", "of all", "bar", "measured", "met by", "holds"], bars(rows)
    )
    claims += f"\n\n{reach(rows)}"
    report = (
        f"# Kronecker factors of convolutions\n\n{setting}\n\n## What must hold\n\n{claims}\n\n"
        "## By kind\n\nTime and peak memory of the others in units of kfac_tn's: geometric means "
        f"over distinct convolutions (and the least). More than 1: kfac_tn is better.\n\n"
        f"{ratio_table(rows)}\n\n## Slowest beside others\n\n{remarks(rows)}"
    )
    name = "factors" if options.batch == BATCH else f"factors_batch_{options.batch}"
    write(options.output, name, setting, rows, report)
    plot(rows, options.output / f"{name}.png")


if __name__ == "__main__":
    main()
