"""Bytes of pictures to upright RGB, and pictures to tensors: squares, crops and flips.

Only a fixed list of formats is opened, whatever a file is called: Pillow would hand PostScript to
an interpreter. The number of pixels is compared with a limit before any is decoded.

Source: Szegedy et al. 2015, "Going Deeper with Convolutions", section 6 (arXiv:1409.4842) for the
random resized crop.

Shape letters: B batch, S image side.
"""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mergevq.config.base import MAX_PIXELS
from mergevq.runtime.files import require_regular

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

# A 1 x 60,000 strip would become 64 x 3,840,000: from this ratio on it is cut before it is resized.
_LONGEST_ASPECT = 16
CROP_SCALE = (0.08, 1.0)
"""Smallest and largest share of the area that a random resized crop takes."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Its smallest and largest width over height."""
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


class Reduced(NamedTuple):
    """A picture that may be smaller than its file has it."""

    image: Image.Image
    """Upright RGB."""
    factor: int
    """Sides in the file over sides of the picture: 1, 2, 4 or 8, and exactly that."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the content of an image file to upright RGB, transparent parts on white.

    Raises:
        ValueError: no image of `FORMATS`, damaged, larger than `max_pixels`, or a mode of no
            defined range.
    """
    return decode_reduced(data, None, max_pixels=max_pixels).image


def decode_reduced(data: bytes, least_side: int | None, *, max_pixels: int = MAX_PIXELS) -> Reduced:
    """Decode, a large JPEG at a half, a quarter or an eighth of its size: 3 to 6 times faster.

    What is resized from it afterwards differs from what the whole picture gives: by a third of a
    level of 255 in the mean of photographs where `least_side` is three times the side it is resized
    to, by one level where it is twice, by two where it is once.

    Args:
        data: content of an image file.
        least_side: shortest side, in pixels, that must be left; None decodes whole.
        max_pixels: largest width times height of the file.

    Raises:
        ValueError: as `decode`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            _require_few_pixels(image, max_pixels)
            factor = 1 if least_side is None else _reduction(image, least_side)
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            return Reduced(to_rgb(image), factor)
    except UnidentifiedImageError as error:
        raise ValueError("no image format that is read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"more pixels than max_pixels ({max_pixels:,}): {error}") from error
    except Exception as error:
        # Damaged files make Pillow raise from a dozen unrelated types.
        raise ValueError(str(error) or type(error).__name__) from error


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of the content of an image file, upright; no pixel is decoded.

    Raises:
        ValueError: no image of `FORMATS`, or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in {5, 6, 7, 8}
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return (height, width) if turned else (width, height)


def _reduction(image: Image.Image, least_side: int) -> int:
    """How many times smaller a picture may be decoded."""
    shortest, longest = min(image.size), max(image.size)
    if image.format != "JPEG" or longest > _LONGEST_ASPECT * shortest:
        return 1
    # Sides that are no multiples would be rounded up, and crops would lie elsewhere.
    return next(
        factor
        for factor in (8, 4, 2, 1)
        if (shortest >= factor * least_side and not any(side % factor for side in image.size))
        or factor == 1
    )


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


# Preparation


class Loaded(NamedTuple):
    """A batch that a loader of the package gave, so its values are in [-1, 1]: none is read.

    A look at them on a GPU would make the host wait for it.
    """

    image: Float[Tensor, "b 3 h w"]
    """Where and in the type that the model takes."""


Pictures = (
    Loaded
    | Float[Tensor, "b 3 h w"]
    | Float[Tensor, "3 h w"]
    | Float[np.ndarray, "b 3 h w"]
    | Float[np.ndarray, "3 h w"]
    | UInt8[np.ndarray, "b h w 3"]
    | UInt8[np.ndarray, "h w 3"]
    | Image.Image
    | Sequence[Image.Image]
)
"""Forms of images that `to_batch` takes."""
_OVERSHOOT = 0.05
"""Distance beyond [-1, 1] that is let through: a resize may overshoot slightly."""


def to_batch(image: Pictures, like: Tensor) -> Float[Tensor, "b 3 h w"]:
    """The one conversion of pictures, arrays and tensors to what a model takes.

    - A PIL image of any mode, or several of one size: `to_rgb`, then 0..255 to [-1, 1].
    - A uint8 array (h, w, 3) or (b, h, w, 3), 0..255: to [-1, 1].
    - A floating-point array or tensor (3, h, w) or (b, 3, h, w), in [-1, 1] already: as it is.
    - `Loaded`: its tensor, unchecked.

    Sizes stay as they are. A tensor is not copied, cast or moved.

    Args:
        image: see above.
        like: a tensor whose type and device pictures and arrays get.

    Raises:
        ValueError: another kind, dtype, rank, number of channels or range.
    """
    if isinstance(image, Loaded):
        return image.image
    if isinstance(image, Sequence) and not isinstance(image, str | bytes):
        image = _stacked(image).to(like)
    elif isinstance(image, Image.Image):
        image = to_tensor(to_rgb(image)).to(like)
    elif isinstance(image, np.ndarray):
        image = _from_array(image).to(like)
    if not isinstance(image, Tensor):
        raise ValueError(
            f"image is {type(image).__name__} and must be a PIL image or several, a uint8 array "
            "(h, w, 3), or a float array or tensor (b, 3, h, w); for a file use load_picture"
        )
    return _checked(image[None] if image.ndim == 3 else image)


def _stacked(images: Sequence[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    """Pictures of one size, one after the other.

    Raises:
        ValueError: there are none, something else is among them, or sizes differ.
    """
    others = [type(each).__name__ for each in images if not isinstance(each, Image.Image)]
    if others or not images:
        raise ValueError(
            f"image is a sequence of {len(images)}, with {others[0] if others else 'nothing'} in "
            "it, and must be of 1 or more PIL images; stack arrays and tensors to one"
        )
    sizes = list(dict.fromkeys(each.size for each in images))
    if len(sizes) > 1:
        (width, height), (other_width, other_height) = sizes[:2]
        raise ValueError(
            f"pictures of a batch must have one size, and there are {width} x {height} and "
            f"{other_width} x {other_height}; crop_square makes them equal"
        )
    return torch.stack([to_tensor(to_rgb(each)) for each in images])


def _from_array(array: np.ndarray) -> Float[Tensor, "*b 3 h w"]:
    """An array as a tensor, bytes in [-1, 1].

    Raises:
        ValueError: another dtype, or bytes of another shape.
    """
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"image has dtype {array.dtype} and must be uint8 in 0..255 or floating point in "
                "[-1, 1]; of 8-bit values make image.astype(numpy.uint8)"
            )
        # A copy: torch has no negative strides, and warns of memory that is not to be written.
        return torch.from_numpy(np.array(array))
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(
            f"image of bytes has shape {array.shape} and must be (h, w, 3) or (b, h, w, 3); grey "
            "or transparent ones go through PIL.Image.fromarray"
        )
    return to_float(torch.from_numpy(np.array(array)).movedim(-1, -3))


def _checked(image: Tensor) -> Float[Tensor, "b 3 h w"]:
    """A batch as it is; a ValueError unless it is floating point, of 3 channels, in [-1, 1]."""
    if not image.is_floating_point():
        raise ValueError(
            f"image has dtype {image.dtype} and must be floating point in [-1, 1]; "
            "for bytes in 0..255 use image / 127.5 - 1"
        )
    if image.ndim != 4:
        raise ValueError(
            f"image has {image.ndim} dimensions and must have 4 (b, 3, h, w) or 3 (3, h, w)"
        )
    if image.shape[1] != 3:
        raise ValueError(
            f"image has shape {tuple(image.shape)} and must have 3 channels in the second place "
            "(b, 3, h, w); with channels last use image.movedim(-1, -3)"
        )
    if torch.compiler.is_compiling() or image.numel() == 0:
        return image
    # Together, as each read waits for the device.
    low, high = torch.stack(image.aminmax()).tolist()
    if not (low >= -1 - _OVERSHOOT and high <= 1 + _OVERSHOOT):
        raise ValueError(
            f"image values ({low:.4g} to {high:.4g}) must be finite and between -1 and 1; "
            "for values in 0..1 use 2 * image - 1, for bytes image / 127.5 - 1"
        )
    return image


def to_float(pixels: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Bytes to [-1, 1]."""
    image = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return image.div_(127.5).sub_(1)


def to_tensor(image: Image.Image) -> Float[Tensor, "3 h w"]:
    """RGB image to [-1, 1].

    Raises:
        ValueError: the image has another mode.
    """
    if image.mode != "RGB":
        raise ValueError(f"image mode ({image.mode}) must be RGB; decoding.to_rgb converts it")
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def load_square(
    image: Image.Image, size: int, generator: torch.Generator | None = None
) -> Float[Tensor, "3 s s"]:
    """Prepare an RGB image for the model: `crop_square`, then `to_tensor`."""
    return to_tensor(crop_square(image, size, generator))


def crop_square(
    image: Image.Image,
    size: int,
    generator: torch.Generator | None = None,
    *,
    bilinear: bool = False,
) -> Image.Image:
    """Resize the short side to `size` (bicubic, antialiased), then keep a square of that side.

    Args:
        image: RGB; one that already has the size comes back unchanged.
        size: side in pixels.
        generator: draws the square's place; None keeps the centre.
        bilinear: resize so instead.
    """
    image = resize_short_side(image, size, generator, bilinear=bilinear)
    return _cut(image, size, generator)


def resize_short_side(
    image: Image.Image,
    size: int,
    generator: torch.Generator | None = None,
    *,
    bilinear: bool = False,
) -> Image.Image:
    """Resize so that the short side has `size`; of a strip keep a part first.

    Args:
        image: RGB.
        size: short side in pixels.
        generator: draws the place of a strip's part; None keeps the centre.
        bilinear: resize so, not bicubic.
    """
    if is_strip(image.size):
        image = _cut(image, min(image.size), generator)
    resized = resized_size(image.size, size)
    if resized == image.size:
        return image
    method = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    return image.resize(resized, method)


def resized_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Width and height of a picture after its short side is resized."""
    scale = short_side / min(size)
    width, height = (max(short_side, round(side * scale)) for side in size)
    return width, height


def is_strip(size: tuple[int, int]) -> bool:
    """Whether a picture is so long that a part of it is taken before it is resized."""
    return max(size) > _LONGEST_ASPECT * min(size)


def _cut(image: Image.Image, side: int, generator: torch.Generator | None) -> Image.Image:
    """Keep the centre square, or one at a random place."""
    if image.size == (side, side):
        return image
    left, top = square_place(image.size, side, generator)
    return image.crop((left, top, left + side, top + side))


def square_place(
    size: tuple[int, int], side: int, generator: torch.Generator | None
) -> tuple[int, int]:
    """Left and top of the square that is kept of a picture.

    Args:
        size: width and height of the picture.
        side: of the square.
        generator: draws the place, unless there is only one; None is the centre.
    """
    width, height = size
    if generator is None or size == (side, side):
        return (width - side) // 2, (height - side) // 2
    return _draw(width - side + 1, generator), _draw(height - side + 1, generator)


def _draw(count: int, generator: torch.Generator) -> int:
    """A uniform whole number in [0, count)."""
    return int(torch.randint(count, (), generator=generator))


def random_flip(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Mirror left and right with probability one half."""
    return ImageOps.mirror(image) if is_flipped(generator) else image


def is_flipped(generator: torch.Generator) -> bool:
    """Whether the next picture is mirrored: half of them are."""
    return bool(_draw(2, generator))


def random_resized_crop(
    image: Image.Image,
    size: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
    factor: int = 1,
) -> Image.Image:
    """Resize a random rectangle to a square.

    Args:
        image: RGB.
        size: side of the result, in pixels.
        generator: draws the rectangle.
        scale: smallest and largest share of the area, drawn uniformly.
        ratio: smallest and largest width over height, drawn uniformly in its logarithm. An image
            so long that ten draws do not fit gives its centre square.
        factor: of a picture that was decoded smaller; the rectangle is drawn in the file's pixels.
    """
    full_width, full_height = factor * image.width, factor * image.height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area_draw, ratio_draw = torch.rand(2, generator=generator).tolist()
        area = full_width * full_height * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(low + ratio_draw * (high - low))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            left = _draw(full_width - width + 1, generator)
            top = _draw(full_height - height + 1, generator)
            right, bottom = left + width, top + height
            box = (left / factor, top / factor, right / factor, bottom / factor)
            return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return crop_square(image, size)
