"""Convolutions and their derivatives as tensor networks: write down, transform, evaluate.

Example:
    >>> import torch
    >>> from kfac_tn import tn
    >>> spec = tn.ConvSpec(input_shape=(2, 3, 8, 8), weight_shape=(4, 3, 3, 3), padding=1)
    >>> tn.forward(spec).evaluate(input=torch.rand(2, 3, 8, 8), weight=torch.rand(4, 3, 3, 3)).shape
    torch.Size([2, 4, 8, 8])
    >>> network = tn.kfac_reduce_input_factor(spec)
    >>> network.simplify().flops < network.flops
    True
"""

from kfac_tn.tn.conv import (
    ConvSpec,
    average_unfolded_input,
    forward,
    kfac_expand_input_factor,
    kfac_reduce_input_factor,
    unfold_input,
)
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Delta, Node, Operand, Scalar
from kfac_tn.tn.pattern import IndexPattern

__all__ = [
    "ConvSpec",
    "Delta",
    "IndexPattern",
    "Network",
    "Node",
    "Operand",
    "Scalar",
    "average_unfolded_input",
    "forward",
    "kfac_expand_input_factor",
    "kfac_reduce_input_factor",
    "unfold_input",
]
