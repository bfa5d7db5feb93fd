"""Rewrites that leave fewer indices and fewer nodes, whatever the network is of."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fractions import Fraction
from itertools import pairwise
from math import prod

from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Axes, Delta, Node, Ones, Operand, Scalar
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.rewrite.rule import rewrite


@rewrite
def prune_deltas(network: Network) -> Iterator[Network]:
    """Remove deltas by calling their two indices by one name.

    Condition: one of the two is no index of the result (so it only exists to be summed over), the
    other one belongs to another node as well, and no node holds both but the delta.
    """
    for at, node in enumerate(network.nodes):
        if isinstance(node.symbol, Delta):
            yield from without_delta(network, at)


def without_delta(network: Network, at: int) -> Iterator[Network]:
    """The network without one of its deltas, if the condition of `prune_deltas` holds."""
    first, second = network.nodes[at].indices
    rest = (*network.nodes[:at], *network.nodes[at + 1 :])
    held = [set(other.indices) for other in rest]
    if any({first, second} <= h for h in held) or not any({first, second} & h for h in held):
        return
    for gone, kept in ((first, second), (second, first)):
        if gone not in network.output_indices:
            yield network.with_nodes(other.rename({gone: kept}) for other in rest)
            return


@rewrite
def prune_ones(network: Network) -> Iterator[Network]:
    """Remove vectors of ones.

    Condition: another node holds the index, or the result does not (the sum is its size, then).
    """
    for at, node in enumerate(network.nodes):
        if not isinstance(node.symbol, Ones):
            continue
        rest = (*network.nodes[:at], *network.nodes[at + 1 :])
        (index,) = node.indices
        if any(index in other.indices for other in rest):
            yield network.with_nodes(rest)
        elif index not in network.output_indices:
            yield network.with_nodes((*rest, Node(Scalar(Fraction(node.symbol.size)), ())))


@rewrite
def merge_scalars(network: Network) -> Iterator[Network]:
    """Multiply all scalars into one, and drop it if it is 1. Condition: none."""
    scalars = [node.symbol.value for node in network.nodes if isinstance(node.symbol, Scalar)]
    others = [node for node in network.nodes if not isinstance(node.symbol, Scalar)]
    value = prod(scalars, start=Fraction(1))
    merged = [] if value == 1 else [Node(Scalar(value), ())]
    if len(merged) < len(scalars):
        yield network.with_nodes((*others, *merged))


@rewrite
def squeeze(network: Network) -> Iterator[Network]:
    """Remove indices of size 1: one group, a batch of one example, a kernel of one position.

    A pattern whose kernel has one position is then a slice: a pointwise convolution; one with one
    output position selects what the kernel covers: a kernel of full size.

    Condition: the index is not all that an axis of the result consists of; if it is, one of its
    nodes keeps it.
    """
    single = [index for index, size in network.sizes if size == 1]
    yield squeezed(network, single)
    if len(single) > 1:
        for index in single:
            yield squeezed(network, [index])


def squeezed(network: Network, gone: Collection[str]) -> Network:
    """The network without some indices of size 1, but for those that an axis consists of."""
    output = [tuple(i for i in axis if i not in gone) or axis[:1] for axis in network.output]
    kept = {index for axis in output for index in axis}
    nodes = []
    # Operands first: of an index that stays, they are the better holders.
    order = sorted(network.nodes, key=lambda node: not isinstance(node.symbol, Operand))
    keepers = {i: next(n for n in order if i in n.indices) for i in gone if i in kept}
    for node in network.nodes:
        drop = {i for i in node.indices if i in gone and keepers.get(i) is not node}
        # Equal nodes are one object to `is` at times: then both keep the index, which is no harm.
        nodes += _squeeze_node(node, drop) if drop else [node]
    return Network.build(nodes, output, network.size)


def _squeeze_node(node: Node, drop: Collection[str]) -> list[Node]:
    axes: Axes = tuple(tuple(i for i in axis if i not in drop) for axis in node.axes)
    symbol = node.symbol
    if isinstance(symbol, Operand):
        return [Node(symbol, axes)]
    left = tuple(axis for axis in axes if axis)
    if isinstance(symbol, IndexPattern):
        for letter, axis in zip(symbol.axes, axes, strict=True):
            symbol = symbol if axis else symbol.sum(letter)
        return [Node(symbol, left)]
    if isinstance(symbol, Ones | Delta):
        return [Node(Ones(1), left)] if left else []
    return [node]  # somebody else's constant: it has the shape it has


@rewrite
def merge_indices(network: Network) -> Iterator[Network]:
    """Make one index of two that always occur together.

    Condition: in every node that holds one of them, and in the result if it does, the second
    follows the first within one axis. Constants have one index per axis: they hold neither.
    """
    tensors = [*(node.axes for node in network.nodes), network.output]
    for axes in tensors:
        for axis in axes:
            for first, second in pairwise(axis):
                if all(_adjacent(first, second, other) for other in tensors):
                    yield _merge(network, first, second)


def _adjacent(first: str, second: str, axes: Axes) -> bool:
    """Whether a tensor holds two indices one after the other in an axis, or none of them."""
    for axis in axes:
        if first in axis or second in axis:
            return (first, second) in pairwise(axis)
    return True


def _merge(network: Network, first: str, second: str) -> Network:
    name = first + second
    while name in network.size:
        name += "'"

    def merge(axes: Axes) -> Axes:
        names = {first: (name,), second: ()}
        return tuple(tuple(n for i in axis for n in names.get(i, (i,))) for axis in axes)

    return Network.build(
        [Node(node.symbol, merge(node.axes)) for node in network.nodes],
        merge(network.output),
        {**network.size, name: network.size[first] * network.size[second]},
    )
