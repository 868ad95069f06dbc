"""A tuner that is stopped in the middle: nothing that was measured is lost, and it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import onnx
import pytest

from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_spec
from sparsec.tuning.log import TuningLog
from sparsec.tuning.tuner import TRIALS_OF_CONFIRMED

PATIENCE_SECONDS = 300.0


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    model = tmp_path / "model.onnx"
    onnx.save(build_model(tiny_spec(layers=1), pruning=Pruning(0.8, 4, 1), seed=3), model)
    return [sys.executable, "-m", "sparsec", "tune", str(model), "--precision", "int8",
            "--tokens", "8", "--layers", "ffn|dense|linear", "-q", "--log"]  # fmt: skip


def start(command: list[str], log: Path, folder: Path) -> subprocess.Popen[str]:
    """The tuner with its temporary files in a folder of its own.

    It hears Ctrl-C even where the tests do not: shells start background jobs that ignore it.
    """
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen(
        [*command, str(log)], env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(what: str, condition: object) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.02)


def stop_in_the_middle(process: subprocess.Popen[str], log: Path, number: int) -> bytes:
    """Sends a signal after the first record; the log at that time."""
    wait_for("a first record", lambda: log.exists() and b"\n" in log.read_bytes())
    before = log.read_bytes()
    assert process.poll() is None
    process.send_signal(number)
    process.wait(PATIENCE_SECONDS)
    return before


def test_killed_it_goes_on_and_loses_nothing(command: list[str], tmp_path: Path) -> None:
    log, folder = tmp_path / "tuning.jsonl", tmp_path / "tmp"
    process = start(command, log, folder)
    before = stop_in_the_middle(process, log, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    wait_for("the child to clean up", lambda: not list(folder.glob("sparsec-tune-*")))
    kept = log.read_bytes()
    assert kept.startswith(before)

    again = start(command, log, tmp_path / "tmp2")
    _, errors = again.communicate(timeout=PATIENCE_SECONDS)
    assert (again.returncode, errors) == (0, "")
    whole = log.read_bytes()
    assert whole.startswith(kept)
    assert len(whole) > len(kept)
    assert not TuningLog.read(log).broken
    records = TuningLog.read(log).records
    trials = Counter((r.workload, r.schedule) for r in records)
    assert max(trials.values()) == TRIALS_OF_CONFIRMED
    assert len({r.workload for r in records}) > 1
    assert all(json.loads(line)["outcome"] == "ok" for line in whole.splitlines())


def test_interrupted_it_keeps_all_and_says_so(command: list[str], tmp_path: Path) -> None:
    log, folder = tmp_path / "tuning.jsonl", tmp_path / "tmp"
    process = start(command, log, folder)
    before = stop_in_the_middle(process, log, signal.SIGINT)
    assert process.returncode == 130
    assert process.stderr is not None
    assert process.stderr.read() == (
        f"sparsec: interrupted; every trial that ended is in {log}, "
        "and the same command goes on from there\n"
    )
    process.stderr.close()
    assert log.read_bytes().startswith(before)
    assert not TuningLog.read(log).broken
    assert not list(folder.glob("sparsec-tune-*"))
