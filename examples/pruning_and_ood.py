"""Which weights matter, and which images are strange: from the exact diagonal of the curvature.

Trains a CNN on seven of scikit-learn's ten digits and computes the exact diagonal h of its
generalized Gauss-Newton matrix (GGN). Then

- prunes: removing a weight w costs about h w^2 / 2 (LeCun, Denker & Solla 1989, "optimal brain
  damage"), so the weights with the smallest of these go first; beside it, the smallest |w|;
- tells images of digits that it has never seen (7, 8 and 9), and plain noise, from those that it
  has: by one minus the largest probability, that of the network, and that which takes into account
  how much its outputs vary under the Gaussian posterior of the weights whose precision is h plus a
  prior's (MacKay 1992).

Run from the root of the repository, with the extra `examples`:

    python examples/pruning_and_ood.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from problems import load_images, small_cnn, train
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

import kfac_tn

CLASSES = 7  # of the ten that the network learns
PRIOR_PRECISION = 1.0
Named = dict[str, Tensor]  # by parameter name


def saliencies(model: nn.Module, diagonal: Named) -> dict[str, Named]:
    """What is removed first, by criterion: the entries with the smallest numbers."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    return {
        "curvature, h w$^2$ / 2": {n: diagonal[n] * w.square() / 2 for n, w in weights.items()},
        "magnitude, |w|": {name: w.abs() for name, w in weights.items()},
        "at random": {name: torch.rand_like(w) for name, w in weights.items()},
    }


@torch.no_grad()
def prune(model: nn.Module, saliency: Named, share: float) -> Named:
    """The weights without a share of them, the least salient ones of all layers."""
    values = torch.cat([entry.flatten() for entry in saliency.values()])
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[values.argsort()[: round(share * len(values))]] = False
    masks = kept.split([entry.numel() for entry in saliency.values()])
    state = {name: p.clone() for name, p in model.named_parameters()}
    for (name, entry), mask in zip(saliency.items(), masks, strict=True):
        state[name] *= mask.view_as(entry)
    return state


@torch.no_grad()
def accuracy(model: nn.Module, state: Named, x: Tensor, y: Tensor) -> float:
    """With these weights."""
    outputs = torch.func.functional_call(model, state, x)
    return float((outputs.argmax(1) == y).float().mean())


def output_variance(model: nn.Module, precision: Named, x: Tensor) -> Tensor:
    """Variance of each output under N(weights, 1 / precision), by linearization: `[N, CLASSES]`.

    The sum of J^2 / precision over the weights, with each example's own gradients J.
    """
    variances = []
    for c in range(CLASSES):
        gradients = kfac_tn.compute_per_example_gradients(
            model, lambda outputs, c: outputs[:, c].sum(), x, c
        )
        parts = [(g.square() / precision[n]).flatten(1).sum(1) for n, g in gradients.items()]
        variances.append(sum(parts))
    return torch.stack(variances, dim=1)


@torch.no_grad()
def doubt(model: nn.Module, x: Tensor, variance: Tensor | float = 0.0) -> Tensor:
    """One minus the largest probability, of logits with this variance: `[N]`."""
    logits = model(x) / (1 + math.pi / 8 * torch.as_tensor(variance)).sqrt()
    return 1 - logits.softmax(1).amax(1)


def draw_pruning(axes: Axes, model: nn.Module, diagonal: Named, x: Tensor, y: Tensor) -> None:
    """Accuracy on the test set while weights are removed, without any training between."""
    shares = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    print(f"{'accuracy without':24} " + " ".join(f"{share:6.0%}" for share in shares[3:]))
    for name, saliency in saliencies(model, diagonal).items():
        curve = [accuracy(model, prune(model, saliency, share), x, y) for share in shares]
        print(f"{name.replace('$', ''):24} " + " ".join(f"{value:6.3f}" for value in curve[3:]))
        axes.plot(shares, curve, marker="o", ms=3, label=name)
    axes.set(xlabel="share of the weights removed", ylabel="test accuracy", ylim=(0, 1.03))
    axes.set(title="Pruning without retraining")
    axes.legend(loc="center")


def draw_detection(
    axes: Axes,
    scores: dict[str, Callable[[Tensor], Tensor]],
    known: Tensor,
    strange: dict[str, Tensor],
) -> None:
    """ROC curves of every score for telling strange images from known ones."""
    print(f"\n{'area under the ROC curve':24} " + " ".join(f"{kind:>13}" for kind in strange))
    for (score, compute), colour in zip(scores.items(), ("tab:blue", "tab:orange"), strict=True):
        areas = []
        for (kind, x), style in zip(strange.items(), ("-", ":"), strict=True):
            values = torch.cat([compute(known), compute(x)])
            labels = torch.arange(len(values)) >= len(known)
            areas.append(roc_auc_score(labels, values))
            false, true, _ = roc_curve(labels, values)
            label = f"{score}, {kind}: {areas[-1]:.3f}"
            axes.plot(false, true, style, c=colour, label=label)
        print(f"{score:24} " + " ".join(f"{area:13.3f}" for area in areas))
    axes.set(xlabel="share of known digits taken for strange", xlim=(-0.005, 0.25))
    axes.set(ylabel="share of strange images found", ylim=(0, 1.03))
    axes.set(title="Telling what was never seen")
    axes.legend(loc="lower right", title="area under the (whole) curve")


def main() -> None:
    """Train, compute the diagonal once, use it twice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="little training, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/pruning_and_ood"))
    options = parser.parse_args()

    torch.manual_seed(0)
    images = load_images("digits")
    learnt, seen = images.y_train < CLASSES, images.y_test < CLASSES
    x, y = images.x_train[learnt], images.y_train[learnt]
    x_test, y_test = images.x_test[seen], images.y_test[seen]
    model, loss_fn = small_cnn(16, 2, CLASSES), nn.CrossEntropyLoss(reduction="sum")
    train(model, nn.CrossEntropyLoss(), x, y, 3 if options.quick else 20)
    # Of a summed loss: the precision that all the examples together give each weight.
    batches = list(zip(x.split(256), y.split(256), strict=True))
    diagonal = kfac_tn.compute_ggn_diagonal(model, loss_fn, batches)
    precision = {name: entry + PRIOR_PRECISION for name, entry in diagonal.items()}
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(x)} examples\n")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    draw_pruning(left, model, diagonal, x_test, y_test)
    scores = {
        "with curvature": lambda x: doubt(model, x, output_variance(model, precision, x)),
        "network alone": lambda x: doubt(model, x),
    }
    unseen = torch.cat([images.x_train[~learnt], images.x_test[~seen]])[: 2 * len(x_test)]
    strange = {"unseen digits": unseen, "noise": torch.rand_like(x_test)}
    draw_detection(right, scores, x_test, strange)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "pruning_and_ood.png"
    figure.savefig(path, dpi=120)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
