"""What an optimizer can tell about its curvature and its steps, when asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from kfac_tn.curvature.estimator import CurvatureEstimator

if TYPE_CHECKING:
    from kfac_tn.optim.base import CurvatureUser
    from kfac_tn.optim.kfac import KFAC


@dataclass(frozen=True)
class LayerDiagnostics:
    """One layer's numbers; the worst of its groups where there are several.

    Attributes:
        condition: Largest over smallest eigenvalue of the damped block.
        input_condition: The same of A with its share of the damping; None for EKFAC and diagonals,
            whose eigenvalues are no products, as the next.
        grad_output_condition: The same of B.
        damping_share: Part of the trace of the damped block that is damping: near 1 the direction
            is the gradient's, near 0 the factors decide.
        kl: s^T (B (x) A) s / 2 of the last step s: what it changed in the model's distribution, in
            units of the loss. None for the preconditioner, which takes no steps, and for steps of
            a gradient that is gone by now (``zero_grad``), as the next two.
        update_norm: Norm of the last step, weight and bias together, without weight decay.
        relative_update_norm: The same over the norm of the parameters.
        statistics_age: Steps taken since the last statistics of this layer (0: in the last step).
        inverses_age: Steps taken since its inverses were renewed.
        memory: Bytes of its averages, inverses and eigenvectors.
    """

    condition: float
    input_condition: float | None
    grad_output_condition: float | None
    damping_share: float
    kl: float | None
    update_norm: float | None
    relative_update_norm: float | None
    statistics_age: int
    inverses_age: int
    memory: int


@dataclass(frozen=True)
class Diagnostics:
    """A snapshot of an optimizer; prints as a table.

    Attributes:
        steps: Steps taken.
        intervals: Steps between statistics and between inversions, as they are now.
        layers: By name, for layers that have curvature.
        seconds: Since the optimizer was made, by phase: ``"statistics"`` (in the hooks),
            ``"averages and inverses"`` (with the large factors that are only computed then),
            ``"products"``. On a GPU this is the time to launch.
        memory: Bytes of all averages, inverses and eigenvectors.
    """

    steps: int
    intervals: tuple[int, int]
    layers: dict[str, LayerDiagnostics]
    seconds: dict[str, float]
    memory: int

    def scalars(self) -> dict[str, float]:
        """All numbers by tag, such as ``"0.weight/kl"``, for a logger."""
        result: dict[str, float] = {"memory": self.memory}
        result |= {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        for name, layer in self.layers.items():
            result |= {f"{name}/{k}": v for k, v in asdict(layer).items() if v is not None}
        return result

    def __str__(self) -> str:
        names = [field.name for field in fields(LayerDiagnostics)]
        rows = [["layer", *names]]
        for layer, numbers in self.layers.items():
            rows.append([layer, *(_short(value) for value in asdict(numbers).values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        seconds = ", ".join(f"{phase} {value:.3g} s" for phase, value in self.seconds.items())
        return f"{table}\n{self.steps} steps, {self.memory} bytes; {seconds}"


def diagnose(
    estimator: CurvatureEstimator, steps: Mapping[Parameter, Tensor] | None
) -> Diagnostics:
    """Compute a snapshot: eigenvalues of every factor, so not something for every step.

    Args:
        estimator: The curvature.
        steps: The last step of each parameter, if one was taken here.
    """
    layers: dict[str, LayerDiagnostics] = {}
    forms = estimator.quadratic_forms(steps) if steps else {}
    damped = {block: (both, shifts) for block, both, shifts in estimator.damped_factors()}
    for block, moving in estimator.known():
        input_condition = grad_output_condition = None
        if block.curvature == "kfac":
            (factors, shifts), conditions, shares = damped[block], [], []
            sizes = block.joint_dim, block.grad_output_dim
            both = factors.input, factors.grad_output
            for factor, shift, size in zip(both, shifts, sizes, strict=True):
                values = torch.linalg.eigvalsh(factor.double()).clamp(min=0)
                # Pieces of a group side by side, without the zeros that fill up the last.
                values = values.reshape(block.groups, -1).sort(1).values[:, -size:]
                added = shift.double().view(block.groups, -1)[:, :1]
                conditions.append(_condition(values + added))
                shares.append(1 - (added / (values + added).mean(1, keepdim=True))[:, 0])
            input_condition, grad_output_condition = conditions
            condition, share = math.prod(conditions), float((1 - shares[0] * shares[1]).max())
        else:
            shift = estimator.damping(block).double()[:, None]
            count = block.joint_dim * block.grad_output_dim
            values = moving.eigenvalues(block).double().flatten(1).sort(1).values
            values = values[:, -count:] + shift
            condition, share = _condition(values), float((shift[:, 0] / values.mean(1)).max())
        kl = norm = relative = None
        parameters = list(block.parameters.values())
        if steps and all(p in steps for p in parameters):
            kl = float(forms[block.name]) / 2
            norm = _norm([steps[p] for p in parameters])
            length = _norm(parameters)
            relative = norm / length if length else float("inf")
        statistics, inverses = estimator.ages(block)
        layers[block.name] = LayerDiagnostics(
            condition=condition,
            input_condition=input_condition,
            grad_output_condition=grad_output_condition,
            damping_share=share,
            kl=kl,
            update_norm=norm,
            relative_update_norm=relative,
            statistics_age=statistics,
            inverses_age=inverses,
            memory=moving.memory(block),
        )
    memory = sum(layer.memory for layer in layers.values())
    seconds = dict(estimator.seconds)
    return Diagnostics(estimator.steps, estimator.intervals, layers, seconds, memory)


def log_diagnostics(
    optimizer: KFAC, write: Callable[[str, float, int], Any], every: int = 100
) -> RemovableHandle:
    """Write all numbers now and then, for example to TensorBoard.

    Args:
        optimizer: A ``KFAC`` optimizer.
        write: Called with tag, value and number of steps taken: ``SummaryWriter().add_scalar``, or
            anything like it.
        every: Steps between calls.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        ValueError: If ``every`` isn't a positive whole number.

    Example:
        >>> import torch, kfac_tn
        >>> from kfac_tn.optim.diagnostics import log_diagnostics
        >>> model, loss_fn = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> optimizer = kfac_tn.KFAC(model, loss_fn)
        >>> tags = set()
        >>> handle = log_diagnostics(optimizer, lambda tag, value, step: tags.add(tag), every=1)
        >>> loss_fn(model(torch.ones(1, 3)), torch.zeros(1, dtype=torch.long)).backward()
        >>> optimizer.step()
        >>> "/kl" in tags  # of the layer "", which is the model
        True
    """
    if every < 1 or every != int(every):
        raise ValueError(f"every is {every}: it must be a positive whole number.")

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        if optimizer.steps_taken % every == 0:
            snapshot = optimizer.diagnostics()
            for tag, value in snapshot.scalars().items():
                write(tag, value, snapshot.steps)

    return optimizer.register_step_post_hook(hook)


def plot_spectra(user: CurvatureUser, path: str | None = None) -> Any:
    """Draw the eigenvalues of every layer's factors, and the damping added to them.

    Args:
        user: ``KFAC`` or ``KFACPreconditioner``.
        path: Where to save the picture; by default nowhere.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If no layer has factors (yet); diagonals have none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_spectra needs matplotlib: pip install matplotlib") from error
    found = list(user._estimator.damped_factors())
    if not found:
        raise ValueError("No layer has factors (yet): take a step first.")
    figure = Figure(figsize=(7, 2.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for row, (block, factors, shifts) in zip(axes, found, strict=True):
        pairs = zip(row, (factors.input, factors.grad_output), shifts, ("A", "B"), strict=True)
        for axis, factor, shift, name in pairs:
            for group, damping in zip(factor, shift, strict=True):
                values = torch.linalg.eigvalsh(group.double()).flip(0).cpu()
                (line,) = axis.plot(range(1, len(values) + 1), values, marker=".")
                axis.axhline(float(damping), color=line.get_color(), linestyle=":")
            axis.set(yscale="log", title=f"{block.name}: {name}", xlabel="index")
        row[0].set_ylabel("eigenvalue (dotted: damping)")
    if path is not None:
        figure.savefig(path)
    return figure


def _condition(values: Tensor) -> float:
    """Of the worst of the groups ``[G, K]``."""
    return float((values.amax(1) / values.amin(1)).max())


def _norm(tensors: list[Any]) -> float:
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())


def _short(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.2e}"
