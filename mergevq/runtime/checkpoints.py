"""The state of a run on disk, and its checkpoints.

A *state* is `state.safetensors` and `state.json`, all that continuing a run needs. One of which
every rank holds a part is `shards/` and `state.json`, written by all of them. `state.json` has a
digest of every file, so that a state is read as it was written or not at all.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergevq.config.base import FORMAT_VERSION
from mergevq.runtime import distributed
from mergevq.runtime.artefacts import compare_states
from mergevq.runtime.files import (
    atomic_directory,
    is_finite,
    read_json,
    read_tensors,
    readable,
    require_entries,
    sha256_of,
    sibling,
    some,
    write_json,
    write_tensors,
)

STATE_TENSORS = "state.safetensors"
STATE = "state.json"
SHARDS = "shards"
_SUSPECT = "suspect"
"""Empty file in a checkpoint that was written while steps were not finite."""


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
        write_tensors(partial / STATE_TENSORS, tensors)
        _write_record(partial, tree)


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
    distributed.barrier()
    if distributed.is_main():
        _write_record(directory, tree)


def load_state(directory: str | Path, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load what was saved: equal bit for bit, dtypes, integer keys and tuples included.

    Args:
        directory: what `save_state` or `save_sharded_state` wrote, with any number of ranks.
        like: a state of sharded tensors, to get tensors that are cut the same way; those of a
            sharded state are filled with what was saved. Every rank calls. None gets whole tensors
            on the CPU.

    Raises:
        ValueError: it is damaged, or has other tensors than `like`.
    """
    directory = readable(Path(directory))
    tree = _read_record(directory, together=like is not None)["state"]
    shards = directory / SHARDS
    if not shards.is_dir():
        # A clone is aligned as any other tensor is, and does not keep a file open that is deleted
        # soon.
        tensors = {n: t.clone() for n, t in read_tensors(directory / STATE_TENSORS).items()}
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
    try:
        return _decode(tree, tensors)
    except ValueError as error:
        raise ValueError(f"{directory / STATE} is damaged: {error}") from error


@contextmanager
def restoring(directory: Path) -> Iterator[None]:
    """Inside, what was saved is put into a run; what does not fit it is one `ValueError`.

    Raises:
        ValueError: a part of the run could not take what was saved for it.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{directory} is not a checkpoint of this run ({type(error).__name__}: {reason}); "
            "resume with the settings and the version of mergevq that wrote it"
        ) from error


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
    """The value that `_encode` was given.

    Raises:
        ValueError: there is no such value.
    """
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    match list(node.items()):
        case [("tensor", str(name))] if name in tensors:
            return tensors[name]
        case [("float", "nan" | "inf" | "-inf" as text)]:
            return float(text)
        case [("tuple", list(items))]:
            return tuple(_decode(item, tensors) for item in items)
        case [("dict", list(pairs))] if all(map(_is_pair, pairs)):
            return {key: _decode(item, tensors) for key, item in pairs}
    raise ValueError(f"{str(node)[:70]!r} stands for no value")


def _is_pair(pair: object) -> bool:
    """Whether JSON is the key and value of a dict."""
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)


def _write_record(directory: Path, tree: Any) -> None:  # noqa: ANN401 - of `_encode`
    """Write `state.json`, with digests of itself and of the tensors beside it."""
    record = {
        "format_version": FORMAT_VERSION,
        "state": tree,
        "sha256": {name: sha256_of(directory / name) for name in _tensor_files(directory)},
    }
    write_json(directory / STATE, record | {"digest": _digest(record)})


def _read_record(directory: Path, *, together: bool) -> dict[str, Any]:
    """The `state.json` of a state of which every file is as it was written.

    Args:
        directory: of the state.
        together: every rank calls, and one compares digests for all.

    Raises:
        ValueError: a file is not as it was written; the message says how to go on.
    """
    problem = ""
    if not together or distributed.is_main():
        try:
            _checked_record(directory)
        except ValueError as error:
            problem = f"{error}; {_way_out(directory)}"
    problem = distributed.broadcast_object(problem) if together else problem
    if problem:
        raise ValueError(problem)
    return read_json(directory / STATE)


def _checked_record(directory: Path) -> None:
    """Compare every file of a state with what was written.

    Raises:
        ValueError: one is another, is missing, or is more than was written.
    """
    record = read_json(directory / STATE)
    require_entries(record, {"sha256": dict, "digest": str}, where=directory / STATE)
    written = {name: value for name, value in record.items() if name != "digest"}
    if _digest(written) != record["digest"]:
        raise ValueError(f"{directory / STATE} is damaged: its digest is not that of its content")
    if "state" not in record or list(record["sha256"]) != _tensor_files(directory):
        raise ValueError(f"{directory} is damaged: it has not the files that {STATE} lists")
    for name, digest in record["sha256"].items():
        if sha256_of(directory / name) != digest:
            raise ValueError(f"{directory / name} is damaged: its digest is not that in {STATE}")


def _tensor_files(directory: Path) -> list[str]:
    """Names of the files of a state that hold tensors."""
    if not (directory / SHARDS).is_dir():
        return [STATE_TENSORS]
    return sorted(f"{SHARDS}/{path.name}" for path in (directory / SHARDS).iterdir())


def _digest(value: Any) -> str:  # noqa: ANN401 - anything JSON can hold
    """SHA-256 of a value as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _way_out(directory: Path) -> str:
    """How to go on from a damaged state, which may be one of several checkpoints of a run."""
    damaged = directory.parent
    older = [path for path in complete_checkpoints(damaged.parent).values() if path != damaged]
    for path in reversed(older):
        try:
            _checked_record(path / "state")
        except ValueError:
            continue
        return (
            f"the newest good checkpoint is {path}: delete {damaged} and start again with "
            "--resume, and the run goes on from there"
        )
    return "no good checkpoint is beside it: start the run anew, in another directory"


class CheckpointManager:
    """The checkpoints of one run: `step-00001000`, `step-00002000`, .. in one directory.

    The main process writes; any may read.
    """

    def __init__(self, directory: str | Path, *, keep_last: int) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last ({keep_last}) must be at least 1")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self._written: Path | None = None
        """The checkpoint that no step has gone on from yet."""

    def save(self, step: int, writer: Callable[[Path], None], *, prune: bool = True) -> Path:
        """Write a checkpoint; older ones stay until `settle` says that the run goes on from it.

        Args:
            step: optimizer steps done.
            writer: fills the directory it is given; if it fails nothing has changed on disk.
            prune: whether it may take the place of older ones. Not while steps are skipped because
                they are not finite: the run may be broken, and what it was before is all there is.
        """
        path = self.directory / f"step-{step:08d}"
        with atomic_directory(path) as partial:
            writer(partial)
            if not prune:
                (partial / _SUSPECT).touch()
        for leftover in self.directory.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        self._written = path
        return path

    def settle(self, *, finite: bool = True) -> None:
        """After a finite step, keep the newest `keep_last` good checkpoints and later ones.

        Weights may be finite and of no use, as after a step that was far too long. The loss of the
        next step tells, so nothing is deleted before. Between two checkpoints it does nothing.
        """
        if self._written is None or not finite or not distributed.is_main():
            return
        found = list(complete_checkpoints(self.directory).values())
        good = [path for path in found if not (path / _SUSPECT).exists()]
        if len(good) >= self.keep_last:
            for old in found[: found.index(good[-self.keep_last])]:
                if old != self._written:
                    shutil.rmtree(old)
        self._written = None

    def save_sharded(self, step: int, state: Mapping[str, Any], *, prune: bool = True) -> Path:
        """Write a checkpoint's `state`, each rank its own shards of it; every rank calls it.

        Args:
            step: optimizer steps done.
            state: as for `save_sharded_state`.
            prune: as for `save`.
        """
        path = self.directory / f"step-{step:08d}"
        if distributed.is_main():
            self.save(
                step, lambda partial: save_sharded_state(partial / "state", state), prune=prune
            )
        else:
            # Where the main process fills it; it is there by the first barrier inside.
            save_sharded_state(sibling(path, "partial") / "state", state)
        distributed.barrier()
        return path

    def latest(self) -> Path | None:
        """The complete checkpoint of the highest step; None when there is none."""
        return next(reversed(complete_checkpoints(self.directory).values()), None)

    def require_finite(self, state: Mapping[str, Any]) -> None:
        """Check that a state is worth keeping, before anything of it is saved; every rank calls.

        Args:
            state: as for `save_state` or `save_sharded_state`.

        Raises:
            RuntimeError: a tensor is not finite.
        """
        tensors: dict[str, Tensor] = {}
        _encode(dict(state), tensors, "state")
        own = {name: distributed.own_part(t) for name, t in tensors.items()}
        broken = [name for name, t in own.items() if t.is_floating_point() and not is_finite(t)]
        # Of a sharded state one rank may see what the others do not, and all have to stop.
        if not distributed.sum(torch.tensor(len(broken))):
            return
        names = some([name.partition("state.")[2] for name in broken], 3) or "on another rank"
        saved = complete_checkpoints(self.directory).values()
        sound = [path for path in saved if not (path / _SUSPECT).exists()]
        good = f"{sound[-1]} is the last good one" if sound else "none was saved before"
        raise RuntimeError(
            f"the run is broken and its checkpoint is not saved: not finite are {names}; {good}. "
            "Go on from there with --resume and a lower optim.lr, or with train.precision float32"
        )


def complete_checkpoints(directory: Path) -> dict[int, Path]:
    """Complete checkpoints by step, lowest first; one may be on its way to being replaced."""
    found = {}
    # The name of a complete one sorts after that of its predecessor, so it is the one taken.
    for path in sorted(directory.glob("*step-*")):
        match = re.fullmatch(r"step-(\d+)|\.step-(\d+)\.previous", path.name)
        if match is not None:
            found[int(match[1] or match[2])] = path
    return dict(sorted(found.items()))
