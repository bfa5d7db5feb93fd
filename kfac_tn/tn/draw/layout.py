"""The parts of a tensor network's diagram and where they go, whoever draws them.

A diagram has marks (the tensors, the indices and the axes of the result) and lines between them. An
index is a mark too: so its name has a place of its own, on its leg, and an index that many tensors
hold is laid out like one that two hold. Lengths are inches, for text of 10 points.

The symmetries of a network are those of its picture: two copies mirror each other, and so do
spatial dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

from kfac_tn.tn.draw.placement import Point, Search, Symmetry
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Delta, Node, Operand, Scalar, format_axes
from kfac_tn.tn.pattern import IndexPattern

LEG = 0.54
"""Preferred distance of a tensor and an index on its leg."""

CROWD = 22
"""Number of lines beyond which a diagram needs more room for each."""

SUBSCRIPTS = {"k": "ₖ", "o": "ₒ", "i": "ᵢ"}
"""Axes of an index pattern, as they are written under the sum over them."""


@dataclass(frozen=True)
class Mark:
    """A part of a diagram.

    Attributes:
        kind: `"operand"`, `"pattern"`, `"delta"` or `"constant"` for tensors; for indices `"leg"`
            between two parties, `"hub"` between more, and `"sum"` if one tensor alone holds it and
            it is summed over; `"axis"` for an axis of the result.
        text: What is written on it.
        x: Centre, to the right.
        y: Centre, upwards.
    """

    kind: str
    text: str
    x: float = 0.0
    y: float = 0.0

    @property
    def is_tensor(self) -> bool:
        """Whether this is a node of the network."""
        return self.kind in ("operand", "pattern", "delta", "constant")

    @property
    def width(self) -> float:
        """Width of the box around shape and text."""
        margin = {"operand": 0.24, "pattern": 0.3, "constant": 0.2, "axis": 0.16, "hub": 0.14}
        return max(0.088 * len(self.text) + margin.get(self.kind, 0.04), self.height)

    @property
    def height(self) -> float:
        """Height of the box around shape and text."""
        return {"operand": 0.32, "pattern": 0.36, "constant": 0.3}.get(self.kind, 0.22)


@dataclass(frozen=True)
class Layout:
    """A diagram, ready to be drawn.

    Attributes:
        marks: Tensors, indices and axes of the result, with their places.
        lines: Pairs of positions in `marks` that a line connects.
        caption: The axes of the result in their order, and the network's scalar factor.
    """

    marks: tuple[Mark, ...]
    lines: tuple[tuple[int, int], ...]
    caption: str

    def neighbours(self, at: int) -> list[int]:
        """The marks that a line connects with a mark."""
        return [b if a == at else a for a, b in self.lines if at in (a, b)]


def arrange(network: Network) -> Layout:
    """Find the layout of a network's diagram. The same network has the same layout.

    Args:
        network: Any network.

    Returns:
        Its layout. No two marks overlap.
    """
    graph = _Graph(network)
    search = Search(
        sizes=tuple((mark.width, mark.height) for mark in graph.marks),
        lines=tuple(graph.lines),
        rim=tuple(at for at, mark in enumerate(graph.marks) if mark.kind == "axis"),
        symmetries=tuple(graph.symmetries()),
        leg=LEG * max(1.0, (len(graph.lines) / CROWD) ** 0.5),
    )
    places = search.place() if graph.marks else ()
    flipped = zip(graph.marks, _read_on(graph.marks, places), strict=True)
    marks = [replace(mark, x=x, y=y) for mark, (x, y) in flipped]
    scalars = [node.symbol.value for node in network.nodes if isinstance(node.symbol, Scalar)]
    factor = prod(scalars, start=Fraction(1))
    caption = f"{'' if factor == 1 else f'{factor} · '}[{format_axes(network.output)}]"
    return Layout(tuple(marks), tuple(graph.lines), caption)


def _read_on(marks: Sequence[Mark], places: Sequence[Point]) -> list[Point]:
    """Mirror a picture so that it is read from left to right and from top to bottom."""

    def trend(coordinate: int, *kinds: str) -> float:
        order = [xy[coordinate] for m, xy in zip(marks, places, strict=True) if m.kind in kinds]
        return sum((at - (len(order) - 1) / 2) * value for at, value in enumerate(order))

    x = -1.0 if trend(0, "operand") < 0 else 1.0
    y = -1.0 if (trend(1, "pattern") or trend(1, "operand")) > 0 else 1.0
    return [(x * left, y * up) for left, up in places]


class _Graph:
    """Marks, lines and symmetries of a network. Keys: nodes by position, indices, sets of them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.marks: list[Mark] = []
        self.lines: list[tuple[int, int]] = []
        self.keys: dict[int | str | frozenset[str], int] = {}
        for at, node in enumerate(network.nodes):
            if not isinstance(node.symbol, Scalar):
                self._add(at, _tensor(node))
        for axis in network.output:
            self._add(frozenset(axis), Mark("axis", format_axes((axis,))))
        for index in network.size:
            self._add_index(index)

    def _add(self, key: int | str | frozenset[str], mark: Mark) -> int:
        self.keys[key] = len(self.marks)
        self.marks.append(mark)
        return self.keys[key]

    def _add_index(self, index: str) -> None:
        ends = [self.keys[at] for at in self.network.holders(index)]
        ends += [self.keys[frozenset(axis)] for axis in self.network.output if index in axis]
        if len(ends) == 2 and frozenset([index]) in self.keys:
            self.lines.append((ends[0], ends[1]))  # the axis bears the index's name already
            return
        kind = {1: "sum", 2: "leg"}.get(len(ends), "hub")
        mark = self._add(index, Mark(kind, f"Σ {index}" if kind == "sum" else index))
        self.lines += [(end, mark) for end in ends]

    def symmetries(self) -> list[tuple[Symmetry, ...]]:
        """Sets of symmetries that the picture may have."""
        names = self.network.size

        def swap_copies(index: str) -> str:
            return index[:-1] if index.endswith("'") else f"{index}'"

        numbers = [int(match[0]) for match in map(re.compile(r"\d+").search, names) if match]

        def reverse_dimensions(index: str) -> str:
            return re.sub(r"\d+", lambda match: str(max(numbers) + 1 - int(match[0])), index)

        copies, dimensions = self._image(swap_copies), self._image(reverse_dimensions)
        # What two copies share lies between them; what dimensions share needs its own room.
        across = [Symmetry(copies, at, self._kinds("leg")) for at in (0, 1)] if copies else []
        along = [Symmetry(dimensions, at, self._kinds()) for at in (1, 0)] if dimensions else []
        if across and along:
            return [*zip(across, along, strict=True), *((one,) for one in (*across, along[0]))]
        return [(one,) for one in (*across[:1], *along[:1])] or [()]

    def _kinds(self, *kinds: str) -> tuple[bool, ...]:
        return tuple(mark.is_tensor or mark.kind in kinds for mark in self.marks)

    def _image(self, rename: Callable[[str], str]) -> tuple[int, ...] | None:
        """Where each mark goes if indices are renamed; None unless the network stays the same."""
        names = {i: rename(i) if rename(i) in self.network.size else i for i in self.network.size}
        nodes: dict[tuple[str, frozenset[str]], int] = {}
        for at, node in enumerate(self.network.nodes):
            nodes[_family(node), frozenset(node.indices)] = at
        image = []
        for key in self.keys:
            moved: int | str | frozenset[str] | None
            if isinstance(key, int):
                node = self.network.nodes[key]
                moved = nodes.get((_family(node), frozenset(names[i] for i in node.indices)))
            else:
                moved = names[key] if isinstance(key, str) else frozenset(names[i] for i in key)
            if moved not in self.keys:
                return None
            image.append(self.keys[moved])
        involution = all(image[other] == at for at, other in enumerate(image))
        return tuple(image) if involution and image != sorted(image) else None


def _tensor(node: Node) -> Mark:
    """The mark of a node."""
    symbol = node.symbol
    if isinstance(symbol, IndexPattern):
        summed = "".join(SUBSCRIPTS[axis] for axis in symbol.summed)
        return Mark("pattern", f"Σ{summed}Π" if summed else "Π")
    if isinstance(symbol, Delta):
        return Mark("delta", "δ")
    return Mark("operand" if isinstance(symbol, Operand) else "constant", str(symbol))


def _family(node: Node) -> str:
    """What nodes that a symmetry exchanges have in common; not sizes, which are in no picture."""
    return re.sub(r"_2$", "", str(node.symbol))
