"""Convolutions: their shapes and hyper-parameters, checked and normalised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any

import torch

from kfac_tn.tn.pattern import PADDING_MODES, IndexPattern

Ints = int | tuple[int, ...]
Padding = str | int | tuple[int, ...] | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ConvSpec:
    """Shapes and hyper-parameters of a convolution in any number of spatial dimensions.

    Whatever is given per dimension may be given as one integer for all. Attributes are normalised
    to tuples, so equal convolutions are equal, and share their cached networks.

    Attributes:
        input_shape: `(N, C_in, *I)`.
        weight_shape: `(C_out, C_in / groups, *K)`; transposed: `(C_in, C_out / groups, *K)`.
        stride: Step of the kernel. Default: 1.
        padding: Positions added on both sides; a pair `(before, after)` per dimension if they
            differ; `"valid"` for none; `"same"` for as many outputs as inputs (the odd one goes
            after, as in torch). Normalised to pairs. Default: 0.
        dilation: Step between kernel elements. Default: 1.
        groups: Number of groups of channels that do not see each other. Default: 1.
        transposed: Whether this is a transposed convolution. Default: no.
        output_padding: Positions added after a transposed convolution's output. Default: 0.
        padding_mode: What added positions hold: `"zeros"` (default), `"circular"`, `"reflect"` or
            `"replicate"`.

    Raises:
        ValueError: If these describe no convolution. The message names the option.

    Example:
        >>> spec = ConvSpec(input_shape=(8, 3, 32, 32), weight_shape=(16, 3, 5, 5), padding="same")
        >>> spec.padding, spec.output_shape
        (((2, 2), (2, 2)), (8, 16, 32, 32))
    """

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: Ints = 1
    padding: Padding = 0
    dilation: Ints = 1
    groups: int = 1
    transposed: bool = False
    output_padding: Ints = 0
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # nothing is looked up in a graph
            self._normalise()
            return
        try:
            vars(self).update(_normalised(*vars(self).values()))
        except TypeError:  # a list, say, can't be looked up
            self._normalise()

    def _normalise(self) -> None:
        def normalise(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.transposed not in (True, False):
            raise ValueError(f"transposed={self.transposed!r} must be True or False")
        normalise("transposed", bool(self.transposed))
        normalise("input_shape", integers("input_shape", self.input_shape))
        normalise("weight_shape", integers("weight_shape", self.weight_shape))
        normalise("groups", integers("groups", (self.groups,))[0])
        self._check_shapes()
        for name, least in (("stride", 1), ("dilation", 1), ("output_padding", 0)):
            normalise(name, self._per_dimension(name, least))
        normalise("padding", self._padding_pairs())
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={self.padding_mode!r} is none of {PADDING_MODES}")
        for dimension in range(self.dimensions):
            self._check_dimension(dimension)

    def _check_shapes(self) -> None:
        for name in ("input_shape", "weight_shape"):
            shape = getattr(self, name)
            if len(shape) < 2 or min(shape) < 1:
                raise ValueError(
                    f"{name}={shape} must be two sizes (batch and channels, or channels), then "
                    "spatial sizes, all at least 1"
                )
        if len(self.input_shape) != len(self.weight_shape):
            raise ValueError(
                f"input_shape={self.input_shape} has {len(self.input_shape) - 2} spatial "
                f"dimensions, weight_shape={self.weight_shape} has {len(self.weight_shape) - 2}"
            )
        channels, out = self.input_shape[1], self.weight_shape[0]
        if self.groups < 1 or channels % self.groups or out % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide {channels} input channels and the {out} "
                "channels of weight_shape[0]"
            )
        axis, expected, shown = 1, channels // self.groups, f"{channels} / {self.groups} = "
        if self.transposed:
            axis, expected, shown = 0, channels, ""
        if self.weight_shape[axis] != expected:
            raise ValueError(
                f"weight_shape={self.weight_shape} does not take {channels} input channels in "
                f"groups={self.groups}: weight_shape[{axis}] must be {shown}{expected}"
            )

    def _per_dimension(self, name: str, least: int) -> tuple[int, ...]:
        value = getattr(self, name)
        values = integers(name, (value,) * self.dimensions if isinstance(value, Real) else value)
        if len(values) == 1:
            values *= self.dimensions
        if len(values) != self.dimensions:
            raise ValueError(
                f"{name}={value} has {len(values)} entries for {self.dimensions} dimensions"
            )
        if any(v < least for v in values):
            raise ValueError(f"{name}={value} must be at least {least}")
        return values

    def _padding_pairs(self) -> tuple[tuple[int, int], ...]:
        padding: Any = self.padding
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding={padding!r} is neither 'same' nor 'valid'")
            if self.transposed:
                raise ValueError(f"padding={padding!r}: transposed convolutions need numbers")
            if padding == "valid":
                return ((0, 0),) * self.dimensions
            if any(stride != 1 for stride in self.strides):
                raise ValueError(f"padding='same' needs stride 1, got stride={self.stride}")
            spans = (d * (k - 1) for d, k in zip(self.dilations, self.kernel_size, strict=True))
            return tuple((span // 2, span - span // 2) for span in spans)
        if not isinstance(padding, Iterable) or all(isinstance(p, Real) for p in padding):
            return tuple((p, p) for p in self._per_dimension("padding", 0))
        pairs = [() if isinstance(p, Real) else integers("padding", p) for p in padding]
        if len(pairs) != self.dimensions or any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                f"padding={padding} must have a pair (before, after) per dimension, "
                f"here {self.dimensions}"
            )
        if any(p < 0 for pair in pairs for p in pair):
            raise ValueError(f"padding={padding} must be at least 0")
        return tuple((before, after) for before, after in pairs)

    def _check_dimension(self, dimension: int) -> None:
        size, kernel = self.input_size[dimension], self.kernel_size[dimension]
        stride, dilation = self.strides[dimension], self.dilations[dimension]
        before, after = self.paddings[dimension]
        extra = self.output_padding[dimension]  # type: ignore[index]
        where = f"in spatial dimension {dimension}"
        if self.padding_mode != "zeros" and self.transposed:
            raise ValueError(
                f"padding_mode={self.padding_mode!r}: a transposed convolution takes only 'zeros'"
            )
        if self.padding_mode == "reflect" and max(before, after) >= size:
            raise ValueError(
                f"padding_mode='reflect' needs padding < input size, but padding "
                f"{max(before, after)} >= {size} {where}"
            )
        if self.padding_mode == "circular" and max(before, after) > size:
            raise ValueError(
                f"padding_mode='circular' needs padding <= input size, but padding "
                f"{max(before, after)} > {size} {where}"
            )
        if extra and not self.transposed:
            raise ValueError(f"output_padding={extra} is for transposed convolutions only")
        if self.transposed and extra >= max(stride, dilation):
            raise ValueError(
                f"output_padding={extra} must be smaller than stride or dilation, but "
                f"{extra} >= max({stride}, {dilation}) {where}"
            )
        if self.output_size[dimension] < 1:
            raise ValueError(
                f"padding={before, after} leaves no output: ({size} - 1) * {stride} + "
                f"{dilation} * ({kernel} - 1) + {extra} + 1 - {before} - {after} = "
                f"{self.output_size[dimension]} {where}"
                if self.transposed
                else f"kernel_size={kernel} with dilation={dilation} spans {dilation} * "
                f"({kernel} - 1) + 1 = {dilation * (kernel - 1) + 1} positions, but the padded "
                f"input has {before} + {size} + {after} = {before + size + after} {where}"
            )

    # The normalised attributes, typed as what they are after normalisation.

    @property
    def dimensions(self) -> int:
        """Number of spatial dimensions."""
        return len(self.input_shape) - 2

    @property
    def input_size(self) -> tuple[int, ...]:
        """Spatial sizes of the input."""
        return self.input_shape[2:]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Spatial sizes of the kernel."""
        return self.weight_shape[2:]

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride per dimension."""
        return self.stride  # type: ignore[return-value]

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation per dimension."""
        return self.dilation  # type: ignore[return-value]

    @property
    def paddings(self) -> tuple[tuple[int, int], ...]:
        """Padding before and after, per dimension."""
        return self.padding  # type: ignore[return-value]

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Spatial sizes of the output."""
        sizes = []
        for dimension, (before, after) in enumerate(self.paddings):
            size, stride = self.input_size[dimension], self.strides[dimension]
            span = self.dilations[dimension] * (self.kernel_size[dimension] - 1)
            if self.transposed:
                extra = self.output_padding[dimension]  # type: ignore[index]
                sizes.append((size - 1) * stride + span + extra + 1 - before - after)
            else:
                sizes.append((before + size + after - span - 1) // stride + 1)
        return tuple(sizes)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """`(N, C_out, *O)`."""
        out = self.weight_shape[1] * self.groups if self.transposed else self.weight_shape[0]
        return (self.input_shape[0], out, *self.output_size)

    def patterns(self) -> Iterator[IndexPattern]:
        """The index pattern of each dimension; its axis `o` is the input if transposed."""
        for dimension, kernel in enumerate(self.kernel_size):
            short, long = self.output_size[dimension], self.input_size[dimension]
            if self.transposed:
                short, long = long, short
            yield IndexPattern(
                kernel,
                short,
                long,
                self.strides[dimension],
                self.dilations[dimension],
                self.paddings[dimension][0],
                self.padding_mode,
            )


def integers(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """Numbers as integers.

    Args:
        name: Name of the option.
        values: Its numbers, of any type.

    Raises:
        ValueError: If one isn't whole, or they are no numbers.

    Example:
        >>> integers("stride", (2, 3.0))
        (2, 3)
    """
    try:
        values = tuple(values)
        whole = tuple(map(int, values))
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != values:
        raise ValueError(f"{name}={values!r} must be integers")
    return whole


def positive(name: str, value: Any) -> int:
    """A number of things, at least one.

    Args:
        name: Name of the option.
        value: Its number, of any type.

    Raises:
        ValueError: If it is no whole number, or none of the things.

    Example:
        >>> positive("columns", 2.0)
        2
    """
    (whole,) = integers(name, (value,))
    if whole < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return whole


@lru_cache(maxsize=512, typed=True)
def _normalised(*given: object) -> dict[str, object]:
    """The attributes of a specification, checked and normalised: once for those used last."""
    spec = object.__new__(ConvSpec)
    vars(spec).update(zip((field.name for field in fields(ConvSpec)), given, strict=True))
    spec._normalise()
    return vars(spec)
