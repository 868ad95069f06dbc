"""The benchmark of models: what it reads from the command line and how it picks the best peer."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sparsec.errors import InvalidInput

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_models.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
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
    (row,) = script.rows(cell, times)
    assert row["sparsec"]["median_ms"] == 1.0
    assert row["peers"]["fast peer"]["setting"] == "two"
    assert row["peers"]["slow peer"]["median_ms"] == 8.0
    assert row["ratio"] == 4.0  # medians: 4 ms over 1 ms
    assert (row["block"], row["sparsity"], row["cosine"]) == ("4x1", 80, 0.75)
    assert len(row["settings"]) == 3


def test_no_peer_no_ratio(script: ModuleType) -> None:
    ours = script.Library("dense", 0, Path("model"), {"max_abs_error": 0.0, "cosine": 1.0})
    (row,) = script.rows(script.Cell(1, 32, 1, 1.0, "wall", (ours,), ()), [[0.001]])
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


def test_an_unknown_peer_is_refused(script: ModuleType) -> None:
    with pytest.raises(InvalidInput, match="known are onnxruntime, openvino"):
        script.installed_peers("onnxruntime,torch")
