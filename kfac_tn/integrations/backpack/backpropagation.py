"""BackPACK's back-propagation of a root of the loss Hessian, refusing what it can't do exactly.

BackPACK runs extensions in each module's backward hook, and looks up what to back-propagate by the
address of the module's output. Here it is looked up by the node of autograd's graph that made this
output, so that whatever lies between two modules is noticed; and a module's own Jacobian is
applied by autograd, so that every module does that treats examples independently.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import Module, Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from kfac_tn.hooks import plain
from kfac_tn.integrations.backpack.graph import (
    Edge,
    count_uses,
    is_recorded_call,
    source_of,
    vector_jacobian_products,
)
from kfac_tn.integrations.optional import load
from kfac_tn.layers import GradientFamily, LayerFamily, gradient_family
from kfac_tn.likelihood import Likelihood, empirical_factor, likelihood_of
from kfac_tn.tn.nn import RandomizedConvNd

_PACKAGE = "backpack-for-pytorch>=1.7"
_Base: Any = load("backpack.extensions.backprop_extension", _PACKAGE).BackpropExtension
_is_loss: Any = load("backpack.utils.module_classification", _PACKAGE).is_loss

Columns: TypeAlias = "dict[Module, Tensor]"  # [V, N, ...] from each loss


@dataclass(eq=False)
class _Pass:
    """What is known of one call of ``backward()``.

    Attributes:
        task: Autograd's number of it.
        examples: N.
        waiting: What is back-propagated to results whose modules haven't been reached yet.
        uses: How often each parameter is used on the way to a loss.
        visited: Nodes where that has been counted.
        done: Parameters that have their quantity.
        losses: That were reached.
        scale: What the gradients of the pass are multiplied by for the empirical Fisher.
    """

    task: int
    examples: int
    waiting: dict[Edge, Columns] = field(default_factory=dict)
    uses: Counter[Parameter] = field(default_factory=Counter)
    visited: set[Node] = field(default_factory=set)
    done: set[Parameter] = field(default_factory=set)
    losses: list[Module] = field(default_factory=list)
    scale: Tensor | None = None


class ColumnExtension(_Base):
    """What the extensions share: from a loss to the gradients at every layer's output.

    Args:
        savefield: Name of the parameters' attribute for the result.
    """

    needs_columns = True
    """Whether more than the gradient of the loss itself is back-propagated."""

    def __init__(self, savefield: str) -> None:
        super().__init__(savefield, module_exts={}, fail_mode="ERROR")
        self._pass: _Pass | None = None

    def _loss_columns(
        self, likelihood: Likelihood, outputs: Tensor, targets: Any, weight: Tensor | None
    ) -> Iterable[Tensor]:
        """Columns of a root of the loss Hessian, shaped like the outputs, if they are needed."""
        return ()

    @abstractmethod
    def _quantities(
        self, module: Module, family: GradientFamily, x: Tensor, columns: Tensor, names: set[str]
    ) -> dict[str, Any]:
        """What to save for a layer's weight and bias, from gradients ``[V, N, ...]``."""

    def expects_backpropagation_quantities(self) -> bool:
        """Whether more than gradients is back-propagated."""
        return self.needs_columns

    def set_module_extension(self, module: Any, extension: Any, overwrite: bool = False) -> None:
        """Refused: rules for further layers come from ``kfac_tn.layers.register_layer``.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} takes no module extensions: modules without parameters need "
            "none, and kfac_tn.layers.register_layer teaches it layers with parameters."
        )

    def __call__(
        self, module: Module, g_inp: tuple[Tensor | None, ...], g_out: tuple[Tensor | None, ...]
    ) -> None:
        """BackPACK calls this when ``backward()`` has passed a module."""
        gradient = g_out[0]
        if gradient is None:
            return
        is_loss = _is_loss(module) or _has_likelihood(module)
        if not is_loss and any(True for _ in module.children()):
            if _own_parameters(module) or hasattr(module, "parametrizations"):
                self._refuse(module, "has parameters of its own, but no rule for them")
            return
        if not hasattr(module, "output") or not is_recorded_call(self._inputs(module), module):
            self._refuse(module, "was called several times, but BackPACK keeps the last call alone")
        with plain(gradient.device):
            if is_loss:
                self._at_loss(module, gradient)
            else:
                self._at_module(module, gradient)

    # Losses --------------------------------------------------------------------------------------

    def _at_loss(self, loss: Module, g_out: Tensor) -> None:
        inputs = self._inputs(loss)
        outputs, targets = inputs[0], inputs[1] if len(inputs) > 1 else None
        if isinstance(targets, Tensor) and targets.requires_grad:
            self._refuse(loss, "has targets that require gradients")
        if any(True for _ in loss.children()):
            self._refuse(loss, "is a loss with submodules, which are extended, too")
        if outputs.ndim == 0 or (isinstance(loss, nn.CrossEntropyLoss) and outputs.ndim == 1):
            self._refuse(loss, "was called without a batch axis")
        if outputs.numel() == 0:
            self._pass = None
            raise ValueError(
                f"{type(self).__name__}: {loss} was called on an empty batch, with outputs of "
                f"shape {tuple(outputs.shape)}: skip such batches."
            )
        task = torch._C._current_graph_task_id()
        if self._pass is None or self._pass.task != task:
            self._pass = _Pass(task, len(outputs))
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        now = self._pass
        if now.examples != len(outputs):
            self._refuse(loss, f"has {len(outputs)} examples, another one {now.examples}")
        if loss in now.losses or (now.losses and not self.needs_columns and self.needs_likelihood):
            self._refuse(loss, "isn't the only call of a loss in this backward pass")
        now.losses.append(loss)
        count_uses(outputs, now.uses, now.visited)
        edge = source_of(outputs)
        if edge is None:
            return
        if self.needs_columns:
            self._start(loss, outputs, targets, g_out, now.waiting.setdefault(edge, {}))
        elif self.needs_likelihood:
            now.scale = self._empirical_scale(loss, outputs, targets, g_out)

    needs_likelihood = True
    """Whether the loss has to be one whose likelihood is known."""

    def _start(
        self, loss: Module, outputs: Tensor, targets: Any, g_out: Tensor, waiting: Columns
    ) -> None:
        likelihood = likelihood_of(loss)
        outputs = outputs.detach()
        weight = g_out.detach() if likelihood.reduction == "none" else None
        root = list(self._loss_columns(likelihood, outputs, targets, weight))
        columns = torch.stack(root or [torch.zeros_like(outputs)])  # of a single class it has none
        if weight is None:  # the loss's factor in the objective
            columns = columns * g_out.abs().sqrt().to(columns.dtype)
        waiting[loss] = columns.to(outputs.dtype)

    def _empirical_scale(
        self, loss: Module, outputs: Tensor, targets: Any, g_out: Tensor
    ) -> Tensor:
        """Gradients carry the loss's factor in the objective, of which curvature has the root."""
        likelihood = likelihood_of(loss)
        if likelihood.reduction == "none":
            self._refuse(loss, "has reduction='none', of which there is no empirical Fisher")
        terms = empirical_factor(likelihood, outputs.detach(), targets)
        factor = g_out.detach().abs()
        return torch.where(factor > 0, (terms / factor).sqrt(), torch.zeros_like(factor))

    # Modules -------------------------------------------------------------------------------------

    def _at_module(self, module: Module, g_out: Tensor) -> None:
        now = self._pass
        if now is None or now.task != torch._C._current_graph_task_id():
            self._refuse(module, "was reached before a loss: extend(loss_fn), and call that")
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            self._refuse(module, "normalizes with the batch's own statistics: call eval()")
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            self._refuse(module, "is random, and BackPACK doesn't keep its mask: call eval()")
        if isinstance(module, RandomizedConvNd) and module.training:
            self._refuse(module, "has random gradients in training mode: call eval()")
        inputs, output = self._inputs(module), module.output
        if not isinstance(output, Tensor):
            self._refuse(module, "returns no tensor")
        edge, sources = source_of(output), [source_of(x) for x in inputs if isinstance(x, Tensor)]
        if edge in sources and not _own_parameters(module):
            return  # a view of its input
        if len(output) != now.examples:
            text = f"returns {len(output)} in the first axis, but there are {now.examples} examples"
            self._refuse(module, text)
        waiting = now.waiting.pop(edge, {}) if edge is not None else {}
        if self.needs_columns:
            if not waiting:
                self._refuse(module, f"isn't followed by modules alone, but by {_names(now)}")
            shape = output.shape
            columns = torch.cat([each.reshape(-1, *shape) for each in waiting.values()])
        else:
            columns = g_out.unsqueeze(0)
            if now.scale is not None:
                columns = columns * now.scale
        parameters = _own_parameters(module)
        if parameters:
            self._save(module, parameters, inputs, columns, now)
        wanted = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        known = type(module) in _INDEPENDENT or gradient_family(module) is not None
        if not wanted or (known and not self.needs_columns):
            return
        arguments, recomputed = self._run_again(module, inputs, wanted)
        if not known:
            self._verify(module, arguments, recomputed)
        if not self.needs_columns:
            return
        sizes = [len(each) for each in waiting.values()]
        for i, products in zip(
            wanted, vector_jacobian_products(recomputed, arguments, columns), strict=True
        ):
            source = source_of(inputs[i])
            if source is not None:
                target = now.waiting.setdefault(source, {})
                for loss, part in zip(waiting, products.split(sizes), strict=True):
                    there = target.get(loss)
                    target[loss] = part if there is None else there + part.view_as(there)

    def _save(
        self,
        module: Module,
        parameters: dict[str, Parameter],
        inputs: Sequence[Any],
        columns: Tensor,
        now: _Pass,
    ) -> None:
        family = gradient_family(module)
        if family is None or not set(parameters) <= {"weight", "bias"}:
            self._refuse(module, f"has no rule for its parameters ({', '.join(parameters)})")
        for name, parameter in parameters.items():
            if now.uses[parameter] != 1:
                text = f"has a {name} that is used {now.uses[parameter]} times on the way to a loss"
                self._refuse(module, text)
        x = family.input_of(module, tuple(inputs), {})
        if isinstance(family, LayerFamily) and family.transposed:
            alone = cast(Any, module).forward(x[:1].detach())
            if alone.shape[1:] != cast(Tensor, module.output).shape[1:]:
                self._refuse(module, "was called with output_size: give it output_padding instead")
        saved = self._quantities(module, family, x.detach(), columns, set(parameters))
        for name, parameter in parameters.items():
            setattr(parameter, self.savefield, saved[name])
            now.done.add(parameter)

    def _inputs(self, module: Module) -> list[Any]:
        inputs: list[Any] = []
        while hasattr(module, f"input{len(inputs)}"):
            inputs.append(getattr(module, f"input{len(inputs)}"))
        if not inputs or not isinstance(inputs[0], Tensor):
            self._refuse(module, "wasn't called with its input as first positional argument")
        return inputs

    def _run_again(
        self, module: Module, inputs: Sequence[Any], wanted: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """A module's result with a graph of its own: BackPACK's hook comes when that is gone."""
        arguments = list(inputs)
        for i in wanted:
            arguments[i] = inputs[i].detach().requires_grad_()
        dtypes = {t.dtype for t in (*arguments, module.output, *module.parameters()) if _real(t)}
        if len(dtypes) > 1:
            self._refuse(module, "was called under autocast, or mixes dtypes")
        twin: Any = module
        if module.training and any(True for _ in module.buffers()):  # running averages
            twin = copy.copy(module)
            twin._buffers = {name: b if b is None else b.clone() for name, b in _buffers(module)}
        with torch.enable_grad():
            output = twin.forward(*arguments)
        if not isinstance(output, Tensor) or output.shape != module.output.shape:
            self._refuse(module, "returns something else when it is run again on its arguments")
        return [arguments[i] for i in wanted], output

    def _verify(self, module: Module, arguments: list[Tensor], output: Tensor) -> None:
        """Refuse modules that are random, or mix examples or move them in this batch.

        If every row of what is back-propagated is multiplied by a factor of its own, then so must
        be every row of what comes out, and nothing else.
        """
        before = cast(Tensor, module.output)
        if not torch.allclose(output, before, rtol=1e-4, atol=1e-6, equal_nan=True):
            text = "is random, or depends on something besides its arguments"
            self._refuse(module, text)
        generator = torch.Generator().manual_seed(0)
        column = torch.randn(output.shape, generator=generator).to(output)
        factors = _row_factors(len(output)).to(column)
        columns = torch.stack([column, *map(partial(_times_rows, column), factors)])
        for plain_rows, *multiplied in vector_jacobian_products(output, arguments, columns):
            if plain_rows.shape[:1] != output.shape[:1] or not all(
                _close(_times_rows(each, 1 / factor), plain_rows)
                for each, factor in zip(multiplied, factors, strict=True)
            ):
                self._refuse(module, "mixes examples, or changes their order")

    # The end -------------------------------------------------------------------------------------

    def _finish(self) -> None:
        now, self._pass = self._pass, None
        if now is None:
            return
        if now.waiting:
            raise NotImplementedError(
                f"{type(self).__name__}: {_names(now)} isn't the work of an extended module that "
                f"BackPACK saw once, so part of the curvature is missing. {_INSTEAD}"
            )
        missing = [tuple(p.shape) for p in now.uses if p.requires_grad and p not in now.done]
        if missing:
            raise NotImplementedError(
                f"{type(self).__name__}: parameters of shapes {missing} are used without calling "
                f"an extended module that owns them. {_INSTEAD}"
            )

    def _refuse(self, module: Module, reason: str) -> NoReturn:
        self._pass = None
        raise NotImplementedError(f"{type(self).__name__}: {module} {reason}. {_INSTEAD}")


def _row_factors(count: int) -> Tensor:
    """Factors of rows ``[K, N]``: of any two rows, at least one is not the same.

    They are powers of two with a sign, by which what is independent is multiplied without rounding;
    rows have their number's digits to base 16.
    """
    places = torch.tensor([16**k for k in range(16) if k == 0 or 16**k < count]).unsqueeze(1)
    digits = torch.arange(count) // places % 16
    return (1 - 2 * (digits % 2)) * torch.exp2(digits // 2 - 4.0)


def _times_rows(column: Tensor, factors: Tensor) -> Tensor:
    return column * factors.view(-1, *(1,) * (column.ndim - 1))


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Whether all rows are the same, but for the order of sums on a GPU."""
    if not expected.numel():
        return True
    actual, expected = (each.reshape(len(each), -1).nan_to_num() for each in (actual, expected))
    limits = torch.finfo(expected.dtype)
    scale = expected.abs().amax(1).clamp_min(limits.tiny)
    return bool(((actual - expected).abs().amax(1) <= limits.eps**0.5 * scale).all())


_INSTEAD = (
    "Write it with modules that treat examples independently, each called once "
    "(extend(model, use_converter=True) rewrites sums, flattening and modules without parameters "
    "that are called twice); freeze parameters that aren't needed; or use kfac_tn.compute_kfac, "
    "compute_ekfac, compute_ggn_diagonal or compute_per_example_gradients, which need none of this."
)

_INDEPENDENT: frozenset[type[Module]] = frozenset(
    [
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        *(nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
        *(nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus),
        *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.ZeroPad2d, nn.Upsample),
    ]
)
"""Known to be deterministic and to treat examples independently; others are verified."""


def _own_parameters(module: Module) -> dict[str, Parameter]:
    parameters = module._parameters.items()
    return {name: p for name, p in parameters if p is not None and p.requires_grad}


def _buffers(module: Module) -> Iterable[tuple[str, Tensor | None]]:
    return module._buffers.items()


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_likelihood(module: Module) -> bool:
    try:
        likelihood_of(module)
    except TypeError:
        return False
    return True


def _names(now: _Pass) -> str:
    """Of the operations that no module is known for."""
    return ", ".join(sorted({node.name() for node, _ in now.waiting})) or "no loss"
