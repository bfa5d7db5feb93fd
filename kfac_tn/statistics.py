"""From single calls of layers to the Kronecker factors of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn import functional
from kfac_tn.layers import LayerBlock


@dataclass(frozen=True)
class Factors:
    """The two Kronecker factors of one block, of one step.

    Attributes:
        input: A, ``[G, d_in, d_in]``; d_in counts the 1 of the bias if the block has one.
        grad_output: B, ``[G, d_out, d_out]``.
    """

    input: Tensor
    grad_output: Tensor


@dataclass(frozen=True)
class Statistics:
    """What the passes since the last call of ``Capture.take`` say about the curvature.

    Attributes:
        factors: By block; blocks that took no part are missing.
        diagonals: By parameter: an estimate of the Fisher's diagonal, shaped like the parameter.
    """

    factors: dict[LayerBlock, Factors]
    diagonals: dict[Parameter, Tensor]


@dataclass(eq=False)
class Call:
    """One call of one module, kept by the autograd node that made its output.

    ``input`` is the mean of a a^T (expand) or one average row per example (reduce); None once it
    is counted, since a loss that the user keeps for its value keeps this too.
    """

    block: LayerBlock
    module: Module
    output_nr: int
    output_shape: torch.Size
    input: Tensor | None
    examples: int
    positions: int

    def grad_output_statistic(self, gradient: Tensor) -> Tensor:
        """The sum of g g^T (expand) or one summed row per example (reduce)."""
        family = self.block.family
        gradient = gradient.reshape(self.output_shape)
        if self.block.approximation == "expand":
            return family.grad_output_factor(self.module, gradient)
        return family.sum_grad_output(self.module, gradient)


# Combining the calls of a module: to its weight they are further shared positions


def combine_inputs(calls: Iterable[Call]) -> dict[LayerBlock, tuple[Tensor, int]]:
    """Sums over calls of a a^T and the number of terms, for each block; each call counts once."""
    sums: dict[LayerBlock, tuple[Tensor, int]] = {}

    def add(block: LayerBlock, total: Tensor, count: int) -> None:
        previous, previous_count = sums.get(block, (0.0, 0))
        sums[block] = (previous + total, previous_count + count)

    rows: dict[tuple[LayerBlock, int], tuple[Tensor, int]] = {}
    for call in calls:
        statistic, call.input = call.input, None
        if statistic is None:
            continue
        if call.block.approximation == "expand":
            count = call.examples * call.positions
            add(call.block, statistic * count, count)
        else:  # reduce: average over the positions of all calls before the outer product
            key = (call.block, call.examples)
            previous, positions = rows.get(key, (0.0, 0))
            rows[key] = (previous + statistic * call.positions, positions + call.positions)
    for (block, examples), (total, positions) in rows.items():
        add(block, functional.gram(total / positions), examples)
    return sums


def combine_grad_outputs(statistics: Iterable[tuple[Call, Tensor]]) -> dict[LayerBlock, Tensor]:
    """The output-gradient factor of each block, from the statistics of its calls."""
    factors: dict[LayerBlock, Tensor] = {}
    rows: dict[tuple[LayerBlock, int], Tensor] = {}
    for call, statistic in statistics:
        if call.block.approximation == "expand":
            add_to(factors, call.block, statistic)
        else:  # reduce: sum over the positions of all calls before the outer product
            add_to(rows, (call.block, call.examples), statistic)
    for (block, _), total in rows.items():
        add_to(factors, block, functional.gram(total))
    return factors


def add_to(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    """Add to an entry of a dict of sums, or begin it."""
    sums[key] = sums[key] + value if key in sums else value
