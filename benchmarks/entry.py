"""Comparisons: two ways to the same result, in turns, by CPU time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """Two ways to the same result."""

    plain: Callable[[], Any]
    ours: Callable[[], Any]
    agree: Callable[[Any, Any], None]
    """Raises unless the two results agree, plain first."""


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    """Computation and its size."""
    make: Callable[[], Pair]
    """Makes the inputs."""


class Ratio(NamedTuple):
    """CPU time of the plain way over that of ours, over turns."""

    minimum: float
    median: float
    maximum: float
    plain_ms: float
    """Median over turns."""
    ours_ms: float
    num_turns: int


def measure(entry: Entry, num_turns: int) -> Ratio:
    """Let both ways take turns, after one call of each to warm up, which must agree."""
    pair = entry.make()
    pair.agree(pair.plain(), pair.ours())
    calls = [_calls(way) for way in (pair.plain, pair.ours)]
    seconds: list[tuple[float, float]] = []
    for turn in range(num_turns):
        both = [0.0, 0.0]
        # Whoever comes first finds other caches than whoever comes second.
        for number in (0, 1) if turn % 2 else (1, 0):
            both[number] = _seconds(pair[number], calls[number])
        seconds.append((both[0], both[1]))
    ratios = [plain / ours for plain, ours in seconds]
    return Ratio(
        minimum=min(ratios),
        median=statistics.median(ratios),
        maximum=max(ratios),
        plain_ms=1e3 * statistics.median(plain for plain, _ in seconds),
        ours_ms=1e3 * statistics.median(ours for _, ours in seconds),
        num_turns=num_turns,
    )


def _seconds(way: Callable[[], Any], calls: int) -> float:
    """CPU seconds of one call, over several."""
    before = time.process_time()
    for _ in range(calls):
        way()
    return (time.process_time() - before) / calls


def _calls(way: Callable[[], Any]) -> int:
    """Calls of a turn: at least a tenth of a second of them."""
    return max(1, min(100, round(0.1 / max(_seconds(way, 1), 1e-4))))
