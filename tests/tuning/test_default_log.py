"""The log of the package: used when no other is named, and the same bytes every time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import pytest

from sparsec.cli import main
from sparsec.codegen.kernels.revision import revision
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_spec
from sparsec.options import Calibration, CompileOptions
from sparsec.stages import scheduled_graph
from sparsec.target import Target
from sparsec.tuning import lookup
from sparsec.tuning.log import TuningLog, append
from sparsec.tuning.log_files import best, condensed, is_stale
from sparsec.tuning.lookup import DEFAULT_LOG, default_log
from sparsec.tuning.record import Machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("default") / "model.onnx"
    onnx.save(build_model(tiny_spec(layers=1), pruning=Pruning(0.8, 4, 1), seed=3), path)
    return path


@pytest.fixture(scope="module")
def records(model: Path) -> Path:
    """A log as benchmarks/make_default_log.py writes it."""
    work = model.with_name("work.jsonl")
    command = ["tune", str(model), "--log", str(work), "--precision", "int8", "--tokens", "24"]
    assert main([*command, "--layers", "ffn", "--trials", "6", "-q"]) == 0
    shipped = model.with_name("shipped.jsonl")
    append(shipped, map(condensed, best(TuningLog.read(work).records)))
    return shipped


def sources(model: Path, log: Path | Literal["none"] | None) -> set[str]:
    calibration = Calibration(random=True)
    options = CompileOptions(
        target=Target.host(), precision="int8", calibration=calibration, log=log
    )
    graph = scheduled_graph(model, options)
    return {choice.schedule.source for node in graph.nodes for choice in node.schedules}


def test_the_shipped_log_can_be_read() -> None:
    assert DEFAULT_LOG.is_file()
    assert not default_log().broken


def test_it_is_used_unless_another_log_or_none_is_named(
    model: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "DEFAULT_LOG", records)
    assert "default log exact" in sources(model, None)
    assert sources(model, "none") == {"heuristic"}
    given = sources(model, records)
    assert "log exact" in given
    assert "default log exact" not in given


def test_the_same_log_gives_the_same_bytes_and_the_report_names_it(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "DEFAULT_LOG", records)
    made = []
    for name in ("a", "b"):
        output, report = tmp_path / f"{name}.so", tmp_path / f"{name}.json"
        command = ["compile", str(model), "-o", str(output), "--precision", "int8", "-q"]
        assert main([*command, "--calibration", "random", "--report", str(report)]) == 0
        made.append(output.read_bytes())
        layers = json.loads(report.read_text())["layers"]
        assert any("default log exact" in layer["source"] for layer in layers)
    assert made[0] == made[1]


def test_instructions_that_a_workload_has_no_use_for_are_no_difference(records: Path) -> None:
    """A record of a CPU with bf16 serves int8 on one without."""
    log = TuningLog.read(records)
    record = next(r for r in log.records if r.workload.op == "linear_int8")
    ours = Machine("us", ("avx2", "avx512", "avx512vnni", "avx512bf16"), 2, 1, 2, 3)
    theirs = replace(ours, cpu="them", isas=ours.isas[:3])
    better = replace(ours, cpu="them", isas=(*ours.isas, "amx"))
    schedule = replace(record.schedule, isa="avx512vnni")
    log = TuningLog([replace(record, machine=ours, schedule=schedule)], name="default log")
    for machine, found in ((theirs, "default log nearest (us)"), (better, None)):
        query = lookup.Query(record.workload, record.tokens, 1, machine, record.revision)
        answer = log.lookup(query)
        assert (answer and answer.source) == found


def test_the_shipped_records_are_of_the_present_kernels() -> None:
    """After a change of kernels: benchmarks/make_default_log.py measures them again."""
    stale = [r for r in default_log().records if is_stale(r, revision)]
    assert not stale, f"{len(stale)} of {len(default_log().records)}"
