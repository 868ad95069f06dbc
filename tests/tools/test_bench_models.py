"""The benchmark of models: what it reads from the command line and how it picks the best peer."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sparsec.errors import InvalidInput

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_models.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # for bench_files
    spec = importlib.util.spec_from_file_location("bench_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_models", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_a_peer_counts_with_its_fastest_setting(script: ModuleType) -> None:
    path = Path("model")
    ours = script.Library("4x1", 80, path, {"max_abs_error": 0.5, "cosine": 0.75})
    peers = [
        script.Side("slow peer", "one", path),
        script.Side("fast peer", "one", path),
        script.Side("fast peer", "two", path),
    ]
    cell = script.Cell(1, 32, 2, 1.0, "wall", (ours,), tuple(peers))
    times = [[0.001, 0.001, 0.009], [0.008] * 3, [0.006] * 3, [0.001, 0.004, 0.004]]
    (row,) = script.rows(cell, [script.Outcome(taken) for taken in times])
    assert row["sparsec"]["median_ms"] == 1.0
    assert row["peers"]["fast peer"]["setting"] == "two"
    assert row["peers"]["slow peer"]["median_ms"] == 8.0
    assert row["ratio"] == 4.0  # medians: 4 ms over 1 ms
    assert (row["block"], row["sparsity"], row["cosine"]) == ("4x1", 80, 0.75)
    assert len(row["settings"]) == 3


def test_a_row_has_the_peers_with_its_zeros(script: ModuleType) -> None:
    path, near = Path("model"), {"max_abs_error": 0.0, "cosine": 1.0}
    libraries = [script.Library("dense", 0, path, near)]
    libraries += [script.Library(block, 80, path, near) for block in ("4x1", "32x1")]
    libraries += [script.Library("4x1", 90, path, near)]
    peers = [
        script.Side("plain", "dense", path),
        script.Side("zeros", "dense", path),
        script.Side("zeros", "4x1_80", path, sparsity=80),
        script.Side("zeros", "1x4_80", path, sparsity=80),
        script.Side("zeros", "4x1_90", path, sparsity=90),
    ]
    cell = script.Cell(1, 32, 1, 1.0, "wall", tuple(libraries), tuple(peers))
    # The peer with 90 % zeros is slower than with none: then its dense file counts.
    ms = [1.0, 1.0, 1.0, 1.0, 9.0, 8.0, 5.0, 4.0, 8.5]
    outcomes = [script.Outcome([taken / 1e3]) for taken in ms]
    found = [(r["peers"]["zeros"]["setting"], r["ratio"]) for r in script.rows(cell, outcomes)]
    assert found == [("dense", 8.0), ("1x4_80", 4.0), ("1x4_80", 4.0), ("dense", 8.0)]
    counts = [len(row["settings"]) for row in script.rows(cell, outcomes)]
    assert counts == [2, 4, 4, 3]


def test_a_peer_that_failed_is_named_and_does_not_count(script: ModuleType) -> None:
    path = Path("model")
    ours = script.Library("4x1", 80, path, {"max_abs_error": 0.0, "cosine": 1.0})
    peers = script.Side("one", "a", path), script.Side("other", "b", path, sparsity=80)
    outcomes = [
        script.Outcome([0.001]),
        script.Outcome([0.003]),
        script.Outcome([0.001], "it died"),  # some turns were taken
    ]
    (row,) = script.rows(script.Cell(1, 32, 1, 1.0, "wall", (ours,), peers), outcomes)
    assert (list(row["peers"]), row["ratio"]) == (["one"], 3.0)
    failed = {"group": "other", "setting": "b", "sparsity": 80, "reason": "it died"}
    assert row["failures"] == [failed]


def test_no_peer_no_ratio(script: ModuleType) -> None:
    ours = script.Library("dense", 0, Path("model"), {"max_abs_error": 0.0, "cosine": 1.0})
    (row,) = script.rows(
        script.Cell(1, 32, 1, 1.0, "wall", (ours,), ()), [script.Outcome([0.001])]
    )
    assert row["ratio"] is None


def test_dense_has_no_sparsity(script: ModuleType) -> None:
    options = argparse.Namespace(blocks="dense,16x4", sparsities="80,90")
    found = [p and (p.sparsity, p.rows, p.cols) for p in script.prunings(options)]
    assert found == [None, (0.8, 16, 4), (0.9, 16, 4)]


@pytest.mark.parametrize("text", ["", "x", "1x", "1x0", "1x2x3", "-1x2"])
def test_a_bad_shape_is_refused(script: ModuleType, text: str) -> None:
    with pytest.raises(InvalidInput, match="wanted AxB"):
        script.parse_shape(text)


@pytest.mark.parametrize("text", ["", "1,", "a", "0", "-1"])
def test_bad_numbers_are_refused(script: ModuleType, text: str) -> None:
    with pytest.raises(InvalidInput, match="--threads"):
        script.integers(text, "threads")


def options_of(peers: str, **others: object) -> argparse.Namespace:
    known = {"precision": "int8", "deepsparse_python": None, "itrex_python": None}
    return argparse.Namespace(peers=peers, **{**known, **others})


def test_an_unknown_peer_is_refused(script: ModuleType) -> None:
    with pytest.raises(InvalidInput, match="known are onnxruntime, openvino, deepsparse, itrex"):
        script.installed_peers(options_of("onnxruntime,torch"))


def test_a_peer_without_its_python_is_left_out_and_said(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.installed_peers(options_of("deepsparse,itrex")) == {}
    said = capsys.readouterr().err
    assert "--deepsparse-python" in said
    assert "--itrex-python" in said
    assert "docs/benchmarks.md" in said
    fp32 = options_of("itrex", precision="fp32", itrex_python=Path(sys.executable))
    assert script.installed_peers(fp32) == {}
    assert "int8 only" in capsys.readouterr().err


def test_a_python_without_the_engine_is_refused(script: ModuleType) -> None:
    options = options_of("deepsparse", deepsparse_python=Path(sys.executable))
    with pytest.raises(InvalidInput, match=r"--deepsparse-python .*: it has no deepsparse"):
        script.installed_peers(options)
    options = options_of("itrex", itrex_python=Path("no/python"))
    with pytest.raises(InvalidInput, match="it does not run"):
        script.installed_peers(options)


def records(ratios: dict[tuple[str, int], list[float]]) -> list[dict[str, object]]:
    """Of one model; a cell per ratio."""
    return [
        {"model": "m", "precision": "int8", "batch": 1, "seq": seq, "threads": 1, "block": block,
         "sparsity": zeros, "ratio": ratio, "target_isa": "avx512vnni", "cpu": "this"}
        for (block, zeros), values in ratios.items()
        for seq, ratio in enumerate(values)
    ]  # fmt: skip


def test_only_records_of_the_same_circumstances_are_resumed(
    script: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "models.jsonl"
    assert script.read_records(path, {"cpu": "this"}) == {}
    first, second = records({("4x1", 80): [2.0, 3.0]})
    newer = {**first, "ratio": 4.0}
    lines = [first, {**second, "cpu": "other"}, newer]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = script.read_records(path, {"cpu": "this"})
    assert found == {("m", "int8", 1, 0, 1, "4x1", 80): newer}


def test_a_file_of_other_lines_is_refused(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "models.jsonl"
    path.write_text("no record\n")
    with pytest.raises(InvalidInput, match="line 1"):
        script.read_records(path, {})


def test_a_known_cell_is_not_measured_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(models="bert-mini", shapes="1x32", threads="1", blocks="4x1",
                                 sparsities="80", precision="int8")  # fmt: skip
    monkeypatch.setattr(script, "build", lambda *_: pytest.fail("it was built"))
    record = {"ratio": 1.0}
    known = {("bert-mini", "int8", 1, 32, 1, "4x1", 80): record}
    assert list(script.measure_all(options, {}, known, [])) == [(record, False)]


def test_a_cell_that_is_killed_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(models="bert-mini", shapes="1x32", threads="1", blocks="4x1",
                                 sparsities="80", precision="int8", seconds=1.0,
                                 clock="wall")  # fmt: skip
    monkeypatch.setattr(script, "build", lambda *_: None)
    monkeypatch.setattr(script, "all_peers", lambda *_: ())
    monkeypatch.setattr(script, "Cell", lambda *_: "__import__('os')._exit(9)")
    monkeypatch.setattr(script, "measure", eval)
    lost: list[str] = []
    assert list(script.measure_all(options, {}, {}, lost)) == []
    assert lost == ["bert-mini 1x32, 1 threads"]


def test_the_summary_has_the_goals_and_the_best_block_of_each_cell(script: ModuleType) -> None:
    found = records({("dense", 0): [1.0, 4.0], ("4x1", 80): [1.0, 9.0], ("32x1", 80): [4.0, 1.0]})
    tables = importlib.import_module("model_tables")
    table = tables.summary_table(found)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["dense (2.5x)"] == ["2.00"]
    assert cells["4x1 80 % (2.5x)"] == ["3.00"]
    assert cells["32x1 80 %"] == ["2.00"]
    assert cells["best block 80 % (3x)"] == ["6.00"]  # sqrt(4 * 9)
    assert tables.goal("best block", 90, "amx") == 8.0
