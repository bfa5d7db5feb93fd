"""What the examples train: small image data sets, classifiers and an autoencoder on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfac_tn

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DATASETS = ("digits", *TORCHVISION)


@dataclass(frozen=True)
class Images:
    """Images `[N, channels, height, width]` in [0, 1] with labels, for training and testing."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_images(name: str, root: Path = Path("outputs/data")) -> Images:
    """Load one of `DATASETS`.

    Args:
        name: "digits" comes with scikit-learn, the others are downloaded by torchvision.
        root: Where torchvision keeps its downloads.

    Raises:
        ValueError: If there is no data set of that name.
        ImportError: If the data set needs torchvision, and torchvision is missing or broken.
    """
    if name == "digits":
        return _load_digits()
    if name in TORCHVISION:
        return _load_torchvision(name, root)
    raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")


def _load_digits() -> Images:
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    # The split has a seed of its own: another seed for training is not another test set.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return Images(x[train], y[train], x[test], y[test])


def _load_torchvision(name: str, root: Path) -> Images:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        # RuntimeError is what a torchvision built for another version of torch raises.
        raise ImportError(
            f"the data set {name!r} is loaded through torchvision, which can't be imported "
            f"({error}); install the one made for your torch: pip install --upgrade torchvision"
        ) from error
    source = getattr(datasets, TORCHVISION[name])
    splits = []
    for train in (True, False):
        split = source(root, train=train, download=True)
        x = torch.as_tensor(split.data).float() / 255
        x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        splits += [x, torch.as_tensor(split.targets)]
    return Images(*splits)


@dataclass(frozen=True)
class Problem:
    """A model, a loss and data.

    `metric` is the name of what `measure(outputs, targets)` averages over the test set, and
    `learning_rates` the grid of every optimizer that needs one.
    """

    title: str
    build: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    metric: str
    measure: Callable[[Tensor, Tensor], Tensor]
    learning_rates: dict[str, Sequence[float]]


def classifier(images: Images, dataset: str) -> Problem:
    """Four convolutions and a linear layer; the pooling fits every image size to that layer."""
    channels = images.x_train.shape[1]

    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(channels, 24, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(24, 48, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(48, 48, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(48, 96, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 96, 10)),
        )

    return Problem(
        title=f"CNN classifier on {dataset}, cross-entropy",
        build=build,
        loss=nn.CrossEntropyLoss,
        train=(images.x_train, images.y_train),
        test=(images.x_test, images.y_test),
        metric="test accuracy",
        measure=lambda outputs, targets: (outputs.argmax(1) == targets).float().mean(),
        learning_rates={"SGD": (0.05, 0.1, 0.2), "Adam": (3e-3, 1e-2, 3e-2)},
    )


def autoencoder(images: Images, dataset: str) -> Problem:
    """A deep and narrow tanh network: the classical hard case for first-order methods."""
    x_train, x_test = images.x_train.flatten(1), images.x_test.flatten(1)
    pixels = x_train.shape[1]
    encoder = [pixels, *((256, 128, 64, 30) if pixels <= 64 else (512, 256, 128, 30))]
    widths = encoder + encoder[-2::-1]

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return Problem(
        title=f"Deep autoencoder on {dataset}, squared error",
        build=build,
        loss=nn.MSELoss,
        train=(x_train, x_train),
        test=(x_test, x_test),
        metric="test loss",
        measure=F.mse_loss,
        learning_rates={"SGD": (1.0, 2.0, 3.0), "Adam": (1e-3, 2e-3, 4e-3)},
    )


PROBLEMS = {"classifier": classifier, "autoencoder": autoencoder}


def small_cnn(
    width: int, groups: int, classes: int = 10, activation: type[nn.Module] = nn.ReLU
) -> nn.Module:
    """A classifier of 8x8 images, with a grouped convolution of `2 * width` channels."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), activation()),
        *(nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, groups=groups), activation()),
        *(nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2), activation()),
        *(nn.Flatten(), nn.Linear(4 * 2 * width, classes)),
    )


def train(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Some epochs of KFAC on its defaults."""
    optimizer = kfac_tn.KFAC(model, loss_fn)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            loss_fn(model(x[rows]), y[rows]).backward()
            optimizer.step()
    optimizer.close()
