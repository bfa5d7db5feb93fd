"""How much memory factors take: a chunk's copy at a time, never a second copy of everything."""

import pytest
import torch

from kfac_tn import functional
from kfac_tn.functional.common import CACHE_BYTES
from kfac_tn.tn.gram.unfolding import LEAST_CHUNK

MiB = 2**20
SCRATCH = MiB // 2
"""What a product by oneDNN takes for itself, about a cache; MKL allocates that unseen."""


def test_the_measure_sees_temporaries(peak_bytes):
    x = torch.rand(MiB // 4)
    assert peak_bytes(lambda: x * 2) == pytest.approx(MiB, rel=0.01)
    assert peak_bytes(lambda: (x * 2).add_(x * 3).sum()) == pytest.approx(2 * MiB, rel=0.01)
    half = x.bfloat16()  # torch itself makes a copy in float32
    assert peak_bytes(lambda: half.sum(dtype=torch.float32)) == pytest.approx(MiB, rel=0.01)


SHAPES = [(64, 64, 32, 32), (64, 512, 10, 10), (512, 512, 4, 4), (64, 96, 56, 56), (2, 4, 9, 9)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, "depthwise"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_conv_grad_output_factor(peak_bytes, shape, layout, dtype, groups, approximation):
    g = LAYOUTS[layout](torch.rand(shape)).to(dtype)
    groups = shape[1] if groups == "depthwise" else groups
    result = groups * (shape[1] // groups) ** 2 * 4
    rows = shape[0] * shape[1] * 4 if approximation == "reduce" else 0
    peak = peak_bytes(lambda: functional.conv_grad_output_factor(g, groups, approximation))
    # The result is made of blocks at the end, and there may be one for each example of a chunk.
    channels, positions = shape[1] // groups, g[0, 0].numel()
    chunk = min(CACHE_BYTES, g.numel() * 4 * (1 + min(1, channels / positions)))
    assert peak <= chunk + 2 * rows + 3 * result + 4096 + SCRATCH


LINEAR_SHAPES = [(4096, 512), (64, 128, 768), (256, 17, 3, 64), (3, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_linear_factors(peak_bytes, shape, contiguous, bias, dtype, approximation):
    x = torch.rand(shape).to(dtype)
    if not contiguous:
        x = x.mT.contiguous().mT
    result = (shape[-1] + 1) ** 2 * 4
    rows = shape[0] * (shape[-1] + 1) * 4 if approximation == "reduce" else 0
    bound = min(CACHE_BYTES, x.numel() * 4) + 2 * rows + 3 * result + 4096
    assert peak_bytes(lambda: functional.linear_grad_output_factor(x, approximation)) <= bound
    assert peak_bytes(lambda: functional.linear_input_factor(x, approximation, bias)) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 64])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_conv_average_input(peak_bytes, kernel_size, mode, groups, dtype):
    x = torch.rand(32, 64, 28, 28).to(dtype)
    options = {"padding": kernel_size // 2, "groups": groups, "padding_mode": mode}
    rows = 32 * 64 * kernel_size**2 * 4
    peak = peak_bytes(lambda: functional.conv_average_input(x, kernel_size, **options))
    # One copy of the chunk that is cast, and what is left of it after the first dimension.
    shrunk = kernel_size / 28
    assert peak <= x.numel() * 4 * shrunk * 2 + CACHE_BYTES * (dtype != torch.float32) + 3 * rows


EXPANDED = {
    "tiny": ((8, 3, 32, 32), 5, {}),
    "border": ((8, 64, 14, 14), 3, {}),
    "3x3": ((8, 64, 32, 32), 3, {"padding": 1}),
    "result dominates": ((8, 512, 7, 7), 3, {"padding": 1}),
    "1x7": ((8, 192, 17, 17), (1, 7), {"padding": (0, 3)}),
    "strided": ((8, 64, 56, 56), 3, {"padding": 1, "stride": 2}),
    "no overlap": ((8, 256, 14, 14), 2, {"stride": 2}),
    "grouped": ((8, 64, 28, 28), 3, {"padding": 1, "groups": 4}),
    "depthwise": ((8, 128, 28, 28), 7, {"padding": 3, "groups": 128}),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_conv_input_factor(peak_bytes, name):
    """At most twice as much as the result and a padded copy; of tiny inputs, a chunk's copies."""
    shape, kernel_size, options = EXPANDED[name]
    x = torch.rand(shape)
    factor = lambda: functional.conv_input_factor(x, kernel_size, **options)  # noqa: E731
    padding = options.get("padding", 0)
    rows, columns = padding if isinstance(padding, tuple) else (padding, padding)
    padded = 8 * shape[1] * (shape[2] + 2 * rows) * (shape[3] + 2 * columns) * 4
    chunks = 3 * LEAST_CHUNK * 4
    assert peak_bytes(factor) <= 2 * (padded + factor().nbytes) + (chunks if name == "tiny" else 0)
