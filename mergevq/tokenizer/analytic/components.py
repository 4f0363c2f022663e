"""Analytic codes: signs of a patch's principal components, which no encoder has to learn.

A patch is turned into its principal components. Bits go to components one at a time, each to the
component whose quantization error is largest by then (Gersho and Gray 1992, "Vector Quantization
and Signal Compression", section 8.3). Each component is cut into 2**n levels of least squared error
(Lloyd 1982, "Least Squares Quantization in PCM"), numbered by a Gray code, so that neighbouring
levels differ in one bit. Merging compares the leading components. A learned tokenizer can start
from these codes, and has to beat them.

Shape letters: B batch, L grid tokens, K kept tokens, P numbers of a patch (3 f^2), D bits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from mergevq.config.parts import NUM_KEYS, MergeShape
from mergevq.data.layouts import Source, canonicalize
from mergevq.nn.positions import to_patches
from mergevq.nn.rows import take_rows
from mergevq.tokenizer.reducers.matching import match, merge_schedule, merge_step
from mergevq.tokenizer.reducers.merge import nearness

KEY_OFFSET = 1.5
"""A constant beside the components that merging compares: dark and bright patches of one hue are
not the same direction."""
NUM_FITTED = 200_000
"""Patches that components and levels are fitted to, at most."""
_NUM_ROUNDS = 50
"""Rounds of Lloyd's algorithm; levels of patches of photographs settle in about 20."""


class AnalyticTokens(NamedTuple):
    """An image as analytic codes."""

    codes: Float[Tensor, "b k d"]
    """Signs in {-1, +1}, in canonical order, coarse bits first."""
    source: Source
    """Which kept token each grid cell went into."""


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of patches, and the levels into which each is cut."""

    patch_size: int
    """f, in pixels."""
    mean: Float[Tensor, "p"]
    """Mean patch."""
    basis: Float[Tensor, "p p"]
    """A component a column, largest variance first."""
    bits: tuple[tuple[int, int], ...]
    """Component and place of each bit, coarse to fine, as they were allotted; place 0 is the most
    significant bit of a component."""
    levels: tuple[Float[Tensor, "_"], ...]
    """Ascending levels of each component; one without bits has the level 0."""

    def coordinates(self, patches: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
        """Components of patches."""
        return (patches - self.mean) @ self.basis

    def keys(self, patches: Float[Tensor, "*b p"]) -> Float[Tensor, "*b n"]:
        """Vectors whose cosine tells which patches to merge: leading components and a constant."""
        leading = self.coordinates(patches)[..., :NUM_KEYS]
        return functional.pad(leading, (0, 1), value=KEY_OFFSET)

    def codes(self, patches: Float[Tensor, "*b p"]) -> Float[Tensor, "*b d"]:
        """Signs of patches."""
        coordinates = self.coordinates(patches)
        signs = []
        for component, place in self.bits:
            levels = self.levels[component]
            borders = (levels[1:] + levels[:-1]) / 2
            level = torch.bucketize(coordinates[..., component].contiguous(), borders)
            gray = level ^ (level >> 1)
            signs.append((gray >> (_num_bits(levels) - 1 - place)) & 1)
        return 2 * torch.stack(signs, -1).to(patches.dtype) - 1

    def decode(self, codes: Float[Tensor, "*b d"]) -> Float[Tensor, "*b p"]:
        """Patches of signs: each component at its level, those without bits at their mean."""
        coordinates = codes.new_zeros(*codes.shape[:-1], len(self.mean))
        for component, levels in enumerate(self.levels):
            level = torch.zeros_like(codes[..., 0], dtype=torch.int64)
            bit = torch.zeros_like(level)
            # Significant bits come first, and each tells the parity of those before it.
            for place in range(_num_bits(levels)):
                bit = bit ^ (codes[..., self.bits.index((component, place))] > 0).long()
                level = 2 * level + bit
            coordinates[..., component] = levels[level]
        return coordinates @ self.basis.mT + self.mean


def fit_components(image: Float[Tensor, "b 3 h w"], patch_size: int, num_bits: int) -> Components:
    """Principal components and levels of the patches of some images.

    Args:
        image: in [-1, 1]; some thousand photographs are enough. Evenly spaced patches are used
            where there are more than 200,000.
        patch_size: f, in pixels; a divisor of both sides.
        num_bits: D, bits of a token.

    Raises:
        ValueError: there are fewer patches than numbers in one, so their covariance is singular.
    """
    flat = to_patches(image, patch_size).flatten(0, 1)
    return fit_patches(flat[:: max(1, -(-len(flat) // NUM_FITTED))], patch_size, num_bits)


def fit_patches(patches: Float[Tensor, "n p"], patch_size: int, num_bits: int) -> Components:
    """Principal components and levels of patches.

    Args:
        patches: numbered as `to_patches` numbers them; all are used.
        patch_size: f, in pixels.
        num_bits: D, bits of a token.

    Raises:
        ValueError: there are fewer patches than numbers in one, so their covariance is singular.
    """
    flat = patches.double()
    if len(flat) <= flat.shape[1]:
        raise ValueError(
            f"{len(flat)} patches of {flat.shape[1]} numbers have no principal components; give "
            "more images"
        )
    mean = flat.mean(0)
    variances, basis = torch.linalg.eigh(torch.cov((flat - mean).mT))
    variances, basis = variances.flip(0), basis.flip(1)
    # An eigenvector's sign is arbitrary; the largest entry decides it, whatever the library.
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    bits = allot_bits(variances, num_bits)
    coordinates = (flat - mean) @ basis
    counts = [sum(component == j for component, _ in bits) for j in range(len(variances))]
    levels = [fit_levels(coordinates[:, j], 2**count) for j, count in enumerate(counts)]
    return Components(
        patch_size, mean.float(), basis.float(), bits, tuple(each.float() for each in levels)
    )


def allot_bits(variances: Float[Tensor, "p"], num_bits: int) -> tuple[tuple[int, int], ...]:
    """Component and place of each bit: each goes where the error is largest, and quarters it there.

    Args:
        variances: of the components.
        num_bits: bits to allot.
    """
    errors, places = variances.clone(), [0] * len(variances)
    bits = []
    for _ in range(num_bits):
        component = int(errors.argmax())
        bits.append((component, places[component]))
        places[component] += 1
        errors[component] /= 4
    return tuple(bits)


def fit_levels(values: Float[Tensor, "n"], count: int) -> Float[Tensor, "m"]:
    """Ascending levels of least squared error for numbers, by Lloyd's algorithm from quantiles.

    Args:
        values: in float64.
        count: levels; a single one is 0, the mean of a component.
    """
    if count == 1:
        return values.new_zeros(1)
    values = values.sort().values
    sums = functional.pad(values.cumsum(0), (1, 0))
    # Of so many numbers `quantile` refuses; the sorted ones have them at hand.
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * (len(values) - 1)
    levels = values[places.round().long()]
    for _ in range(_NUM_ROUNDS):
        cuts = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        cuts = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(values))])
        sizes = cuts.diff()
        levels = torch.where(sizes > 0, sums[cuts].diff() / sizes.clamp(min=1), levels)
    return levels


def group_means(
    patches: Float[Tensor, "b l p"], index: Int64[Tensor, "b l"], num_groups: int
) -> Float[Tensor, "b k p"]:
    """Mean patch of each kept token."""
    return merge_step(patches, torch.ones_like(patches[..., 0]), index, num_groups).tokens


def encode_analytic(
    components: Components,
    image: Float[Tensor, "b 3 h w"],
    num_kept: int,
    num_layers: int,
    merge_shape: MergeShape = "linear",
    locality: float = 0.0,
) -> AnalyticTokens:
    """Merge patches by their leading components, then take the codes of the mean patches.

    Args:
        components: fitted ones.
        image: in [-1, 1].
        num_kept: K.
        num_layers: merging steps.
        merge_shape: how merging is spread over them.
        locality: cosine that tokens lose for each side of the grid between them.
    """
    tokens = to_patches(image, components.patch_size)
    batch, num_tokens, _ = tokens.shape
    sizes = tokens.new_ones(batch, num_tokens)
    index = torch.arange(num_tokens, device=tokens.device).expand(batch, -1)
    height, width = image.shape[2] // components.patch_size, image.shape[3] // components.patch_size
    near = nearness(locality, (height, width))
    for count in merge_schedule(num_tokens, num_kept, num_layers, merge_shape):
        if count:
            places = None if near is None else near.places(index, tokens.shape[1])
            destination = match(components.keys(tokens), count, places)
            tokens, sizes = merge_step(tokens, sizes, destination, tokens.shape[1] - count)
            index = destination.gather(1, index)
    source, order = canonicalize(Source(index, num_kept))
    return AnalyticTokens(components.codes(take_rows(tokens, order)), source)


def _num_bits(levels: Float[Tensor, "n"]) -> int:
    """Bits that number so many levels, a power of two."""
    return len(levels).bit_length() - 1
