"""Literals, the format's version and the check that all settings share; no torch."""

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args

FORMAT_VERSION = 2
"""Version of everything that is written; raised when a field changes its meaning."""

MAX_PIXELS = 89_478_485
"""Largest picture that is read by default, as width times height: 256 MiB in 8-bit RGB."""

BUNDLED_TOKENIZER = "photos64"
"""Name of the tokenizer that commands take when none is named; it comes with the package."""
BUNDLED_GENERATOR = "photos64_mergear"
"""Name of a generator of its tokens."""

Precision = Literal["auto", "bf16", "float32", "float16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
SizePolicy = Literal["error", "resize", "tile"]
"""Treatment of a picture of a size that the tokenizer was not trained on.

`error` takes only multiples of the patch size, and else names some. `resize` gives it about as many
pixels as a training image has, in its own aspect ratio. `tile` cuts it into overlapping
training-sized tiles, each with its own tokens, and blends them again.
"""


def require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads as an assertion
    """Raise `ValueError(message)` unless the condition holds."""
    if not condition:
        raise ValueError(message)


Stage = Literal["pre_merge", "merged", "unmerged", "latents", "quantized"]
"""Where in the tokenizer features are taken.

`pre_merge` runs with merging off: L tokens of C channels. `merged` is the tokens that are left,
`unmerged` these copied back to all L cells, `latents` their projections to D channels, `quantized`
the signs of those: the codes.
"""
Pool = Literal["none", "class", "mean", "size_weighted_mean"]
"""How tokens become one vector: not at all, the class token instead, their mean, the mean in which
a token counts as often as it has grid cells."""
ImagePool = Literal["class", "mean", "size_weighted_mean"]
"""The pools that give one vector per image."""


RecoverySource = Literal["given", "recovered"]
"""Source map that a decoder is given: the encoder's, or the one inferred from the tokens."""


def check_choice(name: str, value: object, choices: Any) -> None:  # noqa: ANN401 - a Literal
    """Raise `ValueError` unless a value is one of a `Literal`'s; a near one is suggested."""
    allowed = get_args(choices)
    if value in allowed:
        return
    hint = nearest(str(value), allowed)
    raise ValueError(f"{name} ({value!r}) must be one of {', '.join(map(repr, allowed))}{hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """End of a message about a mistyped word: the nearest known one, if any is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


LayoutKind = Literal["source", "ordered", "holistic", "scales"]
"""Layout of kept tokens: each cell of the grid has one (a source map), or their order is all, or
tokens of the whole image come first and those of the cells, in raster order, after them, or they
are those of a grid at several scales, the coarsest first."""


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
