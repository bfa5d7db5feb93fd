"""What a network doesn't know: Laplace approximations with kfac_tn's curvature.

Trains a network as always (the maximum a posteriori estimate, MAP), takes its KFAC for the
precision of a Gaussian posterior over all weights (laplace-torch does the rest), chooses the
prior's precision by the marginal likelihood, without validation data, and looks at the difference:
on two moons, where the network should be sure and where not; on scikit-learn's digits, whether of
all images that it is 80 % sure of it gets 80 % right. Where the labels are clean, the network is
calibrated as it is, and its posterior not sure enough; where a part of them is wrong, the network
has learnt these by heart, and the posterior knows better. The CNN has a grouped convolution, with
factors for each group. Run from the root of the repository, with the extras `examples` and
`laplace`:

    python examples/laplace_uncertainty.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from laplace import Laplace
from matplotlib.axes import Axes
from problems import load_images, small_cnn
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_tn.integrations.laplace import KFACTNBackend

BINS = 10
WEIGHT_DECAY = 1e-4


def moons_model() -> nn.Module:
    """An MLP on points of the plane."""
    return nn.Sequential(
        *(nn.Linear(2, 30), nn.Tanh()), *(nn.Linear(30, 30), nn.Tanh()), nn.Linear(30, 2)
    )


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """The MAP estimate, by Adam."""
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,))
        optimizer.zero_grad()
        loss_fn(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()


def posterior(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """The Laplace approximation over all weights, with the likeliest prior."""
    la = Laplace(model, "classification", "all", "kron", backend=KFACTNBackend)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=256))
    la.optimize_prior_precision(method="marglik", link_approx="probit")
    return la


def predict(model: Any, x: Tensor) -> Tensor:
    """Probabilities of the classes, of a network or of its posterior's predictive distribution."""
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return model(x).softmax(-1)
    return torch.cat([model(part, link_approx="probit") for part in x.split(256)])


def expected_calibration_error(probabilities: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """The mean distance of confidence and accuracy, over bins of confidence.

    Args:
        probabilities: `[N, classes]`.
        y: Labels `[N]`.

    Returns:
        The error (Guo et al. 2017, Eq. 5), and for each bin its share of the examples, their mean
        confidence and their accuracy, `[bins, 3]`; NaN in bins without examples.
    """
    confidence, label = probabilities.max(-1)
    right = (label == y).to(confidence)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    rows = []
    for index in range(BINS):
        inside = bins == index
        rows.append([inside.float().mean(), confidence[inside].mean(), right[inside].mean()])
    table = torch.tensor(rows)
    share, mean_confidence, accuracy = table.unbind(1)
    return float((share * (mean_confidence - accuracy).abs()).nansum()), table


def draw_plane(axes: Axes, model: Any, x: Tensor, y: Tensor, title: str, cells: int) -> Any:
    """How sure a model is of its answer in the plane, and the data."""
    line = torch.linspace(-1, 1, cells)
    ys, xs = torch.meshgrid(3 * line + 0.25, 4 * line + 0.5, indexing="ij")
    probabilities = predict(model, torch.stack([xs.flatten(), ys.flatten()], 1))
    surface = probabilities.max(-1).values.view_as(xs)
    levels = [0.5 + step / 40 for step in range(21)]
    filled = axes.contourf(xs, ys, surface, levels=levels, cmap="cividis")
    boundary = probabilities[:, 1].view_as(xs)
    axes.contour(xs, ys, boundary, levels=[0.5], colors="white", linewidths=1.5)
    for label, colour in enumerate(("tab:cyan", "tab:red")):
        points = x[y == label].T
        axes.scatter(*points, s=9, c=colour, edgecolors="black", linewidths=0.3)
    axes.set(title=title, xticks=[], yticks=[], aspect="equal")
    return filled


def draw_reliability(axes: Axes, table: Tensor, title: str) -> None:
    """Accuracy against confidence; the bars' colour says how many examples they are about."""
    share, confidence, accuracy = table.unbind(1)
    filled = share > 0
    place = (torch.arange(BINS)[filled] + 0.5) / BINS
    colours = plt.get_cmap("Blues")(0.25 + 0.75 * share[filled].sqrt().numpy())
    axes.bar(place, accuracy[filled], width=0.9 / BINS, color=colours, edgecolor="navy", lw=0.5)
    axes.plot(confidence[filled], accuracy[filled], "o", c="tab:red", ms=4, label="mean of the bin")
    axes.plot([0, 1], [0, 1], "--", c="grey", lw=1, label="calibrated")
    axes.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")


def two_moons(output: Path, quick: bool) -> Path:
    """Confidence near the data and far from it."""
    x, y = (torch.as_tensor(part) for part in make_moons(200, noise=0.15, random_state=0))
    x = x.float()
    model = moons_model()
    train(model, x, y, 300 if quick else 1500)
    models = {"MAP": model, "Laplace": posterior(model, x, y)}
    angles = torch.arange(0, 2 * torch.pi, torch.pi / 50)
    far = 20 * torch.stack([angles.cos(), angles.sin()], 1)
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    print("two moons: mean confidence")
    print(f"{'':8} {'at the data':>12} {'20 away':>8}")
    for axes, (name, each) in zip(panels, models.items(), strict=True):
        near, away = (predict(each, points).max(-1).values.mean() for points in (x, far))
        print(f"{name:8} {near:12.3f} {away:8.3f}")
        filled = draw_plane(axes, each, x, y, name, 30 if quick else 120)
    figure.colorbar(filled, ax=panels, label="confidence", ticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    return save(figure, output / "two_moons.png")


def replace_labels(y: Tensor, share: float) -> Tensor:
    """Labels, some of which are drawn anew at random."""
    return torch.where(torch.rand(len(y)) < share, torch.randint(10, y.shape), y)


def digits(output: Path, quick: bool) -> Path:
    """Calibration, with labels as they are and with wrong ones among those to learn and to tell."""
    images, few = load_images("digits"), 300 if quick else 1000
    x, x_test = images.x_train[:few], torch.cat([images.x_train[few:], images.x_test])
    figure, panels = plt.subplots(2, 2, figsize=(8.5, 8.5), layout="constrained")
    print(f"\ndigits: {few} images to train on, {len(x_test)} to test")
    print(f"{'labels':12} {'':8} {'accuracy':>8} {'NLL':>8} {'ECE':>8}")
    for row, (labels, share) in zip(
        panels, {"clean": 0.0, "30 % random": 0.3}.items(), strict=True
    ):
        y = replace_labels(images.y_train[:few], share)
        y_test = replace_labels(torch.cat([images.y_train[few:], images.y_test]), share)
        model = small_cnn(8, groups=4, activation=nn.Tanh)
        train(model, x, y, 300 if quick else 2000)
        la = posterior(model, x, y)
        for axes, (name, each) in zip(row, {"MAP": model, "Laplace": la}.items(), strict=True):
            probabilities = predict(each, x_test)
            accuracy = (probabilities.argmax(-1) == y_test).float().mean()
            nll = nn.functional.nll_loss(probabilities.log(), y_test)
            error, table = expected_calibration_error(probabilities, y_test)
            print(f"{labels:12} {name:8} {accuracy:8.3f} {nll:8.3f} {error:8.3f}")
            title = f"{name}, {labels} labels\nNLL {nll:.2f}, calibration error {error:.3f}"
            draw_reliability(axes, table, title)
    panels[1, 0].legend(loc="upper left", frameon=False)
    return save(figure, output / "calibration.png")


def save(figure: Any, path: Path) -> Path:
    """Write a figure to a file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Both data sets, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="rough pictures, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/laplace_uncertainty"))
    options = parser.parse_args()
    torch.manual_seed(0)
    for show in (two_moons, digits):
        print(f"wrote {show(options.output, options.quick)}")


if __name__ == "__main__":
    main()
