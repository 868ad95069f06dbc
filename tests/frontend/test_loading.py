"""Ways that a model file holds its parts: external data, functions, subgraphs, old habits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import UnsupportedOp
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.types import DType
from sparsec.ir.verifier import verify

WEIGHT = np.arange(8, dtype=np.float32).reshape(4, 2)


def linear_model(weight: TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 2])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def check_linear(model: onnx.ModelProto | Path | str) -> None:
    graph = import_model(model)
    verify(graph)
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], x @ WEIGHT)


def test_a_path_a_string_and_a_model(tmp_path: Path):
    model = linear_model(numpy_helper.from_array(WEIGHT, "w"))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    for form in (model, path, str(path)):
        check_linear(form)


@pytest.mark.parametrize("size_threshold", [0, 1 << 20])
def test_external_data(tmp_path: Path, size_threshold: int):
    model = linear_model(numpy_helper.from_array(WEIGHT, "w"))
    path = tmp_path / "model.onnx"
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=size_threshold,
    )
    assert (tmp_path / "weights.bin").exists() == (size_threshold == 0)
    check_linear(path)


def test_initialisers_that_are_inputs_too_are_constants():
    model = linear_model(numpy_helper.from_array(WEIGHT, "w"))
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]))
    check_linear(model)


def test_weights_as_typed_fields():
    check_linear(linear_model(helper.make_tensor("w", TensorProto.FLOAT, (4, 2), WEIGHT.ravel())))


def test_nodes_out_of_order_and_dead_nodes():
    model = linear_model(numpy_helper.from_array(WEIGHT, "w"))
    nodes = model.graph.node
    nodes[0].input[0] = "z"
    nodes.append(helper.make_node("Identity", ["x"], ["z"]))
    nodes.append(helper.make_node("NoSuchOp", ["x"], ["unused"]))
    check_linear(model)


def test_an_unused_input_stays_an_input():
    model = linear_model(numpy_helper.from_array(WEIGHT, "w"))
    model.graph.input.append(helper.make_tensor_value_info("spare", TensorProto.INT64, ["B"]))
    assert [v.name for v in import_model(model).inputs] == ["x", "spare"]


def test_an_input_and_a_constant_may_be_outputs():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[B] x) => (float[B] x, float[2] c)
        <float[2] c = {1, 2}> { }"""
    )
    got = run(import_model(model), {"x": np.zeros(3, np.float32)})
    assert got["x"].shape == (3,)
    assert got["c"].tolist() == [1, 2]


@pytest.mark.parametrize(("kind", "outside"), [("float16", "f16"), ("bfloat16", "f32")])
def test_half_precision_is_computed_in_fp32(kind, outside):
    """Only inputs and outputs in fp16 stay what they are; for bf16 NumPy has no type."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g ({kind}[B] x) => ({kind}[B] y)
        {{ e = Exp (x) y = Mul (e, c) }}"""
    )
    stored = np.array([0.1], (DType.F16 if kind == "float16" else DType.BF16).numpy)
    model.graph.initializer.append(numpy_helper.from_array(stored, "c"))
    graph = import_model(model)
    assert str(graph.inputs[0].type) == str(graph.outputs[0].type) == f"{outside}[B]"
    (product,) = (n for n in graph.nodes if n.op == "mul")
    values = [v for v in (*product.inputs, product.output) if v is not None]
    assert {str(v.type.dtype) for v in values} == {"f32"}
    (c,) = graph.constants()
    assert c.data is not None
    assert c.data == stored.astype(np.float32)


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("where", ["raw", "typed", "external"])
def test_weights_in_half_precision(kind, where, tmp_path, rng):
    numbers = rng.standard_normal((3, 5)).astype(np.float32)
    number = getattr(onnx.TensorProto, kind)
    stored = numbers.astype(onnx.helper.tensor_dtype_to_np_dtype(number))
    if where == "typed":
        tensor = onnx.helper.make_tensor("w", number, (3, 5), stored.reshape(-1))
    else:
        tensor = onnx.numpy_helper.from_array(stored, "w")
    if where == "external":
        onnx.external_data_helper.set_external_data(tensor, "weights")
        (tmp_path / "weights").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[B, 3] x) => (float[B, 5] y)
        { f = Cast <to = 1> (w) y = MatMul (x, f) }"""
    )
    model.graph.initializer.append(tensor)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (w,) = import_model(path).constants()
    assert w.data is not None
    assert w.data.dtype == np.float32
    np.testing.assert_array_equal(w.data, stored.astype(np.float32))


FUNCTION = """
<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
g (float[B, 2] x) => (float[B] y) { y = local.scaled <factor = 3.0> (x) }
<domain: "local", opset_import: ["" : 17, "local" : 1]>
scaled <factor> (a) => (b) { f = Constant <value_float : float = @factor> ()
                             t = local.twice (a)  b = Mul (t, f) }
<domain: "local", opset_import: ["" : 17]>
twice (a) => (b) { b = Add (a, a) }
"""


def test_local_functions_and_their_attributes():
    graph = import_model(onnx.parser.parse_model(FUNCTION))
    x = np.array([[1.0, 2.0]], np.float32)
    assert run(graph, {"x": x})["y"].tolist() == [[6.0, 12.0]]
    assert [n.name for n in graph.nodes] == ["y/t/b", "y/b"]


BRANCH = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[B, 2] x) => (float[B] y) {
  s = Shape (x)  i = Constant <value_int = 1> ()  n = Gather (s, i)
  two = Constant <value_int = TWO> ()  c = Equal (n, two)
  y = If (c) <then_branch = then_g () => (float[N] a) { a = Neg (x) },
              else_branch = else_g () => (float[N] b) { t = Add (x, x)  b = Relu (t) }>
}
"""


@pytest.mark.parametrize(("number", "ops"), [("2", ["neg"]), ("3", ["add", "relu"])])
def test_if_with_a_known_condition_takes_its_branch(number: str, ops: list[str]):
    graph = import_model(onnx.parser.parse_model(BRANCH.replace("TWO", number)))
    assert [n.op for n in graph.nodes] == ops


def test_if_on_data_is_refused():
    model = onnx.parser.parse_model(BRANCH.replace("TWO", "2"))
    model.graph.node[-1].input[0] = "flag"
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    model.graph.input.append(flag)
    with pytest.raises(UnsupportedOp, match="the condition of If depends on the data"):
        import_model(model)


CONSTANTS = {
    "value": helper.make_tensor("t", TensorProto.FLOAT, [2], [1.0, 2.0]),
    "value_float": 1.5,
    "value_floats": [1.5, 2.5],
    "value_int": 3,
    "value_ints": [3, 4],
}


@pytest.mark.parametrize("form", CONSTANTS)
def test_every_form_of_constant(form: str):
    node = helper.make_node("Constant", [], ["y"], **{form: CONSTANTS[form]})
    kind = TensorProto.INT64 if "int" in form else TensorProto.FLOAT
    output = helper.make_tensor_value_info("y", kind, None)
    model = helper.make_model(helper.make_graph([node], "g", [], [output]))
    model.opset_import[0].version = 17
    item = CONSTANTS[form]
    expected = numpy_helper.to_array(item) if form == "value" else np.array(item)
    (got,) = run(import_model(model), {}).values()
    assert got.dtype == (np.int64 if "int" in form else np.float32)
    np.testing.assert_array_equal(got, expected)


MASK = np.triu(np.full((40, 40), -np.inf, np.float32), 1)


def test_a_mask_of_infinities_is_accepted():
    model = linear_model(numpy_helper.from_array(MASK, "w"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 40
    assert import_model(model).constants()[0].type.shape == (40, 40)
