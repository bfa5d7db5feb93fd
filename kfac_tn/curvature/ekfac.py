"""EKFAC of a model over a data set: KFAC's eigenvectors with exact eigenvalues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module

from kfac_tn.capture import Capture, Fisher
from kfac_tn.curvature.batches import Forward, call_on_pair, with_progress
from kfac_tn.curvature.checks import refuse_batch_statistics
from kfac_tn.curvature.compute import (
    LARGEST,
    check_finite,
    compute_kfac,
    go_through,
    layout_of,
)
from kfac_tn.curvature.curvature import Curvature
from kfac_tn.curvature.eigen import Bias
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.layers import ApproximationChoice, partition
from kfac_tn.likelihood import Likelihood
from kfac_tn.moments import Basis


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
    max_dim: int | None = LARGEST,
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
        max_dim: As in ``compute_kfac``.

    Returns:
        The curvature. ``curvature.blocks["conv1"]`` has ``.input_vectors`` ``[G, d_in, d_in]``,
        ``.grad_output_vectors`` ``[G, d_out, d_out]`` and ``.values`` ``[G, d_out, d_in]``, where
        d_in counts the bias. Parameters without Kronecker structure have the diagonal blocks of
        ``compute_kfac``.

    Raises:
        ValueError: As ``compute_kfac``; for ``"forward-only"``, which has no gradients; for an
            iterator; for layers whose inputs don't have the examples in their first axis, for batch
            normalization in training mode, and for other mixing of examples.
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
    # Without factors of their own: nothing but moments is wanted in the second pass.
    layers, _ = partition(model, approximation, "diagonal")
    refuse_batch_statistics(model)
    if isinstance(loader, Iterator):
        raise ValueError(
            "EKFAC goes through the loader twice, which an iterator doesn't allow: give a "
            "DataLoader or a list of batches."
        )
    statistics = approximation, fisher, mc_samples, bias, generator
    kfac = compute_kfac(model, loss_fn, loader, *statistics, forward, progress_bar, max_dim=max_dim)
    eigen = {}
    for layer in layers:
        block = kfac.blocks[layer.name]
        assert isinstance(block, KroneckerBlock)
        eigen[layer] = block.eigen()
    bases = {
        layer: Basis(basis.input_vectors, basis.grad_output_vectors)
        for layer, basis in eigen.items()
    }
    capture = Capture(
        layers,
        loss_fn,
        fisher,
        mc_samples,
        generator=lambda device: generator,
        basis=bases.get,
        once=False,
    )
    with closing(capture):
        go_through(model, with_progress(loader, "EKFAC", progress_bar), capture, forward)
        moments = capture.take().moments
    blocks = dict(kfac.blocks)
    for layer, basis in eigen.items():
        values = torch.zeros_like(basis.values)
        if layer in moments:  # whose groups may be others than the block's
            values = basis.layout.to_matrix(layout_of(layer).from_matrix(moments[layer]))
        check_finite(layer.name, values)
        blocks[layer.name] = replace(basis, values=values)
    return Curvature(blocks, kfac.shapes)
