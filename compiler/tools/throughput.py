"""The most samples per second that keep under a latency limit: `bench --latency-ms`.

Engines are searched one after the other over settings x instances x threads x batch, each setup
for a short time; then the best setup of every engine is measured for longer, in turns, so that
noise of the machine hits all alike. A setup that misses the limit then gives way to the engine's
next best. A setting in which the engine fails does not count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsec.runtime import Model, load
from sparsec.target import core_cpus
from sparsec.tools.console import console
from sparsec.tools.inputs import fixed_sizes, random_inputs, run_shape
from sparsec.tools.instances import (
    Engine,
    EngineFailed,
    Measurement,
    Setup,
    Windows,
    measurement,
    places_of,
    sparsec_engine,
)

TRIAL_SHARE = 5  # a trial of the search is this many times shorter than the last measurement
TURNS = 5  # of the last measurement
MOST_SAMPLES = 128  # the largest batch that is tried
PAST_PEAK = 0.8  # of the best rate: a larger batch will not help
SETUP_KEYS = ("instances", "threads", "batch", "setting")

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched: None leaves the choice to the search."""

    instances: int | None = None
    threads: int | None = None
    batch: int | None = None

    def grid(self, cores: int) -> list[tuple[int, int]]:
        """(instances, threads) that fit into the cores; raises InvalidInput when none does."""
        if self.instances is not None or self.threads is not None:
            places_of(Setup(self.instances or 1, self.threads or 1, 1), range(cores))
            instances = self.instances or cores // (self.threads or 1)
            return [(instances, self.threads or cores // instances)]
        # With a thread more or an instance more, these would not fit any more.
        pairs = [(count, cores // count) for count in range(cores, 0, -1)]
        return [(count, threads) for count, threads in pairs if cores // threads == count]


def throughput(
    library: Path,
    *,
    limit_ms: float,
    seq: int | None,
    space: Space,
    peers: Sequence[Engine],
    seconds: float,
    progress: Tell,
) -> dict[str, Any]:
    """Per engine the setup with most samples/s whose p99 latency is at most `limit_ms`.

    `seq` and the batch of the space are as `run_shape` says. Ours is the first of the engines;
    `peers` have names of their own.

    The last measurement of an engine takes `seconds`, a trial of the search a fifth of that.
    "load_before" is the load average of the system. "met" says whether any setup kept the limit;
    where none did, "best" is the one with the lowest p99. `ratio` is our rate over that of the
    best peer, where both keep the limit. "failures" says which settings of which engines do not
    count, and why; an engine without another setting is not among "engines".
    """
    cpus = core_cpus()
    grid = space.grid(len(cpus))
    busy = os.getloadavg()[0]
    model = load(library, threads=1)
    _, seq = run_shape(model, space.batch, seq)
    batch = space.batch or fixed_sizes(model)[0]
    engines = {e.name: e for e in [sparsec_engine(library), *peers]}
    bench = _Bench(engines, model, cpus, seq, seconds, progress)
    tried = {name: bench.search(name, grid, batch, limit_ms) for name in engines}
    found = confirm(tried, bench.turn, limit_ms)
    return {
        "model": str(library),
        "seq": seq,
        "latency_ms": limit_ms,
        "cores": len(cpus),
        "load_before": busy,
        "engines": {n: _engine_result(found[n], tried[n], limit_ms) for n in found},
        "failures": bench.failures,
        "ratio": _ratio(list(found.values()), limit_ms),
    }


@dataclass(frozen=True, slots=True)
class _Bench:
    """Runs setups of engines on inputs of one length."""

    engines: Mapping[str, Engine]
    model: Model
    cpus: Sequence[int]
    seq: int
    seconds: float
    progress: Tell
    failures: list[dict[str, str]] = field(default_factory=list)

    def search(
        self, name: str, grid: Sequence[tuple[int, int]], batch: int | None, limit_ms: float
    ) -> list[Measurement]:
        """The trials of all settings that did not fail."""
        tried: list[Measurement] = []
        for setting in self.engines[name].settings:
            try:
                tried += [
                    m
                    for pair in grid
                    for m in search(self.trial, name, pair, batch, limit_ms, setting)
                ]
            except EngineFailed as error:
                self._note(name, setting, error)
        return tried

    def trial(self, name: str, setup: Setup) -> Measurement:
        self.progress(f"{name}: {_setup_text(setup)}")
        return measurement(setup, self._run(name, setup, self.seconds / TRIAL_SHARE))

    def turn(self, name: str, setup: Setup) -> Windows | None:
        """None when the engine fails."""
        self.progress(f"{name}: {_setup_text(setup)}, once more for longer")
        try:
            return self._run(name, setup, self.seconds / TURNS)
        except EngineFailed as error:
            self._note(name, setup.setting, error)
            return None

    def _run(self, name: str, setup: Setup, seconds: float) -> Windows:
        arrays = random_inputs(self.model, setup.batch, self.seq, seed=0, padding=False)
        places = places_of(setup, self.cpus)
        return self.engines[name].windows(setup.setting, places, arrays, seconds)

    def _note(self, name: str, setting: str, error: EngineFailed) -> None:
        self.failures.append({"engine": name, "setting": setting, "reason": str(error)})


def search(
    trial: Callable[[str, Setup], Measurement],
    name: str,
    pair: tuple[int, int],
    batch: int | None,
    limit_ms: float,
    setting: str = "",
) -> list[Measurement]:
    """All trials of a setting of an engine with (instances, threads), in the order made.

    The batch doubles until the limit is missed or the rate has passed its peak; where the limit
    was missed the batch is narrowed down between the last two, to an eighth.
    """
    if batch is not None:
        return [trial(name, Setup(*pair, batch, setting))]
    tried: list[Measurement] = []
    good, bad = 0, 1
    while bad <= MOST_SAMPLES:
        tried.append(trial(name, Setup(*pair, bad, setting)))
        if tried[-1].p99_ms > limit_ms:
            break
        if tried[-1].samples_per_s < PAST_PEAK * max(m.samples_per_s for m in tried):
            return tried
        good, bad = bad, 2 * bad
    else:
        return tried
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        tried.append(trial(name, Setup(*pair, middle, setting)))
        if tried[-1].p99_ms > limit_ms:
            bad = middle
        else:
            good = middle
    return tried


def confirm(
    tried: Mapping[str, Sequence[Measurement]],
    turn: Callable[[str, Setup], Windows | None],
    limit_ms: float,
) -> dict[str, Measurement]:
    """The best of every engine, measured again in turns with the others.

    An engine whose setups all miss the limit, in the trials or now, has the one with the lowest
    p99 of all. One whose settings all fail, in the trials or now, has none.
    """
    left = {name: list(trials) for name, trials in tried.items()}
    queues = {name: _candidates(trials, limit_ms) for name, trials in tried.items()}
    # A trial that kept the limit does not count where the longer measurement missed it.
    missed: dict[str, list[Measurement]] = {name: [] for name in tried}
    found: dict[str, Measurement] = {}
    while open_names := [name for name in tried if name not in found and left[name]]:
        for name in [name for name in open_names if not queues[name]]:
            found[name] = min(missed[name] or left[name], key=lambda m: m.p99_ms)
        for name, setup, again in _in_turns(queues, found, turn):
            if again is None:
                for kept in (left, queues, missed):
                    kept[name] = [m for m in kept[name] if m.setup.setting != setup.setting]
            elif again.p99_ms <= limit_ms:
                found[name] = again
            else:
                missed[name].append(again)
                queues[name] = [m for m in queues[name] if not _is_beside(m.setup, setup)]
    return {name: found[name] for name in tried if name in found}


def _in_turns(
    queues: Mapping[str, list[Measurement]],
    found: Mapping[str, Measurement],
    turn: Callable[[str, Setup], Windows | None],
) -> Iterator[tuple[str, Setup, Measurement | None]]:
    """The first of every queue of an engine that is not found yet, measured in turns.

    None of an engine that failed: it had no more turns.
    """
    setups = {n: queue[0].setup for n, queue in queues.items() if n not in found and queue}
    windows: dict[str, Windows | None] = {
        name: [[] for _ in range(setup.instances)] for name, setup in setups.items()
    }
    for _ in range(TURNS):
        for name, setup in setups.items():
            if (kept := windows[name]) is None:
                continue
            more = turn(name, setup)
            windows[name] = more and [old + new for old, new in zip(kept, more, strict=True)]
    for name, setup in setups.items():
        kept = windows[name]
        yield name, setup, None if kept is None else measurement(setup, kept)


def _candidates(trials: Sequence[Measurement], limit_ms: float) -> list[Measurement]:
    kept = [m for m in trials if m.p99_ms <= limit_ms]
    return sorted(kept, key=lambda m: -m.samples_per_s)


def _is_beside(setup: Setup, missed: Setup) -> bool:
    """Whether it would miss as well: the same instances with more than 3/4 of the batch."""
    return replace(setup, batch=missed.batch) == missed and 4 * setup.batch > 3 * missed.batch


def _ratio(found: Sequence[Measurement], limit_ms: float) -> float | None:
    ours, *peers = found
    rates = [m.samples_per_s for m in peers if m.p99_ms <= limit_ms]
    return ours.samples_per_s / max(rates) if rates and ours.p99_ms <= limit_ms else None


def _engine_result(
    best: Measurement, tried: Sequence[Measurement], limit_ms: float
) -> dict[str, Any]:
    return {
        "met": best.p99_ms <= limit_ms,
        "best": _row(best),
        "tried": [_row(m) for m in tried],
    }


def _row(m: Measurement) -> dict[str, Any]:
    row = asdict(m)
    setup = row.pop("setup")
    return {**setup, **row, "samples_per_s_per_core": m.samples_per_s / _cores(m.setup)}


def _cores(setup: Setup) -> int:
    return setup.instances * setup.threads


def _setup_text(setup: Setup) -> str:
    text = f"{setup.instances} x {setup.threads} threads, batch {setup.batch}"
    return f"{setup.setting}, {text}" if setup.setting else text


def _setting_text(name: str, setting: str) -> str:
    return f"{name}, {setting}" if setting else name


def print_throughput(result: dict[str, Any]) -> None:
    """The result as a table on standard output, and a line for each that missed or failed."""
    limit = result["latency_ms"]
    title = (
        f"{result['model']}, length {result['seq']}, p99 <= {limit:g} ms, {result['cores']} cores"
    )
    table = Table(title=title)
    columns = ("engine", "instances", "threads", "batch", "samples/s", "per core", "p50 ms")
    for column in (*columns, "p99 ms", "calls"):
        table.add_column(column)
    missed = []
    for name, engine in result["engines"].items():
        best = engine["best"]
        setup = Setup(*(best[k] for k in SETUP_KEYS))
        numbers = [str(n) for n in (setup.instances, setup.threads, setup.batch)]
        rates = [f"{best[k]:.0f}" for k in ("samples_per_s", "samples_per_s_per_core")]
        times = [f"{best[k]:.3f}" for k in ("p50_ms", "p99_ms")]
        table.add_row(
            _setting_text(name, setup.setting), *numbers, *rates, *times, str(best["calls"])
        )
        if not engine["met"]:
            missed.append(
                f"{name}: nothing keeps the limit of {limit:g} ms; the closest found is "
                f"{_setup_text(setup)}: p99 {times[1]} ms, {rates[0]} samples/s"
            )
    console().print(table)
    failed = [
        f"{_setting_text(f['engine'], f['setting'])}, does not count: {f['reason']}"
        for f in result["failures"]
    ]
    for line in (*missed, *failed):
        print(line)
    if result["load_before"] >= 1:
        print(
            f"The load of the machine was {result['load_before']:.1f} before this began. Pinned "
            "threads can not make way for others: measure on an idle machine."
        )
    if result["ratio"] is not None:
        print(f"{result['ratio']:.2f}x the throughput of the best peer")
