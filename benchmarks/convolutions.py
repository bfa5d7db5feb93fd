"""Distinct two-dimensional convolutions of well-known networks, as data.

Written down from the architectures' definitions: ResNet-18 (He et al. 2016), ResNeXt-101 32x8d
(Xie et al. 2017), ConvNeXt-base (Liu et al. 2022; its pointwise layers are linear layers),
MobileNetV2 (Sandler et al. 2018) and InceptionV3 (Szegedy et al. 2016, without the auxiliary
classifier) for ImageNet, 224 x 224 pixels or 299 x 299 for Inception; All-CNN-C (Springenberg et
al. 2015, padded symmetrically, 100 classes) and 3c3d (Schneider et al. 2019) for CIFAR, 32 x 32.
A convolution that a network, or several, have more than once is listed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("general", "dense", "down-sampling", "grouped", "depthwise")
"""What `Convolution.kind` may be."""


@dataclass(frozen=True)
class Convolution:
    """A convolution without dilation.

    Attributes:
        networks: Networks that have it.
        channels: Input channels.
        size: Height and width of the input.
        out_channels: Output channels.
        kernel_size: Height and width of the kernel.
        stride: The same in both dimensions.
        padding: On both sides, per dimension.
        groups: Number of groups.
    """

    networks: tuple[str, ...] = field(compare=False)
    channels: int
    size: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    groups: int

    @property
    def kind(self) -> str:
        """Depthwise or grouped; of the others, windows may miss pixels, tile, or overlap."""
        if self.groups > 1:
            return "depthwise" if self.groups == self.channels else "grouped"
        if self.padding == (0, 0) and self.stride >= max(self.kernel_size):
            return "dense" if (self.stride,) * 2 == self.kernel_size else "down-sampling"
        return "general"

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel_size))
        options = f"k{kernel} s{self.stride} p{'x'.join(map(str, self.padding))} g{self.groups}"
        return f"{self.channels}@{self.size} to {self.out_channels}, {options}"


Row = tuple[int | tuple[int, int], ...]
"""Channels, size, output channels, kernel size; stride, padding and groups if not 1, 0 and 1."""

# fmt: off
ARCHITECTURES: dict[str, list[Row]] = {
    "ResNet-18": [
        (3, 224, 64, 7, 2, 3),
        (64, 56, 64, 3, 1, 1), (64, 56, 128, 3, 2, 1),
        (128, 28, 128, 3, 1, 1),
        (64, 56, 128, 1, 2),
        (128, 28, 256, 3, 2, 1),
        (256, 14, 256, 3, 1, 1),
        (128, 28, 256, 1, 2),
        (256, 14, 512, 3, 2, 1),
        (512, 7, 512, 3, 1, 1),
        (256, 14, 512, 1, 2),
    ],
    "ResNeXt-101": [
        (3, 224, 64, 7, 2, 3),
        (64, 56, 256, 1), (256, 56, 256, 3, 1, 1, 32), (256, 56, 256, 1), (256, 56, 512, 1),
        (512, 56, 512, 3, 2, 1, 32),
        (512, 28, 512, 1),
        (256, 56, 512, 1, 2),
        (512, 28, 512, 3, 1, 1, 32), (512, 28, 1024, 1), (1024, 28, 1024, 3, 2, 1, 32),
        (1024, 14, 1024, 1),
        (512, 28, 1024, 1, 2),
        (1024, 14, 1024, 3, 1, 1, 32), (1024, 14, 2048, 1), (2048, 14, 2048, 3, 2, 1, 32),
        (2048, 7, 2048, 1),
        (1024, 14, 2048, 1, 2),
        (2048, 7, 2048, 3, 1, 1, 32),
    ],
    "ConvNeXt": [
        (3, 224, 128, 4, 4),
        (128, 56, 128, 7, 1, 3, 128), (128, 56, 256, 2, 2),
        (256, 28, 256, 7, 1, 3, 256), (256, 28, 512, 2, 2),
        (512, 14, 512, 7, 1, 3, 512), (512, 14, 1024, 2, 2),
        (1024, 7, 1024, 7, 1, 3, 1024),
    ],
    "MobileNetV2": [
        (3, 224, 32, 3, 2, 1),
        (32, 112, 32, 3, 1, 1, 32), (32, 112, 16, 1), (16, 112, 96, 1),
        (96, 112, 96, 3, 2, 1, 96),
        (96, 56, 24, 1), (24, 56, 144, 1), (144, 56, 144, 3, 1, 1, 144), (144, 56, 24, 1),
        (144, 56, 144, 3, 2, 1, 144),
        (144, 28, 32, 1), (32, 28, 192, 1), (192, 28, 192, 3, 1, 1, 192), (192, 28, 32, 1),
        (192, 28, 192, 3, 2, 1, 192),
        (192, 14, 64, 1), (64, 14, 384, 1), (384, 14, 384, 3, 1, 1, 384), (384, 14, 64, 1),
        (384, 14, 96, 1), (96, 14, 576, 1), (576, 14, 576, 3, 1, 1, 576), (576, 14, 96, 1),
        (576, 14, 576, 3, 2, 1, 576),
        (576, 7, 160, 1), (160, 7, 960, 1), (960, 7, 960, 3, 1, 1, 960), (960, 7, 160, 1),
        (960, 7, 320, 1), (320, 7, 1280, 1),
    ],
    "InceptionV3": [
        (3, 299, 32, 3, 2),
        (32, 149, 32, 3),
        (32, 147, 64, 3, 1, 1),
        (64, 73, 80, 1), (80, 73, 192, 3),
        (192, 35, 64, 1), (192, 35, 48, 1), (48, 35, 64, 5, 1, 2), (64, 35, 96, 3, 1, 1),
        (96, 35, 96, 3, 1, 1), (192, 35, 32, 1), (256, 35, 64, 1), (256, 35, 48, 1),
        (288, 35, 64, 1), (288, 35, 48, 1), (288, 35, 384, 3, 2), (96, 35, 96, 3, 2),
        (768, 17, 192, 1), (768, 17, 128, 1), (128, 17, 128, (1, 7), 1, (0, 3)),
        (128, 17, 192, (7, 1), 1, (3, 0)), (128, 17, 128, (7, 1), 1, (3, 0)),
        (128, 17, 192, (1, 7), 1, (0, 3)), (768, 17, 160, 1), (160, 17, 160, (1, 7), 1, (0, 3)),
        (160, 17, 192, (7, 1), 1, (3, 0)), (160, 17, 160, (7, 1), 1, (3, 0)),
        (160, 17, 192, (1, 7), 1, (0, 3)), (192, 17, 192, (1, 7), 1, (0, 3)),
        (192, 17, 192, (7, 1), 1, (3, 0)), (192, 17, 320, 3, 2), (192, 17, 192, 3, 2),
        (1280, 8, 320, 1), (1280, 8, 384, 1), (384, 8, 384, (1, 3), 1, (0, 1)),
        (384, 8, 384, (3, 1), 1, (1, 0)), (1280, 8, 448, 1), (448, 8, 384, 3, 1, 1),
        (1280, 8, 192, 1), (2048, 8, 320, 1), (2048, 8, 384, 1), (2048, 8, 448, 1),
        (2048, 8, 192, 1),
    ],
    "All-CNN-C": [
        (3, 32, 96, 3, 1, 1), (96, 32, 96, 3, 1, 1), (96, 32, 96, 3, 2, 1),
        (96, 16, 192, 3, 1, 1), (192, 16, 192, 3, 1, 1), (192, 16, 192, 3, 2, 1),
        (192, 8, 192, 3), (192, 6, 192, 1), (192, 6, 100, 1),
    ],
    "3c3d": [(3, 32, 64, 5), (64, 14, 96, 3), (96, 6, 128, 3, 1, 1)],
}
# fmt: on
"""The convolutions of each network, in the order of their first use."""


def _convolution(networks: tuple[str, ...], row: Row) -> Convolution:
    channels, size, out_channels, kernel, *rest = row
    stride, padding, groups = (*rest, *(1, 0, 1)[len(rest) :])
    kernel, padding = ((n, n) if isinstance(n, int) else n for n in (kernel, padding))
    return Convolution(networks, channels, size, out_channels, kernel, stride, padding, groups)


def distinct() -> list[Convolution]:
    """All convolutions, each once."""
    users: dict[Row, list[str]] = {}
    for network, rows in ARCHITECTURES.items():
        for row in rows:
            users.setdefault(row, []).append(network)
    return [_convolution(tuple(networks), row) for row, networks in users.items()]
