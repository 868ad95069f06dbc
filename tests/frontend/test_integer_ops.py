"""QLinear*, integer products and com.microsoft ops: what they mean and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import CompilerError
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.passes import graph_pipeline
from sparsec.passes.absorb_dynamic import AbsorbDynamic
from sparsec.passes.absorb_qdq import Roundings
from sparsec.passes.manager import PassManager

MS = "com.microsoft"
BATCH, SEQ, CHANNELS = 2, 5, 8
U8, I8 = np.uint8, np.int8


def model(nodes: list[onnx.NodeProto], **arrays: Any) -> onnx.ModelProto:
    """x [2, 5, 8] -> y; `arrays` are initialisers."""
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (BATCH, SEQ, CHANNELS))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def node(op: str, inputs: str, output: str, domain: str = "", **attrs: Any) -> onnx.NodeProto:
    """`-` in `inputs` stands for an operand that is absent."""
    names = ["" if n == "-" else n for n in inputs.split()]
    outputs = output.split()
    name = f"the_{op}_{outputs[0]}"
    return helper.make_node(op, names, outputs, name=name, domain=domain, **attrs)


def stored(op: str, inputs: str, domain: str = MS, **attrs: Any) -> list[onnx.NodeProto]:
    """y of an operator over the bytes q of x, which stores them with scale t and zero point u."""
    return [
        node("QuantizeLinear", "x s z", "q"),
        node(op, inputs, "p", domain, **attrs),
        node("DequantizeLinear", "p t u", "y"),
    ]


def scales(rng: np.random.Generator, **more: Any) -> dict[str, Any]:
    return {
        "s": np.float32(0.03), "z": U8(120), "t": np.float32(0.05), "u": U8(100),
        "w": rng.integers(-127, 128, (CHANNELS, 6)).astype(I8),
        "ws": np.float32(0.01), "wz": I8(0), **more,
    }  # fmt: skip


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((BATCH, SEQ, CHANNELS)).astype(np.float32)


def answers(proto: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ours by the oracle, and ONNX Runtime's."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime says what is right")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    (theirs,) = session.run(None, {"x": x})
    (ours,) = run(import_model(proto), {"x": x}).values()
    return ours, np.asarray(theirs)


PER_COLUMN = np.linspace(0.004, 0.01, 6).astype(np.float32)
QLINEAR = {
    "matmul": (stored("QLinearMatMul", "q s z w ws wz t u", ""), {}),
    "matmul per column": (
        stored("QLinearMatMul", "q s z w ws wz t u", ""),
        {"ws": PER_COLUMN, "wz": np.zeros(6, I8)},
    ),
    "add": (stored("QLinearAdd", "q s z b ws z t u"), {"b": np.arange(8).astype(U8) * 30}),
    "mul": (stored("QLinearMul", "q s z b ws z t u"), {"b": np.arange(8).astype(U8) * 30}),
    "sigmoid": (stored("QLinearSigmoid", "q s z t u"), {"t": np.float32(1 / 256), "u": U8(0)}),
    "leaky relu": (stored("QLinearLeakyRelu", "q s z t u", alpha=0.1), {}),
    "softmax": (
        stored("QLinearSoftmax", "q s z t u", axis=-1, opset=13),
        {"t": np.float32(1 / 256), "u": U8(0)},
    ),
    "softmax of an old opset over its last axis": (
        stored("QLinearSoftmax", "q s z t u", opset=12),
        {"t": np.float32(1 / 256), "u": U8(0)},
    ),
    "roundings of the domain": (
        [
            node("QuantizeLinear", "x s z", "q", MS),
            node("DequantizeLinear", "q s z", "d", MS),
            *stored("QLinearSigmoid", "q s z t u")[1:],
        ],
        {"t": np.float32(1 / 256), "u": U8(0)},
    ),
    "concat": (stored("QLinearConcat", "t u q s z q s z", axis=1), {}),
}


@pytest.mark.parametrize("case", QLINEAR)
def test_operators_of_bytes(case: str, x: np.ndarray, rng: np.random.Generator):
    nodes, more = QLINEAR[case]
    arrays = scales(rng, **more)
    ours, theirs = answers(model(nodes, **arrays), x)
    assert ours.shape == theirs.shape
    # Halves between two numbers may go either way: a step apart, and seldom.
    assert np.abs(ours - theirs).max() <= arrays["t"] * 1.001
    assert (np.abs(ours - theirs) < 1e-6).mean() > 0.95


def test_a_gemm_of_bytes_in_fp32_and_stored(rng: np.random.Generator, x: np.ndarray):
    more = {"c": rng.integers(-999, 999, 6).astype(np.int32), "n": np.array([-1, CHANNELS])}
    for end in ("", " t u"):
        nodes = [
            node("Reshape", "x n", "r"),
            node("QuantizeLinear", "r s z", "q"),
            node("QGemm", f"q s z w ws wz c{end}", "p" if end else "y", MS, alpha=1.0),
            *([node("DequantizeLinear", "p t u", "y")] if end else []),
        ]
        ours, theirs = answers(model(nodes, **scales(rng, **more)), x)
        np.testing.assert_allclose(ours, theirs, atol=0.0501 if end else 1e-5)


def dynamic(rng: np.random.Generator, **more: Any) -> onnx.ModelProto:
    """x w + b as quantize_dynamic writes it."""
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"),
        node("MatMulInteger", "q w z wz", "i"),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Mul", "s ws", "both"),
        node("Mul", "f both", "scaled"),
        node("Add", "scaled b", "y"),
    ]
    arrays = scales(rng, b=rng.standard_normal(6).astype(np.float32), **more)
    return model(nodes, **{k: arrays[k] for k in ("w", "ws", "wz", "b")})


MATMULS = {
    "DynamicQuantizeMatMul": [node("DynamicQuantizeMatMul", "x w ws wz b", "y", MS)],
    "MatMulIntegerToFloat": [
        node("DynamicQuantizeLinear", "x", "q ds dz"),
        node("MatMulIntegerToFloat", "q w ds ws dz wz b", "y", MS),
    ],
    "static MatMulIntegerToFloat": [
        node("QuantizeLinear", "x s z", "q"),
        node("MatMulIntegerToFloat", "q w s ws z wz b", "y", MS),
    ],
}


@pytest.mark.parametrize("case", ["plain", *MATMULS])
def test_dynamic_products_mean_what_they_say(case: str, x: np.ndarray, rng: np.random.Generator):
    bias = rng.standard_normal(6).astype(np.float32)
    proto = model(MATMULS[case], **scales(rng, b=bias)) if case in MATMULS else dynamic(rng)
    ours, theirs = answers(proto, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "per column", "DynamicQuantizeMatMul"])
def test_dynamic_products_become_one_product(case: str, x: np.ndarray, rng: np.random.Generator):
    more = {"ws": PER_COLUMN, "wz": np.zeros(6, I8)} if case == "per column" else {}
    bias = rng.standard_normal(6).astype(np.float32)
    proto = (
        model(MATMULS[case], **scales(rng, b=bias)) if case in MATMULS else dynamic(rng, **more)
    )
    graph = import_model(proto)
    (before,) = run(graph, {"x": x}).values()
    PassManager(graph_pipeline()).run(graph)
    assert [n.op for n in graph.nodes] == ["round_tokens", "linear"]
    assert graph.nodes[1].input(1).type.quant is not None
    (after,) = run(graph, {"x": x}).values()
    # Steps: largest / 127 here, (largest - smallest) / 255 there, over 8 channels.
    assert np.abs(after - before).max() < 8 * 0.05 * 1.27


def test_to_the_letter_dynamic_ops_are_spelled_out(x: np.ndarray, rng: np.random.Generator):
    graph = import_model(dynamic(rng))
    (before,) = run(graph, {"x": x}).values()
    PassManager([AbsorbDynamic(Roundings.ALL)]).run(graph)
    assert not {"dynamic_quantize", "matmul_integer"} & {n.op for n in graph.nodes}
    (after,) = run(graph, {"x": x}).values()
    np.testing.assert_array_equal(after, before)


ROWS = np.float32(np.random.default_rng(5).standard_normal((CHANNELS, 3 * CHANNELS)) / 3)
GAMMA = np.linspace(0.5, 1.5, CHANNELS).astype(np.float32)
FUSED: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "Gelu": ([node("Gelu", "x", "y", MS)], {}),
    "FastGelu": ([node("FastGelu", "x b", "y", MS)], {"b": GAMMA}),
    "BiasGelu": ([node("BiasGelu", "x b", "y", MS)], {"b": GAMMA}),
    "QuickGelu": ([node("QuickGelu", "x", "y", MS)], {}),
    "FusedMatMul": (
        [node("FusedMatMul", "x w", "y", MS, alpha=0.5, transB=1)],
        {"w": np.ascontiguousarray(ROWS.T)},
    ),
    "SkipLayerNormalization": (
        [node("SkipLayerNormalization", "x x g b b", "y", MS, epsilon=1e-5)],
        {"g": GAMMA, "b": GAMMA},
    ),
    "SimplifiedLayerNormalization": (
        [node("SimplifiedLayerNormalization", "x g", "y", epsilon=1e-5)],
        {"g": GAMMA},
    ),
    "Attention": (
        [node("Attention", "x w b", "y", MS, num_heads=2)],
        {"w": ROWS, "b": np.zeros(24, np.float32)},
    ),
    "Attention with a mask": (
        [node("Attention", "x w b m", "y", MS, num_heads=2)],
        {"w": ROWS, "b": np.ones(24, np.float32), "m": np.int32([[1, 1, 1, 0, 0], [1] * 5])},
    ),
    "Attention with lengths": (
        [node("Attention", "x w b m", "y", MS, num_heads=4)],
        {"w": ROWS, "b": np.ones(24, np.float32), "m": np.int32([2, 5])},
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_ops_of_onnx_runtime(case: str, x: np.ndarray):
    nodes, arrays = FUSED[case]
    ours, theirs = answers(model(nodes, **arrays), x)
    np.testing.assert_allclose(ours, theirs, atol=2e-3 if case == "FastGelu" else 2e-6)


def test_a_dynamic_attention(x: np.ndarray):
    w = np.rint(ROWS * 40).astype(I8)
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"),
        node("QAttention", "q w b s ws m z wz", "y", MS, num_heads=2),
    ]
    arrays = {"w": w, "b": np.ones(24, np.float32), "ws": np.float32(0.025), "wz": I8(0),
              "m": np.int32([[1, 1, 1, 0, 0], [1] * 5])}  # fmt: skip
    proto = model(nodes, **arrays)
    ours, theirs = answers(proto, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    graph = import_model(proto)
    PassManager(graph_pipeline()).run(graph)
    assert {"linear", "attention", "round_tokens"} <= {n.op for n in graph.nodes}


@pytest.mark.parametrize(
    ("nodes", "changes", "parts"),
    [
        (QLINEAR["matmul"][0], {"ws": np.float32(-1)}, ["the_QLinearMatMul", "scale -1.0"]),
        (QLINEAR["matmul"][0], {"ws": np.float32(np.nan)}, ["initialiser 'ws' has 1 NaN"]),
        (QLINEAR["matmul"][0], {"wz": U8(3)}, ["the_QLinearMatMul", "zero point is uint8"]),
        (QLINEAR["matmul"][0], {"ws": PER_COLUMN[:4]}, ["the_QLinearMatMul", "4 scales"]),
        (QLINEAR["matmul"][0], {"w": np.zeros((7, 6), I8)}, ["the_QLinearMatMul", "7"]),
        (QLINEAR["matmul"][0], {"w": np.zeros((8, 6), np.float32)}, ["must be uint8 or int8"]),
        (QLINEAR["add"][0], {"b": np.zeros(8, U8), "t": np.float32(0)}, ["the_QLinearAdd", "0.0"]),
        (
            [node("MatMulInteger", "x w", "i"), node("Cast", "i", "y", to=TensorProto.FLOAT)],
            {},
            ["the_MatMulInteger", "u8 or i8"],
        ),
        (MATMULS["DynamicQuantizeMatMul"], {"wz": U8(0)}, ["the_DynamicQuantizeMatMul", "u8"]),
        (
            [node("Attention", "x w b", "y", MS, num_heads=3)],
            {"w": ROWS, "b": np.zeros(24, np.float32)},
            ["the_Attention"],
        ),
        (
            [node("Attention", "x w b", "y", MS, num_heads=2, do_rotary=1)],
            {"w": ROWS, "b": np.zeros(24, np.float32)},
            ["the_Attention", "do_rotary"],
        ),
        ([node("NoSuchOp", "x", "y", MS)], {}, ["the_NoSuchOp", "not an ONNX standard op"]),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    nodes: list[onnx.NodeProto],
    changes: dict[str, Any],
    parts: list[str],
    rng: np.random.Generator,
):
    arrays = scales(rng, b=np.zeros(6, np.float32)) | changes
    with pytest.raises(CompilerError) as error:
        import_model(model(nodes, **arrays))
    assert all(part in str(error.value) for part in parts), error.value
