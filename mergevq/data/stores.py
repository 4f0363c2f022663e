"""Images in shards: parquet files in the Hugging Face layout and WebDataset tar files.

A shard may be a stranger's: everything it declares is compared with what can be there before it is
read, and whatever does not fit is one `ValueError` that names the file.
"""

import importlib
import io
import logging
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from mergevq.data.listing import Listing, Unused, is_hidden, looks_like_picture
from mergevq.data.prepare import ENDINGS
from mergevq.runtime.environment import needing
from mergevq.runtime.files import MAX_JSON_BYTES, parse_json

_MAX_CLASSES = 2**20
# Largest label of a tar shard, and header of a member, that is read.
_MOST_HEADER_BYTES = 2**20
# A parquet file may declare so much, however small it is.
_HARMLESS_BYTES = 2**28
_FEW_ROWS = 2**20
# Row groups kept in memory per process; a parquet data set below this is read once.
_CACHED_BYTES = 2**30

_logger = logging.getLogger("mergevq")


@runtime_checkable
class Store(Protocol):
    """Encoded images by position; picklable, with no open file, so worker processes share none."""

    def read_bytes(self, position: int, most: int) -> bytes:
        """Content of an image file, of at most so many bytes.

        A missing or larger image is a `ValueError` or `OSError`; a file of many images that is
        damaged is a `RuntimeError`.
        """
        ...

    def name(self, position: int) -> str:
        """A name that is unique and does not change when the data move."""
        ...

    def file(self, position: int) -> str | None:
        """Path of the file that holds an image; None where no file does."""
        ...


class Content(NamedTuple):
    """Everything a kind of place has to say of its images."""

    store: Store
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


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


# Parquet


@dataclass(frozen=True, slots=True)
class _RowGroup:
    """A part of a parquet file that is read and decompressed as a whole."""

    path: str
    number: int
    column: str
    num_rows: int
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

    def read_bytes(self, position: int, most: int) -> bytes:
        group = self._group_of(position)
        value = self._column(group)[position - int(self.first_group_rows[group])]
        if self.groups[group].column.endswith(".bytes"):
            value = value["bytes"] if value.is_valid else value
        if not value.is_valid:
            raise ValueError("the row has no image bytes")
        buffer = value.as_buffer()
        _require_few_bytes(buffer.size, most)
        return buffer.to_pybytes()

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


def _require_few_bytes(size: int, most: int) -> None:
    """Check the size of an encoded image before it is copied.

    Raises:
        ValueError: there are too many.
    """
    if size > most:
        raise ValueError(f"{size:,} bytes are more than the {most:,} that are read of one image")


@contextmanager
def _reading(message: str, kind: type[Exception]) -> Iterator[None]:
    """Turn whatever a library raises inside, which is of unrelated types, into one error."""
    try:
        yield
    except Exception as error:
        raise kind(f"{message}: {error}") from error


def _read_row_group(group: _RowGroup) -> Any:  # noqa: ANN401 - pyarrow is an optional import
    """Read the image column of a row group.

    Raises:
        RuntimeError: the file is damaged.
    """
    parquet = _parquet()
    damaged = f"row group {group.number} of {group.path} is damaged"
    with _reading(damaged, RuntimeError), parquet.ParquetFile(group.path) as file:
        table = file.read_row_group(group.number, columns=[group.column], use_threads=False)
    column = table.column(0)
    if len(column) != group.num_rows:
        raise RuntimeError(f"{damaged}: {len(column)} of its {group.num_rows} rows are there")
    return column


class _ParquetHead(NamedTuple):
    """Parts of a parquet file that are read when it is opened: everything but the images."""

    groups: list[_RowGroup]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def _read_parquet_head(path: str) -> _ParquetHead:
    """Read the layout, the labels and the names of the classes.

    Raises:
        ValueError: the file is damaged, forged, or has no image column.
    """
    parquet = _parquet()
    size, damaged = os.stat(path).st_size, f"{path} is not a readable parquet file"
    with _reading(damaged, ValueError), parquet.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        layout = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        names = list(schema.names)
        chunks = [
            {
                chunk.path_in_schema: (chunk.total_compressed_size, chunk.total_uncompressed_size)
                for chunk in (group.column(place) for place in range(group.num_columns))
            }
            for group in layout
        ]
    column = _image_column(schema, path)
    num_rows = sum(group.num_rows for group in layout)
    if not num_rows == metadata.num_rows <= max(size, _FEW_ROWS):
        raise ValueError(
            f"{path} declares {metadata.num_rows:,} rows, {num_rows:,} in its row groups, in "
            f"{size:,} bytes; write the file again"
        )
    groups = [
        _RowGroup(
            path, number, column, group.num_rows, _declared(path, number, *found[column], size)
        )
        for number, (group, found) in enumerate(zip(layout, chunks, strict=True))
        if column in found
    ]
    if len(groups) != len(layout):
        raise ValueError(f"{path}: not every row group has the column {column!r}")
    labels = np.full(num_rows, -1, dtype=np.int64)
    if "label" in names:
        with _reading(damaged, ValueError), parquet.ParquetFile(path) as file:
            labels = _read_labels(file, path, labels)
    return _ParquetHead(groups, labels, _label_names(schema.metadata or {}, path))


def _image_column(schema: Any, path: str) -> str:  # noqa: ANN401 - pyarrow is optional
    """Path of the column with the bytes of image files.

    Raises:
        ValueError: there is none, or more than one.
    """
    types = importlib.import_module("pyarrow").types
    found = [name for name in schema.names if name in {"image", "img"}]
    if not found:
        raise ValueError(
            f"{path} has the columns {_few(schema.names)}; it needs 'image' with the bytes of an "
            "image file, and may have 'label' with its class number"
        )
    if len(found) > 1 or schema.names.count("label") > 1:
        raise ValueError(
            f"{path} has the columns {_few(schema.names)}; one of 'image' and 'img' and one "
            "'label' can be used, and the others must be left out or renamed"
        )
    kind, column = schema.field(found[0]).type, found[0]
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, column = kind.field("bytes").type, f"{column}.bytes"
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ValueError(
            f"{path}: column {column!r} is {str(kind)[:200]} and must be the bytes of an image "
            "file, or a struct with 'bytes'"
        )
    return column


def _few(names: list[str]) -> str:
    """Names as a list, of which a stranger may have written thousands."""
    shown = ", ".join(repr(name[:40]) for name in names[:20])
    return f"[{shown}{', ..' if len(names) > 20 else ''}]"


def _declared(path: str, number: int, there: int, declared: int, size: int) -> int:
    """Bytes that the images of a row group will take in memory.

    Args:
        path: of the file.
        number: of the row group.
        there: bytes it says they take in the file.
        declared: bytes it says they take in memory.
        size: of the file.

    Raises:
        ValueError: they are far more than can lie in the file.
    """
    # Images are compressed already; equal ones may shrink, and small amounts do no harm.
    if not (0 <= there <= size and 0 <= declared <= max(_HARMLESS_BYTES, 32 * there)):
        raise ValueError(
            f"{path}: row group {number} declares {declared:,} bytes of images in {there:,} of a "
            f"file of {size:,}; write the file again"
        )
    return declared


def _read_labels(
    file: Any,  # noqa: ANN401 - pyarrow is optional
    path: str,
    unlabelled: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Class numbers; -1 where there is none.

    Raises:
        ValueError: there are more or fewer labels than rows.
    """
    kind = file.schema_arrow.field("label").type
    if not importlib.import_module("pyarrow").types.is_integer(kind):
        _logger.warning(
            "%s: label is %s, no class number; the images get none", path, str(kind)[:200]
        )
        return unlabelled
    column = file.read(columns=["label"], use_threads=False).column(0)
    labels = column.cast("int64").fill_null(-1).to_numpy()
    if len(labels) != len(unlabelled):
        raise ValueError(f"{len(labels)} labels for {len(unlabelled)} rows")
    return labels


def _label_names(metadata: dict[bytes, bytes], path: str) -> tuple[str, ...]:
    """Names of the classes, where the Hugging Face library has written them.

    Raises:
        ValueError: something else is written there.
    """
    where = f"metadata 'huggingface' of {path}"
    text = metadata.get(b"huggingface", b"{}")
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{where} has more than the {MAX_JSON_BYTES} bytes that are read of JSON")
    entry: Any = parse_json(text, where=where)
    for name in ("info", "features", "label"):
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be a JSON object with the names of the classes")
        entry = entry.get(name, {})
    names = (entry.get("names") or []) if isinstance(entry, dict) else entry
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} must name the classes in a list of texts")
    return tuple(names)


def open_parquet(listing: Listing) -> Content:
    """Rows of parquet files in the Hugging Face layout.

    Raises:
        ValueError: the files disagree about the classes.
    """
    files, names = listing.paths(), listing.names
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
        first_group_rows=_starts([group.num_rows for group in groups]),
    )
    return Content(store, labels, class_names)


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

    def read_bytes(self, position: int, most: int) -> bytes:
        path = self.files[self.shards[position]]
        size = int(self.sizes[position])
        _require_few_bytes(size, most)
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


class _HeaderFile(io.BufferedReader):
    """A shard, of which nothing is read at once that no header can fill."""

    def read(self, size: int | None = -1) -> bytes:
        """Read some bytes.

        Raises:
            tarfile.ReadError: they are too many.
        """
        if size is None or not 0 <= size <= _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _members(path: str) -> Iterator[tuple[tarfile.TarInfo, _HeaderFile]]:
    """Members of a shard, and the file to read them from.

    Raises:
        ValueError: the shard is damaged.
    """
    size, end = os.stat(path).st_size, 0
    damaged = f"shard {path} is damaged or no uncompressed tar file"
    with _HeaderFile(io.FileIO(path)) as file:
        with _reading(damaged, ValueError):
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it has no file of its own
        while True:
            # Forged headers make tarfile raise from several unrelated types.
            with _reading(damaged, ValueError):
                member = tar.next()
            if member is None or member.size < 0 or tar.offset <= end or tar.offset > size:
                break
            end = tar.offset
            yield member, file
        with _reading(damaged, ValueError):
            file.seek(end)
            complete = member is None and file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    if not complete:
        # To tarfile a damaged header is just the end.
        raise ValueError(f"shard {path} is damaged: it breaks off at byte {end}")


def _index_shard(path: str, name: str, unused: Unused) -> dict[str, _TarSample]:
    """Find the images of a shard, by key, and read their labels.

    Raises:
        ValueError: the shard is damaged, or a label is no class number.
    """
    samples: dict[str, _TarSample] = {}
    for member, file in _members(path):
        folder, slash, file_name = member.name.rpartition("/")
        key, _, ending = file_name.partition(".")
        if member.isdir() or not key or is_hidden(member.name):
            continue
        sample = samples.setdefault(folder + slash + key, _TarSample())
        if ending.lower() in {"cls", "json"} and member.isfile():
            sample.label = _read_label(member, file, path, sample.label)
        elif reason := _add_member(member, ending.lower(), sample):
            unused.add(reason, f"{name}:{member.name}")
    return {key: sample for key, sample in samples.items() if sample.offset >= 0}


def _add_member(member: tarfile.TarInfo, ending: str, sample: _TarSample) -> str:
    """Note an image's place; why a picture is not used, empty if it is used or is none."""
    if not looks_like_picture(member.name):
        return ""
    if not member.isfile():
        return "links are not followed in a shard"
    if member.issparse():
        return "its zeros are left out; write the shard without --sparse"
    if f".{ending}" not in ENDINGS:
        return (
            "its key ends at the first dot of its name, and the rest is no format that is read; "
            "take out the other dots, or convert to PNG or JPEG"
        )
    if sample.offset >= 0:
        return "a second picture under one key"
    sample.offset, sample.size = member.offset_data, member.size
    return ""


def _read_label(member: tarfile.TarInfo, file: _HeaderFile, path: str, before: int) -> int:
    """Class number in a `.cls` or `.json` member; the one known before if there is none in it.

    Raises:
        ValueError: the label is no class number.
    """
    if member.size > _MOST_HEADER_BYTES or member.issparse():
        raise ValueError(
            f"{member.name} in {path!r} has {member.size:,} bytes; {_MOST_HEADER_BYTES:,} are read "
            "of a label, and none of a sparse file"
        )
    file.seek(member.offset_data)
    data = file.read(member.size)
    try:
        is_json = member.name.lower().endswith("json")
        value = parse_json(data, where=member.name).get("label") if is_json else data.decode()
        label = before if value is None else int(str(value))
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{member.name} in {path!r} holds no class number: {data[:60]!r}"
        ) from error
    if not -1 <= label < _MAX_CLASSES:
        raise ValueError(
            f"{member.name} in {path!r} must hold a class number from 0 to {_MAX_CLASSES - 1}, or "
            f"-1 for none: {data[:60]!r}"
        )
    return label


def open_tar(listing: Listing) -> Content:
    """Index WebDataset shards: one pass over the headers, no image is read."""
    files, names = listing.paths(), listing.names
    indexes = [
        _index_shard(file, name, listing.unused) for file, name in zip(files, names, strict=True)
    ]
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
    return Content(store, labels, _number_classes(labels, names[0]))
