"""Settings of a tokenizer, and the choice of K in training; no torch."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from mergevq.config.base import require
from mergevq.config.parts import (
    Branched,
    Branches,
    CnnDecoder,
    CnnStem,
    Condition,
    Decoder,
    Expander,
    Lfq,
    Merge,
    NoCondition,
    OneBranch,
    PatchDecoder,
    PatchStem,
    Quantizer,
    Reducer,
    Scales,
    Stem,
    Unmerge,
    latent_dim,
    require_heads,
)
from mergevq.config.ranges import check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Architecture of a tokenizer: its parts, each of a kind, and the sizes that they share."""

    image_size: int = 64
    """Side of the square training images, in pixels."""
    stem: Stem = field(default_factory=CnnStem)
    """From pixels to grid tokens."""
    reducer: Reducer = field(default_factory=Merge)
    """From grid tokens to kept tokens."""
    branches: Branches = field(default_factory=OneBranch)
    """From kept tokens to latents, and from codes to teacher and expander."""
    quantizer: Quantizer = field(default_factory=Lfq)
    """From kept tokens to codes."""
    expander: Expander = field(default_factory=Unmerge)
    """From codes back to the grid."""
    decoder: Decoder = field(default_factory=CnnDecoder)
    """From the grid to pixels."""
    condition: Condition = field(default_factory=NoCondition)
    """Known of an image besides its tokens."""
    num_kept: int = 144
    """Nominal K: tokens kept per image when a call does not say."""
    kept_range: tuple[int, int] | None = None
    """Smallest and largest K trained on, written by training; a K outside it warns."""

    def __post_init__(self) -> None:
        """Reject parts that do not fit each other, naming both numbers."""
        check_numbers(self)
        require(
            self.image_size % self.patch_size == 0,
            f"image_size ({self.image_size}) must be a multiple of the patch size "
            f"({self.patch_size}): of a CNN 2 to the number of levels in channel_mult minus one",
        )
        grid_shape = (self.grid_size, self.grid_size)
        most = self.most_kept(grid_shape)
        require(
            1 <= self.num_kept <= most,
            f"num_kept ({self.num_kept}) must be between 1 and the {most} tokens of a "
            f"{self.image_size}-pixel image with patch size {self.patch_size}",
        )
        self.kept_by.check_kept(grid_shape, self.num_kept)
        self._check_layout()
        self._check_branches()
        require(
            isinstance(self.condition, NoCondition) or self.reducer.gives == "ordered",
            f"model.condition.kind {self.condition.kind} is for tokens without places, and "
            f"model.reducer.kind {self.reducer.kind} leaves some: set model.reducer.kind to "
            "queries, or model.condition.kind to none",
        )
        low, high = self.kept_range or (1, 1)
        require(low <= high, f"kept_range {self.kept_range} must be a smallest and a largest K")
        require_heads("encoder width", self.dim, self.reducer.num_heads, "reducer.num_heads")
        require(
            not self.stem.position_embedding or self.dim % 4 == 0,
            f"encoder width ({self.dim}) must be a multiple of 4 for position_embedding",
        )
        self.decoder.check_patch(self.patch_size)
        if isinstance(self.decoder, PatchDecoder):
            num_named = len(self.decoder.bit_components)
            require(
                num_named in (0, self.decoded_dim),
                f"decoder.bit_components ({num_named}) must name a component for each of the "
                f"{self.decoded_dim} channels of a code, or be empty",
            )

    def _check_layout(self) -> None:
        """Reject a reducer and an expander of different layouts, and fewer slots than queries."""
        part, expander = self.kept_by, self.expander
        others = {
            "source": "unmerge",
            "ordered": "mask_tokens",
            "holistic": "fuse",
            "scales": "scale_sum",
        }
        seam = "quantizer" if isinstance(part, Scales) else "reducer"
        require(
            part.gives == expander.reads,
            f"model.{seam}.kind {part.kind} leaves tokens with the layout "
            f"'{part.gives}', and model.expander.kind {expander.kind} reads "
            f"'{expander.reads}': set model.expander.kind to {others[part.gives]}",
        )
        if isinstance(part, Scales):
            require(
                self.reducer.gives == "source",
                f"model.quantizer.kind scales is of the cells of a grid, and model.reducer.kind "
                f"{self.reducer.kind} leaves tokens without places: set model.reducer.kind to "
                "merge or pool, which then leave all cells, or take another quantizer",
            )
            require(
                self.branches.semantic_dim == 0,
                f"branches.kind ({self.branches.kind}) must be one with quantizer.kind scales, "
                "whose codes of all channels are one table's",
            )

    def _check_branches(self) -> None:
        """Reject taps of blocks that are not there, and branches that the quantizer cuts apart."""
        branches, quantizer, reducer = self.branches, self.quantizer, self.reducer
        require(
            branches.semantic_dim < quantizer.dim,
            f"branches.semantic_dim ({branches.semantic_dim}) must be below the "
            f"{quantizer.dim} channels of the quantizer's latents",
        )
        least = 0 if reducer.gives == "source" else 1
        require(
            all(least <= tap <= reducer.num_layers for tap in branches.taps),
            f"branches.taps {branches.taps} must all be between {least} and the "
            f"{reducer.num_layers} blocks (reducer.num_layers)"
            + ": before the first one, queries are the same for every image"
            * least,
        )
        require(
            self.latent_dim == quantizer.dim or branches.semantic_dim == 0,
            f"branches.kind ({branches.kind}) must be one with quantizer.kind {quantizer.kind}, "
            f"whose {self.latent_dim} latents are not cut as its {quantizer.dim} codes",
        )
        if branches.semantic_dim > 0 and isinstance(quantizer, Branched):
            require(
                branches.semantic_dim == quantizer.branch_dims[0],
                f"branches.semantic_dim ({branches.semantic_dim}) must be the first of "
                f"quantizer.branch_dims {quantizer.branch_dims}",
            )

    @property
    def latent_dim(self) -> int:
        """Channels that kept tokens are projected to: of the quantizer's latents."""
        return latent_dim(self.quantizer)

    @property
    def decoded_dim(self) -> int:
        """Channels of a code that expander and decoder are given, the last ones."""
        branches = self.branches
        return self.quantizer.dim - branches.semantic_dim * (branches.decodes == "pixel")

    @property
    def summary_dim(self) -> int:
        """Channels of the summary of an image that a teacher is given."""
        return self.branches.semantic_dim or self.dim

    @property
    def num_carried(self) -> int:
        """Components of patches that an analytic start has channels for.

        They come in pairs, as do positions, bits and one constant; negative where not even those
        fit. Only a patch stem without norm has room for them.
        """
        if not isinstance(self.stem, PatchStem) or self.stem.norm:
            return -1
        free = self.dim // 2 - self.stem.num_positions - self.quantizer.dim - 1
        return min(free, 3 * self.patch_size**2)

    @property
    def patch_size(self) -> int:
        """Pixels per side of one grid cell: the downsampling factor f."""
        return self.stem.patch_size

    @property
    def grid_size(self) -> int:
        """Tokens per side before merging, at the trained size."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """L: tokens before merging, at the trained size."""
        return self.grid_size**2

    def most_kept(self, grid_shape: tuple[int, int]) -> int:
        """Tokens of a grid of which none is left out.

        Those of its cells and of the whole image, or those of all scales.
        """
        part = self.kept_by
        if isinstance(part, Scales):
            return part.most_kept()
        return math.prod(grid_shape) + self.num_holistic

    @property
    def num_holistic(self) -> int:
        """H: tokens of the whole image, before those of cells."""
        return self.kept_by.num_holistic

    def kept_in_proportion(self, grid_shape: tuple[int, int], proportion: float) -> int:
        """K for a grid, rounded to one that the encoder gives.

        Ordered tokens have no part of a grid each: there are as many of any grid. So there are of
        tokens of the whole image before those of cells.

        Args:
            grid_shape: (height, width) in cells.
            proportion: K over cells, at the trained size.
        """
        part, trained = self.kept_by, self.num_tokens
        fixed = part.num_holistic if part.grows else trained * proportion
        if fixed > 0:
            proportion = max(trained * proportion - fixed, 0) / trained
        return part.nearest_kept(grid_shape, round(fixed + math.prod(grid_shape) * proportion))

    @property
    def kept_by(self) -> Reducer | Scales:
        """The part that gives the tokens their number and layout: the reducer, or scales."""
        return self.quantizer if isinstance(self.quantizer, Scales) else self.reducer

    def num_reduced(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Tokens that the reducer leaves for K kept ones: all cells where scales are quantized."""
        return math.prod(grid_shape) if isinstance(self.kept_by, Scales) else num_kept

    @property
    def dim(self) -> int:
        """Encoder transformer width."""
        return self.stem.width


def with_cnn(
    model: TokenizerConfig,
    *,
    channels: int | None = None,
    channel_mult: tuple[int, ...] | None = None,
    num_res_blocks: int | None = None,
) -> TokenizerConfig:
    """A configuration whose CNNs, of stem and decoder, have these sizes; None leaves one alone."""
    given = {
        "channels": channels,
        "channel_mult": channel_mult,
        "num_res_blocks": num_res_blocks,
    }
    sizes = {name: value for name, value in given.items() if value is not None}
    parts = {
        name: replace(part, **sizes)
        for name, part in (("stem", model.stem), ("decoder", model.decoder))
        if isinstance(part, CnnStem | CnnDecoder)
    }
    return replace(model, **parts)


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
