"""The examples: their helpers in detail, and their quick forms as a user runs them."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def compare():
    """`examples/compare_optimizers.py` as a module, its neighbours importable as for a script."""
    path = ROOT / "examples" / "compare_optimizers.py"
    spec = importlib.util.spec_from_file_location("compare_optimizers", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        patch.delitem(sys.modules, "problems", raising=False)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("problems", None)


class Clock:
    """Stands still but for the models, which take `cost` for each forward pass."""

    now = 0.0

    def __call__(self):
        return self.now


class Ticking(nn.Linear):
    """A linear model that takes time."""

    def __init__(self, clock, cost=1.0):
        super().__init__(3, 2)
        self.clock, self.cost = clock, cost

    def forward(self, x):
        self.clock.now += self.cost
        return super().forward(x)


def make_problem(compare, build=lambda: nn.Linear(3, 2)):
    x = torch.linspace(-1, 1, 60).reshape(20, 3)
    data = (x, x[:, :2])
    return compare.Problem(
        "toy", build, nn.MSELoss, data, data, "test loss", nn.MSELoss(), {"SGD": (0.01, 0.1, 1.0)}
    )


def make_run(compare, name, lr, losses, diverged=False):
    """A finished run with this curve, one evaluation in each second, ten steps apart."""
    run = compare.Run(make_problem(compare), "SGD", 0.1, batch_size=10, seed=0)
    run.name, run.lr, run.diverged = name, lr, diverged
    run.curve = [compare.Point(10 * i, float(i), loss, loss / 2) for i, loss in enumerate(losses)]
    run.steps, run.seconds = 10 * (len(losses) - 1), len(losses) - 1.0
    return run


def test_advance_counts_only_training_time(compare, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compare, "perf_counter", clock)
    problem = make_problem(compare, lambda: Ticking(clock))
    run = compare.Run(problem, "SGD", 0.1, batch_size=10, seed=0)
    assert clock.now > 0  # the first evaluation took time,
    assert run.seconds == 0  # which isn't the run's
    run.advance(5)
    run.evaluate()
    run.advance(2.5)  # a step once begun is finished
    assert (run.steps, run.seconds) == (8, 8.0)
    assert [(point.step, point.seconds) for point in run.curve] == [(0, 0.0), (5, 5.0)]


def test_compete_gives_each_run_its_seconds(compare, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compare, "perf_counter", clock)
    costs = iter([0.25, 0.75, 0.25])  # the last one's for the warm-up
    problem = make_problem(compare, lambda: Ticking(clock, next(costs)))
    runs = [compare.Run(problem, "SGD", lr, batch_size=10, seed=0) for lr in (0.01, 0.1)]
    compare.compete(runs, seconds=3.0)
    assert [run.steps for run in runs] == [12, 4]
    assert [run.seconds for run in runs] == [3.0, 3.0]
    assert all(len(run.curve) == 1 + 3.0 / compare.SLICE for run in runs)


def test_runs_share_initial_weights_and_batches(compare):
    problem = make_problem(compare)
    a, b = (compare.Run(problem, name, 0.1, batch_size=8, seed=3) for name in ("SGD", "Adam"))
    assert a.curve == b.curve
    for _ in range(5):
        batch = next(a.batches)
        assert len(batch[0]) == 8
        torch.testing.assert_close(batch, next(b.batches), rtol=0, atol=0)


def test_diverged_run_stops_and_is_shown(compare, tmp_path):
    problem = make_problem(compare)
    good = compare.Run(problem, "SGD", 0.1, batch_size=10, seed=0)
    bad = compare.Run(problem, "SGD", 1e30, batch_size=10, seed=0)
    compare.compete([bad, good], seconds=0.2)
    assert bad.diverged
    assert not good.diverged
    assert bad.final_loss == math.inf
    assert all(math.isfinite(point.train_loss) for point in bad.curve)
    assert compare.best_runs([bad, good])["SGD"] is good

    text = compare.report([(problem, [bad, good])], "setting", tmp_path)
    assert text.count("diverged") == 2
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["problems"]["toy"]["runs"][0]["final_train_loss"] is None
    compare.draw([(problem, [bad, good])], "setting", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_table(compare):
    runs = [
        make_run(compare, "SGD", 0.1, [4.0, 2.0, 1.0]),
        make_run(compare, "SGD", 1.0, [4.0, 0.5, 3.0]),
        make_run(compare, "Adam", 0.01, [4.0, 3.0, 2.0]),
        make_run(compare, "KFAC-reduce", None, [4.0, 0.9, 0.25]),
    ]
    assert compare.target_loss(runs) == 1.0  # a final loss, and never KFAC's own
    table = compare.markdown_table(compare.summarize(runs), "test loss")
    head, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    assert head[-2:] == ["test loss", "seconds to target"]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert set("".join(rule)) == {"-", ":"}
    assert rows == [
        ["SGD", "0.1 *", "20", "2.0", "1.000e+00", "1.000e+00", "0.5", "2.0"],
        ["SGD", "1", "20", "2.0", "3.000e+00", "5.000e-01", "1.5", "1.0"],
        ["Adam", "0.01 *", "20", "2.0", "2.000e+00", "2.000e+00", "1", "-"],
        ["KFAC-reduce", "default", "20", "2.0", "2.500e-01", "2.500e-01", "0.125", "1.0"],
    ]


def test_busy_machine_is_reported(compare, tmp_path):
    runs = [make_run(compare, "SGD", lr, [4.0, 2.0, 1.0]) for lr in (0.1, 1.0)]
    runs.append(make_run(compare, "KFAC-expand", None, [4.0, 2.0]))
    runs[-1].steps = 2  # slow, but that's its own affair
    assert not compare.uneven_clock(runs)
    assert "busy" not in compare.report([(runs[0].problem, runs)], "setting", tmp_path)
    runs[0].steps //= 2
    assert compare.uneven_clock(runs)
    assert "busy" in compare.report([(runs[0].problem, runs)], "setting", tmp_path)
    runs[0].diverged = True
    assert not compare.uneven_clock(runs)


def test_learning_rates(compare):
    problem = make_problem(compare)
    assert compare.learning_rates(problem, "SGD", quick=False) == (0.01, 0.1, 1.0)
    assert compare.learning_rates(problem, "SGD", quick=True) == [0.1]
    assert compare.learning_rates(problem, "KFAC-expand", quick=True) == [None]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ["classifier", "autoencoder"])
def test_problems_fit_every_image_shape(compare, name, shape):
    x, y = torch.rand(4, *shape), torch.arange(4)
    problems = sys.modules["problems"]
    problem = problems.PROBLEMS[name](problems.Images(x, y, x, y), "random")
    inputs, targets = problem.train
    outputs = problem.build()(inputs)
    assert problem.loss()(outputs, targets).isfinite()
    assert problem.measure(outputs, targets).isfinite()


def test_digits(compare):
    images = compare.load_images("digits")
    assert images.x_train.shape == (1438, 1, 8, 8)
    assert images.x_test.shape == (359, 1, 8, 8)
    assert images.x_train.min() == 0
    assert images.x_train.max() == 1
    with pytest.raises(ValueError, match="fashion-mnist"):
        compare.load_images("imagenet")


def test_missing_torchvision_says_what_to_install(compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install"):
        compare.load_images("mnist")


def test_torchvision_layouts(compare, monkeypatch, tmp_path):
    """MNIST comes as a tensor without channels, CIFAR-10 as an array with the channels last."""

    class FakeSet:
        def __init__(self, root, train, download):
            self.data, self.targets = self.layout, [0, 1]

    class FakeMNIST(FakeSet):
        layout = torch.full((2, 28, 28), 255, dtype=torch.uint8)

    class FakeCIFAR(FakeSet):
        layout = torch.full((2, 32, 32, 3), 255, dtype=torch.uint8).numpy()

    fake = type(sys)("torchvision")
    fake.datasets = type(sys)("torchvision.datasets")
    fake.datasets.MNIST, fake.datasets.CIFAR10 = FakeMNIST, FakeCIFAR
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    for name, shape in (("mnist", (2, 1, 28, 28)), ("cifar10", (2, 3, 32, 32))):
        images = compare.load_images(name, tmp_path)
        assert images.x_train.shape == shape
        assert images.x_test.max() == 1
        assert images.y_train.tolist() == [0, 1]


def run_example(name, *arguments, path=""):
    paths = [str(ROOT), str(path), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, f"examples/{name}", "--quick", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "MPLBACKEND": "agg"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


@pytest.mark.slow
def test_compare_optimizers_quick(tmp_path):
    printed = run_example("compare_optimizers.py", "--output", tmp_path)
    assert str(tmp_path / "curves.png") in printed
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "torch" in (tmp_path / "results.md").read_text()
    problems = json.loads((tmp_path / "results.json").read_text())["problems"]
    assert len(problems) == 2
    for problem in problems.values():
        names = [run["optimizer"] for run in problem["runs"]]
        assert names == ["SGD", "Adam", "KFAC-expand", "KFAC-reduce"]
        for run in problem["runs"]:
            assert not run["diverged"]
            assert run["final_train_loss"] < run["curve"][0]["train_loss"]


@pytest.mark.slow
def test_wrap_sgd_quick():
    printed = run_example("wrap_sgd.py")
    assert "KFACPreconditioner" in printed
    assert len(printed.splitlines()) == 2 + 3


@pytest.mark.slow
def test_curvature_spectrum_quick(tmp_path):
    pytest.importorskip("curvlinops")
    printed = run_example("curvature_spectrum.py", "--output", tmp_path)
    rows = dict(line.split() for line in printed.splitlines()[2:5])
    assert list(rows) == ["GGN", "KFAC", "EKFAC"]
    assert float(rows["GGN"]) == pytest.approx(float(rows["EKFAC"]), abs=2e-3)
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000


MOCK_MODULE = """
from unittest.mock import MagicMock

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


@pytest.fixture
def replacements(tmp_path):
    """Empty, or a torchvision if there is one that can't be imported.

    As in tests/integrations/conftest.py: laplace-torch imports it without need.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        package = tmp_path / "replacements" / "torchvision"
        package.mkdir(parents=True)
        for name in ("__init__", "models", "transforms"):
            (package / f"{name}.py").write_text(MOCK_MODULE)
    return tmp_path / "replacements"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("laplace") is None, reason="needs laplace-torch")
def test_laplace_uncertainty_quick(tmp_path, replacements):
    printed = run_example(
        "laplace_uncertainty.py", "--output", tmp_path / "pictures", path=replacements
    )
    lines = [line.split() for line in printed.splitlines()]
    moons = {line[0]: [float(value) for value in line[1:]] for line in lines[2:4]}
    assert list(moons) == ["MAP", "Laplace"]
    assert moons["MAP"][1] > 0.95  # sure of what it has never seen anything like
    assert moons["Laplace"][1] < 0.9
    rows = [line for line in lines if len(line) > 4 and line[-4] in ("MAP", "Laplace")]
    digits = {(row[0], row[-4]): [float(value) for value in row[-3:]] for row in rows}
    assert len(digits) == 4
    for accuracy, nll, error in digits.values():
        assert 0.3 < accuracy < 1
        assert 0 < nll < 5
        assert 0 < error < 0.6
    for measure in (1, 2):  # of random labels
        assert digits["30", "Laplace"][measure] < digits["30", "MAP"][measure]
    for name in ("two_moons.png", "calibration.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 10_000


@pytest.mark.slow
def test_pruning_and_ood_quick(tmp_path):
    printed = run_example("pruning_and_ood.py", "--output", tmp_path)
    lines = [line.split() for line in printed.splitlines() if line]
    curvature, magnitude, random = ([float(v) for v in line[-8:]] for line in lines[2:5])
    assert lines[2][:2] == ["curvature,", "h"]
    half = 2  # 50 %, in columns that start at 30 %
    assert min(curvature[half], magnitude[half]) > 0.9
    assert random[half] < 0.5
    areas = [[float(value) for value in line[-2:]] for line in lines[6:8]]
    assert [line[0] for line in lines[6:8]] == ["with", "network"]
    assert all(0.9 < area <= 1 for row in areas for area in row)
    assert (tmp_path / "pruning_and_ood.png").stat().st_size > 10_000
