"""Tunes on several machines at once: a job at a time on each node.

Nodes with the same CPU share their jobs; each CPU has all jobs of its own, since what is best on
one says little for another. A node that is lost costs its running trial: the job goes back, and
whoever takes it goes on behind the trials that are in the log.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sparsec.target import Target
from sparsec.tuning.log import TuningLog
from sparsec.tuning.measure import Measuring
from sparsec.tuning.record import Machine
from sparsec.tuning.search import Budget
from sparsec.tuning.tuner import Job, Result, Tell, Tuner

POLL_SECONDS = 0.2  # so that Ctrl-C is heard


class NodeLost(Exception):
    """A node does not answer any more."""


class Node(Protocol):
    """A machine that measures; `machine` is what its records say of it."""

    @property
    def name(self) -> str: ...

    @property
    def machine(self) -> Machine: ...

    @property
    def target(self) -> Target: ...

    def open(self, job: Job) -> AbstractContextManager[Measuring]:
        """Where the job's schedules are measured. It, too, may raise NodeLost."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What came out: results of each machine's jobs, and a line for each node that was lost."""

    results: list[Result]
    lost: list[str]


def tune_on(
    nodes: Sequence[Node],
    jobs: Mapping[Machine, Sequence[Job]],
    path: Path,
    log: TuningLog,
    budget: Budget,
    tell: Tell = lambda number, task, trial, share: None,
) -> Outcomes:
    """Tune on all nodes, appending every trial to the log at `path` as it ends.

    `jobs` are those of each kind of machine that the nodes are of.
    """
    count, lock = sum(map(len, jobs.values())), threading.Lock()
    crews, first = [], 0
    for machine, own in jobs.items():
        tuner = Tuner(machine, path, log, budget.share(len(own), count), tell, lock)
        group = [node for node in nodes if node.machine == machine]
        crews.append(_Crew(tuner, group, first, deque(enumerate(own))))
        first += len(own)
    _run([thread for crew in crews for thread in crew.threads()])
    for crew in crews:
        if crew.errors:
            raise crew.errors[0]
    results = [r for crew, own in zip(crews, jobs.values(), strict=True) for r in crew.all(own)]
    return Outcomes(results, [line for crew in crews for line in crew.lost])


def _run(threads: Iterable[threading.Thread]) -> None:
    running = list(threads)
    for thread in running:
        thread.start()
    while running:
        running[0].join(POLL_SECONDS)
        running = [thread for thread in running if thread.is_alive()]


@dataclass
class _Crew:
    """Nodes of one kind and the jobs that they share; `first` is the number of the first job."""

    tuner: Tuner
    nodes: Sequence[Node]
    first: int
    waiting: deque[tuple[int, Job]]
    running: int = 0
    results: dict[int, Result] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def threads(self) -> list[threading.Thread]:
        """One per node; they end with the process, so that Ctrl-C need not wait for a trial."""
        return [threading.Thread(target=self._work, args=(node,), daemon=True)
                for node in self.nodes]  # fmt: skip

    def all(self, jobs: Sequence[Job]) -> list[Result]:
        """A result per job; those that nobody was left for say so."""
        note = f"no node with {self.tuner.machine.cpu} is left"
        return [self.results.get(number, Result(job.task, None, 1.0, 0, note))
                for number, job in enumerate(jobs)]  # fmt: skip

    def _work(self, node: Node) -> None:
        while (taken := self._take()) is not None:
            number, job, budget = taken
            try:
                open = functools.partial(node.open, job)
                self.results[number] = self.tuner.tune(self.first + number, job, budget, open)
            except NodeLost as error:
                self.waiting.appendleft((number, job))
                self.lost.append(f"{node.name} was lost: {error}")
                return
            except BaseException as error:  # the main thread raises it
                self.errors.append(error)
                return
            finally:
                with self.changed:
                    self.running -= 1
                    self.changed.notify_all()

    def _take(self) -> tuple[int, Job, Budget] | None:
        """The next job and its part of the budget; waits while another node may give one back."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or not self.running or self.errors)
            if not self.waiting or self.errors:
                return None
            part = self.tuner.budget.part(len(self.waiting) + self.running, len(self.nodes))
            self.running += 1
            return *self.waiting.popleft(), part
