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

from kfac_tn.tn import functional, nn
from kfac_tn.tn.conv import ConvSpec
from kfac_tn.tn.curvature import (
    average_unfolded_input,
    ggn_block,
    ggn_diagonal,
    ggn_gram,
    hbp_backward,
    hessian_diagonal_backward,
    hessian_diagonal_weight,
    kfac_expand_grad_output_factor,
    kfac_expand_input_factor,
    kfac_reduce_grad_output_factor,
    kfac_reduce_input_factor,
    kfra_backward,
)
from kfac_tn.tn.network import Network
from kfac_tn.tn.node import Delta, Node, Ones, Operand, Scalar
from kfac_tn.tn.operations import (
    fold_output,
    forward,
    input_jvp,
    input_vjp,
    per_example_weight_vjp,
    randomized_input_vjp,
    randomized_weight_vjp,
    unfold_input,
    unfold_kernel,
    weight_jvp,
    weight_vjp,
)
from kfac_tn.tn.pattern import IndexPattern
from kfac_tn.tn.planner import ALGORITHMS

__all__ = [
    "ALGORITHMS",
    "ConvSpec",
    "Delta",
    "IndexPattern",
    "Network",
    "Node",
    "Ones",
    "Operand",
    "Scalar",
    "average_unfolded_input",
    "fold_output",
    "forward",
    "functional",
    "ggn_block",
    "ggn_diagonal",
    "ggn_gram",
    "hbp_backward",
    "hessian_diagonal_backward",
    "hessian_diagonal_weight",
    "input_jvp",
    "input_vjp",
    "kfac_expand_grad_output_factor",
    "kfac_expand_input_factor",
    "kfac_reduce_grad_output_factor",
    "kfac_reduce_input_factor",
    "kfra_backward",
    "nn",
    "per_example_weight_vjp",
    "randomized_input_vjp",
    "randomized_weight_vjp",
    "unfold_input",
    "unfold_kernel",
    "weight_jvp",
    "weight_vjp",
]
