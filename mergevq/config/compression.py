"""Settings of `mergevq compress`; no torch."""

from dataclasses import dataclass, fields

from mergevq.config.base import require
from mergevq.config.ranges import check_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How many tokens a picture is given: at most one of these, none is the tokenizer's own K."""

    num_kept: int | None = None
    """K, of each tile."""
    psnr: float | None = None
    """Least PSNR in dB: the fewest tokens that reach it."""
    lpips: float | None = None
    """Largest LPIPS distance: the fewest tokens that stay below it."""
    bits_per_pixel: float | None = None
    """Most bits of the file for each pixel of the picture: the most tokens that fit."""

    def __post_init__(self) -> None:
        """Reject two targets at once, and impossible ones."""
        check_numbers(self)
        given = [item.name for item in fields(self) if getattr(self, item.name) is not None]
        require(
            len(given) <= 1,
            f"{len(given)} targets ({', '.join(given)}) are given, and at most 1 can be met: "
            "leave the others out",
        )
