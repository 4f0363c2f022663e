"""Where images lie: folders, parquet files, tar shards, each as one sized collection.

Nothing is copied or converted when a collection is opened, and an image is decoded when it is read.
"""

import hashlib
import importlib
import io
import json
import logging
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mergevq.extras import needing
from mergevq.identity import Identity, identify

_IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# What Pillow may open: it would hand PostScript found in a shard to an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_ENDINGS = frozenset({*_IMAGE_ENDINGS, ".parquet", ".tar"})
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
_MAX_CLASSES = 2**20
# Row groups kept in memory per process; a parquet data set below this is read once.
_CACHED_BYTES = 2**30

_logger = logging.getLogger("mergevq")


class BrokenImageError(RuntimeError):
    """One image cannot be read; the others of its data set may be fine."""


@runtime_checkable
class _Store(Protocol):
    """Encoded images by position; picklable, with no open file, so worker processes share none."""

    def read_bytes(self, position: int) -> bytes:
        """Content of an image file.

        A missing image is a `BrokenImageError`; a file of many images that is damaged is any other
        `RuntimeError`.
        """
        ...

    def name(self, position: int) -> str:
        """A name that is unique and does not change when the data move."""
        ...

    def file(self, position: int) -> str | None:
        """Path of the file that holds an image; None where no file does."""
        ...


class ImageDataset:
    """A sized, map-style collection of images with optional class labels."""

    def __init__(
        self,
        store: _Store,
        labels: NDArray[np.int64],
        class_names: tuple[str, ...],
        *,
        positions: NDArray[np.int64] | None = None,
        broken: dict[str, str] | None = None,
    ) -> None:
        self._store = store
        self._labels = labels
        self._positions = np.arange(len(labels)) if positions is None else positions
        self.class_names = class_names
        """One name per class, in label order; empty when the data are unlabelled."""
        self.broken: dict[str, str] = {} if broken is None else broken
        """Error by name of the images that could not be read so far; shared with every subset."""

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
        data = self._store.read_bytes(int(self._positions[index]))
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return to_rgb(image)
        except UnidentifiedImageError as error:
            raise BrokenImageError(f"cannot read {self.name(index)}: no image format") from error
        except Exception as error:
            # Damaged files make Pillow raise from a dozen unrelated types.
            raise BrokenImageError(f"cannot read {self.name(index)}: {error}") from error

    def label(self, index: int) -> int:
        """Class of one image in [0, num_classes); -1 when it has none."""
        return int(self._labels[self._positions[index]])

    def name(self, index: int) -> str:
        """Path below the opened folder, `file.parquet:row` or `shard.tar:key`."""
        return self._store.name(int(self._positions[index]))

    def identity(self) -> Identity:
        """Classes, and digests of names and labels in order; reads no image."""
        indices = range(len(self))
        return identify(
            (self.name(index) for index in indices),
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
                data = self._store.read_bytes(int(self._positions[index]))
            except BrokenImageError:
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
        )

    def first(self, count: int) -> "ImageDataset":
        """A view of the first so many images, or of all if there are fewer.

        Raises:
            ValueError: the count is below 1.
        """
        if count < 1:
            raise ValueError(f"max_images ({count}) must be at least 1, or None for all")
        return self.subset(range(min(count, len(self))))

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


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any mode into upright 8-bit RGB, transparent parts on white.

    Raises:
        ValueError: the mode has no defined range.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("a float image has no defined range; save it with 8 bits per channel")
    if image.mode.startswith("I"):
        # 16 bits, which Pillow opens as 16 or 32; 65535 / 257 is 255.
        pixels = np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8)
        return Image.fromarray(pixels).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


# Opening


def open_images(path: str, *, max_images: int | None = None) -> ImageDataset:
    """Open images where they lie; at least one of them is read to see that it can be.

    Parquet files and digits need a package that is optional: a `RuntimeError` says which.

    Args:
        path: a folder of images (its sub-folders are the classes if no image lies outside them),
            a parquet file or WebDataset shard, a folder of either, a comma-separated list with
            `*` and `{000..009}` patterns, or `digits`.
        max_images: use only the first so many.

    Raises:
        ValueError: the path is missing, mixes kinds of files or holds no usable image.
    """
    dataset = _open_digits() if path == "digits" else _open_files(path)
    if max_images is not None:
        dataset = dataset.first(max_images)
    if len(dataset) == 0:
        raise ValueError(f"data path {path!r} holds no images")
    broken: dict[str, str] = {}
    read_nearest(dataset, 0, broken)
    dataset.record_broken(broken)
    return dataset


def read_nearest(
    dataset: ImageDataset, index: int, broken: dict[str, str]
) -> tuple[int, Image.Image]:
    """Read the first readable image at or after an index, and add those skipped to `broken`.

    After the last image comes the first.

    Raises:
        ValueError: no image of the data set can be read.
    """
    for offset in range(len(dataset)):
        candidate = (index + offset) % len(dataset)
        try:
            return candidate, dataset.read(candidate)
        except BrokenImageError as error:
            broken[dataset.name(candidate)] = str(error)
    reason = next(iter(broken.values()), "there are none")
    raise ValueError(f"none of the {len(dataset)} images can be read: {reason}")


def _open_files(path: str) -> ImageDataset:
    """Find out what kind of files a path means, and open them.

    Raises:
        ValueError: there are none, or more than one kind.
    """
    entries = _expand(path)
    found = {file for entry in entries for file in _walk(entry)}
    files = sorted(found, key=lambda file: file.replace(os.sep, "/"))
    endings = {_ending(file) for file in files}
    kinds = sorted({"images" if ending in _IMAGE_ENDINGS else ending for ending in endings})
    if not kinds:
        raise ValueError(
            f"data path {path!r} holds no images: no file ends in {', '.join(sorted(_ENDINGS))}"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"data path {path!r} mixes {' and '.join(kinds)}; choose one kind, as in 'DIR/*.tar'"
        )
    folders = [entry if os.path.isdir(entry) else os.path.dirname(entry) for entry in entries]
    root = os.path.commonpath(folders)
    names = [os.path.relpath(file, root).replace(os.sep, "/") for file in files]
    if kinds == [".parquet"]:
        return _open_parquet(files, names)
    if kinds == [".tar"]:
        return _open_tar(files, names)
    return _open_folder(root, names)


def _expand(path: str) -> list[str]:
    """Absolute files and folders that a path, list or pattern names.

    Raises:
        ValueError: one of them does not exist.
    """
    if os.path.exists(path):
        return [os.path.abspath(path)]
    entries: list[str] = []
    for part in path.split(","):
        for pattern in _expand_braces(os.path.expanduser(part.strip())):
            found = sorted(glob(pattern))
            if not found:
                raise ValueError(f"data path {pattern!r} does not exist")
            entries += [os.path.abspath(entry) for entry in found]
    return entries


def _expand_braces(pattern: str) -> list[str]:
    """Write out each `{000..009}` as its numbers, with the same zeros in front."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    heads = (pattern[: match.start()] + number for number in numbers)
    return [head + tail for head in heads for tail in _expand_braces(pattern[match.end() :])]


def _walk(entry: str) -> Iterator[str]:
    """Data files at or below a path; hidden ones are no data."""
    if _ending(entry) in _ENDINGS and os.path.isfile(entry):
        yield entry
    for parent, folders, names in os.walk(entry, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if _ending(name) in _ENDINGS and not name.startswith("."):
                yield os.path.join(parent, name)


def _ending(name: str) -> str:
    """Of a file name, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def _parquet() -> ModuleType:
    """The part of pyarrow that reads parquet files."""
    with needing("data", "reading parquet files"):
        return importlib.import_module("pyarrow.parquet")


def _number_classes(labels: NDArray[np.int64], origin: str) -> tuple[str, ...]:
    """Names for classes that have only numbers.

    Raises:
        ValueError: the labels cannot be class numbers.
    """
    highest = int(labels.max(initial=-1))
    if int(labels.min(initial=-1)) < -1 or highest >= _MAX_CLASSES:
        raise ValueError(
            f"labels of {origin} must be class numbers from 0, or -1 for none; they run from "
            f"{labels.min()} to {highest}"
        )
    return tuple(str(label) for label in range(highest + 1))


# Folders


@dataclass(frozen=True, slots=True)
class _FolderStore:
    """One file per image."""

    root: str
    # An array of bytes: a list of a million strings is copied page by page into forked workers.
    names: Shaped[np.ndarray, "n"]

    def read_bytes(self, position: int) -> bytes:
        name = self.name(position)
        try:
            return Path(self.root, name).read_bytes()
        except OSError as error:
            raise BrokenImageError(f"cannot read {name}: {error}") from error

    def name(self, position: int) -> str:
        return os.fsdecode(self.names[position])

    def file(self, position: int) -> str:
        return os.path.join(self.root, self.name(position))


def _open_folder(root: str, names: list[str]) -> ImageDataset:
    """Images below a folder, labelled by its sub-folders if no image lies outside them.

    Raises:
        ValueError: the sub-folders are splits, not classes.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    class_names = tuple(sorted(set(tops) - {""}))
    if len(class_names) > 1 and _SPLIT_NAMES.issuperset(name.lower() for name in class_names):
        raise ValueError(
            f"data path {root!r} holds splits ({', '.join(class_names)}), not classes; name one "
            "as the path and another as val_path"
        )
    if class_names and "" in tops:
        _logger.warning(
            "%d images lie directly in %s: its sub-folders are not used as classes",
            tops.count(""),
            root,
        )
        class_names = ()
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.array([numbers.get(top, -1) for top in tops], dtype=np.int64)
    store = _FolderStore(root, np.array([os.fsencode(name) for name in names], dtype=np.bytes_))
    return ImageDataset(store, labels, class_names)


# Parquet


@dataclass(frozen=True, slots=True)
class _RowGroup:
    """A part of a parquet file that is read and decompressed as a whole."""

    path: str
    number: int
    column: str
    num_bytes: int


@dataclass(frozen=True)
class _ParquetStore:
    """Rows of parquet files; row groups are read when touched and kept within a budget."""

    names: list[str]
    first_rows: NDArray[np.int64]
    """Position of each file's first row."""
    groups: list[_RowGroup]
    first_group_rows: NDArray[np.int64]
    """Position of each row group's first row."""
    cached: OrderedDict[int, Any] = field(default_factory=OrderedDict)
    """Arrow columns by row group, the least recently used first."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": OrderedDict()}

    def file(self, position: int) -> str:
        return self.groups[self._group_of(position)].path

    def _group_of(self, position: int) -> int:
        """Number of the row group that a row is in."""
        return int(np.searchsorted(self.first_group_rows, position, side="right")) - 1

    def read_bytes(self, position: int) -> bytes:
        group = self._group_of(position)
        row = self._column(group)[position - int(self.first_group_rows[group])].as_py()
        data = row["bytes"] if isinstance(row, dict) else row
        if data is None:
            raise BrokenImageError(f"cannot read {self.name(position)}: the row has no image bytes")
        return data

    def name(self, position: int) -> str:
        file = int(np.searchsorted(self.first_rows, position, side="right")) - 1
        return f"{self.names[file]}:{position - int(self.first_rows[file])}"

    def _column(self, number: int) -> Any:  # noqa: ANN401 - pyarrow is an optional import
        """The image column of a row group."""
        if number in self.cached:
            self.cached.move_to_end(number)
            return self.cached[number]
        group = self.groups[number]
        while self.cached and self._cached_bytes() + group.num_bytes > _CACHED_BYTES:
            self.cached.popitem(last=False)
        self.cached[number] = _read_row_group(group)
        return self.cached[number]

    def _cached_bytes(self) -> int:
        """Size of the row groups in memory."""
        return sum(self.groups[number].num_bytes for number in self.cached)


def _read_row_group(group: _RowGroup) -> Any:  # noqa: ANN401 - pyarrow is an optional import
    """Read the image column of a row group.

    Raises:
        RuntimeError: the file is damaged.
    """
    parquet = _parquet()
    pyarrow = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(group.path) as file:
            table = file.read_row_group(group.number, columns=[group.column], use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise RuntimeError(
            f"row group {group.number} of {group.path} is damaged: {error}"
        ) from error
    return table.column(0)


class _ParquetHead(NamedTuple):
    """What is read of a parquet file when it is opened: everything but the images."""

    groups: list[_RowGroup]
    group_rows: list[int]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def _read_parquet_head(path: str) -> _ParquetHead:
    """Read the layout, the labels and the names of the classes.

    Raises:
        ValueError: the file is damaged or has no image column.
    """
    parquet = _parquet()
    pyarrow = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            labels = np.full(metadata.num_rows, -1, dtype=np.int64)
            if "label" in schema.names:
                labels = _to_labels(file.read(columns=["label"], use_threads=False).column(0), path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    image = next((name for name in ("image", "img") if name in schema.names), None)
    if image is None:
        raise ValueError(
            f"{path} has the columns {schema.names}; it needs 'image' with the bytes of an image "
            "file, and may have 'label' with its class number"
        )
    layout = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    column = f"{image}.bytes" if pyarrow.types.is_struct(schema.field(image).type) else image
    groups = [
        _RowGroup(path, number, column, group.total_byte_size)
        for number, group in enumerate(layout)
    ]
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    label = features.get("info", {}).get("features", {}).get("label", {})
    return _ParquetHead(
        groups, [group.num_rows for group in layout], labels, tuple(label.get("names") or ())
    )


def _to_labels(column: Any, path: str) -> NDArray[np.int64]:  # noqa: ANN401 - an arrow array
    """Class numbers; -1 where there is none."""
    if importlib.import_module("pyarrow").types.is_integer(column.type):
        return column.cast("int64").fill_null(-1).to_numpy()
    _logger.warning("%s: label is %s, no class number; the images get none", path, column.type)
    return np.full(len(column), -1, dtype=np.int64)


def _open_parquet(files: list[str], names: list[str]) -> ImageDataset:
    """Rows of parquet files in the Hugging Face layout.

    Raises:
        ValueError: the files disagree about the classes.
    """
    heads = [_read_parquet_head(file) for file in files]
    for file, head in zip(files, heads, strict=True):
        if head.class_names != heads[0].class_names:
            raise ValueError(f"{file} and {files[0]} name different classes; open them separately")
    groups = [group for head in heads for group in head.groups]
    total = sum(group.num_bytes for group in groups)
    if total > _CACHED_BYTES:
        _logger.warning(
            "the parquet files hold %.1f GiB, more than the %.1f GiB kept per process: each image "
            "read in random order costs a row group (%.1f MiB); tar shards or a folder are faster",
            total / 2**30,
            _CACHED_BYTES / 2**30,
            total / len(groups) / 2**20,
        )
    labels = np.concatenate([head.labels for head in heads])
    numbers = _number_classes(labels, names[0])
    class_names = heads[0].class_names or numbers
    if len(numbers) > len(class_names):
        raise ValueError(f"label ({len(numbers) - 1}) must be below {len(class_names)} classes")
    store = _ParquetStore(
        names=names,
        first_rows=_starts([len(head.labels) for head in heads]),
        groups=groups,
        first_group_rows=_starts([rows for head in heads for rows in head.group_rows]),
    )
    return ImageDataset(store, labels, class_names)


def _starts(lengths: list[int]) -> NDArray[np.int64]:
    """Where each of several parts laid end to end begins."""
    return np.cumsum([0, *lengths], dtype=np.int64)[:-1]


# Tar shards


@dataclass(frozen=True, slots=True)
class _TarStore:
    """Members of tar files by offset."""

    files: list[str]
    names: list[str]
    shards: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: Shaped[np.ndarray, "n"]

    def read_bytes(self, position: int) -> bytes:
        path = self.files[self.shards[position]]
        size = int(self.sizes[position])
        try:
            with open(path, "rb") as file:
                file.seek(int(self.offsets[position]))
                data = file.read(size)
        except OSError as error:
            raise RuntimeError(f"cannot read shard {path}: {error}") from error
        if len(data) < size:
            raise RuntimeError(f"shard {path} has become shorter since it was opened")
        return data

    def name(self, position: int) -> str:
        return f"{self.names[self.shards[position]]}:{os.fsdecode(self.keys[position])}"

    def file(self, position: int) -> str:
        return self.files[self.shards[position]]


@dataclass(slots=True)
class _TarSample:
    """The members of a shard that share a key."""

    offset: int = -1
    size: int = 0
    label: int = -1


def _index_shard(path: str) -> dict[str, _TarSample]:
    """Find the images of a shard, by key, and read their labels.

    Raises:
        ValueError: the shard is damaged.
    """
    samples: dict[str, _TarSample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, file_name = member.name.rpartition("/")
                key, _, ending = file_name.partition(".")
                if member.isfile() and key:
                    sample = samples.setdefault(folder + slash + key, _TarSample())
                    _add_member(tar, member, ending.lower(), sample)
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"shard {path} is damaged or no uncompressed tar file: {error}") from error
    if not complete:
        # To tarfile a damaged header is just the end.
        raise ValueError(f"shard {path} is damaged: it breaks off at byte {end}")
    return {key: sample for key, sample in samples.items() if sample.offset >= 0}


def _add_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, sample: _TarSample
) -> None:
    """Note an image's place, or read a label.

    Raises:
        ValueError: the label is no class number.
    """
    if f".{ending}" in _IMAGE_ENDINGS and sample.offset < 0:
        sample.offset, sample.size = member.offset_data, member.size
    if ending not in {"cls", "json"}:
        return
    content = tar.extractfile(member)
    data = b"" if content is None else content.read()
    try:
        value = data.decode() if ending == "cls" else json.loads(data).get("label")
        if value is not None:
            sample.label = int(str(value))
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{member.name} in {tar.name!r} holds no class number: {data[:60]!r}"
        ) from error


def _open_tar(files: list[str], names: list[str]) -> ImageDataset:
    """Index WebDataset shards: one pass over the headers, no image is read."""
    indexes = [_index_shard(file) for file in files]
    samples = [sample for index in indexes for sample in index.values()]
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    store = _TarStore(
        files=files,
        names=names,
        shards=np.repeat(np.arange(len(files), dtype=np.int32), [len(index) for index in indexes]),
        offsets=np.array([sample.offset for sample in samples], dtype=np.int64),
        sizes=np.array([sample.size for sample in samples], dtype=np.int64),
        keys=np.array([os.fsencode(key) for index in indexes for key in index], dtype=np.bytes_),
    )
    return ImageDataset(store, labels, _number_classes(labels, names[0]))


# Digits


@dataclass(frozen=True, slots=True)
class _DigitStore:
    """scikit-learn's handwritten digits."""

    images: UInt8[np.ndarray, "n 32 32"]

    def read_bytes(self, position: int) -> bytes:
        return b"P5 32 32 255\n" + self.images[position].tobytes()

    def name(self, position: int) -> str:
        return f"digits:{position}"

    def file(self, position: int) -> None:  # noqa: ARG002 - none has one
        return None


def _open_digits() -> ImageDataset:
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
    return ImageDataset(_DigitStore(images), labels, tuple("0123456789"))
