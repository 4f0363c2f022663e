"""Images as batches that follow from the step alone.

The k-th training sample of a run, its crops and its flips depend only on the seed and k: a run
resumes at any step, and the ranks' batches side by side are one process's batch.

Source: Li et al. 2025, "MergeVQ", equation 10 (arXiv:2504.00999) for the two views; Szegedy et al.
2015, "Going Deeper with Convolutions", section 6 (arXiv:1409.4842) for the random resized crop.

Shape letters: B batch, S image side, V student view side, T teacher view side.
"""

import atexit
import hashlib
import math
import multiprocessing
import signal
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mergevq.config.training import DataConfig
from mergevq.data.images import ImageDataset, open_images, read_nearest, spread
from mergevq.data.prepare import (
    CROP_RATIO,
    CROP_SCALE,
    BrokenImageError,
    crop_square,
    random_flip,
    random_resized_crop,
    to_float,
)
from mergevq.runtime.device import send
from mergevq.runtime.random import DataPurpose, data_seed
from mergevq.runtime.run import STOP_SIGNALS

CPU = torch.device("cpu")
Result = TypeVar("Result")

# Splitting


def open_train_val(data: DataConfig) -> tuple[ImageDataset, ImageDataset]:
    """Open training images, and validation images from elsewhere or held out of them.

    Raises:
        ValueError: the two number their classes differently.
    """
    train = open_images(data.path, max_pixels=data.max_pixels)
    if data.val_path is None:
        train, val = split(train, data.val_fraction)
    else:
        val = open_images(data.val_path, max_pixels=data.max_pixels)
    if val.class_names != train.class_names[: val.num_classes]:
        raise ValueError(
            f"val_path {data.val_path!r} has the classes {_abridge(val.class_names)}, which are "
            f"not those of {data.path!r}: {_abridge(train.class_names)}"
        )
    if data.max_images is not None:
        train = train.spread(data.max_images)
    return train, val


def _abridge(names: tuple[str, ...]) -> str:
    """The first few names of many."""
    return ", ".join(names[:5]) + (f", .. ({len(names)})" if len(names) > 5 else "")


def split(dataset: ImageDataset, val_fraction: float) -> tuple[ImageDataset, ImageDataset]:
    """Hold out images for validation, by a hash of their names.

    An image stays on its side when others are added or removed. Neither side is ever empty.

    Args:
        dataset: at least two images.
        val_fraction: expected share of the second part, in (0, 1).

    Returns:
        Training and validation images.

    Raises:
        ValueError: there are too few images, or the share is impossible.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction ({val_fraction}) must be in (0, 1)")
    if len(dataset) < 2:
        raise ValueError(f"{len(dataset)} image cannot be split; give val_path its own images")
    hashes = np.array([_hash(dataset.name(index)) / 2**64 for index in range(len(dataset))])
    held_out = hashes < val_fraction
    held_out[hashes.argmin()] = True
    held_out[hashes.argmax()] = False
    return dataset.subset(np.flatnonzero(~held_out)), dataset.subset(np.flatnonzero(held_out))


def _hash(name: str) -> int:
    """64 bits of a name, the same on every machine and in both forms of its accents."""
    data = unicodedata.normalize("NFC", name).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def data_generator(purpose: DataPurpose, seed: int, number: int) -> torch.Generator:
    """Random numbers of an epoch or of a training sample."""
    return torch.Generator().manual_seed(data_seed(purpose, seed, number))


# Batches


Augment = Callable[[Image.Image, torch.Generator], Image.Image]
"""Changes an RGB picture, of which the size stays, by random numbers of a generator."""


class Batch(NamedTuple):
    """Images of one step on one rank."""

    image: Float[Tensor, "b 3 s s"]
    """In [-1, 1]."""
    label: Int64[Tensor, "b"]
    """Class, -1 for none."""
    student_view: Float[Tensor, "b 3 v v"] | None
    """Random resized crop of the same images, mirrored half of the time, in [-1, 1]."""
    teacher_view: Float[Tensor, "b 3 t t"] | None
    """Random square of the same images, in [-1, 1]; normalising it is the teacher's job."""
    index: Int64[Tensor, "b"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Where in the data set each image was read."""


class _Pixels(NamedTuple):
    """The same as `Batch` in bytes, a quarter of the size: what workers send."""

    image: UInt8[Tensor, "b 3 s s"]
    label: Int64[Tensor, "b"]
    student_view: UInt8[Tensor, "b 3 v v"] | None
    teacher_view: UInt8[Tensor, "b 3 t t"] | None
    index: Int64[Tensor, "b"]  # pyright: ignore[reportIncompatibleMethodOverride]

    def to_batch(self, device: torch.device) -> Batch:
        """Floats on a device, labels and indices where they are."""

        def moved(view: UInt8[Tensor, "b 3 v v"]) -> Float[Tensor, "b 3 v v"]:
            return to_float(send(view, device))

        student, teacher = self.student_view, self.teacher_view
        return Batch(
            image=moved(self.image),
            label=self.label,
            student_view=None if student is None else moved(student),
            teacher_view=None if teacher is None else moved(teacher),
            index=self.index,
        )


class _Fetched(NamedTuple):
    """Result that a worker sends back."""

    batch: _Pixels | None
    """None when no image of an evaluation batch can be read."""
    broken: dict[str, str]
    """Error by name of the images that could not be read on the way."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """One image, prepared, still in bytes."""

    image: Image.Image
    label: int
    student_view: Image.Image | None
    teacher_view: Image.Image | None
    index: int


@dataclass(frozen=True)
class _TrainFetcher(Dataset[_Fetched]):
    """Makes the batch of a list of (sample number k, index in the data set)."""

    images: ImageDataset
    data: DataConfig
    image_size: int
    student_size: int | None
    teacher_size: int | None
    seed: int
    augment: Augment | None

    def __getitem__(self, samples: list[tuple[int, int]]) -> _Fetched:
        broken: dict[str, str] = {}
        return _Fetched(_collate([self._prepare(*sample, broken) for sample in samples]), broken)

    def _prepare(self, k: int, index: int, broken: dict[str, str]) -> _Sample:
        """Read an image, or the next that can be read, and draw its views from seed and k."""
        least = None
        if self.data.reduced_jpeg:
            least = least_side(self.image_size, self.student_size, self.teacher_size)
        index, (image, factor) = read_nearest(self.images, index, broken, least)
        generator = data_generator("image", self.seed, k)
        place = generator if self.data.crop == "random" else None
        square = crop_square(image, self.image_size, place)
        if self.data.flip:
            square = random_flip(square, generator)
        if self.augment is not None and self.student_size is None:
            square = self.augment(square, generator)
        # Each view has its own stream: adding one does not change another.
        student = teacher = None
        if self.student_size is not None:
            generator = data_generator("student", self.seed, k)
            student = random_resized_crop(image, self.student_size, generator, factor=factor)
            student = random_flip(student, generator)
            if self.augment is not None:
                student = self.augment(student, generator)
        if self.teacher_size is not None:
            generator = data_generator("teacher", self.seed, k)
            teacher = crop_square(image, self.teacher_size, generator)
        return _Sample(square, self.images.label(index), student, teacher, index)


@dataclass(frozen=True)
class _EvalFetcher(Dataset[_Fetched]):
    """Makes the batch of a list of indices, without those that cannot be read."""

    images: ImageDataset
    image_size: int
    bilinear: bool

    def __getitem__(self, indices: list[int]) -> _Fetched:
        broken: dict[str, str] = {}
        samples: list[_Sample] = []
        for index in indices:
            try:
                image = self.images.read(index)
                square = crop_square(image, self.image_size, bilinear=self.bilinear)
            except BrokenImageError as error:
                broken[self.images.name(index)] = str(error)
                continue
            label = self.images.label(index)
            samples.append(_Sample(square, label, None, None, index))
        return _Fetched(_collate(samples) if samples else None, broken)


def least_side(image_size: int, student_size: int | None, teacher_size: int | None) -> int:
    """Shortest side, in pixels, of a picture that the views of these sizes can be made of.

    Squares are resized from at least three times their side, which makes a third of a level of 255
    of difference in the mean; from twice, one level. The smallest rectangle of the student's view
    is resized from at least its side.
    """
    smallest = math.sqrt(CROP_SCALE[0] * CROP_RATIO[0])
    needed = (3 * image_size, 3 * (teacher_size or 0), (student_size or 0) / smallest)
    return math.ceil(max(needed))


def _collate(samples: list[_Sample]) -> _Pixels:
    """Stack prepared images."""
    return _Pixels(
        image=_stack([sample.image for sample in samples]),
        label=torch.tensor([sample.label for sample in samples]),
        student_view=_stack_present([sample.student_view for sample in samples]),
        teacher_view=_stack_present([sample.teacher_view for sample in samples]),
        index=torch.tensor([sample.index for sample in samples]),
    )


def _stack(images: list[Image.Image]) -> UInt8[Tensor, "b 3 v v"]:
    """Squares of one size, colour by colour."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _stack_present(views: list[Image.Image | None]) -> UInt8[Tensor, "b 3 v v"] | None:
    """Views that are there for all samples or for none."""
    present = [view for view in views if view is not None]
    return _stack(present) if present else None


def train_batches(  # noqa: PLR0913 - the position in the run and among the ranks
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
    student_size: int | None,
    teacher_size: int | None,
    num_workers: int,
    augment: Augment | None = None,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """This rank's batches of steps `start_step` to `num_steps - 1`.

    Sample k of the run is image k mod N of an order of its epoch, k // N. An unreadable image is
    replaced by the next readable one, warned of once, and counted in `dataset.broken`.

    Args:
        dataset: N images; fewer than a batch are fine.
        data: its `crop` and `flip` apply to `Batch.image`.
        image_size: side of `Batch.image` in pixels.
        batch_size: images per step over all ranks.
        num_steps: length of the whole run.
        start_step: first step to give: those before are skipped without reading anything.
        seed: of the orders, crops and flips.
        rank: which contiguous share of every batch to give.
        world_size: number of ranks.
        student_size: side of the student's view; None for none.
        teacher_size: side of the teacher's view; None for none.
        num_workers: loading processes; 0 loads in this one.
        augment: changes the student's view, or without one the image.
        device: where images and views are put; they travel as bytes.

    Raises:
        ValueError: a size is impossible or no image can be read.
    """
    _check_sizes(dataset, image=image_size, student=student_size, teacher=teacher_size)
    fetcher = _TrainFetcher(dataset, data, image_size, student_size, teacher_size, seed, augment)
    samples = train_samples(
        len(dataset),
        batch_size=batch_size,
        steps=range(start_step, num_steps),
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return _load(fetcher, samples, num_workers, device)


def train_samples(
    num_images: int, *, batch_size: int, steps: range, seed: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Sample numbers of a rank with the image each shows, batch by batch; see `train_batches`.

    Raises:
        ValueError: a number is impossible.
    """
    share = _rank_share(batch_size, rank, world_size)
    if steps.start < 0:
        raise ValueError(f"start_step ({steps.start}) must be at least 0")
    numbers = (range(step * batch_size, (step + 1) * batch_size)[share] for step in steps)
    return _in_order(num_images, seed, numbers)


def _in_order(
    num_images: int, seed: int, numbers: Iterable[range]
) -> Iterator[list[tuple[int, int]]]:
    """Sample numbers with the image each shows, batch by batch."""
    epoch, order = -1, np.empty(0, dtype=np.int64)
    for batch in numbers:
        samples: list[tuple[int, int]] = []
        for k in batch:
            if k // num_images != epoch:
                epoch = k // num_images
                order = torch.randperm(
                    num_images, generator=data_generator("order", seed, epoch)
                ).numpy()
            samples.append((k, int(order[k % num_images])))
        yield samples


def eval_batches(
    dataset: ImageDataset,
    *,
    image_size: int,
    batch_size: int,
    max_images: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int,
    bilinear: bool = False,
) -> Iterator[Batch]:
    """This rank's share of one ordered pass: centre squares, never mirrored, each image once.

    An unreadable image is left out, warned of once, and counted in `dataset.broken`; batches may
    therefore be short, as the last one may be.

    Args:
        dataset: the images.
        image_size: side of `Batch.image` in pixels.
        batch_size: images per batch over all ranks.
        max_images: look at only so many, evenly spaced, so that data sorted by class keep theirs.
        rank: which contiguous share of every batch to give.
        world_size: number of ranks.
        num_workers: loading processes; 0 loads in this one.
        bilinear: resize images so, not bicubic.

    Raises:
        ValueError: a size is impossible.
    """
    share = _rank_share(batch_size, rank, world_size)
    _check_sizes(dataset, image=image_size)
    count = len(dataset)
    indices = spread(count, count if max_images is None else max_images)
    count = len(indices)
    batches = (indices[first : first + batch_size][share] for first in range(0, count, batch_size))
    fetcher = _EvalFetcher(dataset, image_size, bilinear)
    return _load(fetcher, filter(None, batches), num_workers, CPU)


def _check_sizes(
    dataset: ImageDataset, *, image: int, student: int | None = None, teacher: int | None = None
) -> None:
    """Reject an empty data set and impossible sizes.

    Raises:
        ValueError: there is no image, or a side is below 1 pixel.
    """
    if len(dataset) == 0:
        raise ValueError("the data set holds no images")
    for name, size in (("image", image), ("student", student), ("teacher", teacher)):
        if size is not None and size < 1:
            raise ValueError(f"{name}_size ({size}) must be at least 1 pixel")


def _rank_share(batch_size: int, rank: int, world_size: int) -> slice:
    """Which part of a batch belongs to a rank.

    Raises:
        ValueError: the ranks' shares would differ in size, or there is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank ({rank}) must be in [0, world_size ({world_size}))")
    if batch_size < 1 or batch_size % world_size != 0:
        raise ValueError(
            f"batch_size ({batch_size}) must be a positive multiple of the number of ranks "
            f"({world_size})"
        )
    size = batch_size // world_size
    return slice(rank * size, (rank + 1) * size)


def _load(
    fetcher: _TrainFetcher | _EvalFetcher,
    tasks: Iterable[list[Any]],
    num_workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Fetch one batch per task, in order.

    Raises:
        ValueError: no image of any task can be read.
    """
    num_batches, num_broken = 0, 0
    for fetched in fetch(fetcher, tasks, num_workers):
        fetcher.images.record_broken(fetched.broken)
        num_broken += len(fetched.broken)
        if fetched.batch is not None:
            num_batches += 1
            yield fetched.batch.to_batch(device)
    if num_broken > 0 and num_batches == 0:
        raise ValueError(f"none of the {num_broken} images can be read")


def fetch(fetcher: Dataset[Result], tasks: Iterable[Any], num_workers: int) -> Iterator[Result]:
    """Results of a fetcher for each task, in order; workers live for the whole pass.

    Args:
        fetcher: gives the result of a task as its item.
        tasks: what workers are sent.
        num_workers: loading processes; 0 fetches in this one.
    """
    loader = DataLoader(
        fetcher,
        sampler=tasks,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Without one of its own the loader draws from the global generator.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_run,
    )
    others = set(multiprocessing.active_children())
    results = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    at_exit = partial(_kill, workers)
    atexit.register(at_exit)
    try:
        yield from results
    finally:
        # With it the workers end, unless something else has it too, as an error that is kept.
        del results
        if not any(worker.is_alive() for worker in workers):
            atexit.unregister(at_exit)


def _leave_signals_to_the_run(_: int) -> None:
    """In a worker: a terminal or scheduler signals every process, and the run has to save first.

    Workers end when the run does.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _kill(workers: Sequence[BaseProcess]) -> None:
    """End workers when Python ends.

    It would wait for them for ever: its request that they end is a signal that they ignore.
    """
    if hasattr(signal, "SIGCHLD"):
        # Else torch raises an error about workers that were killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
