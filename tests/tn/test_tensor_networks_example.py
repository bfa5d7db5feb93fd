"""The example that derives a KFAC factor: it runs, checks itself, and leaves pictures."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "tensor_networks.py"
    spec = importlib.util.spec_from_file_location("tensor_networks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--groups", "4", "--stride", "2", "--format", "png"]])
def test_example_runs(example, options, tmp_path, capsys):
    example.main([*options, "--batch", "2", "--size", "10", "--output", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert printed.count("relative error") == 5
    assert "sum_o Pi[k" in printed.partition("new when simplified:")[2]
    pictures = sorted(path.name for path in (tmp_path / "new").iterdir())
    ending = "png" if options else "svg"
    names = ("1_convolution", "2_weight_gradient", "3_unfolded_input", "4_factor")
    assert pictures == [f"{name}.{ending}" for name in names]


def test_impossible_options_are_explained(example, tmp_path):
    with pytest.raises(ValueError, match="groups=3 must divide 16"):
        example.main(["--groups", "3", "--output", str(tmp_path)])
