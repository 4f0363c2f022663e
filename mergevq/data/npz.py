"""Arrays of an `.npz` that anybody may have written: shape and type are known before any is read.

An archive declares the size of each member, and a few kilobytes of compressed zeros can declare
terabytes. Here the header of an array is read first; its shape has to agree with the member's
declared size, and with bounds of whoever reads it.
"""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mergevq.runtime.files import require_regular

MAX_ARRAY_BYTES = 2**31
"""Largest array that is read as a whole."""
MAX_TEXT_LENGTH = 2**20
"""Longest text that is read, in characters."""

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those that numpy writes; the others may ask for gigabytes to be unpacked."""
_NUMBERS = "fiu"
"""Kinds of numpy's types that are real numbers."""
Read = TypeVar("Read")


class OpenArray(NamedTuple):
    """An array inside an archive, of which the values come next."""

    path: Path
    name: str
    file: zipfile.ZipExtFile
    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool

    def read(self, num_bytes: int) -> bytes:
        """The next bytes of the values; fewer where the file ends.

        Raises:
            ValueError: they are damaged.
        """
        return _guarded(self.path, lambda: self.file.read(num_bytes))


def array_names(path: Path) -> frozenset[str]:
    """Names of the arrays in an archive.

    Raises:
        ValueError: it is missing, no regular file, or no `.npz`.
    """
    require_regular(path)

    def names() -> list[str]:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()

    return frozenset(
        name.removesuffix(".npy") for name in _guarded(path, names) if name.endswith(".npy")
    )


def open_array(path: Path, name: str) -> OpenArray:
    """Open an array and read its header.

    Raises:
        ValueError: it is not there or damaged, or its size is not that of its shape.
    """
    require_regular(path)
    return _guarded(path, lambda: _open(path, name))


def read_array(path: Path, name: str, *, num_dims: int, max_side: int) -> NDArray[np.generic]:
    """Read an array of real numbers.

    Args:
        path: of the archive.
        name: of the array.
        num_dims: dimensions that it must have.
        max_side: largest length of each, except the first of several: rows are bounded by
            `MAX_ARRAY_BYTES` alone.

    Raises:
        ValueError: it is not there or damaged, or is of another type or shape.
    """
    array = open_array(path, name)
    sides = array.shape[1:] if num_dims > 1 else array.shape
    num_bytes = math.prod(array.shape) * array.dtype.itemsize
    if (
        array.dtype.kind not in _NUMBERS
        or len(array.shape) != num_dims
        or max(sides, default=0) > max_side
        or num_bytes > MAX_ARRAY_BYTES
    ):
        raise ValueError(
            f"{path}: {name} is {array.dtype} of shape {array.shape} and must be of {num_dims} "
            f"dimensions, real, of sides of at most {max_side} and of at most {MAX_ARRAY_BYTES} "
            "bytes"
        )
    data = array.read(num_bytes)
    if len(data) != num_bytes:
        raise ValueError(f"{path} ends within {name}; copy it again")
    order = "F" if array.is_fortran else "C"
    return np.frombuffer(data, dtype=array.dtype).reshape(array.shape, order=order)


def read_text(path: Path, name: str) -> str:
    """Read an array that is one text.

    Raises:
        ValueError: it is not there or damaged, or is something else.
    """
    array = open_array(path, name)
    if array.dtype.kind != "U" or array.shape or array.dtype.itemsize > 4 * MAX_TEXT_LENGTH:
        raise ValueError(
            f"{path}: {name} is {array.dtype} of shape {array.shape} and must be one text of at "
            f"most {MAX_TEXT_LENGTH} characters"
        )
    data = array.read(array.dtype.itemsize)
    return _guarded(path, lambda: str(np.frombuffer(data, dtype=array.dtype)[0]))


def _open(path: Path, name: str) -> OpenArray:
    """Open an array and read its header; see `_guarded` for what may go wrong."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type not in _COMPRESSIONS:
            raise ValueError(f"{name} has a compression that numpy does not write")
        # Reading goes on when the archive is closed; for reading it is always this type.
        file = cast("zipfile.ZipExtFile", archive.open(info))
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which are never read")
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"{name} has the impossible shape {shape}")
    wanted, left = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
    if wanted != left:
        raise ValueError(
            f"{name} is {dtype} of shape {shape}, {wanted} bytes, and the archive has {left}"
        )
    return OpenArray(path, name, file, shape, dtype, is_fortran)


def _guarded(path: Path, read: Callable[[], Read]) -> Read:
    """Read from an archive.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return read()
    except Exception as error:
        # Damaged archives make zipfile, zlib and numpy raise from a dozen unrelated types.
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error
