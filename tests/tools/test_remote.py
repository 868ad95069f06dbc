"""Engines in workers: they time themselves, and a failure there is told and costs them only."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sparsec.tools.turns import TURN_RUNS, TURNS, Function, in_turns

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUN_SECONDS = 0.002
FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(BENCHMARKS / "workers")!r})
from protocol import serve

def load(path, inputs, threads, fails=""):
    print("an engine that talks on standard output")
    os.write(1, b"and one that is not Python\\n")
    if fails == "load":
        raise ValueError("no such layer")
    runs = []

    def run():
        runs.append(path)
        if fails == "run" and len(runs) > 5:
            print("illegal instruction", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        time.sleep({RUN_SECONDS})
        return [threads]

    return run, lambda outputs: {{"y": outputs}}

def convert(seconds):
    time.sleep(seconds)
    return {{"took": seconds}}

serve(load, convert=convert)
"""
LOADED = {"path": "model", "inputs": "none.npz", "threads": 3, "clock": "wall"}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("remote")


@pytest.fixture
def remote(module: ModuleType, tmp_path: Path) -> Iterator[Any]:
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE)
    with closing(module.Remote(module.Worker(Path(sys.executable), str(script)))) as started:
        yield started


def test_a_worker_times_itself_by_the_clock_asked_for(remote: Any) -> None:
    remote.load(**LOADED)
    wall = remote.turn(5 * RUN_SECONDS)
    assert len(wall) >= TURN_RUNS
    assert sum(wall) >= 5 * RUN_SECONDS
    assert min(wall) >= RUN_SECONDS  # it sleeps that long
    remote.load(**{**LOADED, "clock": "cpu"})
    cpu = remote.turn(0.0)
    assert len(cpu) == TURN_RUNS
    assert min(cpu) < RUN_SECONDS  # sleeping takes none
    assert remote.failure is None


def test_a_worker_writes_its_outputs(remote: Any, tmp_path: Path) -> None:
    remote.load(**LOADED)
    assert remote.ask("answer", path=str(tmp_path / "outputs.npz")) == {}
    assert np.load(tmp_path / "outputs.npz")["y"].tolist() == [3]
    assert remote.ask("convert", seconds=0.0) == {"took": 0.0}


def test_a_model_that_does_not_load_costs_its_own_figures(remote: Any) -> None:
    remote.load(**LOADED, fails="load")
    assert remote.failure == "ValueError: no such layer"
    here = Function(lambda: None, time.perf_counter)
    times, none = in_turns([here, remote], 0.0)
    assert len(times) == TURNS * TURN_RUNS
    assert none == []


def test_a_worker_that_dies_says_how(remote: Any) -> None:
    remote.load(**LOADED, fails="run")
    here = Function(lambda: None, time.perf_counter)
    times, some = in_turns([remote, here], 0.0)[::-1]
    assert len(times) == TURNS * TURN_RUNS
    assert len(some) < TURNS * TURN_RUNS
    assert "signal 9" in remote.failure
    assert "illegal instruction" in remote.failure


def test_a_worker_that_does_not_answer_is_not_waited_for(module: ModuleType, remote: Any) -> None:
    remote.load(**LOADED)
    with pytest.raises(module.WorkerFailed, match=r"no answer to 'convert' within 0\.05 s"):
        remote.ask("convert", wait_seconds=0.05, seconds=60.0)


@pytest.mark.parametrize(
    ("python", "script", "message"),
    [
        (lambda folder: folder / "no_python", "fake.py", "No such file"),
        (lambda folder: Path(sys.executable), "no_script.py", "exit status 2.*no_script"),
    ],
)
def test_a_worker_that_does_not_start_is_said(
    module: ModuleType,
    tmp_path: Path,
    python: Callable[[Path], Path],
    script: str,
    message: str,
) -> None:
    worker = module.Worker(python(tmp_path), str(tmp_path / script))
    with (
        closing(module.Remote(worker)) as started,
        pytest.raises(module.WorkerFailed, match=message),
    ):
        started.ask("turn", seconds=0.0)
