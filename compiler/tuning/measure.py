"""Measures candidates in a child process: a crash or a hang costs one of them.

The child is forked, so that it starts with the compiler loaded. It keeps what it has built; when it
dies or is late it is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Protocol

from sparsec import __version__
from sparsec.codegen import tir
from sparsec.codegen.kernels.revision import revision
from sparsec.errors import CompilerError
from sparsec.ir.schedule import Schedule
from sparsec.target import Target
from sparsec.tuning.record import Machine, Outcome, TuningRecord
from sparsec.tuning.task import Task
from sparsec.tuning.workbench import Workbench, WrongResult

START_SECONDS = 60.0  # to build the harness, the oracle's result and the baseline
TRIAL_SECONDS = 20.0

_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Trial:
    """How one candidate did; a failure has a note instead of times."""

    schedule: Schedule
    outcome: Outcome
    seconds: tuple[float, ...] = ()
    baseline_seconds: tuple[float, ...] = ()
    note: str = ""


class Bench(Protocol):
    """What a child works with: `Workbench`, or a test's."""

    def time(self, schedule: Schedule) -> tuple[tuple[float, ...], tuple[float, ...]]: ...


class MakeBench(Protocol):
    def __call__(
        self, task: Task, target: Target, baseline: Schedule, folder: Path
    ) -> Bench: ...


class Measurer:
    """Trials of one task. Use it in a `with` statement: it ends the child.

    `make` and the time limits are for tests.
    """

    def __init__(
        self,
        task: Task,
        target: Target,
        baseline: Schedule,
        *,
        make: MakeBench = Workbench,
        trial_seconds: float = TRIAL_SECONDS,
    ):
        self._task, self._target, self._baseline = task, target, baseline
        self._make, self._trial_seconds = make, trial_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="sparsec-tune-")
        self._child: _Child | None = None

    def __enter__(self) -> Measurer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        self._folder.cleanup()

    def measure(self, schedule: Schedule) -> Trial:
        """Raises CompilerError when the task itself cannot be set up."""
        child = self._started()
        child.send(schedule)
        answer = child.answer(self._trial_seconds)
        if isinstance(answer, Trial):
            return answer
        self._stop()
        return Trial(schedule, *answer)

    def _started(self) -> _Child:
        if self._child is None:
            child = _Child(self._task, self._target, self._baseline, self._make, self._folder.name)
            ready = child.answer(START_SECONDS)
            if not isinstance(ready, Trial) or ready.outcome is not Outcome.OK:
                note = ready.note if isinstance(ready, Trial) else " ".join(map(str, ready))
                child.kill()
                raise CompilerError(f"{self._task}: the heuristic's schedule fails: {note}")
            self._child = child
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class _Child:
    """A forked process and the pipe to it."""

    def __init__(
        self, task: Task, target: Target, baseline: Schedule, make: MakeBench, folder: str
    ):
        self._pipe, other = _FORK.Pipe()
        arguments = (other, task, target, baseline, make, folder)
        self._process = _FORK.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def send(self, schedule: Schedule) -> None:
        self._pipe.send(schedule)

    def answer(self, seconds: float) -> Trial | tuple[Outcome, tuple[()], tuple[()], str]:
        """A trial, or how the child failed to give one."""
        try:
            if not self._pipe.poll(seconds):
                return Outcome.TIMED_OUT, (), (), f"no answer in {seconds:g} s"
            trial = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return Outcome.CRASHED, (), (), _cause(self._process.exitcode)
        assert isinstance(trial, Trial)
        return trial

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _cause(status: int | None) -> str:
    if status is not None and status < 0:
        return signal.Signals(-status).name
    return f"the process ended with status {status}"


def _work(
    pipe: Connection,
    task: Task,
    target: Target,
    baseline: Schedule,
    make: MakeBench,
    folder: str,
) -> None:
    """The child: first an answer for the baseline, then one for each schedule that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    if task.threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        own = Path(tempfile.mkdtemp(dir=folder))
        bench = make(task=task, target=target, baseline=baseline, folder=own)
    except CompilerError as error:
        pipe.send(Trial(baseline, Outcome.REFUSED, note=str(error)))
        return
    pipe.send(Trial(baseline, Outcome.OK))
    while True:
        try:
            schedule = pipe.recv()
        except EOFError:
            return
        pipe.send(_trial(bench, schedule))


def _trial(bench: Bench, schedule: Schedule) -> Trial:
    try:
        seconds, baseline = bench.time(schedule)
    except WrongResult as error:
        return Trial(schedule, Outcome.WRONG, note=str(error))
    except Exception as error:  # whatever code generation meets costs this candidate only
        return Trial(schedule, Outcome.REFUSED, note=f"{type(error).__name__}: {error}")
    return Trial(schedule, Outcome.OK, seconds, baseline)


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


def measure_all(task: Task, target: Target, schedules: Sequence[Schedule]) -> list[TuningRecord]:
    """One record for each schedule; the first one is the baseline."""
    with Measurer(task, target, schedules[0]) as measurer:
        return [record_of(task, target, measurer.measure(s)) for s in schedules]
