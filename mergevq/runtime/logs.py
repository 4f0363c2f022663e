"""Numbers of a run: `metrics.jsonl`, and the line that shows progress."""

import json
import math
import os
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mergevq.config.training import OptimConfig, TrainConfig
from mergevq.runtime import distributed
from mergevq.runtime.environment import needing
from mergevq.runtime.optim import peak_learning_rate

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
    """Describe the batch of an optimizer step and the learning rate that follows, in one line.

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
