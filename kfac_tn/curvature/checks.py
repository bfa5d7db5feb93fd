"""What is asked of tensors and parameters on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Generator, Tensor
from torch.nn import Embedding, EmbeddingBag, Module, Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from kfac_tn.tn.nn import RandomizedConvNd


@contextmanager
def trainable(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Take all of these for trainable, frozen ones too."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class ModelState:
    """What calls of a model change: statistics of batch normalization, features that it keeps.

    That is, buffers, attributes (the mode of each module is one) and the states of ``Generator``
    objects among these; of other objects that are changed themselves, such as lists, no more is
    known.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> state = ModelState(norm)
        >>> _ = norm.eval().running_mean.add_(1)
        >>> state.restore()
        >>> norm.running_mean, norm.training
        (tensor([0., 0.]), True)
    """

    def __init__(self, model: Module) -> None:
        self._attributes = [(module, dict(vars(module))) for module in model.modules()]
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._generators = [
            (value, value.get_state())
            for _, kept in self._attributes
            for value in kept.values()
            if isinstance(value, Generator)
        ]

    def restore(self) -> None:
        """Put it all back."""
        for module, kept in self._attributes:
            for new in vars(module).keys() - kept.keys():
                del vars(module)[new]
            vars(module).update(kept)
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer
            expanded = any(
                s == 0 and n > 1 for n, s in zip(buffer.shape, buffer.stride(), strict=True)
            )
            if not expanded:  # else it can't be changed in place
                # With the value as it was, a graph that saved it may still be differentiated.
                buffer.data.copy_(value)
        for generator, state in self._generators:
            generator.set_state(state)


@contextmanager
def restored(model: Module) -> Iterator[None]:
    """Put back what calls change; see ``ModelState``. And weights that calls normalize in place.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with restored(norm):
        ...     _ = norm(torch.rand(4, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    before = ModelState(model)
    weights = [
        (module.weight.data, module.weight.detach().clone())
        for module in model.modules()
        if isinstance(module, Embedding | EmbeddingBag) and module.max_norm is not None
    ]
    try:
        yield
    finally:
        before.restore()
        for weight, value in weights:
            weight.copy_(value)


def refuse_other_shapes(model: Module, shapes: Mapping[Parameter, torch.Size]) -> None:
    """Refuse parameters, or gradients, that haven't the shape that all averages of them have.

    Raises:
        RuntimeError: Naming the first one.
    """
    for parameter, shape in shapes.items():
        for what, tensor in (("", parameter), (" a gradient of", parameter.grad)):
            if tensor is not None and tensor.shape != shape:
                names = {p: name for name, p in model.named_parameters()}
                raise RuntimeError(
                    f"Parameter '{names.get(parameter)}' has{what} shape {list(tensor.shape)}, but "
                    f"had shape {list(shape)} when KFAC was made, and all averages are of that "
                    "one: put data of that shape back and reset its gradient, or make a new "
                    "optimizer of the model as it is."
                )


def check_graph(outputs: Tensor) -> None:
    """Refuse outputs of which nothing can be differentiated.

    Raises:
        ValueError: Saying what may be the reason.
    """
    if not outputs.requires_grad:
        raise ValueError(
            "The model's outputs have no graph: they were detached, computed under "
            "torch.no_grad() within the model, or depend on no trainable parameter."
        )


def refuse_scaled_gradients(model: Module) -> None:
    """Refuse embeddings whose gradients aren't those of the loss.

    Raises:
        ValueError: Naming the module.
    """
    for name, module in model.named_modules():
        if not isinstance(module, Embedding | EmbeddingBag) or not module.weight.requires_grad:
            continue
        if module.scale_grad_by_freq:
            raise ValueError(
                f"{type(module).__name__} '{name}' has scale_grad_by_freq=True, which divides its "
                "gradient by numbers of a batch: it isn't the loss's, and no example has one of "
                "its own. Set scale_grad_by_freq=False, or freeze its weight to leave it out."
            )


def refuse_if_not_exact(model: Module) -> None:
    """Refuse models whose examples have no (exact) gradients of their own.

    Raises:
        ValueError: Naming the module.
    """
    refuse_batch_statistics(model)
    for name, module in model.named_modules():
        if isinstance(module, RandomizedConvNd) and module.training:
            raise ValueError(
                f"RandomizedConvNd '{name}' has random gradients in training mode, so that exact "
                "ones can't be verified: call model.eval() before."
            )
    refuse_scaled_gradients(model)


def refuse_batch_statistics(model: Module) -> None:
    """Refuse normalization by the batch's own statistics.

    Raises:
        ValueError: Naming the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{type(module).__name__} '{name}' normalizes with the batch's own statistics, so "
                "that no example has a gradient of its own: call model.eval() before (with "
                "track_running_stats=True), or use another normalization."
            )


def refuse_random_gradients(model: Module) -> None:
    """Refuse gradients that are random where layers have theirs: squares have a bias.

    Of inputs that are kept in part, only gradients of weights are.

    Raises:
        ValueError: Naming the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, RandomizedConvNd) and module.training and module.keep_output < 1:
            raise ValueError(
                f"RandomizedConvNd '{name}' has keep_output={module.keep_output}, by which the "
                "gradients of layers before it are random in training mode: call model.eval() "
                "before."
            )


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all elements and sums of their squares are finite: one number crosses to the host.

    What can't be squared would spoil second moments and factors for thousands of steps. Half
    precision is squared in float32.

    Example:
        >>> import torch
        >>> all_finite([torch.ones(2)]), all_finite([torch.tensor([1.0, 1e30])])
        (True, False)
    """
    return math.isfinite(sum_of_norms(tensors))


def sum_of_norms(tensors: list[Tensor]) -> float:
    """Of each tensor; 0 of zeros, and of what is so small that its square is.

    Example:
        >>> import torch
        >>> sum_of_norms([torch.ones(4), torch.tensor([3.0, 4.0])])
        7.0
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    norms = [
        torch.stack(torch._foreach_norm(mine, 2, torch.promote_types(dtype, torch.float32)))
        for (dtype, _), mine in kinds.items()
    ]
    sums = [norm.sum() for norm in norms]
    return float(torch.stack([each.to(sums[0]) for each in sums]).sum())
