"""Settings of the heads of a generator, a tagged union; no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers

_NUM_BLOCKS = 4
"""Blocks of bits where no schedule is given, as in BAR's code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subindices:
    """A token as several sub-indices, each predicted from those before it."""

    kind: Literal["subindices"] = "subindices"
    sizes: tuple[int, ...] = (512, 512)
    """Values of each sub-index, the lowest digit of a token's index first; their product is the
    number of tokens that the tokenizer has. The authors have (64, 4096)."""
    num_layers: int = 1
    """Transformer blocks over the parts of one token."""

    def __post_init__(self) -> None:
        """Reject parts without a choice, and more tokens than indices."""
        check_numbers(self)
        _check_sizes(self.sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Independent:
    """A token as several sub-indices, each predicted from the state alone (ELM)."""

    kind: Literal["independent"] = "independent"
    sizes: tuple[int, ...] = (512, 512)
    """Values of each sub-index, as in `Subindices`."""
    num_layers: int = 1
    """Transformer blocks, here of a lone state, that the sub-indices share."""

    def __post_init__(self) -> None:
        """Reject parts without a choice, and more tokens than indices."""
        check_numbers(self)
        _check_sizes(self.sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bits:
    """A token as several sub-indices, its bits say, predicted block by block (BAR)."""

    kind: Literal["bits"] = "bits"
    sizes: tuple[int, ...] = (2,) * 18
    """Values of each sub-index, as in `Subindices`; with 2 each these are the bits of a token."""
    schedule: tuple[int, ...] = ()
    """Sub-indices in each block: they are predicted at once, from the blocks before. Empty is four
    blocks, or one for each of fewer sub-indices, as even as may be."""
    width: int | None = None
    """Width of the head; None is that of the transformer."""
    num_layers: int = 3
    """Feed-forward layers, each scaled, shifted and gated by the state."""
    masking: Literal["schedule", "mixed"] = "schedule"
    """Parts that training masks: each block of the schedule and all after it, in turn, which is the
    exact likelihood in a pass for each block; or, in one pass, random bits for half of the tokens
    and a random block and all after it for the others."""
    visible_weight: float = 0.1
    """Weight of visible parts in the loss with `mixed`, beside 1 for masked ones."""

    def __post_init__(self) -> None:
        """Reject parts without a choice, more tokens than indices, and blocks of other parts."""
        check_numbers(self)
        _check_sizes(self.sizes)
        require(
            sum(self.block_sizes) == len(self.sizes),
            f"schedule {self.schedule} has {sum(self.schedule)} sub-indices in its blocks and must "
            f"have all {len(self.sizes)} of sizes; leave it empty for even blocks",
        )

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Sub-indices in each block."""
        if self.schedule:
            return self.schedule
        count = min(_NUM_BLOCKS, len(self.sizes))
        # Rest in the last blocks, of which more is known.
        return tuple((len(self.sizes) + block) // count for block in range(count))


Head = Subindices | Independent | Bits
"""How the parts of a token are predicted."""


def _check_sizes(sizes: tuple[int, ...]) -> None:
    """Reject parts without a choice, and more tokens than indices."""
    require(
        min(sizes, default=0) >= 2 and math.prod(sizes) <= 2**63,
        f"sizes {sizes} must be numbers of values from 2, and their product at most 2**63",
    )
