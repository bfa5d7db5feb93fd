"""From a convolution's diagram to its KFAC-reduce factor, step by step.

A convolution is a small network of tensors: the input, the kernel, and per spatial dimension an
index pattern that says which input, output and kernel positions meet (Dangel 2024, arXiv
2307.02275). Everything else is had by manipulating the network: remove a node to differentiate, sum
over an index to average, join two copies to square. So is the input's Kronecker factor in
KFAC-reduce (Eschenhagen et al. 2023, arXiv 2311.00636), here derived, simplified and evaluated.
Each step is drawn, and checked against torch. Run from the root of the repository:

    python examples/tensor_networks.py

and look at the pictures in `outputs/tensor_networks/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_tn import tn


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The convolution, and where the pictures go."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="examples (default: 8)")
    parser.add_argument("--channels", type=int, default=16, help="in and out (default: 16)")
    parser.add_argument("--size", type=int, default=28, help="height and width (default: 28)")
    parser.add_argument("--kernel-size", type=int, default=3, help="(default: 3)")
    parser.add_argument("--stride", type=int, default=1, help="(default: 1)")
    parser.add_argument("--padding", type=int, default=1, help="(default: 1)")
    parser.add_argument("--groups", type=int, default=1, help="of channels (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("outputs/tensor_networks"))
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the pictures")
    return parser.parse_args(arguments)


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    """Compare with torch, and tell."""
    error = ((actual - expected).norm() / expected.norm()).item()
    assert actual.shape == expected.shape
    assert error < 1e-12, f"{name}: relative error {error}"
    print(f"as {name}: relative error {error:.0e}")


def chapter(title: str, network: tn.Network, path: Path, *, simplified: bool = False) -> None:
    """Print a network, and draw it."""
    print(f"\n{title}\n{'-' * len(title)}\n{network}")
    print(f"drawn in {network.draw(path, simplified=simplified)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Tell the story."""
    options = parse(arguments)
    channels, groups, kernel = options.channels, options.groups, options.kernel_size
    spec = tn.ConvSpec(
        input_shape=(options.batch, channels, options.size, options.size),
        weight_shape=(channels, channels // groups, kernel, kernel),
        stride=options.stride,
        padding=options.padding,
        groups=groups,
    )
    torch.manual_seed(0)
    x = torch.rand(spec.input_shape, dtype=torch.float64)
    weight = torch.rand(spec.weight_shape, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(x, weight, None, options.stride, options.padding, 1, groups)

    def picture(name: str) -> Path:
        return options.output / f"{name}.{options.format}"

    # The indices: n examples, g groups, c and d channels in a group, i input, o output and k kernel
    # positions. An index in two nodes is multiplied along; one that isn't in the result, summed.
    convolution = tn.forward(spec)
    chapter("1. The convolution", convolution, picture("1_convolution"))
    check("torch.conv2d", convolution.evaluate(input=x, weight=weight.detach()), output.detach())

    # The network is linear in each of its nodes. Its scalar product with `grad_output` is as well,
    # so what is left when the weight is taken out is the gradient.
    weight_vjp = convolution.contract_with("grad_output").differentiate("weight")
    chapter("2. Its weight's gradient", weight_vjp, picture("2_weight_gradient"))
    grad_output = torch.rand_like(output)
    (gradient,) = torch.autograd.grad(output, weight, grad_output)
    check("torch.autograd.grad", weight_vjp.evaluate(input=x, grad_output=grad_output), gradient)

    # Take out the weight without any cotangent, and what the weight is multiplied by is left: the
    # unfolded input, a column of patches for each output position. It is large, K*K copies of `x`;
    # but as a network it's only an intermediate thought.
    outputs, columns = ("o1", "o2"), ("c", "k1", "k2")
    unfolded = convolution.without("weight", ("n",), ("g", *columns), outputs)
    chapter("3. The unfolded input", unfolded, picture("3_unfolded_input"))
    patches = F.unfold(x, kernel, 1, options.padding, options.stride)
    check("torch.nn.functional.unfold", unfolded.evaluate(input=x), patches)

    # KFAC-reduce averages the patches over output positions: sum over o1 and o2, and divide. Then
    # come the outer product with itself (the join of two copies that share the example; the indices
    # that they don't share are primed in the second) and the mean over examples.
    average = unfolded.with_output(("n",), ("g",), columns)
    average = average.scale(Fraction(1, prod(spec.output_size)))
    primed = tuple(f"{index}'" for index in columns)
    factor = average.join(average, share=("n", "g"), output=[("g",), columns, primed])
    factor = factor.scale(Fraction(1, options.batch))

    # In both copies the output positions belong to the patterns alone, so these are summed first,
    # before they meet the input: small matrices take its average, and no patches come into being.
    simple = factor.simplify()
    chapter("4. The factor, as written", factor, picture("4_factor"), simplified=True)
    for title, here, there in (("gone", factor, simple), ("new", simple, factor)):
        nodes = [str(node) for node in here.nodes if node not in there.nodes]
        print(f"{title + ' when simplified:':22}{'  '.join(nodes)}")
    print(f"{'':22}{'as written':>12}{'simplified':>12}")
    print(f"{'flops':22}{factor.flops:12,}{simple.flops:12,}")
    print(f"{'largest memory':22}{factor.peak_memory:12,}{simple.peak_memory:12,}", end=" ")
    print(f"elements; the patches have {patches.numel():,}")

    mean = patches.mean(-1).reshape(options.batch, groups, -1)
    expected = torch.einsum("nga,ngb->gab", mean, mean) / options.batch
    check("the mean patches' Gram matrix", simple.evaluate(input=x), expected)
    built_in = tn.kfac_reduce_input_factor(spec)
    check("tn.kfac_reduce_input_factor", simple.evaluate(input=x), built_in.evaluate(input=x))


if __name__ == "__main__":
    main()
