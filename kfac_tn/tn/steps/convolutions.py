"""Convolutions by torch's own kernels, and their derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_tn.tn.autocast import is_enabled
from kfac_tn.tn.pages import FRESH
from kfac_tn.tn.steps.step import WIDTH, Step, has_depthwise_kernels

Sizes = tuple[int, ...]

LARGEST_DEPTHWISE = 3
"""Size of a kernel of one channel up to which its gradient has a fast kernel on a CPU."""

DEPTHWISE_WASTE = 40
"""How much longer that of a larger one takes."""


LAID_OUT, LAID_OUT_FRESH = 0.4, 2.5
"""How often an element is moved to be laid out as convolutions want it, and back."""


def _dilation(dilation: Sizes, kernel_size: Sizes, tensor: Tensor) -> Sizes:
    """More than one, which kernels of one position ignore: on one thread, it leads to oneDNN.

    Not less than given: it allows a transposed convolution as many further positions.
    """
    if tensor.device.type == "cpu" and all(size == 1 for size in kernel_size):
        return tuple(max(2, each) for each in dilation)
    return dilation


def _laid_out(tensor: Tensor) -> int:
    """Elements that take as long as a tensor takes to be laid out as oneDNN wants it."""
    fresh = tensor.numel() * tensor.element_size() >= FRESH
    return int((LAID_OUT_FRESH if fresh else LAID_OUT) * tensor.numel())


@dataclass(frozen=True)
class _Convolutional(Step):
    """What the three have in common.

    Attributes:
        stride: Of each spatial dimension, like the others.
        padding: Zeros on both sides.
        dilation: Distance of kernel positions.
        groups: Number of groups.
    """

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int

    def flops(self, *inputs: Tensor) -> int:
        """Multiplications and additions: each kernel element meets each output position."""
        result, kernel = self._result_and_kernel(*inputs)
        return 2 * result.numel() * kernel.numel() // kernel.shape[0]

    def work(self, *inputs: Tensor) -> float:
        """Groups of few channels waste some, but for one alone there are special kernels."""
        _, kernel = self._result_and_kernel(*inputs)
        rows, columns = kernel.shape[0] // self.groups, kernel.shape[1]
        if self.groups == 1 or rows == columns == 1:
            return self.flops(*inputs) * min(self.groups, 2)
        return self.flops(*inputs) * max(rows, WIDTH) * max(columns, WIDTH) / (rows * columns)

    def moved(self, *inputs: Tensor) -> int:
        """Image and result are laid out anew: in fresh memory, if they are large."""
        return sum(_laid_out(tensor) for tensor in (inputs[0], self(*inputs)))

    def by_blas(self, *inputs: Tensor) -> bool:
        """Whether the dtype is one that oneDNN has no convolutions for."""
        return not has_depthwise_kernels(inputs[0])

    def launches(self, *inputs: Tensor) -> int:
        """Number of operations on tensors."""
        return 2 if has_depthwise_kernels(inputs[0]) else 2 + 4 * self.groups

    def _result_and_kernel(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's result and its kernel, be they arguments or computed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Convolve(_Convolutional):
    """Convolve `[N, C, *I]` with a kernel `[D, C / groups, *K]`."""

    @staticmethod
    def compute(  # type: ignore[override]
        image: Tensor, kernel: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
    ) -> Tensor:
        """Convolve."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
        dilation = _dilation(dilation, kernel.shape[2:], image)
        return convolve(image, kernel, None, stride, padding, dilation, groups)

    def _result_and_kernel(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self(*inputs), inputs[1]


@dataclass(frozen=True)
class ConvolveTransposed(_Convolutional):
    """The adjoint of `Convolve` in its image: from `[N, D, *O]` and the kernel to `[N, C, *I]`.

    Attributes:
        output_padding: What size is added at the end, besides what the others say.
    """

    output_padding: Sizes

    def work(self, *inputs: Tensor) -> float:
        """Few channels of the image (three colours, say) take as long as a vector of them."""
        waste = max(inputs[1].shape[1], WIDTH) / inputs[1].shape[1] if self.groups == 1 else 1
        return super().work(*inputs) * waste

    @staticmethod
    def compute(  # type: ignore[override]
        result: Tensor,
        kernel: Tensor,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        groups: int,
        output_padding: Sizes,
    ) -> Tensor:
        """Convolve with the transposed convolution."""
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(stride) - 1]
        dilation = _dilation(dilation, kernel.shape[2:], result)
        return convolve(result, kernel, None, stride, padding, output_padding, groups, dilation)

    def _result_and_kernel(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs[0], inputs[1]


@dataclass(frozen=True)
class ConvolveBackward(_Convolutional):
    """The adjoint of `Convolve` in its kernel: from the image and `[N, D, *O]` to the kernel.

    Attributes:
        kernel_size: Of each spatial dimension.
    """

    kernel_size: Sizes

    def work(self, *inputs: Tensor) -> float:
        """Of one channel alone, large kernels have none of the special ones."""
        alone = self.groups > 1 and inputs[0].shape[1] == inputs[1].shape[1] == self.groups
        slow = alone and max(self.kernel_size) > LARGEST_DEPTHWISE
        return super().work(*inputs) * (DEPTHWISE_WASTE if slow else 1)

    @staticmethod
    def compute(  # type: ignore[override]
        image: Tensor,
        result: Tensor,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        groups: int,
        kernel_size: Sizes,
    ) -> Tensor:
        """Sum over examples and outputs."""
        device = image.device.type
        if is_enabled(device):
            lower = torch.get_autocast_dtype(device)  # as of all products: this one isn't asked
            image, result = image.to(lower), result.to(lower)
        shape = (result.shape[1], image.shape[1] // groups, *kernel_size)
        kernel = image.new_empty(1).expand(shape)  # only its shape matters
        dilation = _dilation(dilation, kernel_size, image)
        none = [0] * len(stride)
        mask = [False, True, False]
        _, gradient, _ = torch.ops.aten.convolution_backward(
            result, image, kernel, None, stride, padding, dilation, False, none, groups, mask
        )
        return gradient

    def moved(self, *inputs: Tensor) -> int:
        """Large kernels are laid out anew."""
        _, kernel = self._result_and_kernel(*inputs)
        return 4 * kernel.numel()

    def _result_and_kernel(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs[1], self(*inputs)
