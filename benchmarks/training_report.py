"""What `training.py` finds, as numbers, a report and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import markdown
from training_competitors import OURS, Competitor

# At most these parts of the best competitor's seconds and steps, by kind of problem.
BARS = {
    "autoencoder": (1 / 5, 1 / 10),
    "regression": (1 / 5, 1 / 10),
    "CNN": (0.5, 0.5),
    "language model": (0.75, 0.65),
}
COLORS = {
    "SGD": "#6b7280",
    "AdamW": "#2563eb",
    "Muon": "#059669",
    "LBFGS": "#a16207",
    "singd": "#7c3aed",
    OURS: "#dc2626",
}
NEVER = math.inf


# ---- numbers ---------------------------------------------------------------------------------


def first(curve: Sequence[tuple[float, int, float]], target: float) -> tuple[float, float]:
    """Seconds and steps of the first evaluation that found a loss this low; else infinite."""
    found = next(((s, n) for s, n, loss in curve if loss <= target), None)
    return (NEVER, NEVER) if found is None else (found[0], float(found[1]))


def _rounded(curve: Sequence[tuple[float, int, float]]) -> list[tuple[float, int, float]]:
    return [(round(seconds, 4), steps, float(f"{loss:.6g}")) for seconds, steps, loss in curve]


def summarize(
    task: Any,
    settings: Sequence[Any],
    runs: Sequence[Any],
    seconds: float,
    trained: float,
    tried: list[dict[str, Any]],
    left_out: dict[str, str],
) -> dict[str, Any]:
    """All about one problem.

    Args:
        task: What was trained.
        settings: Of the final runs, KFAC's among them.
        runs: The final runs.
        seconds: Planned for each of them.
        trained: That each had, less if the time was up.
        tried: What the search found.
        left_out: Competitors without final runs, and why.
    """
    by_name = {s.name: [run for run in runs if run.setting == s] for s in settings}
    by_name = {name: group for name, group in by_name.items() if group}
    medians = {n: statistics.median(r.final_loss for r in g) for n, g in by_name.items()}
    rivals = {n: loss for n, loss in medians.items() if n != OURS and math.isfinite(loss)}
    target = min(rivals.values(), default=-math.inf)
    optimizers = []
    for name, group in by_name.items():
        reached = [first(run.curve, target) for run in group]
        losses = [run.final_loss for run in group]
        optimizers.append(
            {
                "optimizer": name,
                "lr": group[0].setting.lr,
                "schedule": None if name == OURS else group[0].setting.schedule,
                "steps": statistics.median(run.steps for run in group),
                "final loss": medians[name],
                "lowest": min(losses),
                "highest": max(losses),
                "seconds to target": statistics.median(s for s, _ in reached),
                "steps to target": statistics.median(n for _, n in reached),
                "failures": [run.failure for run in group if run.failure],
                "runs": [
                    {"seed": run.seed, "failure": run.failure, "curve": _rounded(run.curve)}
                    for run in group
                ],
            }
        )
    best = min(
        (o for o in optimizers if o["optimizer"] in rivals),
        key=lambda o: o["seconds to target"],
        default=None,
    )
    ours = next((o for o in optimizers if o["optimizer"] == OURS), None)
    ratios = {"seconds": NEVER, "steps": NEVER}
    if best is not None and ours is not None:
        for unit in ratios:
            if best[f"{unit} to target"]:  # 0: no competitor made progress
                ratios[unit] = ours[f"{unit} to target"] / best[f"{unit} to target"]
    bars = dict(zip(("seconds", "steps"), BARS[task.kind], strict=True))
    return {
        "problem": task.problem.title,
        "kind": task.kind,
        "batch size": task.batch_size,
        "LBFGS batch size": task.large_batch or len(task.problem.train[0]),
        "evaluated": min(task.evaluated, len(task.problem.train[0])),
        "planned seconds": seconds,
        "seconds": trained,
        "target": target,
        "best competitor": None if best is None else best["optimizer"],
        "ratios": ratios,
        "bars": bars,
        "holds": {unit: ratios[unit] <= bars[unit] for unit in bars},
        "optimizers": optimizers,
        "search": tried,
        "left out": left_out,
    }


# ---- text ------------------------------------------------------------------------------------


def _loss(value: float) -> str:
    return f"{value:.2e}" if math.isfinite(value) else "failed"


def _time(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "never"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


def _bars_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        named = {o["optimizer"]: o for o in row["optimizers"]}
        ours, best = named.get(OURS), named.get(row["best competitor"])
        line = [row["problem"], f"{row['seconds']:.1f}"]
        if ours is None or best is None:
            lines.append([*line, *["no result"] * 8])
            continue
        line += [_loss(row["target"]), _loss(ours["final loss"]), best["optimizer"]]
        for unit, digits in (("seconds", 2), ("steps", 0)):
            times = [_time(o[f"{unit} to target"], digits) for o in (ours, best)]
            holds = "yes" if row["holds"][unit] else "no"
            line += [" / ".join(times), _ratio(row["ratios"][unit])]
            line += [f"{row['bars'][unit]:.2f}: {holds}"]
        lines.append(line)
    head = ["problem", "seconds per run", "target loss", "KFAC's final loss", "first there"]
    head += ["seconds, KFAC / it", "ratio", "bar: holds", "steps, KFAC / it", "ratio", "bar: holds"]
    return markdown(head, lines)


def _problem_section(row: dict[str, Any], competitors: Mapping[str, Competitor]) -> str:
    lines = []
    for o in row["optimizers"]:
        grid = competitors[o["optimizer"]].learning_rates if o["optimizer"] != OURS else ()
        outermost = (grid[0], grid[-1]) if len(grid) > 2 else ()
        edge = " (edge of the grid)" if o["lr"] in outermost else ""
        how = "defaults" if o["lr"] is None else f"lr {o['lr']:g}{edge}, {o['schedule']}"
        ends = " to ".join(_loss(o[end]) for end in ("lowest", "highest"))
        reached = _time(o["seconds to target"], 2), _time(o["steps to target"], 0)
        failed = f"{len(o['failures'])} of {len(o['runs'])}" if o["failures"] else "none"
        steps = f"{o['steps']:.0f}"
        lines.append([o["optimizer"], how, steps, _loss(o["final loss"]), ends, *reached, failed])
    head = ["optimizer", "setting", "steps", "final loss", "range over seeds"]
    head += ["seconds to target", "steps to target", "failed runs"]
    shorter = "" if row["seconds"] > 0.99 * row["planned seconds"] else ", cut short by the limit"
    text = [
        f"## {row['problem']}",
        f"{row['seconds']:.1f} s per run{shorter}; batches of {row['batch size']} "
        f"(LBFGS: {row['LBFGS batch size']}); loss on {row['evaluated']} training examples.",
        markdown(head, lines),
    ]
    failures = {f for o in row["optimizers"] for f in o["failures"]}
    text += [f"Left out: {name}, {reason}." for name, reason in row["left out"].items()]
    text += [f"Failed: {failure}." for failure in sorted(failures)]
    return "\n\n".join(text)


METHOD = """\
Training losses, medians over seeds. The target is the lowest final loss of any competitor; reached
when an evaluation first finds it, "never" if it isn't in half of the runs. "First there" is the
competitor that reaches it in the fewest seconds. KFAC is `kfac_tn.KFAC(model, loss_fn)`, with no
schedule and nothing else set. Competitors have the best of their grid, found by successive halving
on the first seed: constant learning rates for 1/12 of the seconds that were planned per run, the
best two for 1/5, with constant and cosine schedules (over a run's own clock), of these the best of
each schedule at least for all of them. Seconds are of a run's own clock, without evaluations; all
runs of a problem take turns in short slices. Steps are forward and backward passes. Weight decay is
0 for all."""


def write_report(
    output: Path, setting: str, competitors: Mapping[str, Competitor], rows: list[dict[str, Any]]
) -> None:
    """`training.md` and `training.json`; infinite numbers are null in the latter."""
    output.mkdir(parents=True, exist_ok=True)
    grids = {name: list(c.learning_rates) for name, c in competitors.items()}
    lines = [
        [name, ", ".join(f"{lr:g}" for lr in grids[name]), ", ".join(c.schedules), c.note]
        for name, c in competitors.items()
    ]
    parts = ["# Training", f"{setting}.", METHOD, _bars_table(rows)]
    parts += ["![Loss over seconds](training.png)"]
    parts += [_problem_section(row, competitors) for row in rows]
    head = ["competitor", "learning rates", "schedules", ""]
    parts += ["## Competitors", markdown(head, lines)]
    (output / "training.md").write_text("\n\n".join(parts) + "\n")
    record = {"setting": setting, "learning rates": grids, "rows": rows}
    (output / "training.json").write_text(json.dumps(_finite(record), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def merged(parts: Sequence[Path], titles: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """Setting and rows of several results, in the order of the titles; null is infinite again."""
    records = [json.loads(part.read_text()) for part in parts]
    rows = [_infinite(row) for record in records for row in record["rows"]]
    found = [row["problem"] for row in rows]
    if len(set(found)) < len(found):
        raise ValueError(f"A problem is in several parts: {sorted(found)}.")
    settings = list(dict.fromkeys(record["setting"] for record in records))
    return "; ".join(settings), sorted(rows, key=lambda row: titles.index(row["problem"]))


def _infinite(row: dict[str, Any]) -> dict[str, Any]:
    def number(value: float | None, sign: float = 1.0) -> float:
        return sign * NEVER if value is None else value

    kept = ("optimizer", "lr", "schedule", "failures", "runs")
    optimizers = [
        {
            **{name: v if name in kept else number(v) for name, v in o.items()},
            "runs": [
                {**run, "curve": [(s, n, number(loss)) for s, n, loss in run["curve"]]}
                for run in o["runs"]
            ],
        }
        for o in row["optimizers"]
    ]
    ratios = {unit: number(ratio) for unit, ratio in row["ratios"].items()}
    # Without any competitor's result the target is minus infinity.
    return {
        **row,
        "target": number(row["target"], -1.0),
        "ratios": ratios,
        "optimizers": optimizers,
    }


# ---- picture ---------------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]], setting: str, path: Path, columns: int = 3) -> None:
    """A panel for each problem: the median loss over seconds, and a band over all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = max(1, math.ceil(len(rows) / columns))
    figure, axes = plt.subplots(
        height, columns, figsize=(14, 3.8 * height + 0.6), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(rows) :]:
        ax.set_axis_off()
    for ax, row in zip(axes.flat, rows, strict=False):
        starts, lowest = [], []
        for o in row["optimizers"]:
            # Runs are evaluated at the same times of their clocks, one point for each turn.
            losses = list(zip(*([p[2] for p in r["curve"]] for r in o["runs"]), strict=True))
            times = [i * row["seconds"] / (len(losses) - 1) for i in range(len(losses))]
            shown = [[x for x in at if math.isfinite(x)] for at in losses]
            name, ours = o["optimizer"], o["optimizer"] == OURS
            color = COLORS[name]
            middle = [statistics.median(at) for at in losses]
            middle = [x if math.isfinite(x) else math.nan for x in middle]
            low, high = ([end(at, default=math.nan) for at in shown] for end in (min, max))
            ax.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)
            width = 2.4 if ours else 1.4
            ax.plot(times, middle, color=color, linewidth=width, label=name, zorder=2 + ours)
            starts.append(middle[0])
            lowest += [x for x in low if x > 0]  # NaN isn't
        if math.isfinite(row["target"]):
            ax.axhline(row["target"], color="0.3", linewidth=0.9, linestyle=":")
        ax.set_yscale("log")
        # A diverging run may go anywhere; the picture is about the others.
        ax.set_ylim(
            0.7 * min(lowest, default=0.1), 2 * max((s for s in starts if s > 0), default=1)
        )
        ax.set_xlim(left=0)
        ax.set_title(row["problem"], loc="left", fontsize=10)
        ax.set(xlabel="seconds of training", ylabel="training loss")
        ax.grid(color="0.9", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles.update({h.get_label(): h for h in ax.get_legend_handles_labels()[0]})
    if handles:
        figure.legend(handles.values(), handles, loc="outside upper right", ncols=len(handles))
    figure.suptitle(
        "KFAC on its defaults, others tuned: medians and ranges over seeds; dotted: the target",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.supxlabel(setting, fontsize=7, color="0.4")
    figure.savefig(path, dpi=110)
    plt.close(figure)
