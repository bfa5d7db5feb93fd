"""Names of indices, and their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def fresh(indices: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Prime index names until they differ from those taken, and from one another."""
    fresh: list[str] = []
    for index in indices:
        name = index + "'"
        while name in taken or name in fresh:
            name += "'"
        fresh.append(name)
    return fresh


def add_sizes(sizes: dict[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Add sizes of indices, which must not contradict those that are there."""
    for index, size in more.items():
        if sizes.setdefault(index, size) != size:
            raise ValueError(f"index {index!r} has sizes {sizes[index]} and {size}")
    return sizes
