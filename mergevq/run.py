"""One run on one machine: its directory, its log, its device, its random numbers, its end.

Only the main process writes and shows; `RunDirectory.open`, `MetricsLog` and `Progress` do nothing
on other ranks. Every draw of random numbers is tied to what it is for, by `step_generator`, so a
run that was stopped draws what it would have drawn.
"""

import dataclasses
import json
import logging
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from mergevq import distributed
from mergevq.checkpoint import (
    changed_settings,
    from_json,
    git_commit,
    read_json,
    require_entries,
    to_json,
    versions,
    write_json,
)
from mergevq.config import FORMAT_VERSION, OptimConfig, Precision, TrainConfig
from mergevq.extras import needing
from mergevq.identity import Identity, require_same_classes
from mergevq.optim import peak_learning_rate
from mergevq.seeds import numbered_seed

logger = logging.getLogger("mergevq")

# ------------------------------------------------------------------------------- run directory


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
        """What differs from the run that is there: `section.field` to `[old, new]`.

        Raises:
            ValueError: a checkpoint cannot be gone on with like this.
        """
        new = to_json(run)
        if old["run"].keys() != new.keys():
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

    Raises:
        ValueError: there is none, or it is damaged.
    """
    record = read_json(path)
    require_entries(record, {"run": dict, "resumed": list}, where=path)
    return record


def command_line() -> str:
    """The command that runs, without the place where its program lies on this machine."""
    program = Path(sys.argv[0])
    # As `python -m mergevq` the program is the file `mergevq/__main__.py`.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def environment(device: torch.device) -> dict[str, Any]:
    """What a result may depend on besides its settings."""
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


# ------------------------------------------------------------------------------------- logging


_VALIDATED = ("psnr", "psnr_recovered", "val_nll")
"""Numbers by which a person follows a training."""


class MetricsLog:
    """Numbers by step: a line to read on stderr, and the same as a line of JSON in a file."""

    def __init__(
        self,
        path: Path,
        *,
        first_step: int = 0,
        tensorboard: bool = False,
        brief: int | None = None,
    ) -> None:
        """Open the log.

        Args:
            path: of the JSON lines; what a resumed run had written there for `first_step` and
                later is cut off, so that no step appears twice.
            first_step: first step that will be written.
            tensorboard: also write TensorBoard events beside `path`.
            brief: K whose validations alone have a line to read; None shows every interval. The
                file has all in either case.
        """
        self._brief = brief
        self._file = self._events = None
        if not distributed.is_main():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, _end_of_steps_before(path, first_step))
        if tensorboard:
            self._events = _event_writer(path.parent, first_step)
        # Line buffering: a run that is killed loses no line it has shown.
        self._file = path.open("a", buffering=1, encoding="utf-8", newline="\n")

    def write(
        self,
        step: int,
        values: Mapping[str, int | float],
        *,
        shown: Collection[str] | None = None,
    ) -> None:
        """Log one interval.

        Args:
            step: the optimizer step the values belong to.
            values: by name; JSON has no word for non-finite numbers, so they are written as null
                and named under `nonfinite`.
            shown: names on the line to read, which is for a glance; None is all of them.

        Raises:
            ValueError: a value is called as one of the line's own entries.
        """
        if not values.keys().isdisjoint({"step", "nonfinite"}):
            raise ValueError(f"values {list(values)} must not be named step or nonfinite")
        if self._file is None:
            return
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        numbers = {name: None if name in nonfinite else value for name, value in values.items()}
        line: dict[str, Any] = {"step": step, **numbers}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        # tqdm moves a progress bar out of the way; without a bar this is a plain line.
        if self._brief is not None:
            shown = {f"{name}@{self._brief}" for name in _VALIDATED}
        glance = {name: v for name, v in values.items() if shown is None or name in shown}
        if glance or self._brief is None:
            tqdm.write(format_line(step, glance), file=sys.stderr)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def note(self, text: str) -> None:
        """Show a line that is no interval's; it is not in the file."""
        if self._file is not None and self._brief is None:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Nothing can be written after this."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line that a `MetricsLog` wrote, also before the run was resumed."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def describe_batch(
    train: TrainConfig, optim: OptimConfig, world: distributed.World, *, unit: str
) -> str:
    """What one optimizer step consists of and the learning rate that follows from it, in one line.

    Args:
        train: its batch is cut over ranks and accumulated parts.
        optim: its rate may be scaled to the batch.
        world: the ranks.
        unit: what the batch is of, in the plural.

    Raises:
        ValueError: the batch cannot be cut evenly.
    """
    size = distributed.local_batch(train.batch_size, world, accumulation=train.accumulation)
    rate = peak_learning_rate(optim, train.batch_size)
    base = optim.base_batch_size or train.batch_size
    return (
        f"batch of {train.batch_size} {unit}: ranks {world.world_size} x accumulation "
        f"{train.accumulation} x {size}; peak learning rate {rate:g} (optim.lr {optim.lr:g} at a "
        f"batch of {base})"
    )


def format_line(step: int, values: Mapping[str, int | float]) -> str:
    """One line of fixed columns, as long as the names stay the same."""
    return "  ".join([f"step {step:>7d}", *(f"{name} {v:>9.4g}" for name, v in values.items())])


def _end_of_steps_before(path: Path, first_step: int) -> int:
    """Bytes of the leading lines of steps before `first_step`; a half-written line ends them.

    Raises:
        ValueError: a line is not ours.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no log line; move the file away to resume"
                ) from error
            if step >= first_step:
                break
            end += len(line)
    return end


def _event_writer(directory: Path, first_step: int) -> Any:  # noqa: ANN401 - of an optional extra
    """TensorBoard's writer.

    Raises:
        RuntimeError: the `log` extra is not installed.
    """
    with needing("log", "train.tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(directory), purge_step=first_step)


class Progress:
    """How far, how fast, how long still, on stderr: a bar on a terminal, else a line at times."""

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        unit: str = "step",
        interval_seconds: float = 60.0,
    ) -> None:
        """Start the clock.

        Args:
            total: units in all.
            done: units an earlier process did; they do not count towards the rate.
            unit: what is counted, in the singular.
            interval_seconds: between lines where there is no terminal.
        """
        self.total, self.done, self.unit = total, done, unit
        self.interval_seconds = interval_seconds
        self._first, self._started_at = done, time.monotonic()
        self._shown_at = self._started_at
        self._shown = distributed.is_main()
        self._bar = None
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True)

    def update(self, num: int = 1) -> None:
        """Count units that are done."""
        self.done += num
        if self._bar is not None:
            self._bar.update(num)
            return
        now = time.monotonic()
        due = now - self._shown_at >= self.interval_seconds or self.done == self.total
        if self._shown and due:
            self._shown_at = now
            tqdm.write(self._line(now - self._started_at), file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, seconds: float) -> str:
        """The bar in words."""
        rate = (self.done - self._first) / max(seconds, 1e-9)
        left = tqdm.format_interval((self.total - self.done) / max(rate, 1e-9))
        return f"{self.unit} {self.done}/{self.total}, {rate:.3g} {self.unit}/s, {left} left"


# -------------------------------------------------------------------------- device and precision


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda, else mps, else cpu.

    Raises:
        ValueError: this machine or this build of torch does not have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [device for device, there in available.items() if there]
    if name == "auto":
        return torch.device(usable[0])
    if name not in usable:
        raise ValueError(
            f"device ({name}) must be one that torch {torch.__version__} has on this machine: "
            f"auto or {' or '.join(usable)}"
        )
    return torch.device(name)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to; None computes in float32.

    `auto` is bf16 where the device multiplies it in hardware, else float32. What is asked for by
    name is given, even where it is emulated and slow.
    """
    if precision == "auto":
        return torch.bfloat16 if _has_bf16(device) else None
    return {"bf16": torch.bfloat16, "float16": torch.float16, "float32": None}[precision]


def _has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are native, and so faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False  # mps: generations differ, and torch has no way to ask


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let a GPU sum in one order every time, where it can; a CPU always does."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before, warn_only=only_warned)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in a block: products in `dtype`; everything in float32 for None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# -------------------------------------------------------------------------------- random numbers


def step_generator(seed: int, *ids: int | str) -> torch.Generator:
    """Random numbers that depend on `seed` and `ids` alone: not on order, batch, rank or device.

    Args:
        seed: of the run.
        ids: what the numbers are for; the last is a number such as the step or the image. Two last
            ids closer than 2**32 have different numbers if all before them agree.

    Raises:
        ValueError: there is no last number.
    """
    *purpose, number = ids or ("",)
    if not isinstance(number, int):
        raise ValueError(f"ids {ids} must end with a number")
    return torch.Generator().manual_seed(numbered_seed(repr((seed, *purpose)), number))


# ------------------------------------------------------------------------------------- the end


@dataclasses.dataclass
class StopRequest:
    """Whether this process was asked to stop."""

    requested: bool = False
    """Turned on by SIGTERM or SIGINT. Ranks are asked at different moments: agree before acting."""


@contextmanager
def on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM and the first Ctrl-C into a request, so that a step can end and be saved.

    A second Ctrl-C kills. The handlers that were there return at the end. Outside the main thread
    Python delivers no signals, and the request never comes.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: object) -> None:  # noqa: ARG001 - signal's signature
        stop.requested = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, request) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
