"""KFAC of a model over a data set, without an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from kfac_tn.capture import Capture, Fisher
from kfac_tn.curvature.batches import (
    Forward,
    call_on_pair,
    outputs_and_targets,
    with_progress,
)
from kfac_tn.curvature.block import Block, DiagonalBlock
from kfac_tn.curvature.checks import (
    check_graph,
    refuse_batch_statistics,
    refuse_random_gradients,
    refuse_scaled_gradients,
    restored,
)
from kfac_tn.curvature.curvature import Curvature
from kfac_tn.curvature.eigen import Bias
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.curvature.layout import Layout
from kfac_tn.factors import Factors
from kfac_tn.hooks import alone, uncompiled
from kfac_tn.layers import ApproximationChoice, CurvatureChoice, LayerBlock, partition
from kfac_tn.likelihood import Likelihood
from kfac_tn.moments import Basis

LARGEST = 16384
"""Largest dimension of a factor by default."""


def compute_kfac(
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
    curvature: CurvatureChoice = "kfac",
    max_dim: int | None = LARGEST,
) -> Curvature:
    r"""KFAC of a model's loss over a data set: Kronecker factors for every layer.

    Each layer's block is B (x) A (Martens & Grosse 2015; with weight sharing Eschenhagen et al.
    2023). Trainable parameters without Kronecker structure (normalization, ...) have a diagonal
    block, estimated without bias from the same backward passes. (Such an estimate, not exact, is B
    of an embedding of positions, whose indices examples share, for every Fisher.) The model is used
    in the mode (train or eval) it is in, and is left as it was.

    Args:
        model: The model; called on each batch, on whatever device that is.
        loss_fn: The loss, a module (``kfac_tn.likelihood`` lists which) or a likelihood.
        loader: Batches ``(inputs, targets)``, or what ``forward`` takes. The curvature is that of
            the loss on the whole set: a mean loss is averaged over batches by their number of
            terms, a sum loss summed.
        approximation: ``"expand"`` (exact for weights shared over positions whose losses add up),
            ``"reduce"`` (for positions that are averaged, and cheaper), a dict by layer name or a
            function of (name, module). Of an embedding, A is diagonal for ``"expand"``.
        fisher: ``"mc"``, ``"type-2"`` (exact, one backward pass for each output of an example,
            which wants the examples on an axis of their own: ``[N, C, T]``, not ``[N T, C]``; an
            estimate without bias where the model mixes examples, as batch normalization in training
            mode does, or the edges of a graph), ``"empirical"`` or ``"forward-only"`` (B is the
            identity).
        mc_samples: Samples of the targets for ``"mc"``; the error falls with their square root.
        bias: ``"separate"``: a block of its own; ``"joint"``: coupled to its weight.
        generator: Source of randomness (on the model's device); by default the global one.
        forward: For other batches (dicts, more than two parts) and other ways to call the model: a
            function of model and batch that returns the outputs for the loss, and the targets.
            Default: the model called with the inputs of a pair.
        progress_bar: Whether to show how many batches are done (by tqdm). Default: no.
        curvature: ``"kfac"``; or ``"diagonal"``: second moments of each example's gradients, the
            very diagonal of the generalised Gauss-Newton matrix for ``"type-2"``, for layers whose
            factors would be too large; or ``"none"``, as if it had no Kronecker structure. For all
            layers or by layer, in the ways of ``approximation``. The first axis of such a layer is
            that of the examples.
        max_dim: Largest dimension of a factor, above which a layer is refused: all functions of a
            block are of whole factors. Default: 16384, which takes 1 GB in float32. None: no limit.

    Returns:
        The curvature; ``curvature.blocks["conv1"].input_factor`` is ``[G, d_in, d_in]``,
        ``.grad_output_factor`` ``[G, d_out, d_out]``; with ``"expand"``, each row of an embedding
        is a group, all with one B: ``[V, 1, 1]`` and ``[1, d, d]``. Layers with diagonals have one
        block for each parameter, under its name. Layers that the loss doesn't depend on have zero
        blocks.

    Raises:
        ValueError: For unknown options, a model without trainable parameters, an empty loader,
            results that aren't finite, outputs that have no graph, a loss with
            ``reduction="none"``, a layer larger than ``max_dim``, a weight that is used in other
            ways than by calling its module, an embedding with ``scale_grad_by_freq``, outputs with
            tensor dropout in training mode, ``"forward-only"`` with diagonals or parameters that
            have no Kronecker structure (freeze them, or choose another Fisher), or, for diagonals,
            batch normalization in training mode and other mixing of examples.
        TypeError: For a loss whose likelihood isn't known; for outputs that are no tensor, or
            batches that are no pairs, and no ``forward`` that says what they are.
        ImportError: For a progress bar without tqdm.

    Example:
        >>> import torch, kfac_tn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(),
        ...                             torch.nn.Linear(4, 2))
        >>> batches = [(torch.rand(8, 1, 3, 3), torch.randint(2, (8,)))]
        >>> curvature = kfac_tn.compute_kfac(model, torch.nn.CrossEntropyLoss(), batches)
        >>> curvature.blocks["0"].input_factor.shape
        torch.Size([1, 9, 9])
    """
    if bias not in ("joint", "separate"):
        raise ValueError(f"bias is {bias!r}: choose 'joint' or 'separate'.")
    blocks, others = partition(model, approximation, curvature)
    refuse_scaled_gradients(model)
    _check_kinds(blocks, fisher, max_dim)
    if not blocks and not others:
        raise ValueError("The model has no trainable parameter.")
    if fisher == "forward-only" and others:
        raise ValueError(
            "fisher='forward-only' knows nothing of parameters without Kronecker structure: freeze "
            f"{[other.name for other in others]} (requires_grad_(False)) or choose another Fisher."
        )
    unit = {block: Basis() for block in blocks if not block.has_factors}
    joint = bias == "joint"
    refuse_random_gradients(model)
    if unit:
        refuse_batch_statistics(model)
    capture = Capture(
        blocks,
        loss_fn,
        fisher,
        mc_samples,
        others,
        generator=lambda device: generator,
        basis=unit.get,
        joint=joint,
        once=False,
    )
    with closing(capture):
        go_through(model, with_progress(loader, "KFAC", progress_bar), capture, forward)
        statistics = capture.take()
    computed: dict[str, Block] = {}
    for block in blocks:
        if not block.has_factors:
            computed |= _diagonals(block, statistics.moments.get(block))
            continue
        factors = statistics.factors.get(block) or _zero(block, joint)
        check_finite(block.name, *factors.witnesses())
        matrices = factors.input.contiguous(), factors.grad_output.contiguous()
        vectors = statistics.counts.get(block, 0)
        computed[block.name] = KroneckerBlock(matrix_layout(block), *matrices, bias, vectors)
    for other in others:
        values = statistics.diagonals.get(other.parameter)
        if values is None:
            values = torch.zeros_like(other.parameter, dtype=_accurate(other.parameter))
        check_finite(other.name, values)
        computed[other.name] = DiagonalBlock(other.name, values.detach())
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    return Curvature(computed, shapes)


def go_through(model: Module, loader: Iterable[Any], capture: Capture, forward: Forward) -> None:
    """Show a capture all batches, each with its weight in the loss on the whole set."""
    batches = 0
    with restored(model), uncompiled(), alone(capture):
        for batch in loader:
            with torch.inference_mode(False), torch.enable_grad():
                outputs, targets = outputs_and_targets(forward, model, batch)
                if not isinstance(outputs, Tensor):
                    raise TypeError(
                        f"The loss is to be one of a tensor, but the model returned a "
                        f"{type(outputs).__name__}: take the tensor out of it by forward=..., as "
                        "in forward=lambda model, batch: (model(batch[0])['logits'], batch[1])."
                    )
                if outputs.numel() == 0:
                    continue
                check_graph(outputs)
                batches += 1
                weight: Tensor | float = 1.0
                if capture.likelihood.reduction == "mean":
                    weight = capture.likelihood.num_terms(outputs.detach(), targets)
                capture.observe(outputs, targets, weight)
                _refuse_bypassed(capture.bypassed)
    if batches == 0:
        raise ValueError("The loader is empty: at least one batch with examples is needed.")


def _refuse_bypassed(bypassed: Iterable[LayerBlock]) -> None:
    """Refuse layers whose calls aren't all that their weights do."""
    names = sorted(block.name for block in bypassed)
    if names:
        raise ValueError(
            f"The weights of layers {names} are used by other ways than calls of their modules, as "
            "in F.linear(x, layer.weight), torch.func.functional_call with other weights or under "
            "a transform of torch.func, too: Kronecker factors would miss that. Call the module "
            "there, choose curvature='none' for the layer, which then has a diagonal "
            "(compute_kfac), or freeze it."
        )


def layout_of(block: LayerBlock) -> Layout:
    """Where the parameters of a layer lie in its block."""
    return Layout(
        block.weight_name,
        block.weight.shape,
        block.bias_name,
        block.groups,
        block.family.transposed,
    )


def matrix_layout(block: LayerBlock) -> Layout:
    """The layout of a layer's ``KroneckerBlock``.

    A diagonal input factor makes a group of each of its rows, all of them with one B: the weight's
    columns ``[d_in, d_out, 1]`` and the factors ``[d_in, 1, 1]`` and ``[1, d_out, d_out]``.
    """
    layout = layout_of(block)
    return replace(layout, groups=block.input_dim) if block.has_diagonal_inputs else layout


def _check_kinds(blocks: Sequence[LayerBlock], fisher: Fisher, max_dim: int | None) -> None:
    """Refuse what can't be had, naming the layer."""
    for block in blocks:
        if block.curvature == "ekfac":
            raise ValueError(
                f"curvature is 'ekfac' for layer '{block.name}': compute_ekfac computes that; here "
                "it is 'kfac' or 'diagonal'."
            )
        if not block.has_factors and fisher == "forward-only":
            raise ValueError(
                "fisher='forward-only' has no gradients, but curvature is 'diagonal' for layer "
                f"'{block.name}': use 'kfac' there, or another Fisher."
            )
        inputs = 1 if block.has_diagonal_inputs else block.joint_dim
        size = max(inputs, block.grad_output_dim)
        if block.has_factors and max_dim is not None and size > max_dim:
            raise ValueError(
                f"Layer '{block.name}' has a factor of dimension {size:,}, above max_dim="
                f"{max_dim:,}: it alone would take {4 * block.groups * size**2 / 1e9:.2g} GB in "
                "float32. Choose curvature='diagonal' for this layer (compute_kfac), freeze it, or "
                "raise max_dim."
            )


def _diagonals(block: LayerBlock, moments: Tensor | None) -> dict[str, Block]:
    """The diagonal of each parameter of a layer."""
    if moments is None:
        shape = block.groups, block.grad_output_dim, block.joint_dim
        moments = torch.zeros(shape, dtype=_accurate(block.weight), device=block.weight.device)
    check_finite(block.name, moments)
    named = layout_of(block).from_matrix(moments)
    return {name: DiagonalBlock(name, values.contiguous()) for name, values in named.items()}


def _zero(block: LayerBlock, joint: bool) -> Factors:
    """Factors of a layer that the loss doesn't depend on."""
    size = (block.joint_dim if joint else block.input_dim) // block.input_pieces
    outputs = block.grad_output_dim
    zeros = torch.zeros_like(block.weight, dtype=_accurate(block.weight)).new_zeros
    inputs = zeros(block.groups * block.input_pieces, size, size)
    return Factors(inputs, zeros(block.groups, outputs, outputs))


def _accurate(parameter: Tensor) -> torch.dtype:
    """The dtype of its curvature."""
    return torch.promote_types(parameter.dtype, torch.float32)


def check_finite(name: str, *tensors: Tensor) -> None:
    """Refuse NaN and inf."""
    # A finite sum, which is taken several times faster, has finite terms; theirs may overflow.
    if not all(tensor.sum().isfinite() or tensor.isfinite().all() for tensor in tensors):
        raise ValueError(
            f"The curvature of '{name}' isn't finite: look for NaN or inf in the data, the "
            "parameters or the loss."
        )
