"""The benchmark of throughput under a limit: what it refuses, and what it puts beside what."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sparsec.models.tiny import tiny_spec

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_latency.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("bench_latency")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seqs", "32,x"], "--seqs 32,x"),
        (["--latency-ms", "0"], "wanted numbers above 0"),
        (["--sparsity", "100"], "below 100 per cent"),
        (["--model", "gpt-9"], "gpt-9"),
        (["--itrex-python", "no/python"], "--itrex-python no/python: it does not run"),
    ],
)
def test_refusals(
    words: list[str],
    message: str,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_latency.py", *words])
    assert script.main() == 2
    assert message in capsys.readouterr().err


def test_published_figures_are_per_core(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(model="distilbert", latency_ms=10.0, block="4x1", sparsity=80)
    engines = {
        "sparsec": {"met": True, "best": {"samples_per_s_per_core": 123.45}},
        "peer": {"met": False, "best": {"samples_per_s_per_core": 67.8}},
    }
    results = [
        {"seq": 32, "cores": 2, "engines": engines, "failures": []},
        {"seq": 33, "cores": 2, "engines": {"sparsec": engines["sparsec"]}, "failures": []},
    ]
    results[1]["failures"] = [{"engine": "peer", "setting": "", "reason": "signal 9"}]
    script.print_per_core(results, options)
    rows = [line for line in capsys.readouterr().out.splitlines() if "123.5" in line]
    assert "226.7" in rows[0]  # 5440 samples/s over 24 cores
    assert "misses" in rows[0]
    assert "226.7" not in rows[1]
    assert "fails" in rows[1]


def test_sparse_peers_are_searched_with_all_their_files(
    script: ModuleType, tmp_path: Path
) -> None:
    spec = tiny_spec(layers=1)
    here = Path(sys.executable)
    options = argparse.Namespace(
        folder=tmp_path, sparsity=80, deepsparse_python=here, itrex_python=here
    )
    (tmp_path / spec.name).mkdir()
    for name in ("dense", "1x1_80", "4x1_80", "1x4_80"):
        (tmp_path / spec.name / f"peer_deepsparse_{name}.onnx").touch()  # is not made again
    engines = script.remote_engines(spec, options, {"deepsparse": "1.8.0", "itrex": None})
    assert [(e.name, e.settings) for e in engines] == [
        ("DeepSparse 1.8.0", ("dense", "1x1_80", "4x1_80", "1x4_80"))
    ]
