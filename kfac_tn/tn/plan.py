"""From a network to the steps that evaluate it, planned once and cached.

Three things make the steps fast:

- An index pattern is no tensor but a view, or slices that are added up: see `kfac_tn.tn.planner`.
- A small matrix that shrinks a tensor is applied at once, the one that shrinks it most first.
- Equal steps are one step. The copies in a Gram matrix are equal up to the names of their indices,
  so everything up to the last product is computed once.

What remains is contracted pairwise, as batched matrix products, in the order that opt_einsum finds.

A plan is plain data and its evaluation a plain loop, with nothing to decide. That makes repeated
calls cheap, and lets `torch.compile` take the plan for a constant and see the steps alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Constant
from kfac_tn.tn.planner import STRATEGIES, Instruction, Planner, Source
from kfac_tn.tn.steps import COMPUTE

FLOPS_PER_ELEMENT = 16
"""Multiplications that take as long as to read or write an element in memory."""

FLOPS_PER_LAUNCH = 500_000
"""Multiplications that take as long as to begin an operation on tensors, whatever their size."""


@dataclass(frozen=True)
class Cost:
    """What an evaluation costs.

    Attributes:
        flops: Multiplications and additions.
        peak_memory: Largest number of elements held at once, besides operands and constants.
        moved: Number of elements that are read or written by all steps that are no views.
        launches: Number of operations on tensors.
    """

    flops: int
    peak_memory: int
    moved: int
    launches: int

    @property
    def time(self) -> int:
        """Estimated time, in multiplications."""
        work = self.flops + FLOPS_PER_ELEMENT * self.moved
        return work + FLOPS_PER_LAUNCH * self.launches


@dataclass(frozen=True, eq=False)
class Recipe:
    """Steps that evaluate a network, whatever the dtype and device of its operands.

    Every tensor on the way has a slot.

    Attributes:
        operands: Slot, name and shape (one axis per index) of each operand.
        constants: What is in a slot before the first step.
        instructions: The steps in their order.
        result: Slot of the result.
        cost: What an evaluation costs.
    """

    operands: tuple[tuple[int, str, tuple[int, ...]], ...]
    constants: tuple[tuple[int, Constant | Source], ...]
    instructions: tuple[Instruction, ...]
    result: int
    cost: Cost = Cost(0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe with the tensors of its constants, as plain data.

    Attributes:
        operands: Slot, name and shape of each operand; None if its own shape will do.
        constants: Slots and the tensors in them.
        program: For each step its name, attributes, input slots, result slot, and the slots that
            no later step needs.
        result: Slot of the result.
    """

    operands: tuple[tuple[int, str, tuple[int, ...] | None], ...]
    constants: tuple[tuple[int, Tensor], ...]
    program: tuple[tuple[str, tuple[Any, ...], tuple[int, ...], int, tuple[int, ...]], ...]
    result: int


def run(plan: Plan, operands: Mapping[str, Tensor]) -> Tensor:
    """Evaluate a plan.

    Args:
        plan: The plan.
        operands: Operands that `Network.check` has accepted.

    Returns:
        The result.
    """
    slots = dict(plan.constants)
    for slot, name, shape in plan.operands:
        slots[slot] = operands[name] if shape is None else operands[name].reshape(shape)
    for step, attributes, inputs, slot, done in plan.program:
        slots[slot] = COMPUTE[step](*[slots[i] for i in inputs], *attributes)
        for i in done:
            del slots[i]
    return slots[plan.result]


@torch.compiler.assume_constant_result
def plan(network: Network, dtype: torch.dtype, device: torch.device) -> Plan:
    """Plan the evaluation of a network. The plans used last are kept.

    `torch.compile` calls this while it traces, and takes the plan for a constant.

    Args:
        network: The network, evaluated as it is.
        dtype: Type of its operands, hence of its constants.
        device: Where its operands are.

    Returns:
        The plan, for `run`.
    """
    return _plan(network, dtype, device)


@lru_cache(maxsize=512)
def _plan(network: Network, dtype: torch.dtype, device: torch.device) -> Plan:
    # The constants outlive this call: they must not belong to the mode of whoever calls first.
    with _outside_of_modes():
        return _make(network, dtype, device)


def foreign_plan(network: Network, operands: Mapping[str, Tensor]) -> Plan:
    """Make a plan for tensors of other types, such as fake ones, which no plain tensor may meet.

    Args:
        network: The network, evaluated as it is.
        operands: Its operands.

    Returns:
        The plan. Its constants are of the operands' kind, and it is not kept.
    """
    first = next(iter(operands.values()))
    with getattr(first, "fake_mode", nullcontext()):
        return _make(network, first.dtype, first.device)


@contextmanager
def _outside_of_modes() -> Iterator[None]:
    """Make tensors as if nobody transformed, traced, faked or counted what is done here."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _disable_current_modes(),
        torch._C._DisableFuncTorch(),
    ):
        yield


def _make(network: Network, dtype: torch.dtype, device: torch.device) -> Plan:
    steps = recipe(network)
    return Plan(
        tuple(
            (slot, name, None if shape == network.operands[name] else shape)
            for slot, name, shape in steps.operands
        ),
        tuple((slot, _tensor(constant, dtype, device)) for slot, constant in steps.constants),
        tuple(
            (type(i.step).__name__, i.step.attributes, i.inputs, i.slot, i.done)
            for i in steps.instructions
        ),
        steps.result,
    )


def _tensor(constant: Constant | Source, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(constant, Source):
        return constant.pattern.source(device)
    return constant.tensor(dtype, device)


@lru_cache(maxsize=1024)
def recipe(network: Network) -> Recipe:
    """Find the steps that evaluate a network: of all strategies, those that take least time.

    Args:
        network: The network, as it is.

    Returns:
        The steps.
    """
    recipes: list[Recipe] = []
    for strategy in STRATEGIES:
        planner = Planner(network, strategy)
        steps = Recipe(
            tuple(planner.operands),
            tuple(planner.constants.items()),
            tuple(planner.instructions),
            planner.result,
        )
        if all(steps.instructions != other.instructions for other in recipes):
            recipes.append(replace(steps, cost=_cost(network, steps)))
    return min(recipes, key=lambda steps: steps.cost.time)


def cost(network: Network) -> Cost:
    """Find out what evaluating a network costs, without evaluating it.

    Args:
        network: The network, as it is.

    Returns:
        Its cost.
    """
    return recipe(network).cost


def _cost(network: Network, steps: Recipe) -> Cost:
    """Run a recipe on tensors without data."""
    device = torch.device("meta")
    with _outside_of_modes():
        slots = {slot: _tensor(c, torch.float32, device) for slot, c in steps.constants}
        operands = {n: torch.empty(s, device=device) for n, s in network.operands.items()}
        for slot, name, shape in steps.operands:
            slots[slot] = operands[name].reshape(shape)
        # Views share the storage of what they view, so it is storages that count. What is given
        # stays alive, so that no result is made in its place.
        alive = tuple(slots.values())
        given = set(map(_storage, alive))
        flops = peak = moved = launches = 0
        for instruction in steps.instructions:
            inputs = [slots[i] for i in instruction.inputs]
            result = slots[instruction.slot] = instruction.step(*inputs)
            flops += instruction.step.flops(*inputs)
            moved += instruction.step.moved(*inputs)
            launches += instruction.step.launches
            if _storage(result) not in map(_storage, inputs):
                moved += sum(tensor.numel() for tensor in (result, *inputs))
            held = {_storage(tensor): tensor.untyped_storage() for tensor in slots.values()}
            sizes = (held[key].nbytes() for key in held.keys() - given)
            peak = max(peak, sum(sizes) // torch.float32.itemsize)
            for i in instruction.done:
                del slots[i]
    return Cost(flops, peak, moved, launches)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
