"""A picture as tokens and back, as the web page shows it: pictures, numbers, times and a file."""

import time
from typing import NamedTuple

import torch
from PIL import Image, ImageChops

from mergevq.config.evaluation import Quality
from mergevq.data.layouts import Source
from mergevq.data.prepare import to_tensor
from mergevq.demo.merge_svg import merge_drawing
from mergevq.metrics.lpips import TRUNKS, Perceptual
from mergevq.runtime.environment import missing
from mergevq.tokenizer.codec import (
    EmbeddedImage,
    ImageReconstruction,
    embed_image,
    reconstruct_image,
)
from mergevq.tokenizer.compressed import PictureCodec, compress_image

AMPLIFIED = 4
"""Factor by which differences are shown larger than they are."""
_MIN_SHOWN = 256
"""Pixels a side that a picture is enlarged to at least, by a whole factor."""


class Shown(NamedTuple):
    """One picture at one number of tokens."""

    original: Image.Image
    given: Image.Image
    recovered: Image.Image | None
    """None where the tokenizer has no maps."""
    difference: Image.Image
    """Absolute difference of original and given, amplified."""
    merge_map: str
    """HTML; empty where the tokenizer has no maps."""
    text: str
    """Tokens, bits and quality."""
    times: str
    file: bytes | None
    """Content of a `.mvq` file; None where the extra of the codec is not installed."""


def show(
    codec: PictureCodec,
    picture: Image.Image | EmbeddedImage,
    num_kept: int,
    perceptual: Perceptual | None = None,
) -> Shown:
    """Encode a picture, resized as in training, with K tokens and decode it again.

    Args:
        codec: the tokenizer, with the identity that its files carry.
        picture: of any mode, or after the stem.
        num_kept: K.
        perceptual: LPIPS, where its weights are there.

    Raises:
        ValueError: K is not legal for the picture.
    """
    if not isinstance(picture, EmbeddedImage):
        picture = embed_image(codec.tokenizer, picture, size_policy="resize")
    begun = time.perf_counter()
    result = reconstruct_image(codec.tokenizer, picture, num_kept)
    milliseconds = 1e3 * (time.perf_counter() - begun)
    drawing, layout = "", result.encoded.layout
    if isinstance(layout, Source):
        original = to_tensor(result.original)
        drawing = merge_drawing(original, layout.index[0], result.encoded.grid_shape)
    file, priced = _compressed(codec, picture, num_kept)
    return Shown(
        original=enlarged(result.original),
        given=enlarged(result.given),
        recovered=None if result.recovered is None else enlarged(result.recovered),
        difference=enlarged(difference(result.original, result.given)),
        merge_map=drawing,
        text=f"{_numbers(result, perceptual)} {priced}".strip(),
        times=(
            f"{milliseconds:.0f} ms for encoding, after the stem, and for decoding with "
            f"{'one source' if result.recovered is None else 'both sources'}."
        ),
        file=file,
    )


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """The absolute difference of two pictures of one size, `AMPLIFIED` times, at most white."""
    table = [min(255, AMPLIFIED * value) for value in range(256)]
    return ImageChops.difference(one, other).point(table * 3)


def decoded(
    codec: PictureCodec, picture: Image.Image | EmbeddedImage, num_kept: int
) -> tuple[Image.Image, str]:
    """Decode K tokens of a picture with the given source map, and tell their price and quality.

    Raises:
        ValueError: K is not legal for the picture.
    """
    result = reconstruct_image(codec.tokenizer, picture, num_kept, size_policy="resize")
    text = (
        f"{result.num_tokens} of {result.num_cells} tokens, {result.bits.total:.0f} bits, "
        f"PSNR {result.psnr_given:.2f} dB"
    )
    return enlarged(result.given), text


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture by a whole factor, each pixel a square."""
    factor = max(1, _MIN_SHOWN // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _numbers(result: ImageReconstruction, perceptual: Perceptual | None) -> str:
    """Tokens, bits and quality in words."""
    bits = result.bits
    text = f"{result.num_tokens} of {result.num_cells} tokens. {bits.tokens:.0f} bits of tokens"
    if result.recovered is None:
        text += f", {result.price}. PSNR {result.psnr_given:.2f} dB."
    else:
        text += (
            f" and {bits.source:.0f} of source map, {result.price}. PSNR "
            f"{result.psnr_given:.2f} dB with the given source, {result.psnr_recovered:.2f} dB "
            "with the recovered one."
        )
    if perceptual is None or min(result.original.size) < TRUNKS[perceptual.trunk].min_side:
        return text
    given = _lpips(perceptual, result.original, result.given)
    if result.recovered is None:
        return f"{text} LPIPS {given:.3f}."
    recovered = _lpips(perceptual, result.original, result.recovered)
    return f"{text} LPIPS {given:.3f} and {recovered:.3f}."


@torch.no_grad()
def _lpips(perceptual: Perceptual, one: Image.Image, other: Image.Image) -> float:
    """LPIPS of two pictures of one size."""
    return float(perceptual(to_tensor(one)[None], to_tensor(other)[None]))


def _compressed(
    codec: PictureCodec, picture: EmbeddedImage, num_kept: int
) -> tuple[bytes | None, str]:
    """The content of a file, and in words what it and the map in it take."""
    if missing("codec"):
        return None, ""
    quality = Quality(num_kept=num_kept)
    whole = compress_image(codec, picture, quality=quality).data
    text = f"As a file {len(whole):,} bytes"
    if not codec.tokenizer.has_maps:
        return whole, f"{text}."
    without = compress_image(codec, picture, quality=quality, source="recovered").data
    return whole, f"{text}, {len(without):,} without the source map."
