"""Whether what layers are called with belongs to the examples that the loss sees.

Statistics of each example's gradient take a layer's first axis for that of the examples, and
columns that are back-propagated for all examples at once take their outputs for independent.
Models may have it otherwise: backward passes of random numbers tell.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_tn.graph import Found, differentiate
from kfac_tn.layers import batch_hint
from kfac_tn.row_order import are_apart, are_own, enlarged, exponents, may_move_rows, norms
from kfac_tn.statistics import Call


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
        column = torch.zeros_like(outputs)
        column[end] = _numbers(outputs[end])

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


def refuse_packed(call: Call) -> None:
    """Refuse packed sequences where it is to be known which positions are one example's.

    Raises:
        ValueError: Naming the layer.
    """
    reduce = call.block.approximation == "reduce"
    if call.packed and (reduce or call.keeps or call.block.curvature != "kfac"):
        raise ValueError(
            f"KFAC-reduce, EKFAC and diagonals need all positions of an example, but layer "
            f"'{call.block.name}' was called with a PackedSequence, which has them apart: use "
            "approximation='expand' and curvature='kfac' for this layer, or padded sequences."
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
    if not kept:
        return verified
    if not verified and rows > 1:
        _refuse_other_axes(found, outputs)
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
        return verified or rows > 1
    share = rows // min(one.record.examples for one in merged)
    asked, mixed = {one.record for one in kept}, set[str]()
    for end in (slice(0, share), slice(rows - share, rows)):  # causal models mix one way alone
        column = torch.zeros_like(outputs)
        column[end] = _numbers(outputs[end])

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


def check_rows_own(found: Sequence[Found[Call]], outputs: Tensor) -> bool:
    """Refuse calls whose rows are of several examples, or, of a layer's several calls, of others.

    Where models mix examples, or take them in another order, by what they contain (largest numbers
    of the batch; sorted ones): that is looked for by two backward passes, if there is such in the
    graph. Rows of a layer that is called once may be in any order: sums over them are the same.

    Args:
        found: What the outputs depend on.
        outputs: Of the model, whose first axis is that of the examples, or has it in front.

    Returns:
        Whether there was something to be asked.

    Raises:
        ValueError: Naming the layer.
    """
    calls = list(dict.fromkeys(one.record for one in found))
    several = {block for block, n in Counter(c.block for c in calls).items() if n > 1}
    together = Counter((c.block, c.examples) for c in calls)  # whose rows are averaged
    rows = outputs.shape[0] if outputs.dim() else 1
    asked: dict[int, list[Call]] = {}
    for call in calls:
        averaged = together[call.block, call.examples] > 1 and call.block.approximation == "reduce"
        divided = call.examples > 1 and rows % call.examples == 0
        if (call.keeps or averaged) and divided and not call.shared:
            asked.setdefault(call.examples, []).append(call)
    if not asked or not may_move_rows(outputs):
        return bool(asked)
    numbers, mixed = _numbers(outputs), dict[str, None]()
    for count, mine in asked.items():
        powers = exponents(numbers, count)
        column = enlarged(numbers, -0.5 * powers)
        before, after = (_row_norms(found, outputs, c) for c in (column, enlarged(column, powers)))
        for call in mine:
            same = are_own if call.block in several else are_apart
            zeros = torch.zeros(count, device=outputs.device)
            both = before.get(call, zeros), after.get(call, zeros)
            if not same(*both, powers, column):
                mixed[call.block.name] = None
    if mixed:
        raise ValueError(
            "EKFAC, diagonals and layers that KFAC-reduce calls several times need the gradient of "
            f"each example, but rows of layers {list(mixed)} depend on several examples (something "
            "of the whole batch is used), or are in another order in each call. Have the model "
            "keep examples apart and in their order, or use approximation='expand' and "
            "curvature='kfac' for these layers."
        )
    return True


def _row_norms(found: Sequence[Found[Call]], outputs: Tensor, column: Tensor) -> dict[Call, Tensor]:
    """Of what arrives at each call: ``[examples]``."""
    result: dict[Call, Tensor] = {}

    def receive(call: Call, gradient: Tensor) -> None:
        result[call] = norms(gradient.detach().reshape(call.output_shape))

    differentiate(outputs, column, found, receive)
    return result


def _refuse_other_axes(found: Sequence[Found[Call]], outputs: Tensor) -> None:
    """Refuse calls whose examples are on another axis, of which the first happens to have the size.

    Raises:
        ValueError: Naming the layer.
    """
    rows = outputs.shape[0]
    suspects = {
        one.record
        for one in found
        if one.record.keeps
        and not one.record.block.family.one_hot
        and one.record.examples == rows
        and rows in one.record.output_shape[1:]
    }
    if not suspects:
        return
    probe, column = rows // 2, torch.zeros_like(outputs)  # with others before and behind
    column[probe] = _numbers(column[probe])
    elsewhere = torch.arange(rows, device=outputs.device) != probe

    def receive(call: Call, gradient: Tensor) -> None:
        if call not in suspects:
            return
        gradient = gradient.reshape(call.output_shape)
        others = [
            bool(gradient.movedim(axis, 0)[elsewhere].any())
            for axis, size in enumerate(gradient.shape)
            if size == rows
        ]
        if others[0] and not all(others):
            raise ValueError(
                f"EKFAC and diagonals need the gradient of each example, but layer "
                f"'{call.block.name}' has the examples on another axis than the first (its output "
                f"is {list(call.output_shape)}): give it tensors with the examples first, or use "
                "curvature='kfac' for this layer."
            )

    differentiate(outputs, column, found, receive)


def check_rows_apart(found: Sequence[Found[Call]], outputs: Tensor) -> bool:
    """Refuse outputs of which several rows are one example's, where columns are for all at once.

    Outputs may have further axes merged with their first one, as ``logits.flatten(0, 1)`` of a
    language model. A column of ``"type-2"`` is a root's column of each row; where gradients of two
    rows meet, as behind attention, their product has no place in the Fisher. Rows are multiplied
    with numbers of their own in a second backward pass: what depends on one of them alone is
    multiplied with its number.

    Args:
        found: What the outputs depend on.
        outputs: Of the model.

    Returns:
        Whether it was to be seen: not of a single row.

    Raises:
        ValueError: Naming the layers.
    """
    rows = outputs.shape[0] if outputs.dim() > 1 else 1  # one example's are its classes
    calls = {one.record for one in found if one.record.block.has_factors}
    packed = any(call.packed for call in calls)  # then as many positions as rows tell nothing
    asked = {call for call in calls if call.examples and (packed or call.examples != rows)}
    if rows == 1 or not asked:
        return rows > 1
    column = _numbers(outputs)
    factors = 1 + torch.rand(rows, generator=torch.Generator().manual_seed(1))
    factors = factors.to(column)
    larger = column * factors.view(-1, *(1,) * (column.ndim - 1))
    vectors: dict[Call, Tensor] = {}
    off: dict[Call, Tensor] = {}
    rounding = [torch.finfo(outputs.dtype).eps]  # the largest of any layer, with autocast

    def keep(call: Call, gradient: Tensor) -> None:
        if call not in asked:
            return
        rounding.append(torch.finfo(gradient.dtype).eps)
        vectors[call] = _vectors(call, gradient)

    def compare(call: Call, gradient: Tensor) -> None:
        if call not in vectors:
            return
        before, after = vectors.pop(call), _vectors(call, gradient)
        along = (before * after).sum(-1) / before.square().sum(-1)
        nearest = _nearest(along.nan_to_num(1.0, 1.0, 1.0), factors.to(along))
        off[call] = (after - nearest.unsqueeze(-1) * before).norm() / after.norm()

    differentiate(outputs, column, found, keep)
    differentiate(outputs, larger, found, compare)
    mixed = list(dict.fromkeys(c.block.name for c, o in off.items() if o > max(rounding) ** 0.5))
    if mixed:
        raise ValueError(
            f"fisher='type-2' needs outputs with the examples in the first axis, apart from all "
            f"other axes (CrossEntropyLoss takes [N, C, T]), but of the model's, "
            f"{list(outputs.shape)}, several rows depend on the same positions of layers "
            f"{mixed}: their products would be counted as curvature. Keep the axes apart, or "
            "use fisher='mc'."
        )
    return True


def _vectors(call: Call, gradient: Tensor) -> Tensor:
    """What a factor is made of."""
    family, gradient = call.block.family, gradient.reshape(call.output_shape)
    reduce = call.block.approximation == "reduce"
    make = family.sum_grad_output if reduce else family.grad_output_rows
    try:
        return make(call.module, gradient.detach())
    except NotImplementedError:  # a family that was registered without rows: each number alone
        return gradient.detach().reshape(-1, 1)


def _nearest(values: Tensor, others: Tensor) -> Tensor:
    """For each value the nearest of the others."""
    ordered = others.sort().values
    above = torch.searchsorted(ordered, values.contiguous()).clamp(1, len(ordered) - 1)
    low, high = ordered[above - 1], ordered[above]
    return torch.where(values - low < high - values, low, high)


def _numbers(like: Tensor) -> Tensor:
    """Random ones, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(like)
