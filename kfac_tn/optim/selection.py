"""Which elements of what a model returned a loss got, found in autograd's graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfac_tn.curvature.batches import tensors_of
from kfac_tn.graph import left_with, output_edge, remember

SELECTING = re.compile(
    "(ToCopy|Clone|Alias|View|UnsafeView|Reshape.*|Squeeze|Unsqueeze|Transpose|T|Permute|Flip|Roll"
    "|Expand|Slice|Select|Diagonal|AsStrided|Unbind|Split|SplitWithSizes|Index|IndexSelect|Gather"
    "|Take|MaskedSelect|PackPaddedSequence)Backward[0-9]*"
)
"""Nodes of operations whose results are elements of the one tensor they are given."""

ON_MODULES = "BackwardHookFunctionBackward"
"""The node that torch adds to the results of modules with backward hooks: each passes through."""

BASE = 256
"""Whole numbers below it are exact in every precision; as digits, all are."""


@dataclass(eq=False)
class Output:
    """One of the tensors that a model returned; lives as long as the node that made it.

    Attributes:
        place: Its number among them.
        value: The same without its graph.
        version: How often it had been changed in place.
    """

    place: int
    value: Tensor
    version: int


@dataclass(frozen=True)
class Selection:
    """Elements of one of the tensors that a model returns.

    Attributes:
        place: Which tensor.
        elements: Which of it, ``[numel]``; None: all, in their order.
        shape: In which the loss gets them.
        dtype: In which.
    """

    place: int
    elements: Tensor | None
    shape: torch.Size
    dtype: torch.dtype

    def of(self, returned: Any) -> Tensor:
        """These, of what the model returns now."""
        output = tensors_of(returned)[self.place]
        if self.elements is not None:
            output = output.reshape(-1)[self.elements]
        return output.reshape(self.shape).to(self.dtype)


def mark(returned: Any, key: object) -> list[Output]:
    """Leave a record with the nodes that made what a model returned, under a key.

    Returns:
        The records, of tensors with a graph.
    """
    outputs = []
    for place, tensor in enumerate(tensors_of(returned)):
        edge = output_edge(tensor)
        if edge is not None and tensor.is_floating_point():
            outputs.append(Output(place, tensor.detach(), tensor._version))
            remember(edge, key, outputs[-1])
    return outputs


def selected(tensor: Tensor, key: object) -> tuple[Output, Selection] | None:
    """What a tensor is of the marked output that it was made of, if it is no more than elements.

    In any order, shape and precision, as of ``logits[:, :-1].reshape(-1, C).float()``. These are
    found by the operations' own derivatives, which send numbers back to where they came from.

    Args:
        tensor: What the loss was given.
        key: Of ``mark``.

    Returns:
        The record and the selection. None if there was more than selecting, elements are repeated,
        or were changed in place.
    """
    way: list[tuple[Node, int]] = []
    node, number = tensor.grad_fn, tensor.output_nr
    while node is not None:
        for of, output, *_ in left_with(node, key):
            if of == number:
                try:
                    elements, found = _elements(tensor, output, way)
                except RuntimeError:  # the graph is freed: a loss that is only looked at
                    return None
                selection = Selection(output.place, elements, tensor.shape, tensor.dtype)
                return (output, selection) if found else None
        if node.name() == ON_MODULES:
            node, number = node.next_functions[number]
            continue
        before = [edge for edge in node.next_functions if edge[0] is not None]
        if len(before) != 1 or not SELECTING.fullmatch(node.name()):
            return None
        way.append((node, number))
        node, number = before[0]
    return None


@torch.no_grad()
def _elements(
    tensor: Tensor, output: Output, way: list[tuple[Node, int]]
) -> tuple[Tensor | None, bool]:
    """Which elements of an output a tensor has, and whether it has nothing else."""
    value, count = output.value, tensor.numel()
    if not way:
        return None, value._version == output.version
    numbers = torch.arange(count, device=tensor.device)
    times = _sent_back(torch.ones_like(numbers), tensor, way)
    places = torch.zeros_like(times)
    power = 1
    while power < count:
        places += _sent_back(numbers // power % BASE, tensor, way) * power
        power *= BASE
    there = times.nonzero().squeeze(1)
    if len(there) != count or bool((times > 1).any()):
        return None, False
    elements = torch.empty_like(there)
    elements[places[there]] = there
    found = value.reshape(-1)[elements].reshape(tensor.shape).to(tensor.dtype)
    same = torch.allclose(found, tensor, rtol=0, atol=0, equal_nan=True)
    in_order = count == value.numel() and torch.equal(elements, numbers)
    return None if in_order else elements, same


def _sent_back(values: Tensor, tensor: Tensor, way: list[tuple[Node, int]]) -> Tensor:
    """Each of a tensor's values at the place of the output from where its element was taken."""
    gradient = values.reshape(tensor.shape).to(tensor.dtype)
    for node, number in way:
        given: list[Tensor | None] = [None] * len(cast(Any, node)._input_metadata)
        given[number] = gradient
        result = cast(Any, node)(*given)
        results = result if isinstance(result, tuple) else (result,)
        (gradient,) = (one for one in results if one is not None)
    return gradient.reshape(-1).round().long()
