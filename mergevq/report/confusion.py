"""Pictures of a probe: its confusion matrix, and images beside their nearest neighbours.

Shape letters: Y classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mergevq.report.lettering import Font, drawable, shown_names
from mergevq.report.pictures import contact_sheet

_MARGIN = 16
_TEXT_SIZE = 13
_TITLE_SIZE = 15
_INK = (24, 24, 24)
_FAINT_INK = (80, 80, 80)
_LIGHT_INK = (255, 255, 255)
_FULL = np.array([16, 60, 120])
"""Colour of a cell that holds all images of its class; an empty one is white."""
_LINE = (205, 205, 205)
_MAX_COUNTED = 20
"""Classes up to which cells show their counts."""
_MAX_NAMED = 64
"""Classes up to which rows and columns show their names."""
_MAX_LETTERS = 18
"""Most letters of a class name; longer ones are cut."""
_SIDE = 840
"""About the side of the matrix in pixels when it has many classes."""


def confusion_picture(
    matrix: Int64[Tensor, "y y"], class_names: Sequence[str], title: str
) -> Image.Image:
    """Draw a confusion matrix: darker is a larger share of the images of the row's class.

    Args:
        matrix: images of each class (row) taken for each class (column).
        class_names: one per class.
        title: above the picture.

    Raises:
        ValueError: there are not as many names as classes.
    """
    counts = matrix.numpy()
    num_classes = len(counts)
    if len(class_names) != num_classes:
        raise ValueError(f"class_names ({len(class_names)}) must be one per class ({num_classes})")
    side = _cell_side(num_classes, int(counts.max()))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colours = (255 + shares[..., None] * (_FULL - 255)).round().astype(np.uint8)
    cells = Image.fromarray(colours.repeat(side, 0).repeat(side, 1))
    draw = ImageDraw.Draw(cells)
    if side >= 8:
        for place in range(0, num_classes * side + 1, side):
            draw.line([(place, 0), (place, cells.height)], _LINE)
            draw.line([(0, place), (cells.width, place)], _LINE)
    if num_classes <= _MAX_COUNTED:
        font = ImageFont.load_default(_TEXT_SIZE)
        for row, column in zip(*counts.nonzero(), strict=True):
            centre = ((column + 0.5) * side, (row + 0.5) * side)
            ink = _LIGHT_INK if shares[row, column] > 0.5 else _INK
            draw.text(centre, str(counts[row, column]), ink, font, anchor="mm")
    labels = shown_names(class_names) if num_classes <= _MAX_NAMED else []
    return _framed(cells, [_cut(name) for name in labels], side, title)


def _cell_side(num_classes: int, highest: int) -> int:
    """Pixels per cell: room for a count, else for a name, else what is left."""
    if num_classes <= _MAX_COUNTED:
        return max(30, 8 * len(str(highest)) + 12)
    return 18 if num_classes <= _MAX_NAMED else max(1, _SIDE // num_classes)


def _cut(name: str) -> str:
    """A class name that is short enough."""
    return name if len(name) <= _MAX_LETTERS else name[: _MAX_LETTERS - 2] + ".."


def _framed(cells: Image.Image, names: Sequence[str], side: int, title: str) -> Image.Image:
    """Put a title above the cells and the class names beside and below them."""
    axes = "rows: true class, columns: predicted class"
    _, font = drawable("".join([axes, *names]), _TEXT_SIZE)
    title, title_font = drawable(title, _TITLE_SIZE)
    widest = max((round(font.getlength(name)) for name in names), default=0)
    left, top = _MARGIN + widest + 8, _MARGIN + 2 * _TITLE_SIZE + 20
    words = max(round(title_font.getlength(title)), round(font.getlength(axes)))
    width = max(left + cells.width, _MARGIN + words) + _MARGIN
    picture = Image.new("RGB", (width, top + cells.height + widest + 8 + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, _INK, title_font)
    draw.text((_MARGIN, _MARGIN + _TITLE_SIZE + 8), axes, _FAINT_INK, font)
    picture.paste(cells, (left, top))
    for number, name in enumerate(names):
        middle = round((number + 0.5) * side)
        draw.text((left - 6, top + middle), name, _FAINT_INK, font, anchor="rm")
        text = _upwards(name, font)
        place = (left + middle - text.width // 2, top + cells.height + 6)
        picture.paste(text, place)
    return picture


def _upwards(name: str, font: Font) -> Image.Image:
    """A name to read from below."""
    _, first, right, bottom = font.getbbox(name)
    picture = Image.new("RGB", (max(1, round(right)), max(1, round(bottom - first) + 2)), "white")
    ImageDraw.Draw(picture).text((0, 1 - first), name, _FAINT_INK, font)
    return picture.rotate(90, expand=True)


class Example(NamedTuple):
    """An image on a sheet of neighbours."""

    image: Image.Image
    class_name: str
    similarity: float | None = None
    """To the query; None for the query itself."""


def neighbours_picture(rows: Sequence[tuple[Example, Sequence[Example]]]) -> Image.Image:
    """Show queries, a row each, with their nearest training images, the nearest first.

    A neighbour of another class than the query's is marked `x`.
    """
    images, captions = [], []
    for query, neighbours in rows:
        images.append([query.image, *(found.image for found in neighbours)])
        captions.append([_cut(query.class_name), *(_caption(query, found) for found in neighbours)])
    num_neighbours = len(images[0]) - 1
    titles = ["query", *(f"neighbour {place + 1}" for place in range(num_neighbours))]
    return contact_sheet(images, titles, captions=captions)


def _caption(query: Example, found: Example) -> str:
    """Class and similarity of a neighbour."""
    mark = "" if found.class_name == query.class_name else "x "
    return f"{mark}{_cut(found.class_name)} {found.similarity:.3f}"
