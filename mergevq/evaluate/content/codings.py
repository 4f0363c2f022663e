"""Masks in few bits without a tokenizer: run lengths, PNG of 1 bit, and fewer pixels.

Each has the largest side at which it fits into the bits that it is given, and comes back enlarged.

Shape letters: S side of the masks in pixels.
"""

import io
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from PIL import Image

_SIDE_BYTES = 1
"""Bytes for the side, which a decoder has to know; a PNG has it in its header."""


class Coded(NamedTuple):
    """A mask that came back from few bits."""

    mask: Bool[np.ndarray, "s s"]
    num_bytes: int
    side: int
    """Side at which it was stored."""


def run_lengths(mask: NDArray[np.bool_]) -> bytes:
    """Lengths of runs in raster order, from one of pixels outside, each in 7 bits a byte, deflated.

    Examples:
        >>> len(run_lengths(np.zeros((64, 64), dtype=bool)))
        5
    """
    flat = np.concatenate([[False], mask.flatten()])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    lengths = np.diff(np.concatenate([[0], starts, [mask.size]]))
    numbers = bytearray()
    for length in lengths.tolist():
        while length >= 128:
            numbers.append(128 | length & 127)
            length >>= 7
        numbers.append(length)
    # Without header and checksum, which are of no use here.
    packer = zlib.compressobj(9, wbits=-15)
    return bytes(_SIDE_BYTES) + packer.compress(bytes(numbers)) + packer.flush()


def png(mask: NDArray[np.bool_]) -> bytes:
    """A PNG file with 1 bit a pixel."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def plain(mask: NDArray[np.bool_]) -> bytes:
    """One bit a pixel."""
    return bytes(_SIDE_BYTES) + np.packbits(mask).tobytes()


CODINGS: dict[str, Callable[[NDArray[np.bool_]], bytes]] = {
    "run lengths": run_lengths,
    "png": png,
    "fewer pixels": plain,
}
"""Codings by their names. All are without loss at the side that they store."""


def code_within(
    mask: NDArray[np.bool_], coding: Callable[[NDArray[np.bool_]], bytes], num_bytes: int
) -> Coded:
    """A mask at the largest side whose bytes fit; the smallest side where none does.

    Args:
        mask: square.
        coding: one of `CODINGS`.
        num_bytes: the most.
    """
    whole = mask.shape[0]
    sides = sorted({max(1, round(whole * share / 16)) for share in range(1, 17)}, reverse=True)
    small, size = mask, 0
    for side in sides:
        small = resized(mask, side)
        size = len(coding(small))
        if size <= num_bytes:
            break
    return Coded(resized(small, whole), size, small.shape[0])


def resized(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """A mask of another side: pixels that are covered by more than half; of equal side itself."""
    if mask.shape[0] == side:
        return mask
    method = Image.Resampling.BOX if side < mask.shape[0] else Image.Resampling.BILINEAR
    image = Image.fromarray(mask.astype(np.float32)).resize((side, side), method)
    return np.asarray(image) > 0.5
