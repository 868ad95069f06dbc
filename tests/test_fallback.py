"""Which layers fall back to fp32, and that the measured error is that of the int8 graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.calibration import calibrate
from sparsec.errors import InvalidInput
from sparsec.fallback import SAMPLES, Accuracy, _difference, fall_back
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph
from sparsec.ir.types import DType
from sparsec.models.tiny import tiny_model
from sparsec.options import Calibration, CompileOptions
from sparsec.passes import (
    Quantization,
    attention_values,
    graph_pipeline,
    int8_pipeline,
    quantized_values,
)
from sparsec.passes.manager import PassManager
from sparsec.passes.quantize_tables import QuantizeTables
from sparsec.ranges import choose_range
from sparsec.target import Target

ALL_SMALL = QuantizeTables()  # tiny BERT has no table that is worth int8
ALL_LARGE = QuantizeTables(large_bytes=1)
LAYERS = 10  # of tiny BERT: four products and an attention in each of two layers


def sample(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.ones((6, 12), np.int64)
    mask[1, 7:] = 0
    zeros = np.zeros((6, 12), np.int64)
    ids = rng.integers(0, 100, (6, 12))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": zeros}


def fp32_graph() -> Graph:
    graph = import_model(tiny_model())
    PassManager(graph_pipeline()).run(graph)
    return graph


@pytest.fixture(scope="module")
def quantization() -> Quantization:
    graph = fp32_graph()
    names = [*quantized_values(graph), *attention_values(graph)]
    observed = calibrate(graph, [sample(1)], names)
    return Quantization({name: choose_range(o, "minmax") for name, o in observed.items()})


def measured(
    quantization: Quantization,
    max_error: float,
    tables: QuantizeTables = ALL_SMALL,
    attention: bool = True,
) -> Accuracy:
    graph, samples = fp32_graph(), [sample()]
    return fall_back(graph, quantization, samples, max_error, tables=tables, attention=attention)


def test_every_layer_is_listed_with_its_error_and_work(quantization: Quantization):
    found = measured(quantization, 0.9)
    assert len(found.layers) == LAYERS
    assert not found.fp32
    assert all(0 < x.error < 0.1 and x.macs_per_token > 0 for x in found.layers)
    assert found.error > max(x.error for x in found.layers) / 2
    assert {x.described()["precision"] for x in found.layers} == {"int8"}


def test_layers_fall_back_until_the_error_is_small_enough(quantization: Quantization):
    whole = measured(quantization, 0.9).error
    counts = []
    for share in (0.9, 0.6, 0.3):
        found = measured(quantization, share * whole)
        assert found.error <= share * whole
        counts.append(len(found.fp32))
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] < LAYERS


def test_nothing_is_int8_when_no_error_is_allowed(quantization: Quantization):
    found = measured(quantization, 1e-12)
    assert (found.error, len(found.fp32)) == (0.0, LAYERS)


def test_tables_count_and_are_the_last_to_leave(quantization: Quantization):
    whole = measured(quantization, 0.9, ALL_LARGE)
    (tables,) = (x for x in whole.layers if x.op == "embedding")
    assert 0 < tables.error < whole.error
    found = measured(quantization, 0.9 * whole.error, ALL_LARGE)
    assert found.error <= 0.9 * whole.error
    assert found.fp32
    assert tables.node not in found.fp32


def test_tables_that_alone_lose_too_much_leave_first(quantization: Quantization):
    (tables,) = (x for x in measured(quantization, 0.9, ALL_LARGE).layers if x.op == "embedding")
    found = measured(quantization, 0.9 * tables.error, ALL_LARGE)
    assert found.error <= 0.9 * tables.error
    assert tables.node in found.fp32


def test_attention_that_stays_fp32_is_not_listed(quantization: Quantization):
    layers = measured(quantization, 0.9, attention=False).layers
    assert {x.op for x in layers} == {"linear"}


def test_the_error_is_that_of_the_int8_graph(quantization: Quantization):
    """But for what rounding to fp32 does on the way: a number on the edge goes the other way."""
    error = measured(quantization, 0.9).error
    graph = fp32_graph()
    exact = run(graph, sample())
    PassManager(int8_pipeline(quantization)).run(graph)
    rounded = run(graph, sample())
    real = sample()["attention_mask"] == 1
    worst = 0.0
    for name, y in exact.items():
        a, b = (v[real] if v.ndim == 3 else v for v in (y, rounded[name]))
        worst = max(worst, float(np.linalg.norm(a - b) / np.linalg.norm(a)))
    assert worst == pytest.approx(error, rel=0.02)


def rotary_graph(rng: np.random.Generator) -> Graph:
    """One product whose queries and keys are turned before attention reads them."""
    graph, batch, seq = Graph("g"), symbol("batch"), symbol("seq")
    x = graph.add_input("x", DType.F32, (batch, seq, 8))
    tables = [graph.add_input(name, DType.F32, (1, seq, 8)) for name in ("cos", "sin")]
    w = graph.add_constant(rng.standard_normal((48, 8)).astype(np.float32), "w")
    x = graph.add("tanh", [x])  # calibration watches what is computed
    qkv = graph.add("linear", [x, w, None, None], {"activation": "none"}, name="qkv")
    size = {"heads": 2, "head_size": 8}
    q, k = (graph.add("rotary", [qkv, *tables], {**size, "offset": 16 * i}) for i in range(2))
    offsets = {"q_offset": 0, "k_offset": 0, "v_offset": 32}
    y = graph.add("attention", [q, k, qkv, None], {**size, "scale": 0.1, **offsets})
    graph.add_output("y", y)
    return graph


def test_attention_behind_a_rotary_embedding_counts() -> None:
    arrays = {"x": np.random.default_rng(1).standard_normal((2, 9, 8)).astype(np.float32)}
    angles = np.linspace(0, 3, 72).reshape(1, 9, 8)
    arrays |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    graph = rotary_graph(np.random.default_rng(0))
    names = [*quantized_values(graph), *attention_values(graph)]
    observed = calibrate(graph, [arrays], names)
    quantization = Quantization({n: choose_range(o, "minmax") for n, o in observed.items()})
    found = fall_back(graph, quantization, [arrays], 0.9, tables=ALL_SMALL)
    assert [x.op for x in found.layers if not x.stays_fp32] == ["linear", "attention"]
    exact = run(graph, arrays)["y"]
    PassManager(int8_pipeline(quantization)).run(graph)
    rounded = run(graph, arrays)["y"]
    assert found.error == pytest.approx(
        np.linalg.norm(rounded - exact) / np.linalg.norm(exact), rel=0.02
    )


def test_the_library_has_the_layers_that_the_report_names(tmp_path: Path):
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    np.savez(tmp_path / "samples.npz", **sample())
    calibration = Calibration(data=tmp_path / "samples.npz")
    result = sparsec.compile_model(
        tmp_path / "m.onnx",
        tmp_path / "m.so",
        precision="int8",
        calibration=calibration,
        max_error=0.008,
    )
    accuracy = result.report["accuracy"]
    assert accuracy["error"] <= 0.008
    named = {x["node"] for x in accuracy["layers"] if x["precision"] == "fp32"}
    made = {x["node"]: x["op"] for x in result.report["layers"]}
    assert named
    assert {made[n] for n in named} <= {"linear", "attention"}
    others = {x["node"] for x in accuracy["layers"] if x["precision"] == "int8"}
    assert {made[n] for n in others} <= {"linear_int8", "attention_int8", "embedding_int8"}
    outputs = sparsec.load(result.library)(sample())["last_hidden_state"]
    exact = run(import_model(tiny_model()), sample())["last_hidden_state"]
    real = sample()["attention_mask"] == 1
    off = np.linalg.norm((outputs - exact)[real]) / np.linalg.norm(exact[real])
    assert off < 1.1 * 0.008  # the library sums in another order than the oracle


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_an_attention_is_int8_where_its_products_are(
    quantization: Quantization, share: float
) -> None:
    """Whatever the bound: those that go to fp32 take the attention behind them along."""
    errors = sorted(x.error for x in measured(quantization, 0.9).layers)
    found = measured(quantization, errors[int(share * len(errors))])
    graph = fp32_graph()
    chosen = replace(quantization, fallback=found.fp32)
    PassManager(int8_pipeline(chosen)).run(graph)
    assert found.as_compiled(graph) == found


def test_attention_that_is_kept_by_name_is_fp32_and_not_measured(
    quantization: Quantization,
) -> None:
    graph = fp32_graph()
    names = [n.name for n in graph.nodes if n.op == "attention"]
    chosen = replace(quantization, keep_fp32=(names[0],))
    found = fall_back(graph, chosen, [sample()], 0.9, tables=ALL_SMALL)
    assert [x.node for x in found.layers if x.op == "attention"] == names[1:]
    (record,) = [r for r in PassManager(int8_pipeline(chosen)).run(graph)
                 if r["name"] == "quantize_attention"]  # fmt: skip
    assert record["notes"] == [f"{names[0]} stays fp32 inside: its name matches {names[0]!r}"]
    assert [n.name for n in graph.nodes if n.op == "attention"] == names[:1]


@pytest.mark.parametrize("options", [{"rest": "bf16"}, {"attention": "bf16"}])
def test_bf16_is_not_measured(options: dict[str, str]):
    with pytest.raises(InvalidInput, match="leave out either it or --rest bf16"):
        CompileOptions(
            Target.named("sapphirerapids"),
            precision="int8",
            calibration=Calibration(random=True),
            max_error=0.1,
            **options,
        )


@pytest.mark.parametrize("error", [0.0, -1.0, 1.5, float("nan")])
def test_bad_bounds_are_refused(error: float, tmp_path: Path):
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    with pytest.raises(InvalidInput, match="max-error"):
        sparsec.compile_model(
            tmp_path / "m.onnx",
            tmp_path / "m.so",
            precision="int8",
            calibration=Calibration(random=True),
            max_error=error,
        )


def test_a_bound_needs_samples(tmp_path: Path):
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    for options in ({"dynamic": True}, {}):
        with pytest.raises(InvalidInput, match="max-error"):
            sparsec.compile_model(
                tmp_path / "m.onnx",
                tmp_path / "m.so",
                precision="int8",
                max_error=0.1,
                **options,
            )


def masked_graph(rng: np.random.Generator) -> Graph:
    """A product, plus a mask that makes some of the results -inf."""
    graph, batch, seq = Graph("g"), symbol("batch"), symbol("seq")
    x = graph.add_input("x", DType.F32, (batch, seq, 8))
    mask = graph.add_input("mask", DType.F32, (batch, seq, 4))
    w = graph.add_constant(rng.standard_normal((4, 8)).astype(np.float32), "w")
    x = graph.add("tanh", [x])  # calibration watches what is computed
    y = graph.add("linear", [x, w, None, None], {"activation": "none"}, name="product")
    graph.add_output("y", graph.add("add", [y, mask]))
    return graph


def quantized_all(graph: Graph, batches: list[dict[str, np.ndarray]]) -> Quantization:
    observed = calibrate(graph, batches, quantized_values(graph))
    return Quantization({n: choose_range(o, "minmax") for n, o in observed.items()})


def test_results_that_are_infinite_alike_do_not_count(rng: np.random.Generator):
    mask = np.zeros((2, 3, 4), np.float32)
    mask[:, 1] = -np.inf
    arrays = {"x": rng.standard_normal((2, 3, 8)).astype(np.float32), "mask": mask}
    graph = masked_graph(rng)
    quantization = quantized_all(graph, [arrays])
    found = fall_back(graph, quantization, [arrays], 0.9, tables=ALL_SMALL)
    assert 0 < found.error < 0.1
    assert not found.fp32
    strict = fall_back(graph, quantization, [arrays], found.error / 2, tables=ALL_SMALL)
    assert strict.fp32 == {"product"}


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_result_that_only_int8_makes_infinite_is_too_much(value: float):
    exact = np.array([1.0, np.inf, np.nan, -np.inf])
    off = _difference(np.array([value, np.inf, np.nan, -np.inf]), exact)
    np.testing.assert_array_equal(off, [np.inf, 0, 0, 0])


def test_batches_of_one_sample_are_as_many_as_of_sixteen(rng: np.random.Generator):
    arrays = [
        {
            "x": rng.standard_normal((1, 3, 8)).astype(np.float32),
            "mask": np.zeros((1, 3, 4), np.float32),
        }
        for _ in range(SAMPLES + 5)
    ]
    graph = masked_graph(rng)
    quantization = quantized_all(graph, arrays)
    batches = iter(arrays)
    fall_back(graph, quantization, batches, 0.9, tables=ALL_SMALL)
    assert len(list(batches)) == 5
