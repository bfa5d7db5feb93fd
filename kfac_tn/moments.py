"""Second moments of per-example gradients along a basis: EKFAC's eigenvalues, and diagonals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_tn.functional import common
from kfac_tn.layers import LayerBlock
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
