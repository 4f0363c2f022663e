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
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.lib import format as npy
from torch import Tensor

from mergevq.data.npz import OpenArray, array_names, open_array

MEMBER = "arr_0"
"""Name of the array."""
MAX_SIDE = 4096
"""Largest side of an image that is read, in pixels: a batch of them has to fit into memory."""


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
        self._file: IO[bytes] = self._archive.open(f"{MEMBER}.npy", "w", force_zip64=True)
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
        shape = self._open().shape
        self.num_images: int = shape[0]
        self.size: tuple[int, int] = (shape[1], shape[2])
        """Height and width in pixels."""

    def __len__(self) -> int:
        return self.num_images

    def batches(self, batch_size: int) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
        """All images in order, the last batch perhaps short.

        Raises:
            ValueError: the file ends too early.
        """
        image_bytes = math.prod(self.size) * 3
        array = self._open()
        with array.file:
            for first in range(0, self.num_images, batch_size):
                count = min(batch_size, self.num_images - first)
                data = array.read(count * image_bytes)
                if len(data) != count * image_bytes:
                    raise ValueError(f"{self.path} ends within image {first}; copy it again")
                images = np.frombuffer(data, dtype=np.uint8).reshape(count, *self.size, 3)
                yield torch.from_numpy(images.copy()).permute(0, 3, 1, 2)

    def _open(self) -> OpenArray:
        """The array inside the archive.

        Raises:
            ValueError: there is no such file or array, or it is no array of 8-bit colour images.
        """
        if MEMBER not in array_names(self.path):
            raise ValueError(f"{self.path} holds no images: an .npz with arr_0 is needed")
        array = open_array(self.path, MEMBER)
        shape, dtype = array.shape, array.dtype
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or array.is_fortran:
            raise ValueError(
                f"{self.path}: arr_0 is {dtype} of shape {shape} and must be uint8 of "
                "(N, height, width, 3)"
            )
        if 0 in shape or max(shape[1:]) > MAX_SIDE:
            raise ValueError(
                f"{self.path}: arr_0 has the shape {shape} and must hold images, each of at most "
                f"{MAX_SIDE} x {MAX_SIDE} pixels"
            )
        return array
