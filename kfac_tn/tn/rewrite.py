"""Simplifications. Each takes a network to an equal one, and says when it applies."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from math import prod

from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Delta, Node, Scalar
from kfac_tn.tn.pattern import IndexPattern


def average_first(network: Network) -> Network:
    """Sum index patterns over those of their indices that nothing else holds.

    Condition: an index pattern's index belongs to no other node and not to the result. The sum
    then concerns the pattern alone, and a small matrix (or vector) replaces the binary tensor.
    In KFAC-reduce that index is the output position: averages are taken before any product.
    """

    def rewrite(node: Node) -> Node:
        pattern = node.symbol
        if not isinstance(pattern, IndexPattern):
            return node
        kept: list[tuple[str, ...]] = []
        for letter, (index,) in zip(pattern.axes, node.axes, strict=True):
            if len(network.holders(index)) == 1 and index not in network.output_indices:
                pattern = pattern.sum(letter)
            else:
                kept.append((index,))
        return Node(pattern, tuple(kept))

    return network.with_nodes(map(rewrite, network.nodes))


def prune_deltas(network: Network) -> Network:
    """Remove deltas by calling their two indices by one name.

    Condition: one of the two is no index of the result (so it only exists to be summed over), the
    other one belongs to another node as well, and no node holds both but the delta.
    """
    for at, node in enumerate(network.nodes):
        if not isinstance(node.symbol, Delta):
            continue
        rest = (*network.nodes[:at], *network.nodes[at + 1 :])
        held = [set(other.indices) for other in rest]
        if any(held_by >= set(node.indices) for held_by in held):
            continue
        for gone, kept in (node.indices, node.indices[::-1]):
            if gone not in network.output_indices and any({gone, kept} & h for h in held):
                return network.with_nodes(other.rename({gone: kept}) for other in rest)
    return network


def merge_scalars(network: Network) -> Network:
    """Multiply all scalars into one, and drop it if it is 1. Condition: none."""
    scalars = [node.symbol.value for node in network.nodes if isinstance(node.symbol, Scalar)]
    others = [node for node in network.nodes if not isinstance(node.symbol, Scalar)]
    value = prod(scalars, start=Fraction(1))
    merged = [] if value == 1 else [Node(Scalar(value), ())]
    return network.with_nodes((*others, *merged))


REWRITES: tuple[Callable[[Network], Network], ...] = (prune_deltas, average_first, merge_scalars)
"""The rewrites that `simplify` applies, in this order, until none changes anything."""


@lru_cache(maxsize=1024)
def simplify(network: Network) -> Network:
    """Apply all rewrites until none changes the network.

    Args:
        network: Any network.

    Returns:
        A network with the same operands and the same result.
    """
    while True:
        rewritten = network
        for rewrite in REWRITES:
            rewritten = rewrite(rewritten)
        if rewritten == network:
            return network
        network = rewritten
