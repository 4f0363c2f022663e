"""Settings of decoders that follow a flow from noise to pixels; no torch.

Such a decoder is trained for a tokenizer that stays as it is, and is an artefact of its own.
"""

from dataclasses import dataclass, field
from typing import Literal

from mergevq.config.base import require, require_heads
from mergevq.config.parts.regularizers import TailDrop
from mergevq.config.ranges import check_numbers

Lengths = Literal["all", "uniform", "powers", "rounded"]
"""Law of the tokens that are shown in training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Always:
    """All tokens that an image shows are seen at all times (FlexTok)."""

    kind: Literal["always"] = "always"


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Groups of tokens are read one after the other as noise falls (D-AR)."""

    kind: Literal["groups"] = "groups"
    num_groups: int = 8
    """Groups of equally many tokens; the first tokens are read in pure noise."""
    current_only: bool = True
    """Only the group of the time is seen, and those before it through `num_token_layers` alone;
    else all up to it are."""

    def __post_init__(self) -> None:
        """Reject a number of groups that cannot be."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Knots:
    """The first tokens are seen, their number linear between times at equal distances (Selftok)."""

    kind: Literal["knots"] = "knots"
    shares: tuple[float, ...] = (0.0, 0.376, 0.736, 0.877, 0.971, 1.0)
    """Share of the tokens after the first one, from an image without noise to pure noise. Rising,
    as here, all are seen in noise; falling, they open as noise falls."""

    def __post_init__(self) -> None:
        """Reject tables that are none, or that turn back."""
        check_numbers(self)
        require(
            len(self.shares) > 1 and list(self.shares) in (_sorted(self), _sorted(self)[::-1]),
            f"shares {self.shares} must be at least two, rising or falling",
        )


def _sorted(knots: Knots) -> list[float]:
    """The shares of a table from the least to the most."""
    return sorted(knots.shares)


Schedule = Always | Groups | Knots


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixFlow:
    """Patches of noise that look at each other and at the first tokens, any number (FlexTok)."""

    kind: Literal["prefix_flow"] = "prefix_flow"
    patch_size: int = 4
    """Pixels per side of a patch."""
    dim: int = 128
    """Channels of its blocks."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads."""
    lengths: Lengths = "uniform"
    """Tokens that training shows of K: all; or as regularizer `tail_drop` has them. The first ones
    are those in order, and with a source map those of the most cells."""
    null_share: float = 0.1
    """Share of the training images of which no token is shown, for guidance."""
    schedule: Schedule = field(default_factory=Always)
    """Tokens that are seen at each time, of those that are shown."""
    num_token_layers: int = 0
    """Transformer blocks among the tokens, each of which sees those before it; run once for an
    image, whatever the steps."""

    def __post_init__(self) -> None:
        """Reject widths that heads and positions do not divide."""
        check_numbers(self)
        require_heads("decoder width", self.dim, self.num_heads, "decoder.num_heads")
        # Sine and cosine of row and column.
        require(self.dim % 4 == 0, f"decoder.dim ({self.dim}) must be a multiple of 4")

    def lengths_of(self, num_kept: int) -> tuple[int, ...]:
        """Numbers of tokens that one is drawn from in training, some of them several times.

        Examples:
            >>> PrefixFlow(lengths="powers").lengths_of(12)
            (1, 2, 4, 8, 12)
            >>> PrefixFlow(lengths="all").lengths_of(12)
            (12,)
        """
        return _lengths_of(self.lengths, num_kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelFlow:
    """Patches of noise that do not see each other, each with a condition of its cell (UniFlow)."""

    kind: Literal["pixel_flow"] = "pixel_flow"
    patch_size: int = 4
    """Pixels per side of a patch."""
    dim: int = 128
    """Channels of the conditions."""
    num_global_layers: int = 6
    """Transformer blocks among the conditions, run once for an image; with none, neighbouring
    patches agree on nothing."""
    num_heads: int = 4
    """Attention heads of these."""
    width: int = 256
    """Channels of the MLPs that give velocities."""
    depth: int = 12
    """MLPs, one after the other."""
    num_draws: int = 4
    """Times and noises of each image in a step of training, for which it is read once."""
    lengths: Lengths = "all"
    """Tokens that training shows of K, as of `prefix_flow`."""
    null_share: float = 0.0
    """Share of the training images of which no token is shown, for guidance."""

    def __post_init__(self) -> None:
        """Reject widths that heads and positions do not divide."""
        check_numbers(self)
        require_heads("decoder width", self.dim, self.num_heads, "decoder.num_heads")
        # Sine and cosine of row and column.
        require(self.dim % 4 == 0, f"decoder.dim ({self.dim}) must be a multiple of 4")

    def lengths_of(self, num_kept: int) -> tuple[int, ...]:
        """Numbers of tokens that one is drawn from in training, some of them several times."""
        return _lengths_of(self.lengths, num_kept)


FlowDecoder = PrefixFlow | PixelFlow


def _lengths_of(lengths: Lengths, num_kept: int) -> tuple[int, ...]:
    """Numbers of tokens by their law."""
    return (num_kept,) if lengths == "all" else TailDrop(lengths=lengths).lengths_of(num_kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Noise levels of a flow, from 0 (data) to 1 (noise)."""

    law: Literal["uniform", "logit_normal"] = "logit_normal"
    """Distribution that training draws from; `logit_normal` has most of them in the middle."""
    shift: float = 1.0
    """Shift s towards noise, in training and in decoding: t becomes s t / (1 + (s - 1) t). Large
    images gain from more than 1."""

    def __post_init__(self) -> None:
        """Reject a shift towards data."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """How a flow is followed from noise to an image."""

    num_steps: int = 16
    """Steps. One step of a flow that was not distilled gives the mean of all images of the tokens:
    it draws nothing."""
    solver: Literal["euler", "heun", "ab2", "sde"] = "ab2"
    """`euler` is of first order, `ab2` of second order at the same cost, `heun` of second order
    with two velocities a step, `sde` adds noise on the way."""
    guidance_scale: float = 1.0
    """Push away from an image without tokens; 1 is none, another one takes twice the time."""
    projected: bool = False
    """Guide by what is at right angles to the velocity alone, limited: large scales do not
    saturate (APG)."""

    def __post_init__(self) -> None:
        """Reject a single stochastic step: its last one has no noise."""
        check_numbers(self)
        require(
            (self.solver, self.num_steps) != ("sde", 1),
            f"num_steps ({self.num_steps}) must be at least 2 with solver sde",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """A decoder of a flow as it is saved: its settings, and what it was trained on."""

    decoder: FlowDecoder = field(default_factory=PrefixFlow)
    """Architecture."""
    times: Times = field(default_factory=Times)
    """Noise levels."""
    solution: Solution = field(default_factory=Solution)
    """How images are decoded."""
    code_dim: int = 18
    """D: channels of a code."""
    num_slots: int | None = None
    """Most tokens of an image where their order is all; None of tokens with a source map."""
    cell_size: int = 4
    """Pixels per side of a cell of the tokenizer's grid."""

    def __post_init__(self) -> None:
        """Reject patches that do not fill cells, and guidance without an image without tokens."""
        check_numbers(self)
        patch = self.decoder.patch_size
        require(
            self.cell_size % patch == 0,
            f"decoder.patch_size ({patch}) must divide the {self.cell_size} pixels of a cell of "
            "the tokenizer",
        )
        require(
            isinstance(self.decoder, PrefixFlow) or self.num_slots is None,
            f"decoder.kind {self.decoder.kind} needs tokens with a source map, and those of the "
            "tokenizer are ordered: set decoder.kind to prefix_flow",
        )
        check_solution(self.decoder, self.solution)


def check_solution(decoder: FlowDecoder, solution: Solution) -> None:
    """Raise `ValueError` where a decoder cannot be followed like this.

    It was never trained without tokens, or has groups that no step would read.
    """
    least = 1
    if isinstance(decoder, PrefixFlow) and isinstance(decoder.schedule, Groups):
        least = decoder.schedule.num_groups + (solution.solver == "sde")
    require(
        solution.num_steps >= least,
        f"solution.num_steps ({solution.num_steps}) must be at least {least} with solver "
        f"{solution.solver}, or a group of decoder.schedule.num_groups would never be read",
    )
    require(
        solution.guidance_scale == 1 or decoder.null_share > 0,
        f"solution.guidance_scale ({solution.guidance_scale}) must be 1 with decoder.null_share 0",
    )
