"""How to teach kfac_tn a loss of your own: a Gaussian whose variance the model predicts, too.

The package knows torch's cross-entropy, squared error and binary cross-entropy. Any other loss has
to say what its likelihood is, by four members (``kfac_tn.likelihood.Likelihood``):

``reduction``  ``"mean"`` or ``"sum"`` over the examples;
``columns``    an exact root of the Fisher information of the outputs, for curvature without noise;
``sample``     the gradient of the loss at a target drawn from the model, for cheaper curvature;
``num_terms``  how many terms ``"mean"`` averages: for the empirical Fisher, and to weigh batches.

Here the model predicts a mean ``m`` and a logarithmic variance ``v`` for each example, and the loss
is the negative log-likelihood of the target ``y`` under that Gaussian (up to a constant)::

    loss(m, v, y) = (v + (y - m)^2 exp(-v)) / 2

*Which matrix?* The second derivative with respect to ``v`` is ``(y - m)^2 exp(-v) / 2``: it follows
the residual, and the Hessian as a whole is indefinite as soon as that is larger than expected. The
Fisher information is its average over targets that the model itself would draw,
``y = m + exp(v / 2) e`` with ``e`` standard normal::

    F = diag(exp(-v), 1 / 2)

always positive definite, and independent of the target. Use it whenever the two differ.

*Columns.* Any ``s_1, s_2, ...`` with ``sum_c s_c s_c^T = F``. A diagonal has the obvious ones::

    s_1 = (exp(-v / 2), 0),    s_2 = (0, sqrt(1 / 2))

*Sample.* The gradient at ``y = m + exp(v / 2) e`` is ``(-exp(-v / 2) e, (1 - e^2) / 2)``. Its
average is zero and its second moment ``F``; that is what makes ``F`` the Fisher information.

*Scale.* The matrix has the scale of the loss: a mean over N examples divides F by N, so its columns
are divided by ``sqrt(N)``.

Run it::

    python examples/custom_likelihood.py --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor, nn

import kfac_tn


class HeteroscedasticGaussianLoss(nn.Module):
    """Negative log-likelihood of a Gaussian with predicted mean and log-variance.

    ``outputs`` are ``[N, 2]``, mean and log-variance of each example; ``targets`` are ``[N]``.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the examples.

    Raises:
        ValueError: The reduction is neither, or (when called) the shapes aren't those above.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
        self.reduction = reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss, a scalar."""
        mean, log_variance = self._split(outputs, targets)
        losses = (log_variance + (targets - mean) ** 2 * (-log_variance).exp()) / 2
        return losses.mean() if self.reduction == "mean" else losses.sum()

    # What follows is the likelihood. It is called without gradients in mind: detach.

    def columns(
        self, outputs: Tensor, targets: Tensor, weight: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the two columns of the root of the Fisher information, each ``[N, 2]``."""
        self._refuse(weight)
        _, log_variance = self._split(outputs.detach(), targets)
        root_scale = self._scale(outputs) ** 0.5
        zeros = torch.zeros_like(log_variance)
        yield root_scale * torch.stack([(-log_variance / 2).exp(), zeros], dim=1)
        yield root_scale * torch.stack([zeros, torch.full_like(zeros, 0.5**0.5)], dim=1)

    def sample(
        self,
        outputs: Tensor,
        targets: Tensor,
        generator: Generator | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Draw the gradient of the loss at a target from the model, ``[N, 2]``."""
        self._refuse(weight)
        _, log_variance = self._split(outputs.detach(), targets)
        noise = torch.empty_like(log_variance).normal_(generator=generator)
        score = torch.stack([-(-log_variance / 2).exp() * noise, (1 - noise**2) / 2], dim=1)
        # the root of the scale, not the scale: the product of two samples has to have the loss's
        return self._scale(outputs) ** 0.5 * score

    def num_terms(self, outputs: Tensor, targets: Tensor) -> int:
        """Count the terms of the mean."""
        return outputs.shape[0] if self.reduction == "mean" else 1

    def _scale(self, outputs: Tensor) -> float:
        """What the reduction multiplies each example's loss by."""
        return 1 / outputs.shape[0] if self.reduction == "mean" else 1.0

    @staticmethod
    def _split(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.ndim != 2 or outputs.shape[1] != 2 or targets.shape != outputs.shape[:1]:
            raise ValueError(
                f"outputs must be [N, 2] and targets [N], but are {tuple(outputs.shape)} and "
                f"{tuple(targets.shape)}"
            )
        return outputs[:, 0], outputs[:, 1]

    @staticmethod
    def _refuse(weight: Tensor | None) -> None:
        # Weights come with reduction="none", where the user reduces the losses; this loss has none.
        if weight is not None:
            raise ValueError("this loss is always reduced, and takes no weight")


def make_data(num_examples: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw a sine whose noise grows from left to right: ``x`` ``[N, 1]`` and ``y`` ``[N]``."""
    x = torch.rand(num_examples, 1, generator=generator) * 2 - 1
    noise = torch.randn(num_examples, generator=generator)
    y = torch.sin(4 * x[:, 0]) + (0.02 + 0.2 * (1 + x[:, 0])) * noise
    return x, y


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train a small network, print and return the loss before and after."""
    parser = argparse.ArgumentParser(description="KFAC with a custom likelihood.")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--examples", type=int, default=512, help="training set (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    x, y = make_data(options.examples, Generator().manual_seed(options.seed))
    model = nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    )
    loss_fn = HeteroscedasticGaussianLoss()
    optimizer = kfac_tn.KFAC(model, loss_fn)  # finds the likelihood's members by itself

    with torch.no_grad():
        before = loss_fn(model(x), y).item()
    for _ in range(options.steps):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = loss_fn(model(x), y).item()

    print(f"negative log-likelihood: {before:.4f} before, {after:.4f} after {options.steps} steps")
    return before, after


if __name__ == "__main__":
    main()
