"""Simplifications. Each takes a network to an equal one, and says when it applies.

A rewrite never changes the result, and never raises flops or peak memory: where it would, it does
not apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kfac_tn.tn.network import Network
from kfac_tn.tn.plan import Cost, cost
from kfac_tn.tn.rewrite.indices import (
    merge_indices,
    merge_scalars,
    prune_deltas,
    prune_ones,
    squeeze,
)
from kfac_tn.tn.rewrite.patterns import (
    average_first,
    merge_patterns,
    plain_sums,
    tile,
    trim,
)
from kfac_tn.tn.rewrite.rule import Rewrite, rewrite
from kfac_tn.tn.rewrite.views import view_operands

__all__ = [
    "REWRITES",
    "Applied",
    "Explanation",
    "Rewrite",
    "average_first",
    "explain",
    "merge_indices",
    "merge_patterns",
    "merge_scalars",
    "plain_sums",
    "prune_deltas",
    "prune_ones",
    "rewrite",
    "simplify",
    "squeeze",
    "tile",
    "trim",
    "view_operands",
]

REWRITES: tuple[Rewrite, ...] = (
    prune_deltas,
    prune_ones,
    merge_scalars,
    average_first,
    plain_sums,
    merge_patterns,
    trim,
    squeeze,
    tile,
    merge_indices,
    view_operands,
)
"""The rewrites that `simplify` applies, in this order, until none changes anything; then the last.

The others see whole operands, whatever they are given: what is viewed has nothing to tell them.
"""


@dataclass(frozen=True)
class Applied:
    """A rewrite that changed a network.

    Attributes:
        name: Name of the rewrite.
        before: Cost of the network before it.
        after: Cost of the network after it.
    """

    name: str
    before: Cost
    after: Cost

    def __str__(self) -> str:
        changes = [
            f"{name} {getattr(self.before, field):,} -> {getattr(self.after, field):,}"
            for name, field in (("flops", "flops"), ("peak memory", "peak_memory"))
            if getattr(self.before, field) != getattr(self.after, field)
        ]
        return f"{self.name}: {', '.join(changes) or 'the same cost'}"


@dataclass(frozen=True)
class Explanation:
    """How a network was simplified.

    Attributes:
        network: The network as it was.
        simplified: The network as `simplify` returns it.
        applied: The rewrites that changed it, in their order.
    """

    network: Network
    simplified: Network
    applied: tuple[Applied, ...]

    def __str__(self) -> str:
        return "\n".join(
            [str(self.network), *(f"  {a}" for a in self.applied), str(self.simplified)]
        )


def simplify(network: Network) -> Network:
    """Apply all rewrites until none changes the network.

    Args:
        network: Any network.

    Returns:
        A network with the same operands and the same result, at most the flops and the memory.
    """
    return explain(network).simplified


@lru_cache(maxsize=1024)
def explain(network: Network) -> Explanation:
    """Simplify a network, and say how.

    Args:
        network: Any network.

    Returns:
        The rewrites that applied, with the flops and the peak memory before and after each. Prints
        as a list.

    Example:
        >>> from kfac_tn import tn
        >>> spec = tn.ConvSpec((8, 4, 6), (5, 4, 3), stride=3)
        >>> print(explain(tn.input_vjp(spec)))
        Pi[k1 o1 i1] weight[(g d) c k1] grad_output[n (g d) o1] -> [n (g c) i1]
        c=4 d=5 g=1 i1=6 k1=3 n=8 o1=2
          squeeze: the same cost
          tile: flops 2,112 -> 1,920
        weight[d c k1] grad_output[n d o1] -> [n c (o1 k1)]
        c=4 d=5 k1=3 n=8 o1=2
    """
    applied: list[Applied] = []
    simplified = network
    for rewrites in (REWRITES[:-1], REWRITES[-1:]):
        start = None
        while simplified != start:
            start = simplified
            for function in rewrites:
                rewritten = function(simplified)
                if rewritten != simplified:
                    applied.append(Applied(function.__name__, cost(simplified), cost(rewritten)))
                    simplified = rewritten
    # What came first is kept: equal networks are one object, and meet in the caches.
    return Explanation(network, network if simplified == network else simplified, tuple(applied))
