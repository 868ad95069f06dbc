"""Which schedules to try next, and when to stop: best first by the heuristic, then local moves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sparsec.ir.schedule import Schedule
from sparsec.tuning.record import Trial

FIRST = 4  # of the heuristic's order, before the first move
PATIENCE = 12  # trials without a better schedule
BETTER = 0.99  # less is noise

Measure = Callable[[Schedule], Trial]


@dataclass
class Budget:
    """What a whole run of the tuner may use; None: no limit."""

    trials: int | None = None
    minutes: float | None = None
    _started: float = field(default_factory=time.monotonic)
    _used: int = 0

    def spend(self, trials: int = 1) -> None:
        self._used += trials

    def part(self, parts: int, at_once: int = 1) -> Budget:
        """An equal part of what is left; of the time so many when `at_once` are used together."""
        at_once = min(at_once, parts)
        trials = None if self.trials is None else -(-max(0, self.trials - self._used) // parts)
        minutes = (
            None
            if self.minutes is None
            else max(0.0, self.minutes - self._passed) / parts * at_once
        )
        return Budget(trials, minutes)

    def share(self, jobs: int, of: int) -> Budget:
        """For `jobs` of so many jobs, when all have the same time: their part of the trials."""
        trials = None if self.trials is None else -(-self.trials * jobs // max(1, of))
        return Budget(trials, self.minutes)

    @property
    def is_spent(self) -> bool:
        return self.share_used >= 1.0

    @property
    def share_used(self) -> float:
        """Of the limit that is nearer; 0 without one."""
        shares = [0.0]
        if self.trials is not None:
            shares.append(self._used / self.trials if self.trials else 1.0)
        if self.minutes is not None:
            shares.append(self._passed / self.minutes if self.minutes else 1.0)
        return max(shares)

    @property
    def _passed(self) -> float:
        """Minutes."""
        return (time.monotonic() - self._started) / 60


def search(
    candidates: Sequence[Schedule],
    measure: Measure,
    budget: Budget,
    *,
    known: Iterable[Trial] = (),
    patience: int = PATIENCE,
) -> Iterator[Trial]:
    """Trials of `candidates`, which are in the heuristic's order.

    The first few come in that order. Then the nearest untried neighbour of the best schedule is
    next, and the heuristic's order again when it has none. `known` are the trials of a search
    that was stopped, in their order: they are not repeated, and it goes on behind them.
    """
    course = _Course()
    for trial in known:
        course.add(trial)
    while not budget.is_spent and course.since < patience:
        schedule = _next(candidates, course.ratios, course.best)
        if schedule is None:
            return
        budget.spend()
        trial = measure(schedule)
        course.add(trial)
        yield trial


@dataclass
class _Course:
    """How a search has gone so far; `since` counts the trials without a better schedule."""

    ratios: dict[Schedule, float] = field(default_factory=dict)
    best: Schedule | None = None
    since: int = 0

    def add(self, trial: Trial) -> None:
        """A schedule's later trials confirm it and say nothing of the search."""
        if trial.schedule in self.ratios:
            return
        self.ratios[trial.schedule] = trial.ratio
        self.since += 1
        if self.best is None or trial.ratio < BETTER * self.ratios[self.best]:
            self.best, self.since = trial.schedule, 0


def are_neighbours(a: Schedule, b: Schedule) -> bool:
    """Whether one move leads from one to the other: one parameter, or the instruction set."""
    if a.family != b.family or len(a.params) != len(b.params):
        return False
    moves = sum(x != y for x, y in zip(a.params, b.params, strict=True)) + (a.isa != b.isa)
    return moves == 1


def _next(
    candidates: Sequence[Schedule], tried: dict[Schedule, float], best: Schedule | None
) -> Schedule | None:
    untried = [c for c in candidates if c not in tried]
    if best is not None and len(tried) >= FIRST:
        near = [c for c in untried if are_neighbours(c, best)]
        if near:
            return min(near, key=lambda c: _step(c, best))
    return next(iter(untried), None)


def _step(a: Schedule, b: Schedule) -> float:
    """How far a move goes, in doublings of the parameter."""
    pairs = zip(a.params, b.params, strict=True)
    return max((abs(math.log2((x + 1) / (y + 1))) for (_, x), (_, y) in pairs), default=0.0)
