"""Modules like `torch.nn.Conv1d` to `Conv3d` and their transposes, for any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from kfac_tn.tn.conv import ConvSpec, Ints, Padding, integers
from kfac_tn.tn.functional import conv_transposeNd, convNd

ANY_SIZE = 2**40
"""Input size with which hyper-parameters are checked before there is an input: all kernels fit."""


class _Conv(_ConvNd):
    """What both modules share: arguments are checked and made tuples, torch does the rest.

    torch's own base class registers and initialises the parameters, so their names, shapes and
    random draws are torch's, and so is the printed form.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints,
        padding: Padding,
        dilation: Ints,
        transposed: bool,
        output_padding: Ints,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
        dtype: Any,
        dimensions: int | None,
    ) -> None:
        kernel = _kernel(kernel_size, dimensions)
        if min(in_channels, out_channels) < 1:
            raise ValueError(
                f"in_channels={in_channels} and out_channels={out_channels} must be at least 1"
            )
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={in_channels} and "
                f"out_channels={out_channels}"
            )
        spec = ConvSpec(
            (1, in_channels, *[ANY_SIZE] * len(kernel)),
            (in_channels, out_channels // groups, *kernel)
            if transposed
            else (out_channels, in_channels // groups, *kernel),
            stride,
            padding,
            dilation,
            groups,
            transposed,
            output_padding,
            padding_mode,
        )
        before, after = zip(*spec.paddings, strict=True)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            spec.strides,
            padding if isinstance(padding, str) else before,
            spec.dilations,
            transposed,
            spec.output_padding,  # type: ignore[arg-type]
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        if before != after and not isinstance(padding, str):
            self.padding = spec.padding  # type: ignore[assignment]
            self._reversed_padding_repeated_twice = [
                side for pair in reversed(spec.paddings) for side in pair
            ]


class ConvNd(_Conv):
    """Convolution in any number of spatial dimensions, a drop-in for `torch.nn.Conv1d` to `Conv3d`.

    Parameters have the names, shapes and initial values (given a seed) of torch's, so a
    `state_dict` of one loads into the other.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: One number per dimension; their count is the number of dimensions. Or one
            number for all, together with `dimensions`.
        stride: This and the following as in `torch.nn.Conv2d`. Default: 1.
        padding: Also pairs `(before, after)` per dimension. Default: 0.
        dilation: Default: 1.
        groups: Default: 1.
        bias: Default: yes.
        padding_mode: `"zeros"` (default), `"circular"`, `"reflect"` or `"replicate"`.
        device: Where the parameters are. Default: torch's.
        dtype: Type of the parameters. Default: torch's.
        dimensions: Number of spatial dimensions. Default: that of `kernel_size`.

    Attributes:
        weight: `[out_channels, in_channels / groups, *kernel_size]`.
        bias: `[out_channels]`, or None.

    Shape:
        `[N, in_channels, *I]` or `[in_channels, *I]` to `[N, out_channels, *O]` or
        `[out_channels, *O]`.

    Raises:
        ValueError: If these describe no convolution, of any input (at construction) or of the one
            given (when called). The message names the culprit.

    Example:
        >>> import torch
        >>> conv = ConvNd(3, 8, kernel_size=3, padding="same", dimensions=4)
        >>> conv(torch.rand(2, 3, 5, 4, 3, 4)).shape
        torch.Size([2, 8, 5, 4, 3, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        dimensions: int | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, False, 0, groups)
        options = (bias, padding_mode, device, dtype, dimensions)
        super().__init__(in_channels, out_channels, *geometry, *options)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        padding = cast(Padding, self.padding)
        options = (self.dilation, self.groups, self.padding_mode)
        return convNd(input, self.weight, self.bias, self.stride, padding, *options)


class ConvTransposeNd(_Conv):
    """Transposed convolution in any number of dimensions, as `torch.nn.ConvTranspose1d` to `3d`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: One number per dimension, or one for all, together with `dimensions`.
        stride: This and the following as in `torch.nn.ConvTranspose2d`. Default: 1.
        padding: Also pairs `(before, after)` per dimension. Default: 0.
        output_padding: Default: 0.
        groups: Default: 1.
        bias: Default: yes.
        dilation: Default: 1.
        padding_mode: Only `"zeros"` (default), as in torch.
        device: Where the parameters are. Default: torch's.
        dtype: Type of the parameters. Default: torch's.
        dimensions: Number of spatial dimensions. Default: that of `kernel_size`.

    Attributes:
        weight: `[in_channels, out_channels / groups, *kernel_size]`.
        bias: `[out_channels]`, or None.

    Shape:
        `[N, in_channels, *I]` or `[in_channels, *I]` to `[N, out_channels, *O]` or
        `[out_channels, *O]`.

    Raises:
        ValueError: As `ConvNd`.

    Example:
        >>> import torch
        >>> conv = ConvTransposeNd(4, 2, kernel_size=(2, 2, 2, 2), stride=2)
        >>> conv(torch.rand(4, 3, 3, 3, 3), output_size=(7, 6, 6, 6)).shape
        torch.Size([2, 7, 6, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Ints = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        dimensions: int | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, True, output_padding, groups)
        options = (bias, padding_mode, device, dtype, dimensions)
        super().__init__(in_channels, out_channels, *geometry, *options)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve.

        Args:
            input: The input.
            output_size: Spatial sizes of the output (leading axes may be given, too), to choose
                among those that one input may come from. Default: by `output_padding`.
        """
        extra: Any = self.output_padding if output_size is None else self._extra(input, output_size)
        options: tuple[Any, ...] = (self.stride, self.padding, extra, self.groups, self.dilation)
        return conv_transposeNd(input, self.weight, self.bias, *options)

    def _extra(self, input: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """The output padding that leads to an output size."""
        dimensions = len(self.kernel_size)
        channels, spatial = self.in_channels, tuple(input.shape[-dimensions:])
        spec = ConvSpec(
            (1, channels, *spatial),
            tuple(self.weight.shape),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            transposed=True,
        )
        wanted, least = tuple(output_size)[-dimensions:], spec.output_size
        most = tuple(size + stride - 1 for size, stride in zip(least, self.stride, strict=True))
        if len(output_size) not in (dimensions, dimensions + 2, input.ndim) or not all(
            low <= size <= high for low, size, high in zip(least, wanted, most, strict=True)
        ):
            raise ValueError(
                f"output_size={tuple(output_size)} is out of reach: an input of size {spatial} "
                f"leads to sizes from {least} to {most}"
            )
        return tuple(size - low for size, low in zip(wanted, least, strict=True))


def _kernel(kernel_size: Ints, dimensions: int | None) -> tuple[int, ...]:
    if isinstance(kernel_size, int):
        if dimensions is None:
            raise ValueError(
                f"kernel_size={kernel_size} leaves the number of dimensions open: give a tuple "
                "with one size per dimension, or dimensions="
            )
        kernel_size = (kernel_size,) * dimensions
    kernel = integers("kernel_size", kernel_size)
    if not kernel or min(kernel) < 1 or dimensions not in (None, len(kernel)):
        raise ValueError(
            f"kernel_size={kernel_size} with dimensions={dimensions} must be one positive number "
            "per dimension, at least one"
        )
    return kernel
