"""Linear layers that no module of their own computes: another one does, and hides them.

Attention's projections are such, and the weights of recurrent layers. ``HiddenLinear`` stands for
one in a model's division into blocks; ``HiddenLayers`` applies them where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Module, Parameter
from torch.nn import functional as F


class HiddenLinear(Module):
    """Stands for the linear layer that a module's weight is, packed or not.

    Args:
        owner: The module that computes it.
        weight: Where the layer's weight is: a name, from the owner on.
        bias: Where its bias is, or would be; None for a layer that never has one.

    Attributes:
        owner: As given; no submodule of this one.

    Example:
        >>> import torch
        >>> layer = HiddenLinear(torch.nn.GRUCell(2, 3), "weight_ih", "bias_ih")
        >>> layer.weight.shape, layer.holds()
        (torch.Size([9, 2]), True)
        >>> layer.owner.weight_ih = torch.nn.Parameter(torch.zeros(9, 2))
        >>> layer.holds()
        False
    """

    owner: Module
    weight: Parameter
    bias: Parameter | None

    def __init__(self, owner: Module, weight: str, bias: str | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self._names = {"weight": weight, "bias": bias}
        for role, place in self.places().items():
            self.register_parameter(role, place[0]._parameters.get(place[1]))
        if bias is None:
            self.register_parameter("bias", None)

    def _get_name(self) -> str:
        return type(self.owner).__name__

    def places(self) -> dict[str, tuple[Module, str]]:
        """The module and the attribute that hold the weight, and those that hold the bias."""
        found = {}
        for role, name in self._names.items():
            if name is not None:
                path, _, attribute = name.rpartition(".")
                found[role] = self.owner.get_submodule(path), attribute
        return found

    def holds(self) -> bool:
        """Whether the owner still has these very parameters in their places."""
        return all(
            module._parameters.get(attribute) is self._parameters[role]
            for role, (module, attribute) in self.places().items()
        )


@dataclass(frozen=True, eq=False)
class HiddenCall:
    """One call of a hidden layer.

    Attributes:
        layer: The layer.
        x: Its input, examples first, ``[N, ..., d]``.
        output: What it returned, in the graph.
        within: The node through which the weight takes part, if that isn't below the output's.
        packed: Whether rows are the positions of sequences of several lengths, which have no axis
            of their own.
    """

    layer: HiddenLinear
    x: Tensor
    output: Tensor
    within: Node | None = None
    packed: bool = False


class HiddenLayers:
    """Applies linear layers that are hidden in a module, and reports their calls.

    Args:
        layers: Those to report, by their weights.
        record: Gets each call.
    """

    def __init__(
        self, layers: Mapping[Parameter, HiddenLinear], record: Callable[[HiddenCall], None]
    ) -> None:
        self._layers, self.record = layers, record

    def get(self, weight: Tensor) -> HiddenLinear | None:
        """The layer of a weight, if its calls are to be reported."""
        if isinstance(weight, Parameter) and weight.requires_grad:
            return self._layers.get(weight)
        return None

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool = False) -> Tensor:
        """Apply a layer to all that it gets, ``[N, ..., d]``."""
        y = F.linear(x, weight, bias)
        layer = self.get(weight)
        if layer is not None:
            self.record(HiddenCall(layer, x, y, packed=packed))
        return y
