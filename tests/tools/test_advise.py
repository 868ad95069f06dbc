"""`sparsec advise`: times of the cost model or of a log, and what meets a budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from sparsec.cli import main
from sparsec.codegen.kernels import FAMILIES
from sparsec.codegen.kernels.revision import revision
from sparsec.ir.schedule import Workload, buckets
from sparsec.models.build import build_model
from sparsec.models.tiny import tiny_spec
from sparsec.options import Calibration, CompileOptions
from sparsec.target import Target
from sparsec.tools.advise import AdviseOptions, advise
from sparsec.tuning.log import append
from sparsec.tuning.record import Machine, TuningRecord

OPTIONS = AdviseOptions(blocks=((4, 1), (16, 1), (64, 1)), sparsities=(0.5, 0.9))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("advise") / "model.onnx"
    onnx.save(build_model(tiny_spec(layers=1), seed=3), path)
    return path


@pytest.fixture(scope="module")
def options(host: Target) -> CompileOptions:
    calibration = Calibration(random=True)
    return CompileOptions(target=host, precision="int8", calibration=calibration, log="none")


@pytest.fixture(scope="module")
def advice(model: Path, options: CompileOptions) -> dict[str, Any]:
    return advise(model, options, OPTIONS)


def layer_of(advice: dict[str, Any], rows: int, cols: int) -> dict[str, Any]:
    return next(x for x in advice["layers"] if (x["rows"], x["cols"]) == (rows, cols))


def test_every_layer_has_every_block_that_divides_it(advice: dict[str, Any]) -> None:
    weights = {(x["rows"], x["cols"]) for x in advice["layers"]}
    assert weights == {(96, 32), (32, 32), (64, 32), (32, 64)}  # the pooler reads one token
    asked = {(x["block"], x["sparsity"]) for x in layer_of(advice, 64, 32)["options"]}
    assert asked == {(b, s) for b in ("4x1", "16x1", "64x1") for s in (0.5, 0.9)}
    assert {x["block"] for x in layer_of(advice, 32, 64)["options"]} == {"4x1", "16x1"}
    for layer in advice["layers"]:
        for option in layer["options"]:
            assert 0 < option["us"] <= layer["dense"]["us"]
            assert option["basis"] == "modelled"


def test_a_model_is_the_sum_of_its_layers(advice: dict[str, Any]) -> None:
    """A layer that a block does not divide stays dense."""
    found = next(m for m in advice["models"] if (m["block"], m["sparsity"]) == ("64x1", 0.9))
    us = advice["other_us"]
    for layer in advice["layers"]:
        own = [o["us"] for o in layer["options"] if (o["block"], o["sparsity"]) == ("64x1", 0.9)]
        us += own[0] if own else layer["dense"]["us"]
    assert found["ms"] == pytest.approx(us / 1e3, abs=1e-4)
    dense = advice["other_us"] + sum(layer["dense"]["us"] for layer in advice["layers"])
    first = advice["models"][0]
    assert (first["block"], first["sparsity"]) == (None, 0.0)
    assert first["ms"] == pytest.approx(dense / 1e3, abs=1e-4)
    assert found["meets"] is None
    assert advice["recommended"] is None


def test_the_least_sparse_that_meets_the_budget_is_recommended(
    model: Path, options: CompileOptions, advice: dict[str, Any]
) -> None:
    by_name = {(m["block"], m["sparsity"]): m["ms"] for m in advice["models"]}

    def recommended(ms: float) -> Any:
        found = advise(model, options, replace(OPTIONS, latency_ms=ms))["recommended"]
        return found and (found["block"], found["sparsity"])

    assert recommended(by_name[None, 0.0]) == (None, 0.0)
    half = min(ms for (_, s), ms in by_name.items() if s == 0.5)
    assert recommended(half)[1] == 0.5
    assert recommended(half / 1e3) is None


def test_measured_times_come_first(
    model: Path, options: CompileOptions, host: Target, tmp_path: Path
) -> None:
    log, sizes = tmp_path / "t.jsonl", (("m", 64), ("k", 32))
    dense = Workload("linear_int8", sizes, "u8s8", "dense", "gelu u8")
    sparse = replace(dense, layout="bsr16x1", density=0.1)
    bucket = next(b for b in buckets() if 128 in b)
    for work, seconds in ((dense, 2e-3), (sparse, 1e-3)):
        schedule = FAMILIES[work.op].schedules(replace(work, bucket=bucket), host)[0]
        append(log, [TuningRecord(
            work, 128, 1, Machine.of(host), schedule, revision(work.op) or "", (),
            seconds=(seconds,), baseline_seconds=(4e-3,),
        )])  # fmt: skip
    given = replace(options, log=log)
    layer = layer_of(advise(model, given, OPTIONS), 64, 32)
    assert (layer["dense"]["us"], layer["dense"]["basis"]) == (2000.0, "measured")
    measured = [o for o in layer["options"] if o["basis"] == "measured"]
    assert [(o["block"], o["sparsity"], o["us"]) for o in measured] == [("16x1", 0.9, 1000.0)]
    other_tokens = layer_of(advise(model, given, replace(OPTIONS, tokens=100)), 64, 32)
    assert other_tokens["dense"]["basis"] == "modelled"


def test_for_another_machine_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["advise", str(model), "--target", "sapphirerapids", "--blocks", "16x4", "--json"]
    assert main([*command, "--latency-ms", "5", "--sparsities", "0.8", "--tokens", "32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["target"], found["isa"]) == (1, "sapphirerapids", "amx")
    assert (found["precision"], found["tokens"], found["latency_ms"]) == ("int8", 32, 5.0)
    assert found["models"][0]["meets"] is True
    assert found["recommended"] == found["models"][0]


def test_as_tables(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(model), "--latency-ms", "1e-6", "--log", "none"]) == 0
    out = capsys.readouterr().out
    assert "64x32" in out
    assert "nothing meets 1e-06 ms; the fastest takes" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0: wanted 1 to"),
        (["--tokens", "100000000000"], "--tokens 100000000000: wanted 1 to"),
        (["--threads", "0"], "--threads 0: wanted at least 1"),
        (["--latency-ms", "nan"], "--latency-ms nan: wanted more than 0"),
        (["--blocks", "²x1"], "--blocks: wanted"),
        (["--sparsities", "80"], "--sparsities: wanted shares between 0 and 1"),
        (["--sparsities", "x"], "--sparsities: wanted shares between 0 and 1"),
        (["--blocks", "16"], "--blocks: wanted output x input channels"),
        (["--blocks", "0x4"], "--blocks: wanted output x input channels"),
        (["--latency-ms", "0"], "--latency-ms 0: wanted more than 0"),
        (["--target", "abacus"], "abacus"),
        (["--log", "no-such-file"], "the tuning log cannot be read"),
    ],
)
def test_bad_requests(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["advise", str(model), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_lines_of_the_log_that_are_skipped_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "t.jsonl"
    log.write_text("broken\n")
    assert main(["advise", str(model), "--log", str(log), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["warnings"] == [err.strip().removeprefix("sparsec: warning: ")]
    assert f"{log}:1: no JSON" in err
