"""Pictures for people to look at: merge maps, and sheets of images with titles and captions.

Shape letters: L grid cells, H and W pixels.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from mergevq.metrics.image import to_uint8
from mergevq.report.lettering import drawable

_CELL_SIDE = 16
"""Least pixels per cell of a merge map: below that, borders would hide the colours."""
_BORDER_OPACITY = 0.6
"""Opacity of the black or white line between two groups; the colour below stays recognisable."""
_LIGHT = 80
"""Luma of 0..255 above which a line is black: low, so that mid-tones do not mix both kinds."""
_SHORT_SIDE = 128
"""Least pixels of an image on a sheet."""
_LARGEST_SHOWN, _LEAST_SHOWN = 1024, 32
"""Most pixels of an image's side on a sheet, and on one of very many."""
_LARGEST_SHEET = 8192
"""Pixels that the images of a row or column of a sheet may take together."""
_MARGIN = 16
_GAP = 12
_TEXT_GAP = 4
_TITLE_SIZE = 15
_CAPTION_SIZE = 13
_TITLE_INK = (24, 24, 24)
_CAPTION_INK = (80, 80, 80)
_PAPER = (255, 255, 255)


def to_pil(image: Float[Tensor, "3 h w"]) -> Image.Image:
    """An image in [-1, 1] as 8-bit RGB; a value that is not finite is a ValueError."""
    return Image.fromarray(to_uint8(image.detach()).permute(1, 2, 0).cpu().numpy())


def merge_map(
    image: Float[Tensor, "3 h w"], index: Int64[Tensor, " l"], grid_shape: tuple[int, int]
) -> Image.Image:
    """Paint every group of merged cells in its mean colour, with a line between groups.

    The picture is the image enlarged by the smallest whole number that makes a cell 16 pixels.

    Args:
        image: in [-1, 1].
        index: group of each cell in raster order, any integers; a group need not be contiguous.
        grid_shape: (height, width) in cells.

    Raises:
        ValueError: the grid does not have the cells of the index, or does not divide the image.
    """
    groups, colours = coloured_groups(image, index, grid_shape)
    (height, width), (rows, columns) = image.shape[1:], grid_shape
    scale = math.ceil(_CELL_SIDE / min(height // rows, width // columns))
    cell_shape = (scale * height // rows, scale * width // columns)
    painted = _enlarge(colours[groups], cell_shape)
    lines = _borders(_enlarge(groups, cell_shape))[..., None]
    light = painted @ (0.299, 0.587, 0.114) > _LIGHT
    line_colour = np.where(light, 0.0, 255.0)[..., None]
    blended = _BORDER_OPACITY * line_colour + (1 - _BORDER_OPACITY) * painted
    return Image.fromarray(np.where(lines, blended, painted).round().astype(np.uint8))


def coloured_groups(
    image: Float[Tensor, "3 h w"], index: Int64[Tensor, " l"], grid_shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Groups of merged cells and the mean colour of each.

    Args:
        image: in [-1, 1].
        index: group of each cell in raster order, any integers; a group need not be contiguous.
        grid_shape: (height, width) in cells.

    Returns:
        (height, width) numbers of groups, from 0 without gaps, and (groups, 3) colours in [0, 255].

    Raises:
        ValueError: the grid does not have the cells of the index, or does not divide the image.
    """
    (height, width), (rows, columns) = image.shape[1:], grid_shape
    if rows * columns != len(index):
        raise ValueError(f"grid_shape {grid_shape} must have the {len(index)} cells of the index")
    if height % rows or width % columns:
        raise ValueError(
            f"image size ({height} x {width}) must be a multiple of grid_shape {grid_shape}"
        )
    groups = np.unique(index.cpu().numpy(), return_inverse=True)[1].reshape(rows, columns)
    pixels = np.asarray(to_pil(image), dtype=np.float64)
    cells = pixels.reshape(rows, height // rows, columns, width // columns, 3).mean((1, 3))
    return groups, _mean_colours(cells, groups)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    scale: int | None = None,
    *,
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Lay images out in rows and columns on white, with text around them.

    A sheet is to be looked at: images are shrunk to at most 1,024 pixels a side, and further where
    there are so many that the sheet would be larger than about 8,192 pixels.

    Args:
        rows: images of any size, at least one; those of one row are shown equally high.
        column_titles: one above each column; empty for none.
        row_titles: one to the left of each row; empty for none.
        scale: pixels of the sheet per pixel of a row's smallest image; None is the smallest whole
            number that makes its short side 128 pixels.
        captions: text below each image, as many as there are in `rows`; empty for none. Every text
            may have several lines.

    Raises:
        ValueError: rows, titles and captions do not fit each other, or the scale is below 1.
    """
    _check_sheet(rows, column_titles, row_titles, captions)
    if scale is not None and scale < 1:
        raise ValueError(f"scale ({scale}) must be at least 1, or None")
    most = max(len(rows), *map(len, rows))
    limit = min(_LARGEST_SHOWN, max(_LEAST_SHOWN, _LARGEST_SHEET // most))
    table = [_equally_high(row, scale, limit) for row in rows]
    for row, texts in zip(table, captions, strict=False):
        row[:] = [
            _above(image, _text(text, _CAPTION_SIZE, _CAPTION_INK))
            for image, text in zip(row, texts, strict=True)
        ]
    if column_titles:
        table.insert(0, [_text(title, _TITLE_SIZE, _TITLE_INK) for title in column_titles])
    if row_titles:
        titles = [""] * bool(column_titles) + list(row_titles)
        for row, title in zip(table, titles, strict=True):
            row.insert(0, _text(title, _TITLE_SIZE, _TITLE_INK))
    return _paste(table)


def _mean_colours(cells: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean colour of each group, from (rows, columns, 3) colours and (rows, columns) groups."""
    sums = [np.bincount(groups.ravel(), cells[..., channel].ravel()) for channel in range(3)]
    return np.stack(sums, axis=-1) / np.bincount(groups.ravel())[:, None]


def _enlarge(cells: NDArray[Any], cell_shape: tuple[int, int]) -> NDArray[Any]:
    """Repeat every entry over a rectangle of (height, width)."""
    return cells.repeat(cell_shape[0], axis=0).repeat(cell_shape[1], axis=1)


def _borders(groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pixels whose right or lower neighbour is in another group."""
    borders = np.zeros(groups.shape, dtype=np.bool_)
    borders[:, :-1] |= groups[:, 1:] != groups[:, :-1]
    borders[:-1] |= groups[1:] != groups[:-1]
    return borders


def _check_sheet(
    rows: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    captions: Sequence[Sequence[str]],
) -> None:
    """Raise `ValueError` unless every image has its texts and every text its image."""
    if not rows or not all(rows):
        raise ValueError("rows must each hold at least one image")
    num_columns = max(len(row) for row in rows)
    if column_titles and len(column_titles) != num_columns:
        raise ValueError(
            f"column_titles ({len(column_titles)}) must be as many as columns ({num_columns})"
        )
    if row_titles and len(row_titles) != len(rows):
        raise ValueError(f"row_titles ({len(row_titles)}) must be as many as rows ({len(rows)})")
    if captions and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError("captions must have one text per image, in the same rows")


def _equally_high(row: Sequence[Image.Image], scale: int | None, limit: int) -> list[Image.Image]:
    """Bring the images of a row to one height, pixels square and, where enlarged, sharp.

    Args:
        row: the images.
        scale: as in `contact_sheet`.
        limit: largest side of an image that is shown.
    """
    smallest = min(row, key=lambda image: min(image.size))
    if scale is None:
        scale = math.ceil(_SHORT_SIDE / min(smallest.size))
    height = max(scale * smallest.height, *(image.height for image in row))
    widest = max(image.width / image.height for image in row)
    height = max(1, min(height, limit, int(limit / widest)))
    return [_to_height(image, height, limit) for image in row]


def _to_height(image: Image.Image, height: int, limit: int) -> Image.Image:
    """Resize to a height; whole factors repeat pixels, others interpolate.

    A line of one pixel's height is squeezed to the limit.
    """
    size = (min(limit, max(1, round(image.width * height / image.height))), height)
    whole = height % image.height == 0
    method = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method)


def _text(text: str, size: int, ink: tuple[int, int, int]) -> Image.Image:
    """Text on white, with room around it."""
    text, font = drawable(text, size)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, right, bottom = draw.multiline_textbbox((0, 0), text or " ", font)
    picture = Image.new("RGB", (math.ceil(right), math.ceil(bottom)), _PAPER)
    ImageDraw.Draw(picture).multiline_text((0, 0), text, ink, font)
    return picture


def _above(top: Image.Image, bottom: Image.Image) -> Image.Image:
    """Put one picture above another, with a small gap."""
    size = (max(top.width, bottom.width), top.height + _TEXT_GAP + bottom.height)
    picture = Image.new("RGB", size, _PAPER)
    picture.paste(top, (0, 0))
    picture.paste(bottom, (0, top.height + _TEXT_GAP))
    return picture


def _paste(table: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures as a table: columns as wide and rows as high as their largest."""
    num_columns = max(len(row) for row in table)
    widths = [max(row[i].width for row in table if i < len(row)) for i in range(num_columns)]
    heights = [max(picture.height for picture in row) for row in table]
    lefts = [_MARGIN + sum(widths[:i]) + i * _GAP for i in range(num_columns)]
    tops = [_MARGIN + sum(heights[:i]) + i * _GAP for i in range(len(table))]
    size = (lefts[-1] + widths[-1] + _MARGIN, tops[-1] + heights[-1] + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    for row, top in zip(table, tops, strict=True):
        for picture, left in zip(row, lefts, strict=False):
            sheet.paste(picture, (left, top))
    return sheet
