"""Every peer gives the answers of the ONNX evaluator, and its int8 files are what they claim."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsec.errors import InvalidInput
from sparsec.target import core_cpus
from sparsec.tools.instances import LocalEngine, Setup, places_of
from sparsec.tools.peer_instances import PEER_ENGINES, peer_engines
from sparsec.tools.peer_models import (
    quantize_dynamic,
    quantize_static,
    with_fp32_tables,
    without_roundings,
)
from sparsec.tools.peers import PEERS, Arrays, Runner, onnxruntime_runner, openvino_runner
from sparsec.tools.turns import MIN_CALLS

CHANNELS = 32
SHAPES = [(1, 5), (3, 7)]


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    """scores = (x w + b) x^T: a linear layer and a product of two activations."""
    weight = (rng.standard_normal((CHANNELS, CHANNELS)) / np.sqrt(CHANNELS)).astype(np.float32)
    bias = rng.standard_normal(CHANNELS).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], "linear"),
        helper.make_node("Add", ["product", "b"], ["linear_out"], "bias"),
        helper.make_node("Transpose", ["x"], ["xt"], "transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["linear_out", "xt"], ["scores"], "scores_product"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", CHANNELS])
    outputs = [
        helper.make_tensor_value_info("linear_out", TensorProto.FLOAT, ["batch", "seq", CHANNELS]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", "seq", "seq"]),
    ]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph(nodes, "g", [x], outputs, constants)
    path = tmp_path / "model.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def feed(rng: np.random.Generator, shape: tuple[int, int]) -> Arrays:
    return {"x": rng.uniform(-1, 1, (*shape, CHANNELS)).astype(np.float32)}


def expected(model: Path, arrays: Arrays) -> Arrays:
    evaluator = ReferenceEvaluator(str(model))
    return dict(zip(evaluator.output_names, evaluator.run(None, arrays), strict=True))


@pytest.fixture(params=sorted(PEERS))
def runner(request: pytest.FixtureRequest) -> Runner:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return PEERS[request.param]


def test_peer_equals_evaluator_for_any_shape(
    runner: Runner, model: Path, rng: np.random.Generator
) -> None:
    name, run = runner(model, 1)
    if name.startswith("openvino"):  # its own choice may be bfloat16
        _, run = openvino_runner(model, 1, precision="f32")
    for shape in [*SHAPES, SHAPES[0]]:
        arrays = feed(rng, shape)
        got, wanted = run(arrays), expected(model, arrays)
        assert list(got) == list(wanted)
        for key in wanted:
            # Two sums of 32 products, |terms| below 1 * 8: 32 * 2**-24 relative to their size.
            np.testing.assert_allclose(got[key], wanted[key], atol=32 * 8 * 2.0**-23)


def test_peer_keeps_earlier_answers(runner: Runner, model: Path, rng: np.random.Generator) -> None:
    run = runner(model, 1)[1]
    first = run(feed(rng, SHAPES[0]))
    kept = {key: value.copy() for key, value in first.items()}
    run(feed(rng, SHAPES[0]))
    for key in kept:
        np.testing.assert_array_equal(first[key], kept[key])


def test_peer_refuses_what_is_no_model(runner: Runner, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(InvalidInput, match=r"broken\.onnx: .* refuses the model"):
        runner(path, 1)


@pytest.fixture(params=sorted(PEER_ENGINES))
def engine(request: pytest.FixtureRequest) -> Callable[[Path], LocalEngine]:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return PEER_ENGINES[request.param]


def test_instances_of_a_peer(
    engine: Callable[[Path], LocalEngine], model: Path, rng: np.random.Generator
) -> None:
    cpus = core_cpus()
    peer = engine(model)
    setups = [Setup(1, 1, 3), Setup(1, 1, 1), Setup(len(cpus), 1, 1), Setup(1, len(cpus), 2)]
    for setup in setups:
        places = places_of(setup, cpus)
        windows = peer.windows("", places, feed(rng, (setup.batch, 5)), 0)
        assert [len(window) for window in windows] == [MIN_CALLS] * setup.instances


def test_a_peer_needs_its_file() -> None:
    assert peer_engines(None, None) == []
    with pytest.raises(InvalidInput, match="--against openvino needs the ONNX file"):
        peer_engines(None, "openvino")


def test_threads_of_onnxruntime_stay_on_their_cpus(model: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    cpus = core_cpus()
    if len(cpus) < 2:
        pytest.skip("one core: there is no thread but the caller's")
    before = set(os.listdir("/proc/self/task"))
    _, run = onnxruntime_runner(model, len(cpus), cpus=cpus)
    # A thread goes to its CPU when it first runs; one that is not for computing goes to none.
    deadline = time.monotonic() + 20
    while (pinned := _cpus_of_threads(before)) != cpus[1:] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pinned == cpus[1:]
    assert run is not None  # alive, and so are its threads


def _cpus_of_threads(before: set[str]) -> list[int]:
    """Of the threads that are new and may use one CPU only."""
    places = []
    for thread in set(os.listdir("/proc/self/task")) - before:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            places.append(os.sched_getaffinity(int(thread)))
    return sorted(min(place) for place in places if len(place) == 1)


def test_peer_refuses_inputs_it_does_not_know(runner: Runner, model: Path) -> None:
    run = runner(model, 1)[1]
    with pytest.raises(InvalidInput, match=r"model\.onnx: .* refuses the"):
        run({"x": np.zeros((1, 5, CHANNELS + 1), np.float32)})


@pytest.mark.parametrize("attention", [False, True])
def test_static_file_quantizes_the_products_asked_for(
    attention: bool, runner: Runner, model: Path, rng: np.random.Generator
) -> None:
    output = model.with_name("int8.onnx")
    samples = feed(rng, (8, 6))
    quantize_static(model, output, samples, attention=attention)
    graph = onnx.load(output).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    inputs = {node.name: [makers.get(name) for name in node.input] for node in products}
    assert inputs["linear"] == ["DequantizeLinear"] * 2
    second = inputs["scores_product"]
    assert second == (["DequantizeLinear"] * 2 if attention else ["Add", "Transpose"])
    arrays = {"x": samples["x"][:1]}
    got, wanted = runner(output, 1)[1](arrays), expected(model, arrays)
    # Both operands are off by at most half a step, 1/255 for x in [-1, 1] and 1/254 of the largest
    # weight of a channel (below 1), over 32 channels.
    limit = CHANNELS * (1 / 255 + 1 / 254)
    np.testing.assert_allclose(got["linear_out"], wanted["linear_out"], atol=limit)
    assert np.abs(got["linear_out"] - wanted["linear_out"]).max() > 0


def test_dynamic_file_multiplies_integers(model: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the quantiser is ONNX Runtime's")
    output = model.with_name("int8.onnx")
    quantize_dynamic(model, output)
    kinds = [node.op_type for node in onnx.load(output).graph.node]
    assert "MatMulInteger" in kinds
    assert not list(output.parent.glob(".*.tmp"))


@pytest.mark.parametrize("attention", [False, True])
def test_without_roundings_a_quantised_file_is_fp32_again(
    attention: bool, runner: Runner, model: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip("onnxruntime", reason="the quantiser is ONNX Runtime's")
    quantised, output = model.with_name("int8.onnx"), model.with_name("fp32.onnx")
    quantize_static(model, quantised, feed(rng, (8, 6)), attention=attention)
    without_roundings(quantised, output)
    graph = onnx.load(output).graph
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in graph.node}
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used
    arrays = feed(rng, (1, 6))
    got, wanted = runner(output, 1)[1](arrays), expected(model, arrays)
    # Weights alone are rounded: half a step of 1/127 of the largest of a channel (below 1), times
    # x in [-1, 1] over 32 channels.
    limit = CHANNELS / 254
    np.testing.assert_allclose(got["linear_out"], wanted["linear_out"], atol=limit)


def test_tables_of_a_quantised_file_become_fp32_and_its_weights_stay(tmp_path: Path) -> None:
    tensor, node = numpy_helper.from_array, helper.make_node
    table = np.arange(-6, 6, dtype=np.int8).reshape(4, 3)
    scales = np.array([0.5, 1, 2, 4], np.float32)
    weight = np.arange(-3, 3, dtype=np.int8).reshape(3, 2)
    graph = helper.make_graph(
        [
            node("DequantizeLinear", ["table", "table_scale"], ["rows"], axis=0),
            node("Gather", ["rows", "ids"], ["x"], axis=0),
            node("DequantizeLinear", ["weight", "weight_scale"], ["w"]),
            node("MatMul", ["x", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        [
            tensor(table, "table"), tensor(scales, "table_scale"),
            tensor(weight, "weight"), tensor(np.float32(0.25), "weight_scale"),
        ],
    )  # fmt: skip
    path, output = tmp_path / "int8.onnx", tmp_path / "tables.onnx"
    opset = helper.make_opsetid("", 19)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    with_fp32_tables(path, output)
    made = onnx.load(output)
    kinds = [n.op_type for n in made.graph.node]
    assert kinds == ["Gather", "DequantizeLinear", "MatMul"]
    assert {t.name for t in made.graph.initializer} == {"rows", "weight", "weight_scale"}
    feed = {"ids": np.array([3, 1])}
    wanted = ReferenceEvaluator(str(path)).run(None, feed)
    np.testing.assert_array_equal(ReferenceEvaluator(str(output)).run(None, feed), wanted)
