"""Small versions of well-known networks as plain torch modules, each with a batch and its loss.

Layers are modules, activations too (some packages only see those). ResNet-18 (He et al. 2016) as
for CIFAR: a 3 x 3 stem, no pooling after it. The others are built like MobileNetV2 (Sandler et al.
2018), ConvNeXt (Liu et al. 2022), U-Net (Ronneberger et al. 2015), ViT (Dosovitskiy et al. 2021)
and GPT-2 (Radford et al. 2019), of a size that a CPU passes through in a fraction of a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        same = stride == 1 and channels == out_channels
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C', H / stride, W / stride]`."""
        return self.relu(self.branch(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 32 x 32 images: 11 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    channels = 64
    for out_channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [
            BasicBlock(channels, out_channels, stride),
            BasicBlock(out_channels, out_channels, 1),
        ]
        channels = out_channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, *head)


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3 x 3, pointwise projection."""

    def __init__(self, channels: int, out_channels: int, stride: int, expansion: int = 6):
        super().__init__()
        hidden = expansion * channels
        self.residual = stride == 1 and channels == out_channels
        self.branch = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C', H / stride, W / stride]`."""
        return x + self.branch(x) if self.residual else self.branch(x)


def mobilenet() -> nn.Module:
    """Like MobileNetV2, for 32 x 32 images."""
    widths = (24, 24, 32, 32, 64, 64, 96, 160)
    strides = (1, 1, 2, 1, 2, 1, 1, 2)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
    ]
    channels = 16
    for width, stride in zip(widths, strides, strict=True):
        layers.append(InvertedResidual(channels, width, stride))
        channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers, *head)


class ChannelNorm(nn.Module):
    """Layer normalization over the channels of `[N, C, H, W]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, then a pointwise multilayer perceptron of linear layers."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x + self.mlp(self.depthwise(x).movedim(1, -1)).movedim(-1, 1)


def convnext() -> nn.Module:
    """Like ConvNeXt, for 32 x 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 48, 2, 2), ChannelNorm(48)]
    for channels, blocks in ((48, 2), (96, 2), (192, 2)):
        layers += [ConvNeXtBlock(channels) for _ in range(blocks)]
        if channels < 192:
            layers += [ChannelNorm(channels), nn.Conv2d(channels, 2 * channels, 2, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 10)]
    return nn.Sequential(*layers, *head)


class UNet(nn.Module):
    """Three resolutions, skip connections, transposed convolutions upwards; a class per pixel."""

    def __init__(self, classes: int = 4, width: int = 24):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(
            self._double(*pair) for pair in zip([3, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[-2::-1])
        self.merge = nn.ModuleList(self._double(2 * w, w) for w in widths[-2::-1])
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _double(channels: int, out_channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, padding=1),
            nn.GroupNorm(8, out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.GroupNorm(8, out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 3, H, W]` to `[N, classes, H, W]`."""
        skips: list[Tensor] = []
        for level, double in enumerate(self.down):
            x = double(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


class Attention(nn.Module):
    """Multi-head self-attention with linear projections."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, T, width]` to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Normalize first, then attention and a multilayer perceptron, each with a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, causal))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[N, T, width]` to the same."""
        x = x + self.attention(x)
        return x + self.mlp(x)


class ViT(nn.Module):
    """Patches of 4 x 4, mean pooling."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, size: int = 32):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 4) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 3, H, W]` to `[N, 10]`."""
        x = self.patches(x).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class GPT(nn.Module):
    """A causal language model."""

    def __init__(self, vocabulary: int = 128, context: int = 64, width: int = 128, depth: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, context, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[N, T]` to `[N, vocabulary, T]`, as CrossEntropyLoss takes it."""
        x = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).mT


class RecurrentNetwork(nn.Module):
    """A language model of a single LSTM."""

    def __init__(self, vocabulary: int = 128, width: int = 64, hidden: int = 128):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[N, T]` to `[N, vocabulary, T]`, as CrossEntropyLoss takes it."""
        hidden, _ = self.lstm(self.tokens(tokens))
        return self.head(hidden).mT


def mlp() -> nn.Module:
    """Five linear layers, on flattened images."""
    widths = (3 * 32 * 32, 512, 512, 512, 512)
    layers: list[nn.Module] = [nn.Flatten()]
    for width, out in itertools.pairwise(widths):
        layers += [nn.Linear(width, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def _images(batch: int) -> Batch:
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def _masks(batch: int) -> Batch:
    return torch.randn(batch, 3, 32, 32), torch.randint(4, (batch, 32, 32))


def _tokens(batch: int) -> Batch:
    return torch.randint(128, (batch, 64)), torch.randint(128, (batch, 64))


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "ResNet-18": (resnet18, _images),
    "MobileNetV2-like": (mobilenet, _images),
    "ConvNeXt-like": (convnext, _images),
    "U-Net-like": (UNet, _masks),
    "ViT": (ViT, _images),
    "GPT": (GPT, _tokens),
    "MLP": (mlp, _images),
}
"""A model and a batch of a given size; the loss of all is `CrossEntropyLoss`."""
