"""What `training.py` trains: problems of several kinds, each small enough for two cores.

All data are at hand without a download: scikit-learn's embedded sets, drawn curves, a formula, and
the text of the standard library.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import measuring  # noqa: F401  (makes the examples importable)
import torch
import torch.nn.functional as F
from defaults import normalized_classifier, regression
from model_zoo import GPT, RecurrentNetwork
from problems import Images, Problem, autoencoder, classifier, load_images
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

CONTEXT = 64  # characters that the language model sees
MODULES = ("argparse", "ast", "datetime", "doctest", "inspect", "pickletools", "tarfile", "typing")


@dataclass(frozen=True)
class Task:
    """A problem, and how it is trained here.

    Args:
        problem: Model, loss and data; its learning rates aren't used.
        kind: By which the bars differ.
        batch_size: Examples per step.
        large_batch: Examples per step of LBFGS: all, unless a pass over all takes too long.
        share: Of the script's time, relative to the other tasks.
        seconds: Of training per run that the problem deserves on two cores, where time is no limit.
        evaluated: The first so many training examples, whose loss is recorded.
        loss_average: What the loss is a mean over, in singd's words.
    """

    problem: Problem
    kind: str
    batch_size: int
    large_batch: int | None = None
    share: float = 1.0
    seconds: float = 10.0
    evaluated: int = 1024
    loss_average: str = "batch"


def curves(number: int, seed: int = 0) -> Tensor:
    """Images `[number, 1, 28, 28]` in [0, 1] of cubic Bezier curves with random control points."""
    generator = torch.Generator().manual_seed(seed)
    controls = 3 + 22 * torch.rand(number, 4, 2, generator=generator)
    t = torch.linspace(0, 1, 48).unsqueeze(1)
    basis = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
    points = basis @ controls
    # A round pen is a product of one profile for each axis: no loop over points and pixels.
    rows, columns = torch.exp(-2 * (points.unsqueeze(-1) - torch.arange(28)) ** 2).unbind(2)
    return 1 - torch.exp(-(rows.mT @ columns)).unsqueeze(1)


def curves_autoencoder() -> Problem:
    """The main example's autoencoder, wider since there are more pixels."""
    images = curves(5120)
    labels = torch.zeros(len(images), dtype=torch.long)
    split = Images(images[:4096], labels[:4096], images[4096:], labels[4096:])
    return autoencoder(split, "28x28 curves")


def tabular() -> Problem:
    """Extreme sizes and shapes of cell nuclei in a sample, from their means and standard errors.

    The breast cancer data: 20 inputs of all scales (standardized), many of them nearly collinear,
    and 10 targets. As regression of many numbers it has no floor that is reached in seconds:
    chosen among first-order methods for that alone, since as classification the data are separable,
    and the one target of the even smaller diabetes data is soon fitted to float32's last digit.
    """
    table = torch.tensor(load_breast_cancer().data)
    table = ((table - table.mean(0)) / table.std(0)).float()
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    x, y = table[order].split((20, 10), dim=1)

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise((20, 64, 64, 64)):
            layers += [nn.Linear(d_in, d_out), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(64, 10))

    return Problem(
        title="Tabular regression (breast cancer), squared error",
        build=build,
        loss=nn.MSELoss,
        train=(x[114:], y[114:]),
        test=(x[:114], y[:114]),
        metric="test loss",
        measure=F.mse_loss,
        learning_rates={"Adam": (3e-3, 1e-2, 3e-2)},
    )


def language_model(name: str, build: Callable[[int], nn.Module]) -> Problem:
    """A small model of the characters of the standard library's source text.

    Args:
        name: Of the model.
        build: The model, from the size of its vocabulary.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / f"{name}.py").read_text("utf-8") for name in MODULES)
    # Printable ASCII in order, the line's end as 95, all else as 96.
    codes = torch.tensor([95 if c == "\n" else ord(c) - 32 for c in text])
    codes[(codes < 0) | (codes > 95)] = 96
    number = (len(codes) - 1) // CONTEXT
    x = codes[: number * CONTEXT].view(number, CONTEXT)
    y = codes[1 : number * CONTEXT + 1].view(number, CONTEXT)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    test, train = order[:256], order[256:]
    return Problem(
        title=f"{name} on {len(text):,} characters, cross-entropy",
        build=lambda: build(97),
        loss=nn.CrossEntropyLoss,
        train=(x[train], y[train]),
        test=(x[test], y[test]),
        metric="test loss",
        measure=F.cross_entropy,
        learning_rates={},
    )


def _digits() -> Images:
    return load_images("digits")


TASKS: dict[str, Callable[[], Task]] = {
    "digits-autoencoder": lambda: Task(autoencoder(_digits(), "digits"), "autoencoder", 256),
    "curves-autoencoder": lambda: Task(
        curves_autoencoder(), "autoencoder", 256, 1024, share=1.5, seconds=30.0, evaluated=512
    ),
    "regression": lambda: Task(regression(), "regression", 256, seconds=8.0),
    "tabular": lambda: Task(tabular(), "regression", 128, share=0.5, seconds=4.0),
    "cnn": lambda: Task(classifier(_digits(), "digits"), "CNN", 256),
    "cnn-groupnorm": lambda: Task(
        normalized_classifier(_digits()), "CNN", 256, share=1.25, seconds=13.0
    ),
    "language-model": lambda: Task(
        language_model(
            "Character language model",
            lambda size: GPT(vocabulary=size, context=CONTEXT, width=64, depth=2),
        ),
        "language model",
        32,
        128,
        share=2.5,
        seconds=60.0,
        evaluated=128,
        loss_average="batch+sequence",
    ),
    "lstm": lambda: Task(
        language_model("LSTM language model", RecurrentNetwork),
        "language model",
        32,
        128,
        share=1.5,
        seconds=30.0,
        evaluated=128,
        loss_average="batch+sequence",
    ),
}
