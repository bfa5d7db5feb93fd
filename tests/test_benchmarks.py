"""The benchmarks: what they share in detail, and their quick forms as somebody runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
for needed in ("curvlinops", "einconv", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def measuring():
    """`benchmarks/measuring.py` as a module, its neighbours importable as for a script."""
    folders = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        import measuring

        yield measuring
        for name in ("measuring", "compare_optimizers", "problems"):
            sys.modules.pop(name, None)


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
    assert len(rows) == 4 * 3
    for row in rows:
        assert row["optimizer"] != "AdamW" or row["ratio to AdamW"] == 1
        assert row["ms per step"] > row["of it in step()"] > 0


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
def test_estimates(tmp_path):
    rows, report = run("estimates.py", tmp_path)
    assert {row["operation"] for row in rows} >= {"forward", "expand factor", "reduce's means"}
    for row in rows:
        assert row["chosen"] in row["seconds"]
        assert row["regret"] >= 1
    assert "## Constants" in report
