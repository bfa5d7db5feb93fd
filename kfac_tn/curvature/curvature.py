"""The curvature of a model: a block-diagonal matrix over its parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from typing import Any, TypeVar, get_args

import torch
from torch import Size, Tensor

from kfac_tn.curvature.block import Block, Damping, Scalar
from kfac_tn.curvature.layout import join_vector, split_vector
from kfac_tn.curvature.storage import map_tensors, pack, parameters, unpack

Vector = TypeVar("Vector", Tensor, dict[str, Tensor])


@dataclass(frozen=True)
class Curvature:
    """A block-diagonal approximation of the GGN (the Fisher) over all trainable parameters.

    The scale is that of the loss as the user computes it. A vector is a dict by parameter name
    (each entry shaped like its parameter) or one flat vector ``[P]``, parameters in the order of
    ``model.named_parameters()``; results come in the same form.

    All that isn't linear (inverse, roots, determinants, samples) goes by one eigendecomposition of
    each block's Kronecker factors, made when it is first needed and kept. So inverses with many
    dampings cost one.

    Attributes:
        blocks: By layer name for layers, by parameter name for parameters without Kronecker
            structure.
        shapes: Shape of each parameter, in the order of the flat vector.

    Example:
        >>> import torch, kfac_tn
        >>> model, loss_fn = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> curvature = kfac_tn.compute_kfac(model, loss_fn, data, fisher="type-2")
        >>> curvature @ torch.tensor([1.0, 2.0, 3.0])
        tensor([1., 2., 6.])
        >>> curvature.inverse(damping=1.0) @ torch.tensor([1.0, 2.0, 3.0])
        tensor([0.5000, 1.0000, 1.0000])
        >>> curvature.trace(), curvature.logdet(damping=1.0).exp()
        (tensor(4.), tensor(12.))
        >>> curvature.sample(damping=1.0, n=5)["weight"].shape
        torch.Size([5, 1, 2])
    """

    blocks: dict[str, Block]
    shapes: dict[str, Size]

    # Linear ---------------------------------------------------------------------------------------

    def __matmul__(self, v: Vector) -> Vector:
        """Multiply with a vector, or with the K columns of a matrix.

        Args:
            v: A flat vector ``[P]``, a matrix ``[P, K]``, or a dict by parameter name whose entries
                are shaped like the parameters, or have one trailing axis of K columns more.

        Returns:
            The product, in the form of ``v`` and the curvature's dtype.

        Raises:
            TypeError: If ``v`` is neither, or complex.
            ValueError: If names or shapes aren't those of the parameters.
        """
        if not isinstance(v, Tensor | Mapping):
            raise TypeError(
                "A vector is a dict by parameter name or a flat tensor (or a matrix of columns), "
                f"not a {type(v).__name__}."
            )
        for name, entry in {"": v}.items() if isinstance(v, Tensor) else v.items():
            if entry.is_complex():
                raise TypeError(
                    f"A vector is real, but{f' entry {name!r}' if name else ''} has dtype "
                    f"{entry.dtype}: multiply with its real and its imaginary part."
                )
        if isinstance(v, Tensor):
            size = self._size()
            if v.ndim not in (1, 2) or len(v) != size:
                raise ValueError(
                    f"A flat vector here has shape [{size}] (all parameters, in order), a matrix "
                    f"[{size}, K], not {list(v.shape)}."
                )
            rows = v.T if v.ndim == 2 else v
            product = join_vector(self._multiply(split_vector(rows, self.shapes)), self.shapes)
            return product.T if v.ndim == 2 else product
        if not self._has_columns(v):
            return self._multiply(v)
        products = self._multiply({name: entry.movedim(-1, 0) for name, entry in v.items()})
        return {name: entry.movedim(0, -1) for name, entry in products.items()}

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal by parameter name, each entry shaped like its parameter."""
        entries: dict[str, Tensor] = {}
        for block in self.blocks.values():
            entries.update(block.diagonal())
        return {name: entries[name] for name in self.shapes}

    def trace(self) -> Tensor:
        """The sum of all diagonal entries, a scalar."""
        return torch.stack([block.trace() for block in self.blocks.values()]).sum()

    def frobenius_norm(self) -> Tensor:
        """The root of the sum of all squared entries, a scalar."""
        norms = [block.frobenius_norm() for block in self.blocks.values()]
        return torch.linalg.vector_norm(torch.stack(norms))

    def to_dense(self) -> Tensor:
        """The matrix ``[P, P]``, in the order of the flat vector: for small models and tests."""
        entry = next(iter(self.diagonal().values()))
        return self @ torch.eye(self._size(), dtype=entry.dtype, device=entry.device)

    def __mul__(self, factor: Scalar) -> Curvature:
        """Multiply with a number that isn't negative; the blocks are of the same kinds.

        Raises:
            ValueError: If it is negative, since the result would be no curvature; if it isn't
                finite, or entries of the result wouldn't be.
        """
        if not isinstance(factor, Real | Tensor):
            return NotImplemented
        number = _number("factor", factor)
        scaled = self._map(lambda block: block.scale(factor))
        return scaled._finite() if number > 1 else scaled

    __rmul__ = __mul__

    def __add__(self, other: Curvature) -> Curvature:
        """The exact sum of two curvatures with the same blocks.

        Diagonal blocks add up to diagonal ones. A sum of Kronecker products is no Kronecker
        product: such blocks become a ``SumBlock``, whose products, diagonal, trace, norm, scalings
        and further sums are exact, and whose inverse, eigenvalues, determinants and samples are
        refused.

        Raises:
            ValueError: If parameters or blocks differ.
        """
        if not isinstance(other, Curvature):
            return NotImplemented
        if self.shapes != other.shapes or self.blocks.keys() != other.blocks.keys():
            differing = sorted(self.blocks.keys() ^ other.blocks.keys()) or sorted(
                name
                for name in self.shapes.keys() | other.shapes.keys()
                if self.shapes.get(name) != other.shapes.get(name)
            )
            raise ValueError(
                f"Only curvatures with the same blocks can be added; here {differing} differ."
            )
        blocks = {name: block.add(other.blocks[name]) for name, block in self.blocks.items()}
        return Curvature(blocks, self.shapes)

    def submatrix(self, names: Iterable[str]) -> Curvature:
        """The rows and columns of some parameters.

        Args:
            names: Of the parameters, one at least and each once; their order is that of the model
                nonetheless.

        Raises:
            ValueError: For unknown names, repeated ones or none, or for the weight without the bias
                of an eigendecomposed block (EKFAC, or an inverse) with ``bias="joint"``.
        """
        counts = {} if isinstance(names, str) else Counter(list(names))
        wrong = [name for name, count in counts.items() if count > 1 or name not in self.shapes]
        if wrong or not counts:
            raise ValueError(
                f"submatrix() takes a list of names of parameters, each once, of "
                f"{list(self.shapes)}; not {wrong or names}."
            )
        wanted = {
            key: [name for name in block.names if name in counts]
            for key, block in self.blocks.items()
        }
        blocks = {key: self.blocks[key].restrict(mine) for key, mine in wanted.items() if mine}
        shapes = {name: shape for name, shape in self.shapes.items() if name in counts}
        return Curvature(blocks, shapes)

    # Functions of the eigenvalues -----------------------------------------------------------------

    def eigenvalues(self) -> Tensor:
        """All eigenvalues in ascending order, ``[P]``."""
        values = [block.eigenvalues() for block in self.blocks.values()]
        return torch.cat(values).sort().values

    def inverse(self, damping: Scalar, split: Damping = "exact") -> Curvature:
        """(curvature + damping I)^-1, block by block.

        Args:
            damping: Positive; in the units of the curvature.
            split: ``"exact"``: what the formula says, by eigendecompositions of the factors.
                ``"pi"``: the damping is divided between the factors of each Kronecker block
                (Martens & Grosse 2015, Section 6.3), as optimizers do because it is cheaper;
                diagonal blocks are damped exactly.

        Raises:
            ValueError: If the damping isn't positive, or too small for the dtype where the
                curvature is singular; if ``split`` is unknown, or ``"pi"`` for blocks that are no
                Kronecker products (EKFAC, inverses, sums).
        """
        if split not in get_args(Damping):
            raise ValueError(f"split is {split!r}: choose one of {get_args(Damping)}.")
        self._check_damping(damping, positive=True)
        return self._map(lambda block: block.inverse(damping, split))

    def sqrt(self, damping: Scalar = 0.0) -> Curvature:
        """The symmetric square root of curvature + damping I.

        Args:
            damping: Not negative. Default: 0.

        Raises:
            ValueError: If the damping is negative.
        """
        _number("damping", damping)
        return self._map(
            lambda block: block.map_eigenvalues(lambda values: (values + damping).sqrt())
        )

    def logdet(self, damping: Scalar = 0.0) -> Tensor:
        """The logarithm of the determinant of curvature + damping I, a scalar.

        Differentiable with respect to a damping that is a tensor.

        Args:
            damping: Not negative. Default: 0; only then it is minus infinity where an eigenvalue
                is 0.

        Raises:
            ValueError: If the damping is negative, or positive but too small for the dtype where
                the curvature is singular.
        """
        self._check_damping(damping)
        logs = [(block.eigenvalues() + damping).log().sum() for block in self.blocks.values()]
        return torch.stack(logs).sum()

    def det(self, damping: Scalar = 0.0) -> Tensor:
        """The determinant of curvature + damping I: over- or underflows where ``logdet`` doesn't.

        Args:
            damping: Not negative. Default: 0.

        Raises:
            ValueError: As ``logdet``.
        """
        return self.logdet(damping).exp()

    def sample(
        self, damping: Scalar, n: int | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw from the normal distribution N(0, (curvature + damping I)^-1).

        With the curvature of a summed loss and the damping a prior's precision, that is the
        Laplace approximation of the posterior, centered (MacKay 1992; Ritter et al. 2018).

        Args:
            damping: Positive; in the units of the curvature.
            n: How many; by default one, without an axis for it.
            generator: Source of randomness, on the curvature's device; by default the global one.

        Returns:
            By parameter name, ``[n, *shape]``.

        Raises:
            ValueError: If the damping isn't positive, or too small for the dtype where the
                curvature is singular; if ``n`` is no number of samples.
        """
        self._check_damping(damping, positive=True)
        if n is not None and (n < 0 or n != int(n)):
            raise ValueError(f"n is {n}: it must be a whole number of samples, or None for one.")
        root = self._map(
            lambda block: block.map_eigenvalues(lambda values: (values + damping).rsqrt())
        )
        batch = () if n is None else (int(n),)
        noise = {
            name: torch.randn(
                (*batch, *entry.shape),
                dtype=entry.dtype,
                device=entry.device,
                generator=generator,
            )
            for name, entry in self.diagonal().items()
        }
        return root._multiply(noise)

    # Where it lives -------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Curvature:
        """The curvature on another device or in another dtype: arguments as of ``Tensor.to``.

        Raises:
            TypeError: For a dtype that isn't real and floating-point.
            ValueError: For a dtype whose range the entries exceed.
        """
        narrower = False

        def moved(tensor: Tensor) -> Tensor:
            nonlocal narrower
            result = tensor.to(*args, **kwargs)
            if not result.is_floating_point():
                raise TypeError(f"A curvature is real and floating-point, not {result.dtype}.")
            narrower |= torch.finfo(result.dtype).max < torch.finfo(tensor.dtype).max
            return result

        curvature = self._map(lambda block: map_tensors(block, moved))
        return curvature._finite() if narrower else curvature

    def state_dict(self) -> dict[str, Any]:
        """All blocks as plain containers of tensors, strings and numbers."""
        return {
            "blocks": {name: pack(block) for name, block in self.blocks.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Curvature:
        """The curvature that ``state_dict`` was taken of.

        Raises:
            ValueError: If it is no such state, or not the whole of it.
        """
        refusal = "This is no state of a Curvature, as state_dict() and save() write it:"
        try:
            blocks = {name: unpack(block) for name, block in state["blocks"].items()}
            shapes = {name: Size(shape) for name, shape in state["shapes"].items()}
            held = Counter(entry for block in blocks.values() for entry in parameters(block))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{refusal} {type(error).__name__}: {error}") from error
        given = Counter(shapes.items())
        if differing := list((held - given) + (given - held)):
            raise ValueError(f"{refusal} its blocks and its parameters differ in {differing}.")
        return cls(blocks, shapes)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a file, which ``load`` (or ``torch.load``, safely) reads."""
        torch.save(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | PathLike[str], map_location: Any = None) -> Curvature:
        """Read what ``save`` wrote.

        Args:
            path: The file.
            map_location: The device to load to, as in ``torch.load``.

        Raises:
            ValueError: If there is something else in the file.
        """
        return cls.from_state_dict(torch.load(path, map_location, weights_only=True))

    # Tools ----------------------------------------------------------------------------------------

    def _map(self, function: Callable[[Block], Block]) -> Curvature:
        blocks = {name: function(block) for name, block in self.blocks.items()}
        return Curvature(blocks, self.shapes)

    def _check_damping(self, damping: Scalar, positive: bool = False) -> None:
        """Check a damping; where a dtype holds neither it nor its inverse, look for small values.

        Other dampings, whose sums with eigenvalues have logarithms and inverses, need no look.
        """
        number = _number("damping", damping, positive)
        for block in self.blocks.values() if number > 0 else ():
            values = block.eigenvalues()
            least = torch.finfo(values.dtype).tiny
            if number < least and bool((values < least).any()):
                raise ValueError(
                    f"damping is {number}, which is too small for {values.dtype}: the block of "
                    f"{' and '.join(block.names)} is singular. Choose at least {least:.2g}, or "
                    "take `curvature.to(torch.float64)`."
                )

    def _finite(self) -> Curvature:
        """The curvature itself, unless entries overflow: the largest ones are on the diagonal."""
        entries = {name: e for name, e in self.diagonal().items() if not e.is_meta}
        flags = [entry.isfinite().all() for entry in entries.values()]
        finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
        names = [name for name, fine in zip(entries, finite, strict=True) if not fine]
        if names:
            raise ValueError(
                f"The curvature of {', '.join(names)} exceeds the range of "
                f"{entries[names[0]].dtype}: multiply it by less, or keep it in a wider dtype "
                "(torch.float64)."
            )
        return self

    def _multiply(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply with vectors whose entries are ``[*batch, *shape]``."""
        products: dict[str, Tensor] = {}
        for block in self.blocks.values():
            products.update(block @ v)
        return {name: products[name] for name in self.shapes}

    def _size(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def _has_columns(self, v: Mapping[str, Tensor]) -> bool:
        """Whether the entries have one axis more than the parameters."""
        if v.keys() != self.shapes.keys():
            raise ValueError(
                "A vector needs one entry for each parameter: missing "
                f"{sorted(self.shapes.keys() - v.keys())}, unknown "
                f"{sorted(v.keys() - self.shapes.keys())}."
            )
        first, shape = v[next(iter(self.shapes))], next(iter(self.shapes.values()))
        columns = first.shape[-1:] if first.ndim == len(shape) + 1 else Size()
        for name, shape in self.shapes.items():
            if v[name].shape != shape + columns:
                raise ValueError(
                    f"Entry '{name}' has shape {list(v[name].shape)}, its parameter {list(shape)}: "
                    "all entries need that of their parameter, or all one more axis of columns."
                )
        return bool(columns)


def _number(name: str, value: Scalar, positive: bool = False) -> float:
    """A finite scalar that isn't negative, as a number: for a tensor, one wait for its device."""
    number = math.nan
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0):
        number = float(value.detach() if isinstance(value, Tensor) else value)
    if not 0 <= number < math.inf or (positive and number == 0):
        kind = "positive" if positive else "at least 0"
        raise ValueError(f"{name} is {value}: it must be a finite scalar, {kind}.")
    return number
