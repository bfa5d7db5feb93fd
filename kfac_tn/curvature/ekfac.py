"""EKFAC of a model over a data set: KFAC's eigenvectors with exact eigenvalues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import Module

from kfac_tn.capture import Capture, Fisher
from kfac_tn.curvature.batches import Forward, call_on_pair, with_progress
from kfac_tn.curvature.compute import check_finite, compute_kfac, go_through
from kfac_tn.curvature.curvature import Curvature
from kfac_tn.curvature.eigen import Bias, EigenBlock
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.functional import common
from kfac_tn.functional.rows import rotated_second_moment
from kfac_tn.graph import find, remember
from kfac_tn.layers import ApproximationChoice, LayerBlock, partition
from kfac_tn.likelihood import Likelihood
from kfac_tn.statistics import Call


def compute_ekfac(
    model: Module,
    loss_fn: Module | Likelihood,
    loader: Iterable[Any],
    approximation: ApproximationChoice = "expand",
    fisher: Fisher = "mc",
    mc_samples: int = 1,
    bias: Bias = "separate",
    generator: torch.Generator | None = None,
    forward: Forward = call_on_pair,
    progress_bar: bool = False,
) -> Curvature:
    r"""EKFAC of a model's loss over a data set: eigenvalue-corrected Kronecker factors.

    A first pass over the loader makes KFAC's factors, a second one replaces the eigenvalues of
    B (x) A by the second moments of per-example gradients along its eigenvectors,
    sum_n (Q_B^T G_n Q_A)^2 (George et al. 2018, Eq. 10). No other eigenvalues come closer to the
    exact block in Frobenius norm, and its trace is the exact one, for every layer and loss. Memory
    for per-example gradients is bounded: they are formed for a few examples at a time.

    Args:
        model: The model. Examples must be the first axis of its outputs and in all its layers.
        loss_fn: This and the following as in ``compute_kfac``.
        loader: It is gone through twice, so an iterator won't do.
        approximation: ``"expand"`` or ``"reduce"``: of the factors whose eigenvectors are taken.
        fisher: ``"mc"`` (the second pass draws new targets), ``"type-2"`` or ``"empirical"``.
        mc_samples: Default: 1.
        bias: ``"separate"`` (default): a block of its own, with the eigenvectors of B; ``"joint"``.
        generator: Default: the global one.
        forward: As in ``compute_kfac``.
        progress_bar: Whether to show how many batches are done, in each pass. Default: no.

    Returns:
        The curvature. ``curvature.blocks["conv1"]`` has ``.input_vectors`` ``[G, d_in, d_in]``,
        ``.grad_output_vectors`` ``[G, d_out, d_out]`` and ``.values`` ``[G, d_out, d_in]``, where
        d_in counts the bias. Parameters without Kronecker structure have the diagonal blocks of
        ``compute_kfac``.

    Raises:
        ValueError: As ``compute_kfac``; for ``"forward-only"``, which has no gradients; for an
            iterator; for layers whose inputs don't have the examples in their first axis.
        TypeError: As ``compute_kfac``.
        ImportError: For a progress bar without tqdm.
        NotImplementedError: For a registered layer whose family has no ``input_rows``.

    Example:
        >>> import torch, kfac_tn
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(),
        ...                             torch.nn.Linear(4, 2))
        >>> batches = [(torch.rand(8, 3), torch.randint(2, (8,)))]
        >>> curvature = kfac_tn.compute_ekfac(model, torch.nn.CrossEntropyLoss(), batches)
        >>> curvature.blocks["0"].values.shape
        torch.Size([1, 4, 4])
    """
    if fisher == "forward-only":
        raise ValueError(
            "fisher='forward-only' has no gradients, so no eigenvalues to correct: use "
            "compute_kfac, or another Fisher."
        )
    if isinstance(loader, Iterator):
        raise ValueError(
            "EKFAC goes through the loader twice, which an iterator doesn't allow: give a "
            "DataLoader or a list of batches."
        )
    statistics = approximation, fisher, mc_samples, bias, generator
    kfac = compute_kfac(model, loss_fn, loader, *statistics, forward, progress_bar)
    layers, _ = partition(model, approximation)
    bases: dict[LayerBlock, EigenBlock] = {}
    for layer in layers:
        block = kfac.blocks[layer.name]
        assert isinstance(block, KroneckerBlock)
        bases[layer] = block.eigen()
    capture = _MomentCapture(bases, loss_fn, fisher, mc_samples, generator)
    with closing(capture):
        go_through(model, with_progress(loader, "EKFAC", progress_bar), capture, forward)
        moments = capture.take_moments()
    blocks = dict(kfac.blocks)
    for layer, basis in bases.items():
        values = moments.get(layer, torch.zeros_like(basis.values))
        check_finite(layer.name, values)
        blocks[layer.name] = replace(basis, values=values)
    return Curvature(blocks, kfac.shapes)


@dataclass(eq=False)
class _KeptCall(Call):
    """A call whose very input is kept, and whose statistic is the output gradient itself."""

    version: int | None = None

    def grad_output_statistic(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(self.output_shape)

    def kept_input(self) -> Tensor:
        """The input, as it was.

        Raises:
            RuntimeError: If it was changed in place; training would fail there, too.
        """
        assert self.input is not None
        if self.version != _version(self.input):
            raise RuntimeError(
                f"The input of layer '{self.block.name}' was changed in place after its call, but "
                "EKFAC needs it as it was: use the operation that isn't in-place there."
            )
        return self.input


class _MomentCapture(Capture):
    """Gathers second moments along eigenvectors instead of factors."""

    def __init__(
        self,
        bases: Mapping[LayerBlock, EigenBlock],
        loss_fn: Module | Likelihood,
        fisher: Fisher,
        mc_samples: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(bases, loss_fn, fisher, mc_samples, generator=lambda device: generator)
        self._bases = bases

    def take_moments(self) -> dict[LayerBlock, Tensor]:
        """The second moments ``[G, d_out, d_in]`` of all layers that the loss depends on."""
        scale = self._total_scale()
        moments = {
            block: cast(Tensor, total.result(scale))
            for block, total in self._grad_output_sums.items()
        }
        self.discard()
        return moments

    @torch._disable_dynamo
    def _record(
        self, block: LayerBlock, module: Module, x: Tensor, output: Tensor, edge: GradientEdge
    ) -> None:
        counts = block.family.batch_and_positions(module, output)
        version = _version(x)
        call = _KeptCall(block, module, output.shape, x.detach(), *counts, version)
        remember(edge, self._key, call)

    def _differentiate(
        self, outputs: Tensor, columns: Iterable[Tensor], scale: Tensor, task: int
    ) -> None:
        for one in find(outputs, self._key):
            if outputs.shape[:1] != (one.record.examples,):
                raise ValueError(
                    f"EKFAC needs the gradient of each example: layer '{one.record.block.name}' "
                    f"was called with {one.record.examples} in the first axis, but the model's "
                    f"output has shape {list(outputs.shape)}. Keep the examples in the first axis "
                    "of both, apart from all other axes, or use compute_kfac."
                )
        super()._differentiate(outputs, columns, scale, task)
        self._finish()

    def _add_column(self, received: list[tuple[Call, Tensor]], scale: Tensor) -> None:
        pairs: dict[LayerBlock, list[tuple[_KeptCall, Tensor]]] = {}
        for call, gradient in received:
            pairs.setdefault(call.block, []).append((cast(_KeptCall, call), gradient))
        for block, mine in pairs.items():
            self._grad_output_sums[block].add(_second_moment(self._bases[block], mine), scale)

    def _finish(self) -> None:
        for one_pass in self._passes.values():
            one_pass.calls = {}  # there are no input factors to make of them


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _second_moment(basis: EigenBlock, pairs: list[tuple[_KeptCall, Tensor]]) -> Tensor:
    """Sum over examples of squared gradients in a basis, from all calls of a layer.

    To its weight, the calls of a layer are further shared positions. Examples come in chunks whose
    rows and gradients (and as much again, for their rotations) stay within a limit.
    """
    block, count = pairs[0][0].block, pairs[0][0].examples
    groups, d_out, d_in = basis.values.shape
    positions = sum(call.positions for call, _ in pairs)
    written = positions * (d_in + d_out) + (d_in * d_out if positions > 1 else 0)
    elements = 2 * groups * written
    size = max(1, common.UNFOLD_BYTES // (elements * basis.values.itemsize))
    total = torch.zeros_like(basis.values)
    for start in range(0, count, size):
        part = slice(start, start + size) if size < count else ...
        inputs, grad_outputs = [], []
        for call, gradient in pairs:
            x, with_bias = call.kept_input()[part], block.bias is not None
            inputs.append(block.family.input_rows(call.module, x, with_bias))
            grad_outputs.append(block.family.grad_output_rows(call.module, gradient[part]))
        rows = _join(inputs), _join(grad_outputs)
        total += rotated_second_moment(*rows, basis.input_vectors, basis.grad_output_vectors)
    return total


def _join(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)
