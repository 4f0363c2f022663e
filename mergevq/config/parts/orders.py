"""Settings of the orders of a generator, a tagged union; no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mergevq.config.base import LayoutKind, require
from mergevq.config.parts.quantizers import check_scales
from mergevq.config.ranges import check_numbers

NUM_RELATIONS = 9
"""Relations of a cell in order `stream`: new, a copy of one of seven neighbours, or of another."""
Reads = Literal["cells", "kept"]
"""Tokens of a sequence: all cells of the grid in raster order, or the kept tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Raster:
    """All cells row by row (LlamaGen), after training in random orders if asked to (RAR)."""

    kind: Literal["raster"] = "raster"
    annealing: tuple[float, float] | None = None
    """Shares of the run between which the probability that training permutes a sequence falls
    linearly from 1 to 0; None never permutes."""

    reads: ClassVar[Reads] = "cells"
    """Tokens of a sequence."""
    layout: ClassVar[LayoutKind] = "source"
    """Layout that the tokens must have."""
    merges: ClassVar[bool] = False
    """Whether cells are copies of kept tokens, or kept tokens alone are read."""
    is_anchored: ClassVar[bool] = False
    """Whether a part of a token is the cell at which it opens."""
    gap_in_bits: ClassVar[bool] = False
    """Whether bits of the gap to that cell are parts before it."""
    in_parallel: ClassVar[bool] = False
    """Whether several tokens can be decoded in one pass."""
    fills_in: ClassVar[bool] = False
    """Whether some tokens can be kept and the others sampled."""
    tokens_per_step: ClassVar[int] = 1
    """Tokens that one state of the transformer predicts, one after the other in the head."""
    names_copies: ClassVar[bool] = False
    """Whether the first parts of a token are which earlier cell it is a copy of."""
    is_exact: ClassVar[bool] = True
    """Whether likelihoods of sequences are exact, and not estimates of a bound."""
    drafts: ClassVar[bool] = True
    """Whether tokens can be drafted from neighbouring cells, and checked several in one pass."""

    def __post_init__(self) -> None:
        """Reject annealing that ends before it begins."""
        check_numbers(self)
        start, end = self.annealing or (0, 0)
        require(start <= end, f"annealing {self.annealing} must end after it begins")

    def permuted_share(self, progress: float) -> float:
        """Probability that training permutes a sequence, after a share of the run.

        Examples:
            >>> order = Raster(annealing=(0.5, 0.75))
            >>> [order.permuted_share(progress) for progress in (0.0, 0.5, 0.625, 0.75)]
            [1.0, 1.0, 0.5, 0.0]
        """
        if self.annealing is None:
            return 0.0
        start, end = self.annealing
        if start == end:
            return float(progress < end)
        return min(max((end - progress) / (end - start), 0.0), 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """All cells row by row, merged duplicates hidden (MergeAR)."""

    kind: Literal["merge"] = "merge"
    window: int = 2
    """Duplicates stay visible to this many tokens after them."""
    groups: Literal["code", "source"] = "code"
    """Tokens are duplicates if their codes are equal, as in sampling, or (in training only) if the
    tokenizer merged them."""
    flex_attention: bool = False
    """Train with a compiled block mask on CUDA; other devices ignore it."""

    reads: ClassVar[Reads] = "cells"
    layout: ClassVar[LayoutKind] = "source"
    merges: ClassVar[bool] = True
    is_anchored: ClassVar[bool] = False
    gap_in_bits: ClassVar[bool] = False
    in_parallel: ClassVar[bool] = False
    fills_in: ClassVar[bool] = False
    tokens_per_step: ClassVar[int] = 1
    names_copies: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    drafts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Reject a negative window."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Random:
    """The kept tokens in random order, each after an instruction that names its slot (RandAR)."""

    kind: Literal["random"] = "random"
    rotate_instruction: bool = True
    """Rotate a position-instruction vector itself by its slot, besides the rotation that every
    query and key gets."""

    reads: ClassVar[Reads] = "kept"
    layout: ClassVar[LayoutKind] = "source"
    merges: ClassVar[bool] = True
    is_anchored: ClassVar[bool] = False
    gap_in_bits: ClassVar[bool] = False
    in_parallel: ClassVar[bool] = True
    fills_in: ClassVar[bool] = True
    tokens_per_step: ClassVar[int] = 1
    names_copies: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    drafts: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchored:
    """The kept tokens in canonical order, each with the cell at which it opens."""

    kind: Literal["anchor"] = "anchor"
    gap_in_bits: bool = False
    """Predict the gap from one such cell to the next bit by bit, the highest first."""

    reads: ClassVar[Reads] = "kept"
    layout: ClassVar[LayoutKind] = "source"
    merges: ClassVar[bool] = True
    is_anchored: ClassVar[bool] = True
    in_parallel: ClassVar[bool] = False
    fills_in: ClassVar[bool] = False
    tokens_per_step: ClassVar[int] = 1
    names_copies: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    drafts: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked:
    """All cells in a few passes, the most confident first (MaskGIT; ENAT with `disentangle`)."""

    kind: Literal["masked"] = "masked"
    masking: Literal["arccos", "beta"] = "arccos"
    """Distribution of the share of tokens that training hides: arccos(u) / (pi / 2) of an even u
    (mean 0.64, MaskGIT), or Beta(12, 3) (mean 0.8, ENAT)."""
    visible_weight: float = 0.1
    """Weight of visible tokens in the loss, beside 1 for hidden ones; 0 with `disentangle`, which
    predicts hidden tokens alone."""
    disentangle: bool = False
    """Encode visible tokens by themselves, and let hidden ones attend to them in a decoder."""
    num_decoder_layers: int = 1
    """Transformer blocks of hidden tokens with `disentangle`; `num_layers` are of visible ones."""
    reuse: bool = False
    """With `disentangle`, encode in each pass only the tokens of the pass before, which attend to
    the features that older ones have."""

    reads: ClassVar[Reads] = "cells"
    layout: ClassVar[LayoutKind] = "source"
    merges: ClassVar[bool] = True
    is_anchored: ClassVar[bool] = False
    gap_in_bits: ClassVar[bool] = False
    in_parallel: ClassVar[bool] = True
    fills_in: ClassVar[bool] = False
    tokens_per_step: ClassVar[int] = 1
    names_copies: ClassVar[bool] = False
    is_exact: ClassVar[bool] = False
    drafts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject settings that contradict each other."""
        check_numbers(self)
        require(
            not self.disentangle or self.visible_weight == 0,
            f"visible_weight ({self.visible_weight}) must be 0 with disentangle: visible tokens "
            "are not predicted",
        )
        require(
            self.disentangle or not self.reuse,
            "reuse (True) needs disentangle (False): only features of visible tokens alone can be "
            "used again",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """All cells row by row, each a new token or a copy of an earlier cell that it names."""

    kind: Literal["stream"] = "stream"
    tokens_per_step: int = 1
    """Cells that one state of the transformer predicts; more take fewer passes."""

    reads: ClassVar[Reads] = "cells"
    layout: ClassVar[LayoutKind] = "source"
    merges: ClassVar[bool] = True
    is_anchored: ClassVar[bool] = False
    gap_in_bits: ClassVar[bool] = False
    in_parallel: ClassVar[bool] = False
    fills_in: ClassVar[bool] = False
    names_copies: ClassVar[bool] = True
    is_exact: ClassVar[bool] = True
    drafts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject a number of cells below 1."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ordered:
    """The tokens of a tokenizer with ordered ones (`queries`), from the first to the last."""

    kind: Literal["ordered"] = "ordered"

    reads: ClassVar[Reads] = "kept"
    layout: ClassVar[LayoutKind] = "ordered"
    merges: ClassVar[bool] = True
    is_anchored: ClassVar[bool] = False
    gap_in_bits: ClassVar[bool] = False
    in_parallel: ClassVar[bool] = False
    fills_in: ClassVar[bool] = False
    tokens_per_step: ClassVar[int] = 1
    names_copies: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    drafts: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Holistic:
    """The tokens of a tokenizer of kind `holistic`: of the whole image, then of cells (Hita)."""

    kind: Literal["holistic"] = "holistic"
    num_holistic: int = 4
    """H: tokens of the whole image, the tokenizer's `num_holistic`; 0 is order `raster`."""

    reads: ClassVar[Reads] = "kept"
    layout: ClassVar[LayoutKind] = "holistic"
    merges: ClassVar[bool] = True
    is_anchored: ClassVar[bool] = False
    gap_in_bits: ClassVar[bool] = False
    in_parallel: ClassVar[bool] = False
    fills_in: ClassVar[bool] = False
    tokens_per_step: ClassVar[int] = 1
    names_copies: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    drafts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject a negative number."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The tokens of a grid at several scales (quantizer `scales`), a scale in each pass (VAR)."""

    kind: Literal["scale"] = "scale"
    scales: tuple[int, ...] = ()
    """Sides of the tokenizer's scales; none is 1, 2, 4 and so on up to the side of the grid."""
    code_dim: int = 8
    """Channels of the tokenizer's codes, of whose sums the inputs are made."""

    reads: ClassVar[Reads] = "kept"
    layout: ClassVar[LayoutKind] = "scales"
    merges: ClassVar[bool] = True
    is_anchored: ClassVar[bool] = False
    gap_in_bits: ClassVar[bool] = False
    in_parallel: ClassVar[bool] = False
    fills_in: ClassVar[bool] = False
    tokens_per_step: ClassVar[int] = 1
    names_copies: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True
    drafts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject scales out of order, and codes of no channel."""
        check_numbers(self)
        if self.scales:
            check_scales(self.scales)

    def scales_of(self, side: int) -> tuple[int, ...]:
        """Sides of the scales of a square grid.

        Examples:
            >>> Scale().scales_of(8), Scale().scales_of(6), Scale(scales=(2, 8)).scales_of(8)
            ((1, 2, 4, 8), (1, 2, 4, 6), (2, 8))
        """
        halves = (2**power for power in range(side.bit_length()) if 2**power < side)
        return self.scales or (*halves, side)


Order = Raster | Merge | Random | Anchored | Masked | Stream | Ordered | Holistic | Scale
"""How sequences are ordered and decoded."""
