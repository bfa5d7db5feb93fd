"""A convolution's connectivity along one dimension, as a symbol that makes its tensor on demand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
"""What positions outside the input hold, as in `torch.nn.Conv2d`."""

AXES = "koi"
"""Axes of the tensor: kernel position, output position, input position."""


@dataclass(frozen=True)
class IndexPattern:
    """Which input, output and kernel positions of a convolution meet, along one dimension.

    `Pi[k, o, i] = 1` if `i = o * stride + k * dilation - padding`, else 0 (Dangel 2024,
    arXiv 2307.02275, section 2). Positions outside the input are mapped back into it by the padding
    mode, so no padded copy of the input is needed. A transposed convolution has the pattern of the
    convolution that it transposes, its input along the axis `o` and its output along `i`.

    Attributes:
        kernel_size: Number of kernel positions.
        output_size: Number of output positions.
        input_size: Number of input positions.
        stride: Input positions between neighbouring outputs.
        dilation: Input positions between neighbouring kernel elements.
        padding: Positions added before the input; negative: positions that no window reaches.
            Those after it follow from `output_size`. Windows that see nothing but zeros see the
            same next to the input, where they are put.
        padding_mode: One of `"zeros"`, `"circular"`, `"reflect"`, `"replicate"`.
        summed: Axes among `"koi"` that the tensor is summed over. Summed over `"o"`, the pattern
            is the `[kernel_size, input_size]` matrix that sums over positions before any product.

    Example:
        >>> pattern = IndexPattern(kernel_size=2, output_size=3, input_size=4)
        >>> pattern.tensor(torch.float64)[1]  # kernel position 1 takes the output's right neighbour
        tensor([[0., 1., 0., 0.],
                [0., 0., 1., 0.],
                [0., 0., 0., 1.]], dtype=torch.float64)
        >>> pattern.sum("o").tensor(torch.float64)
        tensor([[1., 1., 1., 0.],
                [0., 1., 1., 1.]], dtype=torch.float64)
    """

    kernel_size: int
    output_size: int
    input_size: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    padding_mode: str = "zeros"
    summed: str = ""

    def __post_init__(self) -> None:
        if self.padding_mode == "zeros":
            # What crops the input to what windows see would have to crop more than there is.
            nearest = max(min(self.padding, self._reach + 1), -self.input_size)
            object.__setattr__(self, "padding", nearest)

    @property
    def _reach(self) -> int:
        """Input positions from the first to the last that windows see."""
        return (self.output_size - 1) * self.stride + (self.kernel_size - 1) * self.dilation

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor: kernel, output and input size, without the summed axes."""
        sizes = zip(AXES, (self.kernel_size, self.output_size, self.input_size), strict=True)
        return tuple(size for axis, size in sizes if axis not in self.summed)

    @property
    def axes(self) -> str:
        """The axes that are left, in the order of the tensor."""
        return "".join(axis for axis in AXES if axis not in self.summed)

    @property
    def overhang(self) -> tuple[int, int]:
        """Positions that windows need before and after the input; negative after it: unused."""
        return self.padding, self._reach - self.padding - (self.input_size - 1)

    @property
    def legs(self) -> tuple[tuple[int, int], ...]:
        """Size, and input positions between neighbours, of the axes `k` and `o` that are left."""
        legs = {"k": (self.kernel_size, self.dilation), "o": (self.output_size, self.stride)}
        return tuple(leg for axis, leg in legs.items() if axis not in self.summed)

    @property
    def selects(self) -> bool:
        """Whether the pattern assigns one input position, or none, to each position of its legs.

        So it does, unless it is summed over more than one position, or no leg is left.
        """
        sizes = {"k": self.kernel_size, "o": self.output_size, "i": 2}
        return len(self.summed) < 2 and all(sizes[axis] == 1 for axis in self.summed)

    @property
    def wraps(self) -> bool:
        """Whether a padding mode leads positions outside of the input back into it."""
        return self.padding_mode != "zeros" and max(self.overhang) > 0

    @property
    def constant(self) -> int:
        """The number that all entries of the tensor are, or 0 if they differ."""
        entries = self.tensor(torch.float64).unique()
        return int(entries.item()) if entries.numel() == 1 else 0

    def __str__(self) -> str:
        return f"sum_{self.summed} Pi" if self.summed else "Pi"

    def sum(self, axis: str) -> IndexPattern:
        """Return the pattern summed over another of its axes, `"k"`, `"o"` or `"i"`."""
        return replace(self, summed="".join(a for a in AXES if a in self.summed + axis))

    def source(self, device: torch.device | None = None) -> Tensor:
        """Input position that each position of the padded input holds, or -1 for a zero.

        Args:
            device: Device of the result.

        Returns:
            Integers of shape `[before + input_size + after]`, `overhang` being `(before, after)`.
        """
        before, after = self.overhang
        position = torch.arange(-before, self.input_size + after, device=device)
        return wrap(position, self.input_size, self.padding_mode)

    def tensor(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Make the tensor. Its entries are small integers, exact in every dtype used here.

        Args:
            dtype: Type of the entries.
            device: Where to make it. Default: the CPU.

        Returns:
            Tensor of shape `shape`.
        """
        kernel = torch.arange(self.kernel_size, device=device) * self.dilation
        output = torch.arange(self.output_size, device=device) * self.stride
        source = self.source(device)[kernel[:, None] + output]
        inputs = torch.arange(self.input_size, device=device)
        dense = (source[..., None] == inputs).to(dtype)
        over = [AXES.index(axis) for axis in self.summed]
        return dense.sum(over) if over else dense


def wrap(position: Tensor, size: int, padding_mode: str) -> Tensor:
    """Map positions outside `0, ..., size - 1` back inside, as a padding mode does.

    Args:
        position: Integers.
        size: Number of positions inside.
        padding_mode: One of `PADDING_MODES`.

    Returns:
        Integers of the same shape; -1 where the padding mode puts a zero.

    Raises:
        ValueError: If the padding mode is unknown.

    Example:
        >>> wrap(torch.arange(-2, 5), 3, "reflect").tolist()
        [2, 1, 0, 1, 2, 1, 0]
    """
    if padding_mode == "zeros":
        return torch.where((position >= 0) & (position < size), position, -1)
    if padding_mode == "circular":
        return position % size
    if padding_mode == "replicate":
        return position.clamp(0, size - 1)
    if padding_mode == "reflect":
        period = max(2 * (size - 1), 1)
        folded = position % period
        return torch.minimum(folded, period - folded) if size > 1 else folded
    raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
