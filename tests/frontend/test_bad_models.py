"""Damaged and unsupported models: each gives one clear error of ours, no traceback of onnx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import CompilerError, InvalidGraph, InvalidModel, UnsupportedOp
from sparsec.frontend.onnx_import import import_model


def sound() -> onnx.ModelProto:
    """Two nodes: dense = x @ w, y = relu(dense)."""
    weight = np.arange(40, dtype=np.float32).reshape(8, 5)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="dense"),
            helper.make_node("Relu", ["h"], ["y"], name="activation"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_the_model_that_is_broken_below_is_sound():
    assert [n.op for n in import_model(sound()).nodes] == ["matmul", "relu"]


def _weight(model: onnx.ModelProto, data: np.ndarray) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(data, "w"))


def cycle(m: onnx.ModelProto) -> None:
    m.graph.node[0].input[0] = "y"


def dangling(m: onnx.ModelProto) -> None:
    m.graph.node[1].input[0] = "nowhere"


def dangling_output(m: onnx.ModelProto) -> None:
    m.graph.output[0].name = "nowhere"


def unknown_op(m: onnx.ModelProto) -> None:
    m.graph.node[1].op_type = "Frobnicate"


def no_lowering(m: onnx.ModelProto) -> None:
    m.graph.node[1].op_type = "ConvTranspose"


def other_domain(m: onnx.ModelProto) -> None:
    m.graph.node[1].domain = "com.example"
    m.opset_import.append(helper.make_opsetid("com.example", 3))


def quantised(m: onnx.ModelProto) -> None:
    m.graph.node[1].op_type = "ConvInteger"


def nan_weight(m: onnx.ModelProto) -> None:
    data = np.ones((8, 5), np.float32)
    data[3, 2] = np.nan
    _weight(m, data)


def infinite_weight(m: onnx.ModelProto) -> None:
    data = np.arange(40, dtype=np.float32).reshape(8, 5)
    data[0, 1] = np.inf
    _weight(m, data)


def float8_weight(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].data_type = TensorProto.FLOAT8E4M3FN


def short_weight(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].raw_data = m.graph.initializer[0].raw_data[:-4]


def short_typed_weight(m: onnx.ModelProto) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8, 5], float_data=[1.0] * 9)
    m.graph.initializer[0].CopyFrom(tensor)


def wrong_shape(m: onnx.ModelProto) -> None:
    _weight(m, np.ones((7, 5), np.float32))


def wrong_dtype(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def text_input(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


def no_dtype(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.elem_type = 0


def unknown_dtype(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.elem_type = 99


def no_shape(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.ClearField("shape")


def empty_dim(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 0


def sequence_input(m: onnx.ModelProto) -> None:
    m.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [2]))


def no_outputs(m: onnx.ModelProto) -> None:
    del m.graph.output[:]


def duplicate_value(m: onnx.ModelProto) -> None:
    m.graph.node.append(helper.make_node("Neg", ["x"], ["h"], name="second"))


def duplicate_input(m: onnx.ModelProto) -> None:
    m.graph.input.append(m.graph.input[0])


def duplicate_initialiser(m: onnx.ModelProto) -> None:
    m.graph.initializer.append(m.graph.initializer[0])


def duplicate_output(m: onnx.ModelProto) -> None:
    m.graph.output.append(m.graph.output[0])


def sparse_weight(m: onnx.ModelProto) -> None:
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [3])
    del m.graph.initializer[:]
    m.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8, 5]))


def missing_operand(m: onnx.ModelProto) -> None:
    del m.graph.node[0].input[1]


def missing_attribute(m: onnx.ModelProto) -> None:
    m.graph.node[1].op_type = "Cast"


def wrong_attribute(m: onnx.ModelProto) -> None:
    m.graph.node[1].op_type = "Transpose"
    m.graph.node[1].attribute.append(helper.make_attribute("perm", 1.5))


def bad_axis(m: onnx.ModelProto) -> None:
    m.graph.node[1].op_type = "Softmax"
    m.graph.node[1].attribute.append(helper.make_attribute("axis", 2))


def old_opset(m: onnx.ModelProto) -> None:
    m.opset_import[0].version = 9


def future_opset(m: onnx.ModelProto) -> None:
    m.opset_import[0].version = 999


def external_without_path(m: onnx.ModelProto) -> None:
    tensor = m.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")


def loop(m: onnx.ModelProto) -> None:
    m.graph.node[1].op_type = "Scan"


Break = Callable[[onnx.ModelProto], None]

CASES: list[tuple[Break, type[CompilerError], str]] = [
    (cycle, InvalidModel, r"node '(dense|activation)' \(\w+\) is part of a cycle"),
    (dangling, InvalidModel, r"node 'activation' \(Relu\) reads 'nowhere'"),
    (dangling_output, InvalidModel, "nothing produces the output 'nowhere'"),
    (unknown_op, UnsupportedOp, r"node 'activation' \(Frobnicate, opset 17\): ONNX has no op"),
    (
        no_lowering,
        UnsupportedOp,
        r"node 'activation' \(ConvTranspose, opset 17\): .* no lowering; rewrite",
    ),
    (other_domain, UnsupportedOp, r"com.example.Relu, opset 3\): .* not an ONNX standard op"),
    (quantised, UnsupportedOp, "compile the float32 model"),
    (nan_weight, InvalidModel, "initialiser 'w' has 1 NaN of 40 elements"),
    (infinite_weight, InvalidModel, "initialiser 'w' has 1 infinite of 40 elements"),
    (float8_weight, UnsupportedOp, "initialiser 'w' has the element type FLOAT8E4M3FN"),
    (
        short_weight,
        InvalidModel,
        r"'w' has the shape \[8, 5\] of float32, 160 bytes, .* 156 ",
    ),
    (short_typed_weight, InvalidModel, "initialiser 'w' has data that does not fit its shape"),
    (wrong_shape, InvalidGraph, r"node 'dense' \(MatMul, opset 17\): .* \[7, 5\]: 8 and 7"),
    (wrong_dtype, InvalidGraph, "dtypes f64 and f32 differ"),
    (text_input, UnsupportedOp, "input 'x' has the element type STRING"),
    (no_dtype, UnsupportedOp, "input 'x' has the element type UNDEFINED"),
    (unknown_dtype, UnsupportedOp, "input 'x' has the element type number 99"),
    (no_shape, InvalidModel, "input 'x' has no shape; give one"),
    (empty_dim, UnsupportedOp, "input 'x' has the size 0 on axis 1"),
    (sequence_input, UnsupportedOp, "input 'x' is sequence_type"),
    (no_outputs, InvalidModel, "has no outputs"),
    (duplicate_value, InvalidModel, r"node 'second' \(Neg\) produces 'h', which node 'dense'"),
    (duplicate_input, InvalidModel, "two inputs have the name 'x'"),
    (duplicate_initialiser, InvalidModel, "two initialisers have the name 'w'"),
    (duplicate_output, InvalidModel, "two outputs have the name 'y'"),
    (sparse_weight, UnsupportedOp, "initialiser 'w' is a sparse tensor; store it densely"),
    (missing_operand, InvalidModel, r"node 'dense' .* operand 1 is required and absent"),
    (missing_attribute, InvalidModel, "the attribute 'to' is required"),
    (wrong_attribute, InvalidModel, r"node 'activation' \(Transpose, opset 17\) is malformed"),
    (bad_axis, InvalidModel, "axis 2 does not exist: the operand has 2 axes"),
    (old_opset, UnsupportedOp, "uses opset 9; opsets 11 to"),
    (future_opset, UnsupportedOp, "uses opset 999"),
    (external_without_path, InvalidModel, "'w' is in the external file 'w.bin'; give the path"),
    (loop, UnsupportedOp, "Scan has no lowering"),
]


@pytest.mark.parametrize(
    ("break_it", "error", "message"), CASES, ids=[c[0].__name__ for c in CASES]
)
def test_the_error_names_the_place(break_it: Break, error: type[CompilerError], message: str):
    model = sound()
    break_it(model)
    with pytest.raises(error, match=message):
        import_model(model)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(InvalidModel, match=r"no\.onnx cannot be read: No such file"):
        import_model(tmp_path / "no.onnx")


@pytest.mark.parametrize("raw", [b"", b"hello world\n" * 20, bytes(range(256)) * 8, b"PK\x03\x04"])
def test_not_a_model(tmp_path: Path, raw: bytes):
    path = tmp_path / "text.onnx"
    path.write_bytes(raw)
    with pytest.raises(InvalidModel, match="is not an ONNX model, or it is truncated"):
        import_model(path)


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path):
    raw = sound().SerializeToString()
    path = tmp_path / "cut.onnx"
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(InvalidModel):
            import_model(path)


def external(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(sound(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def test_missing_external_data(tmp_path: Path):
    path = external(tmp_path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InvalidModel, match=r"initialiser 'w' is in the external file .*w\.bin"):
        import_model(path)


def test_truncated_external_data(tmp_path: Path):
    path = external(tmp_path)
    data = tmp_path / "w.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InvalidModel, match=r"needs bytes 0 to 160 of .* has only 159"):
        import_model(path)


@pytest.mark.parametrize("location", ["../w.bin", "/w.bin", ""])
def test_external_data_outside_the_folder(tmp_path: Path, location: str):
    model = onnx.load(external(tmp_path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModel, match="outside its folder"):
        import_model(path)


@pytest.mark.parametrize("key", ["offset", "length"])
def test_bad_positions_of_external_data(tmp_path: Path, key: str):
    model = onnx.load(external(tmp_path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = "-4"
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModel, match="initialiser 'w'"):
        import_model(path)


def test_a_function_that_calls_itself():
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[B] x) => (float[B] y) { y = local.again (x) }
        <domain: "local", opset_import: ["" : 17, "local" : 1]>
        again (a) => (b) { b = local.again (a) }"""
    )
    with pytest.raises(InvalidModel, match="'again' calls itself"):
        import_model(model)
