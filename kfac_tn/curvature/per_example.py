"""Each example's own gradient, of every trainable parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from kfac_tn.curvature.batches import Forward, call_on_pair
from kfac_tn.curvature.calls import Calls
from kfac_tn.curvature.checks import restored
from kfac_tn.curvature.contributions import Contributions, per_example
from kfac_tn.curvature.order import Order
from kfac_tn.functional.common import cast
from kfac_tn.hooks import alone, uncompiled
from kfac_tn.layers import check_parameters
from kfac_tn.row_order import may_move_rows


def compute_per_example_gradients(
    model: Module,
    loss_fn: Module | Callable[[Tensor, Any], Tensor],
    x: Any,
    y: Any,
    forward: Forward = call_on_pair,
) -> dict[str, Tensor]:
    """Gradients of a loss, split into what each example of a batch contributes.

    One forward and one backward pass for all layers of known kinds (linear layers, within attention
    and recurrent layers, too, (transposed) convolutions, embeddings, normalizations) and for one's
    own parameters that are added to or multiplied with something of every example, or expanded; a
    further one for each example, alone, for parameters that are used otherwise, for those of packed
    sequences, and of recurrent layers where few examples make that faster. Another backward pass or
    two verify which way is right. The model is used in the mode it is in; that must not mix
    examples. Neither ``.grad`` nor buffers are changed.

    Args:
        model: The model; returns one tensor with the ``N`` examples first.
        loss_fn: The loss as it is used, reduction included: any function of outputs and targets
            with a scalar result, a module or not.
        x: The batch to call the model with.
        y: Targets, passed on to ``loss_fn``.
        forward: Function of the model and the pair (x, y) that returns outputs and targets, for
            models whose outputs are in a dict or that take several arguments. Default: the model
            called with ``x``.

    Returns:
        By name, for each trainable parameter ``[N, *shape]``, in float32 at least. Example n's row
        is the gradient of the loss on account of ``model(x)[n]``: rows sum to the loss's gradient.
        So under a mean loss they carry its ``1 / N``, and under a sum loss they don't.

    Raises:
        ValueError: For a loss that isn't a scalar, a model without trainable parameters, batch
            normalization in training mode or other mixing of examples, outputs that have no graph,
            or an embedding with ``scale_grad_by_freq``.
        TypeError: For a model that is no module, or returns no tensor.
        RuntimeError: If a layer's input is changed in place after its use.

    Example:
        >>> import torch, kfac_tn
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0], [1.0]])
        >>> loss_fn = lambda outputs, y: (outputs * y).sum()
        >>> kfac_tn.compute_per_example_gradients(model, loss_fn, x, y)
        {'weight': tensor([[[1., 2.]],
        <BLANKLINE>
                [[3., 0.]]])}
    """
    check_parameters(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("The model has no trainable parameter.")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        restored(model),
        uncompiled(),
        alone(None),
    ):
        calls = Calls(model, (x, y), forward)
        if calls.outputs.numel() == 0:
            return {name: _zeros(p, len(calls)) for name, p in calls.parameters.items()}
        predictions = calls.outputs.detach().requires_grad_()
        # Hooks on the module (an optimizer's, say) are for the user's own calls.
        loss = (loss_fn.forward if isinstance(loss_fn, Module) else loss_fn)(
            predictions, calls.targets
        )
        if loss.numel() != 1:
            raise ValueError(
                f"The loss must be a scalar, but has shape {tuple(loss.shape)}: use reduction "
                "'mean' or 'sum'."
            )
        (column,) = torch.autograd.grad(loss.sum(), predictions)
        calls.verify()
        order = Order(calls, column, not calls.seen_in_few or may_move_rows(calls.outputs))
        gradients: dict[str, Tensor] = {}

        def receive(name: str, attribute: str, contributions: Contributions) -> None:
            if order.holds(contributions):
                gradients[name] = per_example(attribute, contributions)
            else:
                calls.unknown.add(name)

        calls.backward(column, receive)
        if calls.unknown:
            names = sorted(calls.unknown)
            rows = [calls.alone(n, names)(column[n : n + 1], names) for n in range(len(calls))]
            for name, parts in zip(names, zip(*rows, strict=True), strict=True):
                gradients[name] = cast(torch.stack(parts))
        return {
            name: gradients[name] if name in gradients else _zeros(parameter, len(calls))
            for name, parameter in calls.parameters.items()
        }


def _zeros(parameter: Tensor, count: int) -> Tensor:
    return cast(parameter.detach()).new_zeros((count, *parameter.shape))
