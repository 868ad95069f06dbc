"""QuantizeLinear and DequantizeLinear: what they become, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.graph import Graph
from sparsec.ir.types import QuantParams

NEWEST = onnx.defs.onnx_opset_version()
WEIGHT = np.array([[-127, 5], [0, 127], [64, -3]], np.int8)  # [k=3, m=2]
SCALES = np.array([0.5, 0.1], np.float32)


def model(
    nodes: list[onnx.NodeProto], opset: int = 21, shape: tuple[int, ...] = (2, 3), **arrays: Any
) -> onnx.ModelProto:
    """x -> y; `arrays` are initialisers, given as arrays or tensors."""
    tensors = [
        a if isinstance(a, TensorProto) else numpy_helper.from_array(np.asarray(a), name)
        for name, a in arrays.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def node(op: str, inputs: str, output: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attrs)


def activation(opset: int = 21, scale: Any = None, zero_point: Any = None) -> onnx.ModelProto:
    """y = dequantize(quantize(x)), with a scale of 0.1 when none is given"""
    scale = np.float32(0.1) if scale is None else scale
    names = "s" if zero_point is None else "s z"
    nodes = [
        node("QuantizeLinear", f"x {names}", "q"),
        node("DequantizeLinear", f"q {names}", "y"),
    ]
    arrays = {"s": scale} if zero_point is None else {"s": scale, "z": zero_point}
    return model(nodes, opset, **arrays)


def weight(**changes: Any) -> onnx.ModelProto:
    """y = x @ dequantize(w)"""
    attrs = {"axis": 1, **changes.pop("attrs", {})}
    arrays = {"w": WEIGHT, "s": SCALES, **changes}
    names = "w s z" if "z" in arrays else "w s"
    nodes = [node("DequantizeLinear", names, "d", **attrs), node("MatMul", "x d", "y")]
    return model(nodes, **arrays)


def the_weight(graph: Graph) -> tuple[np.ndarray, QuantParams | None]:
    (product,) = [n for n in graph.nodes if n.op == "matmul"]
    data = product.input(1).data
    assert data is not None
    return data, product.input(1).type.quant


@pytest.mark.parametrize("opset", [11, 13, 19, 21, NEWEST])
@pytest.mark.parametrize(
    "zero_point", [None, np.uint8(7), np.int8(-3), np.uint16(999), np.int16(-3)], ids=str
)
def test_activations_become_ops_that_round_as_the_standard_says(opset, zero_point, rng):
    graph = import_model(activation(opset, zero_point=zero_point))
    assert [n.op for n in graph.nodes] == ["quantize", "dequantize"]
    x = rng.uniform(-30, 30, (2, 3)).astype(np.float32)
    limits = np.iinfo(np.uint8 if zero_point is None else zero_point.dtype)
    zero = 0 if zero_point is None else int(zero_point)
    stored = np.clip(np.rint(x / np.float32(0.1)) + zero, limits.min, limits.max)
    wanted = (stored - zero).astype(np.float32) * np.float32(0.1)
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], wanted)


@pytest.mark.parametrize("output_dtype", [TensorProto.INT8, TensorProto.UINT8])
def test_the_type_may_be_an_attribute(output_dtype):
    nodes = [
        node("QuantizeLinear", "x s", "q", output_dtype=output_dtype),
        node("DequantizeLinear", "q s", "y"),
    ]
    graph = import_model(model(nodes, s=np.float32(0.1)))
    wanted = "i8" if output_dtype == TensorProto.INT8 else "u8"
    assert str(graph.nodes[0].attrs["dtype"]) == wanted


def test_weights_per_channel_remember_their_scales():
    data, quant = the_weight(import_model(weight()))
    np.testing.assert_array_equal(data, WEIGHT * SCALES)
    assert quant == QuantParams(tuple(SCALES.tolist()), (0, 0), 1)


def test_weights_of_16_bits_are_numbers():
    """Of which no int8 product is made as they are."""
    w = WEIGHT.astype(np.int16) * 250
    nodes = [node("DequantizeLinear", "w s z", "d", axis=1), node("MatMul", "x d", "y")]
    zeros = np.array([0, -30000], np.int16)
    data, quant = the_weight(import_model(model(nodes, w=w, s=SCALES, z=zeros)))
    np.testing.assert_array_equal(data, (w.astype(np.float32) - zeros) * SCALES)
    assert quant is None


def test_weights_in_blocks_are_numbers():
    scales = np.array([[0.5, 0.1], [2.0, 3.0]], np.float32)
    changes = {"s": scales, "z": np.array([[1, 2], [3, -4]], np.int8)}
    data, quant = the_weight(import_model(weight(attrs={"block_size": 2, "axis": 0}, **changes)))
    rows = [0, 0, 1]
    np.testing.assert_array_equal(data, (WEIGHT - changes["z"][rows]) * scales[rows])
    assert quant is None


def test_a_negative_axis_counts_from_the_end():
    assert the_weight(import_model(weight(attrs={"axis": -1})))[1].axis == 1


def test_the_axis_follows_a_transpose():
    nodes = [
        node("DequantizeLinear", "w s", "d", axis=0),
        node("Transpose", "d", "t", perm=[1, 0]),
        node("MatMul", "x t", "y"),
    ]
    data, quant = the_weight(import_model(model(nodes, w=WEIGHT.T.copy(), s=SCALES)))
    np.testing.assert_array_equal(data, WEIGHT * SCALES)
    assert quant.axis == 1


def test_gemm_with_a_transposed_weight_and_an_int32_bias():
    nodes = [
        node("DequantizeLinear", "w s", "d", axis=0),
        node("DequantizeLinear", "b t", "c", axis=0),
        node("Gemm", "x d c", "y", transB=1),
    ]
    bias, bias_scale = np.array([100, -7], np.int32), SCALES * np.float32(0.01)
    graph = import_model(model(nodes, w=WEIGHT.T.copy(), s=SCALES, b=bias, t=bias_scale))
    assert [n.op for n in graph.nodes] == ["matmul", "add"]
    assert the_weight(graph)[1].axis == 1
    bias_value = next(v for v in graph.nodes[1].inputs if v.is_constant)
    np.testing.assert_array_equal(bias_value.data, bias.astype(np.float32) * bias_scale)
    assert bias_value.type.quant is None


def test_weights_that_are_quantised_in_the_model():
    """fp32 -> QuantizeLinear -> DequantizeLinear, as quantisation-aware training writes it."""
    nodes = [
        node("QuantizeLinear", "w s z", "q", axis=1),
        node("DequantizeLinear", "q s z", "d", axis=1),
        node("MatMul", "x d", "y"),
    ]
    w = np.array([[1.0, 0.04], [-70.0, 0.06], [0.25, 99.0]], np.float32)
    zeros = np.zeros(2, np.int8)
    data, quant = the_weight(import_model(model(nodes, w=w, s=SCALES, z=zeros)))
    # 0.5 steps round to the even 0; -140 steps and 990 steps are cut off.
    numbers = np.array([[2, 0], [-128, 1], [0, 127]])
    np.testing.assert_array_equal(data, numbers.astype(np.float32) * SCALES)
    assert quant.axis == 1


def test_the_lowest_number_stays_finite():
    """-3.4e38 in 127 steps is beyond fp32 by its scale's rounding; 0 * -inf would be NaN."""
    scale = np.float32(np.finfo(np.float32).max / 127) * np.float32(1.000001)
    nodes = [node("DequantizeLinear", "m s", "d"), node("Mul", "x d", "y")]
    graph = import_model(model(nodes, m=np.int8(-127), s=scale))
    assert run(graph, {"x": np.zeros((2, 3), np.float32)})["y"].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (np.float32(0), "scale 0.0 is not a positive"),
        (np.float32(-0.1), "is not a positive"),
        (np.float32(np.inf), "scale inf is not a positive"),
        (np.float32(np.nan), "NaN"),
        (np.zeros(0, np.float32), "there is no scale"),
        (np.full(2, 0.1, np.float32), r"2 scales do not go with axis 1 of \[2, 3\]"),
    ],
)
def test_wrong_scales_of_activations(scale, message):
    with pytest.raises(InvalidModel, match=message):
        import_model(activation(scale=scale))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s": np.array([0.1, 0.0], np.float32)}, "DequantizeLinear_d.*not a positive"),
        ({"s": np.array([0.1, -1.0], np.float32)}, "DequantizeLinear_d.*scale -1.0"),
        ({"s": np.ones(3, np.float32)}, "3 scales do not go with axis 1"),
        ({"attrs": {"axis": 2}}, "axis 2 does not exist"),
        ({"z": np.zeros(1, np.int8)}, "1 zero points do not go with 2 scales"),
        ({"z": np.array([300, 0], np.int32)}, "zero point is int32, its tensor int8"),
        ({"z": np.zeros(2, np.uint8)}, "zero point is uint8, its tensor int8"),
        ({"attrs": {"block_size": 3}}, r"DequantizeLinear_d.*blocks of 3, scales \[2\]"),
        (
            {"attrs": {"block_size": 2, "axis": 0}, "s": np.ones((3, 2), np.float32)},
            r"DequantizeLinear_d.*\[2, 2\] are wanted",
        ),
    ],
)
def test_wrong_parameters_of_weights(changes, message):
    with pytest.raises(InvalidModel, match=message):
        import_model(weight(**changes))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: activation(scale=np.full(3, 0.1, np.float32)), "QuantizeLinear_q.*per tensor"),
        (lambda: activation(zero_point=np.int32(1)), "QuantizeLinear_q.*not to int32"),
        (lambda: activation(zero_point=_tensor("INT4")), "'z'.*INT4"),
        (lambda: activation(zero_point=_tensor("FLOAT8E4M3FN")), "'z'.*FLOAT8E4M3FN"),
        (
            lambda: weight(w=WEIGHT.astype(np.int64)),
            "DequantizeLinear_d.*8 or 16 bits or as int32",
        ),
        (
            lambda: activation(scale=np.full((1, 1), 0.1, np.float32)),
            "QuantizeLinear_q.*per block",
        ),
        (lambda: blocks_of_activations(), "DequantizeLinear_d.*operand 0 depends on the inputs"),
    ],
)
def test_what_has_no_lowering(broken, message):
    with pytest.raises(UnsupportedOp, match=message):
        import_model(broken())


def blocks_of_activations() -> onnx.ModelProto:
    nodes = [
        node("QuantizeLinear", "x t", "q"),
        node("DequantizeLinear", "q s", "d", axis=1, block_size=2),
        node("Neg", "d", "y"),
    ]
    return model(nodes, t=np.float32(0.1), s=np.ones((2, 2), np.float32))


def _tensor(kind: str) -> TensorProto:
    return helper.make_tensor("z", TensorProto.DataType.Value(kind), [], [0])


def test_a_scale_that_the_model_computes_is_refused():
    nodes = [
        node("ReduceMax", "x", "m", keepdims=0),
        node("QuantizeLinear", "x m", "q"),
        node("DequantizeLinear", "q m", "y"),
    ]
    with pytest.raises(UnsupportedOp, match=r"QuantizeLinear_q.*only static quantisation"):
        import_model(model(nodes))
