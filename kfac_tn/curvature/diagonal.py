"""The exact diagonal of the generalised Gauss-Newton matrix, of every trainable parameter."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from kfac_tn.curvature.batches import Forward, call_on_pair, with_progress
from kfac_tn.curvature.calls import Calls
from kfac_tn.curvature.checks import restored
from kfac_tn.curvature.compute import check_finite
from kfac_tn.curvature.contributions import Call, Contributions, sum_of_squares
from kfac_tn.curvature.order import find_mixed
from kfac_tn.functional import common
from kfac_tn.functional.common import cast
from kfac_tn.hooks import alone, uncompiled
from kfac_tn.layers import check_parameters
from kfac_tn.likelihood import Likelihood, likelihood_of

Mode = Literal["exact", "mc"]


def compute_ggn_diagonal(
    model: Module,
    loss_fn: Module | Likelihood,
    loader: Iterable[Any],
    mode: Mode = "exact",
    mc_samples: int = 1,
    max_memory: int | None = None,
    generator: torch.Generator | None = None,
    forward: Forward = call_on_pair,
    progress_bar: bool = False,
) -> dict[str, Tensor]:
    """Diagonal of the generalised Gauss-Newton matrix (= Fisher) of a model's loss over a data set.

    The sum over examples and back-propagated columns of the loss Hessian's root of each parameter's
    squared gradient (Dangel et al. 2020, arXiv 1912.10985). Linear layers (within attention and
    recurrent layers, too), (transposed) convolutions, embeddings and normalizations give it from
    their inputs and output gradients, and so do one's own parameters that are added to or
    multiplied with something of every example, or expanded. For any other parameter, and where the
    examples aren't on the first axis or sequences are packed, each example is differentiated
    alone, which is exact as well but slow: freeze what isn't needed. Weights of recurrent layers
    are treated so, too, where that is faster: of few examples, if the first batch has few. Which
    way is right is verified on the first batch of several examples. The model is used in the mode
    it is in; that must not mix examples.

    Args:
        model: The model; called on each batch. Its outputs are one tensor, examples first.
        loss_fn: The loss, a module (``kfac_tn.likelihood`` lists which) or a likelihood.
        loader: Batches ``(inputs, targets)``, or what ``forward`` takes. The curvature is that of
            the loss on the whole set: a mean loss is averaged over batches by their number of
            terms, a sum loss summed.
        mode: ``"exact"`` (default): one backward pass for each output of an example. ``"mc"``: an
            unbiased estimate from targets drawn from the model, one pass for each sample.
        mc_samples: Samples for ``"mc"``; the error falls with their square root. Default: 1.
        max_memory: Most bytes to hold for squaring gradients of one layer, besides its input,
            output gradients and result: examples and columns come in chunks. The same for gradients
            of one example of parameters that are differentiated so: with more than it allows at
            once, there are further backward passes. Default: 64 MiB, or what a single gradient
            takes if that is more; and four times what the layers' inputs take (128 MiB at least)
            for output gradients that are squared faster with other columns'. Parameters
            differentiated example by example all at once.
        generator: Source of randomness (on the model's device); by default the global one.
        forward: For other batches (dicts, more than two parts) and other ways to call the model: a
            function of model and batch that returns the outputs for the loss, and the targets.
            Default: the model called with the inputs of a pair.
        progress_bar: Whether to show how many batches are done (by tqdm). Default: no.

    Returns:
        By name, for each trainable parameter a tensor of its shape, in float32 at least. Zeros for
        parameters that the loss doesn't depend on.

    Raises:
        ValueError: For unknown options, a ``max_memory`` that is too small, a model without
            trainable parameters, an empty loader, a loss with ``reduction="none"``, batch
            normalization in training mode or other mixing of examples, outputs that have no graph,
            an embedding with ``scale_grad_by_freq``, or results that aren't finite.
        TypeError: For a loss whose likelihood isn't known, a model that returns no tensor, or
            batches that are no pairs and no ``forward`` that says what they are.
        ImportError: For a progress bar without tqdm.
        RuntimeError: If a layer's input is changed in place after its use.

    Example:
        >>> import torch, kfac_tn
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, 1))]
        >>> loss_fn = torch.nn.MSELoss(reduction="sum")
        >>> kfac_tn.compute_ggn_diagonal(model, loss_fn, batches)["weight"].round(decimals=3)
        tensor([[20.,  8.]])
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}: choose one of {get_args(Mode)}.")
    if mc_samples < 1 or mc_samples != int(mc_samples):
        raise ValueError(f"mc_samples is {mc_samples}: it is a whole number, at least 1.")
    if max_memory is not None and (isinstance(max_memory, str) or not 1 <= max_memory < math.inf):
        raise ValueError(f"max_memory is {max_memory}: it must be a positive number of bytes.")
    max_memory = None if max_memory is None else int(max_memory)  # such as 1e9
    likelihood = likelihood_of(loss_fn)
    if likelihood.reduction == "none":
        raise ValueError(
            "The weights of a loss with reduction='none' aren't known here: choose 'mean' or 'sum'."
        )
    check_parameters(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("The model has no trainable parameter.")
    totals: dict[str, Tensor] = {}
    total_weight: Tensor | float = 0.0
    unknown: set[str] = set()
    apart: dict[Module, bool] = {}
    batches, verified = 0, False
    for batch in with_progress(loader, "GGN diagonal", progress_bar):
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            restored(model),
            uncompiled(),
            alone(None),
        ):
            calls = Calls(model, batch, forward, apart)
            if calls.outputs.numel() == 0:
                continue
            blind = False  # to what moves rows by their number alone
            if not verified:
                calls.verify()
                verified = len(calls) > 1  # a single example can't be mistaken for another
                blind = not calls.seen_in_few
            unknown |= calls.unknown
            calls.unknown = unknown
            find_mixed(calls, anyway=blind)
            batches += 1
            outputs, targets = calls.outputs.detach(), calls.targets
            weight: Tensor | float = 1.0
            if likelihood.reduction == "mean":
                weight = likelihood.num_terms(outputs, targets)
            samples = int(mc_samples) if mode == "mc" else None
            columns = _columns(likelihood, outputs, targets, samples, generator, weight)
            _add_batch(totals, calls, columns, max_memory)
            total_weight = total_weight + weight if likelihood.reduction == "mean" else 1.0
    if batches == 0:
        raise ValueError("The loader is empty: at least one batch with examples is needed.")
    for name, total in totals.items():
        total /= total_weight
        check_finite(name, total)
    return {
        name: totals[name] if name in totals else torch.zeros_like(cast(p.detach()))
        for name, p in parameters.items()
    }


def _add(totals: dict[str, Tensor], name: str, squares: Tensor) -> None:
    """Add a new tensor; the first is the total."""
    if name in totals:
        totals[name] += squares
    else:
        totals[name] = cast(squares)


def _columns(
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    samples: int | None,
    generator: torch.Generator | None,
    weight: Tensor | float,
) -> Iterator[Tensor]:
    """Columns of a root of the loss Hessian, with the batch's weight; zeros where that is none.

    (A mean over no terms is NaN.)
    """
    if samples is None:
        columns = likelihood.columns(outputs, targets)
    else:
        scale = 1 / math.sqrt(samples)
        draws = (likelihood.sample(outputs, targets, generator) for _ in range(samples))
        columns = (draw * scale for draw in draws)
    for column in columns:
        factor = torch.as_tensor(weight, device=column.device, dtype=column.dtype)
        yield torch.where(factor > 0, column * factor.sqrt(), 0)


def _add_batch(
    totals: dict[str, Tensor],
    calls: Calls,
    columns: Iterable[Tensor],
    max_memory: int | None,
) -> None:
    columns = iter(columns)
    limit = max(4 * calls.input_bytes, 2 * common.UNFOLD_BYTES) if max_memory is None else 0
    size = max(1, common.UNFOLD_BYTES // calls.outputs.nbytes)
    while chunk := list(islice(columns, size)):
        held = _Held(totals, len(chunk), limit, max_memory)
        for column in chunk:
            calls.backward(column, held.receive)
        held.release()
        _add_one_by_one(totals, calls, chunk, max_memory)


class _Held:
    """Output gradients that are squared faster with those of other columns.

    Args:
        totals: To add squares to, by parameters' names.
        columns: How many there will be.
        limit: Most bytes to hold of all of them.
        max_memory: Most bytes to hold for squares.
    """

    def __init__(
        self, totals: dict[str, Tensor], columns: int, limit: int, max_memory: int | None
    ) -> None:
        self._totals, self._columns, self._left = totals, columns, limit
        self._max_memory = max_memory
        self._held: defaultdict[tuple[str, Call], list[Tensor]] = defaultdict(list)
        self._capacities: dict[tuple[str, Call], int] = {}

    def receive(self, name: str, attribute: str, contributions: Contributions) -> None:
        """Hold what comes, or square it."""
        (call, g), *others = contributions
        # Gradients of several calls add up before they are squared.
        if attribute != "weight" or others or self._capacity(name, call, g) == 1:
            squares = sum_of_squares(attribute, contributions, self._max_memory)
            _add(self._totals, name, squares)
            return
        key = name, call
        self._held[key].append(g)
        if len(self._held[key]) == self._capacities[key]:
            self._release(key)

    def _capacity(self, name: str, call: Call, g: Tensor) -> int:
        """How many columns of a layer are held: at most a quarter of the room, for others' sake."""
        key = name, call
        if key not in self._capacities:
            most = max(1, min(self._columns, self._left // (4 * g.nbytes)))
            most = min(most, call.family.columns_together(call.module, g, most))
            capacity = -(-self._columns // -(-self._columns // most))  # each time about as many
            if capacity > 1:
                self._left -= capacity * g.nbytes
            self._capacities[key] = capacity
        return self._capacities[key]

    def _release(self, key: tuple[str, Call]) -> None:
        (name, call), columns = key, self._held.pop(key)
        squares = call.family.columns_diagonal(call.module, call.x, columns, self._max_memory)
        _add(self._totals, name, squares)

    def release(self) -> None:
        """Square what is held."""
        for key in list(self._held):
            self._release(key)


def _add_one_by_one(
    totals: dict[str, Tensor], calls: Calls, columns: list[Tensor], max_memory: int | None
) -> None:
    """Add squares of the gradients of parameters whose calls tell nothing."""
    parts = list(_parts(calls, max_memory))
    for n in range(len(calls)) if parts else ():
        differentiate = calls.alone(n, sorted(calls.unknown))
        for column in columns:
            for names in parts:
                gradients = differentiate(column[n : n + 1], names)
                while gradients:
                    gradient = cast(gradients.pop())
                    name = names[len(gradients)]
                    if name not in totals:
                        totals[name] = torch.zeros_like(gradient)
                    totals[name].addcmul_(gradient, gradient)


def _parts(calls: Calls, max_memory: int | None) -> Iterator[list[str]]:
    """Names of parameters whose gradients may be held at once, all by default."""
    part: list[str] = []
    held = 0
    for name in sorted(calls.unknown):
        parameter = calls.parameters[name]
        # Contributions of several uses are added up, and others are cast.
        needed = 2 * parameter.numel() * common.accumulation_dtype(parameter).itemsize
        if max_memory is not None and needed > max_memory:
            raise ValueError(
                f"max_memory={max_memory:,} bytes is too little: one example's gradient of "
                f"'{name}' takes {needed:,}"
            )
        if part and max_memory is not None and held + needed > max_memory:
            yield part
            part, held = [], 0
        part.append(name)
        held += needed
    if part:
        yield part
