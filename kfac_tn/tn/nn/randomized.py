"""Convolutions that keep only a random part of their input for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from kfac_tn.tn.conv import ConvSpec, Ints, Padding
from kfac_tn.tn.functional import cast_as_autocast, convNd
from kfac_tn.tn.nn.conv import ConvNd
from kfac_tn.tn.nn.sampling import (
    Draw,
    OutputSample,
    Sample,
    draw_sample,
    input_vjp,
)
from kfac_tn.tn.operations import ALONG
from kfac_tn.tn.pattern import wrap


class RandomizedConvNd(ConvNd):
    """A convolution with unbiased random gradients: tensor dropout in the backward pass.

    The output is exact. For the weight's gradient, only a sampled part of the input is kept, and
    the gradient estimated from it has the exact one as its expectation (Bernoulli-CRS: Adelman et
    al. 2021, arXiv 1805.08079; for convolutions as tensor networks: Dangel 2024, arXiv 2307.02275).
    The gradient of the bias is exact, that of the input as well by default. In eval mode, with
    `keep=1`, or with a frozen weight, this is `torch.nn.Conv2d` and its like. Gradients of the
    gradients are not to be had in training mode.

    The input's memory is free only if nothing else keeps the input: a preceding `ReLU`, `Sigmoid`
    or `Tanh` keeps its output, which is this input, while normalizations, `GELU`, `SiLU` and
    poolings keep their own input instead.

    Args:
        in_channels: This and the following up to `dtype` as `ConvNd`.
        out_channels: Channels of the output.
        kernel_size: One number per dimension, or one for all, together with `dimensions`.
        stride: Default: 1.
        padding: Default: 0.
        dilation: Default: 1.
        groups: Default: 1.
        bias: Default: yes.
        padding_mode: Default: `"zeros"`.
        device: Where the parameters are. Default: torch's.
        dtype: Type of the parameters. Default: torch's.
        keep: Probability of each channel, kernel or input position to be kept. May be changed
            between steps. Default: 0.5.
        along: What is sampled. `"channels"` (default): input channels, the same in all groups, or
            whole groups of depthwise convolutions; also saves time. `"spatial"`: input positions.
            `"kernel"`: kernel positions, and of the input what these touch, which is less than
            all only with a stride.
        keep_output: Probability of each output channel (or group, if groups have one each) to be
            kept for the gradient of the input, which saves time. Default: 1, exact.
        generator: Source of randomness, on the input's device. Default: torch's global one.
        dimensions: Number of spatial dimensions. Default: that of `kernel_size`.

    Raises:
        ValueError: As `ConvNd`; or if `keep` or `keep_output` is not in (0, 1], or `along` unknown.

    Example:
        >>> conv = RandomizedConvNd(16, 8, (3, 3), keep=0.25, along="spatial")
        >>> conv(torch.rand(4, 16, 7, 7)).sum().backward()
        >>> conv.weight.grad.shape
        torch.Size([8, 16, 3, 3])
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
        keep: float = 0.5,
        along: str = "channels",
        keep_output: float = 1.0,
        generator: torch.Generator | None = None,
        dimensions: int | None = None,
    ) -> None:
        _check(keep, along, keep_output)
        geometry = (kernel_size, stride, padding, dilation, groups)
        options = (bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *geometry, *options, dimensions=dimensions)
        self.keep, self.along, self.keep_output = keep, along, keep_output
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        """Convolve; draw what to keep."""
        _check(self.keep, self.along, self.keep_output)
        random = self.training and (self.keep < 1 or self.keep_output < 1)
        needed = torch.is_grad_enabled() and self.weight.requires_grad
        if not (random and needed and input.numel()):
            return self._exact(input)
        if input.ndim == len(self.kernel_size) + 1:
            return self._randomized(input.unsqueeze(0)).squeeze(0)
        return self._randomized(input)

    def _exact(self, input: Tensor) -> Tensor:
        """Convolve by torch's kernels where it has the dimension, else by a network."""
        if len(self.kernel_size) > 3:
            return super().forward(input)
        padding: Any = self.padding
        sides = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros" or sides[::2] != sides[1::2]:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, sides, mode), 0
        options = (self.stride, padding, self.dilation, self.groups)
        return _torch_function(self.weight)(input, self.weight, self.bias, *options)

    def _randomized(self, x: Tensor) -> Tensor:
        """Convolve a batch, and draw what to keep of it."""
        options = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        x, spec = _pad(x, _spec(tuple(x.shape), tuple(self.weight.shape), *options))
        draw = Draw(self.keep, x.device, self.generator)
        sample = draw_sample(self.along, draw, spec)
        outputs = None
        if self.keep_output < 1 and x.requires_grad:
            outputs = OutputSample.draw(Draw(self.keep_output, x.device, self.generator), spec)
        x, weight, bias = cast_as_autocast(x, self.weight, self.bias)
        return _Randomized.apply(x, weight, bias, spec, sample, outputs)

    def extra_repr(self) -> str:
        """Options, in the printed form of a model."""
        options = f"{super().extra_repr()}, keep={self.keep}, along={self.along!r}"
        return options + (f", keep_output={self.keep_output}" if self.keep_output < 1 else "")


class _Randomized(torch.autograd.Function):
    """A convolution that keeps a sample of its input, and its weight."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ConvSpec,
        sample: Sample,
        outputs: OutputSample | None,
    ) -> Tensor:
        return _convolve(x, weight, bias, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.spec, ctx.sample, ctx.outputs = inputs
        ctx.save_for_backward(ctx.sample.take(x.detach()), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        spec, needed = ctx.spec, ctx.needs_input_grad
        dx = dw = db = None
        if needed[0] and ctx.outputs is None:
            dx = input_vjp(spec.input_shape, weight, grad_output, spec, spec.groups)
        elif needed[0]:
            dx = ctx.outputs.input_gradient(weight, grad_output)
        if needed[1]:
            dw = ctx.sample.weight_gradient(kept, grad_output)
        if needed[2]:
            db = grad_output.sum((0, *range(2, grad_output.ndim)))
        return dx, dw, db, None, None, None


def randomize(
    model: nn.Module,
    keep: float = 0.5,
    along: str = "channels",
    keep_output: float = 1.0,
    generator: torch.Generator | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Give a model's convolutions randomized gradients, in place.

    Convolution modules are replaced by `RandomizedConvNd`s that hold the same parameters, so
    optimizers made before and state dicts stay valid. If one can't be converted, none is. How much
    memory this frees depends on the layers before them: see `RandomizedConvNd`.

    Args:
        model: The model. Its modules of type `torch.nn.Conv1d`, `Conv2d`, `Conv3d`, `ConvNd` and
            `RandomizedConvNd` are converted.
        keep: As in `RandomizedConvNd`. Default: 0.5.
        along: Default: `"channels"`.
        keep_output: Default: 1.
        generator: Default: torch's global one.
        where: Tells from name and module whether to convert a convolution. Default: all.

    Returns:
        The model; or what replaces it, if it is a convolution itself.

    Raises:
        ValueError: If `keep`, `along` or `keep_output` are invalid; or if a convolution can't be
            converted: transposed, lazy, of a class of its own (parametrizations make one), or with
            hooks, which a replacement would lose. The message has its name.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.GELU(), nn.Conv1d(8, 8, 3))
        >>> randomize(model, keep=0.25, where=lambda name, module: module.in_channels > 3)
        Sequential(
          (0): Conv1d(3, 8, kernel_size=(3,), stride=(1,))
          (1): GELU(approximate='none')
          (2): RandomizedConvNd(8, 8, kernel_size=(3,), stride=(1,), keep=0.25, along='channels')
        )
    """
    _check(keep, along, keep_output)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and (where is None or where(name, module)):
            if reason := _obstacle(module):
                raise ValueError(
                    f"can't randomize {name or 'the model'!r}, {type(module).__name__}: {reason}. "
                    "Leave it out by where="
                )
            replacements[module] = _replacement(module, keep, along, keep_output, generator)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in replacements:
                module._modules[name] = replacements[child]
    return replacements.get(model, model)


# ---- how it is done --------------------------------------------------------------------------

CONVERTIBLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, ConvNd, RandomizedConvNd)


def _check(keep: float, along: str, keep_output: float) -> None:
    for name, rate in (("keep", keep), ("keep_output", keep_output)):
        if not 0 < rate <= 1:
            raise ValueError(f"{name}={rate} must be greater than 0 and at most 1")
    if along not in ALONG:
        raise ValueError(f"along={along!r} is none of {ALONG}")


def _obstacle(conv: nn.Module) -> str | None:
    """Why a convolution can't be converted."""
    if type(conv) not in CONVERTIBLE:
        return "only " + ", ".join(kind.__name__ for kind in CONVERTIBLE) + " are known"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(conv, kind) for kind in hooks):
        return "it has hooks, which a replacement would lose"
    return None


def _replacement(
    conv: _ConvNd, keep: float, along: str, keep_output: float, generator: torch.Generator | None
) -> RandomizedConvNd:
    """A randomized convolution with the parameters of another one."""
    randomized = RandomizedConvNd(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        cast(Padding, conv.padding),
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        "meta",  # its own parameters are never made, and draw no random numbers
        keep=keep,
        along=along,
        keep_output=keep_output,
        generator=generator,
    )
    randomized.weight, randomized.bias = conv.weight, conv.bias
    return randomized.train(conv.training)


@lru_cache(maxsize=1024)
def _spec(shape: tuple[int, ...], weight_shape: tuple[int, ...], *options: Any) -> ConvSpec:
    stride, padding, dilation, groups, mode = options
    return ConvSpec(shape, weight_shape, stride, padding, dilation, groups, padding_mode=mode)


@lru_cache(maxsize=1024)
def _padded(spec: ConvSpec) -> ConvSpec:
    """The same convolution of an input that has been padded."""
    sizes = (b + i + a for i, (b, a) in zip(spec.input_size, spec.paddings, strict=True))
    shape = (*spec.input_shape[:2], *sizes)
    return _spec(shape, spec.weight_shape, spec.strides, 0, spec.dilations, spec.groups, "zeros")


def _pad(x: Tensor, spec: ConvSpec) -> tuple[Tensor, ConvSpec]:
    """Pad in advance what torch's kernels don't pad themselves, and say what is left to do."""
    if spec.padding_mode == "zeros":
        if all(before == after for before, after in spec.paddings):
            return x, spec
        return F.pad(x, [side for pair in reversed(spec.paddings) for side in pair]), _padded(spec)
    for axis, (before, after) in enumerate(spec.paddings, start=2):
        size = x.shape[axis]
        positions = torch.arange(-before, size + after, device=x.device)
        x = x.index_select(axis, wrap(positions, size, spec.padding_mode))
    return x, _padded(spec)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """Convolve what `_pad` returned."""
    options = (spec.dilations, spec.groups)
    if spec.dimensions > 3:
        return convNd(x, weight, bias, spec.strides, spec.paddings, *options)
    padding = tuple(before for before, _ in spec.paddings)
    return _torch_function(weight)(x, weight, bias, spec.strides, padding, *options)


def _torch_function(weight: Tensor) -> Callable[..., Tensor]:
    return getattr(F, f"conv{weight.ndim - 2}d")
