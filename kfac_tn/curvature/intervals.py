"""When curvature is renewed: dense at the beginning, and then as often as a budget allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal, TypeAlias

from kfac_tn.layers import LayerBlock
from kfac_tn.tn.machine import machine

Interval: TypeAlias = int | Literal["auto"]

LONGEST = 500
"""Steps after which statistics are renewed at the latest; inverses after twice as many."""

_LEAST_SHARE = 0.2
"""Of the budget, for statistics and inverses, where the products in every step take it all."""


@lru_cache
def early_steps(interval: int) -> tuple[frozenset[int], int]:
    """Steps at which something is due before its interval is reached, and where that phase ends.

    Early curvature changes fast and there is nothing to average yet; so the gap is a quarter of the
    steps taken until then, one at first.

    Example:
        >>> early, end = early_steps(3)
        >>> sorted(early), end
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12], 12)
    """
    steps, step = {0}, 0
    while (gap := max(1, step // 4)) < interval:
        step += gap
        steps.add(step)
    return frozenset(steps), step


def is_due(step: int, interval: int) -> bool:
    """Whether something is due at a step, counted from 0."""
    early, end = early_steps(interval)
    return step in early or (step >= end and step % interval == 0)


@dataclass(frozen=True)
class Work:
    """What a training step costs: floating-point operations, in units of a large matrix product's.

    Attributes:
        model: Forward and backward pass, and a first-order optimizer's step, in every step.
        products: With the inverses, and what else KFAC does more than that optimizer in every step.
        statistics: Factors and extra backward passes, each time they are renewed.
        inverses: Each time they are renewed.
    """

    model: float = 0.0
    products: float = 0.0
    statistics: float = 0.0
    inverses: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.model + other.model,
            self.products + other.products,
            self.statistics + other.statistics,
            self.inverses + other.inverses,
        )


@dataclass(frozen=True)
class Pace:
    """What takes time besides large matrix products, in operations of these: then counts add up.

    Attributes:
        launch: An operation on tensors, however small.
        element: An element that is read or written.
        blas: An operation of a linear layer, or of a factorization.
    """

    launch: float = 0.0
    element: float = 0.0
    blas: float = 1.0

    @classmethod
    def on(cls, device_type: str) -> Pace:
        """As ``kfac_tn.tn.machine`` has it for a type of device: constants, nothing is measured.

        Example:
            >>> Pace.on("cpu").launch > 1e5
            True
        """
        constants = machine(device_type)
        work = constants.work
        return cls(constants.launch / work, constants.element / work, constants.blas)

    def small(self, launches: int, elements: float) -> float:
        """What so many of both cost."""
        return self.launch * launches + self.element * elements


# What a layer costs besides large matrix products, fitted to `benchmarks/results/step.json` with
# these at their rates: launches, and how often elements are read or written. The model's are those
# of everything around the layer too (activations, normalization, attention, AdamW's step); they
# agree with what was measured within a fifth, mostly; statistics within a third.
_MODEL_LAUNCHES, _OUTPUT_PASSES, _PARAMETER_PASSES = 30, 11, 2
_PRODUCT_LAUNCHES, _PRODUCT_PASSES = 28, 4
_STATISTICS_LAUNCHES, _BACKWARD_PASSES, _INPUT_PASSES = 100, 8, 3
_INVERSE_LAUNCHES = 150


def layer_work(
    block: LayerBlock,
    examples: int,
    rows: int,
    passes: float,
    exact: bool = False,
    pace: Pace = Pace(),
) -> Work:
    """What one layer costs.

    Args:
        block: The layer.
        examples: In all its calls of a step.
        rows: Examples times shared positions.
        passes: Extra backward passes; each costs half of the user's, having no weight's gradient.
        exact: Whether damping is exact, by eigendecompositions and twice the products.
        pace: Of what isn't a large matrix product; by default nothing else counts.

    Example:
        >>> import torch
        >>> from kfac_tn.layers import partition
        >>> (block,), _ = partition(torch.nn.Linear(9, 4))
        >>> layer_work(block, examples=8, rows=8, passes=1)
        Work(model=1920.0, products=1120.0, statistics=2496.0, inverses=95992.0)
    """
    d_in, d_out = block.joint_dim, block.grad_output_dim
    parameters, outputs = block.groups * d_in * d_out, block.groups * d_out * rows
    looked_up = block.family.one_hot  # which takes no product
    forward = (
        0 if looked_up else 2 * rows * parameters * (pace.blas if block.weight.dim() == 2 else 1)
    )
    model = 3 * forward + pace.small(
        _MODEL_LAUNCHES, _OUTPUT_PASSES * outputs + _PARAMETER_PASSES * parameters
    )
    small = pace.small(_PRODUCT_LAUNCHES, _PRODUCT_PASSES * parameters)
    corrected = block.curvature != "kfac"
    moments = corrected * passes * forward  # gradients of examples are formed
    if not block.has_factors:
        return Work(model, 2 * parameters + small, moments + passes * forward)
    exact = exact or corrected
    pieces = block.input_pieces, block.grad_output_pieces
    s_in, s_out = -(-d_in // pieces[0]), -(-d_out // pieces[1])
    vectors = rows if block.approximation == "expand" else examples
    grams = 2 * vectors * block.groups * (d_in * s_in + d_out * s_out * passes)
    rotations = corrected * 2 * rows * block.groups * (d_in * s_in + d_out * s_out) * passes
    inversions = pieces[0] * _inversion(s_in, exact) + pieces[1] * _inversion(s_out, exact)
    entries: float = 2 * block.groups * (d_in * s_in + d_out * s_out)
    entries += _BACKWARD_PASSES * passes * outputs + _INPUT_PASSES * vectors * block.groups * d_in
    return Work(
        model=model,
        products=(2 + 2 * exact) * parameters * (s_in + s_out) + small,
        statistics=grams
        + rotations
        + moments
        + passes * forward
        + pace.small(_STATISTICS_LAUNCHES, entries),
        inverses=block.groups * inversions * pace.blas + pace.small(_INVERSE_LAUNCHES, 0),
    )


def model_work(
    blocks: Iterable[LayerBlock],
    seen: Sequence[tuple[Mapping[str, tuple[int, int]], float]],
    exact: bool = False,
) -> Work:
    """What all layers cost together, where it is most.

    Args:
        blocks: The layers.
        seen: Of each process, examples and rows by layer name, and extra backward passes.
        exact: As in ``layer_work``.

    Example:
        >>> import torch
        >>> from kfac_tn.layers import partition
        >>> blocks, _ = partition(torch.nn.Linear(900, 400))
        >>> small, large = {"": (8, 8)}, {"": (64, 64)}
        >>> model_work(blocks, [(small, 1), (large, 1)]) == model_work(blocks, [(large, 1)])
        True
    """
    largest: dict[str, tuple[int, int]] = {}
    for sizes, _ in seen:
        for name, size in sizes.items():
            largest[name] = max(size, largest.get(name, size))
    passes = max(each for _, each in seen)
    works = (
        layer_work(b, *largest[b.name], passes, exact, Pace.on(b.weight.device.type))
        for b in blocks
        if b.name in largest
    )
    return sum(works, Work())


def intervals(work: Work, overhead: float) -> tuple[int, int]:
    """Steps between statistics and between inverses such that a step costs little more.

    The budget is ``overhead`` times the model's work. What the products with the inverses leave
    over of it, a fifth at least, is shared equally by statistics and inverses.

    Example:
        >>> intervals(Work(model=100, products=5, statistics=60, inverses=200), overhead=0.25)
        (6, 20)
    """
    budget = overhead * work.model
    each = max(budget - work.products, _LEAST_SHARE * budget) / 2
    if not each:
        return LONGEST, 2 * LONGEST
    statistics = min(max(1, ceil(work.statistics / each)), LONGEST)
    inverses = min(max(statistics, ceil(work.inverses / each)), 2 * LONGEST)
    return statistics, inverses


def _inversion(size: int, exact: bool) -> float:
    """A Cholesky factorization and the inverse from it; or an eigendecomposition.

    Fitted to one thread of a server's CPU in float32: there it takes as long as 5 size^3 operations
    of a matrix product at size 256, 3 size^3 at 1024 (the product itself: 2 size^3); an
    eigendecomposition 24 size^3 at 64, 8 to 13 from 128 to 1024.
    """
    return (11 if exact else 3) * size**3 + 800 * size**2
