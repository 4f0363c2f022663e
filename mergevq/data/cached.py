"""Training images that are decoded once and kept as bytes, in memory or on the device.

They are cropped and mirrored in batches, where they are kept. The pixels are those that
`mergevq.data.batches.train_batches` gives with the same seed.

Shape letters: N images, P pixels of all of them, B batch, S image side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mergevq.config.training import DataConfig
from mergevq.data.batches import (
    Batch,
    data_generator,
    fetch,
    least_side,
    train_samples,
)
from mergevq.data.images import ImageDataset
from mergevq.data.prepare import (
    BrokenImageError,
    crop_square,
    is_flipped,
    is_strip,
    resize_short_side,
    resized_size,
    square_place,
    to_float,
)
from mergevq.runtime.device import free_bytes, send
from mergevq.runtime.logs import Progress

_ALLOWED_SHARE = 0.8
"""Share of the free memory that pictures may take: a model has to be trained beside them."""
_AT_ONCE = 32
"""Images that a worker decodes and sends together."""


class Pictures(NamedTuple):
    """Every image of a data set, resized."""

    pixels: UInt8[Tensor, "p 3"]
    """Pixels of one picture after the other, row by row."""
    starts: list[int]
    """First pixel of each picture."""
    sizes: list[tuple[int, int]]
    """Width and height of each; the short side is the image side."""
    shown: list[int]
    """The image that is shown for each: itself, or the next that can be read."""


def cached_batches(  # noqa: PLR0913 - the position in the run and among the ranks
    dataset: ImageDataset,
    data: DataConfig,
    *,
    image_size: int,
    batch_size: int,
    num_steps: int,
    start_step: int = 0,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of `train_batches` without views, from pictures that are decoded before the first.

    Args:
        dataset: N images.
        data: see `DataConfig.cache`; `crop` and `flip` apply.
        image_size: side in pixels.
        batch_size: images per step over all ranks.
        num_steps: length of the whole run.
        start_step: first step to give.
        seed: of the orders, crops and flips.
        rank: which contiguous share of every batch to give.
        world_size: number of ranks, each of which keeps all pictures.
        num_workers: processes that decode; 0 decodes in this one.
        device: where images are put, and with cache `device` where pictures are kept.

    Raises:
        ValueError: the pictures do not fit, none can be read, or a number is impossible.
    """
    samples = train_samples(
        len(dataset),
        batch_size=batch_size,
        steps=range(start_step, num_steps),
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    place = device if data.cache == "device" else torch.device("cpu")
    pictures = decode_all(dataset, data, image_size, num_workers=num_workers, device=place)
    for batch in samples:
        index = [pictures.shown[position] for _, position in batch]
        generators = [data_generator("image", seed, k) for k, _ in batch]
        squares = draw_squares(pictures, index, generators, data, image_size)
        label = [dataset.label(position) for position in index]
        # All numbers of a batch are sent at once.
        table = send(torch.tensor([*squares, label, index]), place)
        yield Batch(
            image=crop(pictures, Squares(*table[:3]), image_size, device),
            label=table[3],
            student_view=None,
            teacher_view=None,
            index=table[4],
        )


class Squares(NamedTuple):
    """Places of the squares of a batch among the pixels of all pictures."""

    first: Int64[Tensor, "b"]
    """Pixel at the top left."""
    width: Int64[Tensor, "b"]
    """Pixels of a row of the picture."""
    flip: Int64[Tensor, "b"]
    """1 where the square is mirrored."""


def draw_squares(
    pictures: Pictures,
    index: list[int],
    generators: list[torch.Generator],
    data: DataConfig,
    image_size: int,
) -> tuple[list[int], list[int], list[int]]:
    """Draw the squares of a batch as the loader does; gives the columns of `Squares`.

    Args:
        pictures: all of them.
        index: those of the batch, one for each image.
        generators: of the draws of each image.
        data: its `crop` and `flip`.
        image_size: side in pixels.
    """
    firsts, widths, flips = [], [], []
    for position, generator in zip(index, generators, strict=True):
        size = pictures.sizes[position]
        draws = generator if data.crop == "random" else None
        left, top = square_place(size, image_size, draws)
        firsts.append(pictures.starts[position] + top * size[0] + left)
        widths.append(size[0])
        flips.append(int(data.flip and is_flipped(generator)))
    return firsts, widths, flips


def crop(
    pictures: Pictures, squares: Squares, image_size: int, device: torch.device
) -> Float[Tensor, "b 3 s s"]:
    """Crop and mirror pictures as a whole batch, to [-1, 1]; no value is waited for.

    Args:
        pictures: all of them.
        squares: of the batch, where the pictures are.
        image_size: side in pixels.
        device: where the images are put.
    """
    first, width, flip = (part[:, None, None] for part in squares)
    along = torch.arange(image_size, device=first.device)
    columns = torch.where(flip > 0, image_size - 1 - along, along)
    found = pictures.pixels[first + width * along[:, None] + columns]
    return to_float(send(found, device).permute(0, 3, 1, 2))


def decode_all(
    dataset: ImageDataset,
    data: DataConfig,
    image_size: int,
    *,
    num_workers: int,
    device: torch.device,
) -> Pictures:
    """Decode every image and resize it; of a centre crop the square alone is kept.

    Args:
        dataset: the images.
        data: its `crop`, `reduced_jpeg` and `cache`.
        image_size: short side in pixels.
        num_workers: processes that decode; 0 decodes in this one.
        device: where the pictures are kept.

    Raises:
        ValueError: they do not fit, or none can be read.
    """
    sizes = _sizes(dataset, data, image_size)
    lengths = [width * height for width, height in sizes]
    _require_room(3 * sum(lengths), device, data)
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    pixels = torch.empty(sum(lengths), 3, dtype=torch.uint8, device=device)
    readable = np.zeros(len(dataset), dtype=bool)
    progress = Progress(len(dataset), unit="picture")
    tasks = _in_runs(len(dataset), num_workers)
    for decoded in fetch(_Decoder(dataset, data, image_size), tasks, num_workers):
        dataset.record_broken(decoded.broken)
        found = send(decoded.pixels, device).split([lengths[p] for p in decoded.positions])
        for position, picture in zip(decoded.positions, found, strict=True):
            pixels[starts[position] :][: lengths[position]] = picture
            readable[position] = True
        progress.update(len(decoded.positions) + len(decoded.broken))
    progress.close()
    return Pictures(pixels, starts, sizes, _shown(readable, dataset))


def _in_runs(count: int, num_workers: int) -> list[Int64[Tensor, "n"]]:
    """Positions of the tasks, which workers get in turns, so that each reads on where it was.

    A row group of a parquet file is then read by one worker or two, not by all.
    """
    tasks = torch.arange(count).split(_AT_ONCE)
    run = -(-len(tasks) // max(1, num_workers))
    return [task for first in range(run) for task in tasks[first::run]]


class _Decoded(NamedTuple):
    """Result that a worker sends back."""

    positions: list[int]
    pixels: UInt8[Tensor, "p 3"]
    """Pixels of all of them: of many tensors each would take an open file."""
    broken: dict[str, str]
    """Error by name of the others."""


@dataclass(frozen=True)
class _Decoder(Dataset[_Decoded]):
    """Decodes and resizes the images at some positions."""

    images: ImageDataset
    data: DataConfig
    image_size: int

    def __getitem__(self, positions: Int64[Tensor, "n"]) -> _Decoded:
        found, pixels, broken = [], [np.empty((0, 3), np.uint8)], {}
        least = least_side(self.image_size, None, None) if self.data.reduced_jpeg else None
        resize = resize_short_side if self.data.crop == "random" else crop_square
        for position in positions.tolist():
            try:
                image = resize(self.images.read_reduced(position, least).image, self.image_size)
            except BrokenImageError as error:
                broken[self.images.name(position)] = str(error)
                continue
            found.append(position)
            pixels.append(np.asarray(image).reshape(-1, 3))
        return _Decoded(found, torch.from_numpy(np.concatenate(pixels)), broken)


def _sizes(dataset: ImageDataset, data: DataConfig, image_size: int) -> list[tuple[int, int]]:
    """Width and height of each picture as it is kept; nothing of one without a readable header.

    Raises:
        ValueError: a picture is so long that a part is drawn before it is resized.
    """
    if data.crop == "center":
        return [(image_size, image_size)] * len(dataset)
    sizes = []
    for position in range(len(dataset)):
        try:
            size = dataset.size(position)
        except BrokenImageError:
            sizes.append((0, 0))
            continue
        if is_strip(size):
            raise ValueError(
                f"{dataset.name(position)} has {size[0]} x {size[1]} pixels, of which another part "
                f"is shown each time: it cannot be kept resized. Leave it out, or set data.crop "
                f"({data.crop}) to center or data.cache ({data.cache}) to none"
            )
        sizes.append(resized_size(size, image_size))
    return sizes


def _require_room(needed: int, device: torch.device, data: DataConfig) -> None:
    """Check that the pictures fit beside a model, where it is known what is free.

    Raises:
        ValueError: they do not.
    """
    free = free_bytes(device)
    allowed = None if free is None else int(_ALLOWED_SHARE * free)
    if allowed is not None and needed > allowed:
        raise ValueError(
            f"data.cache ({data.cache}): the pictures take {needed:,} bytes and may take "
            f"{allowed:,}, {_ALLOWED_SHARE:.0%} of the {free:,} that are free ({device.type}); set "
            "data.cache to none, or use fewer (data.max_images) or smaller ones (data.crop center, "
            "model.image_size)"
        )


def _shown(readable: NDArray[np.bool_], dataset: ImageDataset) -> list[int]:
    """For each image the first readable one at or after it; after the last comes the first.

    Raises:
        ValueError: none is readable.
    """
    positions = np.flatnonzero(readable)
    if len(positions) == 0:
        reason = next(iter(dataset.broken.values()), "there are none")
        raise ValueError(f"none of the {len(dataset)} images can be read: {reason}")
    following = np.searchsorted(positions, np.arange(len(readable)))
    return positions[following % len(positions)].tolist()
