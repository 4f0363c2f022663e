"""Models on disk, and their settings.

A *model* is `model.safetensors` and `config.json`, all that using it needs; what continuing a run
needs is in `mergevq.runtime.checkpoints`. Neither holds a pickle, so reading a stranger's file runs
none of their code. Every directory is written under another name and renamed when complete: a
reader finds the old one or the new one, never half of one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mergevq.config.base import FORMAT_VERSION
from mergevq.runtime.environment import bundled_model, bundled_names, needing
from mergevq.runtime.files import (
    atomic_directory,
    broken_weights,
    open_tensors,
    parse_json,
    read_json,
    read_tensors,
    readable,
    require_entries,
    require_weights,
    sha256_of,
    some,
    write_json,
    write_tensors,
)
from mergevq.runtime.migrate import (
    is_encoder,
    is_old,
    migrate_model,
    migrate_name,
    old_tokens_identity,
)
from mergevq.runtime.run import git_commit, versions
from mergevq.runtime.settings import changed_settings, to_json

Module = TypeVar("Module", bound=nn.Module)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
HUB_FORM = "a model on Hugging Face as owner/name@revision, such as owner/name@main"
"""How a model on the hub is written, for messages."""
_TOKENS = ("image_size", "stem", "reducer", "quantizer")
"""Settings of a tokenizer that decide its tokens; each token file says its own K."""
_ONE_BRANCH = {"kind": "one"}
"""Branches of tokenizers from before there were others, which are left out of the hash."""
_NO_CONDITION = {"kind": "none"}


class SavedModel(NamedTuple):
    """A model read from disk, not yet built."""

    record: dict[str, Any]
    """All of `config.json`; the settings are under `config`, the caller's own notes in `extra`."""
    state: dict[str, Tensor]
    """Weights by name, on the CPU."""


def save_model(
    directory: str | Path,
    module_state: Mapping[str, Tensor],
    config: object,
    *,
    kind: str,
    extra: Mapping[str, Any] | None = None,
    tokens_id: str | None = None,
) -> None:
    """Write a model for use, replacing the one that was there.

    Args:
        directory: of `model.safetensors` and `config.json`.
        module_state: the module's `state_dict()`, without frozen networks.
        config: dataclass that builds the module.
        kind: what it is: tokenizer or generator.
        extra: anything else JSON can hold, such as metrics.
        tokens_id: `tokens_hash` of the tokenizer that this one's encoder was taken from unchanged,
            so that its tokens stay valid in any format; None is a tokenizer of its own.

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
        write_tensors(partial / WEIGHTS, module_state, metadata={"config": settings})
        record = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "config": to_json(config),
            "extra": dict(extra or {}),
            "weights_sha256": sha256_of(partial / WEIGHTS),
            **({} if tokens_id is None else {"tokens_id": tokens_id}),
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
    raw = _read_raw(directory)
    record = _migrated(raw, directory)
    if record["kind"] != kind:
        raise ValueError(f"{directory} holds a {record['kind']}, and a {kind} is needed here")
    weights = directory / WEIGHTS
    is_whole = sha256_of(weights) == record["weights_sha256"]
    changed = _config_difference(weights, raw["config"])
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
    if is_old(raw):
        state = {migrate_name(kind, name): tensor for name, tensor in state.items()}
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
    record = _read_raw(directory)
    identity = [record["kind"], record["config"], sha256_of(directory / WEIGHTS)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def tokens_hash(directory: str | Path) -> str:
    """SHA-256 over what decides a tokenizer's tokens: its encoder, in settings and weights.

    Tokens and generators are checked by it. Another decoder or source predictor makes other images
    of the same tokens, and leaves it as it is.
    """
    directory = readable(Path(directory))
    record = _read_raw(directory)
    if "tokens_id" in record:
        return record["tokens_id"]
    if is_old(record):
        digest = old_tokens_identity(record["kind"], record["config"])
    else:
        settings = {name: record["config"].get(name) for name in _TOKENS}
        # Reducers from before it could be another merge anywhere.
        settings["reducer"] = {
            n: v for n, v in settings["reducer"].items() if (n, v) != ("locality", 0.0)
        }
        branches = record["config"].get("branches", _ONE_BRANCH)
        if branches != _ONE_BRANCH:
            settings["branches"] = {n: v for n, v in branches.items() if n != "decodes"}
        condition = record["config"].get("condition", _NO_CONDITION)
        if condition != _NO_CONDITION:
            settings["condition"] = {n: condition[n] for n in ("kind", "sees")}
        digest = hashlib.sha256(json.dumps([record["kind"], settings], sort_keys=True).encode())
    with open_tensors(directory / WEIGHTS) as weights:
        for name in sorted(weights.keys()):
            if is_encoder(name):
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


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local directory of a model given by path, by name or by Hugging Face id.

    The directory of a model is used as it is, without touching the network. Without one, a name of
    `mergevq models` is the model of that name in the package. An id names its revision,
    `owner/name@revision`, so that a mistyped path is never asked for on the hub, and a model that
    is changed there is not fetched unseen.

    Args:
        path_or_id: see above.
        revision: of an id that has none in it; then only the hub is meant, whatever lies here.

    Raises:
        ValueError: neither a directory nor a name nor an id; or a revision of something that has
            none, or has another.
        RuntimeError: an id, and the `hub` extra is not installed.
    """
    if revision is not None:
        model = _with_revision(str(path_or_id), revision)
        return _fetched(model, f"fetching {model.name} from Hugging Face")
    path = readable(Path(path_or_id))
    if (path / CONFIG).is_file():
        return path
    bundled = bundled_model(str(path_or_id))
    if bundled is not None:
        return bundled
    if path.is_dir():
        return path
    known = hub_id(path_or_id)
    if known is None:
        raise ValueError(
            f"no directory {path.absolute()}; give the directory of a model ({WEIGHTS} and "
            f"{CONFIG}), the name of one that comes with the package "
            f"({bundled_names(str(path_or_id))}), or {HUB_FORM}"
        )
    return _fetched(
        known, f"no directory {path.absolute()}, and fetching {path_or_id} from Hugging Face"
    )


def _fetched(model: "HubId", purpose: str) -> Path:
    """Where the two files of a model on the hub are, after they were fetched."""
    with needing("hub", purpose):
        from huggingface_hub import snapshot_download
    return Path(
        snapshot_download(model.name, revision=model.revision, allow_patterns=[WEIGHTS, CONFIG])
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


def _with_revision(name: str, revision: str) -> HubId:
    """The model on the hub that a name without a revision and a revision stand for.

    Raises:
        ValueError: the name has a revision, is that of a directory, or the two are no id.
    """
    known = hub_id(f"{name}@{revision}")
    if known is None or Path(name, CONFIG).is_file():
        raise ValueError(
            f"revision ({revision}) is of a model on Hugging Face, and {name} is none that is "
            "written owner/name, without a revision of its own; leave one of the two out"
        )
    return known


def read_record(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model: its kind, its settings and what was written beside them.

    Settings of an older format come as those of today.

    Raises:
        ValueError: there is none, or it lacks something.
    """
    return _migrated(_read_raw(directory), directory)


def _migrated(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A record as today's format has it; what it cannot be made of is a ValueError."""
    try:
        return migrate_model(raw)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error


def _read_raw(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model as it was written.

    Raises:
        ValueError: there is none, or it lacks something.
    """
    if not (directory / CONFIG).is_file():
        inside = [str(path.parent) for path in sorted(directory.glob(f"*/{CONFIG}"))]
        hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
        raise ValueError(f"{directory} holds no model: there is no {CONFIG}{hint}")
    record = read_json(directory / CONFIG)
    needed = {"kind": str, "config": dict, "extra": dict, "weights_sha256": str}
    if "tokens_id" in record:
        needed["tokens_id"] = str
    require_entries(record, needed, where=directory / CONFIG)
    return record
