"""One loop around the steps of every stage of training.

A stage is a `Task`: its batches, its step, its validation, its pictures, its model. Everything that
is the same in all stages is here: resuming, checkpoints, stopping, the log, the moments at which
something is done.

A step leaves its numbers on the device, and nothing waits for them: they are read, and averaged
over ranks in one collective, when an interval is logged.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mergevq.config.training import TrainConfig
from mergevq.report.plots import Panel, has_plots
from mergevq.runtime import distributed
from mergevq.runtime.checkpoints import CheckpointManager, load_state, restoring, save_state
from mergevq.runtime.device import resolve_precision, rounded_float32
from mergevq.runtime.logs import MetricsLog, Progress, read_metrics
from mergevq.runtime.optim import Budget, NonFiniteGuard, set_learning_rate
from mergevq.runtime.run import RunDirectory, StopRequest, on_sigterm
from mergevq.training.panels import Log, write_curves

logger = logging.getLogger("mergevq")

Number = Float[Tensor, ""] | int | float
"""A number for the log: a tensor is of this rank's share of the batch, and the mean over ranks is
logged; any other is the same on every rank."""
Batch = TypeVar("Batch")
Columns = TypeVar("Columns", bound=tuple[Tensor | None, ...])

_MEETING_STEPS = 10
"""Steps after which several ranks ask each other for the time, and whether one was told to stop."""
_ALWAYS_SHOWN = frozenset({"loss", "lr", "num_kept", "grad_norm", "time_used"})
"""Numbers of the log line in every stage."""


@runtime_checkable
class State(Protocol):
    """Everything that changes while training: a dataclass of which every field is in a checkpoint.

    A field is a part with `state_dict` and `load_state_dict`, or a plain number, or None for a part
    that this run does without.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    step: int
    """Optimizer steps done."""
    budget: Budget
    """Steps and time of the run, which its schedules follow."""

    @property
    def guards(self) -> tuple[NonFiniteGuard, ...]:
        """Guards of the optimizers; skipped steps of the first are counted in the log."""
        ...


@runtime_checkable
class Task(Protocol[Batch]):
    """One stage of training, as `fit` sees it."""

    unit: ClassVar[str]
    """Noun for one item of a batch, such as `image`."""

    @property
    def state(self) -> State:
        """The state of the run; `fit` counts its steps."""
        ...

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches of this rank, from `start_step` to the last step."""
        ...

    def step(self, batch: Batch) -> dict[str, Number]:
        """Take one optimizer step; returns numbers for the log, still on the device."""
        ...

    def introduction(self, *, resumed: bool) -> list[str]:
        """Lines to show before the first step."""
        ...

    def interval_numbers(self) -> dict[str, int | float]:
        """Numbers that are worked out only when an interval is logged; every rank calls it."""
        ...

    def validate(self) -> dict[str, float]:
        """Measure the averaged weights on held-out data; every rank calls it."""
        ...

    def picture(self, path: Path) -> None:
        """Draw results of the averaged weights into a PNG file; every rank calls it."""
        ...

    def save(self, model: Path) -> None:
        """Write the averaged model into a directory; every rank calls it."""
        ...

    def shown(self, numbers: Mapping[str, int | float]) -> set[str]:
        """Names of the stage's own numbers on the log line."""
        ...

    def panels(self, log: Log) -> list[Panel]:
        """Curves of the training so far."""
        ...


def fit(
    task: Task[Any],
    loop: TrainConfig,
    directory: RunDirectory,
    world: distributed.World,
    *,
    resume: bool,
    brief: int | None = None,
) -> None:
    """Take every step that is left, and write what is due along the way.

    Args:
        task: the stage, at its first weights.
        loop: length of the run, and what is due when.
        directory: of the run, opened.
        world: the ranks.
        resume: go on from the newest checkpoint in the directory, if there is one.
        brief: K whose validations alone are shown; None shows every logged interval.

    Raises:
        ValueError: the checkpoint is not of this run.
        RuntimeError: losses stayed non-finite, or a weight is not finite.
    """
    state = task.state
    manager = CheckpointManager(directory.checkpoints, keep_last=loop.keep_last)
    resumed = resume and _resume(state, manager)
    log = MetricsLog(
        directory.metrics, first_step=state.step, tensorboard=loop.tensorboard, brief=brief
    )
    size = loop.batch_size
    bar = Progress(size * loop.num_steps, done=size * state.step, unit=task.unit)
    for line in task.introduction(resumed=resumed):
        log.note(line)
    plotting = distributed.is_main() and has_plots(directory.curves)
    speed = _Speed(task.unit, bar.done)
    dtype = resolve_precision(loop.precision, world.device)
    state.budget.start()
    is_new = False  # whether no finite step has gone on from the newest checkpoint yet
    with on_sigterm() as signal, contextlib.closing(bar), contextlib.closing(log):
        for batch in () if state.budget.is_used(state.step) else task.batches(state.step):
            with distributed.located(world, state.step), rounded_float32(world.device, dtype):
                numbers = task.step(batch)
            if is_new:
                is_new = not _is_finite(state)
                manager.settle(finite=not is_new)
            state.step += 1
            _look_at_time(state.budget, world, state.step)
            bar.update(size)
            last = state.budget.is_used(state.step)
            logging_due = (state.step - 1) % loop.log_every == 0 or last
            validating = state.step % loop.eval_every == 0 or last
            if logging_due or validating:
                counts = _counts(state) | state.budget.numbers()
                values = read_numbers(numbers, world.device) | counts
                values |= speed.since(bar.done) | task.interval_numbers() if logging_due else {}
                values |= task.validate() if validating else {}
                log.write(state.step - 1, values, shown=_shown(task, values))
            if state.step % loop.image_every == 0 or last:
                task.picture(directory.images / f"step-{state.step:08d}.png")
            stopping = _agree_to_stop(signal, world, state.step)
            if state.step % loop.save_every == 0 or last or stopping:
                _save(task, manager, directory.model)
                is_new = True
            if plotting and (validating or stopping):
                write_curves(directory.curves, task.panels(read_metrics(directory.metrics)))
            if stopping and not last:
                logger.warning("stopped after %d steps; go on with --resume", state.step)
            if stopping or last:
                break


def read_numbers(numbers: Mapping[str, Number], device: torch.device) -> dict[str, int | float]:
    """Values of numbers, those of tensors as means over ranks; waits for the device, once.

    Every rank calls it with the same names.

    Args:
        numbers: by name.
        device: of this rank.
    """
    tensors = {name: n.detach() for name, n in numbers.items() if isinstance(n, Tensor)}
    values = {name: n for name, n in numbers.items() if not isinstance(n, Tensor)}
    if tensors:
        stacked = torch.stack([tensor.to(device, torch.float32) for tensor in tensors.values()])
        values |= zip(tensors, distributed.mean(stacked).tolist(), strict=True)
    return {name: values[name] for name in numbers}


def cut(batch: Columns, num_parts: int, device: torch.device) -> list[Columns]:
    """Move a batch to a device and cut it into equal parts for accumulation.

    Args:
        batch: a named tuple of columns of equal length; an absent one is None.
        num_parts: divides the length.
        device: of this rank.
    """
    columns = [
        [None] * num_parts
        if column is None
        else column.to(device, non_blocking=True).chunk(num_parts)
        for column in batch
    ]
    make = type(batch)
    return [make(*part) for part in zip(*columns, strict=True)]


def warn_of_skip(parts: Sequence[Int64[Tensor, "b"]], step: int) -> None:
    """Name the images of a step that is skipped, by the parts that it was cut into."""
    images = [index.tolist() for index in parts]
    logger.warning("step %d is not finite and is skipped; images %s", step, images)


# --------------------------------------------------------------------------------------- state


def state_of(state: State) -> dict[str, Any]:
    """Every field of a state as nested dicts of tensors and plain values; every rank calls it."""
    parts = {name: value for name, value in _fields(state).items() if value is not None}
    return {
        name: part.state_dict() if hasattr(part, "state_dict") else part
        for name, part in parts.items()
    }


def put_state(state: State, saved: Mapping[str, Any]) -> None:
    """Inverse of `state_of`, on any number of ranks.

    Raises:
        ValueError: a part of this run is missing, or there is one that this run does without.
    """
    parts = {name: value for name, value in _fields(state).items() if value is not None}
    if saved.keys() != parts.keys():
        missing, unexpected = sorted(parts.keys() - saved), sorted(saved.keys() - parts)
        raise ValueError(
            f"the checkpoint does not fit this run: it lacks {missing} and has {unexpected} "
            "besides; resume with the settings and the version of mergevq that wrote it"
        )
    for name, part in parts.items():
        if hasattr(part, "load_state_dict"):
            part.load_state_dict(saved[name])
            if isinstance(part, torch.optim.Optimizer):
                _lay_moments_out(part)
        else:
            setattr(state, name, saved[name])


def _lay_moments_out(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory layout of their weights, which files do not keep.

    Fused optimizers walk through memory: in another layout, where weights are channels-last, each
    weight would get the moments of others.
    """
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            is_like = isinstance(moment, torch.Tensor) and moment.shape == weight.shape
            if is_like and moment.stride() != weight.stride():
                moments[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)


def load_into(state: State, directory: Path) -> None:
    """Fill a state from a checkpoint of any number of ranks, sharded or not.

    Raises:
        ValueError: it is another run's.
    """
    like = None
    if _is_sharded(state):
        # What is read is cut as what is there, so the optimizers have to have their moments.
        for value in _fields(state).values():
            if isinstance(value, torch.optim.Optimizer):
                _make_moments(value)
        like = state_of(state)
    put_state(state, load_state(directory, like))


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Take a step with neither gradients nor a rate: it makes moments and changes no weight."""
    set_learning_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _fields(state: State) -> dict[str, Any]:
    """Fields of a state by name."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _is_sharded(state: State) -> bool:
    """Whether ranks hold parts of the weights."""
    values = _fields(state).values()
    return any(isinstance(value, nn.Module) and distributed.is_sharded(value) for value in values)


# -------------------------------------------------------------------------------- along the way


def _resume(state: State, manager: CheckpointManager) -> bool:
    """Go on from the newest checkpoint; whether there is one."""
    latest = distributed.broadcast_object(manager.latest())
    if latest is None:
        return False
    with restoring(latest):
        load_into(state, latest / "state")
    return True


def _is_finite(state: State) -> bool:
    """Whether the last step was taken, of all optimizers; waits for the device.

    Raises:
        RuntimeError: too many steps in a row were skipped.
    """
    for guard in state.guards:
        guard.read()
    return all(guard.num_in_a_row == 0 for guard in state.guards)


def _counts(state: State) -> dict[str, int]:
    """Skipped steps, for the log; the RuntimeError of `_is_finite`."""
    _is_finite(state)
    return {"num_skipped": state.guards[0].num_skipped} if state.guards else {}


class _Speed:
    """Items per second since the last time of asking."""

    def __init__(self, unit: str, done: int) -> None:
        self._name, self._done, self._at = f"{unit}s_per_second", done, time.monotonic()

    def since(self, done: int) -> dict[str, int | float]:
        """The number by name, where `done` items are done by now."""
        before, started_at = self._done, self._at
        self._done, self._at = done, time.monotonic()
        return {self._name: (done - before) / (self._at - started_at)}


def _shown(task: Task[Any], numbers: Mapping[str, int | float]) -> set[str]:
    """Names on the log line: those of every stage, of a bad run, and the stage's own."""
    skipped = {name for name in numbers if name.startswith("num_skipped")}
    return {*_ALWAYS_SHOWN, f"{task.unit}s_per_second", *skipped, *task.shown(numbers)}


def _is_meeting(world: distributed.World, step: int) -> bool:
    """Whether ranks ask each other about time and stops after so many steps; one rank always."""
    return world.world_size == 1 or step % _MEETING_STEPS == 0


def _look_at_time(budget: Budget, world: distributed.World, step: int) -> None:
    """Let the budget know the time, which is the same on every rank."""
    if _is_meeting(world, step):
        budget.update()


def _agree_to_stop(signal: StopRequest, world: distributed.World, step: int) -> bool:
    """Whether any rank has to stop; all find the same, so all stop after the same step."""
    if not _is_meeting(world, step):
        return False
    return bool(distributed.sum(torch.tensor(int(signal.requested))) > 0)


def _save(task: Task[Any], manager: CheckpointManager, model: Path) -> None:
    """Write the averaged model to use, and a checkpoint to resume from.

    Raises:
        RuntimeError: a weight or an average is not finite; what was saved before stays.
    """
    state = task.state
    # Before the counts of the state are taken, and before anything is written.
    is_finite = _is_finite(state)
    # Every rank takes part in the state, though one may write it.
    everything = state_of(state)
    manager.require_finite(everything)
    task.save(model)
    # Last, so that whoever resumes from it finds a model at least as new.
    if _is_sharded(state):
        manager.save_sharded(state.step, everything, prune=is_finite)
    elif distributed.is_main():
        manager.save(
            state.step,
            lambda path: save_state(path / "state", everything),
            prune=is_finite,
        )
    distributed.barrier()
