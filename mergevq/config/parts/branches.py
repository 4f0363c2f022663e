"""Settings of branches: which of the encoder's blocks latents are read after; no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class OneBranch:
    """All channels are read after the last block, and the decoder is given all of them."""

    kind: Literal["one"] = "one"

    semantic_dim: ClassVar[int] = 0
    taps: ClassVar[tuple[int, ...]] = ()
    gains: ClassVar[tuple[float, ...]] = ()
    decodes: ClassVar[Literal["pixel", "both"]] = "both"


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoBranches:
    """Semantic channels after the last block, for the teacher; pixel ones after earlier blocks."""

    kind: Literal["two"] = "two"
    semantic_dim: int = 4
    """Semantic channels, the first of latents and codes; the others are pixel channels. A teacher
    is given the mean of their codes over tokens in place of the class token."""
    taps: tuple[int, ...] = (1,)
    """Blocks after which pixel channels are read; 0 is the stem. Several are projected each, and
    summed."""
    gains: tuple[float, ...] = (1.0,)
    """Factor of each tap in that sum."""
    decodes: Literal["pixel", "both"] = "pixel"
    """Channels that expander and decoder are given: the pixel ones alone (DualToken, TokenFlow), or
    all (ILLUME+)."""

    def __post_init__(self) -> None:
        """Reject taps without a factor each."""
        check_numbers(self)
        require(len(self.taps) > 0, "branches.taps () must name at least one block")
        require(
            len(self.gains) == len(self.taps),
            f"branches.gains {self.gains} must be as many as branches.taps {self.taps}",
        )


Branches = OneBranch | TwoBranches
