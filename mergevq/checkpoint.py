"""What is written to disk and read back: models, the state of a run, and their settings.

Two artefacts. A *model* is `model.safetensors` and `config.json`, all that using it needs; a
*state* is `state.safetensors` and `state.json`, all that continuing a run needs. Neither holds a
pickle, so reading a stranger's file runs none of their code. Every directory is written under
another name and renamed when complete: a reader finds the old one or the new one, never half of
one. A state of which every rank holds a part is `shards/` and `state.json`, written by all of them.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergevq import distributed
from mergevq.config import FORMAT_VERSION

Config = TypeVar("Config")

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
STATE_TENSORS = "state.safetensors"
STATE = "state.json"
SHARDS = "shards"

_ENCODER = "encoder."
"""Weights of a tokenizer that decide its tokens."""
_AFTER_THE_TOKENS = (
    "num_kept",
    "kept_range",
    "num_decoder_layers",
    "num_decoder_heads",
    "source_dim",
    "num_source_layers",
    "num_source_heads",
)
"""Settings of a tokenizer that decide none: each token file says its own K."""

# ------------------------------------------------------------------------------------ settings


def to_json(config: object) -> dict[str, Any]:
    """A dataclass as a JSON object: tuples become lists, nested dataclasses become objects."""
    return {
        field.name: _to_json_value(getattr(config, field.name))
        for field in dataclasses.fields(config)  # pyright: ignore[reportArgumentType]
    }


def _to_json_value(value: Any) -> Any:  # noqa: ANN401 - any field
    """One field as JSON."""
    if dataclasses.is_dataclass(value):
        return to_json(value)
    return [_to_json_value(item) for item in value] if isinstance(value, tuple) else value


def from_json(cls: type[Config], values: Mapping[str, Any], *, where: str = "") -> Config:
    """The dataclass that `to_json` wrote, every value checked against its field's type.

    Args:
        cls: dataclass of bool, int, float, str, Literal, tuples and dataclasses of these, or None.
        values: field values by name; a field with a default may be absent.
        where: dotted name of this object in messages; empty for the outermost.

    Raises:
        ValueError: a field is unknown, absent without a default, or of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise ValueError(
                f"{prefix}{name} is not a setting of {cls.__name__}; choose one of "
                f"{', '.join(fields)}"
            )
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in values and not optional:
            raise ValueError(f"{prefix}{name} is missing and has no default in {cls.__name__}")
    hints = typing.get_type_hints(cls)
    return cls(**{n: _from_json_value(hints[n], v, f"{prefix}{n}") for n, v in values.items()})


def _from_json_value(expected: Any, value: Any, where: str) -> Any:  # noqa: ANN401 - any field
    """One JSON value as the annotation says.

    Raises:
        ValueError: it is of another type.
        TypeError: a config class has an annotation that JSON cannot carry.
    """
    arguments = typing.get_args(expected)
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        # The only union a setting has is "or None".
        (expected,) = (item for item in arguments if item is not types.NoneType)
        return None if value is None else _from_json_value(expected, value, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ValueError(
                f"{where} ({value!r}) must be one of {', '.join(map(repr, arguments))}"
            )
        return value
    if origin is tuple:
        return _from_json_tuple(arguments, value, where)
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            names = ", ".join(field.name for field in dataclasses.fields(expected))
            raise ValueError(f"{where} ({value!r}) must be an object with fields {names}")
        return from_json(typing.cast("type[Any]", expected), value, where=where)
    if expected not in (bool, int, float, str):
        raise TypeError(f"{where} has type {expected}, which cannot be kept as JSON")
    # bool is a subclass of int, so isinstance would let `true` pass for a number.
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise ValueError(f"{where} ({value!r}) must be of type {expected.__name__}")
    return expected(value)


def _from_json_tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:  # noqa: ANN401
    """A JSON list as `tuple[X, ...]` or as a tuple of fixed length.

    Raises:
        ValueError: not a list, or of another length.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} ({value!r}) must be a list")
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise ValueError(f"{where} ({value!r}) must have {len(items)} values, not {len(value)}")
    pairs = zip(items, value, strict=True)
    return tuple(_from_json_value(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(pairs))


# --------------------------------------------------------------------------------------- models


class SavedModel(NamedTuple):
    """A model read from disk, not yet built."""

    record: dict[str, Any]
    """All of `config.json`; the settings are under `config`, the caller's own notes in `extra`."""
    state: dict[str, Tensor]
    """Weights by name, on the CPU."""


def changed_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str = ""
) -> dict[str, list[Any]]:
    """Settings that differ between two runs as JSON: `section.field` to `[old, new]`."""
    changed: dict[str, list[Any]] = {}
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= changed_settings(before, after, where=f"{where}{name}.")
        elif before != after:
            changed[f"{where}{name}"] = [before, after]
    return changed


def save_model(
    directory: str | Path,
    module_state: Mapping[str, Tensor],
    config: object,
    *,
    kind: str,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model for use, replacing the one that was there.

    Args:
        directory: of `model.safetensors` and `config.json`.
        module_state: the module's `state_dict()`, without frozen networks.
        config: dataclass that builds the module.
        kind: what it is: tokenizer or generator.
        extra: anything else JSON can hold, such as metrics.
    """
    with atomic_directory(Path(directory)) as partial:
        # With the settings, so that weights beside the settings of another model are recognised.
        settings = json.dumps(to_json(config), sort_keys=True)
        save_file(_separate(module_state), partial / WEIGHTS, metadata={"config": settings})
        record = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "config": to_json(config),
            "extra": dict(extra or {}),
            "weights_sha256": _sha256(partial / WEIGHTS),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        write_json(partial / CONFIG, record)


def load_model(directory: str | Path, kind: str) -> SavedModel:
    """Read what `save_model` wrote; from the disk only.

    Raises:
        ValueError: no model, one of another kind or of a newer format, or damaged weights.
    """
    directory = _readable(Path(directory))
    record = read_record(directory)
    if record["kind"] != kind:
        raise ValueError(f"{directory} holds a {record['kind']}, and a {kind} is needed here")
    weights = directory / WEIGHTS
    is_whole = _sha256(weights) == record["weights_sha256"]
    changed = _config_difference(weights, record["config"])
    if changed:
        raise ValueError(
            f"{weights} was saved with other settings than those in {CONFIG} beside it: {changed}; "
            "copy both again from where they were written"
        )
    if not is_whole:
        raise ValueError(
            f"{weights} is not the file that {CONFIG} beside it was written for: it is damaged or "
            "replaced; copy both again"
        )
    return SavedModel(record=record, state=load_file(directory / WEIGHTS))


def _config_difference(weights: Path, config: Mapping[str, Any]) -> str:
    """Settings in which a file of weights and a configuration differ; empty if in none."""
    try:
        with safe_open(weights, framework="pt") as opened:
            saved = json.loads((opened.metadata() or {}).get("config", "null"))
    except (SafetensorError, json.JSONDecodeError, OSError):
        return ""  # Damaged, which its hash tells.
    if saved is None:
        return ""
    changed = changed_settings(saved, config)
    return ", ".join(f"{name} is {a} there and {b} here" for name, (a, b) in changed.items())


def model_hash(directory: str | Path) -> str:
    """SHA-256 over kind, settings and weights: another model has another hash."""
    directory = _readable(Path(directory))
    record = read_record(directory)
    identity = [record["kind"], record["config"], _sha256(directory / WEIGHTS)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def tokens_hash(directory: str | Path) -> str:
    """SHA-256 over what decides a tokenizer's tokens: its encoder, in settings and weights.

    Tokens and generators are checked by it. Another decoder or source predictor makes other images
    of the same tokens, and leaves it as it is.
    """
    directory = _readable(Path(directory))
    record = read_record(directory)
    settings = {n: v for n, v in record["config"].items() if n not in _AFTER_THE_TOKENS}
    digest = hashlib.sha256(json.dumps([record["kind"], settings], sort_keys=True).encode())
    with safe_open(directory / WEIGHTS, framework="pt") as weights:
        for name in sorted(weights.keys()):
            if name.startswith(_ENCODER):
                tensor = weights.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_strict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a module, which must have exactly these names and shapes.

    Any difference is a ValueError that lists what is missing, unexpected or of another shape.
    """
    compare_states(module.state_dict(), state, name=type(module).__name__)
    module.load_state_dict(state, strict=True)


def compare_states(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, name: str
) -> None:
    """Check that two states have the same names and shapes.

    Raises:
        ValueError: they differ; lists how.
    """
    shapes = [
        f"{key}: saved {tuple(found[key].shape)}, needed {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    lists = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": shapes,
    }
    lines = [f"  {what} ({len(keys)}): {_some(keys)}" for what, keys in lists.items() if keys]
    if lines:
        raise ValueError("\n".join([f"the saved weights do not fit {name}:", *lines]))


def resolve(path_or_id: str | Path) -> Path:
    """The local directory of a model given by path or by Hugging Face id.

    An existing directory is used as it is, without touching the network. Only `owner/name` that
    cannot be a mistyped path, because there is no directory `owner` here, is looked up on the hub.

    Raises:
        ValueError: neither a directory nor an id.
        RuntimeError: an id, and the `hub` extra is not installed.
    """
    path = _readable(Path(path_or_id))
    if path.is_dir():
        return path
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path_or_id)) is not None
    if not is_id or path.parent.exists():
        raise ValueError(
            f"no directory {path.absolute()}; give the directory of a model ({WEIGHTS} and "
            f"{CONFIG}), or a Hugging Face id of the form owner/name"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise RuntimeError(
            f"no directory {path.absolute()}, and fetching {path_or_id} from Hugging Face needs "
            "the hub extra: pip install 'mergevq[hub]'"
        ) from error
    return Path(snapshot_download(str(path_or_id), allow_patterns=[WEIGHTS, CONFIG]))


def read_record(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model: its kind, its settings and what was written beside them.

    Raises:
        ValueError: there is none.
    """
    if not (directory / CONFIG).is_file():
        inside = [str(path.parent) for path in sorted(directory.glob(f"*/{CONFIG}"))]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
        raise ValueError(f"{directory} holds no model: there is no {CONFIG}{hint}")
    return read_json(directory / CONFIG)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: contiguous, on the CPU, no two sharing memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        address = own.untyped_storage().data_ptr()
        separate[name] = own.clone() if address in seen else own
        seen.add(address)
    return separate


def _some(names: list[str], limit: int = 12) -> str:
    """A list short enough to read."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ----------------------------------------------------------------------------- state of a run


def save_state(directory: str | Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run: nested dicts, lists and tuples of tensors and plain values.

    Args:
        directory: of `state.safetensors` and `state.json`; replaced if it exists.
        state: `state_dict()`s, random number states, counters. Keys are strings or integers, values
            tensors of any dtype, bool, int, float, str or None; anything else is a ValueError.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(dict(state), tensors, "state")
    with atomic_directory(Path(directory)) as partial:
        save_file(_separate(tensors), partial / STATE_TENSORS)
        write_json(partial / STATE, {"format_version": FORMAT_VERSION, "state": tree})


def save_sharded_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run of which every rank holds its shards; every rank calls it.

    Args:
        directory: in a file system that all ranks share; nothing is in it.
        state: as for `save_state`, the same on every rank but for the shards.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(dict(state), tensors, "state")
    if distributed.is_main():
        (directory / SHARDS).mkdir(parents=True)
    distributed.barrier()
    distributed.save_shards(tensors, directory / SHARDS)
    if distributed.is_main():
        write_json(directory / STATE, {"format_version": FORMAT_VERSION, "state": tree})


def load_state(directory: str | Path, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What was saved: equal bit for bit, dtypes, integer keys and tuples included.

    Args:
        directory: what `save_state` or `save_sharded_state` wrote, with any number of ranks.
        like: a state of sharded tensors, to get tensors that are cut the same way; those of a
            sharded state are filled with what was saved. Every rank calls. None gets whole tensors
            on the CPU.

    Raises:
        ValueError: what was saved has other tensors than `like`.
    """
    directory = _readable(Path(directory))
    tree = read_json(directory / STATE)["state"]
    shards = directory / SHARDS
    if not shards.is_dir():
        # A clone is aligned as any other tensor is, and does not keep a file open that is deleted
        # soon.
        tensors = {n: t.clone() for n, t in load_file(directory / STATE_TENSORS).items()}
    else:
        tensors = distributed.saved_shards(shards)
    if like is not None:
        wanted: dict[str, Tensor] = {}
        _encode(dict(like), wanted, "state")
        compare_states(wanted, tensors, name="this run")
        if not shards.is_dir():
            wanted = {n: distributed.shard_like(tensors[n], t) for n, t in wanted.items()}
        tensors = wanted
    if shards.is_dir():
        distributed.load_shards(tensors, shards)
    return _decode(tree, tensors)


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:  # noqa: ANN401
    """A value as JSON in which tensors are names; they are added to `tensors`.

    Lists and plain values are themselves; every other type is an object of one entry, its name.

    Raises:
        ValueError: a type that cannot be kept exactly.
    """
    if isinstance(value, Tensor):
        # Numbered, because joined paths need not be unique: {"a.b": x} and {"a": {"b": y}}.
        name = f"{len(tensors)}:{where}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        keys = [_encode_key(key, where) for key in value]
        items = [_encode(item, tensors, f"{where}.{key}") for key, item in value.items()]
        return {"dict": [list(pair) for pair in zip(keys, items, strict=True)]}
    if type(value) in (list, tuple):
        items = [_encode(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
        return {"tuple": items} if type(value) is tuple else items
    if type(value) is float and not math.isfinite(value):
        return {"float": repr(value)}
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(
            f"{where} ({type(value).__name__}) must be a tensor, bool, int, float, str, None, "
            "list, tuple or dict to be saved"
        )
    return value


def _encode_key(key: object, where: str) -> object:
    """A dict key as it is.

    Raises:
        ValueError: JSON cannot keep it.
    """
    if type(key) not in (str, int):
        raise ValueError(f"{where} has a key {key!r}; it must be a string or an integer")
    return key


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    """The value that `_encode` was given."""
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, content),) = node.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "float":
        return float(content)
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {key: _decode(item, tensors) for key, item in content}


class CheckpointManager:
    """The checkpoints of one run: `step-00001000`, `step-00002000`, .. in one directory.

    The main process writes; any may read.
    """

    def __init__(self, directory: str | Path, *, keep_last: int) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last ({keep_last}) must be at least 1")
        self.directory = Path(directory)
        self.keep_last = keep_last

    def save(self, step: int, writer: Callable[[Path], None]) -> Path:
        """Write a checkpoint, then delete those beyond the newest `keep_last`.

        Args:
            step: optimizer steps done.
            writer: fills the directory it is given; if it fails nothing has changed on disk.
        """
        path = self.directory / f"step-{step:08d}"
        with atomic_directory(path) as partial:
            writer(partial)
        for old in list(self._complete().values())[: -self.keep_last]:
            if old != path:
                shutil.rmtree(old)
        for leftover in self.directory.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        return path

    def save_sharded(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint's `state`, each rank its own shards of it; every rank calls it.

        Args:
            step: optimizer steps done.
            state: as for `save_sharded_state`.
        """
        path = self.directory / f"step-{step:08d}"
        if distributed.is_main():
            self.save(step, lambda partial: save_sharded_state(partial / "state", state))
        else:
            # Where the main process fills it; it is there by the first barrier inside.
            save_sharded_state(_sibling(path, "partial") / "state", state)
        distributed.barrier()
        return path

    def latest(self) -> Path | None:
        """The complete checkpoint of the highest step; None when there is none."""
        return next(reversed(self._complete().values()), None)

    def _complete(self) -> dict[int, Path]:
        """Complete checkpoints, lowest step first; one may be on its way to being replaced."""
        found = {}
        # The name of a complete one sorts after that of its predecessor, so it is the one taken.
        for path in sorted(self.directory.glob("*step-*")):
            match = re.fullmatch(r"step-(\d+)|\.step-(\d+)\.previous", path.name)
            if match is not None:
                found[int(match[1] or match[2])] = path
        return dict(sorted(found.items()))


# ---------------------------------------------------------------------------------------- files


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which takes the given name when the block ends without an error.

    An existing directory of that name stays until then. Interrupted at any instant, even by a loss
    of power, the old or the new one is found again.
    """
    partial, previous = _sibling(directory, "partial"), _sibling(directory, "previous")
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
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    partial = _sibling(path, "partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of this or an older format.

    Raises:
        ValueError: not one of ours, or of a newer format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if type(version) is not int:
        raise ValueError(f"{path} was not written by mergevq: it has no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} was written by version {version} of the format and this is version "
            f"{FORMAT_VERSION}; upgrade mergevq"
        )
    return value


def _sibling(path: Path, state: str) -> Path:
    """Where a path is while it is being written or replaced."""
    path = path.absolute()  # so that "." has a name
    return path.with_name(f".{path.name}.{state}")


def _readable(directory: Path) -> Path:
    """The directory, or its predecessor while, or if, replacing it is between its two renames."""
    previous = _sibling(directory, "previous")
    return previous if previous.exists() and not directory.exists() else directory


def _settle(directory: Path) -> None:
    """Finish a replacement that was interrupted; for the writer only, it may be going on."""
    previous = _sibling(directory, "previous")
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


def _sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------- provenance


def versions() -> dict[str, str | None]:
    """Versions of what computes; None for a mergevq that runs without being installed.

    Pillow is among them: it resizes what is measured, and writes the JPEG and WebP beside it.
    """
    numbers: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("mergevq", "numpy", "pillow", "safetensors"):
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            numbers[name] = None
    return numbers


def git_commit() -> str | None:
    """Commit this package runs from, with `-dirty` after it if files differ; None outside git."""
    package = Path(__file__).parent
    # An installed package may lie in a stranger's repository, which does not track it.
    if not _git(package, "ls-files", "--", Path(__file__).name):
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None where there is no git or it fails."""
    git = shutil.which("git")
    if git is None:
        return None
    result = subprocess.run(
        [git, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
