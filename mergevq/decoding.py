"""Turn the bytes of one picture, which may be a stranger's, into upright RGB.

Only a fixed list of formats is opened, whatever a file is called: Pillow would hand PostScript to
an interpreter. The number of pixels is compared with a limit before any is decoded.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mergevq.config import MAX_PIXELS
from mergevq.files import require_regular

FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2k", ".jp2"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Endings of file names, in lower case, by each format of Pillow that is read."""
ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
"""Endings of the names of pictures that are read."""

_PLAIN_BYTES = 2**26
"""Bytes a file may have for other things than pixels."""


class BrokenImageError(RuntimeError):
    """One image cannot be read; the others of its data set may be fine."""


def most_bytes(max_pixels: int) -> int:
    """Largest file that is read of a picture: 4 bytes for each pixel, and 64 MiB."""
    return 4 * max_pixels + _PLAIN_BYTES


def load_picture(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as upright RGB.

    Args:
        path: regular file in one of `FORMATS`, whatever its name.
        max_pixels: largest width times height that is decoded.

    Raises:
        ValueError: it is missing, no image of these formats, damaged, or too large.
    """
    try:
        return decode(read_bounded(Path(path), most_bytes(max_pixels)), max_pixels=max_pixels)
    except (OSError, ValueError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def read_bounded(path: Path, most: int) -> bytes:
    """Content of a regular file.

    Raises:
        ValueError: no regular file, or one of more than `most` bytes.
    """
    require_regular(path)
    with path.open("rb") as file:
        data = file.read(most + 1) if path.stat().st_size <= most else b""
        if len(data) > most or path.stat().st_size > most:
            raise ValueError(f"the file is larger than the {most:,} bytes that are read of one")
    return data


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the content of an image file to upright RGB, transparent parts on white.

    Raises:
        ValueError: no image of `FORMATS`, damaged, larger than `max_pixels`, or a mode of no
            defined range.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            _require_few_pixels(image, max_pixels)
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("no image format that is read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"more pixels than max_pixels ({max_pixels:,}): {error}") from error
    except Exception as error:
        # Damaged files make Pillow raise from a dozen unrelated types.
        raise ValueError(str(error) or type(error).__name__) from error


def _require_few_pixels(image: Image.Image, max_pixels: int) -> None:
    """Check the size before pixels are decoded.

    Raises:
        ValueError: there are too many.
    """
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{image.width:,} x {image.height:,} are {image.width * image.height:,} pixels, more "
            f"than max_pixels ({max_pixels:,})"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy in upright 8-bit RGB, of any mode, transparent parts on white.

    Raises:
        ValueError: the mode has no defined range.
    """
    # Known of an opened file only; turning loses it.
    kind = image.format
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("a float image has no defined range; save it with 8 bits per channel")
    if image.mode == "I" and kind not in ("PNG", "PPM"):
        raise ValueError(
            "an image of 32-bit integers has no defined range; save it with 8 or 16 bits per "
            "channel"
        )
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale 65535, which Pillow opens as 16 or 32 bits, to 255."""
    values = np.asarray(image).clip(0, 65535).astype(np.uint32)
    if 255 < values.max(initial=0) < 4096:
        warnings.warn(
            "a 16-bit picture has no value above 4095 and comes out nearly black: if it holds 12 "
            "bits, multiply its values by 16 and save it again",
            stacklevel=3,
        )
    # Whole numbers: floats of 13,000 x 13,000 pixels fill gigabytes.
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
