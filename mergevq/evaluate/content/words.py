"""Pictures with words whose places are known: rendered ones, and those of a file of JSON lines.

Rendered words have 4 to 6 characters of an alphabet in which no two look alike, in the font of
Pillow, one or two of them on a flat or a noisy background. Everything is drawn by the seed and the
number of the picture.

Shape letters: S side of the square pictures, in pixels.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator

from mergevq.data.images import spread
from mergevq.data.prepare import crop_square, load_picture, resized_size, square_place
from mergevq.runtime.random import step_generator

ALPHABET = "ACEFHJKLMNPRTUXY3467"
"""Characters that words are made of: of O and 0, I, 1 and l, S and 5, B and 8, Z and 2, G and 6, V,
W and their small twins at most one is here."""
HEIGHTS = (8.0, 20.0)
"""Least height of a rendered word, in pixels, and the height that all are below."""
_LETTERS = (4, 6)
_LEAST_SIDE = 48
"""Side of the smallest pictures that any 4 letters fit into, in pixels."""
_CONTRAST = 110
"""Least difference of the brightness of words and background, of 255."""
_CAPITAL = 0.73
"""Height of capitals by the size of the font."""
_NOISE = 20
"""Standard deviation of a noisy background, of 255."""


class Word(NamedTuple):
    """A word in a picture."""

    text: str
    box: tuple[float, float, float, float]
    """Left, top, right and bottom, in pixels of the square."""

    @property
    def height(self) -> float:
        """Height of its box, in pixels."""
        return float(self.box[3] - self.box[1])


class Written(NamedTuple):
    """A square picture and its words."""

    image: Image.Image
    words: list[Word]
    num_outside: int = 0
    """Words of the file that are not wholly in the square."""


# -------------------------------------------------------------------------------------- rendered


def rendered(count: int, side: int, seed: int) -> Iterator[Written]:
    """Pictures with one or two words each.

    Args:
        count: pictures.
        side: S, at least 48.
        seed: of all that is drawn; a picture does not depend on how many there are.

    Raises:
        ValueError: the side is too small for the words.
    """
    if side < _LEAST_SIDE:
        raise ValueError(
            f"image_size ({side}) must be at least {_LEAST_SIDE} for words of "
            f"{_LETTERS[0]} letters; take a tokenizer of larger images, or give --image-size"
        )
    for number in range(count):
        generator = step_generator(seed, "rendered text", number)
        yield _render(side, generator)


def _render(side: int, generator: Generator) -> Written:
    """One picture."""
    ground = np.array([_integer(0, 256, generator) for _ in range(3)])
    step = -16 if _brightness(ground) >= 128 else 16
    ink = ground.copy()
    while abs(_brightness(ink) - _brightness(ground)) < _CONTRAST:
        ink = (ink + step).clip(0, 255)
    pixels = np.broadcast_to(ground, (side, side, 3)).astype(np.float32)
    if _integer(0, 2, generator):
        noise = torch.randn(side, side, 3, generator=generator).numpy()
        pixels = pixels + _NOISE * noise
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    num_words = _integer(1, 3, generator)
    words = []
    for place in range(num_words):
        rows = (side * place // num_words, side * (place + 1) // num_words)
        words.append(_write(image, rows, tuple(ink.tolist()), generator))
    return Written(image, words)


def _write(
    image: Image.Image, rows: tuple[int, int], colour: tuple[int, ...], generator: Generator
) -> Word:
    """Draw a word between two rows; where it does not fit, with fewer letters, then smaller."""
    draw = ImageDraw.Draw(image)
    letters = _integer(_LETTERS[0], _LETTERS[1] + 1, generator)
    text = "".join(ALPHABET[_integer(0, len(ALPHABET), generator)] for _ in range(letters))
    drawn = torch.rand(3, generator=generator).tolist()
    wanted = HEIGHTS[0] + drawn[0] * (HEIGHTS[1] - HEIGHTS[0])
    room = (image.width - 2, rows[1] - rows[0] - 2)
    font, box = _font(wanted), draw.textbbox((0, 0), text, font=_font(wanted))
    while box[2] - box[0] > room[0] or box[3] - box[1] > room[1]:
        if len(text) > _LETTERS[0]:
            text = text[:-1]
        else:
            wanted -= 0.5
        font = _font(wanted)
        box = draw.textbbox((0, 0), text, font=font)
    left = 1 + round(drawn[1] * (room[0] - (box[2] - box[0]))) - box[0]
    top = rows[0] + 1 + round(drawn[2] * (room[1] - (box[3] - box[1]))) - box[1]
    draw.text((left, top), text, font=font, fill=colour)
    return Word(text, draw.textbbox((left, top), text, font=font))


def _font(height: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of Pillow with capitals of a height in pixels."""
    return ImageFont.load_default(size=height / _CAPITAL)


def _integer(low: int, high: int, generator: Generator) -> int:
    """A uniform whole number in [low, high)."""
    return int(torch.randint(low, high, (), generator=generator))


def _brightness(colour: np.ndarray) -> float:
    """Brightness of a colour, from 0 to 255."""
    return float(colour @ np.array([0.299, 0.587, 0.114]))


# ------------------------------------------------------------------------------------ from a file


def written(
    path: Path, side: int, *, max_images: int | None = None, max_pixels: int
) -> Iterator[Written]:
    """Pictures of a file of JSON lines, each the centre square, with the words that are in it.

    A line is `{"image": "a.jpg", "box": [left, top, right, bottom], "text": "HOUSE"}`, a word; the
    path is seen from the file's folder, the box is in pixels of the picture.

    Args:
        path: of the file.
        side: S, that the short side is resized to.
        max_images: only so many pictures, evenly spaced; None is all.
        max_pixels: largest picture that is read, as width times height.

    Raises:
        ValueError: the file or a picture is not there or cannot be read, or a line is another.
    """
    pictures = _by_picture(path)
    names = list(pictures)
    for position in spread(len(names), min(max_images or len(names), len(names))):
        name = names[position]
        picture = load_picture(path.parent / name, max_pixels=max_pixels)
        yield _in_square(picture, pictures[name], side)


def _in_square(picture: Image.Image, words: Sequence[Word], side: int) -> Written:
    """The centre square of a picture, and the words that are wholly in it."""
    width, height = resized_size(picture.size, side)
    left, top = square_place((width, height), side, None)
    inside = []
    for word in words:
        along, down = width / picture.width, height / picture.height
        x0, y0, x1, y1 = word.box
        box = (x0 * along - left, y0 * down - top, x1 * along - left, y1 * down - top)
        if min(box[:2]) >= 0 and max(box[2:]) <= side:
            inside.append(Word(word.text, box))
    return Written(crop_square(picture, side), inside, len(words) - len(inside))


def _by_picture(path: Path) -> dict[str, list[Word]]:
    """Words by the name of their picture, in the order of the file.

    Raises:
        ValueError: the file is not there, has no line, or a line is another.
    """
    if not path.is_file():
        raise ValueError(
            f"data ({path}) must be `rendered` or a file of JSON lines, each with image, box and "
            "text; there is no such file"
        )
    pictures: dict[str, list[Word]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            name, word = _read_line(f"{path}, line {number}", line)
            pictures.setdefault(name, []).append(word)
    if not pictures:
        raise ValueError(f"{path} has no line: each is a word, with image, box and text")
    return pictures


def _read_line(where: str, line: str) -> tuple[str, Word]:
    """Name of the picture, and its word.

    Raises:
        ValueError: the line is another.
    """
    wanted = '{"image": "a.jpg", "box": [left, top, right, bottom], "text": "HOUSE"}'
    try:
        record: Any = json.loads(line)
        name, text = record["image"], record["text"]
        left, top, right, bottom = (float(each) for each in record["box"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} must be {wanted}") from error
    if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} must be {wanted}, with a text that is not empty")
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(
            f"{where}: box {record['box']} must be left, top, right and bottom in pixels, left "
            "less than right and top less than bottom"
        )
    return name, Word(text.strip(), (left, top, right, bottom))
