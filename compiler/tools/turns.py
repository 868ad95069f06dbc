"""Times engines in turns, so that noise of the machine hits all alike.

Needs nothing newer than Python 3.10 and NumPy 1: the workers under benchmarks/ time themselves
with it, in the Python of an engine that needs an old one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TURNS = 10
TURN_RUNS = 2
WARM_UP_RUNS = 1 + TURN_RUNS  # a turn that is not kept
MIN_CALLS = 5  # of a window, however long they take


class Timed(Protocol):
    """Something that times itself when it has its turn."""

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each of at least TURN_RUNS runs, at least `seconds` in total.

        A run before them is not timed: it wakes the threads and brings back the caches that the
        others took.
        """


@dataclass(frozen=True)
class Function:
    """A function that is timed by the clock `now`."""

    run: Callable[[], Any]
    now: Callable[[], float]

    def turn(self, seconds: float) -> list[float]:
        """See Timed."""
        self.run()
        taken: list[float] = []
        while len(taken) < TURN_RUNS or sum(taken) < seconds:
            start = self.now()
            self.run()
            taken.append(self.now() - start)
        return taken


def window(
    call: Callable[[], object], seconds: float, is_stopped: Callable[[], bool] = lambda: False
) -> list[float]:
    """Seconds of each of at least MIN_CALLS calls, at least `seconds` in total.

    They follow each other without a gap. Fewer when `is_stopped`, which is asked before each.
    """
    taken: list[float] = []
    start = last = time.perf_counter()
    while not is_stopped() and (len(taken) < MIN_CALLS or last - start < seconds):
        call()
        now = time.perf_counter()
        taken.append(now - last)
        last = now
    return taken


def in_turns(engines: Sequence[Timed], seconds: float) -> list[list[float]]:
    """Seconds of each run of each engine, `seconds` in total or more.

    All have ten turns, after one that is not kept. Every other time they come in reverse, so that
    none always has the same one before it, whose threads may go on for a while.
    """
    for engine in engines:
        engine.turn(0.0)
    times: list[list[float]] = [[] for _ in engines]
    order = list(zip(engines, times, strict=True))
    for _ in range(TURNS):
        for engine, taken in order:
            taken += engine.turn(seconds / TURNS)
        order.reverse()
    return times


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread in ms, and the number of runs."""
    p10, median, p90 = (float(v) for v in np.percentile(np.array(seconds) * 1e3, [10, 50, 90]))
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "runs": len(seconds)}
