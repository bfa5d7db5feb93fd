"""The rewrite that reads operands in part: slices and windows of them are views."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Axes, Constant, Node, Operand
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.planner.patterns import pattern_of
from kfac_tn.tn.rewrite.rule import rewrite


@rewrite
def view_operands(network: Network) -> Iterator[Network]:
    """Read operands through patterns: each is then a view of a part of its tensor.

    So are convolutions whose last windows leave a remainder of the input, down-sampling ones,
    strided pointwise ones, and what `trim` leaves of a kernel. Evaluation views operands through
    many more patterns; this is for whom it doesn't help: `Network.einsum` then slices and reshapes
    the operand, and the equation is without the pattern.

    Condition: a pattern reaches for nothing outside of the input (no padding), and for no position
    twice, so that the view is no larger than the operand. Its input is an axis of one operand, and
    an index of nothing else; its legs are no indices of this operand, but of something else: not
    just there to be summed over, which is done best before.

    Other patterns stay: of windows that overlap or are padded, and those at the result (the input's
    VJP of windows with a remainder, say), around whose parts there are zeros, which an equation
    can't put there.

    Example:
        >>> from kfac_tn import tn
        >>> print(view_operands(tn.forward(tn.ConvSpec((8, 4, 7), (5, 4, 2), stride=2))))
        part of input[n (g c) k1 o1] weight[(g d) c k1] -> [n (g d) o1]
        c=4 d=5 g=1 k1=2 n=8 o1=3
    """
    for at, node in enumerate(network.nodes):
        if not (found := readers(network, at)):
            continue
        assert isinstance(node.symbol, Operand)
        patterns = tuple((axis, pattern_of(reader)) for axis, reader in found.items())
        axes: Axes = ()
        for axis, indices in enumerate(node.axes):
            axes += found[axis].axes[:-1] if axis in found else (indices,)
        part = Node(Operand(node.symbol.name, patterns), axes)
        nodes = (part if other is node else other for other in network.nodes)
        yield network.with_nodes(other for other in nodes if other not in found.values())


def readers(network: Network, at: int) -> dict[int, Node]:
    """The nodes with patterns through which axes of a node can be viewed.

    Args:
        network: The network.
        at: Position of the node, which may hold anything.

    Returns:
        Of `view_operands`, what its condition holds for; nothing if the node is no whole operand.
    """
    node = network.nodes[at]
    found: dict[int, Node] = {}
    if not isinstance(node.symbol, Operand) or node.symbol.patterns:
        return found
    taken = set(node.indices)
    for axis, indices in enumerate(node.axes):
        holders = {i for index in indices for i in network.holders(index)} - {at}
        if len(indices) != 1 or len(holders) != 1 or indices[0] in network.output_indices:
            continue
        reader = network.nodes[holders.pop()]
        legs = set(reader.indices[:-1])
        alone = {leg for leg in legs if len(network.holders(leg)) == 1}
        if (
            _is_view(reader.symbol)
            and reader.indices[-1:] == indices
            and not legs & taken  # of two patterns that share a leg, one can bring it
            and alone <= set(network.output_indices)
        ):
            found[axis] = reader
            taken |= legs
    return found


def _is_view(symbol: Operand | Constant) -> bool:
    """Whether it is a pattern that reaches for positions inside only, and for each at most once."""
    if not (isinstance(symbol, IndexPattern) and symbol.selects and max(symbol.overhang) <= 0):
        return False
    (size, distance), (count, step) = (*symbol.legs, (1, 1))[:2]
    # Two ways to one position differ by so many steps of the one leg, and so many of the other.
    common = gcd(distance, step)
    return step // common >= size or distance // common >= count
