"""Engines that need a Python of their own: each runs in a worker and times itself there.

The protocol is described in workers/protocol.py.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "workers"
Answer = dict[str, Any]
WAIT_SECONDS = 600.0  # for an answer that is not a turn
WAIT_PER_TURN_SECONDS = 120.0  # besides the length of the turn: its runs are at least three
TOLD_CHARACTERS = 400  # of the last that a dead worker wrote


class WorkerFailed(Exception):
    """The worker said what is wrong, died, or does not answer."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A script of the folder, and the interpreter that has its engine."""

    python: Path
    script: str  # or a path


class Remote:
    """An engine in a worker, which its first request starts on `cpus`: None for all of the caller.

    `failure` says what went wrong; from then on it takes no time in its turns, so that the engines
    beside it can go on.
    """

    def __init__(self, worker: Worker, cpus: Sequence[int] | None = None) -> None:
        self.failure: str | None = None
        self._worker = worker
        self._cpus = cpus
        self._process: subprocess.Popen[str] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)

    def load(self, **arguments: Any) -> None:
        """Have it load a model; its `failure` is None when it has."""
        self._attempt("load", WAIT_SECONDS, arguments)

    def turn(self, seconds: float) -> list[float]:
        """See sparsec.tools.turns.Timed; empty when it fails or has failed."""
        wait_seconds = seconds + WAIT_PER_TURN_SECONDS
        answer = self._attempt("turn", wait_seconds, {"seconds": seconds})
        taken: list[float] = answer.get("seconds", [])
        return taken

    def _attempt(self, name: str, wait_seconds: float, arguments: dict[str, Any]) -> Answer:
        if self.failure is None:
            try:
                return self.ask(name, wait_seconds=wait_seconds, **arguments)
            except WorkerFailed as error:
                self.failure = str(error)
        return {}

    def ask(self, name: str, *, wait_seconds: float = WAIT_SECONDS, **arguments: Any) -> Answer:
        """The answer to a request; raises WorkerFailed."""
        self.send(name, **arguments)
        return self.receive(name, wait_seconds)

    def send(self, name: str, **arguments: Any) -> None:
        """Begin a request, whose answer is to be received before the next; raises WorkerFailed."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({name: arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(self._last_words(process)) from None

    def receive(self, name: str, wait_seconds: float) -> Answer:
        """The answer to the request that was sent; raises WorkerFailed."""
        process = self._started()
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], wait_seconds)[0]:
            raise WorkerFailed(f"no answer to {name!r} within {wait_seconds:g} s")
        line = process.stdout.readline()  # answers are written whole
        if not line:
            raise WorkerFailed(self._last_words(process))
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End the worker, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._said.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            before = os.sched_getaffinity(0)
            try:
                if self._cpus is not None:
                    os.sched_setaffinity(0, self._cpus)  # of this thread; the worker inherits it
                self._process = subprocess.Popen(
                    [self._worker.python, FOLDER / self._worker.script],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._said,
                    text=True,
                )
            except OSError as error:
                raise WorkerFailed(f"{self._worker.python}: {error.strerror}") from None
            finally:
                os.sched_setaffinity(0, before)
        return self._process

    def _last_words(self, process: subprocess.Popen[str]) -> str:
        status = process.wait()
        self._said.seek(0)
        text = self._said.read().decode(errors="replace").strip()[-TOLD_CHARACTERS:]
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"the worker ended with {how}; its last words: {text or 'none'}"


def ask_all(
    remotes: Sequence[Remote], name: str, *, wait_seconds: float = WAIT_SECONDS, **arguments: Any
) -> list[Answer]:
    """The answers to a request that all work on at the same time; raises WorkerFailed.

    After that none of them is to be asked again: answers may be waiting.
    """
    for remote in remotes:
        remote.send(name, **arguments)
    return [remote.receive(name, wait_seconds) for remote in remotes]
