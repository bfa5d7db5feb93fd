"""What a saved curvature says of itself, and what of it can be continued with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kfac_tn.capture import Fisher
from kfac_tn.layers import LayerBlock

_OF_ONE_MATRIX = {"mc", "type-2"}  # the one samples what the other computes


def description(blocks: Iterable[LayerBlock], fisher: Fisher) -> dict[str, Any]:
    """Of what the averages of these layers are: numbers and words."""
    blocks = list(blocks)
    return {
        "layers": {block.name: list(block.parameters) for block in blocks},
        "approximations": {block.name: block.approximation for block in blocks},
        "fisher": fisher,
    }


def refuse_other(state: Mapping[str, Any], blocks: Iterable[LayerBlock], fisher: Fisher) -> None:
    """Refuse a state whose averages aren't of these layers, or of another matrix.

    Raises:
        ValueError: Naming the layer, or the option.
    """
    saved = state.get("fisher", fisher)
    if saved != fisher and not {saved, fisher} <= _OF_ONE_MATRIX:
        raise ValueError(
            f"The state has averages of fisher='{saved}', and here fisher is '{fisher}': choose "
            "the same, or start without the state."
        )
    here = {block.name: block for block in blocks}
    unknown = state["factors"].keys() - here.keys()
    if unknown:
        raise ValueError(f"The state has factors of layers {sorted(unknown)}, unknown here.")
    for name in state["factors"]:
        mine = here[name].parameters.keys()
        theirs = state.get("layers", {}).get(name, mine)
        if set(theirs) != set(mine):
            raise ValueError(
                f"The state has layer '{name}' with parameters {list(theirs)}, but those that are "
                f"trainable here are {list(mine)}: it is another model's."
            )
        kind = here[name].approximation
        other = state.get("approximations", {}).get(name, kind)
        if other != kind:
            raise ValueError(
                f"The state has averages of approximation='{other}' for layer '{name}', where it "
                f"is '{kind}' here: choose the same, or start without the state."
            )
