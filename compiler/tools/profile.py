"""Where the time of a compiled model goes: per kernel call, per op, and as a Chrome trace."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sparsec.files import replacing
from sparsec.ir.dims import evaluate, parse
from sparsec.ir.schedule import EVERY, Bucket
from sparsec.rates import product_of
from sparsec.runtime import load
from sparsec.target import Target
from sparsec.tools.console import console
from sparsec.tools.inputs import bind_symbols, random_inputs, run_shape
from sparsec.tuning.rates_file import with_known_rates

WARM_UP_RUNS = 5


def profile(
    library: Path,
    *,
    batch: int | None,
    seq: int | None,
    threads: int,
    runs: int,
    rates: Path | None = None,
    progress: Callable[[str], None],
    isa: str | None = None,
) -> dict[str, Any]:
    """Median seconds of every step over `runs`, with what it computes.

    `gmacs` is the rate of useful multiply-accumulates in 1e9 per second: the work of zero blocks
    that are skipped does not count. Timing a step costs some tens of nanoseconds.

    `batch` and `seq` are as `run_shape` says. `rates` is the folder of what `sparsec calibrate`
    measured. With it, `of_peak` is the share of the time that the multiply-accumulates alone would
    take at the peak of the kernel's instruction set, `of_bandwidth` that of the bytes at the speed
    of the cache that holds them; else null.
    """
    model = load(library, threads=threads, isa=isa)
    batch, seq = run_shape(model, batch, seq)
    arrays = random_inputs(model, batch, seq, seed=0, padding=False)
    symbols = bind_symbols(model, batch, seq)
    for _ in range(WARM_UP_RUNS):
        model.run_timed(arrays)
    progress(f"profiling {batch}x{seq}")
    seconds = np.median([model.run_timed(arrays)[1] for _ in range(runs)], axis=0)
    target, calibration = with_known_rates(Target.host(), rates)
    steps = [
        _step(step, float(time), symbols, _Ideal(target, threads))
        for step, time in zip(model.description["steps"], seconds, strict=True)
        if _is_made(step, symbols)
    ]
    return {
        "model": str(library),
        "target": model.target,
        "batch": batch,
        "seq": seq,
        "threads": threads,
        "calibration": calibration,
        "seconds": sum(step["seconds"] for step in steps),
        "ops": [_with_shares(row) for row in _by_op(steps)],
        "steps": [_with_shares(row) for row in steps],
    }


def _is_made(step: dict[str, Any], symbols: dict[str, int]) -> bool:
    """Whether the number of tokens is in the bucket of this call."""
    bucket = Bucket(step["above"], step["most"])
    return bucket == EVERY or evaluate(parse(str(step["tokens"])), symbols) in bucket


@dataclass(frozen=True, slots=True)
class _Ideal:
    """The least times on this machine; None where it was not measured."""

    target: Target
    threads: int

    def peak_seconds(self, macs: int, op: str, isa: str) -> float | None:
        rates = self.target.rates
        if not rates.is_measured:
            return None
        return macs / (rates.peak(product_of(op, isa)) * self.threads)

    def move_seconds(self, nbytes: int) -> float | None:
        rates = self.target.rates
        if not rates.is_measured:
            return None
        bandwidth = rates.level_bandwidth(self.target.level_of(nbytes / self.threads))
        return nbytes / (bandwidth * self.threads)


def _step(
    step: dict[str, Any], seconds: float, symbols: dict[str, int], ideal: _Ideal
) -> dict[str, Any]:
    macs, nbytes = (evaluate(parse(str(step[key])), symbols) for key in ("macs", "bytes"))
    return {
        "node": step["node"] or step["comment"],
        "op": step["op"],
        "kernel": step["kernel"],
        "schedule": step["schedule"],
        "seconds": seconds,
        "macs": macs,
        "bytes": nbytes,
        "peak_seconds": ideal.peak_seconds(macs, step["op"], step["isa"]),
        "move_seconds": ideal.move_seconds(nbytes),
        **_rates(seconds, macs, nbytes),
    }


def _rates(seconds: float, macs: int, nbytes: int) -> dict[str, float]:
    if not seconds:
        return {"gmacs": 0.0, "gbytes": 0.0}
    return {"gmacs": macs / seconds / 1e9, "gbytes": nbytes / seconds / 1e9}


def _with_shares(row: dict[str, Any]) -> dict[str, Any]:
    """The row, with its ideal times as shares of its time."""
    for share, ideal in (("of_peak", "peak_seconds"), ("of_bandwidth", "move_seconds")):
        time = row.pop(ideal)
        row[share] = time / row["seconds"] if time is not None and row["seconds"] else None
    return row


def _by_op(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of each op together, most time first."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for step in steps:
        groups[step["op"]].append(step)
    rows = []
    for op, group in groups.items():
        row: dict[str, Any] = {"op": op, "calls": len(group)}
        for key in ("seconds", "macs", "bytes", "peak_seconds", "move_seconds"):
            values = [s[key] for s in group]
            row[key] = None if None in values else sum(values)
        rows.append({**row, **_rates(row["seconds"], row["macs"], row["bytes"])})
    return sorted(rows, key=lambda row: -row["seconds"])


def write_trace(result: dict[str, Any], path: Path) -> None:
    """One run as trace events, for chrome://tracing and Perfetto; times are the medians."""
    events, start_us = [], 0.0
    for step in result["steps"]:
        duration_us = step["seconds"] * 1e6
        events.append(
            {
                "name": step["node"],
                "cat": step["op"],
                "ph": "X",
                "ts": start_us,
                "dur": duration_us,
                "pid": 0,
                "tid": 0,
                "args": {"kernel": step["kernel"], "gmacs": round(step["gmacs"], 2)},
            }
        )
        start_us += duration_us
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"traceEvents": events}))


def print_profile(result: dict[str, Any], *, all_steps: bool) -> None:
    """The result as tables on standard output."""
    out = console()
    shape = f"{result['batch']}x{result['seq']}, {result['threads']} thread(s)"
    rows, first = result["ops"], "op"
    if all_steps:
        rows, first = result["steps"], "node"
    table = Table(title=f"{result['model']}, {shape}: {result['seconds'] * 1e3:.3f} ms")
    last = "calls" if first == "op" else "kernel"
    for column in (first, "ms", "share", "GMAC/s", "of peak", "GB/s", "of bandwidth", last):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row[first],
            f"{row['seconds'] * 1e3:.4f}",
            f"{row['seconds'] / result['seconds']:.1%}",
            f"{row['gmacs']:.1f}" if row["macs"] else "",
            _percent(row["of_peak"]) if row["macs"] else "",
            f"{row['gbytes']:.1f}",
            _percent(row["of_bandwidth"]),
            str(row[last]),
        )
    out.print(table)
    if rows and rows[0]["of_peak"] is None:
        out.print(f"no shares of peak and bandwidth: {result['calibration']}", highlight=False)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
