"""Reading training images, against decoding whole pictures at every step."""

import io
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.entry import Entry, Pair
from mergevq.config.training import DataConfig
from mergevq.data.batches import data_generator, train_batches, train_samples
from mergevq.data.cached import Squares, crop, decode_all, draw_squares
from mergevq.data.images import ImageDataset, open_images

CPU = torch.device("cpu")
STEPS = 4
"""Steps of a call."""


@cache
def photographs(width: int, height: int, count: int) -> ImageDataset:
    """JPEG files with the spectrum of photographs, about one byte for four pixels."""
    folder = Path(tempfile.mkdtemp(prefix="mergevq-bench-"))
    numbers = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((height, width, 3), dtype=np.float32)
        for level in range(2, 9):
            shape = (max(2, height >> level), max(2, width >> level), 3)
            coarse = Image.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8))
            large = coarse.resize((width, height), Image.Resampling.BICUBIC)
            pixels += np.asarray(large, dtype=np.float32) * 2.0 ** (level - 9)
        data = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(data.getvalue())
    return open_images(str(folder))


def close(plain: list[Tensor], ours: list[Tensor]) -> None:
    """The same crops of the same pictures, to a level of 255 in the mean."""
    for first, second in zip(plain, ours, strict=True):
        assert 127.5 * (first - second).abs().mean() < 1


def same(plain: list[Tensor], ours: list[Tensor]) -> None:
    """The same pixels."""
    torch.testing.assert_close(plain, ours, rtol=0, atol=0)


def loaded(dataset: ImageDataset, data: DataConfig, size: int, batch_size: int) -> list[Tensor]:
    """Images of every step."""
    batches = train_batches(
        dataset,
        data,
        image_size=size,
        batch_size=batch_size,
        num_steps=STEPS,
        seed=0,
        student_size=None,
        teacher_size=None,
        num_workers=0,
    )
    return [batch.image for batch in batches]


def reduced_pair(width: int, height: int, size: int) -> Pair:
    """One picture a step: whole, or as small as its crop allows."""
    dataset = photographs(width, height, 2)
    data = DataConfig(crop="random", flip=True)
    whole = replace(data, reduced_jpeg=False)
    return Pair(
        lambda: loaded(dataset, whole, size, 1), lambda: loaded(dataset, data, size, 1), close
    )


def kept_pair(width: int, height: int, size: int, batch_size: int) -> Pair:
    """A batch a step: decoded each time, or once before the first."""
    dataset = photographs(width, height, 32)
    data = DataConfig(crop="random", flip=True, cache="memory")
    pictures = decode_all(dataset, data, size, num_workers=0, device=CPU)

    def ours() -> list[Tensor]:
        samples = train_samples(
            len(dataset), batch_size=batch_size, steps=range(STEPS), seed=0, rank=0, world_size=1
        )
        images = []
        for batch in samples:
            index = [position for _, position in batch]
            generators = [data_generator("image", 0, k) for k, _ in batch]
            squares = torch.tensor(draw_squares(pictures, index, generators, data, size))
            images.append(crop(pictures, Squares(*squares), size, CPU))
        return images

    return Pair(lambda: loaded(dataset, data, size, batch_size), ours, same)


ENTRIES = (
    Entry("training crops of 64 px from 12 megapixels", lambda: reduced_pair(4000, 3000, 64)),
    Entry("training crops of 128 px from 12 megapixels", lambda: reduced_pair(4000, 3000, 128)),
    Entry("training crops of 256 px from 12 megapixels", lambda: reduced_pair(4000, 3000, 256)),
    Entry("kept pictures, 64 crops of 64 px, 86 x 64", lambda: kept_pair(86, 64, 64, 64)),
    Entry("kept pictures, 32 crops of 128 px, 640 x 480", lambda: kept_pair(640, 480, 128, 32)),
)
