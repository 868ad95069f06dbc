"""Many machines: jobs are shared within a kind of machine, and a lost node costs one trial."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from sparsec.cli import main
from sparsec.ir.schedule import EVERY, Schedule, Workload
from sparsec.models.build import build_model
from sparsec.models.tiny import tiny_spec
from sparsec.tuning.cluster import NodeLost, Outcomes, tune_on
from sparsec.tuning.log import TuningLog
from sparsec.tuning.record import Machine, Outcome, Trial
from sparsec.tuning.search import Budget
from sparsec.tuning.task import Task
from sparsec.tuning.tuner import TRIALS_OF_CONFIRMED, Job

ONE = Machine("A", ("avx2",), 2, 1, 2, 3)
TWO = replace(ONE, cpu="B")
SCHEDULES = [Schedule("int8_gemm", "avx2", (("rows", rows),)) for rows in (4, 8, 16, 32)]


def job(size: int) -> Job:
    work = Workload("linear_int8", (("m", size), ("k", 8)), "u8s8")
    return Job(Task(None, work, EVERY, 8, 1, {}), SCHEDULES)  # type: ignore[arg-type]


@dataclass
class FakeNode:
    """Dies at trial `dies_at`; waits at its first trial until all of `meets` are there."""

    name: str
    machine: Machine
    target: Any = None
    dies_at: int = -1
    meets: threading.Barrier | None = None
    jobs: list[Job] = field(default_factory=list)
    measured: int = 0

    @contextlib.contextmanager
    def open(self, job: Job) -> Iterator[FakeNode]:
        self.jobs.append(job)
        yield self

    def measure(self, schedule: Schedule) -> Trial:
        self.measured += 1
        if self.measured == 1 and self.meets is not None:
            self.meets.wait(20.0)
        if self.measured == self.dies_at:
            raise NodeLost("it burns")
        return Trial(schedule, Outcome.OK, (1.0 / schedule.param("rows"),), (1.0,))


def tune(nodes: list[FakeNode], jobs: list[Job], log: Path) -> Outcomes:
    own = {node.machine: jobs for node in nodes}
    return tune_on(nodes, own, log, TuningLog(), Budget())


def test_nodes_of_a_kind_share_the_jobs_and_each_kind_has_all(tmp_path: Path) -> None:
    log, jobs, start = tmp_path / "t.jsonl", [job(n) for n in range(8, 14)], threading.Barrier(3)
    nodes = [FakeNode(n, m, meets=start) for n, m in (("a", ONE), ("b", ONE), ("c", TWO))]
    outcomes = tune(nodes, jobs, log)
    assert not outcomes.lost
    assert [r.best for r in outcomes.results] == [SCHEDULES[-1]] * 12
    assert all(node.jobs for node in nodes)
    assert len(nodes[0].jobs) + len(nodes[1].jobs) == len(nodes[2].jobs) == 6
    cpus = Counter(r.machine.cpu for r in TuningLog.read(log).records)
    assert cpus["A"] == cpus["B"] > 0


def test_a_node_that_dies_loses_its_running_trial_only(tmp_path: Path) -> None:
    log, jobs, start = tmp_path / "t.jsonl", [job(8), job(9)], threading.Barrier(2)
    dying = FakeNode("dying", ONE, dies_at=3, meets=start)
    living = FakeNode("living", ONE, meets=start)
    outcomes = tune([dying, living], jobs, log)
    assert outcomes.lost == ["dying was lost: it burns"]
    assert [r.best for r in outcomes.results] == [SCHEDULES[-1]] * 2
    records = TuningLog.read(log).records
    trials = Counter((r.workload, r.schedule) for r in records)
    assert len(trials) == 2 * len(SCHEDULES)
    assert set(trials.values()) == {1, TRIALS_OF_CONFIRMED}
    assert dying.measured - 1 + living.measured == len(records)


def test_without_a_node_of_its_kind_a_job_says_so(tmp_path: Path) -> None:
    nodes = [FakeNode("a", ONE, dies_at=2), FakeNode("b", TWO)]
    outcomes = tune(nodes, [job(8)], tmp_path / "t.jsonl")
    assert [r.note for r in outcomes.results] == ["no node with A is left", ""]
    assert len(outcomes.lost) == 1


def test_an_error_of_a_thread_is_raised(tmp_path: Path) -> None:
    node = FakeNode("a", ONE, dies_at=0)
    node.measured = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        tune([node, FakeNode("b", ONE)], [job(8), job(9)], tmp_path / "t.jsonl")


def test_no_cluster_and_no_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(build_model(tiny_spec(layers=1)), model)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    command = ["tune", str(model), "--log", str(tmp_path / "t.jsonl"), "--ray", "local", "-q"]
    assert main(command) == 2
    assert "pip install 'sparsec[scale]'" in capsys.readouterr().err
