"""What autograd's graph says about a model of modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Module, Parameter

Edge: TypeAlias = "tuple[Node, int]"

_HOOK = "BackwardHookFunctionBackward"
_VIEWS = {
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
"""Operations that at most name the axes anew: entries keep their values and their order."""


def source_of(tensor: Tensor) -> Edge | None:
    """The operation that made a tensor, behind BackPACK's hooks and views; None for leaves."""
    if tensor.grad_fn is None:
        return None
    edge = get_gradient_edge(tensor)
    node: Node | None = edge.node
    number = edge.output_nr
    while node is not None and (node.name() in _VIEWS or node.name() == _HOOK):
        node, number = node.next_functions[number if node.name() == _HOOK else 0]
    return None if node is None or hasattr(node, "variable") else (node, number)


def is_recorded_call(inputs: Sequence[Any], module: Module) -> bool:
    """Whether a module's hook runs for the call whose inputs and output BackPACK recorded.

    Full backward hooks run at a node that PyTorch puts before the module's inputs, or, if none of
    these requires a gradient, behind its output.
    """
    node: Any = torch._C._current_autograd_node()
    if any(isinstance(x, Tensor) and x.grad_fn is node for x in inputs):
        return True
    output = module.output
    return isinstance(output, Tensor) and any(
        function is output.grad_fn for function, _ in node.next_functions
    )


def count_uses(outputs: Tensor, uses: Counter[Parameter], visited: set[Node]) -> None:
    """Add up how many operations that outputs depend on each parameter takes part in."""
    stack = [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        for child, _ in node.next_functions:
            variable = getattr(child, "variable", None)
            if isinstance(variable, Parameter):
                uses[variable] += 1
            else:
                stack.append(child)


def vector_jacobian_products(
    output: Tensor, arguments: Sequence[Tensor], columns: Tensor
) -> list[Tensor]:
    """Products ``[V, *shape]`` of columns with the Jacobians for each argument."""
    products = [columns.new_zeros(len(columns), *x.shape) for x in arguments]
    for v, column in enumerate(columns if output.requires_grad else ()):
        gradients = torch.autograd.grad(
            output, arguments, column, retain_graph=True, allow_unused=True
        )
        for product, gradient in zip(products, gradients, strict=True):
            if gradient is not None:
                product[v] = gradient
    return products
