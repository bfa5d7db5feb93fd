"""Rewrites from the connectivity of a convolution: what its index patterns amount to.

Kernel and output play the same role in `i = o * stride + k * dilation - padding`, and so do stride
and dilation. The rewrites speak of a pattern's two legs and their distances, and hold for both.

(Dangel 2024, arXiv 2307.02275, section 4 and the appendix on simplifications.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import prod

from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Delta, Node, Ones, Operand, Scalar
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.planner.patterns import pattern_of
from kfac_tn.tn.rewrite.indices import squeezed, without_delta
from kfac_tn.tn.rewrite.rule import rewrite
from kfac_tn.tn.rewrite.views import readers


@rewrite
def average_first(network: Network) -> Iterator[Network]:
    """Sum index patterns over those of their indices that nothing else holds.

    Condition: an index pattern's index belongs to no other node and not to the result. The sum
    then concerns the pattern alone, and a small matrix (or vector) replaces the binary tensor.
    In KFAC-reduce that index is the output position: averages are taken before any product.
    """
    for at, node in enumerate(network.nodes):
        pattern = node.symbol
        if not isinstance(pattern, IndexPattern):
            continue
        kept: list[tuple[str, ...]] = []
        for letter, (index,) in zip(pattern.axes, node.axes, strict=True):
            if len(network.holders(index)) == 1 and index not in network.output_indices:
                pattern = pattern.sum(letter)
            else:
                kept.append((index,))
        if pattern != node.symbol:
            yield _exchange(network, at, Node(pattern, tuple(kept)))


@rewrite
def plain_sums(network: Network) -> Iterator[Network]:
    """Replace a pattern that has been summed to equal entries by ones: what is left is a sum.

    Condition: all entries of its tensor are one number, not zero. In KFAC-reduce of a pointwise
    convolution, every input position is used once.
    """
    for at, node in enumerate(network.nodes):
        pattern = node.symbol
        if isinstance(pattern, IndexPattern) and pattern.summed and (value := pattern.constant):
            sizes = dict(zip(node.indices, pattern.shape, strict=True))
            alone = [index for index in sizes if len(network.holders(index)) == 1]
            rest = [Node(Ones(sizes[index]), ((index,),)) for index in alone]
            if value != 1:
                rest.append(Node(Scalar(Fraction(value)), ()))
            single = [index for index, size in sizes.items() if size == 1]
            yield squeezed(_exchange(network, at, *rest), single)


@rewrite
def merge_patterns(network: Network) -> Iterator[Network]:
    """Replace the second of two equal patterns by a delta.

    Condition: they share all indices but one (or all: then nothing is left of the second), and
    what they share determines it. Both legs determine the input position; the input position and
    one leg determine the other leg, unless a padding mode leads several positions to one.
    """
    for at, node in enumerate(network.nodes):
        if not _selects(node):
            continue
        for other in network.nodes[:at]:
            if other.symbol != node.symbol:
                continue
            pairs = list(zip(other.indices, node.indices, strict=True))
            differing = [place for place, (a, b) in enumerate(pairs) if a != b]
            if len(differing) > 1:
                continue
            if not differing:
                yield _exchange(network, at)
                continue
            (place,) = differing
            first, second = pairs[place]
            if place < len(pairs) - 1 and pattern_of(node).wraps:
                continue
            delta = Node(Delta(network.size[first]), ((second,), (first,)))
            yield from _pruned(_exchange(network, at, delta))


@rewrite
def tile(network: Network) -> Iterator[Network]:
    """Replace a pattern whose windows lie side by side by composite axes: a reshape.

    The input index becomes two, window and position in the window. If the windows fill the input
    (a dense convolution: stride = kernel size; or dilation = output size), these are output and
    kernel position, and the pattern is gone. If they leave gaps (a down-sampling one), the kernel
    selects some of the positions in a window, which is a slice.

    Condition: no padding, windows that do not overlap, and an input of exactly as many strides as
    there are windows. All patterns at this input are of this kind, with windows of one size, and
    only operands and the result hold its index besides. Gaps in what `view_operands` can view are
    left to it.
    """
    for index in network.size:
        patterns = {
            at: network.nodes[at]
            for at in network.holders(index)
            if not isinstance(network.nodes[at].symbol, Operand)
        }
        if not patterns or not all(
            _selects(n) and n.indices[-1] == index and index not in n.indices[:-1]
            for n in patterns.values()
        ):
            continue
        tilings = [_tiling(pattern_of(node)) for node in patterns.values()]
        first = tilings[0]
        if first is None or any(t is None or t[1:] != first[1:] for t in tilings):
            continue
        if _has_gaps_in_view(network, index):
            continue
        digits = _fresh(network, index, len(first[1]))
        nodes: list[Node] = []
        for at, node in enumerate(network.nodes):
            if at not in patterns:
                nodes.append(_split(node, index, digits))
                continue
            tiling = tilings[list(patterns).index(at)]
            assert tiling is not None
            nodes += _tiles(node, tiling[0], dict(zip(digits, first[1], strict=True)))
        output = [
            tuple(n for i in axis for n in (digits if i == index else (i,)))
            for axis in network.output
        ]
        sizes = {**network.size, **dict(zip(digits, first[1], strict=True))}
        legs = next(iter(patterns.values())).indices
        names = {digit: legs[at] for digit, at in zip(digits, first[0], strict=True)}
        for pruned in _pruned(Network.build(nodes, output, sizes)):
            yield _rename(pruned, names)


def _has_gaps_in_view(network: Network, index: str) -> bool:
    """Whether `view_operands` views an operand through the pattern at an index, less its gaps."""
    found = [node for at in network.holders(index) for node in readers(network, at).values()]
    patterns = [pattern_of(node) for node in found if node.indices[-1] == index]
    return any(prod(size for size, _ in p.legs) < p.input_size for p in patterns)


def _tiling(pattern: IndexPattern) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Legs of a pattern, slowest first, and the sizes of the digits that they are of the input."""
    legs = pattern.legs
    if pattern.padding > 0 or pattern.wraps:
        return None
    if len(legs) == 1:
        ((size, distance),) = legs
        exact = size == pattern.input_size and (distance == 1 or size == 1) and not pattern.padding
        return ((0,), (size,)) if exact else None
    for slow, fast in ((0, 1), (1, 0)):
        (windows, width), (size, distance) = legs[slow], legs[fast]
        fits = (size - 1) * distance - pattern.padding < width
        if fits and pattern.input_size == windows * width:
            return (slow, fast), (windows, width)
    return None


def _tiles(node: Node, order: tuple[int, ...], digits: dict[str, int]) -> list[Node]:
    """What a pattern says about the digits of its input."""
    pattern = pattern_of(node)
    tiles = []
    for (digit, size), at in zip(digits.items(), order, strict=True):
        leg, (count, distance) = node.indices[at], pattern.legs[at]
        if count == size:
            tiles.append(Node(Delta(size), ((leg,), (digit,))))
        else:
            crop = IndexPattern(count, 1, size, 1, distance, pattern.padding, summed="o")
            tiles.append(Node(crop, ((leg,), (digit,))))
    return tiles


@rewrite
def trim(network: Network) -> Iterator[Network]:
    """Leave out kernel and output positions that see nothing but zeros around the input.

    A 3x3 kernel over one padded pixel, say, multiplies with its centre alone.

    Condition: the first or the last positions of a pattern's leg meet no input position. Operands
    are then sliced, and the result is padded with zeros.
    """
    for node in network.nodes:
        if not _selects(node) or pattern_of(node).padding_mode != "zeros":
            continue
        for at, index in enumerate(node.indices[:-1]):
            alive = _alive(pattern_of(node), at)
            if 0 < len(alive) < network.size[index]:
                yield _trim(network, index, alive)


def _alive(pattern: IndexPattern, at: int) -> range:
    """From the first to the last position of a leg that meet the input."""
    (size, distance), *others = pattern.legs[at], *pattern.legs[:at], *pattern.legs[at + 1 :]
    ((other, step),) = others or [(1, 1)]

    def alive(position: int) -> bool:
        start = position * distance - pattern.padding
        first = max(0, -(start // step))
        return first < other and start + first * step < pattern.input_size

    first, last = 0, size - 1
    while first <= last and not alive(first):
        first += 1
    while last >= first and not alive(last):
        last -= 1
    return range(first, last + 1)


def _trim(network: Network, index: str, alive: range) -> Network:
    (trimmed,) = _fresh(network, index, 1)
    nodes, whole = [], index in network.output_indices
    for node in network.nodes:
        if _selects(node) and index in node.indices[:-1]:
            at = node.indices.index(index)
            nodes.append(
                Node(_restrict(pattern_of(node), at, alive), node.axes).rename({index: trimmed})
            )
        else:
            whole = whole or index in node.indices
            nodes.append(node)
    if whole:
        crop = IndexPattern(1, len(alive), network.size[index], padding=-alive.start, summed="k")
        nodes.append(Node(crop, ((trimmed,), (index,))))
    sizes = {**network.size, trimmed: len(alive)}
    return _rename(Network.build(nodes, network.output, sizes), {trimmed: index})


def _restrict(pattern: IndexPattern, at: int, alive: range) -> IndexPattern:
    padding = pattern.padding - alive.start * pattern.legs[at][1]
    if pattern.axes[at] == "k":
        return replace(pattern, padding=padding, kernel_size=len(alive))
    return replace(pattern, padding=padding, output_size=len(alive))


# ---- small helpers -----------------------------------------------------------------------------


def _pruned(network: Network) -> Iterator[Network]:
    """The network without those of its deltas that can go: they would cost more than patterns."""
    for at, node in enumerate(network.nodes):
        if isinstance(node.symbol, Delta):
            for pruned in without_delta(network, at):
                yield from _pruned(pruned)
                return
    yield network


def _exchange(network: Network, at: int, *nodes: Node) -> Network:
    return network.with_nodes((*network.nodes[:at], *nodes, *network.nodes[at + 1 :]))


def _split(node: Node, index: str, digits: tuple[str, ...]) -> Node:
    axes = (tuple(n for i in axis for n in (digits if i == index else (i,))) for axis in node.axes)
    return Node(node.symbol, tuple(axes))


def _fresh(network: Network, index: str, count: int) -> tuple[str, ...]:
    """New names for what an index is replaced by."""
    names: list[str] = []
    while len(names) < count:
        index += "~"
        if index not in network.size:
            names.append(index)
    return tuple(names)


def _rename(network: Network, names: dict[str, str]) -> Network:
    """Rename indices that the network has by names that it hasn't."""
    free = {a: b for a, b in names.items() if a in network.size and b not in network.size}
    return network.rename(free)


def _selects(node: Node) -> bool:
    return isinstance(node.symbol, IndexPattern) and node.symbol.selects
