r"""Diagrams of tensor networks (after the notation of Dangel 2024, arXiv 2307.02275, section 2).

A tensor is a shape, an index a line: what shares a line is multiplied and, unless the line leaves
the picture, summed over. Rounded boxes are inputs, rectangles weights, ellipses output gradients;
dashed ones are tangents; diamonds are index patterns (`ΣₒΠ`: summed over output positions), black
discs identities (`δ`). An index of more than two parties meets in a grey disc. Axes of the result
are the lines that end at the rim; one that joins several indices, as `(c k1 k2)` in einops, ends in
a thicker stroke. Below the diagram: the scalar factor, and the axes of the result in their order.

Example:
    >>> from kfac_tn import tn
    >>> spec = tn.ConvSpec(input_shape=(2, 3, 8), weight_shape=(4, 3, 3), padding=1)
    >>> code = tn.forward(spec).to_tikz()
    >>> code.splitlines()[0]
    '\\begin{tikzpicture}[x=1in, y=1in, every node/.style={font=\\small, inner sep=0pt}]'
    >>> [name for name in ("input", "weight", "i1", "(g d)") if f"{{{name}}}" in code]
    ['input', 'weight', 'i1', '(g d)']
    >>> tn.forward(spec).draw("convolution.pdf")
    Traceback (most recent call last):
    ...
    ValueError: cannot draw 'convolution.pdf': its ending must be .svg or .png (LaTeX: to_tikz)
"""

from __future__ import annotations

import os
from pathlib import Path

from kfac_tn.tn.draw.layout import arrange
from kfac_tn.tn.draw.picture import Picture, Text, caption, depict
from kfac_tn.tn.draw.tikz import STANDALONE, tikz
from kfac_tn.tn.network import Network

ENDINGS = (".svg", ".png")

GAP = 0.5
"""Between two diagrams side by side."""


def draw(network: Network, path: str | os.PathLike[str], *, simplified: bool = False) -> Path:
    """Draw a network's diagram into an SVG or PNG file.

    Args:
        network: The network.
        path: The file; its ending says which kind. An existing file is replaced.
        simplified: Whether to draw the simplified network beside the network as it is, each with
            its flops and peak memory. Default: no.

    Returns:
        The path.

    Raises:
        ValueError: If the file's ending is neither `.svg` nor `.png`.
        ImportError: If matplotlib isn't installed.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"cannot draw {path.name!r}: its ending must be {' or '.join(ENDINGS)} (LaTeX: to_tikz)"
        )
    from kfac_tn.tn.draw.figure import save

    save(_picture(network, simplified), path)
    return path


def to_tikz(network: Network, *, simplified: bool = False, standalone: bool = False) -> str:
    r"""Write a network's diagram as LaTeX code that needs no package but TikZ.

    Args:
        network: The network.
        simplified: As in `draw`. Default: no.
        standalone: Whether to return a document that compiles by itself, instead of a
            `tikzpicture` to `\input` in one. Default: no.

    Returns:
        The code.
    """
    code = tikz(_picture(network, simplified))
    return STANDALONE % code if standalone else code


def _picture(network: Network, simplified: bool) -> Picture:
    if not simplified:
        layout = arrange(network)
        picture = depict(layout)
        return caption(picture, (), [layout.caption], picture.bounds[1], picture.bounds[3])
    networks = {"as written": network, "simplified": network.simplify()}
    pictures = [depict(arrange(network)) for network in networks.values()]
    bottom = min(picture.bounds[1] for picture in pictures)
    top = max(picture.bounds[3] for picture in pictures)
    texts = [[arrange(n).caption, *_costs(n)] for n in networks.values()]
    first, second = (
        caption(picture, [title], below, bottom, top)
        for title, below, picture in zip(networks, texts, pictures, strict=True)
    )
    second = second.shifted(first.bounds[2] - second.bounds[0] + GAP, 0.0)
    arrow = Text("→", (first.bounds[2] + GAP / 2, 0.0), bold=True)
    bounds = (*first.bounds[:2], *second.bounds[2:])
    return Picture((*first.items, arrow, *second.items), bounds)


def _costs(network: Network) -> tuple[str, str]:
    return f"{network.flops:,} flops", f"peak memory: {network.peak_memory:,} elements"
