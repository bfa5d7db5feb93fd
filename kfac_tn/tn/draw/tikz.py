"""Pictures as TikZ code."""

from __future__ import annotations

from kfac_tn.tn.draw.picture import BLACK, Colour, Curve, Item, Picture, Text
from kfac_tn.tn.draw.placement import Point

SYMBOLS = {
    "Σ": r"$\Sigma$",
    "Π": r"$\Pi$",
    "δ": r"$\delta$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "ₖ": "$_k$",
    "ₒ": "$_o$",
    "ᵢ": "$_i$",
    **{character: f"\\{character}" for character in "_&%#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
"""What TeX wants written differently."""

STANDALONE = r"""\documentclass{standalone}
\usepackage{tikz}
\begin{document}
%s\end{document}
"""


def tikz(picture: Picture) -> str:
    """Write a picture as a `tikzpicture` environment that needs nothing but TikZ itself.

    Args:
        picture: The picture.

    Returns:
        The code, one line per item.
    """
    lines = [r"\begin{tikzpicture}[x=1in, y=1in, every node/.style={font=\small, inner sep=0pt}]"]
    for item in picture.items:
        lines.append(f"  {_item(item)}")
    return "\n".join([*lines, r"\end{tikzpicture}", ""])


def escape(text: str) -> str:
    """Write a text so that TeX prints it."""
    return "".join(SYMBOLS.get(character, character) for character in text)


def _item(item: Item) -> str:
    if isinstance(item, Text):
        weight = r"\bfseries " if item.bold else ""
        label = f"{{{weight}{escape(item.text)}}}"
        return rf"\node[text={_colour(item.colour)}] at {_at(item.centre)} {label};"
    if isinstance(item, Curve):
        start, *rest = item.points
        path = _at(start)
        for first, second, end in zip(*[iter(rest)] * 3, strict=True):
            path += f" .. controls {_at(first)} and {_at(second)} .. {_at(end)}"
        return rf"\draw[draw={_colour(BLACK)}, line width={item.width:g}pt] {path};"
    options = f"fill={_colour(item.fill)}"
    if item.edge:
        options += f", draw={_colour(BLACK)}, line width=1pt"
    if item.dashed:
        options += ", dashed"
    (x, y), (width, height) = item.centre, (item.size[0] / 2, item.size[1] / 2)
    left, right, bottom, top = x - width, x + width, y - height, y + height
    if item.outline == "ellipse":
        path = f"{_at((x, y))} ellipse [x radius={width:.3f}, y radius={height:.3f}]"
    elif item.outline == "diamond":
        corners = ((left, y), (x, top), (right, y), (x, bottom))
        path = " -- ".join(map(_at, corners)) + " -- cycle"
    else:
        path = f"{_at((left, bottom))} rectangle {_at((right, top))}"
        options += ", rounded corners=4pt" if item.outline == "rounded" else ""
    return rf"\path[{options}] {path};"


def _at(point: Point) -> str:
    # Adding 0 turns a negative zero, which would tell nothing, into a plain one.
    return f"({round(point[0], 3) + 0.0:.3f},{round(point[1], 3) + 0.0:.3f})"


def _colour(colour: Colour) -> str:
    red, green, blue = colour
    return f"{{rgb,255:red,{red};green,{green};blue,{blue}}}"
