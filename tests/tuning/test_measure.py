"""Trials in a child process: whatever a candidate does costs that candidate only."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsec.errors import CompilerError
from sparsec.ir.schedule import Schedule
from sparsec.tuning.measure import Measurer
from sparsec.tuning.record import Outcome
from sparsec.tuning.workbench import WrongResult


@dataclass
class FakeBench:
    """Does what the schedule's family says."""

    folder: Path

    def time(self, schedule: Schedule) -> tuple[tuple[float, ...], tuple[float, ...]]:
        match schedule.family:
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "hang":
                time.sleep(600)
            case "wrong":
                raise WrongResult("off by 7")
            case "refuse":
                raise ValueError("no way")
        return (1.0, 2.0), (2.0, 2.0)


def refuse(folder: Path) -> FakeBench:
    raise CompilerError("the baseline is wrong")


@pytest.mark.parametrize(
    ("kind", "outcome", "note"),
    [
        ("crash", Outcome.CRASHED, "SIGSEGV"),
        ("exit", Outcome.CRASHED, "status 3"),
        ("hang", Outcome.TIMED_OUT, "no answer in 0.5 s"),
        ("wrong", Outcome.WRONG, "off by 7"),
        ("refuse", Outcome.REFUSED, "ValueError: no way"),
    ],
)
def test_a_bad_candidate_costs_one_trial(
    kind: str, outcome: Outcome, note: str, tmp_path: Path
) -> None:
    # Of the others none is slow, but a system that writes core files takes a while to end one.
    limit = 0.5 if kind == "hang" else 60.0
    with Measurer(FakeBench, tmp_path, threads=2, trial_seconds=limit) as measurer:
        before = measurer.measure(Schedule("good", "avx2"))
        bad = measurer.measure(Schedule(kind, "avx2"))
        after = measurer.measure(Schedule("good", "avx2"))
    assert before == after
    assert (before.outcome, before.seconds, before.ratio) == (Outcome.OK, (1.0, 2.0), 0.5)
    assert bad.outcome is outcome
    assert note in bad.note
    assert bad.ratio == float("inf")


def test_a_task_that_cannot_be_set_up_is_an_error(tmp_path: Path) -> None:
    with (
        Measurer(refuse, tmp_path, threads=1) as measurer,
        pytest.raises(CompilerError, match="heuristic's schedule fails: the baseline is wrong"),
    ):
        measurer.measure(Schedule("good", "avx2"))


def test_the_child_is_gone_afterwards(tmp_path: Path) -> None:
    with Measurer(FakeBench, tmp_path, threads=1) as measurer:
        measurer.measure(Schedule("good", "avx2"))
        child = measurer._child
        assert child is not None
    assert child._process.exitcode is not None
