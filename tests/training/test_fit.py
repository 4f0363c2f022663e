"""The loop that every stage shares, around a task of one weight."""

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mergevq.config.training import TrainConfig
from mergevq.report.plots import Curve, Panel
from mergevq.runtime import distributed
from mergevq.runtime.checkpoints import load_state, save_state
from mergevq.runtime.optim import Budget, NonFiniteGuard
from mergevq.runtime.run import RunDirectory
from mergevq.training.fit import Task, cut, fit, put_state, read_numbers, state_of

CPU = torch.device("cpu")
WORLD = distributed.World(rank=0, world_size=1, local_rank=0, device=CPU)
LOOP = TrainConfig(
    num_steps=6, batch_size=2, log_every=2, eval_every=3, image_every=4, save_every=3
)


@dataclass(kw_only=True)
class State:
    """A weight, its optimizer, and a part that is not there."""

    weight: nn.Linear
    optimizer: torch.optim.Optimizer
    budget: Budget
    absent: nn.Module | None = None
    step: int = 0
    guards: ClassVar[tuple[NonFiniteGuard, ...]] = ()


def fresh(loop: TrainConfig = LOOP) -> State:
    weight = nn.Linear(1, 1)
    nn.init.ones_(weight.weight)
    nn.init.zeros_(weight.bias)
    return State(
        weight=weight,
        optimizer=torch.optim.Adam(weight.parameters(), lr=0.1),
        budget=Budget(num_steps=loop.num_steps, max_minutes=loop.max_minutes),
    )


@dataclass
class Toy:
    """Learns to be the number of the step, and remembers what it was asked."""

    unit: ClassVar[str] = "thing"
    state: State = field(default_factory=fresh)
    num_steps: int = LOOP.num_steps
    asked: list[str] = field(default_factory=list)

    def batches(self, start_step: int) -> Iterator[Tensor]:
        return (torch.full((2, 1), float(step)) for step in range(start_step, self.num_steps))

    def step(self, batch):
        loss = (self.state.weight(torch.ones_like(batch)) - batch).square().mean()
        self.state.optimizer.zero_grad()
        loss.backward()
        self.state.optimizer.step()
        return {"loss": loss, "lr": 0.1, "aside": torch.tensor(2.0)}

    def introduction(self, *, resumed):
        return [f"introduced {resumed}"]

    def interval_numbers(self):
        return {"seldom": 1.0}

    def validate(self):
        self.asked.append(f"validate {self.state.step}")
        return {"val_nll@3": 0.5}

    def picture(self, path):
        self.asked.append(path.name)

    def save(self, model):
        self.asked.append(f"{model.name} {self.state.step}")

    def shown(self, numbers):
        return {"seldom"} & numbers.keys()

    def panels(self, log):
        return [Panel(title="loss", curves=[Curve(x=[0], y=[line["loss"]]) for line in log])]


def run(folder, task: Toy, loop: TrainConfig = LOOP, *, resume: bool = False, **options) -> Toy:
    task.num_steps = loop.num_steps
    task.state.budget = Budget(num_steps=loop.num_steps, max_minutes=loop.max_minutes)
    fit(task, loop, RunDirectory(folder), WORLD, resume=resume, **options)
    return task


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_toy_is_a_task():
    assert isinstance(Toy(), Task)


def test_everything_is_done_when_it_is_due_and_after_the_last_step(tmp_path):
    task = run(tmp_path, Toy())
    assert task.asked == [
        "validate 3",
        "model 3",
        "step-00000004.png",
        "validate 6",
        "step-00000006.png",
        "model 6",
    ]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006"]


def test_the_log_has_logged_steps_validated_ones_and_the_last(tmp_path):
    run(tmp_path, Toy())
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == [0, 2, 4, 5]
    assert [line["step"] for line in log if "val_nll@3" in line] == [2, 5]
    assert all("seldom" in line and "things_per_second" in line for line in log)
    only_validated = run(tmp_path / "other", Toy(), replace(LOOP, log_every=100))
    assert only_validated.state.step == 6
    first, second, _ = read_log(tmp_path / "other")
    assert (first["step"], second["step"]) == (0, 2)
    assert "seldom" not in second
    assert "things_per_second" not in second


def test_a_line_shows_what_every_stage_has_and_the_stages_own(tmp_path, capsys):
    run(tmp_path, Toy())
    printed = capsys.readouterr().err
    assert "introduced False" in printed
    line = next(line for line in printed.splitlines() if line.startswith("step       0"))
    for name in ("loss", "lr", "seldom", "things_per_second"):
        assert f"  {name} " in line
    assert "aside" not in line


def test_a_brief_run_shows_its_validations_alone(tmp_path, capsys):
    run(tmp_path, Toy(), brief=3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [line.split()[1:] for line in lines] == [
        ["2", "val_nll@3", "0.5"],
        ["5", "val_nll@3", "0.5"],
    ]


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, capsys):
    whole = run(tmp_path / "whole", Toy())
    run(tmp_path / "cut", Toy(), replace(LOOP, num_steps=3))
    capsys.readouterr()
    resumed = run(tmp_path / "cut", Toy(), resume=True)
    assert "introduced True" in capsys.readouterr().err
    assert resumed.asked[0] == "step-00000004.png"
    first, second = (
        load_state(tmp_path / name / "checkpoints/step-00000006/state") for name in ("whole", "cut")
    )
    assert first["step"] == second["step"] == 6
    for name, value in first["weight"].items():
        assert torch.equal(value, second["weight"][name])
    moments = zip(
        first["optimizer"]["state"][0].values(),
        second["optimizer"]["state"][0].values(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in moments)
    assert torch.equal(whole.state.weight.bias, resumed.state.weight.bias)
    assert read_log(tmp_path / "whole")[-1]["loss"] == read_log(tmp_path / "cut")[-1]["loss"]


def channels_last(seed):
    """A state of weights in another memory layout, whose optimizer walks through memory."""
    weight = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        weight.weight.copy_(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed)))
        weight.bias.zero_()
    weight = weight.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.1, fused=True)
    return State(weight=weight, optimizer=optimizer, budget=Budget(num_steps=6, max_minutes=None))


def test_moments_have_the_memory_layout_of_their_weights_again(tmp_path):
    def step(state, number):
        numbers = torch.Generator().manual_seed(number)
        state.optimizer.zero_grad()
        state.weight(torch.randn(2, 3, 5, 5, generator=numbers)).square().sum().backward()
        state.optimizer.step()

    whole, resumed = channels_last(0), channels_last(1)
    step(whole, 0)
    step(resumed, 5)
    save_state(tmp_path / "state", state_of(whole))
    put_state(resumed, load_state(tmp_path / "state"))
    for state in (whole, resumed):
        step(state, 1)
    assert torch.equal(whole.weight.weight, resumed.weight.weight)


def test_resuming_without_a_checkpoint_starts(tmp_path):
    assert run(tmp_path, Toy(), resume=True).state.step == 6


class Clock:
    """A clock that stands still but for the seconds that each step takes."""

    def __init__(self, monkeypatch, per_step):
        self.now, self.per_step = 1000.0, per_step
        monkeypatch.setattr("mergevq.runtime.optim.time.monotonic", lambda: self.now)

    def slow(self, task):
        """The task with steps that take their time, which it writes down with their places."""

        def step(batch, step=task.step):
            self.now += self.per_step
            task.asked.append(f"at {task.state.budget.place(task.state.step)}")
            return step(batch)

        task.step = step
        return task


TIMED = replace(
    LOOP, num_steps=100, max_minutes=1.0, eval_every=99, image_every=99, save_every=99, log_every=1
)


def test_a_run_goes_through_its_schedules_in_its_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, per_step=15.0)
    task = run(tmp_path, clock.slow(Toy()), TIMED)
    assert task.state.step == 4
    places = [f"at {step}" for step in (0, 25, 50, 75)]
    assert task.asked == [*places, "validate 4", "step-00000004.png", "model 4"]
    assert [line["time_used"] for line in read_log(tmp_path)] == [0.25, 0.5, 0.75, 1.0]


def test_a_run_of_few_steps_ends_before_its_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, per_step=1.0)
    task = run(tmp_path, clock.slow(Toy()), replace(TIMED, num_steps=3))
    assert task.asked[:3] == ["at 0", "at 1", "at 2"]
    assert task.state.step == 3


def test_a_run_that_was_stopped_goes_on_from_the_share_it_had_used(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, per_step=15.0)
    toy = clock.slow(Toy())
    slow_step = toy.step

    def interrupted(batch):
        if toy.state.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return slow_step(batch)

    toy.step = interrupted
    run(tmp_path, toy, TIMED)
    assert (toy.state.step, toy.state.budget.share) == (2, 0.5)
    clock.now += 86_400.0  # A night in which nothing ran.
    task = run(tmp_path, clock.slow(Toy()), TIMED, resume=True)
    assert task.asked[:2] == ["at 50", "at 75"]
    assert (task.state.step, task.state.budget.share) == (4, 1.0)
    again = run(tmp_path, clock.slow(Toy()), TIMED, resume=True)
    assert (again.asked, again.state.step) == ([], 4), "nothing is left to do"
    more = run(tmp_path, clock.slow(Toy()), replace(TIMED, max_minutes=2.0), resume=True)
    assert more.asked[:4] == ["at 50", "at 62", "at 75", "at 87"]


def test_several_ranks_ask_each_other_every_tenth_step(tmp_path):
    class Stopped(Toy):
        def step(self, batch):
            if self.state.step == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().step(batch)

    task = Stopped(num_steps=25)
    task.state.budget = Budget(num_steps=25)
    loop = replace(LOOP, num_steps=25)
    fit(task, loop, RunDirectory(tmp_path), replace(WORLD, world_size=2), resume=False)
    assert task.state.step == 10


def test_an_error_names_rank_and_step(tmp_path):
    class Failing(Toy):
        def step(self, batch):
            if self.state.step == 2:
                raise RuntimeError("broken")
            return super().step(batch)

    with pytest.raises(RuntimeError, match="broken") as failure:
        run(tmp_path, Failing())
    assert failure.value.__notes__ == ["on rank 0 of 1, at step 2"]


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    class Breaking(Toy):
        def step(self, batch):
            numbers = super().step(batch)
            if self.state.step == 5:
                self.state.weight.bias.data.fill_(torch.nan)
            return numbers

    task = Breaking()
    with pytest.raises(RuntimeError, match=r"not finite are weight\.bias; .*step-00000003 is the"):
        run(tmp_path, task)
    assert task.asked[-1] != "model 6"


# ------------------------------------------------------------------------------- its values


def test_numbers_keep_their_order_and_are_plain():
    numbers = {"a": torch.tensor(0.5), "count": 3, "b": torch.tensor(0.1, dtype=torch.bfloat16)}
    values = read_numbers(numbers, CPU)
    assert values == {"a": 0.5, "count": 3, "b": float(torch.tensor(0.1, dtype=torch.bfloat16))}
    assert list(values) == ["a", "count", "b"]
    assert read_numbers({"count": 3}, CPU) == {"count": 3}


def test_one_collective_reads_all_numbers(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "mean", lambda tensor: calls.append(tensor) or tensor / 2)
    assert read_numbers({"a": torch.tensor(1.0), "b": torch.tensor(3.0)}, CPU) == {
        "a": 0.5,
        "b": 1.5,
    }
    assert len(calls) == 1


class Columns(NamedTuple):
    first: Tensor
    absent: Tensor | None
    last: Tensor


def test_a_batch_is_cut_column_by_column():
    batch = Columns(torch.arange(6), None, torch.arange(12).view(6, 2))
    parts = cut(batch, 3, CPU)
    assert [type(part) for part in parts] == [Columns] * 3
    assert [part.first.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert all(part.absent is None for part in parts)
    assert torch.equal(torch.cat([part.last for part in parts]), batch.last)


def test_a_state_is_its_fields_without_absent_ones():
    state = fresh()
    saved = state_of(state)
    assert set(saved) == {"weight", "optimizer", "budget", "step"}
    other = fresh()
    nn.init.zeros_(other.weight.weight)
    put_state(other, saved | {"step": 7})
    assert other.step == 7
    assert torch.equal(other.weight.weight, state.weight.weight)


def test_a_state_with_other_parts_is_refused_by_name():
    saved = state_of(fresh())
    without = {name: part for name, part in saved.items() if name != "optimizer"}
    with pytest.raises(ValueError, match=r"lacks \['optimizer'\] and has \[\] besides"):
        put_state(fresh(), without)
    with pytest.raises(ValueError, match=r"lacks \[\] and has \['absent'\] besides"):
        put_state(fresh(), saved | {"absent": {}})


@dataclass(kw_only=True)
class GuardedState(State):
    """A state whose optimizer may skip steps."""

    guard: NonFiniteGuard

    @property
    def guards(self):
        return (self.guard,)


@dataclass
class Guarded(Toy):
    """A toy whose losses are given, and whose guard is hardly ever read."""

    losses: tuple[float, ...] = ()
    reads: list[int] = field(default_factory=list)

    def __post_init__(self):
        guard = NonFiniteGuard(limit=2, read_every=100)
        plain = vars(self.state)
        self.state = GuardedState(**plain, guard=guard)
        read = guard.read
        guard.read = lambda: (self.reads.append(self.state.step), read())

    def step(self, batch):  # noqa: ARG002 - of the protocol
        loss = torch.tensor(self.losses[self.state.step])
        self.state.guard.check(self.state.step, {"loss": loss})
        return {"loss": loss}


def test_guards_are_read_when_something_is_due(tmp_path):
    task = run(tmp_path, Guarded(losses=(0.0, 0.0, 0.0, math.nan, 0.0, 0.0)))
    log = read_log(tmp_path)
    assert [(line["step"], line["num_skipped"]) for line in log] == [(0, 0), (2, 0), (4, 1), (5, 1)]
    # Logged at 1, 3, 5 and 6 steps, saved at 3 and 6, and after a save until a step is finite.
    assert sorted(set(task.reads)) == [1, 3, 4, 5, 6]
    assert not (tmp_path / "checkpoints/step-00000003/suspect").exists()


def test_a_run_that_is_broken_stops_before_its_checkpoint(tmp_path):
    task = Guarded(losses=(0.0, *[math.nan] * 5))
    with pytest.raises(RuntimeError, match=r"2 steps in a row were not finite, up to step 2"):
        run(tmp_path, task)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
