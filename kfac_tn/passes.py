"""What backward passes leave of a step: sums over losses, columns and micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.factors import Factors, Gram, WeightedSum, representative
from kfac_tn.functional.blocks import split_rows
from kfac_tn.graph import Found
from kfac_tn.layers import LayerBlock
from kfac_tn.moments import MomentCollector
from kfac_tn.statistics import Call, Statistics, Sums, add_grad_outputs, add_inputs

_ONE = torch.ones(())
Received = list[tuple[Call, Tensor | Gram]]


@dataclass
class Pass:
    """The losses of one call of ``backward()``: micro-batches are passes, terms share one.

    Attributes:
        scale: The factor of its losses in the objective.
        calls: The calls of layers that it reached; those with one number are of one loss.
        grad_outputs: Of the empirical Fisher, what arrived there.
        terms: Of the empirical Fisher, how many the loss is a mean of.
        moments: Of the empirical Fisher, for EKFAC and diagonals.
    """

    scale: Tensor
    calls: dict[Call, int] = field(default_factory=dict)
    grad_outputs: Received = field(default_factory=list)
    terms: Tensor | int = 1
    moments: MomentCollector | None = None

    def join(self, calls: Iterable[Call]) -> None:
        """Note the calls that one loss depends on: a layer's belong together, with all before."""
        mine: defaultdict[LayerBlock, list[Call]] = defaultdict(list)
        for call in calls:
            mine[call.block].append(call)
        for block, each in mine.items():
            known = {self.calls[call] for call in each if call in self.calls}
            number = min(known, default=len(self.calls))
            if len(known) > 1:
                others = [c for c, n in self.calls.items() if c.block is block and n in known]
                self.calls.update(dict.fromkeys(others, number))
            self.calls.update(dict.fromkeys(each, number))


class Passes:
    """The passes since statistics were last taken.

    Args:
        adds_up: Whether the loss is a sum: micro-batches add up; else they average.
        inputs_only: Whether output-gradient factors are identities.
    """

    def __init__(self, adds_up: bool, inputs_only: bool) -> None:
        self._adds_up, self._inputs_only = adds_up, inputs_only
        self._passes: dict[int, Pass] = {}
        self._inputs: Sums[LayerBlock] = defaultdict(WeightedSum)
        self._input_counts: dict[LayerBlock, int] = {}
        self._grad_outputs: Sums[LayerBlock] = defaultdict(WeightedSum)
        self._diagonals: Sums[Parameter] = defaultdict(WeightedSum)
        self._moments: Sums[LayerBlock] = defaultdict(WeightedSum)

    def __len__(self) -> int:
        return len(self._passes)

    def get(self, task: int) -> Pass | None:
        """The pass of one of autograd's tasks, if it has begun."""
        return self._passes.get(task)

    def begin(self, task: int, scale: Tensor, reached: Iterable[Found[Call]] = ()) -> Pass:
        """Note a loss, its factor in the objective of its pass, and calls that it depends on."""
        if task not in self._passes:
            self._finish()
            self._passes[task] = Pass(scale)
        one_pass = self._passes[task]
        one_pass.scale = torch.maximum(one_pass.scale, scale)
        one_pass.join(one.record for one in reached if not one.record.ignored)
        return one_pass

    def add(
        self,
        received: Received,
        moments: Mapping[LayerBlock, Tensor],
        diagonals: Iterable[tuple[Parameter, Tensor]],
        weight: Tensor,
    ) -> None:
        """Add what one back-propagated column gave."""
        add_grad_outputs(self._grad_outputs, received, weight)
        for block, moment in moments.items():
            self._moments[block].add(moment, weight)
        for parameter, diagonal in diagonals:
            self._diagonals[parameter].add(diagonal, weight)

    def _finish(self) -> None:
        """Reduce the passes to sums: only now are all calls known that belong together."""
        for one_pass in self._passes.values():
            add_inputs(self._inputs, self._input_counts, one_pass.calls)
            # M sum_n g g^T, g without the scale it went through
            weight = one_pass.terms / one_pass.scale
            moments = one_pass.moments.finish() if one_pass.moments else {}
            self.add(one_pass.grad_outputs, moments, (), weight)
            one_pass.calls, one_pass.grad_outputs, one_pass.moments = {}, [], None

    def statistics(self) -> Statistics:
        """What all passes together say. They end here: nothing can be added any more."""
        self._finish()
        scales = torch.stack([one_pass.scale for one_pass in self._passes.values()] or [_ONE])
        total = scales.max() if self._adds_up else scales.sum()
        factors = {}
        for block, inputs in self._inputs.items():
            if not self._inputs_only and block not in self._grad_outputs:
                continue
            a = inputs.result(self._input_counts[block])
            if self._inputs_only:
                ones = split_rows(
                    representative(a).new_ones(block.grad_output_dim), block.grad_output_pieces
                )
                factors[block] = Factors(a, torch.diag_embed(ones).repeat(block.groups, 1, 1))
            else:
                factors[block] = Factors(a, self._grad_outputs[block].result(total))
        diagonals = {p: cast(Tensor, each.result(total)) for p, each in self._diagonals.items()}
        moments = {b: cast(Tensor, each.result(total)) for b, each in self._moments.items()}
        return Statistics(factors, diagonals, moments, self._input_counts)
