"""Where gradients are put to be multiplied with curvature: where they need no copy for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from kfac_tn.curvature.layout import Layout
from kfac_tn.curvature.moving import Moving
from kfac_tn.layers import LayerBlock


class Room(dict[Parameter, Tensor]):
    """Room for something by parameter: views of matrices, kept from step to step.

    Args:
        moving: The curvature of all layers.
        layouts: How the parameters of each layer lie in its matrix, and which they are.
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
        layouts: Mapping[LayerBlock, tuple[Layout, Mapping[str, Parameter]]],
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
