"""Convolution, its transpose, unfold and fold in any number of spatial dimensions.

They are called like `torch.nn.functional.conv2d`, `conv_transpose2d`, `unfold` and `fold`, and
evaluated as tensor networks (Dangel 2024, arXiv 2307.02275), in four and five dimensions as in one.

Each is one slot of a *multilinear form*, a network without open indices: the convolution of `input`
and `weight` is what the form multiplies with `output`. Its derivatives of every order are slots of
the same form (that of `input` is the transposed convolution), so a backward pass has plans of its
own and keeps the operands only, nothing unfolded. `torch.func`'s transformations, forward mode and
gradients of gradients all work.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor

from kfac_tn.tn.autocast import is_enabled
from kfac_tn.tn.conv import ConvSpec, Ints, Padding, integers
from kfac_tn.tn.network import Network
from kfac_tn.tn.operations import forward, unfold_input
from kfac_tn.tn.plan import Plan, plan, run


def convNd(  # noqa: N802
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Convolution in any number of spatial dimensions, as `torch.nn.functional.conv1d` to `conv3d`.

    Args:
        input: `[N, C_in, *I]`, or `[C_in, *I]` for a single example.
        weight: `[C_out, C_in / groups, *K]`. Its axes decide the number of dimensions.
        bias: `[C_out]`. Default: none.
        stride: One number, or one per dimension. Default: 1.
        padding: Number, one per dimension, `(before, after)` per dimension, `"same"` or `"valid"`.
            Default: 0.
        dilation: One number, or one per dimension. Default: 1.
        groups: Default: 1.
        padding_mode: What padding holds, as `torch.nn.Conv2d`'s option; no padded copy of the input
            is kept for any of them. Default: `"zeros"`.

    Returns:
        `[N, C_out, *O]`, or `[C_out, *O]`.

    Raises:
        ValueError: If the arguments describe no convolution; the message names the culprit.

    Example:
        >>> x, weight = torch.rand(2, 3, 4, 4, 4, 4), torch.rand(6, 3, 2, 2, 2, 2)
        >>> convNd(x, weight, stride=2).shape  # in four dimensions
        torch.Size([2, 6, 2, 2, 2, 2])
    """
    options = (stride, padding, dilation, groups, False, 0, padding_mode)
    return _convolve(input, weight, bias, weight.shape[0], options)


def conv_transposeNd(  # noqa: N802
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """Transposed convolution, as `torch.nn.functional.conv_transpose1d` to `conv_transpose3d`.

    Args:
        input: `[N, C_in, *I]`, or `[C_in, *I]` for a single example.
        weight: `[C_in, C_out / groups, *K]`. Its axes decide the number of dimensions.
        bias: `[C_out]`. Default: none.
        stride: One number, or one per dimension. Default: 1.
        padding: Positions taken off both sides of the output: a number, one per dimension, or
            `(before, after)` per dimension. Default: 0.
        output_padding: Positions added after the output. Default: 0.
        groups: Default: 1.
        dilation: One number, or one per dimension. Default: 1.

    Returns:
        `[N, C_out, *O]`, or `[C_out, *O]`.

    Raises:
        ValueError: If the arguments describe no convolution; the message names the culprit.

    Example:
        >>> conv_transposeNd(torch.ones(1, 1, 3), torch.ones(1, 1, 2), stride=2, output_padding=1)
        tensor([[[1., 1., 1., 1., 1., 1., 0.]]])
    """
    options = (stride, padding, dilation, groups, True, output_padding, "zeros")
    channels = weight.shape[1] * groups if weight.ndim > 1 else 0
    return _convolve(input, weight, bias, channels, options)


def unfoldNd(  # noqa: N802
    input: Tensor, kernel_size: Ints, dilation: Ints = 1, padding: Padding = 0, stride: Ints = 1
) -> Tensor:
    """Unfold the input (im2col), as `torch.nn.functional.unfold`.

    Args:
        input: `[N, C, *I]`; or `[C, *I]` if `kernel_size` has one number per dimension.
        kernel_size: One number for all axes after the second, or one per dimension.
        dilation: One number, or one per dimension. Default: 1.
        padding: As that of `convNd`. Default: 0.
        stride: One number, or one per dimension. Default: 1.

    Returns:
        `[N, C * prod(kernel_size), prod(O)]`, or the same without `N`.

    Raises:
        ValueError: If no window fits, or the arguments don't; the message names the culprit.

    Example:
        >>> unfoldNd(torch.arange(4.0).reshape(1, 1, 4), 2)
        tensor([[[0., 1., 2.],
                 [1., 2., 3.]]])
    """
    kernel = _sizes("kernel_size", kernel_size, input.ndim - 2)
    x, batched = _batch(input, len(kernel) + 2, "input")
    columns = _apply("unfold", "columns", {"input": x}, x.shape, kernel, dilation, padding, stride)
    return columns if batched else columns.squeeze(0)


def foldNd(  # noqa: N802
    input: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    dilation: Ints = 1,
    padding: Padding = 0,
    stride: Ints = 1,
) -> Tensor:
    """Sum unfolded columns where they came from (col2im), as `torch.nn.functional.fold`.

    This is the transpose (not the inverse) of `unfoldNd` with the same arguments.

    Args:
        input: Columns, `[N, C * prod(kernel_size), prod(O)]`, or the same without `N`.
        output_size: Spatial sizes `I` of the result.
        kernel_size: One number, or one per dimension. This or `output_size` must be a tuple: it
            tells the number of dimensions.
        dilation: One number, or one per dimension. Default: 1.
        padding: As that of `convNd`. Default: 0.
        stride: One number, or one per dimension. Default: 1.

    Returns:
        `[N, C, *I]`, or `[C, *I]`.

    Raises:
        ValueError: If the columns are not those of such an input; the message has the numbers.

    Example:
        >>> foldNd(torch.ones(1, 2, 3), (4,), (2,))
        tensor([[[1., 2., 2., 1.]]])
    """
    given = [len(sizes) for sizes in (output_size, kernel_size) if not isinstance(sizes, int)]
    if not given:
        raise ValueError(
            f"output_size={output_size} and kernel_size={kernel_size} leave the number of "
            "dimensions open: give a tuple with one size per dimension"
        )
    size = _sizes("output_size", output_size, given[0])
    kernel = _sizes("kernel_size", kernel_size, given[0])
    if len(size) != len(kernel):
        raise ValueError(
            f"output_size={output_size} and kernel_size={kernel_size} differ in their dimensions"
        )
    columns, batched = _batch(input, 3, "input")
    count, rows, _ = columns.shape
    if rows % prod(kernel):
        raise ValueError(
            f"input of shape {tuple(input.shape)} must have a multiple of prod(kernel_size) = "
            f"{prod(kernel)} rows, got {rows}"
        )
    shape = (count, rows // prod(kernel), *size)
    result = _apply(
        "unfold", "input", {"columns": columns}, shape, kernel, dilation, padding, stride
    )
    return result if batched else result.squeeze(0)


SEQUENCES = (tuple, list, torch.Size)

# ---- how it is computed ----------------------------------------------------------------------


class _Slot(torch.autograd.Function):
    """One slot of a multilinear form, given tensors in the others. Its derivatives are slots too.

    The form is linear in each slot. So the vector-Jacobian product with respect to one puts the
    cotangent in the slot of the result, and evaluates that one; a Jacobian-vector product replaces
    one tensor by its tangent.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(form: Network, slot: str, *tensors: Tensor) -> Tensor:
        network = _without(form, slot)
        result = network.evaluate(**dict(zip(network.operands, tensors, strict=True)))
        # Without a product, the result may view the operand; callers own what they get from torch.
        if len(tensors) == 1 and result.numel() <= tensors[0].numel():
            return result.clone(memory_format=torch.contiguous_format)
        return result.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form, ctx.slot, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
        names = _without(ctx.form, ctx.slot).operands
        held = {n: t.conj() for n, t in zip(names, ctx.saved_tensors, strict=True)}
        return (
            None,
            None,
            *(
                _evaluate(ctx.form, name, {**held, ctx.slot: grad_output})
                if needed and grad_output is not None
                else None
                for name, needed in zip(names, ctx.needs_input_grad[2:], strict=True)
            ),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        names = _without(ctx.form, ctx.slot).operands
        held = dict(zip(names, ctx.saved_tensors, strict=True))
        terms = [
            _evaluate(ctx.form, ctx.slot, {**held, name: tangent})
            for name, tangent in zip(names, tangents[2:], strict=True)
            if tangent is not None
        ]
        return sum(terms[1:], terms[0]) if terms else None


# Torch asks for the signature at every call: a quarter of the time of a small convolution.
_Slot.forward.__signature__ = signature(_Slot.forward)  # type: ignore[attr-defined]


def _evaluate(form: Network, slot: str, tensors: dict[str, Tensor]) -> Tensor:
    """Evaluate a slot of a form, of whose tensors that in the slot itself plays no role."""
    return _Slot.apply(form, slot, *(tensors[n] for n in _without(form, slot).operands))


@lru_cache(maxsize=1024)
def _without(form: Network, slot: str) -> Network:
    """The coefficient of a slot, in the shape of what the slot takes."""
    return form.without(slot, *form.axes_of(slot)).simplify()


@lru_cache(maxsize=1024)
def _cached_form(kind: str, *options: Any) -> Network:
    if kind == "conv":
        return forward(ConvSpec(*options)).contract_with("output")
    shape, kernel, dilation, padding, stride = options
    # The number of output channels plays no role here.
    spec = ConvSpec(shape, (1, shape[1], *kernel), stride, padding, dilation)
    return unfold_input(spec).contract_with("columns")


def _form(kind: str, *options: Any) -> Network:
    """The multilinear form of a kind of function, `"conv"` or `"unfold"`; options may be lists."""
    try:
        return _cached_form(kind, *options)
    except TypeError:  # lists are no key of a cache
        return _cached_form(kind, *map(_hashable, options))


@torch.compiler.assume_constant_result
def _compiled_plan(
    dtype: torch.dtype, device: torch.device, kind: str, slot: str, *options: Any
) -> Plan:
    """The plan of a slot, for `torch.compile`, which calls this while it traces."""
    return plan(_without(_form(kind, *options), slot), dtype, device)


def _apply(
    kind: str, slot: str, tensors: dict[str, Tensor], shape: tuple[int, ...], *options: Any
) -> Tensor:
    """Evaluate a slot of the form of a batch, which may be empty; `shape` is the input's."""
    (name, batch), *_ = tensors.items()
    if len(batch) == 0:  # a network has no empty index: a row of zeros stands in, and is cut off
        tensors = {**tensors, name: batch.sum(0, keepdim=True)}
        return _apply(kind, slot, tensors, (1, *shape[1:]), *options)[:0]
    if torch.compiler.is_compiling():
        # The compiler sees the steps alone, and makes their backward pass itself.
        sizes = _numbers((shape, *options))
        return run(_compiled_plan(batch.dtype, batch.device, kind, slot, *sizes), tensors)
    return _evaluate(_form(kind, shape, *options), slot, tensors)


def _numbers(option: Any) -> Any:
    """Numbers in the place of a compiler's symbols for sizes: a plan is for one shape."""
    if type(option) in SEQUENCES:  # unions of types break the graph in torch's older versions
        return tuple([_numbers(entry) for entry in option])
    if type(option) in (bool, str) or option is None:
        return option
    return len(range(option)) if option >= 0 else -len(range(-option))


def _convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, channels: int, options: tuple[Any, ...]
) -> Tensor:
    x, batched = _batch(input, weight.ndim, "input")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias of shape {tuple(bias.shape)} must have shape ({channels},)")
    x, weight, bias = cast_as_autocast(x, weight, bias)
    if bias is not None and bias.dtype != weight.dtype:  # their sum would have the wider one
        raise ValueError(f"bias has dtype {bias.dtype}, weight {weight.dtype}: they must share it")
    output = _apply(
        "conv", "output", {"input": x, "weight": weight}, x.shape, weight.shape, *options
    )
    if bias is not None:
        output = output + bias.reshape(-1, *[1] * (weight.ndim - 2))
    return output if batched else output.squeeze(0)


def cast_as_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as `torch.autocast` casts what a convolution takes, once for both passes."""
    device = x.device.type
    if not is_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        lower = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if lower else tensor

    return cast(x), cast(weight), None if bias is None else cast(bias)


# ---- what is accepted ------------------------------------------------------------------------


def _batch(tensor: Tensor, axes: int, name: str) -> tuple[Tensor, bool]:
    """Give a single example its batch axis; and whether the tensor had one."""
    if tensor.ndim not in (axes - 1, axes):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} must have {axes} axes, or {axes - 1} "
            "for a single example"
        )
    return (tensor, True) if tensor.ndim == axes else (tensor.unsqueeze(0), False)


def _sizes(name: str, value: Ints, dimensions: int) -> tuple[int, ...]:
    sizes = (value,) * max(dimensions, 0) if isinstance(value, int) else integers(name, value)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name}={value} must be one positive number, or one per dimension")
    return sizes


def _hashable(option: object) -> object:
    """Lists as tuples, to be a key of a cache."""
    return tuple(map(_hashable, option)) if isinstance(option, SEQUENCES) else option
