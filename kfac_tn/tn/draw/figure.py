"""Pictures as SVG and PNG files, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kfac_tn.tn.draw.picture import BLACK, Colour, Curve, Item, Picture, Shape

RESOLUTION = 200
"""Dots per inch of PNG files."""


def save(picture: Picture, path: Path) -> None:
    """Write a picture to a file, of the kind that its ending names. Equal pictures, equal files.

    Args:
        picture: The picture.
        path: The file; its folder is made if need be.

    Raises:
        ImportError: If matplotlib isn't installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing to a file needs matplotlib: pip install matplotlib "
            "(network.to_tikz() does without)"
        ) from error
    # Text stays text in SVG (searchable, small), with ids that don't depend on time or chance.
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kfac_tn",
        "font.family": "DejaVu Sans",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=picture.size, facecolor="white")
        FigureCanvasAgg(figure)
        left, bottom, right, top = picture.bounds
        axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
        axes.set_axis_off()
        for order, item in enumerate(picture.items):
            _add(axes, item, order)
        path.parent.mkdir(parents=True, exist_ok=True)
        undated = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=RESOLUTION, metadata=undated)


def _add(axes: Any, item: Item, order: int) -> None:
    from matplotlib import patches
    from matplotlib.path import Path as Outline

    if isinstance(item, Curve):
        codes = [Outline.MOVETO] + [Outline.CURVE4] * (len(item.points) - 1)
        style = {"fill": False, "edgecolor": _colour(BLACK), "capstyle": "butt"}
        outline = Outline(item.points, codes)
        axes.add_patch(patches.PathPatch(outline, lw=item.width, zorder=order, **style))
    elif isinstance(item, Shape):
        (x, y), (width, height) = item.centre, item.size
        corner = (x - width / 2, y - height / 2)
        patch: Any
        if item.outline == "ellipse":
            patch = patches.Ellipse(item.centre, width, height)
        elif item.outline == "diamond":
            corners = ((x - width / 2, y), (x, y + height / 2), (x + width / 2, y))
            patch = patches.Polygon((*corners, (x, y - height / 2)), closed=True)
        elif item.outline == "rounded":
            rounded = patches.BoxStyle.Round(pad=0, rounding_size=4 / 72)
            patch = patches.FancyBboxPatch(corner, width, height, boxstyle=rounded)
        else:
            patch = patches.Rectangle(corner, width, height)
        patch.set(facecolor=_colour(item.fill), zorder=order, linewidth=1.0)
        patch.set_edgecolor(_colour(BLACK) if item.edge else "none")
        patch.set_linestyle("--" if item.dashed else "-")
        axes.add_patch(patch)
    else:
        axes.text(
            *item.centre,
            item.text,
            color=_colour(item.colour),
            fontsize=10,
            fontweight="bold" if item.bold else "normal",
            ha="center",
            va="center_baseline",
            zorder=order,
            parse_math=False,
        )


def _colour(colour: Colour) -> tuple[float, ...]:
    return tuple(value / 255 for value in colour)
