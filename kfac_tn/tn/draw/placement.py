"""The search for places: marks and lines in, coordinates out. Knows nothing of tensor networks.

Two stages, each for many random beginnings at once, with a fixed seed: stress majorization brings
distances on paper near those in the graph; then a descent keeps marks clear of each other and of
foreign lines. The picture that is easiest to read wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

Point: TypeAlias = tuple[float, float]

STARTS, REFINED, SWAPPED = 256, 10, 4
"""Random beginnings per set of symmetries, how many of them the second stage works on (by each of
two measures), and how many of all its pictures may exchange marks."""


@dataclass(frozen=True)
class Symmetry:
    """A reflection of the picture.

    Attributes:
        image: Position of the mark that each mark is mapped to.
        coordinate: The one that changes its sign, 0: x, 1: y.
        centred: Which marks lie on the mirror if they are their own image.
    """

    image: tuple[int, ...]
    coordinate: int
    centred: tuple[bool, ...]

    def __call__(self, places: Tensor) -> Tensor:
        """The nearest places that have the symmetry; `[..., marks, 2]`, as in all that follows."""
        mirror = places[..., [*self.image], :]
        mirror[..., self.coordinate] *= -1
        pairs = zip(self.image, self.centred, strict=True)
        bound = torch.tensor([at != other or centred for at, (other, centred) in enumerate(pairs)])
        return torch.where(bound[:, None], (places + mirror) / 2, places)


@dataclass(frozen=True)
class Search:
    """What is to be placed. Equal searches are made once: sizes of indices change no picture.

    Attributes:
        sizes: Width and height of each mark.
        lines: Pairs of marks that a line connects.
        rim: Marks that belong to the rim.
        symmetries: Sets of symmetries to choose from.
        leg: Preferred length of a line.
    """

    sizes: tuple[Point, ...]
    lines: tuple[tuple[int, int], ...]
    rim: tuple[int, ...]
    symmetries: tuple[tuple[Symmetry, ...], ...]
    leg: float

    @lru_cache(maxsize=128)  # noqa: B019 - searches are small, and forgotten in turn
    def place(self) -> tuple[Point, ...]:
        """Find the places. Same question, same answer, in whatever mode of torch it is asked."""
        with torch.device("cpu"), torch.inference_mode(False):
            return self._place()

    def _place(self) -> tuple[Point, ...]:
        random = torch.Generator().manual_seed(0)
        begun, kept = [], []
        for symmetries in self.symmetries:
            shape = (STARTS, len(self.sizes), 2)
            drawn = torch.randn(shape, dtype=torch.float64, generator=random)
            places = self._majorize(drawn, symmetries)
            # Overlaps may be moved apart, or not: the best with and without them go on.
            # Many beginnings lead to the same picture: as bad to two digits, it is the same.
            chosen: dict[float, int] = {}
            for badness in (self.badness(places), self._tangle(places)):
                different = {round(bad, 2): at for at, bad in enumerate(badness.tolist())}
                chosen |= {bad: different[bad] for bad in sorted(different)[:REFINED]}
            begun.append(places[[*chosen.values()]])
            kept += [symmetries] * len(chosen)
        places = self._refine(torch.cat(begun), kept)
        # Symmetry helps a reader as much as a crossing hurts.
        bonus = torch.tensor([len(symmetries) for symmetries in kept])
        best = (self.badness(places) - bonus).argsort()[:SWAPPED].tolist()
        kept = [kept[at] for at in best]
        swapped = torch.stack([self._swap(places[at]) for at in best])
        places = torch.cat([swapped, self._refine(swapped, kept)])
        picture = places[(self.badness(places) - bonus[best].repeat(2)).argmin()]
        picture = self._align(picture)
        picture = picture - (picture.amax(0) + picture.amin(0)) / 2
        for _ in range(100):
            if not self.overlaps(picture, 0.04).any():
                break
            picture = picture * 1.02
        return tuple((round(x, 3), round(y, 3)) for x, y in picture.tolist())

    # ---- stages ---------------------------------------------------------------------------------

    def _majorize(self, places: Tensor, symmetries: tuple[Symmetry, ...]) -> Tensor:
        """Bring distances near the wanted ones (SMACOF, de Leeuw 1977)."""
        weight = self.wanted.clamp(min=self.leg) ** -2 * self._others
        inverse = torch.linalg.pinv(torch.diag(weight.sum(1)) - weight)
        for _ in range(50):
            ratio = weight * self.wanted / torch.cdist(places, places).clamp(min=1e-3)
            pull = torch.diag_embed(ratio.sum(-1)) - ratio
            places = inverse @ (pull @ places)
            for symmetry in symmetries:
                places = symmetry(places)
        return places

    def _refine(self, places: Tensor, kept: list[tuple[Symmetry, ...]]) -> Tensor:
        """Descend to places where marks are clear of each other and of foreign lines.

        Pictures have symmetries of their own, but go together: a step costs more than its numbers.
        """
        rounds = 120
        rows = {one: [at for at, other in enumerate(kept) if other is one] for one in kept}
        velocity = torch.zeros_like(places)
        for at in range(rounds):
            with torch.enable_grad():
                places.requires_grad_()
                energy = (
                    self._strain(places).sum()
                    + 10 * self.overlaps(places, 0.16).square().sum()
                    + 40 * self.hits(places, 0.12).square().sum()
                    + 4 * self.inside(places).square().sum()
                )
                (slope,) = torch.autograd.grad(energy, places)
            velocity = 0.8 * velocity - 0.02 * slope.clamp(-1, 1)
            places = places.detach() + velocity * (1 - at / rounds)
            for symmetries, own in rows.items():
                for symmetry in symmetries:
                    places[own] = symmetry(places[own])
        return places

    def _swap(self, places: Tensor) -> Tensor:
        """Exchange pairs of marks while that makes a picture easier to read."""
        pairs = torch.combinations(torch.arange(len(places)))
        while len(pairs):
            orders = torch.arange(len(places)).repeat(len(pairs), 1)
            orders[torch.arange(len(pairs))[:, None], pairs] = pairs.flip(1)
            candidates = torch.cat([places[None], places[orders]])
            best = int(self.badness(candidates).argmin())
            if best == 0:
                break
            places = candidates[best]
        return places

    def _align(self, places: Tensor) -> Tensor:
        """Make lines to the rim that are nearly upright, or nearly level, wholly so."""
        for end in self.rim:
            start = [a if b == end else b for a, b in self.lines if end in (a, b)]
            offset = (places[end] - places[start[0]]).abs()
            if len(start) == 1 and offset.amin() < self.leg / 3:
                aligned = places.clone()
                coordinate = int(offset.argmin())
                aligned[end, coordinate] = places[start[0], coordinate]
                if self.badness(aligned) < self.badness(places) + 0.2:
                    places = aligned
        return places

    # ---- what is good and bad -------------------------------------------------------------------

    def badness(self, places: Tensor) -> Tensor:
        """How hard the pictures are to read: crossings first."""
        extent = places.amax(-2) - places.amin(-2)
        return (
            self._tangle(places)
            + 4.0 * (self.hits(places, 0.04) > 0).sum((-1, -2))
            + 20 * self.overlaps(places, 0.04).sum((-1, -2))
            + self.inside(places).sum(-1)
            + 1.0 * extent[..., 1]  # pages are wider than high
        )

    def _tangle(self, places: Tensor) -> Tensor:
        """The part of it that doesn't depend on the sizes of marks."""
        return self.crossings(places) + 10 * self._strain(places) / len(self.sizes) ** 2

    def crossings(self, places: Tensor) -> Tensor:
        """Number of crossings of lines."""
        start, end = self._ends(places)
        a, b = start[..., :, None, :], end[..., :, None, :]
        c, d = start[..., None, :, :], end[..., None, :, :]
        crossed = (_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)
        return (crossed * self._apart).sum((-1, -2)) / 2

    def overlaps(self, places: Tensor, gap: float) -> Tensor:
        """How far pairs of boxes, with a gap around, reach into each other: `[marks, marks]`."""
        offset = (places[..., :, None, :] - places[..., None, :, :]).abs()
        depth = ((self.boxes[:, None] + self.boxes) / 2 + gap - offset).clamp(min=0).amin(-1)
        return depth * self._others

    def hits(self, places: Tensor, gap: float) -> Tensor:
        """How far lines reach into boxes, with a gap around, of other marks: `[lines, marks]`."""
        start, end = self._ends(places)
        along = (end - start)[..., :, None, :]
        offset = places[..., None, :, :] - start[..., :, None, :]
        share = (offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
        offset = (offset - share.clamp(0, 1)[..., None] * along).abs()
        depth = (self.boxes / 2 + gap - offset).clamp(min=0).amin(-1)
        return depth * self._foreign

    def inside(self, places: Tensor) -> Tensor:
        """How far marks of the rim are inside the circle around all others."""
        inner = [at for at in range(len(self.sizes)) if at not in self.rim]
        if not inner:
            return places.new_zeros(1)
        radius = places[..., inner, :].norm(dim=-1).amax(-1, keepdim=True).detach()
        return (radius + self.leg / 2 - places[..., [*self.rim], :].norm(dim=-1)).clamp(min=0)

    def _strain(self, places: Tensor) -> Tensor:
        """How far distances are from the wanted ones."""
        weight = self.wanted.clamp(min=self.leg) ** -2 * self._others
        apart = torch.cdist(places, places + 1e-9)  # the gradient of a distance of 0 is none
        return (weight * (apart - self.wanted).square()).sum((-1, -2))

    # ---- constants of the search ----------------------------------------------------------------

    @cached_property
    def boxes(self) -> Tensor:
        """The sizes: `[marks, 2]`."""
        return torch.tensor(self.sizes, dtype=torch.float64)

    @cached_property
    def wanted(self) -> Tensor:
        """Wanted distances of marks: the lengths of the shortest paths."""
        count = len(self.sizes)
        paths = torch.full((count, count), math.inf, dtype=torch.float64).fill_diagonal_(0.0)
        for a, b in self.lines:
            length = self.leg * (1.5 if {a, b} & {*self.rim} else 1.0)
            length += (self.sizes[a][0] + self.sizes[b][0]) / 6  # wide marks need more room
            paths[a, b] = paths[b, a] = length
        for via in range(count):
            paths = torch.minimum(paths, paths[:, via, None] + paths[via])
        apart = paths[paths.isfinite()].max() + self.leg  # of parts that nothing connects
        return torch.where(paths.isfinite(), paths, apart)

    @cached_property
    def _others(self) -> Tensor:
        return 1 - torch.eye(len(self.sizes), dtype=torch.float64)

    @cached_property
    def _foreign(self) -> Tensor:
        parties = [[at not in ends for at in range(len(self.sizes))] for ends in self._parties]
        return torch.tensor(parties, dtype=torch.float64)

    @cached_property
    def _apart(self) -> Tensor:
        # Being inside the picture (two rays never cross) is worse for an axis than a crossing.
        return torch.tensor(
            [
                [0 if a & b else 3 if len(a) == 1 or len(b) == 1 else 1 for b in self._parties]
                for a in self._parties
            ]
        )

    @property
    def _parties(self) -> list[set[int]]:
        """The marks that each line ends at."""
        return [*map(set, self.lines), *({at} for at in self.rim)]

    def _ends(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end of each line. Marks of the rim have a line outwards, without end."""
        start, end = (places[..., [line[at] for line in self.lines], :] for at in (0, 1))
        rim = places[..., [*self.rim], :]
        return torch.cat([start, rim], -2), torch.cat([end, 9 * rim], -2)


def _side(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """On which side of the line from a to b the point c is."""
    u, v = b - a, c - a
    return (u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]).sign()
