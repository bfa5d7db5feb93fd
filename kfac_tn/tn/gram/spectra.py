"""The Gram matrix of windows from spectra: one product per frequency instead of one per lag.

The product of all pairs of positions at a distance is a correlation, and the Fourier transform of
correlations is a product of spectra (Wiener-Khinchin). With n positions along each axis and k x k
kernels, that is n^2 / 2 products of complex matrices, worth 3/2 n^2 of real ones, instead of
(2 k^2 - 2 k + 1) n^2: a ninth for 3 x 3. A few zeros are put behind the positions, lest the last
meet the first. Of the products only those lags are transformed back that windows have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from kfac_tn.tn import gemm
from kfac_tn.tn.gram.blocks import SHARE, examples_at_once
from kfac_tn.tn.gram.lags import Key, gram_from_lags, lags_of_classes
from kfac_tn.tn.gram.unfolding import LEAST_CHUNK
from kfac_tn.tn.gram.windows import Windows
from kfac_tn.tn.transpose import transposed

PRIMES = 2, 3, 5
"""What the lengths of fast transforms are products of."""

LEAST_EVEN = 20
"""Length from which on odd ones take longer, by a half, than is saved with fewer frequencies."""

COPIES = 3
"""Copies of some examples that are made at most at once: with zeros, their spectrum, in order."""

PARTS = 4
"""What part of the tensor these copies take at the most."""

CACHED = 2**20
"""Elements of the products at several frequencies, to be read from a cache."""


def gram_by_spectra(x: Tensor, windows: tuple[Windows, ...], scale: float = 1.0) -> Tensor:
    """Correlate the tensor with itself by Fourier transforms, and put the result into all blocks.

    Args:
        x: `[shared, examples, channels, *sizes]`.
        windows: Of each of the last axes, at least one. All their strides are 1.
        scale: The result is multiplied by that.

    Returns:
        `[shared, d, d]`, `d = channels * prod(kernel sizes)`.
    """
    precise = x if x.dtype in (torch.float32, torch.float64) else x.float()  # what has transforms
    return gram_from_lags(precise, windows, scale, _all_lags(precise, windows)).to(x.dtype)


def lengths(windows: tuple[Windows, ...]) -> tuple[int, ...]:
    """Positions along each axis with zeros behind, as many as a fast transform has.

    Example:
        >>> lengths((Windows(-1, 3, 32, 1, 1, 32), Windows(0, 1, 11, 1, 1, 11)))
        (36, 12)
    """
    reach = ((window.kernel_size - 1) * window.dilation for window in windows)
    return tuple(_fast(w.size + min(r, w.size - 1)) for w, r in zip(windows, reach, strict=True))


def number_of_frequencies(windows: tuple[Windows, ...]) -> int:
    """How many there are: of a frequency and its opposite, one."""
    sizes = lengths(windows)
    return (prod(sizes) + prod(2 - size % 2 for size in sizes)) // 2


def most_elements(tensor: int, result: int) -> int:
    """Elements of copies and products that are made at once, beside the spectra."""
    return min(CACHED, max(tensor // PARTS, result // SHARE[1], LEAST_CHUNK))


def chunks(shape: Sequence[int], windows: tuple[Windows, ...]) -> int:
    """Into how many the examples are divided, so that spectra take no more than the tensor does.

    Args:
        shape: Shared, examples, channels, sizes.
        windows: Of each of the last axes.
    """
    copies = 2 * number_of_frequencies(windows) / prod(shape[3:]) + 1 / PARTS
    return -(-shape[1] // examples_at_once(shape, windows, copies))


def _fast(least: int) -> int:
    while True:
        rest = least
        for prime in PRIMES:
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and (least % 2 == 0 or least < LEAST_EVEN):
            return least
        least += 1


def _all_lags(x: Tensor, windows: tuple[Windows, ...]) -> dict[Key, Tensor]:
    """The products of all pairs of positions, `[shared, c, c]`."""
    shared, _, channels, *_ = x.shape
    (lags,) = lags_of_classes(windows)
    ranges = [
        [at * window.dilation for at in range(lag.least, lag.least + lag.number)]
        for lag, window in zip(lags, windows, strict=True)
    ]
    still = (0,) * len(windows)
    ways = [way for way in product(*ranges) if way >= still]  # others are mirror images
    sizes = lengths(windows)
    back = [weights.to(x) for weights in _transform(sizes, ways)]
    totals = [x.new_zeros(1, len(ways), shared * channels**2) for _ in back]
    most = most_elements(x.numel(), shared * (channels * prod(w.kernel_size for w in windows)) ** 2)
    for chunk in x.chunk(chunks(x.shape, windows), 1):
        _add_products(totals, _spectra(chunk, sizes), back, most)
    even, odd = (total.view(len(ways), shared, channels, channels) for total in totals)
    found = even.sub_(odd).add_(transposed(odd))
    return {(still, way): gram for way, gram in zip(ways, found, strict=True)}


@lru_cache(maxsize=64)
def _frequencies(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One of each frequency and its opposite: their places in what `rfftn` returns, flattened.

    Example:
        >>> _frequencies((2, 4))
        (0, 1, 2, 3, 4, 5)
        >>> _frequencies((4, 2))  # the last two, (3, 0) and (3, 1), are the opposites of others
        (0, 1, 2, 3, 4, 5)
    """
    half = _half(sizes)
    kept = []
    for at, frequency in enumerate(product(*map(range, half))):
        opposite = tuple(-k % size for k, size in zip(frequency, sizes, strict=True))
        if opposite >= frequency or opposite[-1] >= half[-1]:
            kept.append(at)
    return tuple(kept)


def _half(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*sizes[:-1], sizes[-1] // 2 + 1)


def _transform(sizes: tuple[int, ...], ways: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """What leads back from frequencies to lags: cosines and sines, `[lags, frequencies]` each.

    Each frequency stands for its opposite, too, if that is another one.
    """
    kept = torch.stack(torch.unravel_index(torch.tensor(_frequencies(sizes)), _half(sizes)), 1)
    turns = kept.double() / torch.tensor(sizes)
    own = (2 * turns % 1 == 0).all(1)
    share = torch.where(own, 1.0, 2.0).double() / prod(sizes)
    angles = 2 * torch.pi * torch.tensor(ways).double() @ turns.mT
    return share * angles.cos(), share * angles.sin()


def _spectra(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Real and imaginary parts, `[frequencies, shared, 2, examples, channels]`."""
    shared, examples, channels, *_ = x.shape
    kept = torch.tensor(_frequencies(sizes), device=x.device)
    spectra = x.new_empty(len(kept), shared, 2, examples, channels)
    each = shared * channels * prod(sizes)
    at_once = max(1, max(x.numel() // PARTS, LEAST_CHUNK) // (COPIES * each))
    for start in range(0, examples, at_once):
        some = slice(start, start + at_once)
        part = torch.fft.rfftn(x[:, some], s=sizes, dim=tuple(range(3, x.ndim)))
        parts = torch.view_as_real(part).flatten(3, -2)
        rows = transposed(parts.flatten(0, 2).flatten(1)).view(-1, 2, *parts.shape[:3])
        del part, parts
        spectra[:, :, :, some] = rows.index_select(0, kept).transpose(1, 2)
    return spectra


def _add_products(
    totals: Sequence[Tensor], spectra: Tensor, back: Sequence[Tensor], most: int
) -> None:
    """Add what is symmetric of the products at lags, and half of what is antisymmetric.

    The product at a frequency is A'A + B'B + i (A'B - B'A): of its imaginary part one summand.

    Args:
        totals: Of each, `[1, lags, shared * c * c]`.
        spectra: `[frequencies, shared, 2, examples, c]`.
        back: Cosines and sines, `[lags, frequencies]` each.
        most: Elements that are made at once.
    """
    elements = totals[0].shape[2]
    for start in range(0, len(spectra), at_once := max(1, most // elements)):
        some = slice(start, start + at_once)
        both = spectra[some].flatten(2, 3).flatten(0, 1)
        real, imaginary = spectra[some].flatten(0, 1).unbind(1)
        factors = (both, both), (real, imaginary)
        for total, weights, (left, right) in zip(totals, back, factors, strict=True):
            power = gemm.multiply(left.mT, right).view(1, -1, elements)
            gemm.add_product(total, weights[:, some].unsqueeze(0), power)
