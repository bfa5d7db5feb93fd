"""Which kinds of modules have curvature, and what says how."""

from __future__ import annotations

import torch
from torch.nn import Module

from kfac_tn.layers.base import GradientFamily, LayerFamily
from kfac_tn.layers.conv import ConvFamily, ConvTransposeFamily
from kfac_tn.layers.embedding import EmbeddingFamily
from kfac_tn.layers.hidden import HiddenLinear
from kfac_tn.layers.linear import LinearFamily
from kfac_tn.layers.norm import NORM_FAMILIES
from kfac_tn.tn.nn import ConvNd, ConvTransposeNd, RandomizedConvNd

FAMILIES: dict[type[Module], LayerFamily] = {
    torch.nn.Linear: LinearFamily(),
    HiddenLinear: LinearFamily(),
    torch.nn.Embedding: EmbeddingFamily(),
    torch.nn.Conv1d: ConvFamily(),
    torch.nn.Conv2d: ConvFamily(),
    torch.nn.Conv3d: ConvFamily(),
    torch.nn.ConvTranspose1d: ConvTransposeFamily(),
    torch.nn.ConvTranspose2d: ConvTransposeFamily(),
    torch.nn.ConvTranspose3d: ConvTransposeFamily(),
    ConvNd: ConvFamily(),
    ConvTransposeNd: ConvTransposeFamily(),
    RandomizedConvNd: ConvFamily(),
}


def register_layer(module_type: type[Module], family: LayerFamily) -> None:
    """Teach kfac_tn a further kind of layer, or another treatment of a known one.

    The module's parameters must be called ``weight`` (its flattened rows multiply the vectors
    ``a`` of ``family``) and ``bias`` (or None).

    Args:
        module_type: The class; subclasses are not meant, since they may compute something else.
        family: What its inputs and output gradients mean for its parameters.

    Example:
        >>> import torch
        >>> from kfac_tn.layers import LinearFamily, register_layer
        >>> class LoudLinear(torch.nn.Linear):  # computes what Linear does
        ...     pass
        >>> register_layer(LoudLinear, LinearFamily())
    """
    FAMILIES[module_type] = family


def gradient_family(module: Module) -> GradientFamily | None:
    """How a module's calls give each example's own gradient; None if that isn't known."""
    return FAMILIES.get(type(module)) or NORM_FAMILIES.get(type(module))
