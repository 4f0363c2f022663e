"""Settings of a tokenizer's parts, a tagged union for each; no torch.

Adding a part is a class here, a module, and a line in `mergevq.tokenizer.build`: see
docs/adding-a-part.md.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from mergevq.config.base import require
from mergevq.config.ranges import RANGES, check_numbers

MergeShape = Literal["linear", "square", "constant"]
LayoutKind = Literal["source", "ordered"]
"""Layout of kept tokens: each cell of the grid has one (a source map), or their order is all."""

NUM_KEYS = 8
"""Leading components of patches that merging compares, where codes are analytic."""
_MAX_COMPONENT_BITS = 10
"""Most bits of one component: a patch decoder has 2**n - 1 products of n of them."""


def require_heads(what: str, width: int, num_heads: int, name: str) -> None:
    """Raise `ValueError` unless a width divides into heads."""
    require(
        width % num_heads == 0,
        f"{what} ({width}) must be a multiple of {name} ({num_heads})",
    )


def _require_cnn(channels: int, channel_mult: tuple[int, ...]) -> None:
    """Raise `ValueError` unless levels exist and have whole normalisation groups."""
    require(len(channel_mult) > 0, "channel_mult () must name one multiple per CNN level")
    groups = min(32, channels)
    require(
        all((channels * mult) % groups == 0 for mult in channel_mult),
        f"channels ({channels}) times each of channel_mult {channel_mult} must be a multiple of "
        f"the {groups} normalisation groups",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnStem:
    """Residual CNN levels, each but the last halving the side (versions G and G+R)."""

    kind: Literal["cnn"] = "cnn"
    channels: int = 64
    """CNN base channels: the paper's d32, d64, d96."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """Channels of each CNN level over `channels`; every level but one halves the side."""
    num_res_blocks: int = 4
    """Residual blocks per CNN level."""
    position_embedding: bool = False
    """Add fixed sine and cosine features of the cell, for any grid."""

    def __post_init__(self) -> None:
        """Reject levels that cannot be built."""
        check_numbers(self)
        _require_cnn(self.channels, self.channel_mult)

    @property
    def patch_size(self) -> int:
        """Pixels per side of one grid cell: the downsampling factor f."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def width(self) -> int:
        """Channels of the grid tokens: those of the coarsest level."""
        return self.channels * self.channel_mult[-1]

    @property
    def num_groups(self) -> int:
        """Groups of every group normalisation: 32, or fewer where the base width is smaller."""
        return min(32, self.channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchStem:
    """One convolution per patch (version R), with a norm or with positions of its own."""

    kind: Literal["patch"] = "patch"
    width: int = 768
    """Channels of the grid tokens: the encoder transformer's width."""
    patch_size: int = 16
    """Pixels per side of a patch, f."""
    norm: bool = True
    """Normalise each channel over the image, as the authors do, which hides how bright an image is.
    False leaves the channels as they are, and the last third of them also tells a cell's position,
    in pairs of opposite sign."""
    norm_eps: float = 1e-5
    """Added to the variance in that norm; the authors' code has 1e-6."""
    num_groups: int = 32
    """Groups of the normalisation before the latents."""
    position_embedding: bool = False
    """Add fixed sine and cosine features of the cell, for any grid; a stem with norm needs them."""

    def __post_init__(self) -> None:
        """Reject widths that cannot be normalised, and positions twice."""
        check_numbers(self)
        require(
            self.width % self.num_groups == 0,
            f"width ({self.width}) must be a multiple of the {self.num_groups} normalisation "
            "groups (num_groups)",
        )
        require(
            self.norm or not self.position_embedding,
            "position_embedding (True) must be False with norm False, which adds positions of its "
            "own",
        )
        require(
            self.norm or self.num_positions > 0,
            f"width ({self.width}) must be at least 24 with norm False, for features of positions",
        )

    @property
    def num_positions(self) -> int:
        """Features of positions that a stem without norm adds, a pair of channels each."""
        return 4 * (self.width // 24)


Stem = CnnStem | PatchStem


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Transformer blocks that merge similar tokens; the source map tells where cells went."""

    kind: Literal["merge"] = "merge"
    num_layers: int = 12
    """Merging transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms; the authors' code has 1e-5."""
    shape: MergeShape = "linear"
    """How merging is spread over blocks: `linear` is the authors' code, `square` the paper's."""

    gives: ClassVar[LayoutKind] = "source"
    """Layout of the tokens that are left."""

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)

    def least_kept(self, grid_shape: tuple[int, int]) -> int:
        """Fewest tokens that can be left of a grid's: every block merges half of its own."""
        return -(-math.prod(grid_shape) >> self.num_layers)  # rounded up

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be left of a grid's."""
        return max(self.least_kept(grid_shape), num_kept)

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where as many tokens cannot be left of a grid's."""
        _require_at_most_cells(grid_shape, num_kept)
        least, num_tokens = self.least_kept(grid_shape), math.prod(grid_shape)
        require(
            num_kept >= least,
            f"num_kept ({num_kept}) must be at least {least}: each of reducer.num_layers "
            f"({self.num_layers}) can merge at most half of its tokens and the first has "
            f"{num_tokens}; keep more tokens or use more layers",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Transformer blocks on the whole grid, then means of its blocks of cells; no map is stored."""

    kind: Literal["pool"] = "pool"
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches; 1e-5 suits long runs, short ones want 0.1 or more."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "source"

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)

    def counts(self, grid_shape: tuple[int, int], num_kept: int) -> tuple[int, int] | None:
        """Blocks along both directions of a grid, the most square ones; None where there are none.

        Args:
            grid_shape: (height, width) in cells.
            num_kept: K: all blocks.
        """
        height, width = grid_shape
        pairs = [
            (rows, num_kept // rows)
            for rows in range(1, min(height, num_kept) + 1)
            if num_kept % rows == 0 and num_kept // rows <= width
        ]
        # Height over width of a block, or the other way round, whichever is above 1.
        return min(
            pairs,
            key=lambda pair: abs(math.log(height * pair[1] / (width * pair[0]))),
            default=None,
        )

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of merging
        """Fewest tokens that can be left of a grid's: one block."""
        return 1

    def nearest_kept(self, grid_shape: tuple[int, int], num_kept: int) -> int:
        """Number of tokens next to this one that can be left of a grid's."""
        return min(self._both_sides(grid_shape, num_kept), key=lambda near: abs(near - num_kept))

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where a grid cannot be cut into as many blocks."""
        _require_at_most_cells(grid_shape, num_kept)
        if self.counts(grid_shape, num_kept) is None:
            below, above = self._both_sides(grid_shape, num_kept)
            raise ValueError(
                f"num_kept ({num_kept}) must be rows times columns of blocks of the "
                f"{grid_shape[0]} x {grid_shape[1]} cells, such as {below} or {above}"
            )

    def _both_sides(self, grid_shape: tuple[int, int], num_kept: int) -> tuple[int, int]:
        """The next legal numbers at or below this one, and at or above it."""
        num_tokens = math.prod(grid_shape)
        start = min(max(num_kept, 1), num_tokens)
        below = next(k for k in range(start, 0, -1) if self.counts(grid_shape, k))
        above = next(k for k in range(start, num_tokens + 1) if self.counts(grid_shape, k))
        return below, above


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """Learned queries behind the grid tokens; they alone are kept, in their order (TiTok)."""

    kind: Literal["queries"] = "queries"
    num_queries: int = 144
    """Queries: the most tokens that can be kept; fewer keep the first of them."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1.0
    """Initial gain of residual branches: all that a query becomes comes through them."""
    norm_eps: float = 1e-6
    """Added to the variance in layer norms."""

    gives: ClassVar[LayoutKind] = "ordered"

    def __post_init__(self) -> None:
        """Reject counts and constants that cannot be."""
        check_numbers(self)

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of merging
        """Fewest tokens that can be kept: one query."""
        return 1

    def nearest_kept(
        self,
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of merging
        num_kept: int,
    ) -> int:
        """Number of tokens next to this one that can be kept."""
        return min(max(num_kept, 1), self.num_queries)

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where there are not as many queries."""
        _require_at_most_cells(grid_shape, num_kept)
        require(
            num_kept <= self.num_queries,
            f"num_kept ({num_kept}) must be at most {self.num_queries}, the queries "
            "(reducer.num_queries)",
        )


def _require_at_most_cells(grid_shape: tuple[int, int], num_kept: int) -> None:
    """Raise `ValueError` unless tokens are from 1 to as many as a grid has cells."""
    num_tokens = math.prod(grid_shape)
    require(
        1 <= num_kept <= num_tokens,
        f"num_kept ({num_kept}) must be between 1 and the {num_tokens} tokens of the grid",
    )


Reducer = Merge | Pool | Queries


@dataclass(frozen=True, kw_only=True, slots=True)
class Lfq:
    """Signs of D channels as one index; no codebook is stored, entropies are exact."""

    kind: Literal["lfq"] = "lfq"
    num_bits: int = 18
    """D: bits of a token; the codebook has 2**D entries."""
    entropy_temperature: float = 0.01
    """Temperature of the soft assignment in both entropies."""

    def __post_init__(self) -> None:
        """Reject tokens that no index can hold."""
        check_numbers(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token."""
        return (2**self.num_bits,)

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return self.num_bits


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedLfq:
    """Signs of D channels, each group of bits a part of the token with entropies of its own."""

    kind: Literal["grouped_lfq"] = "grouped_lfq"
    num_bits: int = 32
    """D: bits of a token."""
    group_bits: int = 8
    """Bits of a part, which divide D; training takes memory for 2**group_bits codes of each."""
    codebook_entropy: Literal["sum", "pooled"] = "sum"
    """Over the groups. `pooled` is WeTok's code, the entropy of what all groups together use beside
    the mean of their token entropies: constant groups count as diverse if they differ."""
    entropy_temperature: float = 0.01
    """Temperature of the soft assignment in both entropies."""

    def __post_init__(self) -> None:
        """Reject groups that are not equal."""
        check_numbers(self)
        require(
            self.num_bits % self.group_bits == 0,
            f"num_bits ({self.num_bits}) must be a multiple of group_bits ({self.group_bits})",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token, one for each group."""
        return (2**self.group_bits,) * (self.num_bits // self.group_bits)

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return self.num_bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Bsq:
    """Signs of D channels of a vector on the sphere, whose distance to its code is bounded."""

    kind: Literal["bsq"] = "bsq"
    num_bits: int = 18
    """D: bits of a token; the codebook has 2**D entries."""
    entropy_temperature: float = 1.0
    """Temperature of the soft assignment in both entropies; 1 over the authors' inverse one."""

    def __post_init__(self) -> None:
        """Reject tokens that no index can hold."""
        check_numbers(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token."""
        return (2**self.num_bits,)

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return self.num_bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Bernoulli:
    """D bits, drawn with a latent's probabilities in training and rounded in evaluation."""

    kind: Literal["bernoulli"] = "bernoulli"
    num_bits: int = 18
    """D: bits of a token; the codebook has 2**D entries."""
    sample_temperature: float = 1.0
    """Training draws a bit of latent z with probability sigmoid(z / temperature). The gradient is
    that of sigmoid(z), which at 1 is of the same probability."""
    confidence_weight: float = 0.1
    """Weight of the loss `confidence`, the mean of p (1 - p) for p = sigmoid(z): 0.25 undecided."""

    def __post_init__(self) -> None:
        """Reject tokens that no index can hold."""
        check_numbers(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token."""
        return (2**self.num_bits,)

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return self.num_bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Fsq:
    """Channels rounded to a few levels each; no codebook is stored, and there is no loss."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Levels of each channel, each a part of the token; tokens are as many as their product."""

    def __post_init__(self) -> None:
        """Reject channels that are better signs, and tokens that no index can hold."""
        require(
            2 not in self.levels,
            f"levels {self.levels}: a channel of 2 would be -1 and 0, and no sign, for which use "
            f"quantizer.kind lfq; levels must all be {RANGES['levels']}",
        )
        check_numbers(self)
        count = math.prod(self.levels)
        require(
            len(self.levels) > 0 and count < 2**63,
            f"levels {self.levels} make {count} tokens and must make fewer than 2**63, of at least "
            "one channel",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token, one for each channel."""
        return self.levels

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return len(self.levels)


Quantizer = Lfq | GroupedLfq | Bsq | Bernoulli | Fsq


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmerge:
    """Copies of kept tokens in the cells of a source map, which a predictor can recover."""

    kind: Literal["unmerge"] = "unmerge"
    dim: int = 384
    """Width of the source predictor (paper, Table A2)."""
    num_layers: int = 2
    """Blocks of the source predictor."""
    num_heads: int = 8
    """Attention heads of the source predictor."""

    def __post_init__(self) -> None:
        """Reject a predictor that cannot be built."""
        check_numbers(self)
        require_heads("expander.dim", self.dim, self.num_heads, "expander.num_heads")
        # Sine and cosine of row and column.
        require(self.dim % 4 == 0, f"expander.dim ({self.dim}) must be a multiple of 4")

    reads: ClassVar[LayoutKind] = "source"
    """Layout of the tokens that it expands."""

    def given_dims(self, code_dim: int) -> tuple[int, int | None]:
        """Channels of a decoder's input and of its style (None: no style), of codes of D."""
        return code_dim, code_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskTokens:
    """One mask token in every cell, which reads the codes by attention (TiTok)."""

    kind: Literal["mask_tokens"] = "mask_tokens"
    dim: int = 384
    """Width."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""

    reads: ClassVar[LayoutKind] = "ordered"

    def __post_init__(self) -> None:
        """Reject blocks that cannot be built."""
        check_numbers(self)
        require_heads("expander.dim", self.dim, self.num_heads, "expander.num_heads")
        # Sine and cosine of row and column.
        require(self.dim % 4 == 0, f"expander.dim ({self.dim}) must be a multiple of 4")

    def given_dims(self, code_dim: int) -> tuple[int, int | None]:
        """Channels of a decoder's input and of its style (None: no style), of codes of D."""
        return self.dim, code_dim


Expander = Unmerge | MaskTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnDecoder:
    """Transformer blocks on the grid and an upsampling CNN, as the authors have."""

    kind: Literal["cnn"] = "cnn"
    channels: int = 64
    """CNN base channels: the paper's d32, d64, d96."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """Channels of each CNN level over `channels`, fine to coarse, as in the stem."""
    num_res_blocks: int = 4
    """Residual blocks on the finest CNN level; every other level has one more."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 8
    """Attention heads."""
    layer_scale: float = 1e-5
    """Initial gain of residual branches."""
    norm_eps: float = 1e-6
    """Added to the variance in the transformer's layer norms; the authors' code has 1e-5."""

    def __post_init__(self) -> None:
        """Reject levels, heads and constants that cannot be."""
        check_numbers(self)
        _require_cnn(self.channels, self.channel_mult)
        require_heads("decoder width", self.width, self.num_heads, "decoder.num_heads")

    def check_patch(self, patch_size: int) -> None:
        """Raise `ValueError` where the levels do not give a cell's pixels."""
        own = 2 ** (len(self.channel_mult) - 1)
        require(
            own == patch_size,
            f"decoder.channel_mult {self.channel_mult} must make the stem's cells of {patch_size} "
            f"x {patch_size} pixels, and makes {own} x {own}: every level but one doubles the side",
        )

    @property
    def width(self) -> int:
        """Transformer width: the channels of the coarsest level."""
        return self.channels * self.channel_mult[-1]

    @property
    def num_groups(self) -> int:
        """Groups of every group normalisation: 32, or fewer where the base width is smaller."""
        return min(32, self.channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchDecoder:
    """Blocks of one width on the grid, then all pixels of a cell at once."""

    kind: Literal["patch"] = "patch"
    width: int = 192
    """Channels of its blocks."""
    num_heads: int = 8
    """Attention heads."""
    blocks: str = "ccaccc"
    """Blocks in order: c is a 3x3 convolution and an MLP, a is attention and an MLP."""
    bit_components: tuple[int, ...] = ()
    """Component of each bit. The products of a component's own bits go straight to the cell's
    pixels; a start from components fills it in, and empty has no such way."""

    def __post_init__(self) -> None:
        """Reject blocks of other letters, and components of too many bits."""
        check_numbers(self)
        # Sine and cosine of row and column.
        require(self.width % 4 == 0, f"decoder.width ({self.width}) must be a multiple of 4")
        require_heads("decoder width", self.width, self.num_heads, "decoder.num_heads")
        require(
            len(self.blocks) > 0 and set(self.blocks) <= set("ac"),
            f"decoder.blocks ({self.blocks!r}) must be letters c (convolution) and a (attention), "
            "such as ccaccc",
        )
        most = max((len(group) for group in self.bit_groups), default=0)
        require(
            most <= _MAX_COMPONENT_BITS,
            f"decoder.bit_components gives one component {most} bits and must give at most "
            f"{_MAX_COMPONENT_BITS}",
        )

    def check_patch(self, patch_size: int) -> None:
        """Raise `ValueError` where a cell has one pixel, of which no quarters can be made."""
        require(
            patch_size % 2 == 0,
            f"decoder (patch) needs cells of an even number of pixels a side, not {patch_size}",
        )

    @property
    def bit_groups(self) -> tuple[tuple[int, ...], ...]:
        """Bits of each component, the most significant one first."""
        groups: dict[int, list[int]] = {}
        for bit, component in enumerate(self.bit_components):
            groups.setdefault(component, []).append(bit)
        return tuple(map(tuple, groups.values()))


Decoder = CnnDecoder | PatchDecoder


def weights_of(part: object) -> dict[str, float]:
    """Weights of losses by the loss's name: the settings that are called `NAME_weight`."""
    names = [field.name for field in fields(part)]  # pyright: ignore[reportArgumentType]
    weights = [name for name in names if name.endswith("_weight")]
    return {name.removesuffix("_weight"): getattr(part, name) for name in weights}


def bits_of(sizes: tuple[int, ...]) -> float:
    """Bits of a token whose parts have so many values."""
    return math.fsum(math.log2(size) for size in sizes)
