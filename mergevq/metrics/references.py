"""Statistics of a set of images that others are compared with, and which kind of set it is.

A reconstruction is compared with the very images that went in, generated images with the training
set: distances to one kind of reference say nothing about the other, so each file says its kind.

Shape letters: B batch, N images, H and W pixels, F feature channels.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast, get_origin, get_type_hints

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mergevq.config.base import MAX_PIXELS
from mergevq.config.evaluation import ReferenceKind
from mergevq.config.identity import Identity, require_same_classes
from mergevq.config.records import ReferenceRecord
from mergevq.data.arrays import MEMBER, ImageArray, ImageArrayWriter
from mergevq.data.batches import eval_batches
from mergevq.data.images import ImageDataset, open_images, spread
from mergevq.data.npz import array_names
from mergevq.metrics.extractor import INCEPTION_SHA256, FeatureExtractor
from mergevq.metrics.frechet import (
    MIN_SAMPLES,
    FrechetStatistics,
    Gaussian,
    Reference,
    load_features,
    load_reference,
    save_reference,
)
from mergevq.metrics.image import to_uint8
from mergevq.metrics.sets import Rows
from mergevq.runtime import distributed
from mergevq.runtime.device import resolve_device
from mergevq.runtime.files import require_entries
from mergevq.runtime.logs import Progress

CROP = "short side resized (bicubic), centre square"
"""How images are prepared, the same for a model's input and its reference."""
AUTHORS_CROP = "short side resized (bilinear), centre square"
"""How they are prepared in the protocol `authors`."""
_NO_CROP = "none: of the size in the file"

_ARRAY_BATCH = 64
"""Images of a file described at a time."""
_MEANING: dict[ReferenceKind, str] = {
    "reconstruction": "the very images that are reconstructed",
    "generation": "a training set",
}


class ImageHashes:
    """A hash over the pixels of images, the same for any batch size and number of ranks."""

    def __init__(self) -> None:
        self.digests: list[Int64[Tensor, "_"]] = []
        self.positions: list[Int64[Tensor, "_"]] = []

    def update(self, pixels: UInt8[Tensor, "b 3 h w"], positions: Int64[Tensor, "b"]) -> None:
        """Add images, as they are after the crop."""
        digests = [
            hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest()
            for image in pixels.cpu().contiguous()
        ]
        numbers = [int.from_bytes(digest, "little", signed=True) for digest in digests]
        self.digests.append(torch.tensor(numbers, dtype=torch.int64))
        self.positions.append(positions.cpu())

    def compute(self) -> str:
        """SHA-256 over the images of all ranks in order; every rank must call."""
        none = torch.empty(0, dtype=torch.int64)
        digests = distributed.gather(torch.cat([none, *self.digests]))
        order = distributed.gather(torch.cat([none, *self.positions])).argsort()
        return hashlib.sha256(digests[order].numpy().tobytes()).hexdigest()


class Described(NamedTuple):
    """A set of images as an extractor sees it."""

    statistics: Gaussian
    features: Float[Tensor, "n f"] | None
    """Features of some images, evenly spaced; None when none were asked for."""
    pixels_sha256: str
    num_images: int
    class_names: tuple[str, ...]
    """In label order; empty without labels."""


def describe_images(  # noqa: PLR0913 - what, by what, how
    images: ImageDataset,
    extractor: FeatureExtractor,
    world: distributed.World,
    *,
    image_size: int,
    batch_size: int,
    max_images: int | None = None,
    num_features: int = 0,
    array: ImageArrayWriter | None = None,
    num_workers: int = 0,
) -> Described:
    """Go through images once and describe them; on every rank.

    Args:
        images: what to describe.
        extractor: what sees them.
        world: this process.
        image_size: side they are cropped to, in pixels.
        batch_size: images at once, over all ranks.
        max_images: only so many, evenly spaced; None is all.
        num_features: keep the features of so many, evenly spaced.
        array: also write the images there; with one process only.
        num_workers: loading processes; 0 loads in this one.
    """
    taken = spread(len(images), len(images) if max_images is None else max_images)
    count = len(taken)
    num_features = min(num_features, count)
    wanted = torch.tensor([taken[i] for i in spread(count, num_features)] if num_features else [])
    statistics, hashes, rows = FrechetStatistics(extractor.dim), ImageHashes(), Rows("features")
    progress = Progress(-(-count // world.world_size), unit="image")
    for batch in eval_batches(
        images,
        image_size=image_size,
        batch_size=batch_size,
        max_images=max_images,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=num_workers,
    ):
        pixels = to_uint8(batch.image)
        features = extractor.features(pixels)
        statistics.update(features)
        hashes.update(pixels, batch.index)
        keep = torch.isin(batch.index, wanted)
        rows.update(features.cpu()[keep], batch.index[keep])
        if array is not None:
            array.write(pixels)
        progress.update(len(batch.index))
    progress.close()
    gaussian = statistics.compute()
    return Described(
        statistics=gaussian,
        features=rows.compute() if num_features else None,
        pixels_sha256=hashes.compute(),
        num_images=gaussian.num_samples or 0,
        class_names=images.class_names,
    )


def make_reference(  # noqa: PLR0913 - each is an option
    data: str,
    out: Path,
    kind: ReferenceKind,
    *,
    extractor: str | Path,
    image_size: int,
    batch_size: int,
    max_images: int | None = None,
    max_pixels: int = MAX_PIXELS,
    num_features: int = 0,
    array: Path | None = None,
    device: str = "auto",
    num_workers: int = 0,
) -> ReferenceRecord | None:
    """Describe images and write it down; on every rank, under `torchrun`.

    Args:
        data: see `DataConfig.path`.
        out: `.npz` to write.
        kind: what will be compared with it.
        extractor: TorchScript file of the network that sees the images.
        image_size: side they are cropped to, in pixels.
        batch_size: images at once, over all ranks.
        max_images: only so many, evenly spaced; None is all.
        max_pixels: largest picture that is read, as width times height.
        num_features: keep the features of so many, evenly spaced.
        array: also write the images there, as the ADM evaluator reads them.
        device: where to compute.
        num_workers: loading processes; 0 loads in this one.

    Returns:
        What was written about the reference; None on ranks other than the main one.

    Raises:
        ValueError: data or settings do not fit.
        RuntimeError: a file is damaged.
    """
    world = distributed.init(resolve_device(device))
    try:
        if array is not None and world.world_size > 1:
            raise ValueError(
                f"array ({array}) is written by one process, and there are {world.world_size}; "
                "leave it out, or start without torchrun"
            )
        network = FeatureExtractor(extractor, world.device)
        images = open_images(data, max_pixels=max_pixels)
        count = len(images) if max_images is None else min(max_images, len(images))
        with contextlib.ExitStack() as stack:
            writer = None
            if array is not None:
                array.parent.mkdir(parents=True, exist_ok=True)
                writer = ImageArrayWriter(array, count, (image_size, image_size))
                stack.enter_context(writer)
            described = describe_images(
                images,
                network,
                world,
                image_size=image_size,
                batch_size=batch_size,
                max_images=max_images,
                num_features=num_features,
                array=writer,
                num_workers=num_workers,
            )
        if not distributed.is_main():
            return None
        _warn_of_few(described.num_images)
        return write_reference(
            out, described, kind, extractor=network, image_size=image_size, data=data
        )
    finally:
        distributed.shutdown()


def _warn_of_few(num_images: int) -> None:
    """Say so when a covariance would be poor."""
    if num_images < MIN_SAMPLES:
        warnings.warn(
            f"a reference of {num_images} images biases Frechet distances upwards; use at least "
            f"{MIN_SAMPLES}",
            stacklevel=2,
        )


def write_reference(
    path: Path,
    described: Described,
    kind: ReferenceKind,
    *,
    extractor: FeatureExtractor,
    image_size: int,
    data: str,
) -> ReferenceRecord:
    """Write a reference; returns what was written about it."""
    metadata: ReferenceRecord = {
        "kind": kind,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "data": data,
        "pixels_sha256": described.pixels_sha256,
        "num_images": described.num_images,
        "image_size": image_size,
        "crop": CROP,
        "class_names": list(described.class_names),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    values = cast("Mapping[str, str | int | list[str]]", metadata)
    save_reference(path, described.statistics, values, described.features)
    return metadata


def open_reference(
    path: Path, kind: ReferenceKind, *, extractor: FeatureExtractor, image_size: int
) -> Reference:
    """Read a reference that is to be compared with.

    Files of the ADM evaluator hold statistics of a training set by the original Inception, and say
    nothing about themselves. A file of images alone is described here, and may be of any kind.

    Args:
        path: of the file.
        kind: what is evaluated.
        extractor: what sees the images it is compared with.
        image_size: their side, in pixels.

    Raises:
        ValueError: it is of another kind, extractor or image size.
    """
    if _holds_only_images(path):
        return _described_array(ImageArray(path), kind, extractor, image_size)
    reference = load_reference(path)
    metadata = reference.metadata
    if metadata:
        _require_record(metadata, path)
    found = str(metadata.get("kind", "generation"))
    if found != kind:
        origin = "" if metadata else ", as all files of the ADM evaluator are"
        data = "DATA" if kind == "reconstruction" else "TRAINING_DATA"
        without = ", or leave --reference out" if kind == "reconstruction" else ""
        raise ValueError(
            f"reference {path} is for {found}{origin}, and {kind} is compared with "
            f"{_MEANING[kind]}; the right one is written by `mergevq evaluate reference --kind "
            f"{kind} --data {data} --out REF.npz`{without}"
        )
    if not metadata and extractor.sha256 != INCEPTION_SHA256:
        raise ValueError(
            f"reference {path} says nothing about itself, as files of the ADM evaluator, whose "
            f"statistics are Inception's, and the extractor is {extractor.name}; give the "
            "Inception-2015 file with --extractor, or write a reference with this extractor: "
            f"`mergevq evaluate reference --kind {kind}`"
        )
    if metadata and metadata.get("extractor_sha256") != extractor.sha256:
        raise ValueError(
            f"reference {path} was made with extractor {metadata.get('extractor')} "
            f"({str(metadata.get('extractor_sha256'))[:12]}) and this is {extractor.name} "
            f"({extractor.sha256[:12]}); the same file is needed"
        )
    require_size(path, metadata.get("image_size"), image_size)
    dim = len(reference.statistics.mean)
    if dim != extractor.dim:
        raise ValueError(
            f"reference {path} has {dim} feature channels and the extractor {extractor.name} gives "
            f"{extractor.dim}; the file it was made with is needed"
        )
    return reference


def _require_record(metadata: Mapping[str, object], path: Path) -> None:
    """Check that a reference says about itself what `write_reference` writes, and no more.

    Raises:
        ValueError: it does not.
    """
    hints = get_type_hints(ReferenceRecord)
    kinds = {name: get_origin(hint) or hint for name, hint in hints.items()}
    kinds["kind"] = str
    # Files from before classes were written down are read as well.
    require_entries({"class_names": [], **metadata}, kinds, path)
    unknown = sorted(metadata.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{path} is damaged: its metadata has {unknown[0]!r}, which is unknown")


def _holds_only_images(path: Path) -> bool:
    """Whether an `.npz` has images and no statistics."""
    names = array_names(path)
    return MEMBER in names and "mu" not in names


def _described_array(
    array: ImageArray, kind: ReferenceKind, extractor: FeatureExtractor, image_size: int
) -> Reference:
    """Statistics of the images of a file."""
    require_size(array.path, array.size[0], image_size)
    require_size(array.path, array.size[1], image_size)
    statistics, hashes = FrechetStatistics(extractor.dim), ImageHashes()
    first = 0
    # On every rank the whole file, of which one counts.
    for pixels in array.batches(_ARRAY_BATCH):
        positions = torch.arange(first, first + len(pixels))
        first += len(pixels)
        if distributed.is_main():
            statistics.update(extractor.features(pixels))
            hashes.update(pixels, positions)
    metadata: ReferenceRecord = {
        "kind": kind,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "data": str(array.path),
        "pixels_sha256": hashes.compute(),
        "num_images": len(array),
        "image_size": image_size,
        "crop": _NO_CROP,
        "class_names": [],
    }
    return Reference(statistics.compute(), dict(metadata))


def require_classes(class_names: tuple[str, ...], reference: Reference, path: Path) -> None:
    """Check that a reference is of the classes that a generator draws.

    Args:
        class_names: the generator's; empty where nothing is known of them.
        reference: to compare its samples with.
        path: of the file.

    Raises:
        ValueError: it is of others, so a distance would tell the data apart and not the generator.
    """
    theirs = reference.metadata.get("class_names")
    theirs = tuple(map(str, theirs)) if isinstance(theirs, list) else ()
    if class_names and theirs:
        require_same_classes(
            Identity(class_names=theirs),
            Identity(class_names=class_names),
            where=f"reference {path}",
            way_out="give one of the data that the generator was trained on: `mergevq evaluate "
            "reference --kind generation --data TRAINING_DATA --out REF.npz`",
        )


def require_size(path: Path, found: object, image_size: int) -> None:
    """Check that a reference is of images as large as those it is compared with.

    Raises:
        ValueError: it is not; the message names both sizes.
    """
    if found is not None and found != image_size:
        raise ValueError(
            f"reference {path} is of {found} x {found} pixels and the images to evaluate have "
            f"{image_size} x {image_size}; a distance between sizes means nothing: write a "
            f"reference with --image-size {image_size}"
        )


def reference_features(
    path: Path, extractor: FeatureExtractor, batch_size: int
) -> Float[Tensor, "n f"] | None:
    """Features of a reference's images: those it holds, or of the images it holds, or None.

    Args:
        path: of the file.
        extractor: what sees the images.
        batch_size: images at once.
    """
    features = load_features(path)
    if features is not None:
        return features
    if MEMBER not in array_names(path):
        return None
    images = ImageArray(path)
    return torch.cat([extractor.features(pixels).cpu() for pixels in images.batches(batch_size)])
