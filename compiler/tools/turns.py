"""Times functions in turns, so that noise of the machine hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

WARM_UP_RUNS = 3
TURNS = 10
TURN_RUNS = 2


def in_turns(
    runs: Sequence[Callable[[], Any]], seconds: float, now: Callable[[], float]
) -> list[list[float]]:
    """Seconds of each call by the clock `now`.

    Each turn of a function starts with a call that is not timed: it wakes the threads and brings
    back the caches that the others took. All have ten turns of at least two timed calls, which
    take at least `seconds` in total.
    """
    for run in runs:
        for _ in range(WARM_UP_RUNS):
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(TURNS):
        for run, taken in zip(runs, times, strict=True):
            run()
            taken += _turn(run, seconds / TURNS, now)
    return times


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread in ms, and the number of calls."""
    p10, median, p90 = (float(v) for v in np.percentile(np.array(seconds) * 1e3, [10, 50, 90]))
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "runs": len(seconds)}


def _turn(run: Callable[[], Any], seconds: float, now: Callable[[], float]) -> list[float]:
    taken: list[float] = []
    while len(taken) < TURN_RUNS or sum(taken) < seconds:
        start = now()
        run()
        taken.append(now() - start)
    return taken
