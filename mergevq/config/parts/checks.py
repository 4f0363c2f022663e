"""Rules that parts of several seams share; no torch."""

from typing import Literal

from mergevq.config.base import require

LayoutKind = Literal["source", "ordered"]
"""Layout of kept tokens: each cell of the grid has one (a source map), or their order is all."""


def require_heads(what: str, width: int, num_heads: int, name: str) -> None:
    """Raise `ValueError` unless a width divides into heads."""
    require(
        width % num_heads == 0,
        f"{what} ({width}) must be a multiple of {name} ({num_heads})",
    )


def require_cnn(channels: int, channel_mult: tuple[int, ...]) -> None:
    """Raise `ValueError` unless levels exist and have whole normalisation groups."""
    require(len(channel_mult) > 0, "channel_mult () must name one multiple per CNN level")
    groups = min(32, channels)
    require(
        all((channels * mult) % groups == 0 for mult in channel_mult),
        f"channels ({channels}) times each of channel_mult {channel_mult} must be a multiple of "
        f"the {groups} normalisation groups",
    )
