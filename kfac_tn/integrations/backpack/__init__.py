"""Extensions for BackPACK (``pip install backpack-for-pytorch``).

| extension | attribute of each parameter | what it is |
|---|---|---|
| `KFACExpand`, `KFACReduce` | `kfac_expand`, `kfac_reduce` | `KroneckerFactors(B, A)`, per group |
| `EKFAC` | `ekfac` | `EigenFactors(Q_B, Q_A, values)`, per group |
| `DiagGGNExactTN` | `diag_ggn_exact_tn` | the GGN's diagonal, shaped like the parameter |
| `DiagGGNMCTN` | `diag_ggn_mc_tn` | an unbiased estimate of it |
| `BatchGradTN` | `grad_batch_tn` | each example's gradient, `[N, *shape]` |

All losses that `kfac_tn.likelihood` knows, all layers that `kfac_tn.layers` knows (linear layers,
(transposed) convolutions with every option, `register_layer`'s) and normalizations that treat
examples independently; between them any modules that do so, branches with BackPACK's modules, and
views. Curvature is that of the loss as it is differentiated: (the absolute value of) a factor
before `backward()` counts, several extended losses add up. What else is added to them (a penalty on
the weights, say) isn't seen. Each extension back-propagates columns of its own, as in BackPACK.

The mechanism is BackPACK's: it sees modules alone, each module's last call alone, and only after
their part of the graph is gone. So modules that are called twice, tied weights, functions between
modules, dropout in training mode and parameters of other layers are refused, in `backward()`, with
an error that names the module; `kfac_tn.compute_kfac`, `compute_ekfac`, `compute_ggn_diagonal` and
`compute_per_example_gradients` take all of these. (In-place activations fail before, in the forward
pass: torch's full backward hooks don't allow them. `BatchGradTN` and `fisher="empirical"` need no
more than gradients, so functions between modules are no obstacle, as long as these don't mix
examples.)

Where results differ from those of BackPACK 1.7.1 (each row is a test):

| | BackPACK's own | here |
|---|---|---|
| `padding_mode='circular'` | wrong, as if zero-padded | right |
| `padding_mode='reflect'` | wrong, as if zero-padded | right |
| `padding_mode='replicate'` | wrong, as if zero-padded | right |
| `padding='same'` | raises TypeError | right |
| `output_padding` | raises RuntimeError | right |
| float64 AvgPool | raises RuntimeError | right |
| AvgPool(ceil_mode=True) | raises ValueError | right |
| AdaptiveAvgPool, no divisor | raises NotImplementedError | right |
| GroupNorm | raises NotImplementedError | right |
| GELU | raises NotImplementedError | right |
| class weights | raises NotImplementedError | right |
| ignore_index | raises NotImplementedError | right |
| targets of -100 | wrong: they count | right |
| pos_weight | raises NotImplementedError | right |
| several binary outputs | raises NotImplementedError | right |
| MSELoss on more axes | raises ValueError | right |
| reduction='none' | raises ValueError | right |
| a factor of the loss | not in the curvature, though in the gradients | right |
| two losses | wrong: adds their columns, with cross terms | right |
| view between modules | raises IndexError | right |
| transpose between modules | wrong if the axes are of one size | refused |
| function between modules | raises AssertionError | refused |
| tied weights | wrong: the last module overwrites | refused |
| module called twice | raises AttributeError | refused |
| examples and positions in one axis | wrong: positions count as examples | refused |
| Dropout in train mode | wrong where its input is 0 | refused |
| BatchNorm in train mode | refused, BatchGrad warns | refused |
| scale of a convolution's factors | too large by the number of positions: A sums over them, and \
B is reduce's | right |
| Kronecker factors of groups | raises NotImplementedError | a pair for each group |
| Kronecker factors of shared positions | raises NotImplementedError | right |
"""

from kfac_tn.integrations.backpack.diagonals import BatchGradTN, DiagGGNExactTN, DiagGGNMCTN
from kfac_tn.integrations.backpack.kronecker import (
    EKFAC,
    EigenFactors,
    KFACExpand,
    KFACReduce,
    KroneckerFactors,
)

__all__ = [
    "EKFAC",
    "BatchGradTN",
    "DiagGGNExactTN",
    "DiagGGNMCTN",
    "EigenFactors",
    "KFACExpand",
    "KFACReduce",
    "KroneckerFactors",
]
