"""Data parallelism: each process sees its share of a batch, and all of them take the same step.

Gradients are averaged by whoever trains, such as ``torch.nn.parallel.DistributedDataParallel``;
what KFAC measures is averaged here. The objective is the mean of the processes' losses.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.factors import Factors
from kfac_tn.layers import LayerBlock
from kfac_tn.statistics import Statistics

ProcessGroup: TypeAlias = "dist.ProcessGroup | Literal['all'] | None"


class Processes:
    """The processes that train one model; of one alone, every method returns what it is given.

    Args:
        group: ``"all"``: those of ``torch.distributed``, once that is initialized; a group of them;
            or None: this process alone.

    Raises:
        ValueError: For a group that is something else.

    Example:
        >>> processes = Processes("all")
        >>> processes.size, processes.rank, processes.mean(torch.ones(2))
        (1, 0, tensor([1., 1.]))
    """

    def __init__(self, group: ProcessGroup = "all") -> None:
        known = group is None or group == "all"
        if not known and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise ValueError(
                f"process_group is {group!r}: give 'all', a ProcessGroup of torch's, or None."
            )
        self._given = group

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size(self._group) if self._together else 1

    @property
    def rank(self) -> int:
        """The number of this one."""
        return dist.get_rank(self._group) if self._together else 0

    @property
    def _together(self) -> bool:
        return self._given is not None and dist.is_available() and dist.is_initialized()

    @property
    def _group(self) -> Any:
        return None if self._given == "all" else self._given

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in the order of ranks; anything that can be pickled."""
        values: list[Any] = [value]
        if self.size > 1:
            values *= self.size
            dist.all_gather_object(values, value, group=self._group)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """The mean of everybody's value."""
        if self.size == 1:
            return value
        return self.sum([value / self.size])[0]

    def sum(self, values: list[Tensor]) -> list[Tensor]:
        """The sums of everybody's values, in place where these are contiguous."""
        if self.size == 1:
            return values
        values = [value.contiguous() for value in values]
        works = [dist.all_reduce(value, group=self._group, async_op=True) for value in values]
        for work in works:
            work.wait()
        return values


def average(
    statistics: Statistics,
    processes: Processes,
    blocks: Iterable[LayerBlock],
    others: Mapping[Parameter, str],
) -> Statistics:
    """The statistics of all processes' examples together.

    Input factors are means over examples, everything else is over processes, as the objective is.
    A layer that one of them didn't call has no part from there, and one that was bypassed in one of
    them has no statistics at all.

    Args:
        statistics: Of this process; factors are changed.
        processes: All of them, with the same blocks.
        blocks: All there are.
        others: Names of the parameters with a diagonal of their own.

    Example:
        >>> average(Statistics({}, {}, {}), Processes(None), [], {})
        Statistics(factors={}, diagonals={}, moments={}, counts={}, bypassed=set(), columns=1.0)
    """
    if processes.size == 1:
        return statistics
    by_name = {block.name: block for block in blocks}
    parameters = {name: parameter for parameter, name in others.items()}
    mine: dict[Hashable, Tensor] = {}
    for block, factors in statistics.factors.items():
        mine["input", block.name] = factors.input
        mine["grad_output", block.name] = factors.grad_output
    mine.update({("moment", b.name): moment for b, moment in statistics.moments.items()})
    mine.update({("diagonal", others[p]): d for p, d in statistics.diagonals.items()})
    counts = {block.name: count for block, count in statistics.counts.items()}
    forms = {key: (tuple(value.shape), value.dtype) for key, value in mine.items()}
    bypassed = {block.name for block in statistics.bypassed}
    everybodys = processes.gather((forms, counts, bypassed, statistics.columns))
    found = sorted({item for theirs, *_ in everybodys for item in theirs.items()}, key=str)
    totals = {name: sum(theirs.get(name, 0) for _, theirs, *_ in everybodys) for name in by_name}
    bypassed = set().union(*(theirs for _, _, theirs, _ in everybodys))
    values = []
    for (kind, name), (shape, dtype) in found:
        value = mine.get((kind, name))
        if value is None:
            owner = parameters[name] if kind == "diagonal" else by_name[name].weight
            value = torch.zeros(shape, dtype=dtype, device=owner.device)
        share = counts.get(name, 0) / totals[name] if kind == "input" else 1 / processes.size
        values.append(value * share)
    keys = [key for key, _ in found]
    summed = dict(zip(keys, processes.sum(values), strict=True))
    named = {kind: {n: v for (k, n), v in summed.items() if k == kind} for kind, _ in keys}
    pairs = named.get("input", {})
    return Statistics(
        {by_name[n]: Factors(a, named["grad_output"][n]) for n, a in pairs.items()},
        {parameters[n]: value for n, value in named.get("diagonal", {}).items()},
        {by_name[n]: value for n, value in named.get("moment", {}).items()},
        {by_name[n]: totals[n] for n in pairs},
        columns=sum(theirs for *_, theirs in everybodys) / processes.size,
    ).without({by_name[name] for name in bypassed})
