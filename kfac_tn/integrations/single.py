"""What packages ask that have one matrix for each layer, its bias in the last column."""

from __future__ import annotations

from collections.abc import Collection

from kfac_tn.curvature.curvature import Curvature
from kfac_tn.curvature.eigen import MatrixBlock
from kfac_tn.curvature.layout import Layout


def single_layouts(curvature: Curvature, axes: Collection[int], package: str) -> dict[str, Layout]:
    """The layouts of all layers of a curvature, each of them one matrix.

    Args:
        curvature: The curvature.
        axes: Numbers of axes that a weight may have.
        package: Who asks, for messages.

    Returns:
        By name of the layer.

    Raises:
        TypeError: If it is no ``Curvature``.
        ValueError: For no layers at all; for embeddings, groups, transposed convolutions, a bias
            that is separate or without its weight, weights of other numbers of axes, and parameters
            without Kronecker structure, naming them.
    """
    if not isinstance(curvature, Curvature):
        raise TypeError(
            f"{package} is given a {type(curvature).__name__} here, not a kfac_tn.Curvature (of "
            "compute_kfac, compute_ekfac)."
        )
    if not curvature.blocks:
        raise ValueError(f"The curvature has no layer, so there is nothing for {package}.")
    layouts = {}
    leave_out = "leave it out with `curvature.submatrix`"
    for name, block in curvature.blocks.items():
        if not isinstance(block, MatrixBlock):
            raise ValueError(
                f"'{name}' has no Kronecker structure, so no place in {package}: freeze it before "
                f"(requires_grad_(False)), or {leave_out}."
            )
        layout = layouts[name] = block.layout
        dimensions = len(layout.weight_shape)
        if layout.transposed and dimensions == 2:
            problem, advice = "is an embedding", leave_out
        elif dimensions == 1:
            problem, advice = "is here without its weight", leave_out
        elif layout.groups > 1:
            problem, advice = f"has {layout.groups} groups", leave_out
        elif layout.transposed or dimensions not in axes:
            kind = "transposed" if layout.transposed else f"{dimensions - 2}-d"
            problem, advice = f"is a {kind} convolution", leave_out
        elif layout.bias_name is not None and getattr(block, "bias", "joint") != "joint":
            problem, advice = "has a bias of its own", "compute the curvature with bias='joint'"
        else:
            continue
        raise ValueError(f"Layer '{name}' {problem}, which {package} can't express: {advice}.")
    return layouts
