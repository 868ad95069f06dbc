"""How near the heuristic and the tuner come to the best schedule that there is.

    python benchmarks/bench_tuner.py [--workloads 20] [--rounds 3] [--json FILE]

Every schedule of each workload is measured, in a child process, in turns with the heuristic's,
some rounds of all. Then the search is replayed over those times: what it has found after a tenth
of the trials, and at its end. Ratios are times by the best schedule's: 1 is the best.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from rich.table import Table

from sparsec.ir.schedule import Schedule
from sparsec.models.build import build_file
from sparsec.models.registry import find_model
from sparsec.models.weights import Pruning
from sparsec.options import Calibration, CompileOptions
from sparsec.stages import scheduled_graph
from sparsec.target import Target
from sparsec.tools.console import console, progress
from sparsec.tools.tune import TuneOptions, jobs_of
from sparsec.tuning.harness import build_harness
from sparsec.tuning.record import Outcome, Trial
from sparsec.tuning.search import Budget, search
from sparsec.tuning.tuner import Job, open_measurer

MODELS = ("bert-mini", "distilbert")
BLOCKS = ((4, 1), (16, 1), (32, 1))
SPARSITY = 0.8
TOKENS = (32, 128, 384)
SEED = 5


@dataclass(frozen=True, slots=True)
class Found:
    """A workload: ratios to the best schedule, trials, and the mean cost of one."""

    name: str
    schedules: int
    heuristic: float
    after_tenth: float
    tuned: float
    trials: int
    seconds_per_trial: float


def jobs(folder: Path) -> list[Job]:
    """Of all models, blocks and token counts."""
    target, found = Target.host(), []
    for name in MODELS:
        for rows, cols in BLOCKS:
            path = folder / f"{name}-{rows}x{cols}.onnx"
            build_file(find_model(name), path, pruning=Pruning(SPARSITY, rows, cols))
            options = CompileOptions(
                target=target, precision="int8", calibration=Calibration(random=True),
                keep_padding=True,
            )  # fmt: skip
            graph = scheduled_graph(path, options)
            found += jobs_of(graph, target, TuneOptions(folder / "log", TOKENS))
            path.unlink()
    products = [job for job in found if job.task.workload.op == "linear_int8"]
    return list({str(job.task): job for job in products}.values())


def exhaust(job: Job, rounds: int, harness: Path) -> tuple[dict[Schedule, float], float]:
    """The median ratio of every schedule to the heuristic's, and the mean seconds of a trial."""
    ratios: dict[Schedule, list[float]] = {s: [] for s in job.schedules}
    spent: list[float] = []
    with open_measurer(job, Target.host(), harness.parent, harness) as measurer:
        measurer.measure(job.schedules[0])
        for _ in range(rounds):
            for schedule in job.schedules:
                start = time.perf_counter()
                ratios[schedule].append(measurer.measure(schedule).ratio)
                spent.append(time.perf_counter() - start)
    return {s: median(values) for s, values in ratios.items()}, float(np.mean(spent))


def replay(schedules: Sequence[Schedule], ratios: dict[Schedule, float], trials: int) -> float:
    """What the search finds in so many trials."""

    def look_up(schedule: Schedule) -> Trial:
        return known[schedule]

    known = {s: _trial(s, r) for s, r in ratios.items()}
    return min(t.ratio for t in search(schedules, look_up, Budget(trials=trials)))


def _trial(schedule: Schedule, ratio: float) -> Trial:
    if ratio == float("inf"):
        return Trial(schedule, Outcome.REFUSED)
    return Trial(schedule, Outcome.OK, (ratio,), (1.0,))


def measure(job: Job, rounds: int, harness: Path) -> Found:
    ratios, seconds = exhaust(job, rounds, harness)
    best, count = min(ratios.values()), len(ratios)
    return Found(
        name=str(job.task),
        schedules=count,
        heuristic=ratios[job.schedules[0]] / best,
        after_tenth=replay(job.schedules, ratios, -(-count // 10)) / best,
        tuned=replay(job.schedules, ratios, count) / best,
        trials=count,
        seconds_per_trial=seconds,
    )


def print_table(found: Sequence[Found]) -> dict[str, Any]:
    table = Table(title="times by the best schedule's (1 is the best)")
    for name in ("workload", "schedules", "heuristic", "after 10 %", "tuned", "ms per trial"):
        table.add_column(name, overflow="fold")
    for f in found:
        table.add_row(f.name, str(f.schedules), f"{f.heuristic:.3f}", f"{f.after_tenth:.3f}",
                      f"{f.tuned:.3f}", f"{1e3 * f.seconds_per_trial:.0f}")  # fmt: skip
    console().print(table)
    means = {n: geometric_mean(getattr(f, n) for f in found)
             for n in ("heuristic", "after_tenth", "tuned")}  # fmt: skip
    means["seconds_per_trial"] = float(np.mean([f.seconds_per_trial for f in found]))
    print(
        f"geometric means: heuristic {means['heuristic']:.3f}, after a tenth of the trials "
        f"{means['after_tenth']:.3f}, tuned {means['tuned']:.3f}; "
        f"{1e3 * means['seconds_per_trial']:.0f} ms per trial"
    )
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, progress(quiet=False) as tell:
        folder = Path(name)
        tell("compiling models")
        every = jobs(folder)
        order = np.random.default_rng(SEED).permutation(len(every))[: options.workloads]
        harness = build_harness(folder)
        found = []
        for count, index in enumerate(order):
            tell(f"{count + 1}/{len(order)} {every[index].task}")
            found.append(measure(every[index], options.rounds, harness))
    means = print_table(found)
    if options.json:
        rows = [{n: getattr(f, n) for n in Found.__slots__} for f in found]
        options.json.write_text(json.dumps({"means": means, "workloads": rows}, indent=1))


if __name__ == "__main__":
    main()
