"""Files that anybody may have written, read without trusting them.

A file that is read is a regular one, so that nothing hangs on a pipe or a device. JSON is bounded
in size and depth. Weights are finite and floating point. Whatever does not fit is one `ValueError`
that names the file.
"""

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergevq.config.base import FORMAT_VERSION

MAX_JSON_BYTES = 2**26
"""Largest JSON file that is read: 64 MiB, many times the largest that is written."""
MAX_JSON_DEPTH = 64
"""Deepest nesting of JSON that is read; an optimizer's state has about 20 levels."""

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_GIT_LFS = b"version https://git-lfs"


def require_regular(path: Path) -> None:
    """Check that a path leads to a regular file.

    Raises:
        ValueError: there is nothing, a folder, a pipe or a device.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} must be a regular file, and is a folder, a pipe or a device")


def parse_json(text: bytes | str, *, where: object) -> Any:  # noqa: ANN401 - anything JSON can hold
    """Read JSON that may be a stranger's.

    Args:
        text: in UTF-8, if bytes.
        where: what it is, for messages.

    Raises:
        ValueError: not JSON, nested too deeply, a name given twice, or a number that is not finite.
    """
    too_deep = f"{where} is nested more deeply than {MAX_JSON_DEPTH} levels"
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    except ValueError as error:  # Bad UTF-8 and integers of thousands of digits are too.
        raise ValueError(f"{where} is not JSON: {error}") from error
    level, depth = [value], 0
    while level := [item for node in level for item in _inside(node)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(too_deep)
    return value


def read_json_file(path: Path) -> Any:  # noqa: ANN401 - anything JSON can hold
    """Read a JSON file.

    Raises:
        ValueError: not a regular file, too large, or not acceptable to `parse_json`.
    """
    require_regular(path)
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than the {MAX_JSON_BYTES} bytes that are read of JSON")
    return parse_json(text, where=path)


def _no_constant(name: str) -> float:
    """Refuse NaN and infinities.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not a number of JSON")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ValueError: it has two values of one name.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"{twin!r} is there twice")
    return values


def _inside(value: Any) -> Iterable[Any]:  # noqa: ANN401 - anything JSON can hold
    """The values that a value of JSON contains."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


# ------------------------------------------------------------------------------------- tensors


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, of which single tensors can be read inside.

    Raises:
        ValueError: not a regular or not a safetensors file, also when found out inside.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        reason = mistaken_for_weights(path) or str(error)
        raise ValueError(f"{path} is not a readable safetensors file: {reason}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: as `open_tensors`.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def mistaken_for_weights(path: Path) -> str:
    """A sentence about a file that was fetched in place of weights; empty if it is none such."""
    with path.open("rb") as file:
        beginning = file.read(256).lstrip().lower()
    if beginning.startswith(_GIT_LFS):
        return "it is a Git LFS pointer, and `git lfs pull` fetches the weights it stands for"
    if beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; download the file itself, not the page that shows it"
    return "" if beginning else "it is empty"


def broken_weights(weights: Mapping[str, Tensor]) -> str:
    """A sentence about the first tensor that cannot be weights; empty if all can.

    Weights are floating point, and finite as float32.
    """
    for name, tensor in weights.items():
        if tensor.dtype not in _FLOATS:
            return f"{name} is of type {tensor.dtype} and weights are floating point"
        if not is_finite(tensor):
            count = int((~tensor.float().isfinite()).sum())
            return f"{name} has {count} of {tensor.numel()} values that are not finite"
    return ""


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite as float32."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.detach().float().aminmax()
    return math.isfinite(low) and math.isfinite(high)


def require_weights(weights: Mapping[str, Tensor], *, where: object) -> None:
    """Check that tensors can be weights.

    Raises:
        ValueError: one is not floating point or not finite.
    """
    if problem := broken_weights(weights):
        raise ValueError(f"the weights in {where} are broken: {problem}; use another copy of them")


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal.

    Raises:
        ValueError: not a regular file.
    """
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_entries(record: Mapping[str, Any], needed: Mapping[str, type], where: Path) -> None:
    """Check that a JSON object has entries of these types.

    Raises:
        ValueError: one is missing or of another type.
    """
    for name, kind in needed.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(
                f"{where} is damaged: {name} must be there, as JSON's form of {kind.__name__}"
            )


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: contiguous, on the CPU, no two sharing memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        address = own.untyped_storage().data_ptr()
        separate[name] = own.clone() if address in seen else own
        seen.add(address)
    return separate


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write safetensors that others may read as far as they may read any new file.

    Args:
        path: of the file.
        tensors: on any device, sharing memory or not.
        metadata: texts beside them.
    """
    # The library leaves a file that its owner alone can read, which a group's disk is not for.
    path.touch()
    mode = path.stat().st_mode
    save_file(separate(tensors), path, metadata=metadata)
    path.chmod(mode)


def some(names: list[str], limit: int = 12) -> str:
    """A list short enough to read."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---------------------------------------------------------------------------------------- files


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which takes the given name when the block ends without an error.

    An existing directory of that name stays until then. Interrupted at any instant, even by a loss
    of power, the old or the new one is found again.
    """
    partial, previous = sibling(directory, "partial"), sibling(directory, "previous")
    _settle(directory)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if directory.exists():
            directory.rename(previous)
        partial.rename(directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _settle(directory)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - anything JSON can hold
    """Write a JSON file atomically; non-finite numbers are a ValueError."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    partial = sibling(path, "partial")
    partial.write_bytes(data)
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of this or an older format.

    Raises:
        ValueError: not one of ours, or of a newer format.
    """
    value = read_json_file(path)
    version = value.get("format_version") if isinstance(value, dict) else None
    if type(version) is not int:
        raise ValueError(f"{path} was not written by mergevq: it has no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} was written by version {version} of the format and this is version "
            f"{FORMAT_VERSION}; upgrade mergevq"
        )
    return value


def sibling(path: Path, state: str) -> Path:
    """Where a path is while it is being written or replaced."""
    path = path.absolute()  # so that "." has a name
    return path.with_name(f".{path.name}.{state}")


def readable(directory: Path) -> Path:
    """The directory, or its predecessor while, or if, replacing it is between its two renames."""
    previous = sibling(directory, "previous")
    return previous if previous.exists() and not directory.exists() else directory


def _settle(directory: Path) -> None:
    """Finish a replacement that was interrupted; for the writer only, it may be going on."""
    previous = sibling(directory, "previous")
    if not previous.exists():
        return
    if directory.exists():
        shutil.rmtree(previous)
    else:
        previous.rename(directory)


def _sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories, and renames are durable there.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
