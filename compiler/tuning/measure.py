"""Measures candidates in a child process: a crash or a hang costs one of them.

The child is forked, so that it starts with the compiler loaded. It keeps what it has built; when
it dies or is late it is replaced. A child whose parent has died removes the files and ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Protocol

from sparsec.errors import CompilerError
from sparsec.ir.schedule import Schedule
from sparsec.tuning.record import Outcome, Trial
from sparsec.tuning.workbench import WrongResult

START_SECONDS = 120.0  # for the oracle's result and the baseline
TRIAL_SECONDS = 20.0

_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Ready:
    """What a child says when it can start."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a child gave no trial."""

    outcome: Outcome
    note: str


class Bench(Protocol):
    """What a child works with: a Workbench, or a test's."""

    def time(self, schedule: Schedule) -> tuple[tuple[float, ...], tuple[float, ...]]: ...


class Measuring(Protocol):
    """Whatever gives trials of one task: a Measurer, or its like on another machine."""

    def measure(self, schedule: Schedule) -> Trial: ...


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """For what is built while tuning."""
    with tempfile.TemporaryDirectory(prefix="sparsec-tune-") as folder:
        yield Path(folder)


class Measurer:
    """Trials of one task. Use it in a `with` statement: it ends the child.

    `make` builds the bench in the child, in a new folder inside `folder`, which is the caller's to
    remove.
    """

    def __init__(
        self,
        make: Callable[[Path], Bench],
        folder: Path,
        threads: int,
        trial_seconds: float = TRIAL_SECONDS,
    ):
        self._make, self._folder = make, folder
        self._threads, self._trial_seconds = threads, trial_seconds
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

    def measure(self, schedule: Schedule) -> Trial:
        """Raises CompilerError when the task itself cannot be set up."""
        child = self._started()
        child.send(schedule)
        answer = child.answer(self._trial_seconds)
        if isinstance(answer, Trial):
            return answer
        self._stop()
        assert isinstance(answer, Failure)
        return Trial(schedule, answer.outcome, note=answer.note)

    def _started(self) -> _Child:
        if self._child is None:
            child = _Child(self._make, self._folder, self._threads)
            ready = child.answer(START_SECONDS)
            if isinstance(ready, Failure):
                child.kill()
                raise CompilerError(f"the heuristic's schedule fails: {ready.note}")
            self._child = child
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class _Child:
    """A forked process and the pipe to it."""

    def __init__(self, make: Callable[[Path], Bench], folder: Path, threads: int):
        self._pipe, other = _FORK.Pipe()
        self._process = _FORK.Process(
            target=_work, args=(other, self._pipe, make, folder, threads), daemon=True
        )
        self._process.start()
        other.close()

    def send(self, schedule: Schedule) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer will say that the child is gone
            self._pipe.send(schedule)

    def answer(self, seconds: float) -> Ready | Trial | Failure:
        try:
            if not self._pipe.poll(seconds):
                return Failure(Outcome.TIMED_OUT, f"no answer in {seconds:g} s")
            answer: Ready | Trial | Failure = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return Failure(Outcome.CRASHED, _cause(self._process.exitcode))
        return answer

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
    parents_end: Connection,
    make: Callable[[Path], Bench],
    folder: Path,
    threads: int,
) -> None:
    """The child: first whether it is ready, then one answer for each schedule that comes."""
    parents_end.close()  # or the pipe would never end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    if threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        try:
            bench = make(Path(tempfile.mkdtemp(dir=folder)))
        except (CompilerError, OSError) as error:  # as when the folder allows no code
            pipe.send(Failure(Outcome.REFUSED, str(error)))
            return
        pipe.send(Ready())
        while True:
            pipe.send(_trial(bench, pipe.recv()))
    except (EOFError, ConnectionError):  # the parent was killed and cannot clean up
        shutil.rmtree(folder, ignore_errors=True)


def _trial(bench: Bench, schedule: Schedule) -> Trial:
    try:
        seconds, baseline = bench.time(schedule)
    except WrongResult as error:
        return Trial(schedule, Outcome.WRONG, note=str(error))
    except Exception as error:  # whatever code generation meets costs this candidate only
        return Trial(schedule, Outcome.REFUSED, note=f"{type(error).__name__}: {error}")
    return Trial(schedule, Outcome.OK, seconds, baseline)
