"""Curvature as matrices of nngeometry (``pip install nngeometry``)."""

from __future__ import annotations

from typing import Any

import torch

from kfac_tn.curvature.curvature import Curvature
from kfac_tn.curvature.eigen import EigenBlock
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.curvature.layout import Layout
from kfac_tn.integrations.optional import load
from kfac_tn.integrations.single import single_layouts

_PACKAGE = "nngeometry>=0.4"
_layers: Any = load("nngeometry.layercollection", _PACKAGE)
_objects: Any = load("nngeometry.object", _PACKAGE)
_Dummy: Any = load("nngeometry.backend.dummy", _PACKAGE).DummyGenerator

# By the number of axes of the weight.
_LAYERS: dict[int, Any] = {3: _layers.Conv1dLayer, 4: _layers.Conv2dLayer}


class _Generator(_Dummy):
    """What a matrix of nngeometry asks about itself."""

    def __init__(self, collection: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(collection, device)
        self.dtype = dtype

    def get_dtype(self) -> torch.dtype:
        return self.dtype


def as_pmat(curvature: Curvature) -> Any:
    """A curvature as a ``PMatKFAC`` or ``PMatEKFAC`` of nngeometry, for everything that takes one.

    The matrix keeps the scale of the loss as the user computes it (nngeometry's own is the mean
    over examples of a Fisher), and shares its memory with the curvature. Vectors for it are made
    with its own layers: ``PVector(pmat.generator.layer_collection, ...)``.

    Args:
        curvature: Of ``compute_kfac`` or ``compute_ekfac`` with ``bias="joint"``, or a function of
            one (``inverse``, ``sqrt``), which is eigendecomposed. Layers: linear, 1-d and 2-d
            convolutions without groups, on one device, in one dtype.

    Returns:
        The matrix; the keys of its ``data`` are the names of the layers.

    Raises:
        TypeError: If it is no ``Curvature``.
        ValueError: For what nngeometry can't express, naming it: groups (it would need a matrix for
            each), embeddings, transposed and 3-d convolutions, a separate bias, parameters without
            Kronecker structure, sums, and blocks of different kinds.

    Example:
        >>> import torch, kfac_tn
        >>> model, loss_fn = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> options = {"fisher": "type-2", "bias": "joint"}
        >>> matrix = as_pmat(kfac_tn.compute_kfac(model, loss_fn, data, **options))
        >>> round(float(matrix.trace()), 4)
        4.0
    """
    layouts = single_layouts(curvature, (2, *_LAYERS), "nngeometry")
    found = {type(block) for block in curvature.blocks.values()}
    if len(found) > 1 or not found <= {KroneckerBlock, EigenBlock}:
        raise ValueError(
            f"nngeometry has matrices of Kronecker products or of eigendecomposed ones, but this "
            f"curvature is made of {sorted(kind.__name__ for kind in found)}: take `inverse` or "
            "`sqrt` of all, or parts of one kind with `curvature.submatrix`."
        )
    collection = _layers.LayerCollection()
    for name, layout in layouts.items():
        collection.add_layer(name, _layer(layout))
    kinds = {(entry.device, entry.dtype) for entry in curvature.diagonal().values()}
    if len(kinds) > 1:
        raise ValueError(
            f"nngeometry takes one device and one dtype, not {sorted(map(str, kinds))}: take "
            "`curvature.to(device, dtype)`."
        )
    blocks: dict[str, Any] = dict(curvature.blocks)
    generator = _Generator(collection, *kinds.pop())
    if found == {KroneckerBlock}:
        factors = {n: (b.input_factor[0], b.grad_output_factor[0]) for n, b in blocks.items()}
        return _objects.PMatKFAC(generator, data=factors)
    vectors = {n: (b.input_vectors[0], b.grad_output_vectors[0]) for n, b in blocks.items()}
    values = {name: block.values.flatten() for name, block in blocks.items()}
    return _objects.PMatEKFAC(generator, data=(vectors, values))


def _layer(layout: Layout) -> Any:
    d_out, d_in, *kernel = layout.weight_shape
    bias = layout.bias_name is not None
    if not kernel:
        return _layers.LinearLayer(d_in, d_out, bias)
    return _LAYERS[len(layout.weight_shape)](d_in, d_out, tuple(kernel), bias)
