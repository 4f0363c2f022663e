"""Images as one array in an `.npz` file, as the ADM evaluator reads and writes them.

Source: Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", whose evaluator
reads samples as `arr_0`: 8-bit, (N, height, width, 3).

Such a file may be larger than memory, so it is written and read some images at a time.

Shape letters: B images at a time, H and W pixels.
"""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.lib import format as npy
from torch import Tensor

from mergevq.files import require_regular

MEMBER = "arr_0.npy"

# Some dozens are in memory at once; 2,048 x 2,048.
_MAX_PIXELS = 2**22


class ImageArrayWriter:
    """Writes images to an `.npz`, which takes its name when the last one is in.

    Args:
        path: of the file; an existing one is replaced.
        num_images: how many there will be.
        size: height and width in pixels.
    """

    def __init__(self, path: Path, num_images: int, size: tuple[int, int]) -> None:
        self.path, self.num_missing = path, num_images
        self._unfinished = path.with_name(path.name + ".unfinished")
        self._archive = zipfile.ZipFile(self._unfinished, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._file: IO[bytes] = self._archive.open(MEMBER, "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *size, 3)}
        npy.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "ImageArrayWriter":
        return self

    def write(self, pixels: UInt8[Tensor, "b 3 h w"]) -> None:
        """Add images."""
        self.num_missing -= len(pixels)
        self._file.write(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; the file appears if all went well.

        Raises:
            ValueError: some images are missing.
        """
        self._file.close()
        self._archive.close()
        if kind is None and self.num_missing == 0:
            os.replace(self._unfinished, self.path)
            return
        self._unfinished.unlink()
        if kind is None:
            raise ValueError(f"{self.path}: {self.num_missing} images are missing")


class ImageArray:
    """Images of an `.npz`, read in order; a file that holds none is a ValueError.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as (file, num_bytes):
            shape = _header(file, path)
            num_missing = math.prod(shape) - (num_bytes - file.tell())
        if num_missing:
            raise ValueError(
                f"{path}: arr_0 of shape {shape} has {abs(num_missing):,} bytes too "
                f"{'few' if num_missing > 0 else 'many'}; write it again"
            )
        self.num_images: int = shape[0]
        self.size: tuple[int, int] = (shape[1], shape[2])
        """Height and width in pixels."""

    def __len__(self) -> int:
        return self.num_images

    def batches(self, batch_size: int) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
        """All images in order, the last batch perhaps short.

        Raises:
            ValueError: the file is damaged or ends too early.
        """
        image_bytes = math.prod(self.size) * 3
        with self._open() as (file, _):
            _header(file, self.path)
            for first in range(0, self.num_images, batch_size):
                count = min(batch_size, self.num_images - first)
                data = _read(file, self.path, count * image_bytes)
                if len(data) != count * image_bytes:
                    raise ValueError(f"{self.path} ends within image {first}; copy it again")
                images = np.frombuffer(data, dtype=np.uint8).reshape(count, *self.size, 3)
                yield torch.from_numpy(images.copy()).permute(0, 3, 1, 2)

    @contextmanager
    def _open(self) -> Iterator[tuple[zipfile.ZipExtFile, int]]:
        """The array inside the archive, and its size in bytes with its header.

        Raises:
            ValueError: there is no such file, or no such array.
        """
        require_regular(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                # Reading goes on when the archive is closed; for reading it is always this type.
                file = cast("zipfile.ZipExtFile", archive.open(MEMBER))
                num_bytes = archive.getinfo(MEMBER).file_size
        except Exception as error:
            # Damaged archives raise from a dozen unrelated types.
            raise ValueError(
                f"{self.path} holds no images: an .npz with arr_0 is needed ({error})"
            ) from error
        with file:
            yield file, num_bytes


def _read(file: zipfile.ZipExtFile, path: Path, num_bytes: int) -> bytes:
    """Read and decompress.

    Raises:
        ValueError: the archive is damaged.
    """
    try:
        return file.read(num_bytes)
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again") from error


def _header(file: zipfile.ZipExtFile, path: Path) -> tuple[int, ...]:
    """Shape of the array, whose pixels come next.

    Raises:
        ValueError: it is no array of 8-bit colour images.
    """
    try:
        # Later versions are for headers of more than 64 KiB, which no array of images has.
        if npy.read_magic(file) != (1, 0):
            raise ValueError("it is of a later version of the format")
        shape, is_fortran, dtype = npy.read_array_header_1_0(file)
    except Exception as error:
        raise ValueError(f"{path}: arr_0 has no readable header: {str(error)[:200]}") from error
    if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or is_fortran or min(shape) < 1:
        raise ValueError(
            f"{path}: arr_0 is {dtype} of shape {shape} and must be uint8 of (N, height, width, 3)"
        )
    if shape[1] * shape[2] > _MAX_PIXELS:
        raise ValueError(
            f"{path}: arr_0 has images of {shape[1]:,} x {shape[2]:,} pixels, more than the "
            f"{_MAX_PIXELS:,} that are read of such an image"
        )
    return tuple(int(length) for length in shape)
