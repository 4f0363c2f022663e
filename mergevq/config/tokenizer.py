"""Settings of a tokenizer, and the choice of K in training; no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers

MergeShape = Literal["linear", "square", "constant"]

NUM_KEYS = 8
"""Leading components of patches that merging compares, where codes are analytic."""
_MAX_COMPONENT_BITS = 10
"""Most bits of one component: a patch decoder has 2**n - 1 products of n of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchDecoderConfig:
    """A decoder of blocks on the grid that makes all pixels of a cell at once."""

    width: int = 192
    """Channels of its blocks; their attention has the tokenizer's `num_decoder_heads`."""
    blocks: str = "ccaccc"
    """Blocks in order: c is a 3x3 convolution and an MLP, a is attention and an MLP."""
    bit_components: tuple[int, ...] = ()
    """Component of each bit. The products of a component's own bits go straight to the cell's
    pixels; a start from components fills it in, and empty has no such way."""

    def __post_init__(self) -> None:
        """Reject blocks of other letters, and components of too many bits."""
        check_numbers(self)
        # Sine and cosine of row and column.
        require(self.width % 4 == 0, f"patch_decoder.width ({self.width}) must be a multiple of 4")
        require(
            len(self.blocks) > 0 and set(self.blocks) <= set("ac"),
            f"patch_decoder.blocks ({self.blocks!r}) must be letters c (convolution) and a "
            "(attention), such as ccaccc",
        )
        most = max((len(group) for group in self.bit_groups), default=0)
        require(
            most <= _MAX_COMPONENT_BITS,
            f"patch_decoder.bit_components gives one component {most} bits and must give at most "
            f"{_MAX_COMPONENT_BITS}",
        )

    @property
    def bit_groups(self) -> tuple[tuple[int, ...], ...]:
        """Bits of each component, the most significant one first."""
        groups: dict[int, list[int]] = {}
        for bit, component in enumerate(self.bit_components):
            groups.setdefault(component, []).append(bit)
        return tuple(map(tuple, groups.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Architecture of a tokenizer: encoder, quantizer, source predictor and decoder."""

    image_size: int = 64
    """Side of the square training images, in pixels."""
    stem: Literal["cnn", "patch"] = "cnn"
    """How pixels become grid tokens: residual CNN (versions G, G+R) or one patch layer (R)."""
    channels: int = 64
    """CNN base channels: the paper's d32, d64, d96."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """Channels of each CNN level over `channels`; every level but one halves the side."""
    num_res_blocks: int = 4
    """Residual blocks per CNN level; the decoder has one more on every level but the finest."""
    patch_dim: int = 768
    """Encoder transformer width when `stem` is patch; with a CNN it is the last level's width."""
    patch_norm: bool = True
    """Normalise each channel of a patch stem over the image, as the authors do, which hides how
    bright an image is. False leaves the channels as they are, and the last third of them also tells
    a cell's position, in pairs of opposite sign."""
    num_layers: int = 12
    """Merging transformer blocks in the encoder."""
    num_heads: int = 8
    """Attention heads in the encoder."""
    position_embedding: bool = False
    """Add fixed sine and cosine features of the cell, for any grid; a patch stem needs them."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    transformer_norm_eps: float = 1e-6
    """Added to the variance in the layer norms of the encoder's and the decoder's blocks; the
    authors' code has 1e-5."""
    patch_norm_eps: float = 1e-5
    """Added to the variance in the norm of a patch stem; the authors' code has 1e-6."""
    merge_shape: MergeShape = "linear"
    """How merging is spread over blocks: `linear` is the authors' code, `square` the paper's."""
    num_kept: int = 144
    """Nominal K: tokens kept per image when a call does not say."""
    kept_range: tuple[int, int] | None = None
    """Smallest and largest K trained on, written by training; a K outside it warns."""
    num_bits: int = 18
    """D: bits of a token; the codebook has 2**D entries and is never stored."""
    num_decoder_layers: int = 12
    """Transformer blocks in a CNN decoder."""
    decoder: Literal["cnn", "patch"] = "cnn"
    """How codes become pixels: transformer blocks and an upsampling CNN, as the authors do, or
    blocks on the grid alone."""
    patch_decoder: PatchDecoderConfig = field(default_factory=PatchDecoderConfig)
    """Its blocks when `decoder` is patch."""
    num_decoder_heads: int = 8
    """Attention heads in the decoder."""
    source_dim: int = 384
    """Width of the source predictor (paper, Table A2)."""
    num_source_layers: int = 2
    """Blocks of the source predictor."""
    num_source_heads: int = 8
    """Attention heads of the source predictor."""

    def __post_init__(self) -> None:
        """Reject what cannot be built, naming both numbers."""
        check_numbers(self)
        require(len(self.channel_mult) > 0, "channel_mult () must name one multiple per CNN level")
        require(
            self.image_size % self.patch_size == 0,
            f"image_size ({self.image_size}) must be a multiple of the patch size "
            f"({self.patch_size}), which is 2 to the number of levels in channel_mult minus one",
        )
        require(
            1 <= self.num_kept <= self.num_tokens,
            f"num_kept ({self.num_kept}) must be between 1 and the {self.num_tokens} tokens of a "
            f"{self.image_size}-pixel image with patch size {self.patch_size}",
        )
        least = -(-self.num_tokens >> self.num_layers)  # rounded up
        require(
            self.num_kept >= least,
            f"num_kept ({self.num_kept}) must be at least {least}: each of num_layers "
            f"({self.num_layers}) can merge half of its tokens and the first has {self.num_tokens}",
        )
        low, high = self.kept_range or (1, 1)
        require(low <= high, f"kept_range {self.kept_range} must be a smallest and a largest K")
        decoder_width = self.decoder_dim
        if self.decoder == "patch":
            self._check_patch_decoder()
            decoder_width = self.patch_decoder.width
        widths = (
            ("encoder width", self.dim, "num_heads", self.num_heads),
            ("decoder width", decoder_width, "num_decoder_heads", self.num_decoder_heads),
            ("source_dim", self.source_dim, "num_source_heads", self.num_source_heads),
        )
        for width_name, width, heads_name, heads in widths:
            require(
                width % heads == 0,
                f"{width_name} ({width}) must be a multiple of {heads_name} ({heads})",
            )
        require(
            all((self.channels * mult) % self.num_groups == 0 for mult in self.channel_mult),
            f"channels ({self.channels}) times each of channel_mult {self.channel_mult} must be a "
            f"multiple of the {self.num_groups} normalisation groups",
        )
        # Sine and cosine of row and column.
        require(self.source_dim % 4 == 0, f"source_dim ({self.source_dim}) must be a multiple of 4")
        require(
            not self.position_embedding or self.dim % 4 == 0,
            f"encoder width ({self.dim}) must be a multiple of 4 for position_embedding",
        )
        require(
            self.stem == "cnn" or self.patch_dim % self.num_groups == 0,
            f"patch_dim ({self.patch_dim}) must be a multiple of {self.num_groups}",
        )
        if not self.patch_norm:
            self._check_plain_stem()

    def _check_patch_decoder(self) -> None:
        """Reject cells of one pixel, and components of another number of bits."""
        require(
            self.patch_size > 1,
            "decoder (patch) needs cells of at least 2 x 2 pixels: give channel_mult "
            f"{self.channel_mult} another level",
        )
        num_named = len(self.patch_decoder.bit_components)
        require(
            num_named in (0, self.num_bits),
            f"patch_decoder.bit_components ({num_named}) must name a component for each of the "
            f"num_bits ({self.num_bits}), or be empty",
        )

    def _check_plain_stem(self) -> None:
        """Reject a stem without norm where there is none to leave out, or no room for positions."""
        require(
            self.stem == "patch",
            f"patch_norm (False) needs stem patch: there is no such norm in stem {self.stem}",
        )
        require(
            not self.position_embedding,
            "position_embedding (True) must be False with patch_norm False, which adds positions "
            "of its own",
        )
        require(
            self.num_positions > 0,
            f"patch_dim ({self.patch_dim}) must be at least 24 with patch_norm False, for features "
            "of positions",
        )

    @property
    def num_positions(self) -> int:
        """Features of positions that a patch stem without norm adds, a pair of channels each."""
        return 4 * (self.dim // 24)

    @property
    def num_carried(self) -> int:
        """Components of patches that an analytic start has channels for.

        They come in pairs, as do positions, bits and one constant; negative where not even those
        fit.
        """
        free = self.dim // 2 - self.num_positions - self.num_bits - 1
        return min(free, 3 * self.patch_size**2)

    @property
    def patch_size(self) -> int:
        """Pixels per side of one grid cell: the downsampling factor f."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid_size(self) -> int:
        """Tokens per side before merging, at the trained size."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """L: tokens before merging, at the trained size."""
        return self.grid_size**2

    @property
    def dim(self) -> int:
        """Encoder transformer width."""
        return self.patch_dim if self.stem == "patch" else self.decoder_dim

    @property
    def decoder_dim(self) -> int:
        """Decoder transformer width: the channels of the coarsest level."""
        return self.channels * self.channel_mult[-1]

    @property
    def num_groups(self) -> int:
        """Groups of every group normalisation: 32, or fewer where the base width is smaller."""
        return min(32, self.channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptConfig:
    """The distribution K is drawn from, one K per optimizer step, the same on every rank.

    Candidate k of n has probability proportional to `exp(-rate * k) + floor` (exponential),
    `exp(-(k - mean)**2 / (2 * std**2)) + floor` (gaussian) or 1 (uniform).
    """

    distribution: Literal["uniform", "exponential", "gaussian"] = "uniform"
    """Family of the distribution over the candidates' positions 0, 1, 2, .."""
    candidates: tuple[int, ...] = (144,)
    """The K that may be drawn; one candidate is a fixed K."""
    rate: float = 2.0
    """Decay of `exponential` per candidate (paper, equation 15)."""
    mean: float = 1.0
    """Centre of `gaussian` as a candidate position (paper, equation 16)."""
    std: float = 0.5
    """Width of `gaussian` in candidate positions."""
    floor: float = 0.0
    """Added to every candidate; the authors' code has 0.05 (gaussian), 0.05 (exponential, with
    rate 2: theirs is 0.1 against an amplitude of 2)."""

    def __post_init__(self) -> None:
        """Reject an empty or impossible distribution."""
        check_numbers(self)
        require(len(self.candidates) > 0, "candidates must name at least one number of tokens")
        require(
            sum(self._weights) > 0,
            f"mean ({self.mean}) is so many times std ({self.std}) from each of the "
            f"{len(self.candidates)} candidates that none can be drawn: raise std or floor",
        )

    @property
    def probabilities(self) -> tuple[float, ...]:
        """One probability per candidate; they sum to 1."""
        return tuple(weight / sum(self._weights) for weight in self._weights)

    @property
    def _weights(self) -> list[float]:
        """Probabilities up to a common factor."""
        positions = range(len(self.candidates))
        if self.distribution == "uniform":
            return [1.0 for _ in positions]
        if self.distribution == "exponential":
            return [math.exp(-self.rate * k) + self.floor for k in positions]
        return [
            math.exp(-((k - self.mean) ** 2) / (2 * self.std**2)) + self.floor for k in positions
        ]
