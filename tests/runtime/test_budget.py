"""The place of a step in the schedules of a run with a limit on its time."""

import pytest

from mergevq.runtime import budget as module
from mergevq.runtime.budget import Budget


@pytest.fixture
def clock(monkeypatch):
    """The time that is shown, in a list of one number."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_limit_places_are_the_steps(clock):
    budget = Budget(num_steps=10)
    budget.start()
    clock[0] += 1e9
    budget.update()
    assert [budget.place(step) for step in (0, 4, 9)] == [0, 4, 9]
    assert (budget.seconds, budget.share, budget.numbers()) == (0.0, 0.0, {})
    assert not budget.is_used(9)
    assert budget.is_used(10)


@pytest.mark.parametrize(
    ("seconds", "step", "place"),
    [(0, 0, 0), (0, 7, 7), (59, 3, 49), (60, 3, 50), (60, 70, 70), (119.9, 3, 99), (500, 3, 99)],
)
def test_the_place_is_the_larger_share_of_time_and_of_steps(seconds, step, place):
    budget = Budget(num_steps=100, max_minutes=2.0, seconds=float(seconds))
    assert budget.place(step) == place
    assert budget.is_used(step) == (seconds >= 120)
    assert budget.numbers() == {"time_used": seconds / 120}


def test_time_is_counted_over_stops_and_not_between_them(clock):
    first = Budget(num_steps=100, max_minutes=1.0)
    first.start()
    clock[0] += 12.0
    first.update()
    assert first.share == 0.2
    second = Budget(num_steps=100, max_minutes=1.0)
    second.load_state_dict(first.state_dict())
    clock[0] += 1e6
    second.start()
    clock[0] += 3.0
    second.update()
    assert second.seconds == 15.0


def test_every_rank_has_the_main_ranks_time(clock, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module.distributed, "broadcast_object", lambda own: (asked.append(own), 15.0)[1]
    )
    budget = Budget(num_steps=100, max_minutes=1.0)
    budget.start()
    clock[0] += 45.0
    budget.update()
    assert (asked, budget.place(0)) == ([45.0], 25)
