"""Spectrum and trace of a small CNN's curvature, through curvlinops.

Trains a CNN on scikit-learn's digits and looks at its curvature in three ways: the exact
generalized Gauss-Newton matrix (GGN) by curvlinops, KFAC and EKFAC by kfac_tn. All are operators of
curvlinops, so the same tools tell their spectra, and estimate the trace of KFAC, which is known.
Run from the root of the repository, with the extras `examples` and `curvlinops`:

    python examples/curvature_spectrum.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import curvlinops
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from problems import load_images, small_cnn, train
from torch import Tensor, nn

import kfac_tn
from kfac_tn.integrations.curvlinops import as_linear_operator

SHIFT = 1e-6  # added to eigenvalues before their logarithm is taken
ESTIMATORS: dict[str, Callable] = {
    "Hutchinson": curvlinops.hutchinson_trace,
    "Hutch++": curvlinops.hutchpp_trace,
    "XTrace": curvlinops.xtrace,
}


def plot_spectra(axes: Axes, operators: dict[str, object], vectors: int) -> None:
    """Densities of the logarithms of the eigenvalues, by Lanczos' method."""
    for name, operator in operators.items():
        grid, density = curvlinops.lanczos_approximate_log_spectrum(
            operator, ncv=vectors, num_repeats=2, boundaries=(0.0, None), epsilon=SHIFT
        )
        axes.loglog(grid.cpu(), density.cpu().clamp(min=1e-9), label=name)
    axes.set(xlabel="eigenvalue", ylabel="density", title="Spectrum", ylim=(1e-6, None))
    axes.legend()


def plot_estimates(axes: Axes, operator: object, trace: Tensor, most: int, repeats: int) -> None:
    """Errors of stochastic estimates of a trace that is known."""
    counts = [count for count in (6, 12, 24, 48, 96, 192) if count <= most]
    for name, estimate in ESTIMATORS.items():
        errors = [
            [abs(estimate(operator, n) / trace - 1).item() for _ in range(repeats)] for n in counts
        ]
        axes.loglog(counts, torch.tensor(errors).median(1).values, marker="o", label=name)
    axes.set(xlabel="products with a vector", ylabel="relative error (median)")
    axes.set(title="Estimates of KFAC's trace")
    axes.legend()


def main() -> None:
    """Train, print what is known exactly, and draw what is estimated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a rough picture, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/curvature_spectrum"))
    options = parser.parse_args()
    epochs, examples, vectors = (2, 64, 16) if options.quick else (15, 512, 96)

    torch.manual_seed(0)
    images, model, loss_fn = load_images("digits"), small_cnn(8, 2), nn.CrossEntropyLoss()
    train(model, loss_fn, images.x_train, images.y_train, epochs)
    model.double()  # Lanczos' method and XTrace lose digits
    data = [(images.x_train[:examples].double(), images.y_train[:examples])]

    kfac = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2")
    ekfac = kfac_tn.compute_ekfac(model, loss_fn, data, fisher="type-2")
    ggn_diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, data)
    operators = {
        "GGN": curvlinops.GGNLinearOperator(model, loss_fn, list(model.parameters()), data),
        "KFAC": as_linear_operator(kfac),
        "EKFAC": as_linear_operator(ekfac),
    }
    traces = {
        "GGN": sum(entry.sum() for entry in ggn_diagonal.values()),
        "KFAC": kfac.trace(),
        "EKFAC": ekfac.trace(),
    }
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {examples} examples")
    print(f"{'':5}  {'trace':>9}")
    for name, trace in traces.items():
        print(f"{name:5}  {trace:9.3f}")  # EKFAC's is the GGN's (George et al. 2018)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    plot_spectra(left, operators, vectors)
    repeats = 3 if options.quick else 15
    plot_estimates(right, operators["KFAC"], kfac.trace(), 24 if options.quick else 192, repeats)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "spectrum.png"
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
