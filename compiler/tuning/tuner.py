"""Finds the best schedules of many tasks within a budget, and writes all it learns to a log."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsec import __version__
from sparsec.codegen import tir
from sparsec.codegen.kernels.revision import revision
from sparsec.errors import CompilerError
from sparsec.ir.schedule import Schedule
from sparsec.target import Target
from sparsec.tuning.harness import build_harness
from sparsec.tuning.log import Query, TuningLog, append
from sparsec.tuning.measure import Measurer
from sparsec.tuning.record import Machine, Trial, TuningRecord
from sparsec.tuning.search import Budget, search
from sparsec.tuning.task import Task
from sparsec.tuning.workbench import Workbench

CONFIRMED = 2  # of the best schedules: one lucky trial is no proof
CONFIRMATIONS = 2


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


@dataclass(frozen=True, slots=True)
class Tuner:
    """Appends every trial to the log at `path` as it ends: a run that is killed goes on there."""

    target: Target
    path: Path
    log: TuningLog
    budget: Budget
    tell: Tell = lambda number, task, trial, share: None

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Each job may use its part of what the jobs before have left of the budget."""
        with tempfile.TemporaryDirectory(prefix="sparsec-tune-") as folder:
            harness = build_harness(Path(folder))
            results = []
            for number, job in enumerate(jobs):
                self.tell(number, job.task, None, self.budget.share_used)
                budget = self.budget.part(len(jobs) - number)
                results.append(self._tune(number, job, budget, harness))
            return results

    def _tune(self, number: int, job: Job, budget: Budget, harness: Path) -> Result:
        query = self._query(job.task)
        known = [record.trial for record in self.log.exact(query, failures=True)]
        make = functools.partial(
            Workbench, job.task, self.target, job.schedules[0], harness=harness
        )
        count = 0
        try:
            with Measurer(make, job.task.threads) as measurer:
                for trial in search(job.schedules, measurer.measure, budget, known=known):
                    count += 1
                    self._keep(number, job.task, trial)
                if count:
                    self._confirm(number, job.task, measurer)
        except CompilerError as error:
            return Result(job.task, None, 1.0, count, str(error))
        finally:
            self.budget.spend(count)
        best = self.log.best(query)
        return Result(job.task, best and best[0], best[1] if best else 1.0, count)

    def _confirm(self, number: int, task: Task, measurer: Measurer) -> None:
        for schedule in self.log.ranking(self._query(task))[:CONFIRMED]:
            for _ in range(CONFIRMATIONS):
                self._keep(number, task, measurer.measure(schedule))

    def _keep(self, number: int, task: Task, trial: Trial) -> None:
        record = record_of(task, self.target, trial)
        append(self.path, [record])
        self.log.add(record)
        self.tell(number, task, trial, self.budget.share_used)

    def _query(self, task: Task) -> Query:
        return query_of(task, self.target)


def query_of(task: Task, target: Target) -> Query:
    """What the log is asked for a task."""
    code = revision(task.workload.op) or ""
    return Query(task.workload, task.tokens, task.threads, Machine.of(target), code)


def record_of(task: Task, target: Target, trial: Trial) -> TuningRecord:
    """The trial as the log keeps it."""
    return TuningRecord(
        workload=task.workload,
        tokens=task.tokens,
        threads=task.threads,
        machine=Machine.of(target),
        schedule=trial.schedule,
        revision=revision(task.workload.op) or "",
        versions=(("sparsec", __version__), ("tvm", tir.VERSION)),
        outcome=trial.outcome,
        seconds=trial.seconds,
        baseline_seconds=trial.baseline_seconds,
        note=trial.note,
    )
