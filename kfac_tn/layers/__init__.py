"""Families of layers: what their inputs and output gradients mean for their parameters."""

from kfac_tn.layers.base import Approximation, GradientFamily, LayerFamily
from kfac_tn.layers.block import CurvatureKind, LargeFactors, LayerBlock, OtherParameter
from kfac_tn.layers.checks import batch_hint, check_model, check_parameters
from kfac_tn.layers.conv import ConvFamily, ConvTransposeFamily
from kfac_tn.layers.embedding import EmbeddingFamily
from kfac_tn.layers.hidden import HiddenCall, HiddenLinear
from kfac_tn.layers.linear import LinearFamily
from kfac_tn.layers.partition import (
    ApproximationChoice,
    CurvatureChoice,
    owners_of,
    partition,
    with_hidden,
)
from kfac_tn.layers.registry import gradient_family, register_layer

__all__ = [
    "Approximation",
    "ApproximationChoice",
    "ConvFamily",
    "ConvTransposeFamily",
    "CurvatureChoice",
    "CurvatureKind",
    "EmbeddingFamily",
    "GradientFamily",
    "HiddenCall",
    "HiddenLinear",
    "LargeFactors",
    "LayerBlock",
    "LayerFamily",
    "LinearFamily",
    "OtherParameter",
    "batch_hint",
    "check_model",
    "check_parameters",
    "gradient_family",
    "owners_of",
    "partition",
    "register_layer",
    "with_hidden",
]
