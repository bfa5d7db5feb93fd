"""Evaluation within a limit of memory: in pieces along one index, one after the other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Operand
from kfac_tn.tn.plan import ALGORITHM, Recipe, contraction, recipe


def evaluate_in_pieces(
    network: Network,
    operands: Mapping[str, Tensor],
    memory_limit: int,
    algorithm: str | None = None,
) -> Tensor:
    """Evaluate a network, in pieces if it would take too much memory at once.

    Along an index that is summed over, the results of the pieces are added; along an index of the
    result they are put side by side.

    Args:
        network: The network.
        operands: Its operands.
        memory_limit: Most elements to be held at once, counted as `Network.peak_memory`. Tensors
            that autograd keeps for the backward pass are not counted.
        algorithm: As for `Network.evaluate`.

    Returns:
        The result.

    Raises:
        ValueError: If no index can be divided far enough.
    """
    preferred = os.environ.get(ALGORITHM)
    index, size = _division(network, memory_limit, algorithm, preferred)

    def evaluate(network: Network, operands: Mapping[str, Tensor]) -> Tensor:
        steps = _recipe(network, algorithm, preferred)
        return network.evaluate(algorithm=steps.algorithm, **operands)

    if index is None:
        return evaluate(network, operands)
    axes = {n.symbol.name: n.axes for n in network.nodes if isinstance(n.symbol, Operand)}
    summed = index not in network.output_indices
    total: Tensor | None = None
    results = []
    for start in range(0, network.size[index], size):
        count = min(size, network.size[index] - start)
        piece = {
            name: tensor.narrow(axes[name].index((index,)), start, count)
            if (index,) in axes[name]
            else tensor
            for name, tensor in operands.items()
        }
        result = evaluate(_resize(network, index, count), piece)
        if summed:
            total = result if total is None else total + result
        else:
            results.append(result)
    return torch.cat(results, network.output.index((index,))) if total is None else total


def _recipe(network: Network, algorithm: str | None, preferred: str | None) -> Recipe:
    """Steps whose memory is known step by step, unless an algorithm is wanted.

    Args:
        network: The network.
        algorithm: As for `Network.evaluate`.
        preferred: Name of the algorithm to take where it applies, by the environment.
    """
    if algorithm is None and preferred is None:
        return contraction(network)
    found = recipe(network, algorithm=algorithm)
    return found if found.algorithm in (algorithm, preferred) else contraction(network)


@lru_cache(maxsize=512)
def _division(
    network: Network,
    memory_limit: int,
    algorithm: str | None = None,
    preferred: str | None = None,
) -> tuple[str | None, int]:
    """The index along which the fewest pieces are needed, and its size in a piece."""
    least = _recipe(network, algorithm, preferred).cost.peak_memory
    if least <= memory_limit:
        return None, 0
    results = 2 * prod(network.shape)  # of the pieces so far, and of them all
    best: tuple[int, str, int] | None = None
    for index, full in network.sizes:
        if not _divisible(network, index):
            continue
        size = full
        while size > 1:
            size = -(-size // 2)
            piece = _recipe(_resize(network, index, size), algorithm, preferred)
            peak = piece.cost.peak_memory + results
            least = min(least, peak)
            if peak <= memory_limit:
                best = min(filter(None, (best, (-(-full // size), index, size))))
                break
    if best is None:
        raise ValueError(
            f"memory_limit={memory_limit:,} elements is too little: divided along any one index, "
            f"this network takes {least:,}"
        )
    return best[1:]


def _divisible(network: Network, index: str) -> bool:
    """Whether an index is an axis of its own in all that holds it, and no constant does.

    An operand in several nodes must be divided alike in all of them.
    """
    symbols = {network.nodes[at].symbol for at in network.holders(index)}
    nodes = [node for node in network.nodes if node.symbol in symbols]
    places = {
        (node.symbol, node.axes.index((index,)) if (index,) in node.axes else None)
        for node in nodes
    }
    return (
        all(isinstance(symbol, Operand) for symbol in symbols)
        and all((index,) in node.axes for node in nodes)
        and len(places) == len(symbols)
        and (index not in network.output_indices or (index,) in network.output)
    )


def _resize(network: Network, index: str, size: int) -> Network:
    return Network.build(network.nodes, network.output, {**network.size, index: size})
