"""Writing files of tokens: shard by shard, in any order, by any number of processes.

A folder is begun by `claim`, filled by `write_shard` and sealed by `finish`; each may be repeated.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mergevq.data.tokens.files import (
    AGAIN,
    CONTENT,
    RECORD,
    Shard,
    TokenRecord,
    TokenRows,
    check_rows,
    check_seal,
    map_shard,
    read_state,
    record_of,
    sealed_shards,
    shard_path,
    write_state,
)
from mergevq.runtime.files import sha256_of, write_bytes, write_json
from mergevq.runtime.settings import to_json

_SHARED = ("label", "position", "mirrored")
"""Tensors that the shards of one number have in common, whatever their K."""


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
        state = read_state(directory)
        if differences := _differences(state["record"], to_json(record)):
            there = record_of(directory, state).precision
            same = f", or go on with --precision {there}" if there != record.precision else ""
            raise ValueError(
                f"{directory} holds other tokens than are asked for; choose another folder or "
                f"delete this one{same}:\n{differences}"
            )
        is_complete = _check_shards(directory, record, state)
        there = record_of(directory, state)
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
    write_state(directory, record, environments=environments)
    return False


def _check_shards(directory: Path, record: TokenRecord, state: Mapping[str, Any]) -> bool:
    """Compare the shards that are there with their seals; returns whether all are, sealed.

    Raises:
        RuntimeError: one is damaged.
    """
    missing = missing_shards(directory, record, range(record.num_shards))
    if state["shards"] is None:
        return False
    for num_kept, shards in sealed_shards(directory, record, state).items():
        for number, shard in enumerate(shards):
            if num_kept not in missing.get(number, ()):
                # Or `finish` would seal whatever is there now.
                check_seal(shard_path(directory, num_kept, number), shard)
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
        paths = (shard_path(directory, num_kept, number) for num_kept in record.num_kept)
        digests = {map_shard(path).content for path in paths if path.is_file()} - {""}
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
            path = shard_path(directory, num_kept, number)
            if path.is_file():
                map_shard(path)
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
    num_kept = rows.parts.shape[1]
    most = record.num_values if record.has_index else max(record.sizes)
    largest = {record.tokens_name: most - 1, "source": num_kept - 1, "mirrored": 1}
    tensors = rows._asdict()
    tensors = {record.tokens_name: record.shard_tokens(tensors.pop("parts")), **tensors}
    arrays = {
        name: tensor.numpy().astype(_smallest(largest[name]) if name in largest else np.int64)
        for name, tensor in tensors.items()
    }
    if content:
        arrays[CONTENT] = np.frombuffer(bytes.fromhex(content), dtype=np.uint8)
    # One entry of metadata: with several, their order in the file would be chance.
    data = save(arrays, {"broken": json.dumps(list(broken))})
    path = shard_path(directory, num_kept, number)
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, data)


def _smallest(largest: int) -> type[np.integer]:
    """The smallest type that holds 0 to `largest`, which has at most 63 bits."""
    types = (np.uint8, np.uint16, np.uint32)
    return next((kind for kind in types if largest <= np.iinfo(kind).max), np.int64)


def finish(directory: Path) -> None:
    """Seal a folder whose shards are all written; by one process.

    Raises:
        RuntimeError: a shard is missing or damaged, or has other images than another K's.
    """
    state = read_state(directory)
    record = record_of(directory, state)
    if state["shards"] is not None:
        return
    missing = missing_shards(directory, record, range(record.num_shards))
    if missing:
        number, (num_kept, *_) = next(iter(missing.items()))
        raise RuntimeError(
            f"{shard_path(directory, num_kept, number)} is missing, and {len(missing) - 1} more "
            f"of {record.num_shards}; {AGAIN}"
        )
    shards: dict[int, list[Shard]] = {num_kept: [] for num_kept in record.num_kept}
    broken: list[str] = []
    for number in range(record.num_shards):
        paths = [shard_path(directory, num_kept, number) for num_kept in record.num_kept]
        first = map_shard(paths[0])
        for num_kept, path in zip(record.num_kept, paths, strict=True):
            arrays = map_shard(path).arrays
            check_rows(path, arrays, record, num_kept)
            if not all(np.array_equal(arrays[name], first.arrays[name]) for name in _SHARED):
                raise RuntimeError(
                    f"{path} has other images than {paths[0]}: the data changed in between; "
                    f"delete both and {AGAIN}"
                )
            shards[num_kept].append(Shard(len(arrays["label"]), sha256_of(path)))
        broken += first.broken
    write_state(directory, record, environments=state["environments"], shards=shards, broken=broken)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Settings of a folder that are not those asked for, a line each.

    The same images may be reached by another path, and files that were touched are compared by
    their content. Folders from before the digest of labels was kept have none to compare.
    """
    there = {"precision": "float32"} | dict(there)
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
