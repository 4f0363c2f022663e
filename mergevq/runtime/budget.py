"""Time as a budget: the place of a step in the schedules of a run that may take only so long.

A recipe's schedules are written for a number of steps. A run that also has a limit on its time goes
through all of them in that time, however many steps it manages: rates fall to their last value, an
adversary enters, in the share of the run that the recipe gives them.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from mergevq.runtime import distributed


@dataclass(kw_only=True)
class Budget:
    """Steps and minutes that a run may take, and the time that it has used; part of its state."""

    num_steps: int
    """Steps of the whole run, at most."""
    max_minutes: float | None = None
    """Minutes of the whole run, at most; None is no limit."""
    seconds: float = 0.0
    """Time used so far, before earlier stops too; the same on every rank."""
    _started_at: float = field(default=0.0, repr=False)

    @property
    def share(self) -> float:
        """Share of the time that is used; 0 where there is no limit."""
        return 0.0 if self.max_minutes is None else self.seconds / (60 * self.max_minutes)

    def start(self) -> None:
        """Begin to count, where an earlier sitting ended."""
        self._started_at = time.monotonic() - self.seconds

    def update(self) -> None:
        """Look at the main rank's clock; every rank calls it, and all find the same time."""
        if self.max_minutes is not None:
            self.seconds = distributed.broadcast_object(time.monotonic() - self._started_at)

    def place(self, step: int) -> int:
        """Step of the schedules at a step of the run: the same, or later where time is shorter.

        Of a run that has used the share s of its time it is at least s times `num_steps`.
        """
        return max(step, min(int(self.share * self.num_steps), self.num_steps - 1))

    def is_used(self, step: int) -> bool:
        """Whether no more is to be done after so many steps."""
        return step >= self.num_steps or self.share >= 1

    def numbers(self) -> dict[str, float]:
        """The share used, for the log; nothing where there is no limit."""
        return {} if self.max_minutes is None else {"time_used": self.share}

    def state_dict(self) -> dict[str, float]:
        """The time used."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from that time; limits are those of this run."""
        self.seconds = state["seconds"]
