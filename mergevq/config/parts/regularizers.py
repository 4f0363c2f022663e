"""Settings of regularizers, between quantizer and expander in training alone; no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class NoRegularizer:
    """None: the expander is given the codes as they are."""

    kind: Literal["none"] = "none"

    drops: ClassVar[bool] = False
    """Whether the last tokens of an image may be dropped, so that it has any number of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturb:
    """Some tokens become near but wrong ones, as a generator's mistakes are (RobustTok)."""

    kind: Literal["perturb"] = "perturb"
    image_share: float = 0.1
    """Share of the images that have wrong tokens."""
    token_share: float = 1.0
    """Share of such an image's tokens that become wrong."""
    num_near: int = 100
    """Codes that one is drawn from, of a codebook of 4,096; in other codebooks as large a share.
    Channels with levels (`fsq`) move by one level, whatever the number."""
    fall: tuple[float, float] = (0.2, 0.6)
    """Shares of the run between which `token_share` and `num_near` fall linearly."""
    final_ratio: float = 0.5
    """Ratio of both to their first values after the fall."""

    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Reject a fall that ends before it begins."""
        check_numbers(self)
        require(self.fall[0] <= self.fall[1], f"fall {self.fall} must end after it begins")


@dataclass(frozen=True, kw_only=True, slots=True)
class TailDrop:
    """The last ordered tokens are dropped: any first ones decode (One-D-Piece, FlexTok)."""

    kind: Literal["tail_drop"] = "tail_drop"
    lengths: Literal["uniform", "powers", "rounded"] = "uniform"
    """Tokens that an image keeps of K: 1 to K, all alike; a power of two or K, all alike; or one of
    1 to K, rounded up to such a power, and at most K."""

    drops: ClassVar[bool] = True

    def lengths_of(self, num_kept: int) -> tuple[int, ...]:
        """Numbers of tokens that one is drawn from, some of them several times.

        Examples:
            >>> TailDrop(lengths="powers").lengths_of(12)
            (1, 2, 4, 8, 12)
            >>> TailDrop(lengths="rounded").lengths_of(6)
            (1, 2, 4, 4, 6, 6)
        """
        counts = range(1, num_kept + 1)
        if self.lengths == "uniform":
            return tuple(counts)
        rounded = tuple(min(1 << (count - 1).bit_length(), num_kept) for count in counts)
        return rounded if self.lengths == "rounded" else tuple(sorted({*rounded}))


Regularizer = NoRegularizer | Perturb | TailDrop
