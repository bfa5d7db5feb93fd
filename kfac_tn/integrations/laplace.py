"""Curvature for Laplace approximations with laplace-torch (``pip install laplace-torch``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_tn.curvature.block import DiagonalBlock
from kfac_tn.curvature.compute import compute_kfac, matrix_layout
from kfac_tn.curvature.diagonal import compute_ggn_diagonal
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.curvature.per_example import compute_per_example_gradients
from kfac_tn.integrations.laplace_kron import AveragedKron, Factors, GroupedKron
from kfac_tn.integrations.optional import load
from kfac_tn.layers import ApproximationChoice, partition

_Interface: Any = load("laplace.curvature", "laplace-torch>=0.3").GGNInterface

LaplaceFisher: TypeAlias = Literal["type-2", "mc"]


class KFACTNBackend(_Interface):
    """A backend for laplace-torch: ``Laplace(model, likelihood, ..., backend=KFACTNBackend)``.

    ``hessian_structure="kron"``: exactly the Kronecker factors that ``compute_kfac`` finds on the
    whole data set, however it is divided into batches. Grouped convolutions have a pair of factors
    for each group, transposed ones factors in an order of their own (``GroupedKron``; after
    ``load_state_dict`` call ``restore``), parameters without Kronecker structure their diagonal.
    (What is loaded from a checkpoint doesn't know over how many positions its input factors are
    means: a fit that goes on from there weighs it by examples alone.)
    ``"diag"``: the exact diagonal of the GGN, of every parameter, without Jacobians. ``"full"`` and
    the predictive distributions are laplace-torch's own, from Jacobians that take one backward pass
    for each output (``torch.func`` in laplace-torch takes one for each output of each example).

    All weights, the last layer's, or (``"diag"`` and ``"full"``) a subnetwork's; parameters that
    don't require gradients are left out. The scale is laplace-torch's: the GGN of the negative log
    likelihood summed over the data, which for regression is half that of ``MSELoss("sum")``.

    Args:
        model: This and the following are given by laplace-torch.
        likelihood: ``"classification"`` or ``"regression"``.
        last_layer: Whether only the last layer's parameters count.
        subnetwork_indices: Of the flat parameters that count.
        dict_key_x: For models called with dicts.
        dict_key_y: For models called with dicts.
        approximation: For ``"kron"``, as of ``compute_kfac``. This and the following are options
            for ``backend_kwargs``. Default: ``"expand"``.
        fisher: ``"type-2"`` (default, exact) or ``"mc"``.
        mc_samples: Samples for ``"mc"``. Default: 1.

    Raises:
        ValueError: For unknown options; what ``compute_kfac`` and ``compute_ggn_diagonal`` raise.

    Example:
        >>> from laplace import Laplace
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(),
        ...                             torch.nn.Linear(4, 2))
        >>> data = TensorDataset(torch.rand(8, 2), torch.arange(8) % 2)
        >>> la = Laplace(model, "classification", subset_of_weights="all",
        ...              hessian_structure="kron", backend=KFACTNBackend)
        >>> la.fit(DataLoader(data, batch_size=4))
        >>> la(torch.rand(3, 2)).shape, la.sample(5).shape
        (torch.Size([3, 2]), torch.Size([5, 22]))
    """

    def __init__(
        self,
        model: Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        approximation: ApproximationChoice = "expand",
        fisher: LaplaceFisher = "type-2",
        mc_samples: int = 1,
    ) -> None:
        if fisher not in get_args(LaplaceFisher):
            raise ValueError(f"fisher is {fisher!r}: choose one of {get_args(LaplaceFisher)}.")
        super().__init__(
            model,
            likelihood,
            last_layer,
            subnetwork_indices,
            dict_key_x,
            dict_key_y,
            stochastic=fisher == "mc",
            num_samples=mc_samples,
        )
        self.approximation, self.fisher = approximation, fisher

    def kron(self, x: Any, y: Tensor, N: int) -> tuple[Tensor, Any]:
        """The loss and the factors of one batch, which add up over the N examples."""
        with self._only(self.params):
            curvature = compute_kfac(
                self.model,
                self.lossfunc,
                [(x, y)],
                self.approximation,
                self.fisher,
                self.num_samples,
            )
        blocks = curvature.blocks
        # B is a sum over examples, A a mean: weighted so, batches add up to the whole set if all
        # have the same number of positions; else AveragedKron corrects it.
        share = len(y) / N
        positions: dict[str, float] = {}
        others = [name for name, block in blocks.items() if isinstance(block, DiagonalBlock)]
        segments = {name: _rows(values) for name, values in self._diagonal(x, y, others).items()}
        for block in blocks.values():
            if isinstance(block, KroneckerBlock):
                factors = _factors(block, self.factor, share)
                segments.update(factors)
                positions.update(dict.fromkeys(factors, block.vectors / len(y)))
        named = [(name, factors) for name in self._names() for factors in segments[name]]
        each = [positions.get(name, 1.0) for name, _ in named]
        return self._loss(x, y), self.arrange([factors for _, factors in named], each, share)

    def arrange(
        self, kfacs: list[Factors], positions: Sequence[float] | None = None, share: float = 1.0
    ) -> AveragedKron:
        """Factors of all segments as a ``Kron``; the other arguments are ``AveragedKron``'s."""
        with self._only(self.params):
            layers, _ = partition(self.model, self.approximation)
        layouts = {name: matrix_layout(layer) for layer in layers for name in layer.parameters}
        counts, orders, start = [], [], 0
        for name in self._names():
            shape = self.model.get_parameter(name).shape
            places = torch.arange(start, start + shape.numel()).view(shape)
            start += shape.numel()
            if name in layouts:
                alone, _ = layouts[name].restrict(name)
                counts.append(alone.groups)
                orders.append(alone.to_matrix({name: places}).flatten())
            else:
                counts.append(shape.numel() // shape[-1])
                orders.append(places.flatten())
        if max(counts) == 1 and not any(layout.transposed for layout in layouts.values()):
            return AveragedKron(kfacs, positions, share)
        order = torch.cat(orders).to(kfacs[0][0].device)
        return GroupedKron(kfacs, counts, order, positions, share)

    def diag(self, x: Any, y: Tensor, N: int | None = None) -> tuple[Tensor, Tensor]:
        """The loss and the GGN's diagonal of one batch, ``[P]``."""
        names = self._names()
        entries = self._diagonal(x, y, names)
        diagonal = torch.cat([entries[name].flatten() for name in names])
        if self.subnetwork_indices is not None:
            diagonal = diagonal[self.subnetwork_indices]
        return self._loss(x, y), diagonal

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians ``[N, C, P]`` of the outputs with respect to the parameters; the outputs."""
        with torch.no_grad():
            outputs = self.model(x)
        if enable_backprop or outputs.ndim != 2:
            return super().jacobians(x, enable_backprop)
        rows = []
        for c in range(outputs.shape[1]):
            with self._only(self.params):
                gradients = compute_per_example_gradients(self.model, _sum_of_output, x, c)
            parts = [gradients[name].flatten(1) for name in self._names()]
            rows.append(torch.cat(parts, dim=1).to(outputs.dtype))
        jacobians = torch.stack(rows, dim=1)
        if self.subnetwork_indices is not None:
            jacobians = jacobians[..., self.subnetwork_indices]
        return jacobians, outputs

    def _diagonal(self, x: Any, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """The GGN's diagonal at some parameters."""
        if not names:
            return {}
        mode: Literal["exact", "mc"] = "mc" if self.fisher == "mc" else "exact"
        with self._only([self.model.get_parameter(name) for name in names]):
            diagonal = compute_ggn_diagonal(
                self.model, self.lossfunc, [(x, y)], mode, self.num_samples
            )
        return {name: self.factor * values for name, values in diagonal.items()}

    def _loss(self, x: Any, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.factor * self.lossfunc(self.model(x), y)

    def _names(self) -> list[str]:
        """Of the parameters that count, in laplace-torch's order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for parameter in self.params]

    @contextmanager
    def _only(self, parameters: list[Parameter]) -> Iterator[None]:
        """Leave out all other parameters of the model."""
        mine = set(parameters)
        others = [p for p in self.model.parameters() if p.requires_grad and p not in mine]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)


def restore(la: Any) -> None:
    """Finish ``la.load_state_dict(...)`` of a Kronecker-factored Laplace with ``KFACTNBackend``.

    laplace-torch keeps factors without their arrangement and loads them into its own ``Kron``, so
    that those of grouped convolutions take no prior precision for each layer, and those of
    transposed ones fail. This arranges them anew by the model; others it leaves as they are.

    Args:
        la: The ``KronLaplace``, whose model is that of the checkpoint.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> model = torch.nn.Sequential(torch.nn.ConvTranspose1d(2, 2, 2), torch.nn.Flatten())
        >>> def laplace():
        ...     return Laplace(model, "regression", "all", "kron", backend=KFACTNBackend)
        >>> la, loaded = laplace(), laplace()
        >>> la.fit(DataLoader(TensorDataset(torch.rand(4, 2, 3), torch.rand(4, 8))))
        >>> loaded.load_state_dict(la.state_dict())
        >>> restore(loaded)
        >>> torch.equal(loaded.H.to_matrix(), la.H.to_matrix())
        True
    """
    la.H_facs = la.backend.arrange(la.H_facs.kfacs)
    la.H = la.H_facs.decompose(damping=la.damping)


def _sum_of_output(outputs: Tensor, c: int) -> Tensor:
    return outputs[:, c].sum()


def _rows(diagonal: Tensor) -> list[Factors]:
    """The blocks of a diagonal, one for each row of a parameter."""
    return [[torch.diag(row)] for row in diagonal.reshape(-1, diagonal.shape[-1])]


def _factors(block: KroneckerBlock, factor: float, share: float) -> dict[str, list[Factors]]:
    """The blocks of a layer's weight and bias, one for each group."""
    layout = block.layout
    outputs, inputs = factor * block.grad_output_factor, share * block.input_factor
    outputs = outputs.expand(layout.groups, -1, -1)  # of an embedding's rows, they are one
    if layout.transposed:
        inputs = inputs.unsqueeze(1)  # see GroupedKron
    named = {layout.weight_name: [[b, a] for b, a in zip(outputs, inputs, strict=True)]}
    if layout.bias_name is not None:
        named[layout.bias_name] = [[b] for b in outputs]
    return named
