"""The benchmarks: what they share in detail, and their quick forms as somebody runs them."""

import importlib
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
for needed in ("curvlinops", "einconv", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(needed)


@contextmanager
def imported(name):
    """A script of `benchmarks/` as a module, its neighbours importable as for a script."""
    folders = [ROOT / "benchmarks", ROOT / "examples"]
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(str(folder))
        yield importlib.import_module(name)
        for known, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent in folders:
                del sys.modules[known]


@pytest.fixture(scope="module")
def measuring():
    with imported("measuring") as module:
        yield module


@pytest.fixture(scope="module")
def training():
    with imported("training") as module:
        yield module


def test_peak_memory_is_that_of_a_call(measuring):
    def call():
        temporary = torch.ones(1000)  # 4,000 bytes, beside the next 4,000
        temporary = temporary + 1
        return temporary[:10].clone()  # 40 more

    assert 8000 <= measuring.peak_bytes(call, "cpu") <= 8200


def test_turns_are_shared(measuring, monkeypatch):
    """A call that takes a second has one turn, short ones as many as asked for, in rotation."""
    order = []

    def fake(call, number):
        order.append((call, number))
        return 1.0

    monkeypatch.setattr(measuring, "seconds", fake)
    once = {"slow": 1.0, "fast": 1e-3, "tiny": 1e-4}
    times = measuring.take_turns({n: n for n in once}, once, budget=0.3, most=4)
    assert {name: len(t) for name, t in times.items()} == {"slow": 1, "fast": 4, "tiny": 4}
    assert order[:4] == [("slow", 1), ("fast", 2), ("tiny", 20), ("fast", 2)]


def _finished(name, seed, *points, failure=None):
    """A run with evaluations (seconds, steps, loss)."""
    final = math.inf if failure else points[-1][2]
    return SimpleNamespace(
        setting=SimpleNamespace(name=name, lr=None if name == "KFAC" else 0.1, schedule="cosine"),
        seed=seed,
        steps=points[-1][1],
        failure=failure,
        curve=[(0.0, 0, 9.0), *points],
        final_loss=final,
    )


def _summarized(training, runs):
    task = SimpleNamespace(
        problem=SimpleNamespace(title="One", train=[range(100)]),
        kind="CNN",
        batch_size=10,
        large_batch=None,
        evaluated=1000,
    )
    settings = list({run.setting.name: run.setting for run in runs}.values())
    for run in runs:
        run.setting = next(s for s in settings if s.name == run.setting.name)
    return training.summarize(task, settings, runs, 2.0, 2.0, [], {})


def test_target_and_ratios(training):
    """The target is the lowest median of a competitor; the ratios are to the first one there."""
    runs = [
        *(_finished("SGD", i, (1.0, 10, 3.0), (2.0, 20, loss)) for i, loss in enumerate((2, 1, 4))),
        *(_finished("AdamW", i, (1.0, 5, 3.0), (2.0, 9, 2.5)) for i in range(3)),
        _finished("KFAC", 0, (0.5, 4, 2.0), (2.0, 16, 1.0)),
        _finished("KFAC", 1, (0.5, 4, 3.0), (1.0, 8, 1.5)),
        _finished("KFAC", 2, (0.5, 4, 3.0), failure="ValueError: no"),
    ]
    row = _summarized(training, runs)
    assert row["target"] == 2
    assert row["best competitor"] == "SGD"
    assert row["ratios"] == {"seconds": 0.5, "steps": 8 / 20}
    assert row["holds"] == {"seconds": True, "steps": True}
    ours = row["optimizers"][-1]
    assert (ours["final loss"], ours["highest"]) == (1.5, math.inf)
    assert ours["failures"] == ["ValueError: no"]


def test_target_never_reached(training, tmp_path):
    runs = [_finished("SGD", 0, (1.0, 10, 1.0)), _finished("KFAC", 0, (1.0, 9, 2.0))]
    row = _summarized(training, runs)
    assert row["ratios"] == {"seconds": math.inf, "steps": math.inf}
    assert not any(row["holds"].values())
    training.write_report(tmp_path, "Setting", training.COMPETITORS, [row])
    table = (tmp_path / "training.md").read_text()
    assert "| SGD | never / 1.00 | never | 0.50: no | never / 10 | never | 0.50: no |" in table
    stored = json.loads((tmp_path / "training.json").read_text())["rows"][0]
    assert stored["ratios"] == {"seconds": None, "steps": None}


def test_parts_of_a_report_are_merged(training, tmp_path):
    """One report of two processes: what was infinite is so again; in the order asked for."""
    results = [(1.0, 10, 1.0)], [(1.0, 10, 3.0), (2.0, 20, 2.0)]
    rows, parts = [], []
    for index, points in enumerate(results):
        failed = _finished("KFAC", 0, (1.0, 9, math.inf), failure="ValueError: no")
        runs = [_finished("SGD", 0, *points), failed]
        row = {**_summarized(training, runs), "problem": f"problem {index}"}
        training.write_report(tmp_path / str(index), "Setting", training.COMPETITORS, [row])
        rows.append(row)
        parts.append(tmp_path / str(index) / "training.json")
    setting, merged = training.merged(parts, ["problem 1", "problem 0"])
    assert setting == "Setting"
    assert json.dumps(merged) == json.dumps(rows[::-1])
    with pytest.raises(ValueError, match="several parts"):
        training.merged([*parts, parts[0]], ["problem 1", "problem 0"])


def test_failures_are_recorded(training, monkeypatch):
    """A run that diverges and one that raises; the third trains on, from the same weights."""
    task = training.TASKS["tabular"]()
    settings = [training.Setting(*given) for given in (("SGD", 1e9), ("AdamW", 1e-3), ("KFAC",))]
    runs = [training.Run(task, setting, 0, 1.0) for setting in settings]
    assert len({run.curve[0][2] for run in runs}) == 1
    assert training.Run(task, settings[1], 1, 1.0).curve[0][2] != runs[0].curve[0][2]

    def fail():
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(runs[1].optimizers[0], "step", fail)
    start = runs[2].curve[0][2]
    training.compete(runs, 0.5, math.inf, turns=8)
    assert "loss was" in runs[0].failure
    assert runs[1].failure == "ArithmeticError: on purpose"
    assert [run.final_loss for run in runs[:2]] == [math.inf, math.inf]
    assert {len(run.curve) for run in runs} == {9}
    assert runs[2].failure is None
    assert runs[2].final_loss < start


def test_search_takes_the_best(training):
    """Of three learning rates, of which one diverges and one does nothing."""
    task = training.TASKS["tabular"]()
    competitor = training.replace(training.COMPETITORS["SGD"], learning_rates=(1e-9, 0.1, 1e9))
    best, tried = training.search(task, "SGD", competitor, 1.0, math.inf)
    assert best.lr == 0.1
    assert [entry["lr"] for entry in tried[:3]] == [0.1, 1e-9, 1e9]
    assert [entry["failure"] is None for entry in tried[:3]] == [True, True, False]
    assert {(entry["lr"], entry["schedule"]) for entry in tried[3:7]} == {
        (lr, schedule) for lr in (0.1, 1e-9) for schedule in ("constant", "cosine")
    }
    last = tried[7:]  # the same again, for the full time
    assert len(last) == 4
    assert all(entry["seconds"] >= 1.0 for entry in last)
    first = min(last, key=lambda entry: entry["loss"])
    assert (best.lr, best.schedule) == (first["lr"], first["schedule"])
    useless = training.replace(competitor, learning_rates=(1e8, 1e9))
    with pytest.raises(RuntimeError, match="each run of the search failed"):
        training.search(task, "SGD", useless, 2.0, math.inf)


def test_cosine_schedule(training):
    """Of the run's own clock; a constant one leaves the learning rate alone."""
    task = training.TASKS["tabular"]()
    for schedule, expected in (("cosine", (0.1, 0.05, 0.0)), ("constant", (0.1, 0.1, 0.1))):
        run = training.Run(task, training.Setting("SGD", 0.1, schedule), 0, horizon=10.0)
        for seconds, lr in zip((0.0, 5.0, 10.0), expected, strict=True):
            run.seconds = seconds
            run.advance(seconds + 1e-9)
            assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr, abs=1e-8)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Muon", "LBFGS", "singd"])
@pytest.mark.parametrize("task", ["tabular", "cnn-groupnorm", "language-model", "lstm"])
def test_competitors_train_everything(training, task, name):
    """Each parameter belongs to exactly one of a competitor's optimizers, and moves."""
    if name == "singd":
        pytest.importorskip("singd")
    made = training.replace(training.TASKS[task](), batch_size=16, large_batch=16)
    setting = training.Setting(name, 1e-3)
    if (task, name) == ("cnn-groupnorm", "Muon"):
        with pytest.raises(NotImplementedError, match="2-d weights"):
            training.Run(made, setting, 0, 1.0)
        return
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        with pytest.raises(NotImplementedError, match=r"install 2\.9"):
            training.Run(made, setting, 0, 1.0)
        return
    run = training.Run(made, setting, 0, 1.0)
    trained = [
        p for optimizer in run.optimizers for g in optimizer.param_groups for p in g["params"]
    ]
    assert len(trained) == len(set(trained))
    assert set(trained) == set(run.model.parameters())
    before = [p.detach().clone() for p in trained]
    run.advance(1e-9)
    assert run.failure is None
    assert all((p != b).any() for p, b in zip(trained, before, strict=True))


def run(script, output, *arguments):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [
            sys.executable,
            f"benchmarks/{script}",
            "--quick",
            "--threads",
            "1",
            "--output",
            str(output),
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "MPLBACKEND": "agg"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    name = Path(script).stem
    assert (output / f"{name}.png").stat().st_size > 10_000
    report = (output / f"{name}.md").read_text()
    assert "threads used" in report
    return json.loads((output / f"{name}.json").read_text())["rows"], report


@pytest.mark.slow
def test_factors(tmp_path):
    rows, report = run("factors.py", tmp_path, "--batch", "2")
    assert {row["kind"] for row in rows} == {
        "general", "dense", "down-sampling", "grouped", "depthwise"
    }  # fmt: skip
    assert "differ by more than 1e-4: none" in report
    for row in rows:
        ours = row["seconds"].keys() & {"kfac_tn", "im2col", "GEMM"}
        assert len(ours) == 2
        assert max(row["error"].values()) < 1e-4


@pytest.mark.slow
def test_models(tmp_path):
    rows, report = run("models.py", tmp_path)
    assert {"U-Net-like", "ViT", "GPT", "MLP"} >= {row["model"] for row in rows}
    for row in rows:
        assert not [way for way in row["refused"] if way.startswith("kfac_tn")]
        assert row["seconds"].keys() == row["bytes"].keys()
    assert "## Refused" in report


@pytest.mark.slow
def test_curvature(tmp_path):
    rows, report = run("curvature.py", tmp_path)
    assert {row["quantity"] for row in rows} == {
        "exact diagonal", "MC diagonal", "per-example gradients", "KFAC"
    }  # fmt: skip
    for row in rows:
        assert not {"kfac_tn", "torch.func"} & row["refused"].keys()
        assert row["seconds"].keys() == row["bytes"].keys()
        others = {way: d for way, d in row["difference"].items() if d is not None}
        assert max(others.values(), default=0) < 1e-5
    compared = {row["quantity"]: row["difference"] for row in rows}
    assert compared["exact diagonal"]["torch.func"] is not None
    assert compared["per-example gradients"]["torch.func"] is not None
    assert "## What must hold" in report


@pytest.mark.slow
def test_scaling(tmp_path):
    rows, report = run("scaling.py", tmp_path)
    assert {row["axis"] for row in rows} == {"batch", "channels", "kernel", "resolution"}
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if "kfac_tn" in line]
    table = [line for line in lines if len(line) == 7]
    assert len(table) == 3 * 4
    by_name = {tuple(line[:2]): line[4] for line in table}
    assert by_name["output, expand: kfac_tn", "batch"] != by_name["expand: kfac_tn", "kernel"]


@pytest.mark.slow
def test_step(tmp_path):
    rows, _ = run("step.py", tmp_path)
    assert len(rows) == 9 * 4
    for row in rows:
        kfac = row["optimizer"].startswith("KFAC")
        assert row["optimizer"] != "AdamW" or row["ratio to AdamW"] == 1
        assert row["idle, ms"] > row["of it in step()"] > 0
        assert kfac == (row["bound"] is not None) == ("inverses, ms" in row)
        assert not kfac or row["bound"] > 1


@pytest.mark.slow
def test_inverses(tmp_path):
    rows, report = run("inverses.py", tmp_path)
    assert {row["part"] for row in rows} == {"kernels", "models", "storage"}
    assert all(max(row["error"].values()) < 1e-4 for row in rows if row["part"] == "kernels")
    for row in rows:
        assert len(row["seconds"]) >= 2
        assert min(row["seconds"].values()) > 0
    assert "the fastest of the batched ways in" in report


@pytest.mark.slow
def test_tolerance(tmp_path):
    rows, report = run("tolerance.py", tmp_path)
    assert len(rows) == 2
    assert all(len(row["losses"]) == 3 for row in rows)
    assert "tolerance inf" in report


@pytest.mark.slow
def test_estimates(tmp_path):
    rows, report = run("estimates.py", tmp_path)
    assert {row["operation"] for row in rows} >= {"forward", "expand factor", "reduce's means"}
    for row in rows:
        assert row["chosen"] in row["seconds"]
        assert row["regret"] >= 1
    assert "## Constants" in report


@pytest.mark.slow
def test_training(tmp_path):
    # More than it takes on a quiet machine: what is left when the time is up has no row.
    rows, report = run("training.py", tmp_path, "--limit-seconds", "50")
    assert len(rows) >= 6
    for row in rows:
        named = {o["optimizer"]: o for o in row["optimizers"]}
        assert named.keys() | row["left out"].keys() >= {"KFAC", "SGD", "AdamW", "Muon", "LBFGS"}
        assert named["KFAC"]["lr"] is None
        assert row["target"] == min(
            o["final loss"]
            for name, o in named.items()
            if name != "KFAC" and o["final loss"] is not None
        )
        for o in row["optimizers"]:
            (only,) = o["runs"]
            assert only["failure"] or only["curve"][-1][0] > 0
    assert "seconds to target" in report
