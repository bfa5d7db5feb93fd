"""Divides a model's parameters into blocks: each layer's Kronecker block, and the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, get_args

from torch.nn import Module, Parameter

from kfac_tn.layers.attention import attention_layers
from kfac_tn.layers.base import Approximation
from kfac_tn.layers.block import CurvatureKind, LargeFactors, LayerBlock, OtherParameter
from kfac_tn.layers.checks import check_parameters
from kfac_tn.layers.recurrent import recurrent_layers
from kfac_tn.layers.registry import FAMILIES

ApproximationChoice: TypeAlias = (
    Approximation | Mapping[str, Approximation] | Callable[[str, Module], Approximation]
)
CurvatureChoice: TypeAlias = (
    CurvatureKind | Mapping[str, CurvatureKind] | Callable[[str, Module], CurvatureKind]
)


def partition(
    model: Module,
    approximation: ApproximationChoice = "expand",
    curvature: CurvatureChoice = "kfac",
    max_dim: int | None = None,
    large_factors: LargeFactors = "auto",
) -> tuple[list[LayerBlock], list[OtherParameter]]:
    """Divide the trainable parameters of a model into Kronecker blocks and others.

    A weight has a block if every module that owns it is a known layer, all of one kind and with
    the same bias; so a weight that, say, an embedding and a linear layer share has none. What is
    hidden in other modules counts as linear layers: of ``torch.nn.MultiheadAttention`` ``"m"``
    those are ``"m.in_proj"`` (or ``"m.q_proj"``, ``"m.k_proj"``, ``"m.v_proj"``) and
    ``"m.out_proj"``; of a recurrent module ``"m.ih_l0"``, ``"m.hh_l0"``, ``"m.hh_l0_reverse"``,
    ``"m.hr_l0"`` and so on, of a cell ``"m.ih"`` and ``"m.hh"``.

    Args:
        model: Any module.
        approximation: ``"expand"`` or ``"reduce"`` for all layers, or a dict by layer name (every
            layer with a block must be named), or a function of name and module.
        curvature: ``"kfac"``, ``"ekfac"``, ``"diagonal"`` or ``"none"``, or by layer in the same
            ways.
        max_dim: See ``LayerBlock``, as for the next.
        large_factors: ``"auto"``, ``"blocks"`` or ``"diagonal"``.

    Returns:
        The blocks, in the order of ``model.named_modules()``, and all other trainable parameters,
        in the order of ``model.named_parameters()``. Together: every trainable parameter, once.

    Raises:
        TypeError: If the model is no module.
        ValueError: For an unknown choice, a name that a dict lacks or that is no layer, for
            parameters of lazy modules that have no shape yet, for complex ones, and sharded ones.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
        >>> blocks, others = partition(model)
        >>> blocks[0].name, [other.name for other in others]
        ('0', ['1.weight', '1.bias'])
    """
    check_parameters(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    modules, owners = with_hidden(model)
    blocks: list[LayerBlock] = []
    covered: set[Parameter] = set()
    left_out: dict[Parameter, str] = {}
    layers: list[str] = []
    for name, module in modules:
        weight = module._parameters.get("weight")
        if weight is None or weight in covered or weight in left_out:
            continue
        if _reason(weight, owners[weight]) is not None:
            continue
        layers.append(name)
        kind = _resolve("curvature", curvature, CurvatureKind, name, module)
        if kind == "none":
            left_out[weight] = "curvature is 'none'"
            continue
        bias = module._parameters.get("bias")
        if bias is not None and not (bias.requires_grad and _same_owners(bias, weight, owners)):
            bias = None
        family = FAMILIES[type(module)]
        block = LayerBlock(
            name=name,
            modules=tuple(dict.fromkeys(owner for _, owner, _ in owners[weight])),
            family=family,
            approximation=_resolve("approximation", approximation, Approximation, name, module),
            weight=weight,
            bias=bias,
            weight_name=names[weight],
            bias_name=None if bias is None else names[bias],
            groups=family.groups(module),
            curvature=kind,
            max_dim=max_dim,
            large_factors=large_factors,
        )
        blocks.append(block)
        covered.update(block.parameters.values())
    for option, choice in (("approximation", approximation), ("curvature", curvature)):
        named = set(choice) if isinstance(choice, Mapping) else set()
        unknown = named - set(layers)
        if unknown:
            raise ValueError(
                f"{option} names {sorted(unknown)}, which are no layers with a Kronecker "
                f"block; those are {layers}."
            )
    others = [
        OtherParameter(
            name,
            parameter,
            left_out.get(parameter)
            or _reason(parameter, owners[parameter])
            or _without_its_weight(parameter, owners[parameter]),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in covered
    ]
    return blocks, others


Owner: TypeAlias = tuple[str, Module, str]


def owners_of(model: Module) -> dict[Parameter, list[Owner]]:
    """All (module name, module, attribute) that hold each parameter."""
    owners: dict[Parameter, list[Owner]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((name, module, attribute))
    return owners


def with_hidden(
    model: Module,
) -> tuple[list[tuple[str, Module]], dict[Parameter, list[Owner]]]:
    """All modules by name, hidden layers among them, and the parameters' owners.

    Hidden layers are ``HiddenLinear``, and own what their modules would own.
    """
    modules, owners = [], owners_of(model)
    for name, module in model.named_modules():
        modules.append((name, module))
        for part, layer in {**attention_layers(module), **recurrent_layers(module)}.items():
            full = f"{name}.{part}" if name else part
            modules.append((full, layer))
            for role, place in layer.places().items():
                parameter = layer._parameters[role]
                if parameter is not None:
                    rest = [owner for owner in owners[parameter] if owner[1:] != place]
                    owners[parameter] = [*rest, (full, layer, role)]
    return modules, owners


def _same_owners(bias: Parameter, weight: Parameter, owners: dict[Parameter, list[Owner]]) -> bool:
    """Whether a bias belongs to the very modules that a weight belongs to, and as their bias."""
    of_weight = {(id(module), "bias") for _, module, _ in owners[weight]}
    return of_weight == {(id(module), attribute) for _, module, attribute in owners[bias]}


def _reason(parameter: Parameter, owners: list[Owner]) -> str | None:
    """Why a parameter can't be (the weight or bias of) a Kronecker block; None if it can."""
    for name, module, attribute in owners:
        if type(module) not in FAMILIES or attribute not in ("weight", "bias"):
            kind = type(module).__name__
            if len(owners) > 1:
                return f"shared with {kind} '{name}', which has no Kronecker structure here"
            return f"{kind} has no Kronecker structure here"
        if "forward" in vars(module):
            return f"{type(module).__name__} '{name}' has a forward of its own"
        weight = module._parameters.get("weight")
        if weight is None or not weight.requires_grad:
            return "the layer's weight is frozen or no parameter of its own"
        if weight.numel() == 0:
            return "the layer's weight has no elements"
        lacking = FAMILIES[type(module)].lacks_block(module)
        if lacking is not None:
            return lacking
    first = owners[0][1]
    for name, module, attribute in owners[1:]:
        same_kind = type(module) is type(first) and attribute == owners[0][2]
        if not same_kind or module._parameters.get("bias") is not first._parameters.get("bias"):
            kind = type(module).__name__
            return f"shared with {kind} '{name}', another kind of layer or one with another bias"
        if _settings(module) != _settings(first):
            return f"shared with '{name}', which has other hyper-parameters"
    return None


def _without_its_weight(bias: Parameter, owners: list[Owner]) -> str:
    """Why a bias that could be part of a block isn't."""
    weights = {module._parameters.get("weight") for _, module, _ in owners}
    if len(weights) > 1:
        return f"shared with '{owners[1][0]}', which has another weight"
    return "its weight has no block"


def _settings(module: Module) -> dict[str, object]:
    """The hyper-parameters that a module declares: they must agree where weights are tied."""
    return {name: getattr(module, name) for name in getattr(type(module), "__constants__", ())}


def _resolve(option: str, choice: Any, kinds: Any, name: str, module: Module) -> Any:
    """What an option is for one layer."""
    if isinstance(choice, str):
        resolved: object = choice
    elif isinstance(choice, Mapping):
        if name not in choice:
            raise ValueError(
                f"{option} has no entry for layer '{name}' ({type(module).__name__}): name "
                "every layer, or pass a function of (name, module)."
            )
        resolved = choice[name]
    elif callable(choice):
        resolved = choice(name, module)
    else:
        resolved = choice  # and refused
    if resolved not in get_args(kinds):
        raise ValueError(
            f"{option} is {resolved!r} for layer '{name}': choose one of {get_args(kinds)}."
        )
    return resolved
