"""Literals, the format's version and the check that all settings share; no torch."""

import math
from dataclasses import fields, is_dataclass
from typing import Literal

FORMAT_VERSION = 1
"""Version of `config.json`; raised when a field changes its meaning."""

MAX_PIXELS = 89_478_485
"""Largest picture that is read by default, as width times height: 256 MiB in 8-bit RGB."""

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


def check_numbers(settings: object, where: str = "") -> None:
    """Check every number of a dataclass of settings, and of those inside it.

    Args:
        settings: the dataclass; every run is checked when it is made.
        where: dotted name of this object in messages; empty for the outermost.

    Raises:
        ValueError: a number is infinite, NaN or beyond 64 bits, which no record could keep.
    """
    for item in fields(settings):  # pyright: ignore[reportArgumentType]
        name, value = f"{where}{item.name}", getattr(settings, item.name)
        if is_dataclass(value):
            check_numbers(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            too_large = isinstance(number, int) and abs(number) >= 2**63
            if too_large or (isinstance(number, float) and not math.isfinite(number)):
                raise ValueError(f"{name} ({value}) must be a finite number of at most 64 bits")


def check_max_pixels(max_pixels: int) -> None:
    """Check a limit on the pixels of a picture, wherever one is given.

    Raises:
        ValueError: below 1, or more than twice the default: a few pictures would fill the memory.
    """
    require(
        1 <= max_pixels <= 2 * MAX_PIXELS,
        f"max_pixels ({max_pixels}) must be between 1 and {2 * MAX_PIXELS}",
    )


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
