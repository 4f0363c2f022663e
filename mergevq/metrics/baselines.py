"""JPEG, WebP, AVIF and JPEG XL of the same images in the same number of bytes.

Whole files count, headers included, as whole files are what is stored. On small images a header is
a large part, and the smallest possible file may be above the budget: that is said, not hidden.
"""

import bisect
import functools
import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from PIL import Image, features
from torch import Tensor

from mergevq.data.prepare import to_tensor
from mergevq.metrics.image import Mean, psnr

FileFormat = Literal["JPEG", "WebP", "AVIF", "JXL"]

QUALITIES: dict[FileFormat, range] = {
    "JPEG": range(1, 96),
    "WebP": range(101),
    "AVIF": range(101),
    "JXL": range(1, 100),
}
"""Settings of the encoders, worst first."""
# Tables made for the image: without them JPEG is some 200 bytes larger.
_OPTIONS: dict[FileFormat, dict[str, Any]] = {
    "JPEG": {"optimize": True},
    "WebP": {"method": 4},
    "AVIF": {"speed": 6},
    "JXL": {},
}
_JXL = "pillow_jxl"
"""Package that teaches Pillow JPEG XL."""


def file_formats() -> tuple[FileFormat, ...]:
    """Formats that this installation writes: AVIF is of newer Pillows, JPEG XL of a package."""
    found: list[FileFormat] = ["JPEG", "WebP"]
    if features.check("avif"):
        found.append("AVIF")
    if importlib.util.find_spec(_JXL) is not None:
        importlib.import_module(_JXL)
        found.append("JXL")
    return tuple(found)


def encoded(image: Image.Image, file_format: FileFormat, quality: int) -> bytes:
    """Content of the file of an RGB image, at one of `QUALITIES`."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=quality, **_OPTIONS[file_format])
    return buffer.getvalue()


class CompressedImage(NamedTuple):
    """An image as a file of a format."""

    quality: int
    """The encoder's setting."""
    num_bytes: int
    """Bytes of the file."""
    psnr: float
    """PSNR of the picture decoded from it, in dB."""


def compress_within(
    image: Image.Image, file_format: FileFormat, budgets: Sequence[int]
) -> list[CompressedImage]:
    """The best files of at most so many bytes; the smallest there is where none is small enough.

    Args:
        image: RGB.
        file_format: of the files.
        budgets: bytes of each.
    """
    qualities, original = QUALITIES[file_format], to_tensor(image)[None]
    file = functools.cache(functools.partial(encoded, image, file_format))
    found = []
    for budget in budgets:
        # Files grow with quality, but for a few bytes here and there.
        position = bisect.bisect_right(qualities, budget, key=lambda q: len(file(q))) - 1
        quality = qualities[max(0, position)]
        with Image.open(io.BytesIO(file(quality))) as decoded:
            value = psnr(original, to_tensor(decoded.convert("RGB"))[None])
        found.append(CompressedImage(quality, len(file(quality)), float(value)))
    return found


class BaselineMeasurement(NamedTuple):
    """One format at one budget, over all images of all ranks."""

    file_format: FileFormat | Literal["components"]
    """`components` is of `mergevq.evaluate.analytic`, at the bits of tokens and map."""
    budget_bytes: int
    """Bytes of one image: the tokens and the source map, rounded up to bytes."""
    mean_bytes: float
    """Mean bytes of the files."""
    psnr: float
    """Mean over images, in dB."""
    num_images: int
    num_above_budget: int
    """Images whose smallest file is above the budget."""


class Baselines:
    """Compresses images that arrive in batches.

    Args:
        budgets: bytes per image; equal ones are measured once.
        positions: which images to compress.
    """

    def __init__(self, budgets: Sequence[int], positions: Sequence[int]) -> None:
        self.budgets = sorted(set(budgets))
        self.positions = frozenset(positions)
        self.file_formats = file_formats()
        self._means = {
            (file_format, budget, name): Mean(name, infinite=name == "psnr")
            for file_format in self.file_formats
            for budget in self.budgets
            for name in ("psnr", "bytes", "above")
        }

    def update(self, pixels: UInt8[Tensor, "b 3 h w"], positions: Int64[Tensor, "b"]) -> None:
        """Compress those of the images that were chosen."""
        for image, position in zip(pixels.cpu(), positions.tolist(), strict=True):
            if position not in self.positions:
                continue
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            for file_format in self.file_formats:
                files = compress_within(picture, file_format, self.budgets)
                for budget, file in zip(self.budgets, files, strict=True):
                    values = {
                        "psnr": file.psnr,
                        "bytes": float(file.num_bytes),
                        "above": float(file.num_bytes > budget),
                    }
                    for name, value in values.items():
                        self._means[file_format, budget, name].update(torch.tensor([value]))

    def compute(self) -> list[BaselineMeasurement]:
        """Every format at every budget, over all ranks; every rank must call."""
        measured = []
        for file_format in self.file_formats:
            for budget in self.budgets:
                above, size, quality = (
                    self._means[file_format, budget, name].compute()
                    for name in ("above", "bytes", "psnr")
                )
                measured.append(
                    BaselineMeasurement(
                        file_format=file_format,
                        budget_bytes=budget,
                        mean_bytes=size.mean,
                        psnr=quality.mean,
                        num_images=size.num_items,
                        num_above_budget=round(above.mean * above.num_items),
                    )
                )
        return measured
