"""Second moments of per-example gradients along a basis: EKFAC's eigenvalues, and diagonals."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_tn.functional import common
from kfac_tn.graph import Found, differentiate
from kfac_tn.layers import LayerBlock, batch_hint
from kfac_tn.statistics import Call


@dataclass(frozen=True)
class Basis:
    """Along which a layer's gradients ``[G, d_out, d_in]`` are squared: Q_B^T G Q_A.

    Attributes:
        input: Q_A, ``[G, d_in, d_in]``, or None for unit vectors; d_in counts the bias.
        grad_output: Q_B, ``[G, d_out, d_out]``, or None.
    """

    input: Tensor | None = None
    grad_output: Tensor | None = None


class MomentCollector:
    """Gradients at the calls of a backward pass, held until a layer has those of all its calls.

    Gradients of several calls add up before they are squared. A layer that is called once has its
    moment at once, and its gradient is not kept.

    Args:
        basis: Of each layer.
        calls: All that the pass may reach.
    """

    def __init__(
        self, basis: Callable[[LayerBlock], Basis | None], calls: Iterable[Call] = ()
    ) -> None:
        self._basis = basis
        self._counts = Counter(call.block for call in calls)
        self._waiting: dict[LayerBlock, list[tuple[Call, Tensor]]] = {}
        self._moments: dict[LayerBlock, Tensor] = {}

    def add(self, call: Call, gradient: Tensor) -> None:
        """Take the gradient at a call's output."""
        if not call.keeps:
            return
        waiting = self._waiting.setdefault(call.block, [])
        waiting.append((call, gradient.reshape(call.output_shape)))
        if len(waiting) == self._counts[call.block]:
            self._complete(call.block)

    def finish(self) -> dict[LayerBlock, Tensor]:
        """The sums over examples ``[G, d_out, d_in]`` of all layers that the pass reached."""
        for block in list(self._waiting):
            self._complete(block)
        return self._moments

    def _complete(self, block: LayerBlock) -> None:
        basis, pairs = self._basis(block), self._waiting.pop(block)
        if basis is not None:
            self._moments[block] = second_moment(basis, pairs)


def second_moment(basis: Basis, pairs: Sequence[tuple[Call, Tensor]]) -> Tensor:
    """Sum over examples of a layer's squared gradients in a basis, ``[G, d_out, d_in]``.

    To its weight, the calls of a layer are further shared positions. Examples come in chunks whose
    rows (and as much again, for their rotations) stay within a limit.

    Args:
        basis: The basis.
        pairs: Calls that keep their input, with the gradients at their outputs.

    Raises:
        RuntimeError: If an input was changed in place.
    """
    block, count = pairs[0][0].block, pairs[0][0].examples
    rows = [(call.kept_input(), gradient) for call, gradient in pairs]
    if any(call.shared for call, _ in pairs):
        count, rows = 1, [(x.reshape(1, -1), g.reshape(1, -1, g.shape[-1])) for x, g in rows]
    joint = block.bias is not None
    d_in, d_out = block.input_dim + joint, block.grad_output_dim
    positions = sum(call.positions for call, _ in pairs)
    written = block.groups * positions * (d_in + d_out)
    if block.family.one_hot:  # whose inputs aren't written, but their gradients may be
        unit = basis.input is None or block.has_diagonal_inputs
        written = positions * d_out + (0 if unit else d_in * d_out)
    itemsize = common.accumulation_dtype(pairs[0][1]).itemsize
    size = max(1, common.UNFOLD_BYTES // (2 * 2 * written * itemsize))  # half is for gradients
    total: Tensor | None = None
    for start in range(0, count, size):
        part = slice(start, start + size) if size < count else ...
        moment = block.family.second_moment(
            pairs[0][0].module,
            [x[part] for x, _ in rows],
            [gradient[part] for _, gradient in rows],
            joint,
            basis.input,
            basis.grad_output,
        )
        total = moment if total is None else total.add_(moment)
    assert total is not None
    return total


def find_shared(
    found: Sequence[Found[Call]], outputs: Tensor, known: dict[tuple[Any, ...], bool]
) -> list[Call]:
    """Find calls on indices that aren't each example's own, as of positions, and mark them.

    Their gradients are sums over examples. Where the columns' signs are random from one example to
    the next, squares of these have no cross terms on average: such a call is one example's.

    Args:
        found: What the outputs depend on.
        outputs: Of the model, whose first axis is that of the examples.
        known: What was found out earlier, by layer and shapes. A new entry takes a backward pass.

    Returns:
        The marked calls.
    """
    rows = outputs.shape[0] if outputs.dim() else 1
    keys = {
        one.record: (one.record.block, one.record.output_shape, outputs.shape)
        for one in found
        if one.record.block.family.one_hot
    }
    new = [one for one in found if one.record in keys and keys[one.record] not in known]
    for one in new:
        known[keys[one.record]] = rows % one.record.examples > 0 or len(one.record.output_shape) < 2
    asked = [one for one in new if not known[keys[one.record]] and rows > 1]
    for count, last in itertools.product({one.record.examples for one in asked}, (False, True)):
        share = rows // count  # of what would be one example's; causal models mix one way alone
        end = slice(rows - share, rows) if last else slice(share)
        numbers = torch.randn(outputs[end].shape, generator=torch.Generator().manual_seed(0))
        column = torch.zeros_like(outputs)
        column[end] = numbers.to(column)

        def receive(call: Call, gradient: Tensor, last: bool = last) -> None:
            gradient = gradient.reshape(call.output_shape)
            others = gradient[:-1] if last else gradient[1:]
            if call.examples == 1 or bool(others.any()):
                known[keys[call]] = True

        mine = [one for one in asked if one.record.examples == count]
        differentiate(outputs, column, mine, receive)
    for call, key in keys.items():
        call.shared = known[key]
    return [call for call in keys if call.shared]


def refuse_shared(calls: Iterable[Call], outputs: Tensor) -> None:
    """Refuse calls on indices that examples share, where signs aren't random.

    Raises:
        ValueError: Naming the layer.
    """
    for call in calls:
        raise ValueError(
            f"fisher='empirical' needs each example's gradient, but layer '{call.block.name}' "
            f"looks up indices that examples share (its output is {list(call.output_shape)}, that "
            f"of the model {list(outputs.shape)}): give it indices with the examples in the first "
            "axis (positions.expand(N, -1)), or use fisher='mc', or curvature='none' for this "
            "layer."
        )


def _without_batch(found: Iterable[Found[Call]]) -> set[str]:
    """Layers among these that were called with a single example, whose first axis is another."""
    inputs = {call: call.kept[0] for one in found if (call := one.record).kept is not None}
    return {c.block.name for c, x in inputs.items() if c.block.family.lacks_batch(c.module, x)}


def check_examples_first(
    found: Sequence[Found[Call]], outputs: Tensor, fisher: str, verified: bool
) -> bool:
    """Refuse calls whose first axis isn't that of the examples, as far as one can tell.

    Outputs may have further axes merged with their first one, as ``logits.flatten(0, 1)`` of a
    language model: targets drawn from the model are independent, so the square of their summed
    gradients has no cross terms on average, but the columns of ``"type-2"`` are not. Whether the
    slowest part of that axis is the layers' first one is found out by two backward passes.

    Args:
        found: What the outputs depend on.
        outputs: Of the model.
        fisher: The kind of Fisher.
        verified: Whether merged axes were verified already.

    Returns:
        Whether they are now.

    Raises:
        ValueError: Naming the layer.
    """
    kept = [one for one in found if one.record.keeps and not one.record.block.family.one_hot]
    rows = outputs.shape[0] if outputs.dim() else 1
    merged = [one for one in kept if one.record.examples != rows]
    for one in merged:
        count = one.record.examples
        if rows % count or fisher != "mc":
            raise ValueError(
                f"EKFAC and diagonals need the gradient of each example: layer "
                f"'{one.record.block.name}' was called with {count} in the first axis, but the "
                f"model's output has shape {list(outputs.shape)}. Keep the examples in the first "
                "axis of both, apart from all other axes (CrossEntropyLoss takes [N, C, T]), or "
                "use curvature='kfac'"
                + (f", or fisher='mc' instead of {fisher!r}." if not rows % count else ".")
                + batch_hint(_without_batch(merged))
            )
    if not merged or verified:
        return verified
    share = rows // min(one.record.examples for one in merged)
    numbers = torch.randn(outputs[:share].shape, generator=torch.Generator().manual_seed(0))
    asked, mixed = {one.record for one in kept}, set[str]()
    for end in (slice(0, share), slice(rows - share, rows)):  # causal models mix one way alone
        column = torch.zeros_like(outputs)
        column[end] = numbers.to(column)

        def receive(call: Call, gradient: Tensor, end: slice = end) -> None:
            gradient, count = gradient.reshape(call.output_shape), call.examples
            others = count - math.ceil(share * count / rows)
            part = gradient[-others:] if end.start == 0 else gradient[:others]
            if others and call in asked and bool(part.any()):
                mixed.add(call.block.name)

        differentiate(outputs, column, found, receive)
    if mixed:
        raise ValueError(
            "EKFAC and diagonals need the gradient of each example, but what should be one's, "
            f"{share} rows of outputs {list(outputs.shape)}, depend on several rows of the first "
            f"axis in layers {sorted(mixed)}. Keep the examples in the first axis everywhere, with "
            "no normalization over them, or use curvature='kfac'."
        )
    return True
