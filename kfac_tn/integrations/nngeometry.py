"""Curvature as matrices of nngeometry (``pip install nngeometry``)."""

from __future__ import annotations

from typing import Any

import torch

from kfac_tn.curvature.block import Block
from kfac_tn.curvature.curvature import Curvature
from kfac_tn.curvature.eigen import EigenBlock, MatrixBlock
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.curvature.layout import Layout
from kfac_tn.integrations.optional import load

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
            each), transposed and 3-d convolutions, a separate bias, parameters without Kronecker
            structure, sums, and blocks of different kinds.

    Example:
        >>> import torch, kfac_tn
        >>> model, loss_fn = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> options = {"fisher": "type-2", "bias": "joint"}
        >>> as_pmat(kfac_tn.compute_kfac(model, loss_fn, data, **options)).trace()
        tensor(4.)
    """
    if not isinstance(curvature, Curvature):
        raise TypeError(f"as_pmat takes a kfac_tn.Curvature, not a {type(curvature).__name__}.")
    if any(isinstance(block, EigenBlock) for block in curvature.blocks.values()):
        kind: Any = EigenBlock
    else:
        kind = KroneckerBlock
    collection = _layers.LayerCollection()
    for name, block in curvature.blocks.items():
        collection.add_layer(name, _layer(_expressible(name, block, kind)))
    kinds = {(entry.device, entry.dtype) for entry in curvature.diagonal().values()}
    if len(kinds) > 1:
        raise ValueError(
            f"nngeometry takes one device and one dtype, not {sorted(map(str, kinds))}: take "
            "`curvature.to(device, dtype)`."
        )
    blocks: dict[str, Any] = dict(curvature.blocks)
    generator = _Generator(collection, *kinds.pop())
    if kind is KroneckerBlock:
        factors = {n: (b.input_factor[0], b.grad_output_factor[0]) for n, b in blocks.items()}
        return _objects.PMatKFAC(generator, data=factors)
    vectors = {n: (b.input_vectors[0], b.grad_output_vectors[0]) for n, b in blocks.items()}
    values = {name: block.values.flatten() for name, block in blocks.items()}
    return _objects.PMatEKFAC(generator, data=(vectors, values))


def _expressible(name: str, block: Block, kind: Any) -> Layout:
    """The layout of a block that nngeometry can express."""
    if not isinstance(block, MatrixBlock):
        raise ValueError(
            f"'{name}' has no Kronecker structure, so no place in nngeometry's matrix: freeze it "
            "(requires_grad_(False)) before, or leave it out with `curvature.submatrix`."
        )
    layout = block.layout
    if not isinstance(block, kind):
        problem, advice = f"is a {type(block).__name__}, others aren't", "take parts of one kind"
    elif layout.groups > 1:
        problem, advice = f"has {layout.groups} groups", "leave it out with `curvature.submatrix`"
    elif layout.transposed or len(layout.weight_shape) not in (2, *_LAYERS):
        problem = "is a transposed convolution or one of more than two dimensions"
        advice = "leave it out with `curvature.submatrix`"
    elif layout.bias_name is not None and block.bias != "joint":
        problem, advice = "has a bias of its own", "compute the curvature with bias='joint'"
    else:
        return layout
    raise ValueError(f"Layer '{name}' {problem}, which nngeometry can't express: {advice}.")


def _layer(layout: Layout) -> Any:
    d_out, d_in, *kernel = layout.weight_shape
    bias = layout.bias_name is not None
    if not kernel:
        return _layers.LinearLayer(d_in, d_out, bias)
    return _LAYERS[len(layout.weight_shape)](d_in, d_out, tuple(kernel), bias)
