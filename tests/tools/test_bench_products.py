"""The benchmark of products: what it measures is the product, in both engines."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec.errors import InvalidInput
from sparsec.target import Target

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_products")


def expected(one: Any, weight: np.ndarray, zero_point: int) -> np.ndarray:
    sums = (one.rows.astype(np.int64) - 128) @ weight.T.astype(np.int64)
    real = sums * (one.scale.astype(np.float64) * 0.02) + one.bias
    return np.clip(np.rint(real / one.out_scale) + zero_point, 0, 255)


@pytest.mark.parametrize("block", [None, (4, 1), (16, 4)])
def test_our_side_is_the_product(script: Any, block: Any, tmp_path: Path) -> None:
    one = script.Product(48, 40, 70)
    weight = one.weight(block, 80)
    one.ours(script.Kernels(Target.host(), tmp_path), weight)()
    wanted = expected(one, weight.data, script.Y_ZERO)
    # The reference rounds in float64: a tie of fp32 may fall on the other side.
    assert np.abs(one.result() - wanted).max() <= 1
    assert np.std(wanted) > 5
    share = np.count_nonzero(weight.data) / weight.data.size
    assert share == 1 if block is None else 0.05 < share < 0.45


def test_the_side_of_onednn_is_the_product(script: Any) -> None:
    peer = script.find_peer()
    if peer is None:
        pytest.skip("oneDNN is not installed")
    one = script.Product(48, 40, 70)
    weight = one.weight(None, 0)
    run, implementation = one.onednn(peer, weight)
    assert np.abs(run().astype(int) - expected(one, weight.data, script.Y_ZERO)).max() <= 1
    assert implementation


def test_a_record_per_weight(script: Any, tmp_path: Path) -> None:
    options = argparse.Namespace(blocks="4x1", zeros="80,90", seconds=0.0)
    kernels = script.Kernels(Target.host(), tmp_path)
    records = list(script.measure(script.Product(32, 64, 20), kernels, options, None, 1e9))
    assert [(r["block"], r["zeros"]) for r in records] == [("dense", 0), ("4x1", 80), ("4x1", 90)]
    for r in records:
        assert r["sparsec_us"] > 0
        assert r["ratio"] is None
    script.print_tables(records, {"cpu": "a", "isa": "b", "peak_isa": "c", "onednn": None})


def test_the_best_block_is_chosen_per_product(script: Any) -> None:
    records = [
        {"out": out, "in": 8, "tokens": 8, "block": block, "zeros": 80, "ratio": ratio}
        for out, block, ratio in ((1, "4x1", 4.0), (1, "16x1", 2.0), (2, "4x1", 1.0))
    ]
    table = script.means(records, "ratio", "title", "{:.2f}")
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["4x1", "16x1", "best block"]
    assert columns[2] == ["2.00", "2.00", "2.00"]  # sqrt(4 * 1), 2, sqrt(4 * 1)


@pytest.mark.parametrize(("text", "count"), [("4", 2), ("4x0", 2), ("4x1x1", 2), ("x", 2)])
def test_bad_sizes_are_refused(script: Any, text: str, count: int) -> None:
    with pytest.raises(InvalidInput, match="wanted AxB"):
        script.numbers(text, "x", "blocks", count)
