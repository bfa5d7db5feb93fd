"""Exact oracles, for anybody's KFAC: settings in which it equals the GGN, and the GGN by autograd.

Nothing here uses the package's own layers, likelihoods or factors, so that it can judge them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module


def trainable(model: Module) -> dict[str, Tensor]:
    """The trainable parameters by name, in the order of flat vectors."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def dense_ggn(model: Module, loss_fn: Module, x: Tensor, y: Tensor) -> Tensor:
    """The generalized Gauss-Newton matrix J^T H J by autograd.

    J is the Jacobian of all outputs, H the loss Hessian with respect to all of them (Schraudolph
    2002). Both are formed as they are; for small models.

    Args:
        model: The model.
        loss_fn: A loss module with a scalar result.
        x: Inputs ``[N, ...]``.
        y: Targets.

    Returns:
        ``[P, P]``, parameters in the order of ``trainable(model)``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> dense_ggn(model, torch.nn.MSELoss(), x, torch.zeros(2, 1))
        tensor([[10.]])
    """
    outputs = model(x)
    jacobian = _jacobian(outputs, list(trainable(model).values()))
    hessian = torch.autograd.functional.hessian(
        lambda flat: loss_fn(flat.view_as(outputs), y),
        outputs.detach().reshape(-1),
        vectorize=True,
    )
    return jacobian.T @ hessian @ jacobian


def empirical_fisher(model: Module, loss_fn: Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean over examples of the outer product of the loss's gradient, one example at a time.

    Args:
        model: The model.
        loss_fn: A loss module with ``reduction="mean"``.
        x: Inputs ``[N, ...]``.
        y: Targets ``[N, ...]``.

    Returns:
        ``[P, P]``, parameters in the order of ``trainable(model)``.
    """
    parameters = list(trainable(model).values())
    rows = []
    for x_n, y_n in zip(x.split(1), y.split(1), strict=True):
        gradients = torch.autograd.grad(loss_fn(model(x_n), y_n), parameters)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    stacked = torch.stack(rows)
    return stacked.T @ stacked / len(rows)


def diagonal_block(matrix: Tensor, model: Module, names: tuple[str, ...]) -> Tensor:
    """The rows and columns of some parameters, in the order of ``names``.

    Args:
        matrix: ``[P, P]``, parameters in the order of ``trainable(model)``.
        model: The model.
        names: Names of parameters.
    """
    offset, places = 0, {}
    for name, parameter in trainable(model).items():
        places[name] = torch.arange(offset, offset + parameter.numel())
        offset += parameter.numel()
    index = torch.cat([places[name] for name in names]).to(matrix.device)
    return matrix[index][:, index]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    return float((actual - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Setting:
    """A model, a loss and data for which an approximation is the exact GGN.

    Attributes:
        name: What it is.
        model: In float64.
        loss_fn: The loss module.
        x: Inputs.
        y: Targets.
        approximation: The one that is exact.
        exact: Groups of parameters whose joint diagonal block is exact.
    """

    name: str
    model: Module
    loss_fn: Module
    x: Tensor
    y: Tensor
    approximation: Literal["expand", "reduce"]
    exact: tuple[tuple[str, ...], ...]


def exact_settings(seed: int = 0) -> Iterator[Setting]:
    """Settings in which KFAC is exact (Eschenhagen et al. 2023, Section 3).

    Single convolutions of every kind (1-d to 3-d, grouped, strided, dilated, transposed, every
    padding), whose output is the prediction (expand) or is averaged (reduce); deep linear networks
    applied at every position (expand, in every layer), also to what an embedding gives; deep
    circular linear CNNs that are averaged (reduce, in every layer), and an embedding that is; one
    step of a recurrent layer, with one example or where all is linear. Joint blocks of weight and
    bias.

    Args:
        seed: Of parameters and data; the global random state is left as it was.

    Example:
        >>> len(list(exact_settings())) > 30
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield from _single_convolutions()
        yield from _pointwise_networks()
        yield from _circular_networks()
        yield from _embeddings()
        yield from _recurrent_steps()


_CONVOLUTIONS: tuple[tuple[int, dict], ...] = (
    (1, {"kernel_size": 3}),
    (1, {"kernel_size": 4, "padding": "same", "dilation": 3}),
    (2, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    (2, {"kernel_size": 2, "padding": "same"}),
    (2, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2), "groups": 2}),
    (2, {"kernel_size": 3, "padding": "valid", "groups": 2, "bias": False}),
    (2, {"kernel_size": 3, "padding": 1, "groups": 4}),
    (2, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    (2, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2}),
    (2, {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "dilation": 2}),
    (2, {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular", "groups": 2}),
    (2, {"kernel_size": 1, "stride": 2}),
    (3, {"kernel_size": 2, "padding": 1, "stride": (1, 2, 1), "groups": 2}),
    (3, {"kernel_size": (2, 1, 3), "padding": "same"}),
)
_TRANSPOSED: tuple[tuple[int, dict], ...] = (
    (1, {"kernel_size": 3, "stride": 2, "output_padding": 1}),
    (2, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": (2, 3), "stride": (2, 1), "dilation": (1, 2), "groups": 2}),
    (2, {"kernel_size": 2, "stride": 2, "groups": 4, "bias": False}),
    (2, {"kernel_size": 2, "stride": 3, "padding": (1, 0), "output_padding": (0, 2)}),
    (2, {"kernel_size": 2, "dilation": 3, "output_padding": 2}),
    (3, {"kernel_size": 2, "stride": (1, 2, 1), "padding": (0, 1, 1), "groups": 2}),
)
_SIZES = {1: (9,), 2: (6, 7), 3: (3, 4, 4)}
_TRANSPOSED_SIZES = {1: (4,), 2: (3, 2), 3: (2, 3, 2)}


class _Pool(Module):
    """The mean over all spatial axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class _Mean(Module):
    """The mean over all axes but first and last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


def _single_convolutions() -> Iterator[Setting]:
    kinds: dict[int, type[Module]]
    kinds = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
    for dimension, options in _CONVOLUTIONS:
        yield from _single_layer(kinds[dimension], options, _SIZES[dimension])
    kinds = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}
    for dimension, options in _TRANSPOSED:
        yield from _single_layer(kinds[dimension], options, _TRANSPOSED_SIZES[dimension])


def _single_layer(
    kind: type[Module], options: dict[str, Any], size: tuple[int, ...]
) -> Iterator[Setting]:
    names = ("0.weight", "0.bias") if options.get("bias", True) else ("0.weight",)
    text = ", ".join(f"{key}={value}" for key, value in options.items())
    for reduction in ("mean", "sum"):
        x = torch.rand(3, 4, *size, dtype=torch.float64)
        model = torch.nn.Sequential(kind(4, 4, **options, dtype=torch.float64))
        mse = torch.nn.MSELoss(reduction=reduction)
        title = f"{kind.__name__}({text}), {reduction}"
        yield Setting(title, model, mse, x, torch.rand_like(model(x)), "expand", (names,))
        pooled = torch.nn.Sequential(kind(4, 4, **options, dtype=torch.float64), _Pool())
        y = torch.rand(3, 4, dtype=torch.float64)
        yield Setting(f"pooled {title}", pooled, mse, x, y, "reduce", (names,))


def _pointwise_networks() -> Iterator[Setting]:
    for reduction in ("mean", "sum"):
        convolutions = torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 1), torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.Conv2d(4, 3, 1)
        ).double()
        x = torch.rand(3, 2, 3, 2, dtype=torch.float64)
        y = torch.rand(3, 3, 3, 2, dtype=torch.float64)
        mse = torch.nn.MSELoss(reduction=reduction)
        blocks: tuple[tuple[str, ...], ...]
        blocks = (("0.weight", "0.bias"), ("1.weight",), ("2.weight", "2.bias"))
        yield Setting(f"1x1 network, {reduction}", convolutions, mse, x, y, "expand", blocks)
        linears = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 3)).double()
        x = torch.rand(3, 5, 2, dtype=torch.float64)
        y = torch.rand(3, 5, 3, dtype=torch.float64)
        blocks = (("0.weight", "0.bias"), ("1.weight", "1.bias"))
        yield Setting(f"shared linear network, {reduction}", linears, mse, x, y, "expand", blocks)


def _circular_networks() -> Iterator[Setting]:
    for dimension in (1, 2):
        kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[dimension]
        for reduction in ("mean", "sum"):
            circular: Any = {"padding": "same", "padding_mode": "circular", "dtype": torch.float64}
            model = torch.nn.Sequential(
                kind(2, 4, 3, **circular),
                kind(4, 4, 2, **circular),
                kind(4, 3, 3, dilation=2, **circular),
                _Pool(),
            )
            x = torch.rand(3, 2, *_SIZES[dimension], dtype=torch.float64)
            y = torch.rand(3, 3, dtype=torch.float64)
            mse = torch.nn.MSELoss(reduction=reduction)
            names = tuple((f"{layer}.weight", f"{layer}.bias") for layer in range(3))
            title = f"circular {dimension}-d network, {reduction}"
            yield Setting(title, model, mse, x, y, "reduce", names)


def _embeddings() -> Iterator[Setting]:
    for reduction in ("mean", "sum"):
        mse = torch.nn.MSELoss(reduction=reduction)
        for padding_idx in (None, 1):
            options: Any = {"padding_idx": padding_idx, "dtype": torch.float64}
            title = f"padding_idx={padding_idx}, {reduction}"
            x = torch.randint(6, (3, 5))
            model = torch.nn.Sequential(
                torch.nn.Embedding(6, 2, **options), torch.nn.Linear(2, 3, dtype=torch.float64)
            )
            y = torch.rand(3, 5, 3, dtype=torch.float64)
            blocks = (("0.weight",), ("1.weight", "1.bias"))
            yield Setting(f"Embedding and Linear, {title}", model, mse, x, y, "expand", blocks)
            pooled = torch.nn.Sequential(torch.nn.Embedding(6, 2, **options), _Mean())
            y = torch.rand(3, 2, dtype=torch.float64)
            yield Setting(f"pooled Embedding, {title}", pooled, mse, x, y, "reduce", blocks[:1])


class _Sequence(Module):
    """The outputs of a recurrent layer."""

    def __init__(self, layer: Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def _recurrent_steps() -> Iterator[Setting]:
    kinds: dict[str, tuple[type[Module], dict[str, Any]]] = {
        "LSTM": (torch.nn.LSTM, {}),
        "projected LSTM": (torch.nn.LSTM, {"proj_size": 2}),
        "GRU": (torch.nn.GRU, {"bidirectional": True}),
        "RNN": (torch.nn.RNN, {}),
        "linear RNN": (torch.nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    }
    for (title, (kind, options)), reduction in itertools.product(kinds.items(), ("mean", "sum")):
        model = _Sequence(kind(2, 3, **options, dtype=torch.float64))
        linear = "nonlinearity" in options
        x = torch.rand(1, 3 if linear else 1, 2, dtype=torch.float64)  # [T, N, d]
        if linear:
            for parameter in model.parameters():
                torch.nn.init.uniform_(parameter)  # so all that is rectified is positive
        weights = [name for name, _ in model.named_parameters() if "weight" in name]
        names = tuple((w,) if "_hr_" in w else (w, w.replace("weight", "bias")) for w in weights)
        mse, y = torch.nn.MSELoss(reduction=reduction), torch.rand_like(model(x))
        yield Setting(f"step of a {title}, {reduction}", model, mse, x, y, "expand", names)


def _jacobian(outputs: Tensor, parameters: list[Tensor]) -> Tensor:
    """``[outputs, P]``: a backward pass for each row, all at once where torch can do that."""
    unit = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)

    def rows(directions: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
        gradients = torch.autograd.grad(
            outputs,
            parameters,
            directions.view(*lead, *outputs.shape),
            retain_graph=True,
            is_grads_batched=bool(lead),
            allow_unused=True,
        )
        known = (
            p.new_zeros(*lead, *p.shape) if g is None else g
            for p, g in zip(parameters, gradients, strict=True)
        )
        return torch.cat([g.reshape(*lead, -1) for g in known], dim=-1)

    try:
        return rows(unit, (len(unit),))
    except RuntimeError:  # an operation that vmap doesn't know
        return torch.stack([rows(row) for row in unit])
