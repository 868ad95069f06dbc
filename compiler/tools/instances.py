"""Several instances of an engine at work side by side, each on cores of its own.

An instance answers one call after the other; all instances do so at the same time. What is
measured is the time of each call while the others are busy too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from sparsec.errors import InvalidInput
from sparsec.runtime import load
from sparsec.runtime.loader import Model
from sparsec.tools.inputs import Arrays
from sparsec.tools.turns import WARM_UP_RUNS, window

Call = Callable[[], object]
# For each instance the CPUs of its threads; the first is that of the thread that calls it.
Places = tuple[tuple[int, ...], ...]
# For each instance the seconds of its calls, which follow each other without a gap.
Windows = list[list[float]]


@dataclass(frozen=True, slots=True)
class Setup:
    """So many instances of so many threads each, every call with `batch` samples.

    `setting`: that of the engine, of Engine.settings.
    """

    instances: int
    threads: int
    batch: int
    setting: str = ""


@dataclass(frozen=True, slots=True)
class Measurement:
    """`calls` of all instances together; the percentiles are of the time of a call."""

    setup: Setup
    samples_per_s: float
    p50_ms: float
    p99_ms: float
    calls: int


class EngineFailed(Exception):
    """An engine can not do what it was asked for, and says why; the others go on."""


class Engine(Protocol):
    """What is searched for its best setup.

    `settings`: the ways to run it that are all tried; one without a name where there is no choice.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> tuple[str, ...]: ...

    def windows(self, setting: str, places: Places, arrays: Arrays, seconds: float) -> Windows:
        """Seconds of the calls of an instance in each place, all at work at the same time.

        Each is warm, and calls for at least `seconds` and MIN_CALLS (see turns.window). Raises
        EngineFailed.
        """


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """An Engine in this process: `calls` gives a function per instance that runs it once.

    `is_pinned_by_caller`: it computes in the thread that calls it, which is to be on the
    instance's first CPU. Another has threads of its own, and its callers only wait.
    """

    name: str
    calls: Callable[[Places, Arrays], list[Call]]
    is_pinned_by_caller: bool = True
    settings: tuple[str, ...] = ("",)

    def windows(self, setting: str, places: Places, arrays: Arrays, seconds: float) -> Windows:
        """See Engine; raises what the calls raise."""
        pins = [cpus[0] for cpus in places] if self.is_pinned_by_caller else None
        return run_together(self.calls(places, arrays), pins, seconds)


def sparsec_engine(library: Path) -> LocalEngine:
    """Contexts of one loaded library: the weights are in memory once."""

    @lru_cache(maxsize=1)
    def models(places: Places) -> list[Model]:
        return [load(library, threads=len(cpus), pin=cpus) for cpus in places]

    def calls(places: Places, arrays: Arrays) -> list[Call]:
        return [partial(model, arrays) for model in models(places)]

    return LocalEngine("sparsec", calls)


def places_of(setup: Setup, cpus: Sequence[int]) -> Places:
    """Neighbouring CPUs for each instance; no CPU is given twice."""
    wanted = setup.instances * setup.threads
    if wanted > len(cpus):
        raise InvalidInput(
            f"{setup.instances} instances of {setup.threads} threads need {wanted} cores; "
            f"this process may use {len(cpus)}"
        )
    starts = range(0, wanted, setup.threads)
    return tuple(tuple(cpus[start : start + setup.threads]) for start in starts)


def run_together(calls: Sequence[Call], pins: Sequence[int] | None, seconds: float) -> Windows:
    """Seconds of each call of each function, which all run at the same time, each in a thread.

    `pins`: the CPU of each thread; None leaves them to the system. They start together once
    all are warm and run for at least `seconds` and MIN_CALLS. Raises what a function raises.
    """
    barrier = threading.Barrier(len(calls))
    stop = threading.Event()
    windows: Windows = [[] for _ in calls]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            if pins is not None:
                os.sched_setaffinity(0, {pins[index]})  # of this thread only
            for _ in range(WARM_UP_RUNS):
                calls[index]()
            barrier.wait()
            windows[index] = window(calls[index], seconds, stop.is_set)
        except threading.BrokenBarrierError:
            return  # another one failed and says why
        except BaseException as error:
            errors.append(error)
            stop.set()
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if errors:
        raise errors[0]
    return windows


def measurement(setup: Setup, windows: Windows) -> Measurement:
    """What the seconds of the calls say.

    The p99 is by nearest rank: 99 of 100 calls took no longer. Of fewer than 100 calls it is the
    longest. The rate is the sum of those of the instances.
    """
    taken = np.concatenate([np.asarray(window) for window in windows]) * 1e3
    p50, p99 = (float(v) for v in np.percentile(taken, [50, 99], method="inverted_cdf"))
    rate = sum(setup.batch * len(window) / sum(window) for window in windows)
    return Measurement(setup, rate, p50, p99, len(taken))
