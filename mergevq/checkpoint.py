"""Models on disk, and their settings.

A *model* is `model.safetensors` and `config.json`, all that using it needs; what continuing a run
needs is in `mergevq.run_state`. Neither holds a pickle, so reading a stranger's file runs none of
their code. Every directory is written under another name and renamed when complete: a reader finds
the old one or the new one, never half of one.
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
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mergevq.config import FORMAT_VERSION, TokenizerConfig
from mergevq.extras import needing
from mergevq.files import (
    broken_weights,
    open_tensors,
    parse_json,
    read_json_file,
    read_tensors,
    require_weights,
    sha256_of,
)

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
HUB_FORM = "a model on Hugging Face as owner/name@revision, such as owner/name@main"
"""How a model on the hub is written, for messages."""

_TOO_LARGE = {bool: 2, int: 2**63, float: math.inf}
"""What the absolute value of a number must be below."""
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
_LATER_SETTINGS = ("transformer_norm_eps", "patch_norm_eps")
"""Settings that the records of older tokenizers lack; those tokenizers have their defaults."""

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
        cls: dataclass of bool, int, float, str, Literal, None, and tuples, dataclasses and unions
            of these. Of several dataclasses the one with these fields is meant.
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
        return _from_json_value(_member(arguments, value, where), value, where)
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
    if expected is types.NoneType and value is None:
        return None
    return _from_json_plain(expected, value, where)


def _from_json_plain(expected: Any, value: Any, where: str) -> bool | int | float | str:  # noqa: ANN401
    """A truth value, a number or a text.

    Raises:
        ValueError: it is of another type, or a number is too large.
        TypeError: a config class has an annotation that JSON cannot carry.
    """
    if expected not in (bool, int, float, str):
        raise TypeError(f"{where} has type {expected}, which cannot be kept as JSON")
    # bool is a subclass of int, so isinstance would let `true` pass for a number.
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise ValueError(f"{where} ({value!r}) must be of type {expected.__name__}")
    if isinstance(value, int | float) and not abs(value) < _TOO_LARGE[type(value)]:
        raise ValueError(f"{where} must be a finite number of at most 64 bits")
    return expected(value)


def _member(members: tuple[Any, ...], value: Any, where: str) -> Any:  # noqa: ANN401 - any field
    """The member of a union that a JSON value is of.

    Raises:
        ValueError: it is of none.
    """
    given = [member for member in members if member is not types.NoneType]
    if value is not None and len(given) == 1:
        return given[0]
    if isinstance(value, Mapping):
        classes = [member for member in members if dataclasses.is_dataclass(member)]
        fields = {item: {field.name for field in dataclasses.fields(item)} for item in classes}
        # What was written has all fields; by hand some may be left out, if one class has the rest.
        fitting = [item for item in classes if fields[item] == value.keys()]
        fitting = fitting or [item for item in classes if fields[item] >= value.keys()]
        if len(fitting) != 1:
            names = "; ".join(f"{_name(item)}: {', '.join(fields[item])}" for item in classes)
            raise ValueError(
                f"{where} has the fields {', '.join(map(str, value))} and must have those of one "
                f"class alone ({names})"
            )
        return fitting[0]
    for member in members:
        if _is_of(member, value):
            return member
    shown = " or ".join(map(_name, members))
    raise ValueError(f"{where} ({value!r}) must be of type {shown}")


def _name(kind: Any) -> str:  # noqa: ANN401 - any annotation
    """A type for a message."""
    return getattr(kind, "__name__", str(kind))


def _is_of(member: Any, value: Any) -> bool:  # noqa: ANN401 - any field
    """Whether a JSON value can be of a member of a union, by its kind alone."""
    if value is None:
        return member is types.NoneType
    origin = typing.get_origin(member)
    if isinstance(value, (list, tuple)):
        return origin is tuple
    if origin is Literal:
        return any(type(value) is type(choice) for choice in typing.get_args(member))
    return type(value) is member or (member is float and type(value) is int)


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

    Raises:
        RuntimeError: a weight is not floating point or not finite; nothing is written.
    """
    if problem := broken_weights(module_state):
        raise RuntimeError(
            f"the {kind} is broken and is not saved to {directory}, where nothing was changed: "
            f"{problem}"
        )
    with atomic_directory(Path(directory)) as partial:
        # With the settings, so that weights beside the settings of another model are recognised.
        settings = json.dumps(to_json(config), sort_keys=True)
        save_file(separate(module_state), partial / WEIGHTS, metadata={"config": settings})
        record = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "config": to_json(config),
            "extra": dict(extra or {}),
            "weights_sha256": sha256_of(partial / WEIGHTS),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        write_json(partial / CONFIG, record)


def load_model(directory: str | Path, kind: str) -> SavedModel:
    """Read what `save_model` wrote; from the disk only.

    Raises:
        ValueError: no model, one of another kind or of a newer format, or damaged weights.
    """
    directory = readable(Path(directory))
    record = read_record(directory)
    if record["kind"] != kind:
        raise ValueError(f"{directory} holds a {record['kind']}, and a {kind} is needed here")
    weights = directory / WEIGHTS
    is_whole = sha256_of(weights) == record["weights_sha256"]
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
    state = read_tensors(weights)
    require_weights(state, where=weights)
    return SavedModel(record=record, state=state)


def _config_difference(weights: Path, config: Mapping[str, Any]) -> str:
    """Settings in which a file of weights and a configuration differ; empty if in none."""
    try:
        with open_tensors(weights) as opened:
            saved = parse_json((opened.metadata() or {}).get("config", "null"), where=weights)
    except ValueError:
        return ""  # Damaged, which its hash tells.
    if not isinstance(saved, dict):
        return ""
    changed = changed_settings(saved, config)
    return ", ".join(f"{name} is {a} there and {b} here" for name, (a, b) in changed.items())


def model_hash(directory: str | Path) -> str:
    """SHA-256 over kind, settings and weights: another model has another hash."""
    directory = readable(Path(directory))
    record = read_record(directory)
    identity = [record["kind"], record["config"], sha256_of(directory / WEIGHTS)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def tokens_hash(directory: str | Path) -> str:
    """SHA-256 over what decides a tokenizer's tokens: its encoder, in settings and weights.

    Tokens and generators are checked by it. Another decoder or source predictor makes other images
    of the same tokens, and leaves it as it is.
    """
    directory = readable(Path(directory))
    record = read_record(directory)
    settings = {n: v for n, v in record["config"].items() if n not in _AFTER_THE_TOKENS}
    defaults = {field.name: field.default for field in dataclasses.fields(TokenizerConfig)}
    for name in _LATER_SETTINGS:
        # An older tokenizer keeps its hash when it is saved anew.
        if settings.get(name) == defaults[name]:
            del settings[name]
    digest = hashlib.sha256(json.dumps([record["kind"], settings], sort_keys=True).encode())
    with open_tensors(directory / WEIGHTS) as weights:
        for name in sorted(weights.keys()):
            if name.startswith(_ENCODER):
                tensor = weights.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class _ShapesOnly(TorchFunctionMode):
    """Inside, modules are built without memory and without drawing random numbers."""

    def __torch_function__(self, func, _types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Leave out what fills tensors; on the meta device it would load torch's compiler."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.normal_:
            return args[0]
        if func is torch.randn:
            func = torch.empty
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_for(
    make: Callable[[], Module], state: Mapping[str, Tensor], *, layers: Mapping[str, int]
) -> Module:
    """Build a module for weights that were saved, and copy them into it.

    Settings may be a stranger's. They are compared with the weights on the meta device before any
    memory is taken, so what is built is as large as what was saved.

    Args:
        make: builds the module, with random weights.
        state: its weights.
        layers: settings that say how many parts the module has, each with weights of its own.

    Raises:
        ValueError: the weights are not those of such a module.
    """
    for name, count in layers.items():
        if count > len(state):
            raise ValueError(
                f"{name} ({count}) must be at most {len(state)}, the number of weights that were "
                "saved with it"
            )
    try:
        with torch.device("meta"), _ShapesOnly():
            shapes = make()
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"a module of these settings cannot be built: {error}") from error
    compare_states(shapes.state_dict(), state, name=type(shapes).__name__)
    module = make()
    load_strict(module, state)
    return module


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
    lines = [f"  {what} ({len(keys)}): {some(keys)}" for what, keys in lists.items() if keys]
    if lines:
        raise ValueError("\n".join([f"the saved weights do not fit {name}:", *lines]))


def resolve(path_or_id: str | Path) -> Path:
    """The local directory of a model given by path or by Hugging Face id.

    An existing directory is used as it is, without touching the network. An id names its revision,
    `owner/name@revision`, so that a mistyped path is never asked for on the hub, and a model that
    is changed there is not fetched unseen.

    Raises:
        ValueError: neither a directory nor an id.
        RuntimeError: an id, and the `hub` extra is not installed.
    """
    path = readable(Path(path_or_id))
    if path.is_dir():
        return path
    known = hub_id(path_or_id)
    if known is None:
        raise ValueError(
            f"no directory {path.absolute()}; give the directory of a model ({WEIGHTS} and "
            f"{CONFIG}), or {HUB_FORM}"
        )
    purpose = f"no directory {path.absolute()}, and fetching {path_or_id} from Hugging Face"
    with needing("hub", purpose):
        from huggingface_hub import snapshot_download
    return Path(
        snapshot_download(known.name, revision=known.revision, allow_patterns=[WEIGHTS, CONFIG])
    )


class HubId(NamedTuple):
    """A model on the Hugging Face hub."""

    name: str
    """`owner/name`."""
    revision: str
    """Commit, tag or branch; only a commit is the same model for ever."""


def hub_id(text: str | Path) -> HubId | None:
    """The model that `owner/name@revision` stands for; None for anything else."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)@(\w[\w./-]*)", str(text))
    return None if match is None else HubId(match[1], match[2])


def read_record(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model: its kind, its settings and what was written beside them.

    Raises:
        ValueError: there is none, or it lacks something.
    """
    if not (directory / CONFIG).is_file():
        inside = [str(path.parent) for path in sorted(directory.glob(f"*/{CONFIG}"))]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
        raise ValueError(f"{directory} holds no model: there is no {CONFIG}{hint}")
    record = read_json(directory / CONFIG)
    needed = {"kind": str, "config": dict, "extra": dict, "weights_sha256": str}
    require_entries(record, needed, where=directory / CONFIG)
    return record


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
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    partial = sibling(path, "partial")
    partial.write_text(text, encoding="utf-8")
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
