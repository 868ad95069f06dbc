"""Finds the best schedules of many tasks within a budget, and writes all it learns to a log."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from sparsec import __version__
from sparsec.codegen import tir
from sparsec.codegen.kernels.revision import revision
from sparsec.errors import CompilerError
from sparsec.ir.schedule import Schedule
from sparsec.target import Target
from sparsec.tuning.harness import build_harness
from sparsec.tuning.log import LogNotWritten, Query, TuningLog, append
from sparsec.tuning.measure import Measurer, Measuring, work_folder
from sparsec.tuning.record import Machine, Trial, TuningRecord
from sparsec.tuning.search import Budget, search
from sparsec.tuning.task import Task
from sparsec.tuning.workbench import Workbench

CONFIRMED = 2  # of the best schedules: one lucky trial is no proof
TRIALS_OF_CONFIRMED = 3


@dataclass(frozen=True, slots=True)
class Job:
    """A task with its candidates, the heuristic's choice first."""

    task: Task
    schedules: Sequence[Schedule]


@dataclass(frozen=True, slots=True)
class Result:
    """The best schedule of a task: `ratio` is its time as a multiple of the heuristic's.

    `note` says why there is none.
    """

    task: Task
    best: Schedule | None
    ratio: float
    trials: int
    note: str = ""


Tell = Callable[[int, Task, Trial | None, float], None]  # job number, task, trial, share of budget
Open = Callable[[], AbstractContextManager[Measuring]]


@dataclass(frozen=True, slots=True)
class Tuner:
    """Tunes for `machine`, one job at a time or several in threads.

    Every trial is appended to the log at `path` as it ends: a run that is killed goes on there.
    """

    machine: Machine
    path: Path
    log: TuningLog
    budget: Budget
    tell: Tell = lambda number, task, trial, share: None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def run(self, jobs: Sequence[Job], target: Target) -> list[Result]:
        """Tune on this machine, which is `target`.

        Each job may use its part of what the jobs before have left of the budget.
        """
        with work_folder() as folder:
            harness = build_harness(folder)
            results = []
            for number, job in enumerate(jobs):
                open = functools.partial(open_measurer, job, target, folder, harness)
                part = self.budget.part(len(jobs) - number)
                results.append(self.tune(number, job, part, open))
            return results

    def tune(self, number: int, job: Job, budget: Budget, open: Open) -> Result:
        """One job, with what `open` gives to measure it."""
        query = self._query(job.task)
        known = [record.trial for record in self.log.exact(query, failures=True)]
        self.tell(number, job.task, None, self.budget.share_used)
        count = 0
        try:
            with open() as measurer:
                for trial in search(job.schedules, measurer.measure, budget, known=known):
                    count += 1
                    self._keep(number, job.task, trial)
                if count or not budget.is_spent:
                    self._confirm(number, job.task, measurer)
        except LogNotWritten:
            raise
        except CompilerError as error:
            return Result(job.task, None, 1.0, count, str(error))
        finally:
            with self.lock:
                self.budget.spend(count)
        best = self.log.best(query)
        return Result(job.task, best and best[0], best[1] if best else 1.0, count)

    def _confirm(self, number: int, task: Task, measurer: Measuring) -> None:
        """Measure until each of the fastest schedules has enough trials."""
        query = self._query(task)
        while True:
            tried = [r.schedule for r in self.log.exact(query, failures=True)]
            few = [s for s in self.log.ranking(query)[:CONFIRMED]
                   if tried.count(s) < TRIALS_OF_CONFIRMED]  # fmt: skip
            if not few:
                return
            self._keep(number, task, measurer.measure(few[0]))

    def _keep(self, number: int, task: Task, trial: Trial) -> None:
        record = record_of(task, self.machine, trial)
        with self.lock:
            append(self.path, [record])
            self.log.add(record)
            self.tell(number, task, trial, self.budget.share_used)

    def _query(self, task: Task) -> Query:
        code = revision(task.workload.op) or ""
        return Query(task.workload, task.tokens, task.threads, self.machine, code)


def open_measurer(job: Job, target: Target, folder: Path, harness: Path) -> Measurer:
    """Measures the job's schedules on this machine, against the heuristic's."""
    make = functools.partial(Workbench, job.task, target, job.schedules[0], harness=harness)
    return Measurer(make, folder, job.task.threads)


def record_of(task: Task, machine: Machine, trial: Trial) -> TuningRecord:
    """The trial as the log keeps it."""
    return TuningRecord(
        workload=task.workload,
        tokens=task.tokens,
        threads=task.threads,
        machine=machine,
        schedule=trial.schedule,
        revision=revision(task.workload.op) or "",
        versions=(("sparsec", __version__), ("tvm", tir.VERSION)),
        outcome=trial.outcome,
        seconds=trial.seconds,
        baseline_seconds=trial.baseline_seconds,
        note=trial.note,
    )
