"""Diagrams: complete, legible, the same every time; told by the coordinates of the layout."""

import inspect
import re
import sys
from collections import Counter
from fractions import Fraction
from itertools import combinations
from xml.etree import ElementTree

import pytest
import torch

from kfac_tn import tn
from kfac_tn.tn import Delta, Network, Node, Operand, Scalar
from kfac_tn.tn.draw import draw, to_tikz
from kfac_tn.tn.draw.layout import arrange
from kfac_tn.tn.draw.picture import Curve, Shape, depict
from kfac_tn.tn.draw.placement import Search
from kfac_tn.tn.draw.tikz import escape

BUILDERS = {
    name: value
    for name, value in vars(tn).items()
    if callable(value)
    and not inspect.isclass(value)
    and "spec" in inspect.signature(value).parameters
}
GROUPED = tn.ConvSpec((2, 4, 5, 6), (6, 2, 3, 2), (1, 2), padding=1, groups=2)
FEW = (tn.forward, tn.kfac_reduce_grad_output_factor)


def scalar_product():
    nodes = [Node(Operand("a"), (("i",),)), Node(Operand("b"), (("i",),))]
    return Network.build(nodes, [], {"i": 3})


def everything():
    """A network with whatever the builders don't make: tangents, second copies, a lone part."""
    nodes = [
        Node(Operand("input_tangent"), (("i", "j"),)),
        Node(Operand("weight_2"), (("j",), ("k",))),
        Node(Delta(4), (("k",), ("l",))),
        Node(Operand("my_core"), (("r1",), ("r2",), ("r10",))),
    ]
    sizes = {"i": 2, "j": 3, "k": 4, "l": 4, "r1": 2, "r2": 2, "r10": 2}
    network = Network.build(nodes, [("l", "i"), ("r1",)], sizes)
    return network.scale(Fraction(2, 3))


NETWORKS = {
    **{name: build(GROUPED) for name, build in BUILDERS.items()},
    "one group": tn.weight_vjp(tn.ConvSpec((2, 3, 5, 6), (4, 3, 3, 2), padding=1)),
    "simplified": tn.kfac_reduce_input_factor(GROUPED).simplify(),
    "derivative": tn.forward(GROUPED).differentiate("weight"),
    "3d": tn.forward(tn.ConvSpec((1, 2, 3, 4, 5), (2, 2, 3, 3, 3))),
    "1d": tn.kfac_expand_input_factor(tn.ConvSpec((1, 2, 5), (2, 2, 3))),
    "transposed": tn.forward(tn.ConvSpec((1, 2, 3, 4), (2, 2, 3, 3), transposed=True)),
    "scalar": scalar_product(),
    "sum": Network.build([Node(Operand("a"), (("i",),))], [], {"i": 3}),
    "outer": Network.build(scalar_product().nodes[:1], [("i",)], {"i": 3}),
    "everything": everything(),
    "nothing": Network.build([], [], {}).scale(Fraction(1, 3)),
}
NETWORKS = {name: network for name, network in NETWORKS.items() if isinstance(network, Network)}


def boxes_overlap(a, b):
    return abs(a.x - b.x) < (a.width + b.width) / 2 and abs(a.y - b.y) < (a.height + b.height) / 2


def names(network):
    """All that must be readable: operands, indices, and axes of the result."""
    indices = set(network.size)
    axes = {f"({' '.join(axis)})" for axis in network.output if len(axis) > 1}
    return {*network.operands, *indices, *axes}


def sides(a, b, c):
    """Sign of the turn from a over b to c."""
    turn = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    return (turn > 0) - (turn < 0)


def crossings(layout):
    points = [(mark.x, mark.y) for mark in layout.marks]
    count = 0
    for first, second in combinations(layout.lines, 2):
        if not {*first} & {*second}:
            (a, b), (c, d) = ([points[at] for at in line] for line in (first, second))
            count += sides(a, b, c) * sides(a, b, d) < 0 and sides(c, d, a) * sides(c, d, b) < 0
    return count


def inside_hits(layout):
    """Lines that pass through the middle third of a mark they don't belong to."""
    hits = 0
    for a, b in layout.lines:
        start, end = layout.marks[a], layout.marks[b]
        for at, mark in enumerate(layout.marks):
            if at not in (a, b):
                hits += any(
                    abs(start.x + t * (end.x - start.x) - mark.x) < mark.width / 6
                    and abs(start.y + t * (end.y - start.y) - mark.y) < mark.height / 6
                    for t in (step / 50 for step in range(51))
                )
    return hits


def assert_legible(layout):
    overlapping = [(a, b) for a, b in combinations(layout.marks, 2) if boxes_overlap(a, b)]
    assert not overlapping
    assert inside_hits(layout) == 0
    assert crossings(layout) <= len(layout.lines) / 2


def assert_complete(network, layout):
    """Each node, index and axis has one mark, and a line wherever an index is held."""
    tensors = [node for node in network.nodes if not isinstance(node.symbol, Scalar)]
    assert sum(mark.is_tensor for mark in layout.marks) == len(tensors)
    assert sum(mark.kind == "axis" for mark in layout.marks) == len(network.output)
    ends = Counter()
    for a, b in layout.lines:
        mark, index_mark = layout.marks[a], layout.marks[b]
        ends[index_mark.text.removeprefix("Σ ")] += 1
        assert not index_mark.is_tensor
        assert mark.is_tensor or mark.kind == "axis"
    assert set(ends) == set(network.size)
    for index in network.size:
        alone = (index,) in network.output and len(network.holders(index)) == 1
        expected = len(network.holders(index)) + (index in network.output_indices) - alone
        assert ends[index] == expected


def assert_axes_are_at_the_rim(layout):
    """From an axis outwards, nothing is in the way."""
    points = [(mark.x, mark.y) for mark in layout.marks]
    for at, mark in enumerate(layout.marks):
        if mark.kind == "axis":
            far = (9 * mark.x, 9 * mark.y)
            for a, b in layout.lines:
                if at not in (a, b):
                    a, b = points[a], points[b]
                    across = sides(points[at], far, a) * sides(points[at], far, b) < 0
                    assert not (across and sides(a, b, points[at]) * sides(a, b, far) < 0)


def assert_well_formed(code):
    """Braces match; every statement ends; nothing that isn't TikZ's own or ASCII."""
    assert code.isascii()
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", code):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    first, *statements, last = code.strip().splitlines()
    assert first.startswith(r"\begin{tikzpicture}")
    assert last == r"\end{tikzpicture}"
    for statement in statements:
        assert re.match(r"  \\(draw|path|node)\[.*;$", statement)


def assert_within_bounds(picture):
    left, bottom, right, top = picture.bounds
    for item in picture.items:
        points = item.points if isinstance(item, Curve) else (item.centre,)
        assert all(left <= x <= right and bottom <= y <= top for x, y in points)


def slow_if_large(name):
    large = len(NETWORKS[name].nodes) > 6
    return pytest.param(name, marks=pytest.mark.slow if large else ())


@pytest.mark.parametrize("name", [slow_if_large(name) for name in NETWORKS])
def test_diagrams(name, tmp_path):
    """Everything about one network in one test: parallel processes then search its layout once."""
    network, layout = NETWORKS[name], arrange(NETWORKS[name])
    assert_legible(layout)
    assert_complete(network, layout)
    assert_within_bounds(depict(layout))
    if name in BUILDERS:
        assert_axes_are_at_the_rim(layout)
    code = network.to_tikz()
    texts = {text.removeprefix(r"$\Sigma$ ") for text in re.findall(r"\) \{(.*)\};", code)}
    assert {escape(text) for text in names(network)} <= texts
    assert_well_formed(code)

    pytest.importorskip("matplotlib")
    path = network.draw(str(tmp_path / "new" / "folder" / "diagram.SVG"))
    texts = {(text.text or "") for text in ElementTree.parse(path).iter() if "text" in text.tag}
    assert names(network) <= texts | {text.removeprefix("Σ ") for text in texts}
    assert path.stat().st_size < 100_000


def test_copies_mirror_each_other():
    layout = arrange(tn.kfac_expand_input_factor(GROUPED))
    left, right = (mark for mark in layout.marks if mark.kind == "operand")
    assert left.text == right.text == "input"
    assert (left.x, left.y) == pytest.approx((-right.x, right.y), abs=0.2)
    assert left.x < right.x


@pytest.mark.parametrize("build", FEW)
def test_same_picture_every_time(build, tmp_path):
    pytest.importorskip("matplotlib")
    network = build(GROUPED)
    files = []
    for name in ("one", "two"):
        Search.place.cache_clear()
        svg = draw(network, tmp_path / f"{name}.svg").read_bytes()
        png = network.draw(tmp_path / f"{name}.png").read_bytes()
        files.append((svg, png, network.to_tikz()))
    assert files[0] == files[1]
    assert files[0][1].startswith(b"\x89PNG")


def test_standalone_tikz():
    network = scalar_product()
    code = network.to_tikz(standalone=True)
    assert network.to_tikz() in code
    assert code.startswith(r"\documentclass")
    assert re.findall(r"\\usepackage\{(\w+)\}", code) == ["tikz"]
    assert code.strip().endswith(r"\end{document}")


def test_escape():
    assert escape("grad_output_2") == r"grad\_output\_2"
    assert escape("ΣₒΠ") == r"$\Sigma$$_o$$\Pi$"
    assert escape("50% {a} \\~^") == (
        r"50\% \{a\} \textbackslash{}\textasciitilde{}\textasciicircum{}"
    )


def test_before_and_after(tmp_path):
    pytest.importorskip("matplotlib")
    network = tn.average_unfolded_input(GROUPED)
    simple = network.simplify()
    svg = network.draw(tmp_path / "both.svg", simplified=True).read_text()
    for text in (svg, network.to_tikz(simplified=True)):
        for part in ("as written", "simplified", f"{network.flops:,} flops"):
            assert part in text
        assert f"{simple.flops:,} flops" in text
        assert f"peak memory: {simple.peak_memory:,} elements" in text
    assert_well_formed(network.to_tikz(simplified=True))


def test_shapes_tell_kinds():
    picture = depict(arrange(everything()))
    shapes = [item for item in picture.items if isinstance(item, Shape) and item.edge]
    assert {(shape.outline, shape.dashed) for shape in shapes} == {
        ("rounded", True),  # the input's tangent
        ("rectangle", False),
        ("ellipse", False),  # the delta
        ("rounded", False),  # axes of the result
    }
    layout = arrange(everything())
    assert layout.caption == "2/3 · [(l i) r1]"
    curves = [item for item in picture.items if isinstance(item, Curve)]
    assert len({curve.width for curve in curves}) == 2  # a composite axis ends in a thicker line


def test_modes_of_torch_make_no_difference():
    expected = arrange(scalar_product())
    for mode in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        Search.place.cache_clear()
        state = torch.get_rng_state()
        with mode:
            assert arrange(scalar_product()) == expected
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["diagram.pdf", "diagram", "diagram.svg.txt"])
def test_other_endings_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        scalar_product().draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_optional(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        scalar_product().draw(tmp_path / "diagram.svg")
    assert to_tikz(scalar_product())
