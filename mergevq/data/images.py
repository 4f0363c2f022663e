"""Where images lie: folders, parquet files, tar shards, each as one sized collection.

Nothing is copied or converted when a collection is opened, and an image is decoded when it is read.
"""

import hashlib
import importlib
import logging
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy.typing import NDArray
from PIL import Image

from mergevq.config.base import MAX_PIXELS
from mergevq.config.identity import Identity, identify
from mergevq.config.ranges import check_number
from mergevq.data.listing import Listing, Unused, list_files, split_of
from mergevq.data.prepare import (
    BrokenImageError,
    Reduced,
    decode_reduced,
    most_bytes,
    picture_size,
    read_bounded,
)
from mergevq.data.stores import Content, Store, open_parquet, open_tar
from mergevq.runtime.environment import needing

_logger = logging.getLogger("mergevq")


class ImageDataset:
    """A sized, map-style collection of images with optional class labels."""

    def __init__(
        self,
        store: Store,
        labels: NDArray[np.int64],
        class_names: tuple[str, ...],
        *,
        positions: NDArray[np.int64] | None = None,
        broken: dict[str, str] | None = None,
        unused: Unused | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._store = store
        self._labels = labels
        self._positions = np.arange(len(labels)) if positions is None else positions
        self.class_names = tuple(unicodedata.normalize("NFC", name) for name in class_names)
        """One name per class, in label order; empty when the data are unlabelled."""
        self.broken: dict[str, str] = {} if broken is None else broken
        """Error by name of the images that could not be read so far; shared with every subset."""
        self.unused = Unused() if unused is None else unused
        """Pictures that lie there and are not among the images."""
        self.max_pixels = max_pixels
        """Largest width times height that is decoded."""

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 when the data are unlabelled."""
        return len(self.class_names)

    @property
    def num_unlabelled(self) -> int:
        """How many of the images have no label."""
        return int((self._labels[self._positions] < 0).sum())

    def __len__(self) -> int:
        return len(self._positions)

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB, upright, transparent parts on white.

        Any other `RuntimeError` means that a whole shard is damaged.

        Raises:
            BrokenImageError: this image cannot be read.
        """
        return self.read_reduced(index, None).image

    def read_reduced(self, index: int, least_side: int | None) -> Reduced:
        """Decode one image, a large JPEG perhaps smaller; see `decode_reduced`.

        Raises:
            BrokenImageError: this image cannot be read.
        """
        try:
            data = self._store.read_bytes(int(self._positions[index]), most_bytes(self.max_pixels))
            return decode_reduced(data, least_side, max_pixels=self.max_pixels)
        except (OSError, ValueError) as error:
            raise BrokenImageError(f"cannot read {self.name(index)}: {error}") from error

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of one image, upright; decodes no pixel.

        Raises:
            BrokenImageError: this image cannot be read.
        """
        try:
            data = self._store.read_bytes(int(self._positions[index]), most_bytes(self.max_pixels))
            return picture_size(data)
        except (OSError, ValueError) as error:
            raise BrokenImageError(f"cannot read {self.name(index)}: {error}") from error

    def label(self, index: int) -> int:
        """Class of one image in [0, num_classes); -1 when it has none."""
        return int(self._labels[self._positions[index]])

    def name(self, index: int) -> str:
        """Path below the opened folder, `file.parquet:row` or `shard.tar:key`."""
        return self._store.name(int(self._positions[index]))

    def identity(self) -> Identity:
        """Classes, and digests of names and labels in order; reads no image."""
        names = (self.name(index) for index in range(len(self)))
        return identify(
            (unicodedata.normalize("NFC", name) for name in names),
            self._labels[self._positions].tolist(),
            self.class_names,
        )

    def stamp(self) -> str:
        """SHA-256 over size and time of the file of each image; equal where none was touched."""
        digest = hashlib.sha256()
        stamps: dict[str | None, bytes] = {}
        for position in self._positions.tolist():
            file = self._store.file(position)
            if file not in stamps:
                stamps[file] = b"-" if file is None else _stamp(file)
            digest.update(stamps[file] + b"\n")
        return digest.hexdigest()

    def content(self, indices: range) -> str:
        """SHA-256 over the bytes of some images' files, in order; reads them."""
        digest = hashlib.sha256()
        for index in indices:
            try:
                most = most_bytes(self.max_pixels)
                data = self._store.read_bytes(int(self._positions[index]), most)
            except (OSError, ValueError):
                data = b""
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "ImageDataset":
        """A view of some images, with the same names, labels and classes."""
        return ImageDataset(
            self._store,
            self._labels,
            self.class_names,
            positions=self._positions[np.asarray(indices, dtype=np.int64)],
            broken=self.broken,
            unused=self.unused,
            max_pixels=self.max_pixels,
        )

    def spread(self, count: int) -> "ImageDataset":
        """A view of some images, evenly spaced, or of all if there are fewer.

        Raises:
            ValueError: the count is below 1.
        """
        return self.subset(spread(len(self), count))

    def record_broken(self, broken: dict[str, str]) -> None:
        """Count images found broken, elsewhere or here, and warn of each the first time."""
        for name, error in broken.items():
            if name not in self.broken:
                self.broken[name] = error
                _logger.warning("%s (%d broken so far)", error, len(self.broken))


def _stamp(file: str) -> bytes:
    """Size and time of a file."""
    try:
        status = os.stat(file)
    except OSError:
        return b"missing"
    return f"{status.st_size} {status.st_mtime_ns}".encode()


def spread(total: int, count: int) -> list[int]:
    """Positions in [0, total), evenly spaced: the first ones of sorted data would be of one class.

    Raises:
        ValueError: the count is below 1.
    """
    if count < 1:
        raise ValueError(f"max_images ({count}) must be at least 1, or None for all")
    count = min(count, total)
    return [number * total // count for number in range(count)]


# Opening


def open_images(
    path: str, *, max_images: int | None = None, max_pixels: int = MAX_PIXELS
) -> ImageDataset:
    """Open images where they lie; at least one of them is read to see that it can be.

    Parquet files and digits need a package that is optional: a `RuntimeError` says which. Whatever
    looks like a picture and is not used is counted and warned of.

    Args:
        path: a folder of images (its sub-folders are the classes if no image lies outside them),
            a parquet file or WebDataset shard, a folder of either, a comma-separated list with
            `*` and `{000..009}` patterns, or `digits`.
        max_images: use at most so many, evenly spaced.
        max_pixels: largest width times height that is decoded.

    Raises:
        ValueError: the path is missing, mixes kinds of files or splits, or holds no usable image,
            or the limit on pixels is no possible one.
    """
    check_number("", "max_pixels", max_pixels)
    content, unused = (_open_digits(), Unused()) if path == "digits" else _open_files(path)
    dataset = ImageDataset(*content, unused=unused, max_pixels=max_pixels)
    for line in unused.lines():
        _logger.warning("data path %r: %s", path, line)
    if len(dataset) == 0:
        raise ValueError(f"data path {path!r} holds no images{_reasons(unused)}")
    if max_images is not None:
        dataset = dataset.spread(max_images)
    broken: dict[str, str] = {}
    read_nearest(dataset, 0, broken)
    dataset.record_broken(broken)
    return dataset


def _reasons(unused: Unused) -> str:
    """End of a sentence about pictures that are not used."""
    return "".join(f"; {line}" for line in unused.lines())


def read_nearest(
    dataset: ImageDataset, index: int, broken: dict[str, str], least_side: int | None = None
) -> tuple[int, Reduced]:
    """Read the first readable image at or after an index, and add those skipped to `broken`.

    After the last image comes the first. See `decode_reduced` for `least_side`.

    Raises:
        ValueError: no image of the data set can be read.
    """
    for offset in range(len(dataset)):
        candidate = (index + offset) % len(dataset)
        try:
            return candidate, dataset.read_reduced(candidate, least_side)
        except BrokenImageError as error:
            broken[dataset.name(candidate)] = str(error)
    reason = next(iter(broken.values()), "there are none")
    raise ValueError(f"none of the {len(dataset)} images can be read: {reason}")


def _open_files(path: str) -> tuple[Content, Unused]:
    """Find the files that a path means, and open them.

    Raises:
        ValueError: there are none, they do not belong together, or one is damaged.
    """
    listing = list_files(path)
    openers = {"images": _open_folder, ".parquet": open_parquet, ".tar": open_tar}
    return openers[listing.kind](listing), listing.unused


# Folders


@dataclass(frozen=True, slots=True)
class _FolderStore:
    """One file per image."""

    root: str
    # An array of bytes: a list of a million strings is copied page by page into forked workers.
    names: Shaped[np.ndarray, "n"]

    def read_bytes(self, position: int, most: int) -> bytes:
        return read_bounded(Path(self.root, self.name(position)), most)

    def name(self, position: int) -> str:
        return os.fsdecode(self.names[position])

    def file(self, position: int) -> str:
        return os.path.join(self.root, self.name(position))


def _open_folder(listing: Listing) -> Content:
    """Images below a folder, labelled by its sub-folders if no image lies outside them.

    A folder with nothing but one split in it, such as `train`, stands for that split.

    Raises:
        ValueError: two classes have one name.
    """
    root, names = listing.root, listing.names
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    while len(set(tops)) == 1 and split_of(tops[0]) is not None:
        _logger.info("%s holds nothing but %s, and its sub-folders are the classes", root, tops[0])
        root = os.path.join(root, tops[0])
        names = [name.partition("/")[2] for name in names]
        tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    folders = sorted(set(tops) - {""}, key=lambda top: unicodedata.normalize("NFC", top))
    if folders and "" in tops:
        _logger.warning(
            "%d images lie directly in %s: its sub-folders are not used as classes",
            tops.count(""),
            root,
        )
        folders = []
    if len(folders) == 1 and all(name.count("/") > 1 for name in names):
        _logger.warning(
            "all images are of one class, %r; if its sub-folders are the classes, give %s",
            folders[0],
            os.path.join(root, folders[0]),
        )
    _require_different(folders, root)
    numbers = {name: number for number, name in enumerate(folders)}
    labels = np.array([numbers.get(top, -1) for top in tops], dtype=np.int64)
    store = _FolderStore(root, np.array([os.fsencode(name) for name in names], dtype=np.bytes_))
    return Content(store, labels, tuple(folders))


def _require_different(folders: list[str], root: str) -> None:
    """Check that names differ in more than the form of their accents.

    Raises:
        ValueError: two do not; they would be two classes that look the same.
    """
    seen: dict[str, str] = {}
    for folder in folders:
        twin = seen.setdefault(unicodedata.normalize("NFC", folder), folder)
        if twin != folder:
            raise ValueError(
                f"{root} has two folders {folder!r}, one with composed and one with decomposed "
                "letters; move the images of one into the other"
            )


# Digits


@dataclass(frozen=True, slots=True)
class _DigitStore:
    """scikit-learn's handwritten digits."""

    images: UInt8[np.ndarray, "n 32 32"]

    def read_bytes(self, position: int, most: int) -> bytes:  # noqa: ARG002 - they are small
        return b"P5 32 32 255\n" + self.images[position].tobytes()

    def name(self, position: int) -> str:
        return f"digits:{position}"

    def file(self, position: int) -> None:  # noqa: ARG002 - none has one
        return None


def _open_digits() -> Content:
    """1,797 handwritten digits of 8 x 8 pixels and 17 grey levels, enlarged to 32 x 32."""
    with needing("quickstart", "the data set 'digits'"):
        datasets = importlib.import_module("sklearn.datasets")
    digits = datasets.load_digits()
    small = (
        Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)) for image in digits.images
    )
    large = (image.resize((32, 32), Image.Resampling.BICUBIC) for image in small)
    images = np.stack([np.asarray(image) for image in large])
    labels = digits.target.astype(np.int64)
    return Content(_DigitStore(images), labels, tuple("0123456789"))
