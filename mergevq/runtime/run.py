"""One run on one machine: its directory, its log, its device, its random numbers, its end.

Only the main process writes and shows; `RunDirectory.open`, `MetricsLog` and `Progress` do nothing
on other ranks. Every draw of random numbers is tied to what it is for, by `step_generator`, so a
run that was stopped draws what it would have drawn.
"""

import dataclasses
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mergevq.config.base import FORMAT_VERSION
from mergevq.config.identity import Identity, require_same_classes
from mergevq.runtime import distributed
from mergevq.runtime.files import read_json, require_entries, write_json
from mergevq.runtime.migrate import migrate_teacher
from mergevq.runtime.settings import changed_settings, from_json, to_json

logger = logging.getLogger("mergevq")

# ------------------------------------------------------------------------------- run directory


_MOVED = {"quantize_start_step": "loss", "parallel": "tokens"}
"""Settings of runs that were in `train`: now of runs that have the section beside them."""
_LOCK_SECONDS = 8.0
"""Longer than loading processes of a run that was killed take to notice it, and so to let go."""


class RunDirectory:
    """Everything one run writes, under one path.

    As a context manager it lets go of the directory at the end.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path / "run.lock")

    def __enter__(self) -> "RunDirectory":
        """Nothing is held before `open`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let another process have the directory."""
        self._lock.release(force=True)

    @property
    def record(self) -> Path:
        """`run.json`: the resolved run and where it came from."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """`metrics.jsonl`: one line per logged interval."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """`curves.png`: the numbers of `metrics.jsonl` over the steps."""
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """Directory of the states a run can continue from."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Directory of the model the run produced."""
        return self.path / "model"

    @property
    def images(self) -> Path:
        """Directory of pictures made along the way."""
        return self.path / "images"

    def open(
        self,
        run: object,
        *,
        device: torch.device,
        resume: bool,
        made_from: Identity | None = None,
        learns_labels: bool = False,
        fixed: Sequence[str] = ("model",),
    ) -> None:
        """Claim the directory and write `run.json`, before any work; on other ranks do nothing.

        Args:
            run: resolved settings, a dataclass.
            device: where the run computes.
            resume: continue the run that is there. What it was trained as stays the same; all other
                settings may differ, are warned of, and are kept in the record under `resumed`.
            made_from: the data; None where there are none.
            learns_labels: whether other classes make another run.
            fixed: settings, or sections of them, that a checkpoint was trained with and that no
                resumed run can change.

        Raises:
            ValueError: another run is there and is not to be resumed, or none is and it is, or the
                one that is there is of another model or of other classes, or another process has
                it.
        """
        if not distributed.is_main():
            return
        if resume and not self.record.is_file():
            raise ValueError(f"{self.path} holds no run to resume: there is no {self.record.name}")
        if not resume:
            self._require_empty()
        self._claim()
        if not resume:
            self._require_empty()  # Another process may have begun and ended in between.
        now = {
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command_line(),
            "environment": environment(device),
        }
        record = {
            "format_version": FORMAT_VERSION,
            "run": to_json(run),
            "made_from": None if made_from is None else to_json(made_from),
            **now,
            "resumed": [],
        }
        if resume:
            old = read_run_record(self.record)
            changed = self._changes(old, run, made_from, fixed, learns_labels=learns_labels)
            for name, (before, after) in changed.items():
                logger.warning(
                    "resuming %s with another %s: %s before, %s now", self.path, name, before, after
                )
            record = old | {"run": record["run"], "made_from": record["made_from"]}
            record["resumed"] = [*old["resumed"], now | {"changed": changed}]
        write_json(self.record, record)

    def _require_empty(self) -> None:
        """Check that nothing is there but a lock.

        Raises:
            ValueError: there is something.
        """
        lock = Path(self._lock.lock_file)
        if self.path.exists() and any(path.name != lock.name for path in self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty; continue the run in it with --resume, choose another "
                "directory with --out, or delete it"
            )

    def _claim(self) -> None:
        """Keep other processes out until this one ends or lets go.

        Raises:
            ValueError: another one is in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            raise ValueError(
                f"another process is training in {self.path}; wait until it ends, or stop it, or "
                "choose another directory with --out"
            ) from error

    def _changes(
        self,
        old: Mapping[str, Any],
        run: object,
        made_from: Identity | None,
        fixed: Sequence[str],
        *,
        learns_labels: bool,
    ) -> dict[str, list[Any]]:
        """Differences from the run that is there: `section.field` to `[old, new]`.

        Raises:
            ValueError: a checkpoint cannot be gone on with like this.
        """
        new = to_json(run)
        if old["format_version"] < FORMAT_VERSION:
            raise ValueError(
                f"{self.path} was begun in format {old['format_version']} and this is format "
                f"{FORMAT_VERSION}; finish it with the release that began it, or start another run "
                f"from its model: --init-from {self.path / 'model'}"
            )
        if not old["run"].keys() <= new.keys():
            raise ValueError(
                f"{self.path} holds a run with the settings {', '.join(old['run'])}, and this one "
                f"has {', '.join(new)}; resume with the recipe that began it"
            )
        # Settings that came after the run was begun have their defaults in it.
        before = to_json(from_json(type(run), old["run"], where=str(self.record)))
        changed = changed_settings(before, new)
        changed.pop("out", None)  # It is this directory, which may have been moved.
        refused = [
            f"{name} ({after}) must be {before}"
            for name, (before, after) in changed.items()
            if any(name == part or name.startswith(f"{part}.") for part in fixed)
        ]
        if refused:
            raise ValueError(
                f"the run in {self.path} has another model: {'; '.join(refused)}; resume with "
                "these settings, or begin another run with --out and --init-from"
            )
        if isinstance(old.get("made_from"), dict) and made_from is not None:
            there = from_json(Identity, old["made_from"], where=f"{self.record}: made_from")
            if there.tokenizer != made_from.tokenizer:
                raise ValueError(
                    f"the run in {self.path} was trained on tokens of tokenizer {there.tokenizer}, "
                    f"and these are of {made_from.tokenizer}: a number means another thing to each"
                )
            if learns_labels:
                require_same_classes(
                    there,
                    made_from,
                    where=f"the run in {self.path}",
                    way_out="resume with those, or begin another run with --out",
                )
            differences = changed_settings(to_json(there), to_json(made_from))
            changed |= {f"data: {name}": values for name, values in differences.items()}
        return changed


def read_run_record(path: Path) -> dict[str, Any]:
    """Content of a `run.json`: at least the settings, `run`, and what was `resumed`.

    Settings of older records have their present names.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    record = read_json(path)
    require_entries(record, {"run": dict, "resumed": list}, where=path)
    return record | {"run": _with_present_names(record["run"])}


def _with_present_names(run: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run from when teachers were one class, and both of `_MOVED` were in `train`."""
    teacher = run.get("teacher")
    if isinstance(teacher, Mapping) and isinstance(teacher.get("kind"), str):
        run = {**run, "teacher": migrate_teacher(teacher)}
    train = run.get("train")
    if not isinstance(train, Mapping):
        return dict(run)
    kept = {name: value for name, value in train.items() if name not in _MOVED}
    moved = {n: train[n] for n, section in _MOVED.items() if n in train and section in run}
    return {**run, "train": kept, **moved}


def command_line() -> str:
    """The command that runs, without the place where its program lies on this machine."""
    program = Path(sys.argv[0])
    # As `python -m mergevq` the program is the file `mergevq/__main__.py`.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def environment(device: torch.device) -> dict[str, Any]:
    """Conditions that a result may depend on besides its settings."""
    on_gpu = device.type == "cuda"
    return {
        **versions(),
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "cuda": torch.version.cuda if on_gpu else None,
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------------------------------- the end


@dataclasses.dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    requested: bool = False
    """Turned on by a signal. Ranks are asked at different moments: agree before acting."""


@contextmanager
def on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGHUP and the first Ctrl-C into a request, so that a step can be saved.

    A second Ctrl-C kills. The handlers that were there return at the end. Outside the main thread
    Python delivers no signals, and the request never comes. A process that was started with `nohup`
    goes on without its terminal.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    has_terminal = sys.stderr.isatty()

    def request(number: int, frame: object) -> None:  # noqa: ARG001 - signal's signature
        stop.requested = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if has_terminal and not sys.stderr.isatty():
            # The terminal is gone, and writing to it would fail before anything is saved.
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), sys.stderr.fileno())

    numbers = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = [signal.signal(number, request) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


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


STOP_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a run to save and end: of schedulers, of a keyboard, of a terminal that closed.
Windows has no terminal that closes."""
