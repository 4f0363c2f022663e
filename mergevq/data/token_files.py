"""Images as files of tokens, from which a generator is trained.

A folder of tokens is `tokens.json`, which says what they are, and for each K its shards, such as
`k00144/tokens-00000.safetensors`. A shard holds a fixed number of images in the order of the data,
one row for each or, where mirror images are kept too, two. It appears in one instant when it is
complete and says nothing of when and by whom, so encoding may be stopped, shared out among
processes and repeated, and gives the same bytes. In the end `tokens.json` is sealed with the hash
of every shard, and each is compared with it before it is first read.

Shape letters: B rows of a batch, N rows of a shard, L grid tokens, K kept tokens.
"""

import copy
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from mergevq.config.base import FORMAT_VERSION, MAX_PIXELS
from mergevq.config.identity import Identity
from mergevq.data.layouts import Source
from mergevq.runtime.files import (
    open_tensors,
    parse_json,
    read_json,
    require_entries,
    sha256_of,
    write_json,
)
from mergevq.runtime.settings import from_json, to_json

RECORD = "tokens.json"

# What the shards of one number have in common, whatever their K.
_SHARED = ("label", "position", "mirrored")
_CONTENT = "content"
"""Tensor of a shard: the bytes of the digest of its images."""
_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64)
_AGAIN = "run the same `mergevq encode` again, it goes on where it stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRecord:
    """Description of the tokens of a folder and of what they were made from."""

    tokenizer: str
    """Hash of the tokenizer (`runtime.artefacts.tokens_hash`)."""
    num_kept: tuple[int, ...]
    """Each K that every image was encoded with, smallest first."""
    num_bits: int
    """D: bits of a token."""
    grid_shape: tuple[int, int]
    """Rows and columns of the grid."""
    data: str
    """Where the images came from."""
    images: str
    """SHA-256 over the names and labels of the images, in order."""
    num_images: int
    """Images of the data, counting those that cannot be read."""
    class_names: tuple[str, ...]
    """One name per class, in label order; empty when the data are unlabelled."""
    crop: Literal["center"] = "center"
    """Which square of an image was encoded, after its short side was resized."""
    labels: str = ""
    """SHA-256 over the labels of the images, in order; empty where it was not kept."""
    stamp: str = ""
    """Changes when a file of the images is touched (`ImageDataset.stamp`); empty if not kept."""
    flip: bool = False
    """Whether the row of an image is followed by the row of its mirror image."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that was read, as width times height."""
    shard_size: int = 1024
    """Images of a shard; the last may have fewer."""

    def __post_init__(self) -> None:
        """Reject what cannot be numbered."""
        for name in ("num_images", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not self.num_kept or list(self.num_kept) != sorted(set(self.num_kept)):
            raise ValueError(f"num_kept {self.num_kept} must be different numbers in order")
        if min(self.grid_shape) < 1:
            raise ValueError(f"grid_shape {self.grid_shape} must have at least one cell")
        if self.num_kept[0] < 1 or self.num_kept[-1] > self.num_tokens:
            raise ValueError(
                f"num_kept {self.num_kept} must be between 1 and the {self.num_tokens} cells"
            )
        if not 1 <= self.num_bits <= 63:
            raise ValueError(f"num_bits ({self.num_bits}) must be between 1 and 63")

    @property
    def identity(self) -> Identity:
        """Images that the tokens were made from."""
        return Identity(
            class_names=self.class_names,
            labels=self.labels,
            images=self.images,
            num_images=self.num_images,
            tokenizer=self.tokenizer,
        )

    @property
    def num_tokens(self) -> int:
        """L: cells of the grid."""
        return self.grid_shape[0] * self.grid_shape[1]

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 when the data are unlabelled."""
        return len(self.class_names)

    @property
    def num_shards(self) -> int:
        """Shards for each K."""
        return -(-self.num_images // self.shard_size)

    def images_of(self, number: int) -> range:
        """Where in the data the images of a shard are."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))


def require_tokenizer(record: TokenRecord, tokenizer: str) -> None:
    """Check that tokens are those of a tokenizer.

    Args:
        record: what the tokens are.
        tokenizer: hash of the tokenizer (`runtime.artefacts.tokens_hash`).

    Raises:
        ValueError: they are another's.
    """
    if record.tokenizer != tokenizer:
        raise ValueError(
            f"the tokens are of tokenizer {record.tokenizer} and must be of {tokenizer}: a number "
            "means another thing to each; encode the images again"
        )


class _Shard(NamedTuple):
    """Entry of a shard in `tokens.json`."""

    num_rows: int
    sha256: str


# ------------------------------------------------------------------------------------- writing


class TokenRows(NamedTuple):
    """Rows of a shard, in the order of the data."""

    indices: Int64[Tensor, "n k"]
    """In [0, 2**D), in canonical order."""
    source: Int64[Tensor, "n l"]
    """Kept token of each cell, in [0, K)."""
    label: Int64[Tensor, "n"]
    """Class, -1 for none."""
    position: Int64[Tensor, "n"]
    """Where in the data the image is."""
    mirrored: Int64[Tensor, "n"]
    """1 for a mirror image, 0 for the image itself."""


def claim(
    directory: Path,
    record: TokenRecord,
    environment: Mapping[str, Any],
    content: Callable[[range], str] | None = None,
) -> bool:
    """Begin a folder of tokens or go on with one; by one process, before shards are written.

    A complete folder is checked and left as it is.

    Args:
        directory: where the tokens go.
        record: what they will be. Another spelling of where the images are makes no other tokens.
        environment: what they may depend on besides; each different one is kept in the file.
        content: digest of the content of a range of the images (`ImageDataset.content`), which is
            asked for where a file was touched since its images were encoded.

    Returns:
        Whether everything was there already.

    Raises:
        ValueError: the folder has other tokens.
        RuntimeError: a shard in it is damaged.
    """
    environments: list[Any] = []
    if (directory / RECORD).is_file():
        state = _read_state(directory)
        if differences := _differences(state["record"], to_json(record)):
            raise ValueError(
                f"{directory} holds other tokens than are asked for; choose another folder or "
                f"delete this one:\n{differences}"
            )
        is_complete = _check_shards(directory, record, state)
        there = _record(directory, state)
        is_touched = there.stamp != record.stamp
        if is_touched:
            _require_content(directory, record, content)
        if is_complete:
            if is_touched:
                moved = state["record"] | {"stamp": record.stamp}
                write_json(directory / RECORD, state | {"record": moved})
            return True
        record = replace(record, data=there.data)
        environments = state["environments"]
    if environment not in environments:
        environments = [*environments, dict(environment)]
    directory.mkdir(parents=True, exist_ok=True)
    _write_state(directory, record, environments=environments)
    return False


def _check_shards(directory: Path, record: TokenRecord, state: Mapping[str, Any]) -> bool:
    """Compare the shards that are there with their seals; returns whether all are, sealed.

    Raises:
        RuntimeError: one is damaged.
    """
    missing = missing_shards(directory, record, range(record.num_shards))
    if state["shards"] is None:
        return False
    for num_kept, shards in _sealed(directory, record, state).items():
        for number, shard in enumerate(shards):
            if num_kept not in missing.get(number, ()):
                # Or `finish` would seal whatever is there now.
                _check_seal(_shard_path(directory, num_kept, number), shard)
    return not missing


def _require_content(
    directory: Path, record: TokenRecord, content: Callable[[range], str] | None
) -> None:
    """Check that the shards that are there were made from the images as they are now.

    Raises:
        ValueError: an image changed under its name.
        RuntimeError: a shard is damaged.
    """
    changed: list[range] = []
    for number in range(record.num_shards):
        paths = (_shard_path(directory, num_kept, number) for num_kept in record.num_kept)
        digests = {_map_shard(path).content for path in paths if path.is_file()} - {""}
        images = record.images_of(number)
        if digests and (content is None or digests != {content(images)}):
            changed.append(images)
    if changed:
        more = f" and of {len(changed) - 1} more shards" if len(changed) > 1 else ""
        raise ValueError(
            f"{directory} holds tokens of other images with the same names: some of images "
            f"{changed[0][0]} to {changed[0][-1]}{more} changed since they were encoded; choose "
            "another folder or delete this one"
        )


def missing_shards(
    directory: Path, record: TokenRecord, numbers: Collection[int]
) -> dict[int, tuple[int, ...]]:
    """Which of the shards of these numbers are still to be written, as the K of each number.

    Raises:
        RuntimeError: a shard is there and is damaged.
    """
    missing: dict[int, tuple[int, ...]] = {}
    for number in numbers:
        for num_kept in record.num_kept:
            path = _shard_path(directory, num_kept, number)
            if path.is_file():
                _map_shard(path)
            else:
                missing[number] = (*missing.get(number, ()), num_kept)
    return missing


def write_shard(
    directory: Path,
    record: TokenRecord,
    number: int,
    rows: TokenRows,
    *,
    broken: Sequence[str],
    content: str = "",
) -> None:
    """Write one shard, whole or not at all.

    Args:
        directory: a folder that `claim` has begun.
        record: what its tokens are.
        number: of the shard.
        rows: what it holds; their K says where it belongs.
        broken: names of its images that cannot be read.
        content: digest of the content of its images (`ImageDataset.content`); empty if not kept.
    """
    num_kept = rows.indices.shape[1]
    largest = {"indices": 2**record.num_bits - 1, "source": num_kept - 1, "mirrored": 1}
    arrays = {
        name: tensor.numpy().astype(_smallest(largest[name]) if name in largest else np.int64)
        for name, tensor in rows._asdict().items()
    }
    if content:
        arrays[_CONTENT] = np.frombuffer(bytes.fromhex(content), dtype=np.uint8)
    # One entry of metadata: with several, their order in the file would be chance.
    data = save(arrays, {"broken": json.dumps(list(broken))})
    path = _shard_path(directory, num_kept, number)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def finish(directory: Path) -> None:
    """Seal a folder whose shards are all written; by one process.

    Raises:
        RuntimeError: a shard is missing or damaged, or has other images than another K's.
    """
    state = _read_state(directory)
    record = _record(directory, state)
    if state["shards"] is not None:
        return
    missing = missing_shards(directory, record, range(record.num_shards))
    if missing:
        number, (num_kept, *_) = next(iter(missing.items()))
        raise RuntimeError(
            f"{_shard_path(directory, num_kept, number)} is missing, and {len(missing) - 1} more "
            f"of {record.num_shards}; {_AGAIN}"
        )
    shards: dict[int, list[_Shard]] = {num_kept: [] for num_kept in record.num_kept}
    broken: list[str] = []
    for number in range(record.num_shards):
        paths = [_shard_path(directory, num_kept, number) for num_kept in record.num_kept]
        first = _map_shard(paths[0])
        for num_kept, path in zip(record.num_kept, paths, strict=True):
            arrays = _map_shard(path).arrays
            _check_rows(path, arrays, record, num_kept)
            if not all(np.array_equal(arrays[name], first.arrays[name]) for name in _SHARED):
                raise RuntimeError(
                    f"{path} has other images than {paths[0]}: the data changed in between; "
                    f"delete both and {_AGAIN}"
                )
            shards[num_kept].append(_Shard(len(arrays["label"]), sha256_of(path)))
        broken += first.broken
    _write_state(
        directory, record, environments=state["environments"], shards=shards, broken=broken
    )


# ------------------------------------------------------------------------------------- reading


class TokenBatch(NamedTuple):
    """Tokens of some images, for one K."""

    indices: Int64[Tensor, "b k"]
    """In [0, 2**D), in canonical order."""
    source: Source
    """Which of them each cell of the grid copies."""
    label: Int64[Tensor, "b"]
    """Class, -1 for none."""


class Origin(NamedTuple):
    """Images that rows were made from."""

    position: Int64[Tensor, "b"]
    """Where in the data the image is."""
    mirrored: Int64[Tensor, "b"]
    """1 for a mirror image, 0 for the image itself."""


class TokenDataset:
    """A sized, map-style collection of encoded images, read from disk when they are asked for.

    With `record.flip` an image is two rows, so a pass over all rows shows it twice.
    """

    def __init__(
        self,
        directory: Path,
        record: TokenRecord,
        shards: Mapping[int, Sequence[_Shard]],
        broken: tuple[str, ...],
    ) -> None:
        self.directory = directory
        self.record = record
        self.broken = broken
        """Names of the images that could not be read, which have no rows."""
        self._shards = shards
        self._rows: NDArray[np.int64] | None = None
        num_rows = [shard.num_rows for shard in shards[record.num_kept[0]]]
        self._first_rows = np.cumsum([0, *num_rows])
        self._mapped: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}

    def __len__(self) -> int:
        return int(self._first_rows[-1]) if self._rows is None else len(self._rows)

    def subset(self, positions: Sequence[int]) -> "TokenDataset":
        """Some of the rows, in this order, from the same files.

        Raises:
            ValueError: there is no such row.
        """
        chosen = copy.copy(self)
        chosen._rows = self._locate(positions)
        return chosen

    @property
    def num_kept(self) -> tuple[int, ...]:
        """Each K there is, smallest first."""
        return self.record.num_kept

    def batch(self, positions: Sequence[int], num_kept: int | None = None) -> TokenBatch:
        """Read rows.

        Args:
            positions: rows in [0, len), in any order.
            num_kept: K; None where there is only one.

        Raises:
            ValueError: there is no such row or K.
            RuntimeError: a shard is missing or damaged.
        """
        chosen = self._resolve(num_kept)
        return TokenBatch(
            indices=self._read("indices", positions, chosen),
            source=Source(self._read("source", positions, chosen), chosen),
            label=self._read("label", positions, chosen),
        )

    def origin(self, positions: Sequence[int]) -> Origin:
        """Which images rows were made from.

        Raises:
            ValueError: there is no such row.
            RuntimeError: a shard is missing or damaged.
        """
        num_kept = self.num_kept[0]
        return Origin(
            position=self._read("position", positions, num_kept),
            mirrored=self._read("mirrored", positions, num_kept),
        )

    def _resolve(self, num_kept: int | None) -> int:
        """The K that is meant.

        Raises:
            ValueError: there is no such K, or none was named and there are several.
        """
        if num_kept is None and len(self.num_kept) == 1:
            return self.num_kept[0]
        if num_kept not in self.num_kept:
            choices = " or ".join(map(str, self.num_kept))
            raise ValueError(
                f"num_kept ({num_kept}) must be {choices}, of which {self.directory} has tokens"
            )
        return num_kept

    def _read(self, name: str, positions: Sequence[int], num_kept: int) -> Int64[Tensor, "b *rest"]:
        """One tensor's rows.

        Raises:
            ValueError: there is no such row.
        """
        rows = self._locate(positions)
        width = {"indices": (num_kept,), "source": (self.record.num_tokens,)}.get(name, ())
        values = np.empty((len(rows), *width), dtype=np.int64)
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            values[here] = self._arrays(num_kept, number)[name][
                rows[here] - self._first_rows[number]
            ]
        return torch.from_numpy(values)

    def _locate(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """Rows of the files.

        Raises:
            ValueError: there is no such row.
        """
        rows = np.asarray(positions, dtype=np.int64)
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size:
            raise ValueError(f"position ({outside[0]}) must be in [0, {len(self)}), the rows")
        return rows if self._rows is None else self._rows[rows]

    def _arrays(self, num_kept: int, number: int) -> dict[str, NDArray[Any]]:
        """A shard's arrays in mapped memory; checked when they are first asked for."""
        if (num_kept, number) not in self._mapped:
            path = _shard_path(self.directory, num_kept, number)
            shard = self._shards[num_kept][number]
            _check_seal(path, shard)
            arrays = _map_shard(path).arrays
            _check_rows(path, arrays, self.record, num_kept, shard.num_rows)
            self._mapped[num_kept, number] = arrays
        return self._mapped[num_kept, number]


def open_tokens(directory: str | Path) -> TokenDataset:
    """Open a folder of tokens; no shard is read yet.

    Raises:
        ValueError: there are no tokens, or not all of them, or `tokens.json` is damaged.
    """
    directory = Path(directory)
    state = _read_state(directory)
    record = _record(directory, state)
    if state["shards"] is None:
        raise ValueError(f"{directory} is not complete; {_AGAIN}")
    return TokenDataset(directory, record, _sealed(directory, record, state), _broken(state))


# --------------------------------------------------------------------------------------- files


class _Mapped(NamedTuple):
    """A shard's content; memory is filled from the file as it is touched."""

    arrays: dict[str, NDArray[Any]]
    broken: list[str]
    content: str
    """Digest of its images in hexadecimal; empty if not kept."""


def _shard_path(directory: Path, num_kept: int, number: int) -> Path:
    """Where a shard is."""
    return directory / f"k{num_kept:05d}" / f"tokens-{number:05d}.safetensors"


def _smallest(largest: int) -> type[np.integer]:
    """The smallest type that holds 0 to `largest`, which has at most 63 bits."""
    types = (np.uint8, np.uint16, np.uint32)
    return next((kind for kind in types if largest <= np.iinfo(kind).max), np.int64)


def _map_shard(path: Path) -> _Mapped:
    """Map a shard into memory.

    Raises:
        RuntimeError: it is damaged.
    """
    try:
        with open_tensors(path) as file:
            # Through torch, which maps the file; the numpy side of the library copies it.
            tensors = {name: file.get_tensor(name) for name in TokenRows._fields}
            content = file.get_tensor(_CONTENT) if _CONTENT in file.keys() else None  # noqa: SIM118
            broken = parse_json((file.metadata() or {}).get("broken", "null"), where="broken")
    except ValueError as error:
        raise RuntimeError(f"{path} is damaged ({error}); delete it and {_AGAIN}") from error
    if not all(tensor.dtype in _INTEGERS for tensor in tensors.values()) or not _are_names(broken):
        raise RuntimeError(
            f"{path} is damaged (it must hold whole numbers and a list of names); delete it and "
            f"{_AGAIN}"
        )
    digest = "" if content is None else content.numpy().tobytes().hex()
    return _Mapped({name: tensor.numpy() for name, tensor in tensors.items()}, broken, digest)


def _are_names(value: object) -> bool:
    """Whether JSON is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_rows(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    record: TokenRecord,
    num_kept: int,
    num_rows: int | None = None,
) -> None:
    """Check that a shard's numbers are what its record says they are.

    Args:
        path: of the shard.
        arrays: what it holds.
        record: what the tokens are.
        num_kept: its K.
        num_rows: rows it must have; None where nothing says how many.

    Raises:
        RuntimeError: another shape, or a number outside its range.
    """
    num_rows = len(arrays["label"].reshape(-1)) if num_rows is None else num_rows
    widths = {"indices": (num_kept,), "source": (record.num_tokens,)}
    ranges = {
        "indices": (0, 2**record.num_bits - 1),
        "source": (0, num_kept - 1),
        "label": (-1, max(record.num_classes - 1, -1)),
        "position": (0, record.num_images - 1),
        "mirrored": (0, 1),
    }
    for name, values in arrays.items():
        shape, (low, high) = (num_rows, *widths.get(name, ())), ranges[name]
        if values.shape != shape:
            raise RuntimeError(
                f"{path} is damaged: {name} has the shape {values.shape} and must have {shape}; "
                f"delete it and {_AGAIN}"
            )
        if values.size and not (low <= int(values.min()) and int(values.max()) <= high):
            raise RuntimeError(
                f"{path} is damaged: {name} ({values.min()} to {values.max()}) must be between "
                f"{low} and {high}; delete it and {_AGAIN}"
            )


def _check_seal(path: Path, shard: _Shard) -> None:
    """Compare a shard with what was written.

    Raises:
        RuntimeError: it is missing, damaged or another's.
    """
    if not path.is_file():
        raise RuntimeError(f"{path} is missing; {_AGAIN}")
    if sha256_of(path) != shard.sha256:
        raise RuntimeError(
            f"{path} is damaged or replaced: it is not the file that {RECORD} was written for; "
            f"delete it and {_AGAIN}"
        )


def _read_state(directory: Path) -> dict[str, Any]:
    """Content of `tokens.json`.

    Raises:
        ValueError: there is none, or it lacks something.
    """
    if not (directory / RECORD).is_file():
        raise ValueError(
            f"{directory} holds no tokens: there is no {RECORD}; `mergevq encode` writes them"
        )
    state = read_json(directory / RECORD)
    require_entries(state, {"record": dict, "environments": list}, where=directory / RECORD)
    complete = state.get("shards") is not None
    needed = {"shards": dict, "broken": list} if complete else {}
    require_entries(state, needed, where=directory / RECORD)
    return {"shards": None, "broken": None} | state


def _record(directory: Path, state: Mapping[str, Any]) -> TokenRecord:
    """Record of the tokens."""
    return from_json(TokenRecord, state["record"], where=str(directory / RECORD))


def _broken(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the images of a complete folder that could not be read."""
    return tuple(map(str, state["broken"]))


def _sealed(
    directory: Path, record: TokenRecord, state: Mapping[str, Any]
) -> dict[int, list[_Shard]]:
    """Entries of a complete folder's shards, by K.

    Raises:
        ValueError: it does not say it of every shard.
    """
    sealed: dict[int, list[_Shard]] = {}
    for num_kept in record.num_kept:
        shards = state["shards"].get(str(num_kept))
        if not isinstance(shards, list) or len(shards) != record.num_shards:
            raise ValueError(
                f"{directory / RECORD} is damaged: it must list {record.num_shards} shards of "
                f"{num_kept} tokens; encode the images again"
            )
        for shard in shards:
            entry = shard if isinstance(shard, dict) else {}
            require_entries(entry, {"num_rows": int, "sha256": str}, where=directory / RECORD)
        sealed[num_kept] = [_Shard(shard["num_rows"], shard["sha256"]) for shard in shards]
        counts = [shard.num_rows for shard in sealed[num_kept]]
        if min(counts) < 0 or counts != [shard.num_rows for shard in sealed[record.num_kept[0]]]:
            raise ValueError(
                f"{directory / RECORD} is damaged: shards of {num_kept} tokens have {counts} rows, "
                "and all K must have the same, at least 0"
            )
    return sealed


def _write_state(
    directory: Path,
    record: TokenRecord,
    *,
    environments: Sequence[Any],
    shards: Mapping[int, Sequence[_Shard]] | None = None,
    broken: Sequence[str] | None = None,
) -> None:
    """Write `tokens.json`; it has no shards until all are written."""
    entries = None
    if shards is not None:
        entries = {str(k): [shard._asdict() for shard in group] for k, group in shards.items()}
    state = {
        "format_version": FORMAT_VERSION,
        "kind": "tokens",
        "record": to_json(record),
        "environments": list(environments),
        "broken": broken,
        "shards": entries,
    }
    write_json(directory / RECORD, state)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Settings of a folder that are not those asked for, a line each.

    The same images may be reached by another path, and files that were touched are compared by
    their content. Folders from before the digest of labels was kept have none to compare.
    """
    ignored = {"data", "stamp"} | ({"labels"} if not there.get("labels") else set())
    lines = [
        f"  {name}: {_abridge(there.get(name))} there, {_abridge(here.get(name))} asked for"
        for name in {**there, **here}
        if name not in ignored and there.get(name) != here.get(name)
    ]
    return "\n".join(lines)


def _abridge(value: object, limit: int = 70) -> str:
    """A value, or its beginning; a hash has 64 letters."""
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}.."
