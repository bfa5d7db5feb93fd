"""A convolution with a factorised kernel: its forward pass, gradients and KFAC input factors.

Write the factors down as a network, put it in the place of the convolution's weight, and derive the
rest as for any other convolution. Two kernels do so here: CP (Lebedev et al. 2015, arXiv 1412.6553)
and Tucker-2 (Kim et al. 2016, arXiv 1511.06530). Everything is checked against torch. Run from the
root of the repository:

    python examples/factorized_kernels.py
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_tn import tn
from kfac_tn.tn import Network, Node, Operand

SPEC = tn.ConvSpec((8, 12, 10, 10), (16, 12, 3, 3), stride=2, padding=1)
EXAMPLES, POSITIONS = SPEC.input_shape[0], SPEC.output_size[0] * SPEC.output_size[1]

# Factors by name, one letter for each axis: `d c h w` are the kernel's own, `r s` the ranks.
SIZES = {"d": 16, "c": 12, "h": 3, "w": 3, "r": 5, "s": 4}
KERNELS = {
    "CP": {"output": "dr", "channel": "cr", "height": "hr", "width": "wr"},
    "Tucker-2": {"output": "dr", "core": "rshw", "channel": "cs"},
}


def factorized_convolution(factors: dict[str, str]) -> Network:
    """Network of the convolution, with factors in the place of its weight."""
    nodes = [Node(Operand(name), tuple(map(tuple, axes))) for name, axes in factors.items()]
    kernel = Network.build(nodes, [("d",), ("c",), ("h",), ("w",)], SIZES)
    return tn.forward(SPEC).replace("weight", kernel)


def input_factor(rows: Network, approximation: str) -> Network:
    """Network of a factor's KFAC input factor; `rows` is what it is multiplied by: `[n, ., o]`."""
    _, columns, outputs = rows.output
    if approximation == "expand":
        share, count = ("n", *outputs), EXAMPLES * POSITIONS
    else:
        share, count = ("n",), EXAMPLES * POSITIONS**2
    primed = tuple(f"{index}'" for index in columns)
    return rows.join(rows, share, [columns, primed]).scale(Fraction(1, count))


def evaluate(network: Network, tensors: dict[str, Tensor]) -> Tensor:
    """Evaluate a network on those of the tensors that it takes."""
    taken = {name: tensors[name] for name in network.operands}
    return network.simplify().evaluate(**taken).contiguous()


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    """Compare, and tell."""
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < 1e-12, f"{name}: relative error {error}"
    print(f"  {name:36} {error:8.1e}")


def check_gradients(factors: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """The forward pass and a VJP for each factor, against torch's convolution."""
    convolution = factorized_convolution(factors)
    leaves = {name: tensors[name].clone().requires_grad_() for name in factors}
    weight = torch.einsum(f"{','.join(factors.values())}->dchw", *leaves.values())
    output = F.conv2d(tensors["input"], weight, stride=2, padding=1)
    check("forward", evaluate(convolution, tensors), output)

    tensors = {**tensors, "grad_output": torch.randn_like(output)}
    gradients = torch.autograd.grad(output, tuple(leaves.values()), tensors["grad_output"])
    for name, gradient in zip(leaves, gradients, strict=True):
        vjp = convolution.contract_with("grad_output").differentiate(name)
        check(f"VJP of {name}", evaluate(vjp, tensors), gradient)
    print(f"  flops, of the dense kernel's: {convolution.flops / tn.forward(SPEC).flops:.0%}")


def check_curvature(factors: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """KFAC of the last factors, against the Gauss-Newton matrix of a squared error.

    `output`, and `core` before it, act as linear layers on what the network without them holds.
    There, one matrix `B` takes output gradients back from every position, so KFAC is exact: the
    matrix is `B (x) A` times the number of positions.
    """
    convolution = factorized_convolution(factors)
    before_output = convolution.without("output", ("n",), ("r",), ("o1", "o2"))
    layers = {"output": (before_output, torch.eye(SIZES["d"], dtype=torch.float64))}
    if "core" in factors:
        columns, outputs = ("s", "k1", "k2"), ("o1", "o2")
        before_core = before_output.without("core", ("n",), columns, outputs)
        layers["core"] = (before_core, tensors["output"].T @ tensors["output"])
    for name, (rows, b) in layers.items():
        jacobian = evaluate(convolution.differentiate(name), tensors)
        jacobian = jacobian.reshape(EXAMPLES * SIZES["d"] * POSITIONS, -1)
        a = evaluate(input_factor(rows, "expand"), tensors)
        exact = jacobian.T @ jacobian / (EXAMPLES * POSITIONS)
        check(f"KFAC-expand of {name}", torch.kron(b, a), exact)
        mean = evaluate(rows, tensors).mean(-1)
        a = evaluate(input_factor(rows, "reduce"), tensors)
        check(f"KFAC-reduce of {name}, input factor", a, mean.T @ mean / EXAMPLES)


def main() -> None:
    """Check both kernels, and print relative errors."""
    torch.manual_seed(0)
    for name, factors in KERNELS.items():
        shapes = {factor: [SIZES[axis] for axis in axes] for factor, axes in factors.items()}
        shapes["input"] = list(SPEC.input_shape)
        tensors = {n: torch.randn(shape, dtype=torch.float64) for n, shape in shapes.items()}
        print(f"{name} kernel, relative errors:")
        check_gradients(factors, tensors)
        check_curvature(factors, tensors)


if __name__ == "__main__":
    main()
