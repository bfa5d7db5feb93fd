"""Records on the nodes of autograd's graph, and gradients just where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kfac_tn.hooks import unhooked

Record = TypeVar("Record")
Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Found(Generic[Record]):
    """A record and where it was.

    Attributes:
        record: What was remembered.
        node: The node that made the recorded result.
        output_nr: Which of the node's outputs that is.
        deepest: Whether the node depends on no other node with a record.
        source: The node that made what the recorded call was given; None without a graph.
        within: A further node of the call, through which leaves take part that aren't below it.
    """

    record: Record
    node: Node
    output_nr: int
    deepest: bool
    source: Node | None = None
    within: Node | None = None


def output_edge(output: Tensor) -> GradientEdge | None:
    """Where the gradient of a result arrives, also if it is changed in place afterwards.

    An in-place operation on a view (a linear layer returns one for inputs with more than two axes)
    makes new nodes for the view, and the old one drops out of the graph; the base's stays.

    Returns:
        The edge; the gradient there may have the shape of the base. None for a leaf.
    """
    base = output._base
    if base is not None and base.numel() == output.numel() and base.grad_fn is not None:
        output = base if base.is_contiguous() and output.is_contiguous() else output
    return None if output.grad_fn is None else get_gradient_edge(output)


def remember(
    edge: GradientEdge,
    key: object,
    record: object,
    x: Tensor | None = None,
    within: Node | None = None,
) -> None:
    """Leave a record with a node, under the finder's key; it lives as long as the node.

    With it goes where the call's input ``x`` came from, which the node keeps alive anyway, and what
    else is part of the call.
    """
    source = get_gradient_edge(x).node if x is not None and x.requires_grad else None
    _metadata(edge.node).setdefault(key, []).append((edge.output_nr, record, source, within))


def left_with(node: Node, key: object) -> list[tuple[Any, ...]]:
    """What ``remember`` left with a node: tuples of an output's number, the record, and more."""
    return _metadata(node).get(key, [])


def find(outputs: Tensor, key: object) -> list[Found[Any]]:
    """All records that outputs depend on.

    Raises:
        RuntimeError: If part of the graph is hidden by reentrant activation checkpointing.
    """
    found: list[Found[Any]] = []
    below: dict[Node, bool] = {}  # whether a node or what it depends on has a record
    stack: list[tuple[Node | None, bool]] = [(outputs.grad_fn, False)]
    while stack:
        node, children_done = stack.pop()
        if node is None or (node in below and not children_done):
            continue
        children = [function for function, _ in node.next_functions]
        if not children_done:
            if node.name() == "CheckpointFunctionBackward":
                raise RuntimeError(
                    "torch.utils.checkpoint with use_reentrant=True hides its layers from KFAC: "
                    "use checkpoint(..., use_reentrant=False)."
                )
            below[node] = False
            stack.append((node, True))
            stack.extend((child, False) for child in children)
            continue
        records = left_with(node, key)
        deep = any(below[child] for child in children if child is not None)
        found.extend(Found(record, node, number, not deep, *of) for number, record, *of in records)
        below[node] = deep or bool(records)
    return found


def bypassing(
    outputs: Tensor,
    found: Sequence[Found[Record]],
    owners: Mapping[Tensor, Owner],
    owners_of: Callable[[Record], Iterable[Owner]],
) -> set[Owner]:
    """Owners of leaves that outputs depend on by another way than through the owner's records.

    From a leaf on, the first node with a record has to be one of its owner's, and reached from
    within that call: not by way of the call's input.

    Args:
        outputs: Whose graph it is.
        found: What ``find`` found there.
        owners: Of leaves.
        owners_of: Of a record.
    """
    recorded: defaultdict[Node, set[Owner]] = defaultdict(set)
    sources: defaultdict[Owner, set[Node]] = defaultdict(set)
    for one in found:
        for owner in owners_of(one.record):
            recorded[one.node].add(owner)
            if one.within is not None:
                recorded[one.within].add(owner)
            if one.source is not None:
                sources[owner].add(one.source)
    users: dict[Node, list[Node]] = {}
    leaves: list[tuple[Node, Owner]] = []
    stack = [] if outputs.grad_fn is None else [outputs.grad_fn]
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child not in users:
                users[child] = []
                stack.append(child)
                variable = getattr(child, "variable", None)
                if isinstance(variable, Tensor) and variable in owners:
                    leaves.append((child, owners[variable]))
            users[child].append(node)
    return {
        owner
        for leaf, owner in leaves
        if not _covered(leaf, owner, users, recorded, sources.get(owner, set()))
    }


def _covered(
    leaf: Node,
    owner: Owner,
    users: Mapping[Node, list[Node]],
    recorded: Mapping[Node, set[Owner]],
    sources: set[Node],
) -> bool:
    """Whether every way up from a leaf meets a record of its owner before all else.

    That is, before another's record, the outputs, and what the owner's calls were given.
    """
    if leaf in sources:
        return False
    above, seen = list(users[leaf]), {leaf}
    while above:
        node = above.pop()
        # A node may be both where a compiler made one of a call and of what came before.
        if node in seen or owner in recorded.get(node, ()):
            continue
        if node in recorded or node not in users or node in sources:
            return False
        seen.add(node)
        above += users[node]
    return True


def differentiate(
    outputs: Tensor,
    column: Tensor,
    found: Sequence[Found[Record]],
    receive: Callable[[Record, Tensor], None],
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor | None, ...]:
    """Back-propagate a column, and hand out the gradient at each record as it becomes complete.

    Only the deepest gradients are asked for, the others pass by: no gradient of a layer's output
    outlives its use, and none of a weight is computed, but for ``parameters``. The graph stays.

    Args:
        outputs: What is differentiated.
        column: Shaped like it.
        found: Records that ``find`` found.
        receive: Takes a record and the gradient there; records without one are left out.
        parameters: Leaves whose gradients are wanted, too.

    Returns:
        The gradients of the parameters, None where there is none.
    """

    def pass_by(gradients: tuple[Tensor | None, ...], one: Found[Record]) -> None:
        gradient = gradients[one.output_nr]
        if gradient is not None:
            receive(one.record, gradient)

    deepest = [one for one in found if one.deepest]
    handles = [
        one.node.register_prehook(lambda gradients, one=one: pass_by(gradients, one))
        for one in found
        if not one.deepest
    ]
    try:
        edges = [GradientEdge(one.node, one.output_nr) for one in deepest]
        with unhooked(parameters):
            gradients = torch.autograd.grad(
                [outputs],
                cast(Any, [*edges, *parameters]),
                [column],
                retain_graph=True,
                allow_unused=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    for one, gradient in zip(deepest, gradients, strict=False):
        if gradient is not None:
            receive(one.record, gradient)
    return gradients[len(deepest) :]


def concerns(outputs: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Whether the backward pass that is running, from outputs on, may train these leaves.

    It doesn't if they are there, but others alone get gradients, as in
    ``torch.autograd.grad(loss, x)`` for an attack on the inputs. One that ends within the graph may
    be continued from there.
    """
    ours = [get_gradient_edge(leaf).node for leaf in leaves if leaf.requires_grad]
    if any(_executes(node) for node in ours):
        return True
    below = set(_leaves_below(outputs))
    return below.isdisjoint(ours) or not any(_executes(node) for node in below)


class Rounds:
    """Tells where gradients begin anew: micro-batches before belong to gradients that were reset.

    By ``model.zero_grad()``, say, after a batch that was skipped, of which no optimizer is told.
    Backward passes that return gradients instead of accumulating them tell nothing. What is said
    before a backward pass belongs to it: asked then, too, it begins there.
    """

    def __init__(self) -> None:
        self._task, self._accumulated = -1, False

    def begins(self, leaves: Collection[Tensor]) -> bool:
        """Whether the backward pass that runs, or is to come, is the first one since a reset."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return False
        anew = self._accumulated and all(leaf.grad is None for leaf in leaves)
        self._task = task
        self._accumulated = any(
            _executes(get_gradient_edge(leaf).node, returned=False)
            for leaf in leaves
            if leaf.requires_grad
        ) or (self._accumulated and not anew)
        return anew


def depends(x: Tensor, leaves: Collection[Tensor]) -> bool:
    """Whether a tensor was computed from any of these leaves.

    Example:
        >>> import torch
        >>> w = torch.ones((), requires_grad=True)
        >>> depends(2 * w, {w}), depends(w.detach(), {w})
        (True, False)
    """
    return any(getattr(node, "variable", None) in leaves for node in _leaves_below(x))


def _executes(node: Node, returned: bool = True) -> bool:
    """Whether the backward pass that is running gets to a node.

    Args:
        node: The node.
        returned: What is said of a leaf whose gradient is returned instead of accumulated.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return returned


def _leaves_below(outputs: Tensor) -> Iterator[Node]:
    """The nodes of the leaves that outputs depend on."""
    stack = [] if outputs.grad_fn is None else [outputs.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if not node.next_functions:
            yield node
        children = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= children
        stack += children


def _metadata(node: Node) -> dict[Any, Any]:
    """Python's dict on a node: annotated as a method in torch, in truth an attribute."""
    return cast(dict[Any, Any], node.metadata)
