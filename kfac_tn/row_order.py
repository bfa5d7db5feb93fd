"""Whether rows of a layer are each one example's, and in their order: models may change that.

First, whether a graph has anything in it that may. Then, by backward passes in which each example
is larger by a factor of its own, whose rows they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

APART = re.compile(
    # element by element, and what is done to each example as a whole
    "Add|Sub|Rsub|Mul|Div|Neg|Pow|Exp|Expm1|Log|Log1P|Sqrt|Rsqrt|Abs|Reciprocal|Sin|Cos|Erf|Tanh|"
    "Sigmoid|LogSigmoid|Relu|LeakyRelu|RreluWithNoise|Prelu|PreluKernel|Elu|Selu|Gelu|Silu|Mish|"
    "Softplus|Softshrink|Hard.*|Threshold|Clamp.*|Where|MaskedFill|Maximum|Minimum|Lerp|Addcmul|"
    "Native.*Norm|CudnnBatchNorm|NativeDropout|FusedDropout|Convolution|MaxPool.*|AvgPool.*|"
    "AdaptiveAvgPool.*|AdaptiveMaxPool.*|Upsample.*|PixelShuffle|ScaledDotProduct.*|"
    # as they are, in another shape
    "Clone|Copy.*|ToCopy|Alias|Detach|View|UnsafeView|Reshape.*|Expand|Unsqueeze|Squeeze|Permute|"
    "Transpose|T|MT|ConstantPadNd|ReflectionPad.*|ReplicationPad.*"
)
"""Derivatives of what leaves each example where it is, and alone, by the names of their nodes."""

ALONG = re.compile(
    "Sum|Mean|Prod|Var|Std|Norm|LinalgVectorNorm|Logsumexp|Softmax|LogSoftmax|Cumsum|Cumprod|Max|"
    "Min|Amax|Amin|Sort|Topk|Gather|IndexSelect|Cat|Stack|Slice|Select|Split.*|Unsafe.*Split.*|"
    "Unbind|Narrow|Chunk|Unfold|Glu"
)
"""Of what does so where its axes aren't that of the examples."""

SHAPED = re.compile("T|Transpose|Permute|View|UnsafeView|Reshape.*|Unsqueeze|Squeeze|Expand|ToCopy")
"""Of what a weight may be seen through."""


def may_move_rows(outputs: Tensor) -> bool:
    """Whether anything on the way to outputs may move or mix rows by what they contain.

    All may that isn't known not to. What moves or mixes them by their number alone does so with a
    few examples, too, and is found there.
    """
    count = len(outputs)
    seen, waiting = set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not _is_of_leaf(node) and not _leaves_alone(node, count):
            return True
        waiting += [source for source, _ in node.next_functions]
    return False


def _is_of_leaf(node: Node | None) -> bool:
    """Whether nothing but parameters that it is computed of, in other shapes, has a gradient."""
    if node is None or _name(node) == "AccumulateGrad":
        return True
    return all(_is_parameter(source) for source, _ in node.next_functions)


def _is_parameter(node: Node | None) -> bool:
    """Whether it is one, perhaps in another shape."""
    while node is not None and SHAPED.fullmatch(_name(node)):
        node = node.next_functions[0][0]
    return node is None or _name(node) == "AccumulateGrad"


def _name(node: Node) -> str:
    return re.sub(r"^torch::autograd::|Backward\d*$", "", node.name())


def _leaves_alone(node: Node, count: int) -> bool:
    """Whether a node is known to leave each of so many examples alone."""
    name = _name(node)
    shape = node._input_metadata[0].shape  # of what it made
    if name in ("Mm", "Addmm", "Bmm", "Baddbmm"):
        if len(shape) == 3 and shape[0] > 1:  # each example's matrices, if they are that
            return shape[0] % count == 0 and shape[1] != count
        weight, _ = node.next_functions[-1]  # of the second matrix
        sizes = getattr(node, "_saved_mat2_sym_sizes", (count,))
        fixed = sizes[0] % count > 0 if weight is None else _is_parameter(weight)
        return shape[-2] % count == 0 and fixed
    if name == "Index":
        return shape[0] % count == 0 and all(
            axis > 0 and _is_other(axis, whole, count)
            for whole in _shapes_below(node)
            for axis in _indexed(cast(Any, node)._saved_indices)
        )
    if name == "AsStrided":  # adaptive pooling to one position ends in one
        return shape[-1] == 1 and all(shape == whole for whole in _shapes_below(node))
    if APART.fullmatch(name):
        return any(size % count == 0 for size in shape)
    return bool(ALONG.fullmatch(name)) and all(
        _is_other(axis, whole, count)
        for whole in _shapes_below(node)
        for axis in _axes(node, len(whole) + (name == "Stack"))
    )


def _is_other(axis: int, shape: torch.Size, count: int) -> bool:
    """Whether an axis isn't that of the examples, which is the first one as a rule.

    The second one in sequence-first layers, where sequences may be several times as long.
    """
    size = shape[axis] if axis < len(shape) else 1
    if size % count > 0:
        return True
    return size != count and axis > 0 and (shape[0] == count or (axis > 1 and not shape[0] % count))


def _shapes_below(node: Node) -> Iterator[torch.Size]:
    """Shapes of what a node was made of, as far as that has gradients."""
    for source, nr in node.next_functions:
        if source is not None:
            variable = getattr(source, "variable", None)
            yield source._input_metadata[nr].shape if variable is None else variable.shape


def _indexed(indices: Sequence[Tensor | None]) -> Iterator[int]:
    """Which axes are indexed; a mask stands for as many as it has."""
    axis = 0
    for index in indices:
        size = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            yield from range(axis, axis + size)
        axis += size


def _axes(node: Node, ndim: int) -> list[int]:
    """Along which of so many axes a node works; all if it doesn't say."""
    saved = (getattr(node, name, None) for name in ("_saved_dim", "_saved_dimension"))
    axes = next((axes for axes in saved if axes is not None), ())
    axes = axes if isinstance(axes, tuple) else (axes,)
    # Those counted from the end are saved without their sign.
    return [axis - 2**64 + ndim if axis >= 2**63 else axis for axis in axes or range(ndim)]


def exponents(column: Tensor, count: int) -> Tensor:
    """A number for each of so many examples, zero in the middle: of how large they are made."""
    reach = 4.0 if _is_coarse(column) else 10.0  # half precision's is shorter
    return torch.linspace(-reach, reach, count, dtype=torch.float64)


def enlarged(column: Tensor, powers: Tensor) -> Tensor:
    """What is to be back-propagated, with each example times two to a power of its own.

    Args:
        column: ``[N, ...]``, or with further axes merged with the first one, behind the examples.
        powers: ``[N]``.
    """
    rows = powers.repeat_interleave(len(column) // len(powers))
    return column * rows.exp2().to(column).view(-1, *(1,) * (column.ndim - 1))


def norms(g: Tensor) -> Tensor:
    """Of each row: ``[N]``."""
    return torch.linalg.vector_norm(g.flatten(1), dim=1)


def are_own(before: Tensor, after: Tensor, powers: Tensor, column: Tensor) -> bool:
    """Whether each row became larger as its own example did, or is next to zero.

    Args:
        before: Norms of rows ``[N]``.
        after: Of the same, with examples enlarged.
        powers: By how much, ``[N]``.
        column: What was back-propagated.
    """
    found, rows = _powers(before, after, powers)
    return bool(((found - powers).abs() <= _tolerance(column))[rows].all())


def are_apart(before: Tensor, after: Tensor, powers: Tensor, column: Tensor) -> bool:
    """Whether each row became larger as one example did, and no two as the same; as ``are_own``."""
    found, rows = _powers(before, after, powers)
    found = found[rows].sort().values
    nearest = torch.bucketize(found, (powers[1:] + powers[:-1]) / 2)
    off = (found - powers[nearest]).abs()
    return bool((off <= _tolerance(column)).all() and (nearest.diff() > 0).all())


def _powers(before: Tensor, after: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """By which power of two each row is larger, and which aren't rounding errors of others."""
    found = (after.log2() - before.log2()).to(like)
    least = 4 * torch.finfo(before.dtype).eps
    rows = (before > least * before.max()) | (after > least * after.max())
    return found, rows.to(like.device)


def _tolerance(column: Tensor) -> float:
    """What rounding takes."""
    return 0.05 if _is_coarse(column) else 1e-3


def _is_coarse(column: Tensor) -> bool:
    return column.dtype.itemsize < 4
