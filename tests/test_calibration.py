"""Ranges from histograms, calibration through the oracle, and data that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.calibration import calibrate, load_calibration, random_batches
from sparsec.calibration_text import FIELDS, text_batches
from sparsec.errors import InvalidInput
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph
from sparsec.ir.types import DType
from sparsec.models.tiny import tiny_model
from sparsec.options import Calibration
from sparsec.passes import graph_pipeline, quantized_values
from sparsec.passes.manager import PassManager
from sparsec.passes.quantize import affine_u8
from sparsec.ranges import BINS, METHODS, Observation, choose_range

B, S = symbol("batch"), symbol("seq")


def observed(*parts: np.ndarray) -> Observation:
    observation = Observation()
    for part in parts:
        observation = observation.including(np.asarray(part, np.float32))
    return observation


# Histograms


def test_a_histogram_counts_every_value_once(rng):
    parts = [rng.standard_normal(1000) * scale for scale in (0.01, 1.0, 37.0, 0.1)]
    whole = observed(*parts)
    assert whole.counts.sum() == 4000
    values = np.concatenate(parts).astype(np.float32)
    assert (whole.low, whole.high) == (values.min(), values.max())
    assert np.abs(values).max() < BINS * whole.width <= 2 * np.abs(values).max()
    edges = (np.arange(2 * BINS + 1) - BINS) * whole.width
    np.testing.assert_array_equal(whole.counts, np.histogram(values, edges)[0])


def test_the_order_of_the_data_does_not_matter(rng):
    parts = [rng.standard_normal(500) * scale for scale in (1e-6, 1.0, 1e6)]
    there, back = observed(*parts), observed(*parts[::-1])
    assert there.width == back.width
    np.testing.assert_array_equal(there.counts, back.counts)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 2.0**-20, -(2.0**20), 1e30])
def test_a_single_value_is_in_the_histogram(value):
    whole = observed(np.full(3, value), np.zeros(2))
    assert whole.counts.sum() == 5


def test_no_values_change_nothing():
    assert observed(np.zeros(0)).is_empty


# Methods


def squared_error(values: np.ndarray, limits: tuple[float, float]) -> float:
    scale, zero_point = affine_u8(*limits)
    stored = np.clip(np.rint(values / scale) + zero_point, 0, 255)
    return float((((stored - zero_point) * scale - values) ** 2).mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["uniform", "normal", "positive", "negative", "constant"])
def test_a_range_lies_within_the_data(rng, method, shape):
    values = {
        "uniform": rng.uniform(-1, 3, 20000),
        "normal": rng.standard_normal(20000),
        "positive": rng.exponential(size=20000),
        "negative": -rng.exponential(size=20000),
        "constant": np.full(100, 0.7),
    }[shape].astype(np.float32)
    low, high = choose_range(observed(values), method)
    assert min(values.min(), 0) <= low <= high <= max(values.max(), 0)


@pytest.mark.parametrize("method", METHODS)
def test_evenly_spread_values_are_not_clipped(rng, method):
    low, high = choose_range(observed(rng.uniform(-1, 3, 100000)), method)
    assert -1 <= low < -0.93  # the search steps by 1/64 of an end
    assert 2.9 < high <= 3


def test_percentile_cuts_a_ten_thousandth():
    values = np.arange(100_000) / 100_000  # 5 values of 100000 on each side
    low, high = choose_range(observed(values), "percentile")
    bin_width = 1 / BINS
    assert low == pytest.approx(5e-5, abs=bin_width)
    assert high == pytest.approx(1 - 5e-5, abs=bin_width)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_a_rare_outlier_is_clipped(rng, method):
    values = np.append(rng.standard_normal(100_000), 60.0)
    low, high = choose_range(observed(values), method)
    assert high < 60.0
    assert low < -2.5
    assert choose_range(observed(values), "minmax")[1] == 60.0


def test_mse_has_the_least_error_of_all_methods(rng):
    for values in (
        rng.standard_normal(50_000),
        rng.laplace(size=50_000),
        rng.exponential(size=50_000),
    ):
        errors = {m: squared_error(values, choose_range(observed(values), m)) for m in METHODS}
        # centres of bins stand for their values: an eighth of a step, squared and over 12
        assert errors["mse"] <= min(errors.values()) * 1.01


def test_an_unknown_method_and_an_empty_histogram_are_refused():
    with pytest.raises(InvalidInput, match="no calibration method 'best'; use minmax, perc"):
        choose_range(observed(np.ones(3)), "best")
    with pytest.raises(InvalidInput, match="no value was observed"):
        choose_range(Observation(), "minmax")


# Calibration


@pytest.fixture
def fused() -> Graph:
    graph = import_model(tiny_model("bert"))
    PassManager(graph_pipeline()).run(graph)
    return graph


def test_every_value_that_is_quantised_is_observed(fused):
    names = quantized_values(fused)
    found = calibrate(fused, random_batches(fused, 20, [12]), names)
    assert list(found) == names
    for observation in found.values():
        assert observation.counts.sum() % (20 * 12 * 32) == 0
        assert observation.low < 0 < observation.high


def test_padding_does_not_count(fused):
    names = quantized_values(fused)
    (feed,) = random_batches(fused, 2, [12])
    short = {name: data[:, :7].copy() for name, data in feed.items()}
    feed["attention_mask"][:, 7:] = 0
    padded, exact = (calibrate(fused, [f], names) for f in (feed, short))
    for name in names:
        assert padded[name].counts.sum() == exact[name].counts.sum()
        # other sums of fp32: the ends differ by rounding
        assert padded[name].high == pytest.approx(exact[name].high, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "most", "kept"), [("mask", 1, 6), ("mask", 2, 10), ("ids", 1, 10)]
)
def test_only_a_mask_of_zeros_and_ones_hides_tokens(name, most, kept):
    graph = Graph("masked")
    x = graph.add_input("x", DType.F32, (B, S, 4))
    graph.add_input(name, DType.I64, (B, S))
    graph.add_output("y", graph.add("neg", [x]))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, most, 0, 0]])
    feed = {"x": np.ones((2, 5, 4), np.float32), name: mask}
    assert calibrate(graph, [feed], ["neg"])["neg"].counts.sum() == kept * 4


def test_no_batch_is_refused(fused):
    with pytest.raises(InvalidInput, match="no calibration sample"):
        calibrate(fused, [], quantized_values(fused))


SUMMARY = """
import hashlib, os, sys
os.sched_setaffinity(0, eval(sys.argv[1]))
from sparsec.calibration import calibrate, random_batches
from sparsec.frontend.onnx_import import import_model
from sparsec.models.build import build_model
from sparsec.models.tiny import tiny_spec
from sparsec.passes import graph_pipeline, quantized_values
from sparsec.passes.manager import PassManager

graph = import_model(build_model(tiny_spec(layers=1, hidden=192, ffn=768)))
PassManager(graph_pipeline()).run(graph)
found = calibrate(graph, random_batches(graph, 40, [50]), quantized_values(graph))
digest = hashlib.sha256()
for name, o in found.items():
    digest.update(repr((name, o.low, o.high, o.width)).encode() + o.counts.tobytes())
print(digest.hexdigest())
"""


def test_any_number_of_cores_observes_the_same():
    """BLAS counts the cores when it is loaded, so each number has a process of its own."""
    cores = os.sched_getaffinity(0)
    found = [
        subprocess.run(
            [sys.executable, "-c", SUMMARY, repr(some)], check=True, capture_output=True
        ).stdout
        for some in ({min(cores)}, cores)
    ]
    assert found[0] == found[1]


def test_data_that_overflow_are_refused():
    graph = Graph("wild")
    x = graph.add_input("x", DType.F32, (B, S, 4))
    y = graph.add("exp", [x])
    graph.add_output("y", y)
    with pytest.raises(InvalidInput, match="make %exp infinite or NaN"):
        calibrate(graph, [{"x": np.full((1, 2, 4), 1e4, np.float32)}], ["exp"])


def test_random_batches_are_valid_and_repeatable(fused):
    batches = list(random_batches(fused, 20, [500], seed=3))
    assert [len(b["input_ids"]) for b in batches] == [16, 4]
    assert batches[0]["input_ids"].shape[1] == 64  # the model has no more positions
    assert batches[0]["input_ids"].max() == 99
    assert set(np.unique(batches[0]["token_type_ids"])) == {0, 1}
    assert (batches[0]["attention_mask"] == 1).all()
    for feed, again in zip(batches, random_batches(fused, 20, [500], seed=3), strict=True):
        run(fused, feed)
        assert all(np.array_equal(feed[name], again[name]) for name in feed)


def test_random_batches_have_all_lengths_that_the_limits_allow():
    """Lengths beyond the table of positions would be cut; a limit may be a formula of sizes."""
    graph = Graph("limited")
    x = graph.add_input("x", DType.F32, (B, S))
    graph.add_output("y", graph.add("exp", [x]))
    graph.add_limit(S + 2, 34, "positions")
    shapes = [b["x"].shape for b in random_batches(graph, 20, [128, 32, 8, 1])]
    assert shapes == [(16, 32), (4, 32), (16, 8), (4, 8), (16, 1), (4, 1)]


def test_lengths_that_the_model_can_not_run_are_left_out():
    """It reads the third token."""
    graph = Graph("third")
    x = graph.add_input("x", DType.F32, (B, S, 4))
    third = graph.add_constant(np.array([2]))
    graph.add_output("y", graph.add("gather", [x, third], {"axis": 1}))
    assert [b["x"].shape for b in random_batches(graph, 2, [8, 4, 1])] == [(2, 8, 4), (2, 4, 4)]


def test_random_batches_keep_fixed_sizes():
    graph = Graph("fixed")
    x = graph.add_input("x", DType.F32, (4, 7, 3))
    graph.add_output("y", graph.add("exp", [x]))
    batches = list(random_batches(graph, 9, [100, 10]))
    assert [b["x"].shape for b in batches] == [(4, 7, 3)] * 3
    assert batches[0]["x"].std() > 0.5


@pytest.mark.parametrize("field", ["data", "text"])
def test_paths_may_be_texts(field, tmp_path):
    """A str once fell through to random samples."""
    tokenizer = {"tokenizer": "t.json"} if field == "text" else {}
    options = Calibration(**{field: "no/such/file"}, **tokenizer)
    assert getattr(options, field) == Path("no/such/file")
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    with pytest.raises(InvalidInput, match=r"no/such/file|t\.json"):
        sparsec.compile_model(
            tmp_path / "m.onnx", tmp_path / "m.so", precision="int8", calibration=options
        )


def test_an_input_that_a_product_reads_is_observed():
    graph = Graph("direct")
    x = graph.add_input("x", DType.F32, (B, S, 4))
    w = graph.add_constant(np.eye(4, dtype=np.float32), "w")
    graph.add_output("y", graph.add("linear", [x, w], {"activation": "none"}))
    found = calibrate(graph, [{"x": np.full((1, 2, 4), 3.0, np.float32)}], ["x"])
    assert choose_range(found["x"], "minmax") == (3.0, 3.0)


def scaled_graph() -> Graph:
    """A product of tokens times a number that is an input of the model."""
    graph = Graph("scaled")
    x, s = graph.add_input("x", DType.F32, (B, S, 4)), graph.add_input("s", DType.F32, ())
    w = graph.add_constant(np.eye(4, dtype=np.float32), "w")
    y = graph.add("linear", [graph.add("mul", [x, s]), w], {"activation": "none"})
    graph.add_output("y", y)
    return graph


def test_a_model_with_one_number_as_an_input(tmp_path):
    (feed,) = random_batches(scaled_graph(), 2, [5])
    assert (feed["x"].shape, feed["s"].shape) == ((2, 5, 4), ())
    np.savez(tmp_path / "c.npz", x=np.zeros((2, 5, 4), np.float32), s=np.float32(1))
    with pytest.raises(InvalidInput, match=r"input s of the model is one number, .* --dynamic"):
        load_calibration(tmp_path / "c.npz", scaled_graph())


# Text


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Of single words between two special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def text_graph(batch: int | str, seq: int | str) -> Graph:
    graph = import_model(tiny_model(), overrides={n: (batch, seq) for n in FIELDS})
    PassManager(graph_pipeline()).run(graph)
    return graph


def test_text_comes_in_batches_as_long_as_their_longest_line(tokenizer, tmp_path: Path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a b c\n\n  d  \n" + "e\n" * 15)
    graph = text_graph("batch", "seq")
    batches = list(text_batches(lines, tokenizer, graph))
    assert [b["input_ids"].shape for b in batches] == [(16, 5), (1, 3)]
    np.testing.assert_array_equal(batches[0]["input_ids"][1], [2, 7, 3, 0, 0])
    np.testing.assert_array_equal(batches[0]["attention_mask"][1], [1, 1, 1, 0, 0])
    assert calibrate(graph, batches, quantized_values(graph))


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (2, 2), (5, 1)])
def test_text_has_the_sizes_that_the_model_fixes(batch, count, tokenizer, tmp_path: Path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a b c d e f g h a b c\nb\nc\n")
    graph = text_graph(batch, 8)
    batches = list(text_batches(lines, tokenizer, graph))
    assert [b["input_ids"].shape for b in batches] == [(batch, 8)] * count
    rows = np.concatenate([b["input_ids"] for b in batches])
    np.testing.assert_array_equal(rows[0], [2, 4, 5, 6, 7, 8, 9, 3])
    np.testing.assert_array_equal(rows[1], [2, 5, 3, 0, 0, 0, 0, 0])
    assert calibrate(graph, batches, quantized_values(graph))


def test_text_is_cut_to_the_positions_that_there_are(tokenizer, tmp_path: Path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a " * 100)
    graph = text_graph("batch", "seq")
    (batch,) = text_batches(lines, tokenizer, graph)
    assert batch["input_ids"].shape == (1, 64)
    assert calibrate(graph, [batch], quantized_values(graph))


# Files

Arrays = dict[str, np.ndarray]


def arrays(samples: int = 20, seq: int = 6) -> Arrays:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: np.ones((samples, seq), np.int64) for name in names}


def test_files_are_read_in_batches(fused, tmp_path: Path):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays())
    feeds = load_calibration(path, fused)
    assert [len(f["input_ids"]) for f in feeds] == [16, 4]
    assert calibrate(fused, feeds, quantized_values(fused))


def without(name: str) -> Arrays:
    return {n: a for n, a in arrays().items() if n != name}


def changed(name: str, data: np.ndarray) -> Arrays:
    return {**arrays(), name: data}


BAD: list[tuple[Callable[[], Arrays], str]] = [
    (lambda: without("input_ids"), r"missing \['input_ids'\], unknown \[\]"),
    (lambda: {**arrays(), "ids": np.ones(3)}, r"missing \[\], unknown \['ids'\]"),
    (
        lambda: changed("input_ids", np.ones((20, 6), np.int32)),
        "input_ids must be int64, got int32",
    ),
    (lambda: changed("input_ids", np.ones((20, 6))), "input_ids must be int64, got float64"),
    (lambda: changed("input_ids", np.ones(20, np.int64)), "input_ids must have 2 axes"),
    (lambda: changed("input_ids", np.ones((20, 5), np.int64)), r"(?s)axis 1.*must be equal"),
    (lambda: changed("attention_mask", np.ones((3, 6), np.int64)), "attention_mask has 3 samples"),
    (lambda: arrays(0), "input_ids holds no sample"),
    (
        lambda: changed("input_ids", np.full((20, 6), 100)),
        "input_ids holds 100, its table has 100",
    ),
    (lambda: changed("token_type_ids", np.full((20, 6), -3)), "token_type_ids holds -3"),
    (lambda: arrays(20, 65), "seq is 65, at most 64"),
    (lambda: changed("input_ids", np.array([None])), "cannot be read"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_files_are_named(fused, tmp_path: Path, make: Callable[[], Arrays], message: str):
    path = tmp_path / "data.npz"
    np.savez(path, **make())
    with pytest.raises(InvalidInput, match=message) as found:
        load_calibration(path, fused)
    assert str(path) in str(found.value)


def test_files_that_are_no_archive(fused, tmp_path: Path):
    path = tmp_path / "data.npz"
    np.save(tmp_path / "one.npy", np.ones(3))
    for data in (b"a,b", (tmp_path / "one.npy").read_bytes(), b"PK\x03\x04 cut"):
        path.write_bytes(data)
        with pytest.raises(InvalidInput, match="write it with numpy"):
            load_calibration(path, fused)
    with pytest.raises(InvalidInput, match="No such file"):
        load_calibration(tmp_path / "none.npz", fused)


def fixed_floats() -> Graph:
    graph = Graph("floats")
    x = graph.add_input("x", DType.F32, (4, S, 3))
    graph.add_output("y", graph.add("exp", [x]))
    return graph


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.full((4, 2, 3), np.nan), "x holds NaN"),
        (np.full((4, 2, 3), np.inf), "x holds NaN or infinite"),
        (np.ones((4, 2, 5)), "x axis 2 must be 3, got 5"),
        (np.ones((6, 2, 3)), "6 samples; the model runs 4 at once"),
    ],
)
def test_bad_floats_and_fixed_sizes(tmp_path: Path, data: np.ndarray, message: str):
    path = tmp_path / "data.npz"
    np.savez(path, x=data.astype(np.float32))
    with pytest.raises(InvalidInput, match=message):
        load_calibration(path, fixed_floats())


def test_a_fixed_batch_is_kept(tmp_path: Path):
    np.savez(tmp_path / "data.npz", x=np.ones((8, 2, 3), np.float32))
    feeds = load_calibration(tmp_path / "data.npz", fixed_floats())
    assert [f["x"].shape for f in feeds] == [(4, 2, 3)] * 2


def test_text_that_is_no_utf8_is_refused(tokenizer: Path, fused: Graph, tmp_path: Path):
    (tmp_path / "t.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"t\.txt: cannot be read as text in UTF-8"):
        list(text_batches(tmp_path / "t.txt", tokenizer, fused))
    with pytest.raises(InvalidInput, match=r"none\.txt: cannot be read"):
        list(text_batches(tmp_path / "none.txt", tokenizer, fused))
