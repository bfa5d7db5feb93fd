"""From gradients to directions: products with the damped inverse curvature, by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.curvature.averages import Columns, Moving
from kfac_tn.curvature.layout import Layout
from kfac_tn.layers import LayerBlock

Layouts: TypeAlias = Mapping[LayerBlock, tuple[Layout, Mapping[str, Parameter]]]
"""How the parameters of each layer lie in its matrix, and which they are, by name."""


class Room(dict[Parameter, Tensor]):
    """Where gradients are put to need no copy for the products: views of matrices, kept for long.

    Args:
        moving: The curvature of all layers.
        layouts: The parameters of all layers.
        parameters: Those that there is something of.

    Attributes:
        matrices: Of layers of one shape, weight and bias side by side, ``[layers, G, d_out, d_in]``
            by their curvature. There are none where a parameter is missing, or one's elements don't
            lie in the matrix in their order.
        layers: The weight, and bias if any, of each of these layers.
        places: The parameters that lie in these, and where.
        others: The others, which whoever uses this adds.
    """

    def __init__(
        self,
        moving: Sequence[Moving],
        layouts: Layouts,
        parameters: Sequence[Parameter],
    ) -> None:
        super().__init__()
        self.matrices: dict[Moving, Tensor] = {}
        self.layers: dict[Moving, list[tuple[Parameter, ...]]] = {}
        present = set(parameters)
        for each in moving:
            layers = [layouts[block] for block in each.blocks]
            if any(
                layout.transposed or not present.issuperset(named.values())
                for layout, named in layers
            ):
                continue
            matrices = each.room()
            if matrices is None or any(
                torch.promote_types(parameter.dtype, torch.float32) is not matrices.dtype
                for _, named in layers
                for parameter in named.values()
            ):
                continue
            self.matrices[each] = matrices
            for (layout, named), matrix in zip(layers, matrices, strict=True):
                views = layout.from_matrix(matrix)
                self.update({parameter: views[name] for name, parameter in named.items()})
            self.layers[each] = [tuple(named.values()) for _, named in layers]
        self.places = list(self.items())
        self.others = [parameter for parameter in parameters if parameter not in self]

    def copy(self) -> Room:
        """The same places, with room for others of its own."""
        twin = Room.__new__(Room)
        twin.update(self)
        twin.__dict__ = self.__dict__
        return twin

    def directions(self) -> dict[Parameter, Tensor]:
        """Multiply what lies in the matrices with the damped inverse curvature."""
        directions: dict[Parameter, Tensor] = {}
        for moving, matrices in self.matrices.items():
            results = moving.directions_of(matrices)
            for parameters, columns in zip(self.layers[moving], results, strict=True):
                for parameter, column in zip(parameters, columns, strict=True):
                    directions[parameter] = column.reshape(parameter.shape)
            for block in moving.blocks:
                block.constrain(directions[block.weight])
        return directions


def precondition(
    movings: Sequence[Moving],
    layouts: Layouts,
    gradients: Mapping[Parameter, Tensor],
    warn: Callable[[str], None],
) -> dict[Parameter, Tensor]:
    """Multiply gradients with the damped inverse curvature of their layers.

    Args:
        movings: The curvature of all layers.
        layouts: The parameters of all layers.
        gradients: By parameter; the fastest is a ``Room``.
        warn: Told why a layer is missing in the result.
    """
    directions = gradients.directions() if isinstance(gradients, Room) else {}
    columns: dict[LayerBlock, Columns] = {}
    for block, (layout, parameters) in layouts.items():
        if block.weight in directions:
            continue
        given = [gradients[p] for p in parameters.values() if p in gradients]
        if len(given) == len(parameters):
            columns[block] = layout.to_columns(*given)
        elif given:
            seen = [name for name, p in parameters.items() if p in gradients]
            warn(
                f"Of layer '{block.name}' only {sorted(seen)} has a gradient, so it is used "
                "without curvature. If the rest was frozen, make a new optimizer."
            )
    results: dict[LayerBlock, Columns] = {}
    for moving in movings if columns else ():
        results.update(moving.directions({b: columns[b] for b in moving.blocks if b in columns}))
    for block in columns.keys() - results.keys():
        warn(
            f"Layer '{block.name}' has a gradient, but no call of it was seen by the loss: it "
            "is trained without curvature. If another loss trains it, call observe(outputs, "
            "targets) for that, or leave this layer to Adam by curvature='none' for it. "
            "Otherwise: did it take part in no step with statistics yet (see factor_interval), was "
            "its weight used without calling the module (if only once, or by a derivative of the "
            "model in the loss: create_graph=True) or replaced in the call "
            "(torch.func.functional_call), were gradients reset after observe(), was the batch "
            "empty or left out, or the model compiled in an earlier call (torch._dynamo.reset() "
            "makes it see KFAC)?"
        )
    for block, result in results.items():
        layout, parameters = layouts[block]
        named = layout.from_columns(*result)
        block.constrain(named[block.weight_name])
        directions.update({parameters[name]: value for name, value in named.items()})
    return directions
