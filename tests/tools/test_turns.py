"""Turns: all engines get as many, and the first run of each is not timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import pytest

from sparsec.tools.turns import (
    MIN_CALLS,
    TURN_RUNS,
    TURNS,
    WARM_UP_RUNS,
    Function,
    in_turns,
    summary,
    window,
)


class Clock:
    """A clock that only the functions move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> None:
        # The first call after another function's finds its caches cold.
        cold = not self.calls or self.calls[-1] != name
        self.calls.append(name)
        self.now += seconds + 1.0 * cold

    def function(self, name: str, seconds: float) -> Function:
        return Function(partial(self.run, name, seconds), self)


def test_cold_calls_are_not_timed() -> None:
    clock = Clock()
    fast, slow = in_turns([clock.function("fast", 0.01), clock.function("slow", 0.3)], 2.0)
    # 0.01 by the difference of two sums of up to 1e3: an error of some 1e-13.
    assert fast == pytest.approx([0.01] * len(fast), abs=1e-9)
    assert slow == pytest.approx([0.3] * len(slow), abs=1e-9)


def test_everyone_is_timed_long_enough() -> None:
    clock = Clock()
    fast, slow = in_turns([clock.function("fast", 0.01), clock.function("slow", 0.3)], 2.0)
    assert sum(fast) >= 2.0 - 1e-9  # an error of summing, as above
    assert len(slow) == TURNS * TURN_RUNS  # two runs are more than a turn's tenth of 2 s
    starts = [n for i, n in enumerate(clock.calls) if i == 0 or clock.calls[i - 1] != n]
    # A warm-up, then there and back.
    assert starts == (["fast", "slow"] * TURNS)[: TURNS + 3]
    assert len(clock.calls) == len(fast) + len(slow) + 2 * (WARM_UP_RUNS + TURNS)


def test_a_window_is_long_enough_or_stopped() -> None:
    assert len(window(lambda: None, 0.0)) == MIN_CALLS
    taken = window(partial(time.sleep, 0.001), 0.02)
    assert sum(taken) >= 0.02 - 1e-9  # an error of summing
    assert min(taken) >= 0.001
    calls: list[None] = []
    assert len(window(partial(calls.append, None), 3600.0, lambda: len(calls) == 2)) == 2


@dataclass
class TimesItself:
    """An engine elsewhere, whose clock is not ours."""

    asked: list[float] = field(default_factory=list)

    def turn(self, seconds: float) -> list[float]:
        self.asked.append(seconds)
        return [len(self.asked) / 8.0]


def test_an_engine_may_time_itself() -> None:
    clock, elsewhere = Clock(), TimesItself()
    here, there = in_turns([clock.function("here", 0.5), elsewhere], 1.0)
    assert elsewhere.asked == [0.0] + [1.0 / TURNS] * TURNS
    assert there == [turn / 8.0 for turn in range(2, TURNS + 2)]  # without its warm-up
    assert here == [0.5] * (TURNS * TURN_RUNS)


def test_summary_is_in_milliseconds() -> None:
    figures = summary([i / 1000 for i in range(11)])
    assert figures == {"median_ms": 5.0, "p10_ms": 1.0, "p90_ms": 9.0, "runs": 11}
