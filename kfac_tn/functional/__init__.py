"""Kronecker factors, per-example gradients and diagonals of one layer, as functions of tensors.

Scale. With `a` the vectors that a weight matrix multiplies and `g` the back-propagated columns of
the loss Hessian's root, over `N` examples and `R` shared positions (of a convolution: its outputs):

- expand: `A = 1/(N R) sum_{n,r} a a^T` and `B = sum_{n,r} g g^T` (Grosse & Martens 2016,
  arXiv 1602.01407);
- reduce: `A = 1/N sum_n (mean_r a)(mean_r a)^T` and `B = sum_n (sum_r g)(sum_r g)^T` (Eschenhagen
  et al. 2023, arXiv 2311.00636).

`A` therefore doesn't depend on the number of examples, and `B` has the scale of the loss, whatever
its reduction: means over `n` are in `g` already. All factors have a leading axis of groups, of size
1 where a layer has none. Half-precision tensors give float32 factors, also under autocast; float64
ones float64. Everything is differentiable.

Convolutions are evaluated as tensor networks (Dangel 2024, arXiv 2307.02275; `kfac_tn.tn`).
"""

from kfac_tn.functional.common import APPROXIMATIONS
from kfac_tn.functional.conv import (
    conv_average_input,
    conv_grad_output_factor,
    conv_input_factor,
    conv_sum_grad_output,
)
from kfac_tn.functional.conv_transpose import (
    conv_transpose_average_input,
    conv_transpose_grad_output_factor,
    conv_transpose_input_factor,
    conv_transpose_sum_grad_output,
)
from kfac_tn.functional.embedding import (
    embedding_average_input,
    embedding_input_factor,
    embedding_per_example_weight_gradient,
    embedding_weight_diagonal,
)
from kfac_tn.functional.gradients import (
    conv_bias_diagonal,
    conv_per_example_weight_gradient,
    conv_transpose_per_example_weight_gradient,
    conv_transpose_weight_diagonal,
    conv_weight_diagonal,
    linear_bias_diagonal,
    linear_per_example_weight_gradient,
    linear_weight_diagonal,
)
from kfac_tn.functional.linear import (
    linear_average_input,
    linear_grad_output_factor,
    linear_input_factor,
    linear_sum_grad_output,
)
from kfac_tn.functional.products import gram

__all__ = [
    "APPROXIMATIONS",
    "conv_average_input",
    "conv_bias_diagonal",
    "conv_grad_output_factor",
    "conv_input_factor",
    "conv_per_example_weight_gradient",
    "conv_sum_grad_output",
    "conv_transpose_average_input",
    "conv_transpose_grad_output_factor",
    "conv_transpose_input_factor",
    "conv_transpose_per_example_weight_gradient",
    "conv_transpose_sum_grad_output",
    "conv_transpose_weight_diagonal",
    "conv_weight_diagonal",
    "embedding_average_input",
    "embedding_input_factor",
    "embedding_per_example_weight_gradient",
    "embedding_weight_diagonal",
    "gram",
    "linear_average_input",
    "linear_bias_diagonal",
    "linear_grad_output_factor",
    "linear_input_factor",
    "linear_per_example_weight_gradient",
    "linear_sum_grad_output",
    "linear_weight_diagonal",
]
