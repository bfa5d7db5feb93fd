"""Curvature for influence functions with kronfluence (``pip install kronfluence``)."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch

from kfac_tn.curvature.curvature import Curvature
from kfac_tn.curvature.eigen import MatrixBlock
from kfac_tn.integrations.optional import load
from kfac_tn.integrations.single import single_layouts

_PACKAGE = "kronfluence>=1.0"
_eigen: Any = load("kronfluence.factor.eigen", _PACKAGE)
_names: Any = load("kronfluence.utils.constants", _PACKAGE)
_FactorArguments: Any = load("kronfluence.arguments", _PACKAGE).FactorArguments
_save_json: Any = load("kronfluence.utils.save", _PACKAGE).save_json


def save_factors(curvature: Curvature, folder: str | PathLike[str]) -> None:
    """Write a curvature where kronfluence looks for the factors that it has fitted.

    Then ``analyzer.compute_pairwise_scores(factors_name="mine", ...)`` and its other scores take
    products with (curvature + damping I)^-1, with the ``damping_factor`` of its ``ScoreArguments``
    (by default a tenth of each layer's mean eigenvalue).

    The gradients in these scores are kronfluence's own, and 1.0.1 computes wrong ones, in silence,
    for convolutions with another ``padding_mode`` than zeros, and for layers that are called more
    than once. Rows of ``compute_per_example_gradients`` and products of these with
    ``curvature.inverse(damping)`` are right for every model.

    Args:
        curvature: Of ``compute_ekfac`` or ``compute_kfac`` with ``bias="joint"``, of the layers
            that the analyzer tracks: linear ones and 2-d convolutions without groups, by the names
            that they have there, with their biases (not frozen). Others are ignored, and
            kronfluence fails where one is missing. Its own curvature is that of the mean loss over
            the training examples.
        folder: ``analyzer.factors_output_dir("mine")``; it is made if need be, and files in it are
            overwritten.

    Raises:
        TypeError: If it is no ``Curvature``.
        ValueError: For what kronfluence can't express, naming it: embeddings, groups, transposed,
            1-d and 3-d convolutions, a separate bias, parameters without Kronecker structure, sums.

    Example:
        >>> import pathlib, tempfile, torch, kfac_tn
        >>> model, loss_fn = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> data = [(torch.rand(4, 2), torch.rand(4, 1))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_factors(kfac_tn.compute_ekfac(model, loss_fn, data, bias="joint"), folder)
        ...     len(list(pathlib.Path(folder).glob("*.safetensors")))
        6
    """
    single_layouts(curvature, (2, 4), "kronfluence")
    factors: dict[str, dict[str, torch.Tensor]] = {
        name: {} for name in (*_names.EIGENDECOMPOSITION_FACTOR_NAMES, *_names.LAMBDA_FACTOR_NAMES)
    }
    for name, block in curvature.blocks.items():
        eigen = cast(MatrixBlock, block).eigen()
        values = eigen.values[0]
        for factor, tensor in (
            (_names.ACTIVATION_EIGENVECTORS_NAME, eigen.input_vectors[0]),
            (_names.GRADIENT_EIGENVECTORS_NAME, eigen.grad_output_vectors[0]),
            # Of no matter where eigenvalues are corrected, but they have to be there.
            (_names.ACTIVATION_EIGENVALUES_NAME, values.mean(0)),
            (_names.GRADIENT_EIGENVALUES_NAME, values.mean(1)),
            (_names.LAMBDA_MATRIX_NAME, values),
            (_names.NUM_LAMBDA_PROCESSED, torch.ones(1, dtype=torch.int64)),
        ):
            factors[factor][name] = tensor.detach().cpu().contiguous()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    arguments = _FactorArguments(strategy="ekfac").to_dict()
    _save_json(arguments, path / f"{_names.FACTOR_ARGUMENTS_NAME}_arguments.json")
    _eigen.save_eigendecomposition(path, _part(factors, _names.EIGENDECOMPOSITION_FACTOR_NAMES))
    _eigen.save_lambda_matrices(path, _part(factors, _names.LAMBDA_FACTOR_NAMES))


def _part(factors: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: factors[name] for name in names}
