"""Settings of quantizers, a tagged union; no torch.

A term of the loss that one kind alone has is weighted by its own setting NAME_weight.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import accumulate
from typing import ClassVar, Literal

from mergevq.config.base import LayoutKind, require
from mergevq.config.ranges import RANGES, check_numbers


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
        """Reject channels that are better signs, and a token of no channel."""
        require(
            2 not in self.levels,
            f"levels {self.levels}: a channel of 2 would be -1 and 0, and no sign, for which use "
            f"quantizer.kind lfq; levels must all be {RANGES['levels']}",
        )
        check_numbers(self)
        require(len(self.levels) > 0, "levels () must be those of at least one channel")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token, one for each channel."""
        return self.levels

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return len(self.levels)


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientUpdate:
    """Codes are weights, which the loss `codebook` draws to the latents that chose them."""

    kind: Literal["gradient"] = "gradient"
    codebook_weight: float = 1.0
    """Weight of that loss, the mean squared distance of codes to their latents."""

    def __post_init__(self) -> None:
        """Reject a negative weight."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaUpdate:
    """Codes are running means of the latents that chose them, and no weights."""

    kind: Literal["ema"] = "ema"
    decay: float = 0.99
    """Share of the old counts and sums that a step keeps."""
    restart_below: float = 0.1
    """A code whose count falls below this share of the mean count becomes a latent of the step,
    drawn at random; 0 is never."""

    def __post_init__(self) -> None:
        """Reject shares that are none."""
        check_numbers(self)


Update = GradientUpdate | EmaUpdate


@dataclass(frozen=True, kw_only=True, slots=True)
class Codebook:
    """The nearest entry of a table of codes that is learned."""

    kind: Literal["codebook"] = "codebook"
    codebook_size: int = 1024
    """V: codes of the table."""
    dim: int = 8
    """D: channels of latents and of codes."""
    l2_norm: bool = True
    """Latents and codes have length 1, so that the nearest code is that of the largest cosine."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """From a code to its latent: as it is, or rotated and scaled as the latent is to its code."""
    update: Update = field(default_factory=GradientUpdate)
    """How codes are learned."""

    def __post_init__(self) -> None:
        """Reject a table of one code, and codes of no channel."""
        check_numbers(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token."""
        return (self.codebook_size,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """The nearest entries of several learned tables, each of channels of its own."""

    kind: Literal["product"] = "product"
    num_codebooks: int = 2
    """F: tables, each a part of the token."""
    codebook_size: int = 512
    """V: codes of each table."""
    book_dim: int = 8
    """D: channels of each table."""
    orthogonality_weight: float = 0.1
    """Weight of the loss `orthogonality`, the mean squared cosine of a token's codes of two tables:
    1 / D of random directions, 0 at right angles."""
    l2_norm: bool = True
    """Latents and codes of each table have length 1."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """From a code to its latent: as it is, or rotated and scaled as the latent is to its code."""
    update: Update = field(default_factory=GradientUpdate)
    """How codes are learned."""

    def __post_init__(self) -> None:
        """Reject no tables, tables of one code, and codes of no channel."""
        check_numbers(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token, one for each table."""
        return (self.codebook_size,) * self.num_codebooks

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return self.num_codebooks * self.book_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """One index into several tables with channels of their own, by their sum of distances."""

    kind: Literal["shared"] = "shared"
    codebook_size: int = 1024
    """V: codes of each table, and of the token."""
    branch_dims: tuple[int, ...] = (32, 8)
    """Channels of each table; with `model.branches.kind` two the first ones are the semantic ones.
    Latents and codes of each have length 1."""
    distance_weights: tuple[float, ...] = (1.0, 1.0)
    """Weight of each table's squared distance in the choice of the index."""
    means: Literal["branch", "channel"] = "branch"
    """Losses are means over tables (`branch`) or over all channels, of which a wide table has more:
    `channel` is TokenFlow's code."""
    update: Update = field(default_factory=GradientUpdate)
    """How codes are learned."""

    def __post_init__(self) -> None:
        """Reject tables of one code, of no channel, and without a weight each."""
        check_numbers(self)
        _require_branches(self.branch_dims)
        require(
            len(self.distance_weights) == len(self.branch_dims) and any(self.distance_weights),
            f"distance_weights {self.distance_weights} must be as many as branch_dims "
            f"{self.branch_dims}, and not all 0",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token: one part."""
        return (self.codebook_size,)

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return sum(self.branch_dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """Sums of codes, each the nearest to what those before it leave of a latent; by branches."""

    kind: Literal["residual"] = "residual"
    codebook_size: int = 256
    """V: codes of a table."""
    branch_dims: tuple[int, ...] = (8,)
    """Channels of each branch, which has tables of its own; with `model.branches.kind` two the
    first ones are the semantic ones."""
    depth: int = 2
    """R: codes of a branch, each a part of the token."""
    share_codebook: bool = True
    """One table for all codes of a branch, not one for each."""
    update: Update = field(default_factory=GradientUpdate)
    """How codes are learned."""

    def __post_init__(self) -> None:
        """Reject tables of one code, and branches of no channel."""
        check_numbers(self)
        _require_branches(self.branch_dims)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token: all of one branch, then of the next."""
        return (self.codebook_size,) * (self.depth * len(self.branch_dims))

    @property
    def dim(self) -> int:
        """Channels of latents and of codes."""
        return sum(self.branch_dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """Codes of the grid at several scales, each of what those before it leave (VAR)."""

    kind: Literal["scales"] = "scales"
    codebook_size: int = 256
    """V: codes of the table that all scales share."""
    dim: int = 8
    """D: channels of latents and of codes."""
    scales: tuple[int, ...] = (1, 2, 4, 8)
    """Sides of the scales, in tokens, up to that of the grid. K is the first tokens: all of some
    scales, or a part of the last."""
    num_filters: int = 4
    """Filters of enlarged codes, each for as many scales in turn; at most one for each."""
    filter_share: float = 0.5
    """Share of the filtered codes in what is added; the rest is the codes as they are."""
    update: Update = field(default_factory=GradientUpdate)
    """How codes are learned."""

    gives: ClassVar[LayoutKind] = "scales"
    """Layout of the tokens, whatever the reducer leaves."""
    grows: ClassVar[bool] = False
    num_holistic: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Reject a table of one code, codes of no channel, and scales out of order."""
        check_numbers(self)
        check_scales(self.scales)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token."""
        return (self.codebook_size,)

    def least_kept(self, grid_shape: tuple[int, int]) -> int:  # noqa: ARG002 - as of reducers
        """Fewest tokens: the first one."""
        return 1

    def most_kept(self) -> int:
        """Most tokens: those of all scales."""
        return num_kept_of(self.scales)[-1]

    def nearest_kept(
        self,
        grid_shape: tuple[int, int],  # noqa: ARG002 - as of reducers
        num_kept: int,
    ) -> int:
        """Number of tokens next to this one that there can be."""
        return min(max(num_kept, 1), self.most_kept())

    def check_kept(self, grid_shape: tuple[int, int], num_kept: int) -> None:
        """Raise `ValueError` where a grid is another, or there are not as many tokens."""
        side, most = self.scales[-1], self.most_kept()
        require(
            grid_shape == (side, side),
            f"a grid of {grid_shape[0]} x {grid_shape[1]} cells must have {side} x {side}, the "
            f"last of quantizer.scales {self.scales}: change that, or give images of the trained "
            "size, into which size_policy 'tile' cuts larger ones",
        )
        require(
            1 <= num_kept <= most,
            f"num_kept ({num_kept}) must be between 1 and {most}, the tokens of all "
            f"quantizer.scales {self.scales}",
        )


def check_scales(scales: tuple[int, ...]) -> None:
    """Raise `ValueError` where sides of scales do not rise, or there are none."""
    require(
        len(scales) > 0 and list(scales) == sorted(set(scales)),
        f"scales {scales} must be sides of grids, each larger than the one before",
    )


def num_kept_of(scales: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens of the first scale, of the first two, and so on.

    Examples:
        >>> num_kept_of((1, 2, 4, 8))
        (1, 5, 21, 85)
    """
    return tuple(accumulate(side**2 for side in scales))


@dataclass(frozen=True, kw_only=True, slots=True)
class Kl:
    """Real channels, each with a mean and a deviation, drawn in training; no indices (a VAE)."""

    kind: Literal["kl"] = "kl"
    dim: int = 8
    """D: channels of codes; latents have a mean and a log-variance for each."""
    kl_weight: float = 1e-4
    """Weight of the loss `kl`, the divergence from a standard normal: sum over channels, mean over
    tokens. Authors' weights are of other sums: over D for a mean over channels."""

    def __post_init__(self) -> None:
        """Reject codes of no channel."""
        check_numbers(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token: there are no parts."""
        return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Unquantized:
    """Real channels of mean 0 and variance 1 over those of a token; no indices."""

    kind: Literal["none"] = "none"
    dim: int = 8
    """D: channels of latents and of codes."""

    def __post_init__(self) -> None:
        """Reject codes of no channel, and of one, which would be 0."""
        check_numbers(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token: there are no parts."""
        return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimensions:
    """Channels rounded by stored statistics to levels of a normal distribution, after training."""

    kind: Literal["dimensions"] = "dimensions"
    dim: int = 8
    """D: channels of latents and of codes, each a part of the token."""
    num_levels: int = 64
    """B: levels of each channel."""
    channel_order: tuple[int, ...] = ()
    """Channel of each part; none is part 0 of channel 0, and so on."""
    normalized: bool = False
    """Each token is normalised over its channels first, as those of kind `none` are."""

    def __post_init__(self) -> None:
        """Reject codes of no channel, and an order that is not one of all channels."""
        check_numbers(self)
        require(
            sorted(self.channel_order) in ([], list(range(self.dim))),
            f"channel_order {self.channel_order} must have each of the {self.dim} channels once, "
            "or be empty",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each part of a token, one for each channel."""
        return (self.num_levels,) * self.dim


def _require_branches(branch_dims: tuple[int, ...]) -> None:
    """Raise `ValueError` where there is no branch."""
    require(len(branch_dims) > 0, "branch_dims () must be those of at least one branch")


Branched = Shared | Residual
"""Quantizers whose channels are cut into branches, as `branch_dims` has them."""
Binary = Lfq | GroupedLfq | Bsq | Bernoulli
"""Quantizers each of whose channels is a bit of the token."""
Continuous = Kl | Unquantized
"""Quantizers that leave real numbers, so that tokens have neither parts nor indices."""
Quantizer = Binary | Fsq | Codebook | Product | Branched | Scales | Continuous | Dimensions


def latent_dim(quantizer: Quantizer) -> int:
    """Channels of latents: those of codes, and twice as many of a mean and a log-variance each."""
    return 2 * quantizer.dim if isinstance(quantizer, Kl) else quantizer.dim


def per_token(quantizer: Quantizer) -> str:
    """Price of a token in words: its bits, or its real numbers."""
    if isinstance(quantizer, Continuous):
        return f"{quantizer.dim} real numbers"
    return f"{bits_of(quantizer.sizes):g} bits"


def weights_of(part: object) -> dict[str, float]:
    """Weights of losses by the loss's name: the settings that are called `NAME_weight`.

    Those of settings inside the part are among them.
    """
    found: dict[str, float] = {}
    for item in fields(part):  # pyright: ignore[reportArgumentType]
        value = getattr(part, item.name)
        if is_dataclass(value):
            found |= weights_of(value)
        elif item.name.endswith("_weight"):
            found[item.name.removesuffix("_weight")] = value
    return found


def bits_of(sizes: tuple[int, ...]) -> float:
    """Bits of a token whose parts have so many values; NaN without parts, of real numbers."""
    return math.fsum(math.log2(size) for size in sizes) if sizes else math.nan
