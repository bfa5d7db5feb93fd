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

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kfac_tn.tn.machine import machine
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Delta
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.planner import ALGORITHMS, CONTRACTIONS, Instruction, PlanConstant, Source, draft
from kfac_tn.tn.steps import COMPUTE

ALGORITHM = "KFAC_TN_ALGORITHM"
"""Environment variable with the name of the algorithm to take wherever it applies."""


@dataclass(frozen=True)
class Cost:
    """What an evaluation costs.

    Attributes:
        flops: Multiplications and additions.
        peak_memory: Largest number of elements held at once, besides operands and constants.
        moved: Number of elements that are read or written by all steps that are no views.
        launches: Number of operations on tensors.
        seconds: Estimated time, by the constants of `kfac_tn.tn.machine`.
    """

    flops: int
    peak_memory: int
    moved: int
    launches: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Recipe:
    """Steps that evaluate a network, whatever the dtype and device of its operands.

    Every tensor on the way has a slot.

    Attributes:
        algorithm: Name of the algorithm that it follows.
        operands: Slot, name and shape (one axis per index) of each operand.
        constants: What is in a slot before the first step.
        instructions: The steps in their order.
        result: Slot of the result.
        cost: What an evaluation costs.
        others: The recipes of other algorithms that apply, estimated to take longer.
    """

    algorithm: str
    operands: tuple[tuple[int, str, tuple[int, ...]], ...]
    constants: tuple[tuple[int, PlanConstant], ...]
    instructions: tuple[Instruction, ...]
    result: int
    cost: Cost
    others: tuple[Recipe, ...] = ()

    def explain(self) -> str:
        """Say which algorithm was chosen, what each is estimated to cost, and the steps.

        Returns:
            A table of all algorithms that apply, the chosen one first, and the steps. Times are
            estimates from the constants of `kfac_tn.tn.machine`: they are there to be compared.

        Example:
            >>> from kfac_tn import tn
            >>> spec = tn.ConvSpec((8, 64, 28, 28), (64, 64, 3, 3), padding=1)
            >>> network = tn.kfac_expand_input_factor(spec).simplify()
            >>> print(network.plan().explain().splitlines()[1].split()[0])
            lags
        """
        head = ("algorithm", "estimate", "flops", "moved", "launches", "peak memory")
        rows = [
            (
                recipe.algorithm,
                f"{1e3 * recipe.cost.seconds:.3f} ms",
                f"{recipe.cost.flops:,}",
                f"{recipe.cost.moved:,}",
                f"{recipe.cost.launches:,}",
                f"{recipe.cost.peak_memory:,}",
            )
            for recipe in (self, *sorted(self.others, key=lambda other: other.cost.seconds))
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in (head, *rows)
        ]
        return "\n".join([*lines, *(f"  {step}" for step in self.instructions)])


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe with the tensors of its constants, as plain data.

    Attributes:
        operands: Slot, name and shape (one axis per index) of each operand.
        constants: Slots and the tensors in them.
        program: For each step its name, attributes, input slots, result slot, and the slots that
            no later step needs.
        result: Slot of the result.
    """

    operands: tuple[tuple[int, str, tuple[int, ...]], ...]
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
        slots[slot] = operands[name].reshape(shape)
    for step, attributes, inputs, slot, done in plan.program:
        slots[slot] = COMPUTE[step](*[slots[i] for i in inputs], *attributes)
        for i in done:
            del slots[i]
    return slots[plan.result]


def plan(
    network: Network, dtype: torch.dtype, device: torch.device, algorithm: str | None = None
) -> Plan:
    """Plan the evaluation of a network. The plans used last are kept.

    Args:
        network: The network, evaluated as it is.
        dtype: Type of its operands, hence of its constants.
        device: Where its operands are.
        algorithm: See `recipe`.

    Returns:
        The plan, for `run`.
    """
    return _plan(network, dtype, device, algorithm, os.environ.get(ALGORITHM))


@lru_cache(maxsize=512)
def _plan(
    network: Network,
    dtype: torch.dtype,
    device: torch.device,
    algorithm: str | None,
    preferred: str | None,
) -> Plan:
    # The constants outlive this call: they must not belong to the mode of whoever calls first.
    with _outside_of_modes():
        return _make(_recipe(network, dtype, device.type, algorithm, preferred), dtype, device)


def foreign_plan(
    network: Network, operands: Mapping[str, Tensor], algorithm: str | None = None
) -> Plan:
    """Make a plan for tensors of other types, such as fake ones, which no plain tensor may meet.

    Args:
        network: The network, evaluated as it is.
        operands: Its operands.
        algorithm: See `recipe`.

    Returns:
        The plan. Its constants are of the operands' kind, and it is not kept.
    """
    first = next(iter(operands.values()))
    steps = recipe(network, first.dtype, first.device.type, algorithm)
    with getattr(first, "fake_mode", nullcontext()):
        return _make(steps, first.dtype, first.device)


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


def _make(steps: Recipe, dtype: torch.dtype, device: torch.device) -> Plan:
    return Plan(
        steps.operands,
        tuple((slot, _tensor(constant, dtype, device)) for slot, constant in steps.constants),
        tuple(
            (type(i.step).__name__, i.step.attributes, i.inputs, i.slot, i.done)
            for i in steps.instructions
        ),
        steps.result,
    )


def _tensor(constant: PlanConstant, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(constant, Source):
        return constant.pattern.source(device)
    return constant.tensor(dtype, device)


def _like(constant: PlanConstant, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without data in a constant's place."""
    if isinstance(constant, IndexPattern | Delta):
        return torch.empty(constant.shape, dtype=dtype, device=device)
    return _tensor(constant, dtype, device)


def recipe(
    network: Network,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    algorithm: str | None = None,
) -> Recipe:
    """Find the steps that evaluate a network: of all algorithms, those estimated to be fastest.

    Args:
        network: The network, as it is.
        dtype: Type of its operands: not every type has fast kernels for everything.
        device_type: Type of the device that they are on.
        algorithm: One of `ALGORITHMS`, instead of the fastest. Default: that which the environment
            variable `KFAC_TN_ALGORITHM` names, where it applies, else the fastest.

    Returns:
        The steps.

    Raises:
        ValueError: If the algorithm is unknown or doesn't apply.
    """
    return _recipe(network, dtype, device_type, algorithm, os.environ.get(ALGORITHM))


@lru_cache(maxsize=1024)
def _recipe(
    network: Network,
    dtype: torch.dtype,
    device_type: str,
    algorithm: str | None,
    preferred: str | None,
) -> Recipe:
    for name in filter(None, (algorithm, preferred)):
        if name not in ALGORITHMS:
            raise ValueError(
                f"algorithm {name!r} (an argument, or the environment variable {ALGORITHM}) is "
                f"unknown: choose one of {sorted(ALGORITHMS)}"
            )
    found = _recipes(network.whole(), dtype, device_type)
    if algorithm is not None and algorithm not in found:
        raise ValueError(
            f"algorithm {algorithm!r} doesn't apply to this network: choose one of "
            f"{sorted(found)}, or None"
        )
    fastest = min(found.values(), key=lambda steps: steps.cost.seconds)
    chosen = found.get(algorithm or preferred or "", fastest)
    return replace(chosen, others=tuple(r for r in found.values() if r is not chosen))


@lru_cache(maxsize=1024)
def _recipes(network: Network, dtype: torch.dtype, device_type: str) -> dict[str, Recipe]:
    """The recipes of all algorithms that apply, by name."""
    found: dict[str, Recipe] = {}
    for name in ALGORITHMS:
        drafted = draft(network, name)
        if drafted is None:
            continue
        steps = tuple(drafted.instructions)
        if any(steps == other.instructions for other in found.values()):
            continue
        operands, constants = tuple(drafted.operands), tuple(drafted.constants.items())
        used = {slot for step in steps for slot in step.inputs} | {drafted.result}
        constants = tuple((slot, constant) for slot, constant in constants if slot in used)
        cost = _cost(network, operands, constants, steps, dtype, device_type)
        found[name] = Recipe(name, operands, constants, steps, drafted.result, cost)
    return found


def contraction(network: Network) -> Recipe:
    """Find the fastest of `CONTRACTIONS`, in float32 on the CPU: what rewrites compare.

    Args:
        network: The network, as it is.

    Returns:
        Its steps.
    """
    found = _recipes(network.whole(), torch.float32, "cpu")
    recipes = [steps for name, steps in found.items() if name in CONTRACTIONS]
    return min(recipes, key=lambda steps: steps.cost.seconds)


def cost(network: Network) -> Cost:
    """Find out what contracting a network costs, without doing it.

    Args:
        network: The network, as it is.

    Returns:
        The cost of its `contraction`. Other algorithms may be faster, as `recipe` says.
    """
    return contraction(network).cost


def _cost(
    network: Network,
    given: tuple[tuple[int, str, tuple[int, ...]], ...],
    constants: tuple[tuple[int, PlanConstant], ...],
    instructions: tuple[Instruction, ...],
    dtype: torch.dtype,
    device_type: str,
) -> Cost:
    """Run a recipe on tensors without data."""
    device = torch.device("meta")
    with _outside_of_modes():
        slots = {slot: _like(c, dtype, device) for slot, c in constants}
        operands = {
            n: torch.empty(s, device=device, dtype=dtype) for n, s in network.operands.items()
        }
        for slot, name, shape in given:
            slots[slot] = operands[name].reshape(shape)
        # Views share the storage of what they view, so it is storages that count. What is given
        # stays alive, so that no result is made in its place.
        alive = tuple(slots.values())
        kept = set(map(_storage, alive))
        flops = peak = moved = launches = 0
        work, convolved, constant = 0.0, 0.0, machine(device_type)
        for instruction in instructions:
            step, inputs = instruction.step, [slots[i] for i in instruction.inputs]
            result = slots[instruction.slot] = step.estimate(*inputs)
            flops += step.flops(*inputs)
            work += step.work(*inputs) * (constant.blas if step.by_blas(*inputs) else 1)
            convolved += step.convolved(*inputs)
            moved += step.moved(*inputs)
            launches += step.launches(*inputs)
            if _storage(result) not in map(_storage, inputs):
                moved += sum(tensor.numel() for tensor in (result, *inputs))
            held = {_storage(tensor): tensor.untyped_storage() for tensor in slots.values()}
            sizes = (held[key].nbytes() for key in held.keys() - kept)
            peak = max(peak, sum(sizes) // dtype.itemsize + step.held(*inputs))
            for i in instruction.done:
                del slots[i]
    seconds = constant.work * work + constant.convolved * convolved
    seconds += constant.element * moved + constant.launch * launches
    return Cost(flops, peak, moved, launches, seconds)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
