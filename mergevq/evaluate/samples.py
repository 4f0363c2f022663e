"""Samples of a generator as a folder of images: made, resumed and read.

Image k is of class k mod C. Batches have fixed numbers and each is made by one rank, so images are
the same however many ranks there are.

Shape letters: B batch, N images, H and W pixels.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mergevq.config.base import FORMAT_VERSION
from mergevq.config.evaluation import GenerationSettings
from mergevq.config.generator import (
    SampleRun,
)
from mergevq.data.arrays import ImageArray, ImageArrayWriter
from mergevq.data.images import ImageDataset, open_images
from mergevq.data.sample_files import SUMS, SampleFiles, is_sample_folder
from mergevq.generator.generation import Pair, generate
from mergevq.report.pictures import to_pil
from mergevq.runtime import distributed
from mergevq.runtime.device import deterministic
from mergevq.runtime.files import read_json, write_json
from mergevq.runtime.logs import Progress
from mergevq.runtime.settings import to_json

SAMPLES = "samples"
SAMPLING = "sampling.json"
ARRAY = "samples.npz"


class Samples(NamedTuple):
    """Images to evaluate, in order."""

    source: ImageDataset | ImageArray | SampleFiles
    num_images: int
    size: tuple[int, int]
    """Height and width in pixels."""

    def batches(
        self, batch_size: int, world: distributed.World
    ) -> Iterator[tuple[UInt8[Tensor, "b 3 h w"], Int64[Tensor, "b"]]]:
        """This rank's images and their numbers; whole batches go to the ranks in turn.

        Raises:
            ValueError: an image has another size.
        """
        numbers = range(0, self.num_images, batch_size)
        if isinstance(self.source, ImageArray):
            # A file is read through from its start: other ranks' images are skipped, not seen.
            for turn, pixels in enumerate(self.source.batches(batch_size)):
                if turn % world.world_size == world.rank:
                    yield pixels, torch.arange(numbers[turn], numbers[turn] + len(pixels))
            return
        for first in numbers[world.rank :: world.world_size]:
            chosen = range(first, min(first + batch_size, self.num_images))
            yield torch.stack([self._read(self.source, i) for i in chosen]), torch.tensor(chosen)

    def _read(self, images: ImageDataset | SampleFiles, number: int) -> UInt8[Tensor, "3 h w"]:
        """One image of the folder, as it is."""
        image = images.read(number)
        if (image.height, image.width) != self.size:
            raise ValueError(
                f"sample {images.name(number)} has {image.width} x {image.height} pixels and the "
                f"first has {self.size[1]} x {self.size[0]}; all must have one size"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def sample_missing(pair: Pair, run: SampleRun, out: Path, world: distributed.World) -> None:
    """Sample the images of a run that are not there yet; on every rank.

    Args:
        pair: what samples and what decodes.
        run: how. More images than before may be asked for.
        out: directory of `samples/` and of `sampling.json`, which says what made them.
        world: this process.

    Raises:
        ValueError: the samples there are of another run, or the run does not fit the generator.
    """
    if distributed.is_main():
        _claim(pair, run, out)
        (out / SAMPLES).mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    files = SampleFiles(out / SAMPLES, _names(run), rank=world.rank)
    firsts = range(0, run.num_images, run.batch_size)[world.rank :: world.world_size]
    batches = [list(range(first, first + run.batch_size)) for first in firsts]
    missing = [
        [number for number in batch if number < run.num_images and not files.has(number)]
        for batch in batches
    ]
    num_missing = sum(map(len, missing))
    total = sum(len(range(first, min(first + run.batch_size, run.num_images))) for first in firsts)
    progress = Progress(total, done=total - num_missing, unit="sample")
    with deterministic(world.device):
        for batch, wanted in zip(batches, missing, strict=True):
            if not wanted:
                continue
            # A batch is made in full whatever is missing of it: its size may decide last bits.
            _, images = generate(pair, run, batch)
            for number in wanted:
                files.save(number, to_pil(images[number - batch[0]]))
            progress.update(len(wanted))
    progress.close()


def _claim(pair: Pair, run: SampleRun, out: Path) -> None:
    """Write what makes the samples, or check that it is what made those that are there.

    Raises:
        ValueError: it is not.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "kind": "sampling",
        "generator": pair.generator_hash,
        "tokenizer": pair.tokenizer_hash,
        # Where models lie decides no pixel, nor how many images there are or are made at once.
        "run": {
            name: value
            for name, value in to_json(run).items()
            if name not in {"model", "tokenizer", "num_images", "batch_size"}
        },
    }
    path = out / SAMPLING
    if path.is_file():
        there = read_json(path)
        changed = [name for name in record if there.get(name) != record[name]]
        changed += [
            f"{name} ({there['run'].get(name)}, now {value})"
            for name, value in record["run"].items()
            if "run" in changed and there["run"].get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{out} holds samples of another run, which differs in "
                f"{', '.join(name for name in changed if name != 'run')}; choose another directory "
                "with --out, or delete it"
            )
        return
    if (out / SAMPLES).exists():
        raise ValueError(f"{out / SAMPLES} holds images of unknown origin; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def _names(run: SampleRun) -> list[str]:
    """Files of a run's samples."""
    return [f"{number:08d}.png" for number in range(run.num_images)]


def open_samples(settings: GenerationSettings, out: Path) -> Samples:
    """The images that were made, or that were there.

    Raises:
        ValueError: there are none.
    """
    if settings.samples is not None and settings.samples.endswith(".npz"):
        array = ImageArray(Path(settings.samples))
        return Samples(array, len(array), array.size)
    images = _sample_images(settings, out)
    first = images.read(0)
    return Samples(images, len(images), (first.height, first.width))


def _sample_images(settings: GenerationSettings, out: Path) -> ImageDataset | SampleFiles:
    """The files of the run and no others, or all images of a folder that is of no run.

    Raises:
        ValueError: there are none.
    """
    if settings.run is not None:
        files = SampleFiles(out / SAMPLES, _names(settings.run))
    elif settings.samples is not None and is_sample_folder(Path(settings.samples)):
        files = SampleFiles(Path(settings.samples))
    else:
        return open_images(str(settings.samples), max_pixels=settings.max_pixels)
    strangers = files.strangers()
    if strangers and distributed.is_main():
        warnings.warn(
            f"{len(strangers)} pictures in {files.folder} were not made by the run and are not "
            f"evaluated: {strangers[0]} is the first",
            stacklevel=2,
        )
    if not len(files):
        raise ValueError(f"{files.folder / SUMS} names no samples; choose another folder")
    return files


def sample_size(settings: GenerationSettings, pair: Pair | None) -> int:
    """Side of the samples in pixels.

    Raises:
        ValueError: they are not square.
    """
    if pair is not None:
        return pair.tokenizer.config.image_size
    height, width = open_samples(settings, Path(settings.out)).size
    if height != width:
        raise ValueError(f"samples of {width} x {height} pixels must be square")
    return height


def write_array(samples: Samples, path: Path, batch_size: int) -> None:
    """Write samples as the ADM evaluator reads them."""
    alone = distributed.World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with ImageArrayWriter(path, samples.num_images, samples.size) as array:
        for pixels, _ in samples.batches(batch_size, alone):
            array.write(pixels)
