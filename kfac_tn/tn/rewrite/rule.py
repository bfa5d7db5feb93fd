"""What a rewrite is: a function from a network to an equal one that is no dearer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import TypeAlias

from kfac_tn.tn.network import Network
from kfac_tn.tn.plan import cost

Rewrite: TypeAlias = Callable[[Network], Network]


def rewrite(rule: Callable[[Network], Iterator[Network]]) -> Rewrite:
    """Make a rewrite from a rule.

    A rule yields networks equal to the one it is given, one for each place where its condition
    holds; following it ends somewhere. The rewrite follows it to the end, if that costs neither
    more flops nor more memory: of two copies, what is done to one only may be dearer than what is
    done to both. If that is dearer, it takes the places that are not, one after the other.

    Rules see whole operands (`Network.whole`): patterns are nodes to them, and nowhere else.

    Args:
        rule: Network to equal networks.

    Returns:
        Network to network.
    """

    @wraps(rule)
    def apply(network: Network) -> Network:
        whole = end = network.whole()
        while (further := next(_changes(end), None)) is not None:
            end = further
        if end in (whole, network):
            return network
        if no_dearer(end, network):
            return end
        best = whole
        while better := next(filter(partial(no_dearer, than=best), _changes(best)), None):
            best = better
        return network if best == whole else best

    def _changes(network: Network) -> Iterator[Network]:
        return (changed for changed in rule(network) if changed != network)

    return apply


def no_dearer(network: Network, than: Network) -> bool:
    """Whether a network takes at most the flops and the memory of another."""
    ours, theirs = cost(network), cost(than)
    return ours.flops <= theirs.flops and ours.peak_memory <= theirs.peak_memory
