"""The hooks: from a plain forward and backward pass to the Kronecker factors of that pass.

A layer's forward hook computes what the input factor needs and leaves it in the metadata of the
autograd node that made the layer's output. When the user's backward pass reaches the loss, a hook
on the loss walks the graph from the model's outputs, finds those records, and makes the extra
backward passes of the Fisher in question. So a record lives exactly as long as its graph, a loss
finds just the calls it depends on (whatever was in place, called twice, checkpointed or unused),
and a forward pass that nobody differentiates leaves nothing behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from kfac_tn.columns import (
    Samples,
    empirical_column,
    mc_columns,
    random_signs,
    root_columns,
    samples_of,
    single_factor,
)
from kfac_tn.examples_first import (
    check_examples_first,
    check_rows_apart,
    check_rows_own,
    find_shared,
    refuse_packed,
    refuse_shared,
)
from kfac_tn.factors import Gram
from kfac_tn.functional import common
from kfac_tn.graph import (
    Found,
    Rounds,
    bypassing,
    concerns,
    depends,
    differentiate,
    find,
    output_edge,
    remember,
)
from kfac_tn.hidden_watch import HiddenWatch
from kfac_tn.hooks import WeakHook, alone, plain, recorded, remove, timed
from kfac_tn.layers import LayerBlock, OtherParameter
from kfac_tn.layers.hidden import HiddenCall
from kfac_tn.likelihood import Likelihood, likelihood_of
from kfac_tn.moments import Basis, MomentCollector
from kfac_tn.passes import Passes
from kfac_tn.statistics import Call, Statistics, input_statistic

Fisher: TypeAlias = Literal["mc", "type-2", "empirical", "forward-only"]


class Capture(HiddenWatch):
    """Watches a model and a loss, and turns what they do into Kronecker factors.

    Nothing happens while ``armed`` is false, under ``torch.no_grad()``, in backward passes (where
    checkpointing runs layers again), in transforms of ``torch.func``, or after ``close()``. Nor do
    backward passes count that have gradients of inputs alone, or calls with other weights. The
    hooks don't keep this object alive, and copies of the model don't report to it. Layers whose
    weight a loss depends on by other ways, too, are left out, and named in ``bypassed``: what their
    calls tell isn't all of their curvature. ``called`` is whether any layer was since the last
    ``take`` or ``discard``: the loss of that call may be still to come.

    Scale (curvature is that of the loss as the user computes it): input factors are means over
    the examples of all passes. Output-gradient factors of several losses in one ``backward()`` add
    up, each with the factor that it has in the objective. Over several ``backward()`` calls
    (micro-batches) a mean loss averages, weighted by those factors; a sum loss adds up. An overall
    factor, such as gradient scaling's, cancels. With ``reduction="none"`` the weights are those
    that the user's own reduction gives each element, normalized to sum to 1.

    Args:
        blocks: The layers to watch.
        loss_fn: The loss module, called by the user, or a likelihood.
        fisher: ``"mc"``: targets drawn from the model, one backward pass for each sample.
            ``"type-2"``: the exact root of the loss Hessian, one pass for each column, with random
            signs of the examples: where the model mixes these, as batch normalization in training
            mode or a graph's edges do, products of two examples' gradients cancel on average.
            ``"empirical"``: the gradients of the user's own pass. ``"forward-only"``: input
            factors alone; output-gradient factors are the identity (Benzing 2022, FOOF).
        mc_samples: Samples for ``"mc"``; ``"auto"``: see ``samples_of``.
        diagonals: Parameters whose diagonal Fisher is wanted from the same extra passes.
        generator: Source of randomness; by default the device's global one.
        basis: Along which the gradients of a layer are squared (its input is kept until then), or
            None for a layer whose aren't, yet.
        joint: Whether input factors have a last row and column for the bias, if there is one.
        once: Whether one batch tells whose rows are whose; else each is asked, where in doubt.

    Raises:
        ValueError: For an unknown ``fisher``, ``mc_samples < 1``, or the empirical Fisher of a loss
            with ``reduction="none"``.
        TypeError: For a loss whose likelihood isn't known.
    """

    def __init__(
        self,
        blocks: Iterable[LayerBlock],
        loss_fn: Module | Likelihood,
        fisher: Fisher = "mc",
        mc_samples: Samples = 1,
        diagonals: Iterable[OtherParameter] = (),
        generator: Callable[[torch.device], torch.Generator | None] = lambda device: None,
        basis: Callable[[LayerBlock], Basis | None] = lambda block: None,
        joint: bool = True,
        once: bool = True,
    ) -> None:
        if fisher not in get_args(Fisher):
            raise ValueError(f"fisher is {fisher!r}: choose one of {get_args(Fisher)}.")
        samples_of(mc_samples, {})  # or refuses
        self.likelihood = likelihood_of(loss_fn)
        if fisher == "empirical" and self.likelihood.reduction == "none":
            raise ValueError(
                "fisher='empirical' isn't defined for a loss with reduction='none': use 'mean' or "
                "'sum', or fisher='mc'."
            )
        self._loss_fn = cast(Callable[[Tensor, Tensor], Tensor], loss_fn)
        self.fisher = fisher
        self.mc_samples = mc_samples
        self.generator = generator
        self._basis = basis
        self._joint, self._once = joint, once
        self._verified = False  # that the layers' first axis is that of the examples
        self._apart = False  # and that of the outputs, which don't meet before the layers
        self._own = False  # and that each row is its own example's
        self._shared: dict[tuple[Any, ...], bool] = {}  # whether it isn't, of indices
        self.armed = True
        self.seen_loss = False
        self.seconds: dict[str, float] = {}
        self.diagonals = [other.parameter for other in diagonals]
        self._blocks = {module: block for block in blocks for module in block.modules}
        self._owners: dict[Tensor, LayerBlock] = {
            p: block for block in self._blocks.values() for p in block.parameters.values()
        }
        one_hot = any(block.family.one_hot for block in self._blocks.values())
        self._signs = one_hot or bool(self.diagonals)  # for squares of sums over examples
        self._key = object()  # marks our records among those of other captures
        self._rounds = Rounds()
        self._kept: list[Call] = []
        self._reset()

        watched = [(module, "_after_layer") for module in self._blocks]
        if isinstance(loss_fn, Module):
            watched.append((loss_fn, "_after_loss"))
        # Before the user's own hooks, which may return something else than the module did.
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(
                cast(Any, WeakHook(self, method)), prepend=True, with_kwargs=True
            )
            for module, method in watched
        ]
        self._handles += self._watch_hidden(self._blocks)
        self._finalizer = weakref.finalize(self, remove, self._handles)

    def close(self) -> None:
        """Remove every hook; nothing is recorded any more."""
        self._finalizer()
        self.discard()

    def discard(self) -> None:
        """Forget what was seen since the last ``take``."""
        self._leave_all()
        self._reset()

    def _reset(self) -> None:
        adds_up = self.likelihood.reduction == "sum"
        self._passes = Passes(adds_up, inputs_only=self.fisher == "forward-only")
        for call in self._kept:
            call.release()
        self._kept = []
        self._counted: dict[Call, None] = {}
        self._columns_seen = 0
        self.called = False
        self.bypassed: set[LayerBlock] = set()
        self.sizes: dict[LayerBlock, tuple[int, int]] = {}  # examples, and times positions

    @property
    def passes(self) -> float:
        """Extra backward passes for each of the user's since the last ``take``."""
        return self._columns_seen / max(1, len(self._passes))

    def observe(self, outputs: Tensor, targets: Tensor, weight: float | Tensor = 1.0) -> None:
        """Record a loss that isn't computed by the loss module: between forward and backward.

        Args:
            outputs: What the model returned, with its graph.
            targets: What the loss compares them with.
            weight: The factor of this loss in the objective, relative to other calls'.

        Raises:
            ValueError: If the loss has ``reduction="none"``: the weights of its elements aren't
                known here. For outputs without a graph, or a weight that isn't in [0, inf).
        """
        if self.likelihood.reduction == "none":
            raise ValueError(
                "observe() can't know how a loss with reduction='none' is reduced: give the "
                "optimizer a loss with reduction 'mean' or 'sum'."
            )
        if not isinstance(weight, Tensor) and not 0 <= weight < float("inf"):
            raise ValueError(f"The weight of a loss is {weight}: it must be in [0, inf).")
        self.seen_loss = True
        if not self.armed or not torch.is_grad_enabled():
            return
        if not outputs.requires_grad:
            raise ValueError(
                "What is observed has no graph: give the very outputs of the model, not detached, "
                "before backward() frees it."
            )
        if self._rounds.begins(self._owners):
            self.discard()
        task = -1 - len(self._passes)  # each call stands for a backward pass of its own
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        scale = torch.as_tensor(weight, dtype=dtype, device=outputs.device)
        with plain(outputs.device):
            found = self._find(outputs)
            if self.fisher == "forward-only":
                self._passes.begin(task, scale, found)
                return
            make = self._empirical if self.fisher == "empirical" else self._columns
            self._differentiate(outputs, found, make(outputs, targets, found), scale, task)

    def take(self) -> Statistics:
        """Return the factors of all passes since the last call, and forget them."""
        statistics = self._passes.statistics().without(self.bypassed)
        statistics = replace(statistics, columns=max(1.0, self.passes))
        self._reset()
        return statistics

    # Hooks -------------------------------------------------------------------------------------

    def _active(self) -> bool:
        return (
            self.armed
            and recorded(self)
            and torch._C._current_graph_task_id() == -1  # not in a backward pass
        )

    def _after_layer(self, module: Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._active():
            self._record(module, args, kwargs, output)

    def _after_hidden(self, call: HiddenCall) -> None:
        if self._active():
            self._record(call.layer, (call.x,), {}, call.output, call)

    @torch._disable_dynamo  # its graph would break here anyway, once for each layer
    @timed("statistics")
    def _record(
        self, module: Module, args: tuple, kwargs: dict, output: Any, *hidden: HiddenCall
    ) -> None:
        block = self._blocks.get(module)
        if block is None or not block.weight.requires_grad:  # in a copy of the model, or frozen
            return
        if not block.owned_by(module):  # what is computed from its weight isn't its weight
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        edge = output_edge(output)
        if edge is None:
            return
        self.called = True
        x = block.family.input_of(module, args, kwargs)
        counts = block.family.batch_and_positions(module, output) if output.numel() else (0, 0)
        with plain(output.device):
            called = block.family.called(module, x, output)
            statistic = input_statistic(block, called, x, counts, self._joint)
        call = Call(block, module, output.shape, statistic, *counts)
        if call.examples and self._basis(block) is not None:
            call.keep(x)
        for each in hidden:
            call.packed = each.packed
            refuse_packed(call)
        remember(edge, self._key, call, x, *(each.within for each in hidden))

    def _after_loss(self, module: Module, args: tuple, kwargs: dict, loss: Any) -> None:
        if not recorded(self) or not isinstance(loss, Tensor):
            return
        self.seen_loss = True
        if not self._active() or not loss.requires_grad:
            return
        values = [*args, *kwargs.values()]
        outputs = kwargs.get("input", values[0])
        targets = kwargs.get("target", values[1])
        if isinstance(targets, Tensor) and depends(targets, self._owners):
            raise ValueError(
                "The targets of the loss depend on the model's parameters, too, but its curvature "
                "is that of its first argument: give targets.detach() if they are to be constant, "
                "or one model's output that all of it depends on, such as f(a) - f(b) and zeros."
            )
        hook = WeakHook(self, "_at_loss_backward")
        loss.register_hook(lambda gradient: hook(outputs, targets, gradient))

    @timed("statistics")
    def _at_loss_backward(self, outputs: Tensor, targets: Tensor, gradient: Tensor) -> None:
        """Runs inside the user's backward pass, before it enters the model."""
        if not concerns(outputs, [*self._owners, *self.diagonals]):
            return
        if self._rounds.begins(self._owners):
            self.discard()
        task = torch._C._current_graph_task_id()
        with plain(outputs.device):
            gradient, weight = common.cast(gradient.detach()), None
            scale = gradient.sum()
            if self.likelihood.reduction == "none":
                weight = gradient / scale  # positive also for an objective that is maximized
            scale = scale.abs()
            found = self._find(outputs)
            if self.fisher == "forward-only":
                self._passes.begin(task, scale, found)
            elif self.fisher == "empirical":
                self._listen(outputs, found, targets, scale, task)
            else:
                columns = self._columns(outputs, targets, found, weight)
                self._differentiate(outputs, found, columns, scale, task)

    # Passes ------------------------------------------------------------------------------------

    def _find(self, outputs: Tensor) -> list[Found[Call]]:
        """The calls that a loss depends on, counted; some to be ignored."""
        found = find(outputs, self._key)
        bypassed = bypassing(outputs, found, self._owners, lambda call: (call.block,))
        self.bypassed |= bypassed
        for call in dict.fromkeys(one.record for one in found):
            if call.examples == 0 or call.block in bypassed:
                call.ignore()
            elif call not in self._counted:
                self._counted[call] = None
                examples, terms = self.sizes.get(call.block, (0, 0))
                more = call.examples
                self.sizes[call.block] = examples + more, terms + more * call.positions
        return found

    def _columns(
        self,
        outputs: Tensor,
        targets: Tensor,
        found: Sequence[Found[Call]],
        weight: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """What to back-propagate, in turn: columns of a root of the loss Hessian."""
        outputs, generator = outputs.detach(), self.generator(outputs.device)
        if self.fisher == "mc":
            samples = samples_of(self.mc_samples, self.sizes)
            return mc_columns(self.likelihood, outputs, targets, samples, generator, weight)
        if generator is None:  # signs are chosen by us: no random state of the user's is moved
            generator = torch.Generator(outputs.device).manual_seed(self._columns_seen)
        single = _of_one_example(found, outputs)
        return root_columns(self.likelihood, outputs, targets, single, generator, weight)

    def _empirical(
        self, outputs: Tensor, targets: Tensor, found: Sequence[Found[Call]]
    ) -> Iterator[Tensor]:
        """The gradient of the loss itself, scaled such that sum_n g g^T is the empirical Fisher."""
        given = outputs.detach(), targets, _of_one_example(found, outputs)
        with alone(None):
            column = empirical_column(self._loss_fn, self.likelihood, *given)
        generator = self.generator(outputs.device)
        yield random_signs(column, generator) if self._signs else column

    def _differentiate(
        self,
        outputs: Tensor,
        found: list[Found[Call]],
        columns: Iterable[Tensor],
        scale: Tensor,
        task: int,
    ) -> None:
        """Back-propagate columns from the outputs to every recorded call, and accumulate."""
        parameters = [p for p in self.diagonals if p.requires_grad]  # some may be frozen by now
        if not found and not parameters:
            return
        if self.fisher == "type-2" and not (self._signs or self._apart):
            self._apart = check_rows_apart(found, outputs)
        one_pass, calls = self._passes.begin(task, scale), self._keep_until_taken(found, outputs)
        for column in columns:
            self._columns_seen += 1
            # A mean over no terms (all targets ignored) is NaN: its weight is zero.
            column = torch.where(scale > 0, column, 0).to(outputs.dtype)
            received: list[tuple[Call, Tensor | Gram]] = []
            moments = MomentCollector(self._basis, calls)

            def receive(
                call: Call, gradient: Tensor, received: list = received, moments: Any = moments
            ) -> None:
                if call.ignored:
                    return
                if call.block.has_factors:
                    received.append((call, call.grad_output_statistic(gradient)))
                moments.add(call, gradient)

            gradients = differentiate(outputs, column, found, receive, parameters)
            one_pass.join(call for call, _ in received)
            diagonals = (
                (parameter, (gradient.to_dense() if gradient.is_sparse else gradient).square())
                for parameter, gradient in zip(parameters, gradients, strict=True)
                if gradient is not None
            )
            self._passes.add(received, moments.finish(), diagonals, scale)

    def _keep_until_taken(self, found: list[Found[Call]], outputs: Tensor) -> list[Call]:
        """The calls whose inputs are kept, from now on until the statistics are taken."""
        find_shared([one for one in found if one.record.keeps], outputs, self._shared)
        self._verified = check_examples_first(found, outputs, self.fisher, self._verified)
        if not self._own:
            self._own = check_rows_own(found, outputs) and self._once
        calls = [one.record for one in found if one.record.keeps]
        self._kept += calls
        return calls

    def _listen(
        self, outputs: Tensor, found: list[Found[Call]], targets: Tensor, scale: Tensor, task: int
    ) -> None:
        """Take the gradients of the user's own pass, as it arrives at each layer's output."""
        if self._passes.get(task) is not None:
            raise RuntimeError(
                "fisher='empirical' isn't defined for several losses in one backward(): call "
                "backward() for each, or use fisher='mc'."
            )
        one_pass = self._passes.begin(task, scale)
        single = _of_one_example(found, outputs)
        one_pass.terms = single_factor(self.likelihood, outputs, targets, single)
        heeded = [one for one in found if not one.record.ignored]
        refuse_shared(find_shared(heeded, outputs, self._shared), outputs)
        one_pass.moments = MomentCollector(self._basis, self._keep_until_taken(found, outputs))
        hook = WeakHook(self, "_at_layer_backward")
        for one in heeded:
            one.node.register_prehook(lambda gradients, one=one: hook(task, one, gradients))

    def _at_layer_backward(self, task: int, one: Found[Call], gradients: tuple) -> None:
        gradient, call = gradients[one.output_nr], one.record
        one_pass = self._passes.get(task) if task == torch._C._current_graph_task_id() else None
        if gradient is None or one_pass is None:  # a second backward through a retained graph
            return
        with plain(gradient.device):
            gradient = gradient.detach()
            if call.block.has_factors:
                one_pass.grad_outputs.append((call, call.grad_output_statistic(gradient)))
                one_pass.calls[call] = 0
            cast(MomentCollector, one_pass.moments).add(call, gradient)


def _of_one_example(found: Sequence[Found[Call]], outputs: Tensor) -> bool:
    """Whether the only axis of outputs is that of one example's numbers, as far as layers tell."""
    several = outputs.dim() == 1 and len(outputs) > 1
    return several and bool(found) and all(one.record.examples == 1 for one in found)
