"""Times a compiled model, interleaved with a peer so that a noisy machine hits both alike."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsec.errors import InvalidInput
from sparsec.runtime import load
from sparsec.target import core_cpus
from sparsec.tools.console import console
from sparsec.tools.inputs import Arrays, random_inputs, run_shape
from sparsec.tools.inspect import arena_text
from sparsec.tools.peers import PEERS
from sparsec.tools.turns import Function, in_turns, summary


def bench(
    library: Path,
    *,
    batch: int | None,
    seq: int | None,
    threads: int,
    onnx: Path | None,
    against: str | None,
    seconds: float,
    pin: bool,
    progress: Callable[[str], None],
    isa: str | None = None,
) -> dict[str, Any]:
    """Median, p10 and p90 of the latency in ms, over `seconds` per engine, at least 20 runs.

    `batch` and `seq` are as `run_shape` says. With `onnx` the peer runs the same inputs in turn;
    `ratio` is the peer's median over ours. With `pin` the process is bound to the first `threads`
    cores while it measures.
    """
    if against is not None and onnx is None:
        raise InvalidInput(f"--against {against} needs the ONNX file: add --onnx FILE")
    with _pinned(threads) if pin else contextlib.nullcontext():
        model = load(library, threads=threads, isa=isa)
        batch, seq = run_shape(model, batch, seq)
        arrays = random_inputs(model, batch, seq, seed=0, padding=False)
        sides: dict[str, Callable[[Arrays], Any]] = {"sparsec": model}
        if onnx is not None:
            progress("loading the peer")
            name, peer = PEERS[against or "onnxruntime"](onnx, threads)
            sides[name] = peer
        progress(f"measuring {batch}x{seq}")
        engines = [Function(partial(run, arrays), time.perf_counter) for run in sides.values()]
        taken = in_turns(engines, seconds)
        times = dict(zip(sides, taken, strict=True))
    result = _result(library, batch, seq, threads, times)
    return {**result, "target": model.target, "arena": model.description["arena"]}


def _result(
    library: Path, batch: int, seq: int, threads: int, times: dict[str, list[float]]
) -> dict[str, Any]:
    figures = {name: summary(values) for name, values in times.items()}
    ours, *peers = figures.values()
    ratio = peers[0]["median_ms"] / ours["median_ms"] if peers else None
    return {
        "model": str(library),
        "batch": batch,
        "seq": seq,
        "threads": threads,
        "engines": figures,
        "ratio": ratio,
    }


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[None]:
    before, cpus = os.sched_getaffinity(0), core_cpus()
    if threads > len(cpus):
        raise InvalidInput(f"--threads {threads}: this process may use {len(cpus)} cores only")
    os.sched_setaffinity(0, cpus[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def print_bench(result: dict[str, Any]) -> None:
    """The result as a table on standard output."""
    shape = f"{result['batch']}x{result['seq']}"
    table = Table(title=f"{result['model']}, {shape}, {result['threads']} thread(s), ms")
    for column in ("engine", "median", "p10", "p90", "runs"):
        table.add_column(column)
    for name, f in result["engines"].items():
        row = [f"{f[k]:.3f}" for k in ("median_ms", "p10_ms", "p90_ms")]
        table.add_row(name, *row, str(f["runs"]))
    console().print(table)
    print(arena_text(result["arena"]))
    if result["ratio"] is not None:
        print(f"{result['ratio']:.2f}x the speed of the peer")
