"""Pictures of a class, decoded before one's eyes, and pictures of which a part is made anew.

Shape letters: B images, L grid cells, T tokens of a sequence.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mergevq.config.generator import (
    SampleRun,
    SamplingSettings,
)
from mergevq.data.prepare import crop_square, to_rgb
from mergevq.demo.tokens import enlarged
from mergevq.generator.build import with_full_cache
from mergevq.generator.generation import (
    Pair,
    class_labels,
    decode_sampled,
    generate,
    masked_origin,
)
from mergevq.generator.sampling import Partial, sample_in_steps
from mergevq.report.pictures import to_pil

_NUM_LOOKS = 8
"""Times that a picture is shown before all of its tokens are decoded, nearly."""
_UNKNOWN = 0.0
"""Value in [-1, 1] of the pixels of a cell without a token: a middle grey."""


def class_choices(pair: Pair) -> list[str]:
    """Names of a generator's classes, or their numbers; empty without classes."""
    num_classes = pair.generator.config.num_classes
    return [f"{name}" for name in pair.class_names or range(num_classes)]


def draw(
    pair: Pair, class_name: str | None, guidance: float, num_images: int, seed: int
) -> Iterator[list[Image.Image]]:
    """Sample pictures of a class, and show them while they are decoded.

    A cell that has no token yet is grey; where an order decodes tokens that are of no cell, those
    decoded so far make the whole picture.

    Args:
        pair: what samples and what decodes.
        class_name: one of `class_choices`; None takes every class in turn.
        guidance: scale of classifier-free guidance; 1 is none.
        num_images: pictures.
        seed: picture k depends on it and on k.

    Yields:
        All pictures, a few times; the last are those that `mergevq sample` writes.

    Raises:
        ValueError: there is no such class, or a number is out of range.
    """
    run = _run(pair, class_name, guidance, num_images, seed)
    for part in _looks(pair, run):
        yield [enlarged(to_pil(image)) for image in _decode(pair, part)]


class Drawn(NamedTuple):
    """Pictures, and what sampling them took so far."""

    pictures: list[Image.Image]
    seconds: float
    """Sampling alone, without the tokenizer."""
    num_bytes: int
    """Memory of keys and values."""


def draw_with_both_caches(
    pair: Pair, class_name: str | None, guidance: float, num_images: int, seed: int
) -> Iterator[tuple[Drawn, Drawn]]:
    """Sample the same pictures with MergeAR's compressed cache and with a full one, in turns.

    Both share the machine evenly, a few steps of the one after a few of the other. The arguments
    are those of `draw`.

    Yields:
        The compressed and the full cache, a few times.

    Raises:
        ValueError: there is no such class, a number is out of range, or the order is not `merge`.
    """
    full = with_full_cache(pair.generator)
    if full is None:
        kind = pair.generator.config.order.kind
        raise ValueError(f"order ({kind}) must be merge: caches of others are not compressed")
    run = _run(pair, class_name, guidance, num_images, seed)
    ways = pair, pair._replace(generator=full)
    looks, seconds = [_looks(way, run) for way in ways], [0.0, 0.0]
    while True:
        drawn = []
        for number, (way, steps) in enumerate(zip(ways, looks, strict=True)):
            start = time.perf_counter()
            part = next(steps, None)
            seconds[number] += time.perf_counter() - start
            if part is None:
                return
            pictures = [enlarged(to_pil(image)) for image in _decode(way, part)]
            drawn.append(Drawn(pictures, seconds[number], part.sampled.kv_bytes))
        yield drawn[0], drawn[1]


def compared(small: Drawn, full: Drawn) -> str:
    """Bytes and time of both caches in a sentence for each, as Markdown."""
    alike = sum(
        one.tobytes() == other.tobytes()
        for one, other in zip(small.pictures, full.pictures, strict=True)
    )
    share = small.num_bytes / full.num_bytes
    return (
        f"Compressed: **{small.num_bytes / 1e6:.2f} MB** of keys and values, "
        f"{small.seconds:.1f} s. Full: **{full.num_bytes / 1e6:.2f} MB**, {full.seconds:.1f} s. "
        f"The compressed cache takes {share:.0%} of the memory; {alike} of "
        f"{len(small.pictures)} pictures are the same to the pixel."
    )


def edit(
    pair: Pair,
    picture: Image.Image,
    mask: Image.Image,
    class_name: str | None,
    *,
    guidance: float,
    num_images: int,
    seed: int,
) -> list[Image.Image]:
    """Make the masked cells of a picture anew.

    Args:
        pair: what samples and what decodes; its order fills in.
        picture: of any mode.
        mask: as large; white where the picture changes.
        class_name: one of `class_choices`; None takes every class in turn.
        guidance: scale of classifier-free guidance; 1 is none.
        num_images: how many times.
        seed: picture k depends on it and on k.

    Raises:
        ValueError: nothing or all is masked, the order cannot keep tokens, or a number is out of
            range.
    """
    run = _run(pair, class_name, guidance, num_images, seed)
    with torch.no_grad():
        origin = masked_origin(
            pair.tokenizer, to_rgb(picture), mask, pair.generator.config.num_kept
        )
    _, images = generate(pair, run, range(run.num_images), origin)
    return [enlarged(to_pil(image)) for image in images]


def square(pair: Pair, picture: Image.Image) -> Image.Image:
    """The part of a picture that is edited, as the tokenizer sees it, enlarged."""
    return enlarged(crop_square(to_rgb(picture), pair.tokenizer.config.image_size))


def _looks(pair: Pair, run: SampleRun) -> Iterator[Partial]:
    """Sequences while they are decoded, a few times."""
    config, image_ids = pair.generator.config, range(run.num_images)
    return sample_in_steps(
        pair.generator,
        labels=class_labels(run, config.num_classes, image_ids),
        num_kept=config.num_kept,
        seed=run.seed,
        image_ids=image_ids,
        settings=run.settings,
        every=math.ceil(config.num_states(config.num_kept) / _NUM_LOOKS),
    )


def _run(
    pair: Pair, class_name: str | None, guidance: float, num_images: int, seed: int
) -> SampleRun:
    """Settings of `mergevq sample` that do the same.

    Raises:
        ValueError: there is no such class, or a number is out of range.
    """
    choices = class_choices(pair)
    if class_name is not None and class_name not in choices:
        raise ValueError(f"class ({class_name}) must be one of {', '.join(choices)}")
    return SampleRun(
        classes=() if class_name is None else (choices.index(class_name),),
        num_images=int(num_images),
        seed=int(seed),
        settings=replace(SamplingSettings(), guidance_scale=float(guidance)),
    )


@torch.no_grad()
def _decode(pair: Pair, part: Partial) -> Float[Tensor, "b 3 h w"]:
    """Images of sequences of which some tokens are not decoded yet."""
    sampled, known = part.sampled, part.known
    config = pair.generator.config
    num_tokens = config.length(config.num_kept)
    if part.share == 1:
        return decode_sampled(pair.tokenizer, sampled, config.grid_size)
    if config.order.reads == "kept":
        rows = len(known)
        anchors = sampled.anchors
        sampled = sampled._replace(
            indices=sampled.indices[known].reshape(rows, -1),
            anchors=None if anchors is None else anchors[known].reshape(rows, -1),
        )
        return decode_sampled(pair.tokenizer, sampled, config.grid_size)
    num_missing = num_tokens - known.shape[1]
    known = torch.nn.functional.pad(known, (0, num_missing))
    indices = torch.nn.functional.pad(sampled.indices, (0, num_missing))
    # The cells without a token have one that is there, so that the others are not decoded beside
    # anything that the image has nowhere.
    first = known.int().argmax(1, keepdim=True)
    indices = indices.where(known, indices.gather(1, first))
    images = decode_sampled(pair.tokenizer, sampled._replace(indices=indices), config.grid_size)
    return _without(images, known.to(images.device), config.grid_size)


def _without(
    images: Float[Tensor, "b 3 h w"], known: Bool[Tensor, "b l"], grid_shape: tuple[int, int]
) -> Float[Tensor, "b 3 h w"]:
    """The images, grey in the cells that are not known."""
    cells = known.reshape(len(known), 1, *grid_shape)
    height, width = (
        size // count for size, count in zip(images.shape[-2:], grid_shape, strict=True)
    )
    pixels = cells.repeat_interleave(height, 2).repeat_interleave(width, 3)
    return images.where(pixels, _UNKNOWN)
