"""From a model to a log, and from the log to a library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.cli import main
from sparsec.errors import UnsupportedCpu
from sparsec.ir.graph import Graph
from sparsec.ir.schedule import Bucket, buckets
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_spec
from sparsec.options import Calibration, CompileOptions
from sparsec.runtime import load
from sparsec.stages import scheduled_graph
from sparsec.target import Target
from sparsec.tools.inputs import random_inputs
from sparsec.tools.tune import TuneOptions, jobs_of
from sparsec.tuning import workbench
from sparsec.tuning.harness import build_harness
from sparsec.tuning.log import LogNotWritten, TuningLog
from sparsec.tuning.lookup import DEFAULT_LOG
from sparsec.tuning.record import Outcome
from sparsec.tuning.task import task_of, tokens_of
from sparsec.tuning.workbench import Workbench, WrongResult, is_close

BUCKET = next(b for b in buckets() if 24 in b)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "model.onnx"
    onnx.save(build_model(tiny_spec(), pruning=Pruning(0.8, 4, 1), seed=3), path)
    return path


@pytest.fixture(scope="session")
def graph(model: Path) -> Graph:
    options = CompileOptions(
        target=Target.host(),
        precision="int8",
        calibration=Calibration(random=True),
        keep_padding=True,
    )
    return scheduled_graph(model, options)


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_harness(tmp_path_factory.mktemp("harness"))


def test_every_schedule_of_every_layer_is_right(
    graph: Graph, host: Target, harness: Path, tmp_path: Path
) -> None:
    """Each is built, run and compared with the oracle; the times are of real runs."""
    jobs = jobs_of(graph, host, TuneOptions(tmp_path / "log", tokens=(24,)))
    assert {"linear_int8", "linear"} <= {job.task.workload.op for job in jobs}
    for number, job in enumerate(jobs):
        folder = tmp_path / str(number)
        folder.mkdir()
        bench = Workbench(job.task, host, job.schedules[0], folder, harness)
        for schedule in job.schedules[:3]:
            seconds, baseline = bench.time(schedule)
            assert len(seconds) == len(baseline) >= 5
            assert all(0 < s < 1 for s in (*seconds, *baseline))


def test_a_wrong_result_is_found(
    graph: Graph, host: Target, harness: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs_of(graph, host, TuneOptions(tmp_path / "log", tokens=(24,)))[0]
    monkeypatch.setattr(Workbench, "_oracle", lambda bench: [
        np.full((1, job.task.tokens, 3), 1e3, np.float32)] * len(job.task.cut.results)
    )  # fmt: skip
    monkeypatch.setattr("sparsec.tuning.workbench.read_back", lambda memory, type, shape: (
        np.zeros(shape, np.float32)))  # fmt: skip
    with pytest.raises(WrongResult, match="is off by up to 1000"):
        Workbench(job.task, host, job.schedules[0], tmp_path, harness)


def test_results_of_the_candidate_before_do_not_count(
    graph: Graph, host: Target, harness: Path, tmp_path: Path
) -> None:
    """All candidates write to the same memory; one that writes nothing is wrong."""
    job = jobs_of(graph, host, TuneOptions(tmp_path / "log", tokens=(24,)))[0]
    bench = Workbench(job.task, host, job.schedules[0], tmp_path, harness)
    nothing = bench._harness.bind([], {}, {}, {})
    with pytest.raises(WrongResult, match="is off by"):
        bench._check(nothing, job.schedules[0])


@pytest.mark.isa("amx")
def test_the_system_is_asked_for_tiles_before_they_are_used(
    model: Path, harness: Path, tmp_path: Path, amx: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its permission the first candidate would end the process."""
    target = Target.named("sapphirerapids")
    options = CompileOptions(
        target=target, precision="int8", calibration=Calibration(random=True), log="none"
    )
    jobs = jobs_of(scheduled_graph(model, options), target, TuneOptions(tmp_path / "log", (24,)))
    job = next(j for j in jobs if j.schedules[0].isa == "amx")
    asked: list[bool] = []

    def answer(permits: bool) -> bool:
        asked.append(permits)
        return permits

    monkeypatch.setattr(workbench, "may_use_tiles", lambda: answer(False))
    with pytest.raises(UnsupportedCpu, match=r"does not permit .* AMX.*--isa avx512bf16"):
        Workbench(job.task, target, job.schedules[0], tmp_path, harness)
    monkeypatch.setattr(workbench, "may_use_tiles", lambda: answer(True))
    Workbench(job.task, target, job.schedules[0], tmp_path, harness)
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("result", "expected", "close"),
    [
        ([1, 2], [1, 3], True),
        ([1, 2], [1, 4], False),
        ([1.0, 100.0], [1.05, 100.0], True),
        ([1.0, 100.0], [1.5, 100.0], False),
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([1.0, 1.0], [np.inf, 1.0], False),
        ([np.nan], [np.nan], True),
        ([np.nan], [1.0], False),
    ],
)
def test_closeness(result: list[float], expected: list[float], close: bool) -> None:
    dtype = np.uint8 if isinstance(result[0], int) else np.float32
    assert is_close(np.array(result, dtype), np.array(expected, dtype)) is close


def test_a_task_has_the_tokens_of_its_bucket(graph: Graph, host: Target) -> None:
    node = next(n for n in graph.nodes if n.op == "linear_int8")
    workload = jobs_of(graph, host, TuneOptions(Path("log"), (24,)))[0].task.workload
    task = task_of(node, workload, BUCKET, 2, {})
    assert task is not None
    assert (task.tokens, task.threads) == (BUCKET.most, 2)
    assert task_of(node, workload, BUCKET, 1, {"batch": 1, "seq": 4000}) is None
    assert tokens_of(Bucket(above=300)) == 1200


def test_a_log_is_made_and_used(model: Path, tmp_path: Path, host: Target) -> None:
    log, library, report = (tmp_path / n for n in ("t.jsonl", "m.so", "r.json"))
    command = ["tune", str(model), "--log", str(log), "--precision", "int8", "--tokens", "24"]
    assert main([*command, "--layers", "layer.0", "--trials", "4", "-q"]) == 0
    records = TuningLog.read(log).records
    assert records
    assert {r.outcome for r in records} == {Outcome.OK}

    compiled = sparsec.compile_model(
        model, library, precision="int8", calibration=Calibration(random=True), log=log,
        report=report,
    )  # fmt: skip
    sources = {layer["source"] for layer in json.loads(report.read_text())["layers"]}
    assert any("log exact" in source for source in sources)
    assert any("heuristic" in source for source in sources)
    plain = sparsec.compile_model(
        model, tmp_path / "p.so", precision="int8", calibration=Calibration(random=True)
    )
    with load(compiled.library) as tuned, load(plain.library) as heuristic:
        arrays = random_inputs(tuned, 2, 12, seed=0, padding=True)
        for name, result in tuned(arrays).items():
            np.testing.assert_allclose(result, heuristic(arrays)[name], atol=1e-3)


def test_trials_are_not_repeated(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "t.jsonl"
    command = ["tune", str(model), "--log", str(log), "--precision", "int8", "--tokens", "24",
               "--layers", "layer.0.*linear_1|ffn|dense", "-q"]  # fmt: skip
    assert main(command) == 0
    before = log.read_bytes()
    assert before
    assert main(command) == 0
    assert log.read_bytes() == before


def test_log_commands(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, merged = tmp_path / "t.jsonl", tmp_path / "all.jsonl"
    assert main(["tune", str(model), "--log", str(log), "--precision", "int8", "--tokens", "24",
                 "--trials", "2", "--layers", "layer.1", "-q"]) == 0  # fmt: skip
    count = len(TuningLog.read(log).records)
    assert main(["log", "merge", str(log), str(log), "-o", str(merged)]) == 0
    assert len(TuningLog.read(merged).records) == count
    assert main(["log", "check", str(merged)]) == 0
    assert f"{count} records, 0 of kernels that have changed" in capsys.readouterr().out
    with merged.open("a") as file:
        file.write("{\n")
    assert main(["log", "check", str(merged)]) == 1
    assert main(["log", "show", str(merged)]) == 0
    assert main(["log", "best", str(merged)]) == 0
    out = capsys.readouterr().out
    assert "1 broken lines" in out
    assert f"{merged}:{count + 1}: no JSON" in out.replace("\n", "")
    assert main(["log", "prune", str(merged), "--keep", "1"]) == 0
    assert not TuningLog.read(merged).broken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "a"], "--tokens: wanted numbers"),
        (["--tokens", "0"], "--tokens: wanted numbers"),
        (["--threads", "0"], "--threads 0: wanted at least 1"),
        (["--threads", "1000"], "--threads 1000: this machine has"),
        (["--tokens", "²"], "--tokens: wanted numbers"),
        (["--trials", "0"], "--trials 0: wanted at least 1"),
        (["--minutes", "nan"], "--minutes nan: wanted more than 0"),
        (["--layers", "("], "is no pattern"),
        (["--layers", "nothing-like-this"], "there is no layer to tune"),
    ],
)
def test_bad_requests(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str],
    message: str,
) -> None:  # fmt: skip
    assert main(["tune", str(model), "--log", str(tmp_path / "t.jsonl"), *options, "-q"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl"))


def test_tuning_ends_where_nothing_can_be_kept(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first trial, and when the disk is full later on."""
    command = ["tune", str(model), "--tokens", "24", "--layers", "ffn", "-q", "--log"]
    assert main([*command, str(tmp_path / "no" / "t.jsonl")]) == 2
    assert "the tuning log cannot be written (No such file" in capsys.readouterr().err
    kept: list[object] = []

    def full(path: Path, records: list[object]) -> None:
        if kept:
            raise LogNotWritten(f"{path}: no space")
        kept.extend(records)

    monkeypatch.setattr("sparsec.tuning.tuner.append", full)
    assert main([*command, str(tmp_path / "t.jsonl")]) == 2
    assert "t.jsonl: no space" in capsys.readouterr().err


def test_records_for_two_threads_are_exact_for_two_threads(
    model: Path, tmp_path: Path, host: Target
) -> None:
    if host.cores < 2:
        pytest.skip("this machine has one core")
    log = tmp_path / "t.jsonl"
    command = ["tune", str(model), "--log", str(log), "--precision", "int8", "--tokens", "24",
               "--layers", "ffn", "--trials", "2", "--threads", "2", "-q"]  # fmt: skip
    assert main(command) == 0
    for threads, source in ((1, "log nearest (2 threads)"), (2, "log exact")):
        options = CompileOptions(
            target=host, precision="int8", calibration=Calibration(random=True), log=log,
            threads=threads,
        )  # fmt: skip
        nodes = scheduled_graph(model, options).nodes
        assert source in {choice.schedule.source for node in nodes for choice in node.schedules}


@pytest.mark.parametrize("keep", ["0", "-1"])
def test_a_log_is_not_emptied(
    keep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "t.jsonl"
    log.write_bytes(DEFAULT_LOG.read_bytes())
    assert main(["log", "prune", str(log), "--keep", keep]) == 2
    assert f"--keep {keep}: wanted at least 1" in capsys.readouterr().err
    assert log.read_bytes() == DEFAULT_LOG.read_bytes()


def test_a_missing_log_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "m.so"
    assert main(["compile", str(model), "-o", str(library), "--log", str(tmp_path / "no")]) == 2
    assert "the tuning log cannot be read" in capsys.readouterr().err
    assert not library.exists()
