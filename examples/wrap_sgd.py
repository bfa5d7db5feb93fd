"""Keep the optimizer you have, and let KFAC precondition its gradients.

Trains the same small CNN on scikit-learn's digits twice, with plain SGD and with the same SGD
behind a `KFACPreconditioner`: two more lines. Run from the root of the repository:

    python examples/wrap_sgd.py
"""

from __future__ import annotations

import argparse
from time import perf_counter

import torch
from problems import Images, load_images, small_cnn
from torch import nn

import kfac_tn


def train(images: Images, epochs: int, lr: float, precondition: bool) -> list[tuple[float, ...]]:
    """Training loss, test accuracy and seconds of training so far, after each epoch."""
    torch.manual_seed(0)
    model, loss_fn = small_cnn(16, groups=1), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    preconditioner = kfac_tn.KFACPreconditioner(model, loss_fn) if precondition else None

    history: list[tuple[float, ...]] = []
    seconds = 0.0
    for _ in range(epochs):
        start = perf_counter()
        for rows in torch.randperm(len(images.x_train)).split(128):
            sgd.zero_grad()
            loss = loss_fn(model(images.x_train[rows]), images.y_train[rows])
            loss.backward()
            if preconditioner is not None:
                preconditioner.step()
            sgd.step()
        seconds += perf_counter() - start
        with torch.no_grad():
            train_loss = loss_fn(model(images.x_train), images.y_train).item()
            hits = model(images.x_test).argmax(1) == images.y_test
        history.append((train_loss, hits.float().mean().item(), seconds))
    return history


def main() -> None:
    """Train both and print them side by side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 epochs instead of 15")
    # Chosen for the plain run: the best of 0.05, 0.1 and 0.2 there.
    parser.add_argument("--lr", type=float, default=0.1, help="of SGD, in both runs")
    options = parser.parse_args()
    images, epochs = load_images("digits"), 3 if options.quick else 15

    plain = train(images, epochs, options.lr, precondition=False)
    wrapped = train(images, epochs, options.lr, precondition=True)

    column = f"{'train loss':>10}  {'test acc.':>9}  {'seconds':>7}"
    print(f"{'':5}  {'SGD':^30}  |  {'SGD behind KFACPreconditioner':^30}")
    print(f"epoch  {column}  |  {column}")
    for epoch, both in enumerate(zip(plain, wrapped, strict=True), start=1):
        cells = [f"{loss:10.2e}  {accuracy:9.1%}  {time:7.2f}" for loss, accuracy, time in both]
        print(f"{epoch:5}  {cells[0]}  |  {cells[1]}")


if __name__ == "__main__":
    main()
