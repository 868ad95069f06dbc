"""Instances in workers: a process for each on its own CPUs, at work at the same time."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sparsec.target import core_cpus
from sparsec.tools.instances import EngineFailed
from sparsec.tools.turns import MIN_CALLS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAST, SLOW = 0.002, 0.06  # seconds of a run
# Its file is a folder: a worker takes the first free place there, and logs what it loads.
FAKE = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS / "workers")!r})
import numpy as np
from protocol import serve

def take_place(folder):
    for place in range(100):
        try:
            Path(folder, f"place{{place}}").mkdir()
            return place
        except FileExistsError:
            pass

place = None

def load(path, inputs, threads):
    global place
    if place is None:
        place = take_place(path)
    kind = Path(path).name
    if kind == "broken":
        raise ValueError("an unknown layer")
    batch = len(np.load(inputs)["ids"])
    with open(Path(path, "log"), "a") as log:
        log.write(f"{{os.getpid()}} {{batch}} {{threads}} {{sorted(os.sched_getaffinity(0))}}\\n")
    runs = 0

    def run():
        nonlocal runs
        runs += 1
        if kind == "dies" and runs > 4:
            os.kill(os.getpid(), 9)
        if kind == "meets":  # the other one, in each run
            Path(path, f"run{{place}}_{{runs}}").touch()
            until = time.monotonic() + 20
            while not Path(path, f"run{{1 - place}}_{{runs}}").exists():
                if time.monotonic() > until:
                    raise TimeoutError("the other one does not run")
                time.sleep(0.001)
        time.sleep({SLOW} if kind == "copies" and place != 1 else {FAST})

    return run, None

serve(load)
"""


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[Any, dict[str, Path]]]:
    """An engine with a setting for each kind of file, and the files."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module: ModuleType = importlib.import_module("remote_instances")
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE)
    worker = importlib.import_module("remote").Worker(Path(sys.executable), str(script))

    def started(*kinds: str, copies: int = 1) -> tuple[Any, dict[str, Path]]:
        paths = {kind: tmp_path / kind for kind in kinds}
        for path in paths.values():
            path.mkdir()
        files = [
            importlib.import_module("sparse_peers").SparseFile(kind, path, 0, worker)
            for kind, path in paths.items()
        ]
        return module.RemoteEngine("fake 1.0", files, copies), paths

    return started


def inputs(batch: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"ids": np.zeros((batch, 8), np.int64)}


def loads(folder: Path) -> list[tuple[int, str]]:
    """Process, and the rest of the line, of each load in order."""
    lines = Path(folder, "log").read_text().splitlines()
    return [(int(pid), rest) for pid, _, rest in (line.partition(" ") for line in lines)]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_an_instance_is_a_process_on_its_cpus(start: Callable[..., Any]) -> None:
    before = os.sched_getaffinity(0)
    engine, files = start("file")
    cpus = core_cpus()
    each, together = tuple((cpu,) for cpu in cpus[:2]), (tuple(cpus[:2]),)
    with closing(engine):
        windows = engine.windows("file", each, inputs(1), 0.02)
        assert len(windows) == len(each)
        assert all(sum(window) >= 0.02 - 1e-9 for window in windows)  # an error of summing
        assert all(min(window) >= FAST for window in windows)
        first = loads(files["file"])
        assert sorted(rest for _, rest in first) == sorted(f"1 1 [{cpu}]" for (cpu,) in each)
        # The same again loads nothing; another batch comes to the same processes.
        engine.windows("file", each, inputs(1), 0.0)
        assert loads(files["file"]) == first
        engine.windows("file", each, inputs(3), 0.0)
        second = loads(files["file"])[len(first) :]
        assert {pid for pid, _ in second} == {pid for pid, _ in first}
        assert {rest[0] for _, rest in second} == {"3"}
        pid = first[0][0]
        if len(cpus) > 1:  # other places are of other processes
            engine.windows("file", together, inputs(3), 0.0)
            ((pid, rest),) = loads(files["file"])[len(first + second) :]
            assert rest == f"3 2 {sorted(together[0])}"
            assert not any(is_alive(pid) for pid, _ in first)
    assert not is_alive(pid)
    assert os.sched_getaffinity(0) == before


def test_instances_in_workers_run_at_the_same_time(start: Callable[..., Any]) -> None:
    """Each run waits until the other instance is in a run too."""
    engine, _ = start("meets")
    with closing(engine):
        windows = engine.windows("meets", ((core_cpus()[0],),) * 2, inputs(1), 0.0)
    assert [len(window) for window in windows] == [MIN_CALLS] * 2


def test_the_fastest_copy_counts(start: Callable[..., Any]) -> None:
    engine, files = start("copies", copies=3)
    with closing(engine):
        (window,) = engine.windows("copies", ((core_cpus()[0],),), inputs(1), 0.0)
    assert len(loads(files["copies"])) == 3
    assert min(window) < SLOW


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("broken", "ValueError: an unknown layer"), ("dies", "signal 9")],
)
def test_a_worker_that_fails_costs_its_setting(
    start: Callable[..., Any], kind: str, reason: str
) -> None:
    engine, files = start(kind, "file")
    places = ((core_cpus()[0],),) * 2
    with closing(engine):
        with pytest.raises(EngineFailed, match=reason):
            engine.windows(kind, places, inputs(1), 0.0)
        if kind == "dies":
            assert not any(is_alive(pid) for pid, _ in loads(files[kind]))
        assert all(engine.windows("file", places, inputs(1), 0.0))
