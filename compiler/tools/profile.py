"""Where the time of a compiled model goes: per kernel call, per op, and as a Chrome trace."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sparsec.ir.dims import evaluate, parse
from sparsec.ir.schedule import EVERY, Bucket
from sparsec.runtime import load
from sparsec.tools.console import console
from sparsec.tools.inputs import bind_symbols, random_inputs

WARM_UP_RUNS = 5


def profile(
    library: Path,
    *,
    batch: int,
    seq: int,
    threads: int,
    runs: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Median seconds of every step over `runs`, with what it computes.

    `gmacs` is the rate of useful multiply-accumulates in 1e9 per second: the work of zero blocks
    that are skipped does not count. Timing a step costs some tens of nanoseconds.
    """
    model = load(library, threads=threads)
    arrays = random_inputs(model, batch, seq, seed=0, padding=False)
    symbols = bind_symbols(model, batch, seq)
    for _ in range(WARM_UP_RUNS):
        model.run_timed(arrays)
    progress(f"profiling {batch}x{seq}")
    seconds = np.median([model.run_timed(arrays)[1] for _ in range(runs)], axis=0)
    steps = [
        _step(step, float(time), symbols)
        for step, time in zip(model.description["steps"], seconds, strict=True)
        if _is_made(step, symbols)
    ]
    return {
        "model": str(library),
        "batch": batch,
        "seq": seq,
        "threads": threads,
        "seconds": sum(step["seconds"] for step in steps),
        "steps": steps,
        "ops": _by_op(steps),
    }


def _is_made(step: dict[str, Any], symbols: dict[str, int]) -> bool:
    """Whether the number of tokens is in the bucket of this call."""
    bucket = Bucket(step["above"], step["most"])
    return bucket == EVERY or evaluate(parse(str(step["tokens"])), symbols) in bucket


def _step(step: dict[str, Any], seconds: float, symbols: dict[str, int]) -> dict[str, Any]:
    macs = evaluate(parse(str(step["macs"])), symbols)
    return {
        "node": step["node"] or step["comment"],
        "op": step["op"],
        "kernel": step["kernel"],
        "schedule": step["schedule"],
        "seconds": seconds,
        "macs": macs,
        "gmacs": macs / seconds / 1e9 if seconds else 0.0,
    }


def _by_op(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of each op together, most time first."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for step in steps:
        groups[step["op"]].append(step)
    rows = [
        {
            "op": op,
            "calls": len(group),
            "seconds": sum(s["seconds"] for s in group),
            "macs": sum(s["macs"] for s in group),
        }
        for op, group in groups.items()
    ]
    for row in rows:
        row["gmacs"] = row["macs"] / row["seconds"] / 1e9 if row["seconds"] else 0.0
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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"traceEvents": events}))
    temporary.replace(path)


def print_profile(result: dict[str, Any], *, all_steps: bool) -> None:
    """The result as tables on standard output."""
    out = console()
    shape = f"{result['batch']}x{result['seq']}, {result['threads']} thread(s)"
    rows, first = result["ops"], "op"
    if all_steps:
        rows, first = result["steps"], "node"
    table = Table(title=f"{result['model']}, {shape}: {result['seconds'] * 1e3:.3f} ms")
    for column in (first, "ms", "share", "GMAC/s", "calls" if first == "op" else "kernel"):
        table.add_column(column)
    for row in rows:
        share = row["seconds"] / result["seconds"]
        rate = f"{row['gmacs']:.1f}" if row["macs"] else ""
        last = str(row["calls"]) if first == "op" else row["kernel"]
        table.add_row(row[first], f"{row['seconds'] * 1e3:.4f}", f"{share:.1%}", rate, last)
    out.print(table)
