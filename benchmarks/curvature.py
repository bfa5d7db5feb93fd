"""Curvature of whole models: diagonals, KFAC, EKFAC and per-example gradients, beside others.

    python benchmarks/curvature.py            # writes benchmarks/results/curvature.{md,json,png}

For each model (`model_zoo.py`, in evaluation mode, batches of 32): the exact diagonal of the GGN,
its Monte-Carlo estimate, KFAC-expand and EKFAC (Monte-Carlo Fisher, one sample each), and
per-example gradients, by kfac_tn, BackPACK, curvlinops, nngeometry and torch.func, where they have
it. BackPACK and nngeometry don't know adaptive pooling: all have average pooling of the same
effect. nngeometry's and curvlinops' KFAC are given the layers that they have it for, linear ones
and 2d convolutions; what a package refuses nevertheless is printed as refused, with what it says,
and so is a package that isn't installed
(`pip install backpack-for-pytorch curvlinops-for-pytorch nngeometry`). torch.func's diagonals are
sums of squared gradients, taken by nested `vmap` in chunks that hold at most 1 GiB of them.

The ways take turns in one process, each on a model of its own; times are medians, what is freed
stays with the process (`measuring.keep_memory`). Memory is the largest that is allocated during a
first call, which isn't timed, its results included, plus the parameters. Exact diagonals and
per-example gradients are compared: the largest relative difference (in norm, of any parameter) from
kfac_tn's is listed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from measuring import (
    Call,
    conditions,
    keep_memory,
    markdown,
    parser,
    peak_bytes,
    take_turns,
    write,
)
from model_zoo import PROBLEMS
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

import kfac_tn
from kfac_tn.likelihood import likelihood_of

OURS, BASE = "kfac_tn", "forward + backward"
EXACT = ("exact diagonal", "per-example gradients")  # what all must agree on
HELD = 2**30  # bytes of gradients that torch.func holds at once
FEW_TURNS = 10  # seconds for all turns of a row
TURNS = {("ResNet-18", "exact diagonal"): 240}  # of what must hold: five turns and more


class Setting:
    """A model, a batch and the loss."""

    def __init__(self, name: str, batch: int, device: str):
        torch.manual_seed(0)
        build, draw = PROBLEMS[name]
        model, (self.x, self.y) = build(), draw(batch)
        for module in list(model.modules()):
            for child, layer in module.named_children():
                if isinstance(layer, nn.AdaptiveAvgPool2d):  # of the 4 x 4 positions left
                    setattr(module, child, nn.AvgPool2d(4))
        self.model = model.eval().to(device)
        self.x, self.y = self.x.to(device), self.y.to(device)
        self.loss_fn = nn.CrossEntropyLoss()

    def train(self) -> None:
        """Forward and backward; the gradients go at once."""
        self.loss_fn(self.model(self.x), self.y).backward()
        self.model.zero_grad(set_to_none=True)

    @property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        """All there is."""
        return [(self.x, self.y)]

    @property
    def layers(self) -> list[nn.Module]:
        """What every package has KFAC for."""
        return [m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def named(self, values: Iterable[Tensor]) -> dict[str, Tensor]:
        """Values of all parameters, in their order."""
        return dict(zip(dict(self.model.named_parameters()), values, strict=True))


# ---- the ways --------------------------------------------------------------------------------

Prepare = Callable[[Setting], Call]


def _our_diagonal(mode: str) -> Prepare:
    return lambda s: lambda: kfac_tn.compute_ggn_diagonal(s.model, s.loss_fn, s.data, mode)


def _our_gradients(s: Setting) -> Call:
    return lambda: kfac_tn.compute_per_example_gradients(s.model, s.loss_fn, s.x, s.y)


def _our_factors(compute: Callable[..., Any]) -> Prepare:
    return lambda s: lambda: compute(s.model, s.loss_fn, s.data, "expand", "mc")


def _backpack(extension: str, **options: Any) -> Prepare:
    def prepare(s: Setting) -> Call:
        from backpack import backpack, extend, extensions

        parameters = list(s.model.parameters())
        model = extend(s.model, use_converter=True).eval()
        loss_fn = extend(s.loss_fn)
        made = getattr(extensions, extension)(**options)

        def call() -> dict[str, Any]:
            with backpack(made):
                loss_fn(model(s.x), s.y).backward()
            results = s.named([getattr(p, made.savefield, None) for p in parameters])
            for parameter in parameters:
                parameter.grad = None
                if hasattr(parameter, made.savefield):
                    delattr(parameter, made.savefield)
            return results

        return call

    return prepare


def _curvlinops(operator: str) -> Prepare:
    def prepare(s: Setting) -> Call:
        import curvlinops

        parameters = [p for layer in s.layers for p in layer.parameters(recurse=False)]

        def call() -> object:
            made = getattr(curvlinops, operator)(
                s.model,
                s.loss_fn,
                parameters,
                s.data,
                check_deterministic=False,
                fisher_type="mc",
                kfac_approx="expand",
                separate_weight_and_bias=False,
            )
            made.compute_kronecker_factors()
            if operator == "EKFACLinearOperator":
                made.compute_eigenvalue_correction()
            return made

        return call

    return prepare


class LeftOutError(Exception):
    """A way that could be taken, but isn't here."""


def _nngeometry(function: str, representation: str) -> Prepare:
    def prepare(s: Setting) -> Call:
        if representation == "PMatEKFAC" and any("Conv" in type(m).__name__ for m in s.layers):
            raise LeftOutError("more than a minute for a batch of 2 of MobileNetV2-like")
        from nngeometry import metrics
        from nngeometry import object as objects
        from nngeometry.layercollection import LayerCollection
        from torch.utils.data import DataLoader, TensorDataset

        if representation == "PMatDiag":
            layers = LayerCollection.from_model(s.model)
        else:
            layers = LayerCollection()
            for layer in s.layers:
                layers.add_layer_from_model(s.model, layer)
        loader = DataLoader(TensorDataset(s.x, s.y), batch_size=len(s.x))
        made = getattr(objects, representation)

        def call() -> object:
            matrix = getattr(metrics, function)(
                s.model, loader, made, device=s.x.device, layer_collection=layers
            )
            if representation == "PMatEKFAC":
                matrix.update_diag(loader)
            return matrix

        return call

    return prepare


def _torch_func(quantity: str) -> Prepare:
    def prepare(s: Setting) -> Call:
        parameters = {n: p.detach() for n, p in s.model.named_parameters()}
        buffers = dict(s.model.named_buffers())
        likelihood = likelihood_of(s.loss_fn)

        def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(s.model, (parameters, buffers), x[None])[0]

        def gradients(x: Tensor, columns: Tensor) -> dict[str, Tensor]:
            _, back = vjp(lambda p: output(p, x), parameters)
            return vmap(lambda column: back(column)[0])(columns)

        def squares(x: Tensor, columns: Tensor) -> dict[str, Tensor]:
            return {n: g.square().sum(0) for n, g in gradients(x, columns).items()}

        def columns() -> Tensor:
            outputs = s.model(s.x).detach()
            if quantity == "exact diagonal":
                return torch.stack([*likelihood.columns(outputs, s.y)], 1)
            if quantity == "MC diagonal":
                return likelihood.sample(outputs, s.y)[:, None]
            outputs.requires_grad_()
            return torch.autograd.grad(s.loss_fn(outputs, s.y), outputs)[0][:, None]

        def call() -> dict[str, Tensor]:
            given = columns()
            if quantity == "per-example gradients":
                return {n: g[:, 0] for n, g in vmap(gradients)(s.x, given).items()}
            held = 2 * given.shape[1] * sum(p.nbytes for p in parameters.values())
            size = max(1, HELD // held)
            totals = {n: torch.zeros_like(p) for n, p in parameters.items()}
            for chunk in zip(s.x.split(size), given.split(size), strict=True):
                for name, square in vmap(squares)(*chunk).items():
                    totals[name] += square.sum(0)
            return totals

        return call

    return prepare


QUANTITIES: dict[str, dict[str, Prepare]] = {
    "exact diagonal": {
        OURS: _our_diagonal("exact"),
        "BackPACK": _backpack("DiagGGNExact"),
        "nngeometry": _nngeometry("FIM", "PMatDiag"),
        "torch.func": _torch_func("exact diagonal"),
    },
    "MC diagonal": {
        OURS: _our_diagonal("mc"),
        "BackPACK": _backpack("DiagGGNMC", mc_samples=1),
        "nngeometry": _nngeometry("FIM_MonteCarlo", "PMatDiag"),
        "torch.func": _torch_func("MC diagonal"),
    },
    "per-example gradients": {
        OURS: _our_gradients,
        "BackPACK": _backpack("BatchGrad"),
        "torch.func": _torch_func("per-example gradients"),
    },
    "KFAC": {
        OURS: _our_factors(kfac_tn.compute_kfac),
        "BackPACK": _backpack("KFAC", mc_samples=1),
        "curvlinops": _curvlinops("KFACLinearOperator"),
        "nngeometry": _nngeometry("FIM_MonteCarlo", "PMatKFAC"),
    },
    "EKFAC": {
        OURS: _our_factors(kfac_tn.compute_ekfac),
        "curvlinops": _curvlinops("EKFACLinearOperator"),
        "nngeometry": _nngeometry("FIM_MonteCarlo", "PMatEKFAC"),
    },
}
OTHERS = ("BackPACK", "curvlinops", "nngeometry", "torch.func")


# ---- measuring -------------------------------------------------------------------------------


def difference(results: Any, expected: dict[str, Tensor]) -> float | None:
    """Largest relative difference of any parameter's values; None of what can't be compared."""
    if not isinstance(results, dict) or any(value is None for value in results.values()):
        return None
    pairs = [(results[name], value) for name, value in expected.items()]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def measure(name: str, quantity: str, left: float, options: argparse.Namespace) -> dict:
    """All ways to one quantity of one model; turns take a few of the seconds that are left."""
    device = options.device
    row: dict = {"model": name, "quantity": quantity, "batch": options.batch}
    row |= {"refused": {}, "difference": {}}
    calls: dict[str, Call] = {}
    once, memory, expected = {}, {}, {}
    for way, prepare in {BASE: lambda s: s.train, **QUANTITIES[quantity]}.items():
        setting = Setting(name, options.batch, device)
        parameter_bytes = sum(p.nbytes for p in setting.model.parameters())
        try:
            call = prepare(setting)
            results: list = []
            begin = perf_counter()
            peak = peak_bytes(lambda call=call, results=results: results.append(call()), device)
            once[way] = perf_counter() - begin
            memory[way] = peak + parameter_bytes
            if quantity in EXACT and way != BASE:
                expected = expected or results[0]
                row["difference"][way] = difference(results[0], expected)
            del results
            calls[way] = call
        except Exception as failure:  # whatever it is, it is recorded, and the others go on
            reason = f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
            row["refused"][way] = reason[:200]
    expected.clear()
    budget = max(0, min(left, TURNS.get((name, quantity), FEW_TURNS)))
    times = take_turns(calls, once, budget, options.repetitions)
    row["seconds"] = {way: statistics.median(t) for way, t in times.items()}
    row["turns"] = {way: len(t) for way, t in times.items()}
    row["bytes"] = memory
    return row


def measure_all(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each model and quantity; when the time is up, there is one turn for each way."""
    end = perf_counter() + options.limit_seconds
    for name in options.models:
        for quantity in options.quantities:
            yield measure(name, quantity, end - perf_counter(), options)


# ---- reporting -------------------------------------------------------------------------------


def bars(rows: list[dict]) -> list[tuple]:
    """What must hold for the exact diagonal of ResNet-18 at batch 32."""
    lines: list[tuple] = []
    for row in rows:
        if (row["model"], row["quantity"]) != ("ResNet-18", "exact diagonal"):
            continue
        for what, quantity, bar in (
            ("BackPACK's time over ours", "seconds", 3),
            ("our peak memory over BackPACK's", "bytes", 0.25),
        ):
            theirs = row[quantity].get("BackPACK", float("nan"))
            ratio = theirs / row[quantity][OURS]
            value, holds = (ratio, ratio >= bar) if bar > 1 else (1 / ratio, 1 / ratio <= bar)
            sign = ">=" if bar > 1 else "<="
            lines.append((what, f"{sign} {bar:g}", value, "yes" if holds else "**no**"))
    return lines


def missing(row: dict, way: str) -> str:
    """Why a cell is empty."""
    return "left out" if row["refused"][way].startswith(LeftOutError.__name__) else "refused"


def ratio_table(rows: list[dict], quantity: str, measured: str) -> str:
    """What the others take as multiples of what we take."""
    ways = [way for way in OTHERS if way in QUANTITIES[quantity]]
    lines = []
    for row in (row for row in rows if row["quantity"] == quantity):
        values = row[measured]
        if OURS not in values:
            lines.append([row["model"], "refused"])
            continue
        ours = values[OURS]
        shown = f"{1e3 * ours:.0f} ms" if measured == "seconds" else f"{ours / 2**20:.0f} MiB"
        cells = [
            values[way] / ours if way in values else missing(row, way) for way in (BASE, *ways)
        ]
        lines.append([row["model"], shown, *cells])
    return markdown(["model", OURS, BASE, *ways], lines)


def remarks(rows: list[dict]) -> str:
    """How far apart the exact ones are, and what was refused."""
    lines = ["## Relative differences from kfac_tn's\n"]
    for row in rows:
        found = {w: d for w, d in row["difference"].items() if w != OURS and d is not None}
        if found:
            shown = ", ".join(f"{way} {d:.1e}" for way, d in found.items())
            lines.append(f"- {row['quantity']}, {row['model']}: {shown}")
    lines.append("\n## Refused, or left out\n")
    refused = [
        f"- {row['quantity']}, {way}, {row['model']}: {reason}"
        for row in rows
        for way, reason in row["refused"].items()
    ]
    return "\n".join(lines + (refused or ["Nothing."]))


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory of the others in units of ours: a row of panels each, a panel a quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    figure, axes = plt.subplots(
        2, len(quantities), figsize=(15, 7), sharex="col", squeeze=False, layout="constrained"
    )
    for panels, measured in zip(axes, ("seconds", "bytes"), strict=True):
        for ax, quantity in zip(panels, quantities, strict=True):
            shown = [r for r in rows if r["quantity"] == quantity and OURS in r[measured]]
            for index, way in enumerate(OTHERS):
                places = [n + (index - 1.5) * 0.2 for n in range(len(shown))]
                values = [r[measured].get(way, 0) / r[measured][OURS] for r in shown]
                ax.bar(places, values, 0.2, label=way, color=f"C{index}")
            ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
            ax.set_yscale("log")
            ax.grid(axis="y", alpha=0.3)
            if measured == "seconds":
                ax.set_title(quantity)
            ax.set_xticks(range(len(shown)), [r["model"] for r in shown], rotation=45, ha="right")
        panels[0].set_ylabel("time" if measured == "seconds" else "peak memory")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(OTHERS))
    figure.suptitle("In units of kfac_tn's (no bar: refused)", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    options_of = parser(__doc__, limit_seconds=900, quick="a small model, batches of 2, no EKFAC")
    models = ["MLP", "ViT", "MobileNetV2-like", "ConvNeXt-like", "ResNet-18"]  # cheap ones first
    options_of.add_argument("--models", nargs="+", choices=models, default=models)
    options_of.add_argument(
        "--quantities", nargs="+", choices=QUANTITIES, default=[*QUANTITIES], metavar="QUANTITY"
    )
    options_of.add_argument("--batch", type=int, default=32)
    options = options_of.parse_args()
    if options.quick:
        options.models, options.batch = ["MLP"], 2
        options.quantities = [q for q in options.quantities if q != "EKFAC"]
        options.limit_seconds, options.repetitions = 10, 1
    torch.set_num_threads(options.threads)
    keep_memory()
    start, rows = perf_counter(), []
    for row in measure_all(options):
        rows.append(row)
        shown = ", ".join(f"{way} {1e3 * t:.0f} ms" for way, t in row["seconds"].items())
        print(f"{row['quantity']}, {row['model']}: {shown}", flush=True)
        for way, reason in row["refused"].items():
            print(f"    {way} refused: {reason}", flush=True)
    setting = conditions(options, start)
    claims = markdown(["exact diagonal of ResNet-18", "bar", "measured", "holds"], bars(rows))
    tables = "\n\n".join(
        f"## {quantity[0].upper()}{quantity[1:]}\n\nTime:\n\n"
        f"{ratio_table(rows, quantity, 'seconds')}\n\nPeak memory:\n\n"
        f"{ratio_table(rows, quantity, 'bytes')}"
        for quantity in options.quantities
    )
    report = (
        f"# Curvature of whole models\n\n{setting}\n\nThe others in units of kfac_tn's time and "
        f"peak memory: above 1, they take more.\n\n## What must hold\n\n{claims}\n\n{tables}\n\n"
        f"{remarks(rows)}"
    )
    write(options.output, "curvature", setting, rows, report)
    plot(rows, options.output / "curvature.png")


if __name__ == "__main__":
    main()
