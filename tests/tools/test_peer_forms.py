"""The forms for DeepSparse and ITREX mean what the model means that they are made of."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.models.files import write_model
from sparsec.models.registry import Family
from sparsec.models.tiny import tiny_model, tiny_spec
from sparsec.tools.peer_models import quantize_static
from sparsec.tools.peers import Arrays, onnxruntime_runner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHANNELS = 32
SAMPLES = (4, 24)

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peer_forms")


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    """scores = (x w + b) x^T, and a Gemm of the first token: each product that there is."""
    weight = rng.standard_normal((2, CHANNELS, CHANNELS)) / np.sqrt(CHANNELS)
    bias = rng.standard_normal((2, CHANNELS)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], "linear"),
        helper.make_node("Add", ["b", "product"], ["linear_out"], "bias"),
        helper.make_node("Transpose", ["x"], ["xt"], "transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["linear_out", "xt"], ["scores"], "scores_product"),
        helper.make_node("Gather", ["x", "first"], ["token"], "gather", axis=1),
        helper.make_node("Gemm", ["token", "v", "c"], ["pooled"], "pooler", transB=1),
    ]
    tokens = ["batch", "seq"]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (
            ("x", [*tokens, CHANNELS]),
            ("linear_out", [*tokens, CHANNELS]),
            ("scores", [*tokens, "seq"]),
            ("pooled", ["batch", CHANNELS]),
        )
    ]
    constants = [
        numpy_helper.from_array(weight[0].astype(np.float32), "w"),
        numpy_helper.from_array(weight[1].astype(np.float32), "v"),
        numpy_helper.from_array(bias[0], "b"),
        numpy_helper.from_array(bias[1], "c"),
        numpy_helper.from_array(np.array(0), "first"),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    path = tmp_path / "model.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def scales_of(model: onnx.ModelProto, product: str) -> list[np.ndarray]:
    """Of the two quantised operands of a product."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    node = next(node for node in model.graph.node if node.name == product)
    return [constants[makers[name].input[1]] for name in node.input[:2]]


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_integer_form_equals_the_qdq_file(
    forms: ModuleType, model: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    arrays = {"x": rng.uniform(-1, 1, (3, 7, CHANNELS)).astype(np.float32)}
    qdq, integer = tmp_path / "qdq.onnx", tmp_path / "integer.onnx"
    quantize_static(model, qdq, arrays, attention=True)
    changed = onnx.load(qdq)
    forms.matmul_integer(changed)
    onnx.checker.check_model(changed)
    onnx.save(changed, integer)
    found = kinds(changed)
    assert found["MatMulInteger"] == 3
    assert found["Add"] == 2  # the biases, in int32
    assert not found.keys() & {"MatMul", "Gemm"}

    wanted, got = (onnxruntime_runner(path, 1)[1](arrays) for path in (qdq, integer))
    # A bias is rounded to a step of the sums: half a step. Sums of 32 products and a bias, of
    # 24 bits each, whose terms are below 4 in magnitude: 2**-24 of each partial sum.
    rounding = CHANNELS * CHANNELS * 4 * 2.0**-24
    source = onnx.load(qdq)
    for name, product in (("linear_out", "linear"), ("pooled", "pooler")):
        x_scale, w_scale = scales_of(source, product)
        error = np.abs(got[name] - wanted[name])
        assert (error <= 0.5 * x_scale * w_scale + rounding).all()
    # An operand that the rounding of the bias moved is at most one step of its own off.
    step, x_step = scales_of(source, "scores_product")
    most = CHANNELS * step * (1 + x_step)  # |x| <= 1, rounded
    assert np.abs(got["scores"] - wanted["scores"]).max() <= most + rounding


def test_a_wrong_bias_would_be_seen(
    forms: ModuleType, model: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The tolerance above is far below what a bias of one column is."""
    arrays = {"x": rng.uniform(-1, 1, (3, 7, CHANNELS)).astype(np.float32)}
    quantize_static(model, tmp_path / "qdq.onnx", arrays, attention=True)
    x_scale, w_scale = scales_of(onnx.load(tmp_path / "qdq.onnx"), "linear")
    bias = next(t for t in onnx.load(model).graph.initializer if t.name == "b")
    assert np.median(np.abs(numpy_helper.to_array(bias))) > 100 * np.max(x_scale * w_scale)


@pytest.fixture(params=["bert", "distilbert"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Arrays]:
    family: Family = request.param
    spec, path = tiny_spec(family), tmp_path / "encoder.onnx"
    write_model(tiny_model(family, opset=14), path)
    tokens = np.random.default_rng(0).integers(0, spec.vocab, SAMPLES)
    mask = np.ones(SAMPLES, np.int64)
    mask[1:, SAMPLES[1] // 2 :] = 0
    arrays = {"input_ids": tokens, "attention_mask": mask}
    if spec.has_token_types:
        arrays["token_type_ids"] = np.zeros(SAMPLES, np.int64)
    return path, arrays


def test_all_products_of_an_encoder_are_over_the_integers(
    forms: ModuleType, encoder: tuple[Path, Arrays], tmp_path: Path
) -> None:
    path, arrays = encoder
    qdq = tmp_path / "qdq.onnx"
    quantize_static(path, qdq, arrays, attention=True)
    before, after = onnx.load(qdq), onnx.load(qdq)
    forms.matmul_integer(after)
    onnx.checker.check_model(after)
    products, found = kinds(before), kinds(after)
    assert found["MatMulInteger"] == products["MatMul"] + products["Gemm"]
    assert not found.keys() & {"MatMul", "Gemm"}
    # Queries, keys and values read one quantised tensor.
    inputs = [node.input[0] for node in after.graph.node if node.op_type == "QuantizeLinear"]
    assert len(set(inputs)) == len(inputs)


def test_itrex_spelling_changes_no_bit(
    forms: ModuleType, encoder: tuple[Path, Arrays], tmp_path: Path
) -> None:
    path, arrays = encoder
    changed = onnx.load(path)
    forms.itrex_spelling(changed)
    onnx.checker.check_model(changed)
    onnx.save(changed, tmp_path / "changed.onnx")
    wanted = onnxruntime_runner(path, 1)[1](arrays)
    got = onnxruntime_runner(tmp_path / "changed.onnx", 1)[1](arrays)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array)


def test_itrex_spelling_is_that_of_its_exporter(
    forms: ModuleType, encoder: tuple[Path, Arrays]
) -> None:
    path, arrays = encoder
    changed = onnx.load(path)
    forms.itrex_spelling(changed)
    constants = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    makers = {node.output[0]: node for node in changed.graph.node}
    order = [name for name in forms.ITREX_INPUTS if name in arrays]
    assert [value.name for value in changed.graph.input] == order
    axes = [constants[n.input[1]] for n in changed.graph.node if n.op_type == "Unsqueeze"]
    assert axes
    assert all(axis.size == 1 for axis in axes)
    conditions = [n.input[0] for n in changed.graph.node if n.op_type == "Where"]
    assert all(makers[name].op_type == "Cast" for name in conditions)
    used = {name for node in changed.graph.node for name in node.input}
    assert constants.keys() <= used
    assert changed.ir_version <= forms.ITREX_IR_VERSION
