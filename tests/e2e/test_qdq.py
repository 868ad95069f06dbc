"""QDQ models from the file to the answer, against the oracle and against ONNX Runtime."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import sparsec
from sparsec.cli import main
from sparsec.errors import InvalidInput
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.models.build import build_model
from sparsec.models.tiny import tiny_model, tiny_spec
from sparsec.runtime import load

BATCH, SEQ = 4, 33
ENCODER_PRODUCTS = 8  # per layer one for q, k and v, one for the output and two of the FFN


def feed(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.ones((BATCH, SEQ), np.int64)
    mask[1, SEQ // 2 :] = 0
    return {
        "input_ids": rng.integers(0, 100, (BATCH, SEQ)),
        "attention_mask": mask,
        "token_type_ids": np.zeros((BATCH, SEQ), np.int64),
    }


def real(difference: np.ndarray) -> np.ndarray:
    """Its size at the tokens that are no padding."""
    return np.abs(difference[feed()["attention_mask"] == 1])


class Writer:
    """Quantises the products with constant weights of a model, as trainers' exports have it.

    `style`: "constants" holds weights as i8, "trained" as fp32 behind a QuantizeLinear,
    "transposed" as i8 in rows behind a Transpose, "u8" as u8 around 128.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        style: str,
        signed: bool,
        sample: dict[str, np.ndarray] | None = None,
    ):
        self.model, self.style = model, style
        self.weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.ranges = self._ranges(sample or feed(1))
        self.zero = np.int8(0) if signed else np.uint8(120)
        self.levels = 127 if signed else 120
        self.nodes: list[onnx.NodeProto] = []

    def write(self) -> onnx.ModelProto:
        for node in list(self.model.graph.node):
            if node.op_type == "MatMul" and node.input[1] in self.weights:
                scale = np.float32(self.ranges[node.input[0]] / self.levels)
                node.input[0] = self._activation(node.input[0], scale)
                node.input[1] = self._weight(node.input[1])
            self.nodes.append(node)
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        return self.model

    def _ranges(self, sample: dict[str, np.ndarray]) -> dict[str, float]:
        """The largest magnitude of each value that a product reads."""
        reads = sorted({n.input[0] for n in self.model.graph.node if n.op_type == "MatMul"})
        probe = onnx.ModelProto()
        probe.CopyFrom(self.model)
        probe.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in reads)
        found = run(import_model(probe), {k: v for k, v in sample.items() if self._has(k)})
        return {name: float(np.abs(found[name]).max()) for name in reads}

    def _has(self, name: str) -> bool:
        return any(i.name == name for i in self.model.graph.input)

    def _activation(self, x: str, scale: np.float32) -> str:
        return self._add("DequantizeLinear", [self._quantize(x, scale)], scale, self.zero)

    def _quantize(self, x: str, scale: np.float32) -> str:
        return self._add("QuantizeLinear", [x], scale, self.zero)

    def _weight(self, name: str) -> str:
        w = self.weights[name]
        scale = (np.abs(w).max(axis=0) / 127).astype(np.float32)
        numbers = np.rint(w / scale).astype(np.int8)
        zeros = np.zeros(scale.shape, np.int8)
        match self.style:
            case "constants":
                return self._add("DequantizeLinear", [self._constant(numbers)], scale, zeros, 1)
            case "trained":
                stored = self._add("QuantizeLinear", [name], scale, zeros, 1)
                return self._add("DequantizeLinear", [stored], scale, zeros, 1)
            case "transposed":
                rows = self._constant(np.ascontiguousarray(numbers.T))
                w_rows = self._add("DequantizeLinear", [rows], scale, zeros, 0)
                return self._node("Transpose", [w_rows], perm=[1, 0])
            case "u8":
                bytes_ = self._constant((numbers.astype(np.int16) + 128).astype(np.uint8))
                zeros = np.full(scale.shape, 128, np.uint8)
                return self._add("DequantizeLinear", [bytes_], scale, zeros, 1)
        raise AssertionError(self.style)

    def _add(
        self, op: str, inputs: list[str], scale: Any, zero: Any, axis: int | None = None
    ) -> str:
        attrs = {} if axis is None else {"axis": axis}
        operands = [*inputs, self._constant(scale), self._constant(zero)]
        return self._node(op, operands, **attrs)

    def _node(self, op: str, inputs: list[str], **attrs: Any) -> str:
        output = f"qdq_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attrs))
        return output

    def _constant(self, data: Any) -> str:
        name = f"qdq_const_{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
        return name


Compiled = tuple[dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture
def compile_and_run(tmp_path: Path) -> Callable[..., Compiled]:
    """`compile_and_run(model, **options)` -> (outputs, report)"""

    def go(model: onnx.ModelProto, **options: Any) -> Compiled:
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        result = sparsec.compile_model(path, path.with_suffix(".so"), **options)
        names = {i.name for i in model.graph.input}
        outputs = load(result.library)({k: v for k, v in feed().items() if k in names})
        return dict(outputs), dict(result.report)

    return go


def ops(report: dict[str, Any]) -> Counter[str]:
    return Counter(layer["op"] for layer in report["layers"])


def oracle(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    names = {i.name for i in model.graph.input}
    return run(import_model(model), {k: v for k, v in feed().items() if k in names})


@pytest.mark.parametrize(
    ("family", "style", "signed"),
    [
        ("bert", "constants", False),
        ("bert", "trained", True),
        ("distilbert", "transposed", True),
        ("distilbert", "u8", False),
    ],
)
def test_answers_are_those_of_the_model_as_it_was_imported(family, style, signed, compile_and_run):
    """Only products are rounded here, so all roundings of the file are kept."""
    model = Writer(tiny_model(family), style, signed).write()
    outputs, report = compile_and_run(model)
    found = ops(report)
    assert report["precision"] == "int8"
    assert found["linear_int8"] == ENCODER_PRODUCTS
    assert (found["quantize"], found["dequantize"]) == (0, 0)
    wanted = oracle(model)
    # fp32 sums in another order, as in ONNX Runtime, and GELU in straight pieces move a few values
    # over the edge between two numbers, one step apart, and that moves what is computed of them:
    # 98.8 % to 99.9 % are within a step, 0.2 to 0.26 of one apart in the mean. A wrong scale or
    # zero point moves all of them by many steps.
    step = 4 / 127  # normalised values are within -4..4, near enough
    difference = real(outputs["last_hidden_state"] - wanted["last_hidden_state"])
    assert (difference <= step).mean() > 0.98
    assert difference.mean() < step / 3


def test_products_over_integers_are_the_same_model(compile_and_run, monkeypatch):
    """SparseML's form for DeepSparse gives what the QDQ form gives, but for rounded biases."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    model = Writer(tiny_model("bert"), "constants", False).write()
    wanted, _ = compile_and_run(model)
    importlib.import_module("peer_forms").matmul_integer(model)
    assert Counter(n.op_type for n in model.graph.node)["MatMulInteger"] >= ENCODER_PRODUCTS
    outputs, report = compile_and_run(model)
    assert report["precision"] == "int8"
    assert ops(report)["linear_int8"] == ENCODER_PRODUCTS
    difference = real(outputs["last_hidden_state"] - wanted["last_hidden_state"])
    step = 4 / 127  # as above
    assert (difference <= step).mean() > 0.98
    assert difference.mean() < step / 3


def test_in_fp32_the_roundings_are_left_out(compile_and_run):
    plain = tiny_model("bert")
    model = Writer(tiny_model("bert"), "constants", False).write()
    outputs, report = compile_and_run(model, precision="fp32")
    assert report["precision"] == "fp32"
    assert not {"quantize", "dequantize", "linear_int8"} & set(ops(report))
    rounded = real(oracle(model)["last_hidden_state"] - oracle(plain)["last_hidden_state"])
    difference = real(outputs["last_hidden_state"] - oracle(plain)["last_hidden_state"])
    assert difference.mean() < rounded.mean()  # those of the weights are left


def test_layers_can_stay_fp32(compile_and_run):
    model = Writer(tiny_model("bert"), "constants", False).write()
    _, report = compile_and_run(model, keep_fp32=["*layer.1*"])
    assert (ops(report)["linear_int8"], ops(report)["linear"]) == (4, 5)


def test_int8_of_another_model_needs_calibration(compile_and_run):
    with pytest.raises(InvalidInput, match="needs the ranges"):
        compile_and_run(tiny_model("bert"), precision="int8")
    with pytest.raises(InvalidInput, match="keep-fp32"):
        compile_and_run(tiny_model("bert"), keep_fp32=["*"])


def test_the_command_needs_no_flag(tmp_path, capfd):
    path, report = tmp_path / "model.onnx", tmp_path / "report.json"
    onnx.save(Writer(tiny_model("bert"), "constants", True).write(), path)
    assert main(["compile", str(path), "-o", str(tmp_path / "m.so"), "--report", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["precision"] == "int8"
    notes = "\n".join(note for record in found["passes"] for note in record["notes"])
    assert "roundings to int8 are kept in front of products" in notes


# ONNX Runtime


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("onnxruntime", reason="it writes the models of these tests and runs them")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("roundings")


Quantise = Callable[..., Path]


@pytest.fixture
def quantise(tmp_path: Path, roundings: ModuleType) -> Quantise:
    """`quantise(kind, per_channel=..., everything=...)`: tiny BERT quantised by ONNX Runtime."""

    def go(kind: str, *, vocab: int = 100, **options: bool) -> Path:
        source, target = tmp_path / "source.onnx", tmp_path / "static.onnx"
        model = build_model(tiny_spec("bert", vocab=vocab))
        onnx.save(model, source)
        names = {i.name for i in model.graph.input}
        samples = [{k: v for k, v in feed(seed).items() if k in names} for seed in (1, 2)]
        roundings.quantise(source, target, samples, kind, **options)
        return target

    return go


def run_ort(model: onnx.ModelProto) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(["last_hidden_state"], feed())[0])


@pytest.mark.parametrize(
    ("kind", "per_channel", "everything"),
    [
        ("QUInt8", True, False),
        ("QUInt8", False, True),
        ("QInt8", False, False),
        ("QInt8", True, True),
    ],
)
def test_models_of_onnx_runtime(kind, per_channel, everything, quantise, compile_and_run):
    model = onnx.load(quantise(kind, per_channel=per_channel, everything=everything))
    outputs, report = compile_and_run(model)
    found = ops(report)
    assert found["linear_int8"] == ENCODER_PRODUCTS
    assert (found["attention"] + found["attention_int8"], found["layer_norm"]) == (2, 5)
    assert (found["quantize"], found["dequantize"]) == (0, 0)
    fp32 = oracle(tiny_model("bert"))["last_hidden_state"]
    ours = real(outputs["last_hidden_state"] - fp32).mean()
    theirs = real(run_ort(model) - fp32).mean()
    assert ours < theirs  # fewer roundings


def test_the_relu_of_a_head_is_there_though_the_file_has_none(
    tmp_path, roundings, compile_and_run
):
    """The quantiser removes it, and the product behind it is not over tokens: it stays fp32."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    names = ("input_ids", "attention_mask")
    samples = [{name: feed(seed)[name] for name in names} for seed in (1, 2)]

    class Samples(CalibrationDataReader):
        def get_next(self):
            return samples.pop() if samples else None

    source = tiny_model("distilbert", head="classify")
    onnx.save(source, tmp_path / "source.onnx")
    quantize_static(str(tmp_path / "source.onnx"), str(tmp_path / "q.onnx"), Samples())
    model = onnx.load(tmp_path / "q.onnx")
    assert not [n for n in model.graph.node if n.op_type == "Relu"]
    outputs, _ = compile_and_run(model)
    fp32 = oracle(source)["logits"]
    assert np.abs(outputs["logits"] - fp32).max() < 0.1 * np.abs(fp32).max()


def network(rng: np.random.Generator) -> onnx.ModelProto:
    """y = relu(x w + b) v"""
    arrays = {
        "w": rng.standard_normal((64, 96)),
        "b": rng.standard_normal(96),
        "v": rng.standard_normal((96, 48)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", kind, ["batch", "seq", 64])],
        [helper.make_tensor_value_info("y", kind, ["batch", "seq", 48])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_to_the_letter_it_is_onnx_runtime(quantise, compile_and_run):
    """ONNX Runtime rounds the results of products too, so all roundings are wanted here."""
    model = onnx.load(quantise("QUInt8", per_channel=True, everything=False))
    outputs, report = compile_and_run(model, all_roundings=True)
    assert ops(report)["linear_int8"] >= ENCODER_PRODUCTS
    theirs = run_ort(model)
    step = (theirs.max() - theirs.min()) / 255
    difference = real(outputs["last_hidden_state"] - theirs)
    # Sums in another order move a few values to the next number, and what depends on them.
    assert (difference <= step).mean() > 0.99
    assert (difference <= 1e-5).mean() > 0.5


@pytest.mark.parametrize(
    ("kind", "per_channel", "everything"),
    [("QUInt8", True, False), ("QInt8", False, False), ("QUInt8", False, True)],
)
def test_every_rounding_gives_the_number_of_onnx_runtime(
    kind, per_channel, everything, quantise, roundings, tmp_path
):
    """The table of words is 4 MB, as large as those that are stored in int8 by default."""
    path = quantise(kind, vocab=33_000, per_channel=per_channel, everything=everything)
    rows = roundings.agreement(path, feed(), tmp_path)
    assert len(rows) > 30
    assert not [row for row in rows if row.ours_far]
    # Sums on the edge between two numbers go to either side, in ONNX Runtime itself too.
    assert sum(row.ours for row in rows) <= 1e-3 * sum(row.numbers for row in rows)


def test_a_network_of_products_agrees_with_onnx_runtime(tmp_path, rng):
    """Where no rounding is dropped, answers differ by a step of the last layer at most."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the model")
    x = rng.standard_normal((8, 16, 64)).astype(np.float32)
    model = Writer(network(rng), "constants", False, {"x": x}).write()
    path = tmp_path / "network.onnx"
    onnx.save(model, path)
    result = sparsec.compile_model(path, path.with_suffix(".so"))
    assert ops(dict(result.report))["linear_int8"] == 2
    (ours,) = load(result.library)({"x": x}).values()
    (theirs,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    step = np.abs(theirs).max() / 127
    assert (np.abs(ours - theirs) <= step).mean() > 0.999


@pytest.mark.parametrize("keep_fp32", [False, True], ids=["i16", "fp32"])
def test_weights_that_are_further_from_their_zero_point_than_a_byte_holds(
    keep_fp32, tmp_path, rng
):
    """In int8 to the rounding of a sum, and in fp32, in front of which roundings are kept."""
    w = rng.integers(-128, 128, (33, 17)).astype(np.int8)
    w[0, :2] = -128, 127
    initializers = {
        "s": np.float32(0.02), "z": np.uint8(128), "w": w,
        "ws": np.float32(0.01), "wz": np.int8(5),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["r"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["v"]),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="product"),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", "s", 33])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", "s", 17])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in initializers.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    result = sparsec.compile_model(
        tmp_path / "m.onnx", tmp_path / "m.so", all_roundings=True,
        keep_fp32=("product*",) if keep_fp32 else (),
    )  # fmt: skip
    assert ("linear_int8" in ops(dict(result.report))) is not keep_fp32
    x = rng.standard_normal((2, 5, 33)).astype(np.float32)
    (theirs,) = ReferenceEvaluator(model).run(None, {"x": x})
    (ours,) = load(result.library)({"x": x}).values()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
