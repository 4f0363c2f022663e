"""Fonts for text in pictures: the one that comes with Pillow, or one of this machine's.

Pillow's own font has the letters of ASCII; every other one would be a box in its place.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_FILES = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "FreeSans.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "unifont.ttf"),
    *("Arial Unicode.ttf", "Arial.ttf", "PingFang.ttc", "segoeui.ttf", "msyh.ttc", "malgun.ttf"),
)
"""Fonts of Linux, macOS and Windows with many letters, looked for where the system keeps fonts."""
_NO_CHARACTER = "\U0010fffe"
"""Stands for no letter, so a font draws for it what it draws for all that it lacks."""


def font_for(text: str, size: int) -> Font | None:
    """A font that has every letter of a text; None if there is none on this machine.

    Args:
        text: of any number of lines.
        size: of the letters, in pixels.
    """
    letters = frozenset(text) - {"\n"}
    fonts = (None, *_FILES, *_bundled())
    for file in fonts:
        font = _load(file, size)
        if font is not None and _has(font, letters):
            return font
    return None


def drawable(text: str, size: int) -> tuple[str, Font]:
    """A text with `?` for each letter that no font here has, and the font to draw it in."""
    font = font_for(text, size)
    if font is not None:
        return text, font
    known = "".join(
        letter if letter == "\n" or font_for(letter, size) is not None else "?" for letter in text
    )
    font = font_for(known, size)
    if font is None:  # letters of several fonts, none of which has all
        known = "".join(letter if letter.isascii() else "?" for letter in text)
        font = ImageFont.load_default(size)
    return known, font


def shown_names(class_names: Sequence[str]) -> list[str]:
    """Names of classes as they can be drawn here, else their numbers, with a warning.

    Args:
        class_names: one per class, in label order.
    """
    missing = [name for name in class_names if font_for(name, 12) is None]
    if not missing:
        return list(class_names)
    warnings.warn(
        f"no font of this machine has the letters of {missing[0]!a}: pictures show the numbers of "
        "the classes; install one that has them (DejaVu, Noto)",
        stacklevel=2,
    )
    return [f"class {number}" for number in range(len(class_names))]


@lru_cache(maxsize=64)
def _load(file: str | None, size: int) -> Font | None:
    """A font by its file, Pillow's own without; None if the system has none such."""
    try:
        return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)
    except OSError:
        return None


@lru_cache(maxsize=1)
def _bundled() -> tuple[str, ...]:
    """The font that comes with matplotlib, if that is installed."""
    found = importlib.util.find_spec("matplotlib")
    places = [] if found is None else found.submodule_search_locations or []
    return tuple(str(Path(place) / "mpl-data/fonts/ttf/DejaVuSans.ttf") for place in places)


def _has(font: Font, letters: frozenset[str]) -> bool:
    """Whether a font has every one of some letters."""
    unknown = font.getmask(_NO_CHARACTER)
    drawn = (font.getmask(letter) for letter in letters if not letter.isspace())
    return all(
        (mask.size, bytes(mask)) != (unknown.size, bytes(unknown))  # pyright: ignore[reportArgumentType]
        for mask in drawn
    )
