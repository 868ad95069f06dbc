"""The most samples per second that keep under a latency limit: `bench --latency-ms`.

Engines are searched one after the other over instances x threads x batch, each layout for a short
time; then the best layout of every engine is measured for longer, in turns, so that noise of the
machine hits all alike. A layout that misses the limit then gives way to the engine's next best.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsec.errors import InvalidInput
from sparsec.runtime import Model, load
from sparsec.tools.console import console
from sparsec.tools.inputs import random_inputs
from sparsec.tools.instances import (
    Engine,
    Layout,
    Measurement,
    Windows,
    core_cpus,
    measurement,
    places_of,
    run_together,
    sparsec_engine,
)
from sparsec.tools.peer_instances import PEER_ENGINES, is_installed

TRIAL_SHARE = 5  # a trial of the search is this many times shorter than the last measurement
TURNS = 5  # of the last measurement
MOST_SAMPLES = 128  # the largest batch that is tried
PAST_PEAK = 0.8  # of the best rate: a larger batch will not help
LAYOUT_KEYS = ("instances", "threads", "batch")

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
            places_of(Layout(self.instances or 1, self.threads or 1, 1), range(cores))
            instances = self.instances or cores // (self.threads or 1)
            return [(instances, self.threads or cores // instances)]
        # With a thread more or an instance more, these would not fit any more.
        pairs = [(count, cores // count) for count in range(cores, 0, -1)]
        return [(count, threads) for count, threads in pairs if cores // threads == count]


def throughput(
    library: Path,
    *,
    limit_ms: float,
    seq: int,
    space: Space,
    onnx: Path | None,
    against: str | None,
    seconds: float,
    progress: Tell,
) -> dict[str, Any]:
    """Per engine the layout with most samples/s whose p99 latency is at most `limit_ms`.

    The last measurement of an engine takes `seconds`, a trial of the search a fifth of that.
    "load_before" is the load average of the system. "met" says whether any layout kept the limit;
    where none did, "best" is the one with the lowest p99. `ratio` is our rate over that of the
    best peer, where both keep the limit.
    """
    if against is not None and onnx is None:
        raise InvalidInput(f"--against {against} needs the ONNX file: add --onnx FILE")
    cpus = core_cpus()
    grid = space.grid(len(cpus))
    busy = os.getloadavg()[0]
    model = load(library, threads=1)
    batch = _batch(model.inputs, space.batch, seq)
    engines = {e.name: e for e in [sparsec_engine(library), *_peers(onnx, against)]}
    bench = _Bench(engines, model, cpus, seq, seconds, progress)
    tried = {name: bench.search(name, grid, batch, limit_ms) for name in engines}
    found = confirm(tried, bench.turn, limit_ms)
    return {
        "model": str(library),
        "seq": seq,
        "latency_ms": limit_ms,
        "cores": len(cpus),
        "load_before": busy,
        "engines": {n: _engine_result(found[n], tried[n], limit_ms) for n in engines},
        "ratio": _ratio(list(found.values()), limit_ms),
    }


@dataclass(frozen=True, slots=True)
class _Bench:
    """Runs layouts of engines on inputs of one length."""

    engines: Mapping[str, Engine]
    model: Model
    cpus: Sequence[int]
    seq: int
    seconds: float
    progress: Tell

    def search(
        self, name: str, grid: Sequence[tuple[int, int]], batch: int | None, limit_ms: float
    ) -> list[Measurement]:
        return [m for pair in grid for m in search(self.trial, name, pair, batch, limit_ms)]

    def trial(self, name: str, layout: Layout) -> Measurement:
        self.progress(f"{name}: {_layout_text(layout)}")
        return measurement(layout, self._run(name, layout, self.seconds / TRIAL_SHARE))

    def turn(self, name: str, layout: Layout) -> Windows:
        self.progress(f"{name}: {_layout_text(layout)}, once more for longer")
        return self._run(name, layout, self.seconds / TURNS)

    def _run(self, name: str, layout: Layout, seconds: float) -> Windows:
        engine, places = self.engines[name], places_of(layout, self.cpus)
        arrays = random_inputs(self.model, layout.batch, self.seq, seed=0, padding=False)
        pins = [cpus[0] for cpus in places] if engine.is_pinned_by_caller else None
        return run_together(engine.calls(places, arrays), pins, seconds)


def search(
    trial: Callable[[str, Layout], Measurement],
    name: str,
    pair: tuple[int, int],
    batch: int | None,
    limit_ms: float,
) -> list[Measurement]:
    """All trials of one engine with (instances, threads), in the order made.

    The batch doubles until the limit is missed or the rate has passed its peak; where the limit
    was missed the batch is narrowed down between the last two, to an eighth.
    """
    if batch is not None:
        return [trial(name, Layout(*pair, batch))]
    tried: list[Measurement] = []
    good, bad = 0, 1
    while bad <= MOST_SAMPLES:
        tried.append(trial(name, Layout(*pair, bad)))
        if tried[-1].p99_ms > limit_ms:
            break
        if tried[-1].samples_per_s < PAST_PEAK * max(m.samples_per_s for m in tried):
            return tried
        good, bad = bad, 2 * bad
    else:
        return tried
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        tried.append(trial(name, Layout(*pair, middle)))
        if tried[-1].p99_ms > limit_ms:
            bad = middle
        else:
            good = middle
    return tried


def confirm(
    tried: Mapping[str, Sequence[Measurement]],
    turn: Callable[[str, Layout], Windows],
    limit_ms: float,
) -> dict[str, Measurement]:
    """The best of every engine, measured again in turns with the others.

    An engine whose layouts all miss the limit, in the trials or now, has the one with the lowest
    p99 of all.
    """
    queues = {name: _candidates(trials, limit_ms) for name, trials in tried.items()}
    closest = {name: min(trials, key=lambda m: m.p99_ms) for name, trials in tried.items()}
    # A trial that kept the limit does not count where the longer measurement missed it.
    missed: dict[str, list[Measurement]] = {name: [] for name in tried}
    found: dict[str, Measurement] = {}
    while open_names := [name for name in tried if name not in found]:
        for name in [name for name in open_names if not queues[name]]:
            found[name] = min(missed[name] or [closest[name]], key=lambda m: m.p99_ms)
        for name, again in _in_turns(queues, found, turn):
            if again.p99_ms <= limit_ms:
                found[name] = again
                continue
            missed[name].append(again)
            queues[name] = [m for m in queues[name] if not _is_beside(m.layout, again.layout)]
    return {name: found[name] for name in tried}


def _in_turns(
    queues: Mapping[str, list[Measurement]],
    found: Mapping[str, Measurement],
    turn: Callable[[str, Layout], Windows],
) -> Iterator[tuple[str, Measurement]]:
    """The first of every queue of an engine that is not found yet, measured in turns."""
    layouts = {n: queue[0].layout for n, queue in queues.items() if n not in found}
    windows: dict[str, Windows] = {
        name: [[] for _ in range(layout.instances)] for name, layout in layouts.items()
    }
    for _ in range(TURNS):
        for name, layout in layouts.items():
            for window, more in zip(windows[name], turn(name, layout), strict=True):
                window += more
    return ((name, measurement(layout, windows[name])) for name, layout in layouts.items())


def _candidates(trials: Sequence[Measurement], limit_ms: float) -> list[Measurement]:
    kept = [m for m in trials if m.p99_ms <= limit_ms]
    return sorted(kept, key=lambda m: -m.samples_per_s)


def _is_beside(layout: Layout, missed: Layout) -> bool:
    """Whether it would miss as well: the same instances with more than 3/4 of the batch."""
    same = (layout.instances, layout.threads) == (missed.instances, missed.threads)
    return same and (4 * layout.batch > 3 * missed.batch)


def _batch(inputs: Sequence[Any], batch: int | None, seq: int) -> int | None:
    """The only batch to try: the one asked for or the one that the library is compiled for."""
    for port in inputs:
        length = port.shape[1] if len(port.shape) == 2 else seq
        if isinstance(length, int) and length != seq:
            raise InvalidInput(f"--seq {seq}: {port.name} is compiled for a length of {length}")
    sizes = [port.shape[0] for port in inputs if port.shape]
    if not sizes or any(isinstance(size, str) for size in sizes):
        return batch
    if batch is not None and batch != sizes[0]:
        raise InvalidInput(f"--batch {batch}: the library is compiled for a batch of {sizes[0]}")
    return int(sizes[0])


def _peers(onnx: Path | None, against: str | None) -> list[Engine]:
    """The peer asked for, or all that are installed."""
    if onnx is None:
        return []
    names = [against] if against else [name for name in PEER_ENGINES if is_installed(name)]
    if not names:
        raise InvalidInput(
            f"--onnx: none of {', '.join(PEER_ENGINES)} is installed; "
            "pip install 'sparsec[bench]', or leave --onnx out"
        )
    return [PEER_ENGINES[name](onnx) for name in names]


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
    layout = row.pop("layout")
    return {**layout, **row, "samples_per_s_per_core": m.samples_per_s / _cores(m.layout)}


def _cores(layout: Layout) -> int:
    return layout.instances * layout.threads


def _layout_text(layout: Layout) -> str:
    return f"{layout.instances} x {layout.threads} threads, batch {layout.batch}"


def print_throughput(result: dict[str, Any]) -> None:
    """The result as a table on standard output, and a line for each engine that missed."""
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
        numbers = [str(best[k]) for k in LAYOUT_KEYS]
        rates = [f"{best[k]:.0f}" for k in ("samples_per_s", "samples_per_s_per_core")]
        times = [f"{best[k]:.3f}" for k in ("p50_ms", "p99_ms")]
        table.add_row(name, *numbers, *rates, *times, str(best["calls"]))
        if not engine["met"]:
            layout = _layout_text(Layout(*(best[k] for k in LAYOUT_KEYS)))
            missed.append(
                f"{name}: nothing keeps the limit of {limit:g} ms; the closest found is "
                f"{layout}: p99 {times[1]} ms, {rates[0]} samples/s"
            )
    console().print(table)
    print("\n".join(missed), end="\n" if missed else "")
    if result["load_before"] >= 1:
        print(
            f"The load of the machine was {result['load_before']:.1f} before this began. Pinned "
            "threads can not make way for others: measure on an idle machine."
        )
    if result["ratio"] is not None:
        print(f"{result['ratio']:.2f}x the throughput of the best peer")
