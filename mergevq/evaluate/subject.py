"""The tokenizer and the images of an evaluation, opened, and how both are recorded.

Numbers are valid JSON: infinite ones become null, and their names are listed under `infinite`.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch

from mergevq.config.base import FORMAT_VERSION
from mergevq.config.evaluation import ReconstructionSettings, Subject
from mergevq.config.records import (
    EvaluationRecord,
    ExtractorRecord,
    ForeignReference,
    LpipsRecord,
    Numbers,
    OwnReference,
    SubjectRecord,
)
from mergevq.data.batches import Batch, eval_batches
from mergevq.data.images import ImageDataset, open_images, read_nearest, spread
from mergevq.metrics.extractor import FeatureExtractor, sha256_of
from mergevq.metrics.frechet import Reference
from mergevq.metrics.lpips import Perceptual, load_perceptual, weights_digest
from mergevq.metrics.references import AUTHORS_CROP, CROP, open_reference
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import model_hash, resolve
from mergevq.runtime.device import autocast, resolve_device, resolve_precision
from mergevq.runtime.run import command_line, environment
from mergevq.runtime.settings import to_json
from mergevq.tokenizer.tokenizer import Tokenizer

RECORD = "evaluation.json"


class Opened(NamedTuple):
    """A subject, ready to compute."""

    subject: Subject
    world: distributed.World
    tokenizer: Tokenizer
    tokenizer_hash: str
    images: ImageDataset
    perceptual: Perceptual | None
    extractor: FeatureExtractor | None
    precision: torch.dtype | None
    """Type that the model is autocast to; None is float32."""

    @property
    def num_images(self) -> int:
        """Images that will be looked at."""
        limit = self.subject.max_images
        return len(self.images) if limit is None else min(limit, len(self.images))

    @property
    def positions(self) -> list[int]:
        """Where in the data these images are."""
        return spread(len(self.images), self.num_images)

    def autocast(self) -> torch.autocast:
        """The precision of the model."""
        return autocast(self.world.device, self.precision)

    def batches(self) -> Iterator[Batch]:
        """This rank's images."""
        return eval_batches(
            self.images,
            image_size=self.tokenizer.config.image_size,
            batch_size=self.subject.batch_size,
            max_images=self.subject.max_images,
            rank=self.world.rank,
            world_size=self.world.world_size,
            num_workers=self.subject.num_workers,
            bilinear=self.subject.protocol == "authors",
        )


# -------------------------------------------------------------------------------- what is opened


@contextmanager
def opened(subject: Subject) -> Iterator[Opened]:
    """Load model, data and networks, and take this process's place among the ranks.

    Raises:
        ValueError: one of them is not there, or the model was trained at another size.
        RuntimeError: a file is damaged.
    """
    world = distributed.init(resolve_device(subject.device))
    try:
        directory = resolve(subject.model)
        tokenizer = Tokenizer.from_pretrained(
            directory,
            precision=subject.precision,
            device=world.device,
            decoder=subject.decoder,
        )
        trained_size = tokenizer.config.image_size
        if subject.image_size not in {None, trained_size}:
            raise ValueError(
                f"image_size ({subject.image_size}) must be the {trained_size} pixels that the "
                f"model in {directory} was trained at; leave --image-size out, or give a model of "
                f"{subject.image_size} pixels"
            )
        images = open_images(subject.data, max_pixels=subject.max_pixels)
        if distributed.is_main():
            _warn_of_enlarging(images, trained_size)
        perceptual = None
        if subject.lpips is not None:
            perceptual = load_perceptual(subject.lpips_trunk, subject.lpips)
        extractor = None
        if subject.extractor is not None:
            extractor = FeatureExtractor(subject.extractor, world.device)
        yield Opened(
            subject=subject,
            world=world,
            tokenizer=tokenizer,
            tokenizer_hash=model_hash(directory),
            images=images,
            perceptual=None if perceptual is None else perceptual.to(world.device),
            extractor=extractor,
            precision=resolve_precision(subject.precision, world.device),
        )
    finally:
        distributed.shutdown()


def require_fresh(out: Path) -> None:
    """Check that no earlier evaluation would be overwritten.

    Raises:
        ValueError: there is one.
    """
    if (out / RECORD).exists():
        raise ValueError(
            f"{out / RECORD} is there already; choose another directory with --out, or delete it"
        )


def _warn_of_enlarging(images: ImageDataset, image_size: int) -> None:
    """Say so when the data are smaller than what the model sees."""
    image = read_nearest(images, 0, {})[1].image
    if min(image.size) < image_size:
        warnings.warn(
            f"the first image has {image.width} x {image.height} pixels and is enlarged to "
            f"{image_size} x {image_size}: numbers are of enlarged images",
            stacklevel=2,
        )


def subject_reference(settings: ReconstructionSettings, subject: Opened) -> Reference | None:
    """The reference that was asked for.

    Raises:
        ValueError: it does not fit, or nothing would look at it.
    """
    if settings.reference is None:
        return None
    if subject.extractor is None:
        raise ValueError(
            f"reference {settings.reference} needs --extractor, the file it was made with"
        )
    return open_reference(
        Path(settings.reference),
        "reconstruction",
        extractor=subject.extractor,
        image_size=subject.tokenizer.config.image_size,
    )


def require_same_images(reference: Reference | None, pixels_sha256: str) -> None:
    """Check that a reference is of the images that were reconstructed.

    Raises:
        ValueError: it is of others.
    """
    if reference is not None and reference.metadata.get("pixels_sha256") != pixels_sha256:
        raise ValueError(
            f"the reference is of other images ({reference.metadata.get('num_images')} of "
            f"{reference.metadata.get('data')}) than were reconstructed; leave --reference out, or "
            "write one of these images, with the same --max-images"
        )


# ------------------------------------------------------------------------------- what is written


def json_numbers(numbers: Mapping[str, float]) -> Numbers:
    """Numbers as JSON: infinite ones are null, and named under `infinite`.

    Raises:
        ValueError: a number is NaN.
    """
    broken = [name for name, value in numbers.items() if math.isnan(value)]
    if broken:
        raise ValueError(f"{', '.join(broken)} is not a number; there is no result to report")
    infinite = [name for name, value in numbers.items() if math.isinf(value)]
    values = {name: None if name in infinite else value for name, value in numbers.items()}
    return {"metrics": values, "infinite": infinite}


def evaluation_record(world: distributed.World) -> EvaluationRecord:
    """Conditions that any evaluation depends on besides its settings, as JSON."""
    return {
        "format_version": FORMAT_VERSION,
        "world_size": world.world_size,
        "command": command_line(),
        "environment": environment(world.device),
    }


def subject_record(subject: Opened, pixels_sha256: str, num_images: int) -> SubjectRecord:
    """Model and data that any evaluation of a tokenizer depends on, as JSON."""
    perceptual, extractor = subject.perceptual, subject.extractor
    return {
        "model": {
            "path": subject.subject.model,
            "hash": subject.tokenizer_hash,
            "config": to_json(subject.tokenizer.config),
        },
        "data": {
            "path": subject.subject.data,
            "num_images": num_images,
            "num_unreadable": subject.num_images - num_images,
            "pixels_sha256": pixels_sha256,
            "image_size": subject.tokenizer.config.image_size,
            "crop": CROP if subject.subject.protocol == "own" else AUTHORS_CROP,
        },
        "lpips": None if perceptual is None else _lpips_record(perceptual),
        "extractor": None if extractor is None else extractor_record(extractor),
        "precision": str(subject.precision or torch.float32).removeprefix("torch."),
    }


def extractor_record(extractor: FeatureExtractor) -> ExtractorRecord:
    """Which network saw the images, as JSON."""
    return {
        "name": extractor.name,
        "path": str(extractor.path),
        "sha256": extractor.sha256,
        "dim": extractor.dim,
    }


def reference_record(path: str, reference: Reference) -> OwnReference | ForeignReference:
    """Reference of images as JSON: the file, and what it says about itself."""
    record = {"path": path, "sha256": sha256_of(path), **reference.metadata}
    return cast("OwnReference | ForeignReference", record)


def _lpips_record(perceptual: Perceptual) -> LpipsRecord:
    """Which LPIPS it was, as JSON."""
    return {"trunk": perceptual.trunk, "sha256": weights_digest(perceptual.state_dict())}


def images_at(subject: Opened, positions: Sequence[int]) -> Iterator[Batch]:
    """Some images by their positions, as one batch on this rank alone."""
    return eval_batches(
        subject.images.subset(positions),
        image_size=subject.tokenizer.config.image_size,
        batch_size=len(positions),
        num_workers=0,
        bilinear=subject.subject.protocol == "authors",
    )
