"""A diagram as shapes, curves and texts: what the backends (matplotlib, TikZ) have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import copysign, hypot
from typing import TypeAlias

from kfac_tn.tn.draw.layout import Layout, Mark
from kfac_tn.tn.draw.placement import Point

Colour: TypeAlias = tuple[int, int, int]

BLACK, GREY, WHITE = (30, 30, 30), (110, 110, 110), (255, 255, 255)

FILLS: dict[str, Colour] = {
    "input": (190, 220, 245),
    "weight": (253, 208, 162),
    "grad_output": (190, 230, 190),
    "operand": (222, 208, 240),
    "pattern": (255, 240, 170),
    "constant": (226, 226, 226),
    "axis": (240, 240, 240),
    "delta": BLACK,
    "hub": (80, 80, 80),
}
"""Colours inside shapes, by operand name or kind; legible in grey and to the colour-blind."""

SHAPES = {
    "input": "rounded",
    "weight": "rectangle",
    "grad_output": "ellipse",
    "operand": "rectangle",
    "pattern": "diamond",
    "constant": "rectangle",
    "axis": "rounded",
    "delta": "ellipse",
    "hub": "ellipse",
}
"""Outlines, by operand name or kind."""

LINE = 0.24
"""Height of a line of text."""

STUB = 0.16
"""Length of an open leg beyond its name."""

MARGIN = 0.25
"""Around a diagram."""


@dataclass(frozen=True)
class Shape:
    """A filled outline.

    Attributes:
        outline: `"rectangle"`, `"rounded"` (a rectangle with round corners), `"ellipse"` or
            `"diamond"`.
        centre: Its centre.
        size: Width and height.
        fill: Colour inside.
        dashed: Whether the edge is dashed.
        edge: Whether there is an edge.
    """

    outline: str
    centre: Point
    size: Point
    fill: Colour
    dashed: bool = False
    edge: bool = True


@dataclass(frozen=True)
class Curve:
    """A line, made of cubic Bezier pieces.

    Attributes:
        points: The start, then two control points and an end per piece.
        width: In points.
    """

    points: tuple[Point, ...]
    width: float = 1.0


@dataclass(frozen=True)
class Text:
    """A text, centred.

    Attributes:
        text: What it says.
        centre: Where.
        colour: Of the letters.
        bold: Whether it is a heading.
    """

    text: str
    centre: Point
    colour: Colour = BLACK
    bold: bool = False


Item: TypeAlias = Shape | Curve | Text


@dataclass(frozen=True)
class Picture:
    """Things to draw, in this order, and the room they need.

    Attributes:
        items: The things.
        bounds: Left, bottom, right and top.
    """

    items: tuple[Item, ...]
    bounds: tuple[float, float, float, float]

    @property
    def size(self) -> Point:
        """Width and height."""
        left, bottom, right, top = self.bounds
        return right - left, top - bottom

    def shifted(self, x: float, y: float) -> Picture:
        """Return the picture at another place."""

        def move(point: Point) -> Point:
            return round(point[0] + x, 3), round(point[1] + y, 3)

        items: list[Item] = []
        for item in self.items:
            if isinstance(item, Curve):
                items.append(replace(item, points=tuple(map(move, item.points))))
            else:
                items.append(replace(item, centre=move(item.centre)))
        left, bottom, right, top = self.bounds
        return Picture(tuple(items), (*move((left, bottom)), *move((right, top))))


def depict(layout: Layout) -> Picture:
    """Turn a layout into a picture: lines first, so that marks lie on them.

    Args:
        layout: The layout.

    Returns:
        The picture, without any text around it.
    """
    items: list[Item] = [*_legs(layout), *_ends(layout)]
    for mark in layout.marks:
        items += _mark(mark)
    xs = [m.x + side * m.width / 2 for m in layout.marks for side in (-1, 1)] or [0.0]
    ys = [m.y + side * m.height / 2 for m in layout.marks for side in (-1, 1)] or [0.0]
    bounds = (min(xs) - MARGIN, min(ys) - MARGIN, max(xs) + MARGIN, max(ys) + MARGIN)
    return Picture(tuple(items), bounds)


def caption(
    picture: Picture, above: Sequence[str], below: Sequence[str], bottom: float, top: float
) -> Picture:
    """Add lines of text.

    Args:
        picture: A picture.
        above: Headings, from top to bottom.
        below: What is written underneath.
        bottom: Where the lines underneath begin.
        top: Where the headings end.

    Returns:
        The picture with the texts, and with room for them.
    """
    left, _, right, _ = picture.bounds
    middle = (left + right) / 2
    texts = [
        Text(line, (middle, top + (at + 0.5) * LINE), bold=True)
        for at, line in enumerate(reversed(above))
    ]
    texts += [
        Text(line, (middle, bottom - (at + 0.5) * LINE), GREY) for at, line in enumerate(below)
    ]
    half = max((0.045 * len(text.text) + 0.1 for text in texts), default=0.0)
    bounds = (
        min(left, middle - half),
        bottom - LINE * (len(below) + 0.2),
        max(right, middle + half),
        top + LINE * len(above),
    )
    return Picture((*picture.items, *texts), bounds)


def _legs(layout: Layout) -> Iterable[Curve]:
    """Lines; the two that meet in an index between two parties bend smoothly there."""
    for at, mark in enumerate(layout.marks):
        here = (mark.x, mark.y)
        ends = [(layout.marks[i].x, layout.marks[i].y) for i in layout.neighbours(at)]
        if mark.kind == "leg":
            start, end = ends
            yield _bend(start, here, end)
        elif mark.kind in ("hub", "sum"):
            yield from (_straight(end, here) for end in ends)
    for a, b in layout.lines:
        if layout.marks[a].is_tensor and layout.marks[b].kind == "axis":
            yield _straight(*((layout.marks[i].x, layout.marks[i].y) for i in (a, b)))


def _straight(start: Point, end: Point) -> Curve:
    between = [
        (round(start[0] + t * (end[0] - start[0]), 3), round(start[1] + t * (end[1] - start[1]), 3))
        for t in (1 / 3, 2 / 3)
    ]
    return Curve((start, *between, end))


def _bend(start: Point, middle: Point, end: Point) -> Curve:
    """A curve through three points that keeps close to the lines between them."""
    along = (end[0] - start[0], end[1] - start[1])
    length = hypot(*along) or 1.0

    def arm(towards: Point, sign: float) -> tuple[Point, Point]:
        reach = 0.35 * hypot(towards[0] - middle[0], towards[1] - middle[1])
        leaves = tuple(middle[i] + sign * reach * along[i] / length for i in (0, 1))
        meets = tuple(towards[i] + 0.4 * (middle[i] - towards[i]) for i in (0, 1))
        rounded = [tuple(round(value, 3) for value in point) for point in (leaves, meets)]
        return rounded[0], rounded[1]  # type: ignore[return-value]

    (before, first), (after, last) = arm(start, -1), arm(end, 1)
    return Curve((start, first, before, middle, after, last, end))


def _ends(layout: Layout) -> Iterable[Curve]:
    """Axes of the result stick out of the picture: the thicker, the more indices they join."""
    for at, mark in enumerate(layout.marks):
        if mark.kind == "axis":
            around = [layout.marks[i] for i in layout.neighbours(at)]
            # Outwards: away from the middle of the picture, and from what the axis belongs to.
            x = mark.x + sum(mark.x - other.x for other in around) / len(around)
            y = mark.y + sum(mark.y - other.y for other in around) / len(around)
            if abs(x) > abs(y):
                tip = (round(mark.x + copysign(mark.width / 2 + STUB, x), 3), mark.y)
            else:
                tip = (mark.x, round(mark.y + copysign(mark.height / 2 + STUB, y), 3))
            joined = mark.text.count(" ") + 1
            yield replace(_straight((mark.x, mark.y), tip), width=1.0 + 1.2 * (joined - 1))


def _mark(mark: Mark) -> Iterable[Shape | Text]:
    """Shape and text of a mark."""
    centre, size = (mark.x, mark.y), (mark.width, mark.height)
    if mark.kind in ("leg", "sum"):
        yield Shape("rectangle", centre, size, WHITE, edge=False)
        yield Text(mark.text, centre)
        return
    copied = mark.text.removesuffix("_2")
    name = copied.removesuffix("_tangent")
    style = name if mark.kind == "operand" and name in FILLS else mark.kind
    yield Shape(SHAPES[style], centre, size, FILLS[style], dashed=name != copied)
    yield Text(mark.text, centre, WHITE if mark.kind in ("hub", "delta") else BLACK)
