"""Fused float operators and weights of few bits of com.microsoft, against ONNX Runtime.

The models have open batch and sequence; each is run at several sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import CompilerError
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.graph import Graph
from sparsec.ir.verifier import verify
from sparsec.passes import graph_pipeline
from sparsec.passes.manager import PassManager

MS = "com.microsoft"
HEADS, SIZE, VALUES = 2, 4, 6
WIDTH = HEADS * SIZE
POSITIONS = 16
SIZES = ({"b": 1, "s": 1, "k": 1}, {"b": 2, "s": 5, "k": 3}, {"b": 3, "s": 4, "k": 9})
# Sums of up to 40 products of size 1, in another order.
TOLERANCE = 1e-5

INPUTS: dict[str, tuple[type, tuple[str | int, ...]]] = {
    "x": (np.float32, ("b", "s", WIDTH)),
    "skip": (np.float32, ("b", "s", WIDTH)),
    "q": (np.float32, ("b", "s", WIDTH)),
    "k": (np.float32, ("b", "s", WIDTH)),
    "v": (np.float32, ("b", "s", WIDTH)),
    "wide": (np.float32, ("b", "s", HEADS * VALUES)),
    "other_k": (np.float32, ("b", "k", WIDTH)),
    "other_v": (np.float32, ("b", "k", HEADS * VALUES)),
    "heads": (np.float32, ("b", HEADS, "s", SIZE)),
    "head_k": (np.float32, ("b", HEADS, "k", SIZE)),
    "head_v": (np.float32, ("b", HEADS, "k", SIZE)),
    "deep": (np.float32, ("b", "s", 40)),
    "all": (np.float32, ("b", "s", HEADS, 3, SIZE)),
    "both": (np.float32, ("b", "s", HEADS, 2, SIZE)),
    "mask": (np.int32, ("b", "s")),
    "other_mask": (np.int32, ("b", "k")),
    "square": (np.int32, ("b", "s", "s")),
    "lengths": (np.int32, ("b",)),
    "starts": (np.int32, ("b",)),
    "bias_bhss": (np.float32, ("b", HEADS, "s", "s")),
    "bias_1hss": (np.float32, (1, HEADS, "s", "s")),
    "bias_11ss": (np.float32, (1, 1, "s", "s")),
    "bias_bhsk": (np.float32, ("b", HEADS, "s", "k")),
    "ids": (np.int64, ("b", "s")),
    "first": (np.int64, (1,)),
}


def node(op: str, inputs: str, domain: str = MS, outputs: str = "y", **attrs: Any) -> Any:
    """`-` in `inputs` and `outputs` stands for what is absent."""
    names = [["" if n == "-" else n for n in names.split()] for names in (inputs, outputs)]
    name = f"the_{op}_{names[1][0]}"
    return helper.make_node(op, *names, name=name, domain=domain, **attrs)


def model(nodes: list[Any], tensors: Mapping[str, Any], opset: int = 21) -> onnx.ModelProto:
    """Of the INPUTS that the nodes read; what nothing reads is an output."""
    read = {n for item in nodes for n in item.input if n}
    made = [n for item in nodes for n in item.output if n]
    ports = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)
        for name, (kind, shape) in INPUTS.items()
        if name in read
    ]
    results = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in made if n not in read
    ]
    constants = [_tensor(name, item) for name, item in tensors.items() if name in read]
    graph = helper.make_graph(nodes, "g", ports, results, constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _tensor(name: str, item: Any) -> TensorProto:
    if isinstance(item, TensorProto):
        item.name = name
        return item
    return numpy_helper.from_array(np.asarray(item), name)


def feeds(proto: onnx.ModelProto, sizes: dict[str, int], rng: np.random.Generator) -> Any:
    arrays: dict[str, Any] = {}
    for port in proto.graph.input:
        kind, dims = INPUTS[port.name]
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in dims)
        arrays[port.name] = _numbers(port.name, shape, sizes, rng).astype(kind)
    return arrays


def _numbers(name: str, shape: Any, sizes: dict[str, int], rng: np.random.Generator) -> Any:
    if INPUTS[name][0] is np.float32:
        return rng.standard_normal(shape)
    if name == "starts":  # in front of every end
        return np.zeros(shape) if sizes["s"] < 3 else rng.integers(0, 2, shape)
    if name == "lengths":
        return 1 + rng.integers(1, sizes["s"] + 2, shape)
    if name in ("ids", "first"):
        return rng.integers(0, POSITIONS - sizes["s"] + 1, shape)
    mask = rng.integers(-1, 3, shape)  # any number above 0 keeps a key
    mask[..., 0] = 1
    return mask


def theirs(proto: onnx.ModelProto, arrays: Any) -> list[Any]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime says what is right")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return list(session.run(None, arrays))


def assert_same(
    proto: onnx.ModelProto, rng: np.random.Generator, sizes: Any = SIZES, wanted: Any = theirs
) -> Graph:
    """Before the passes and after them, whose Graph is returned."""
    graph = import_model(proto)
    verify(graph)
    cases = [feeds(proto, size, rng) for size in sizes]
    right = [wanted(proto, arrays) for arrays in cases]
    for _ in range(2):
        for arrays, expected in zip(cases, right, strict=True):
            for ours, other in zip(run(graph, arrays).values(), expected, strict=True):
                assert ours.shape == other.shape
                np.testing.assert_allclose(ours, other, atol=TOLERANCE, rtol=TOLERANCE)
        PassManager(graph_pipeline()).run(graph)
    return graph


def ops(graph: Graph) -> Counter[str]:
    return Counter(n.op for n in graph.nodes)


def multi_head(inputs: str, **attrs: Any) -> list[Any]:
    return [node("MultiHeadAttention", inputs, num_heads=HEADS, **attrs)]


def attention(inputs: str, **attrs: Any) -> list[Any]:
    return [node("Attention", inputs, num_heads=HEADS, **attrs)]


_RNG = np.random.default_rng(3)
TENSORS: dict[str, Any] = {
    "bias": _RNG.standard_normal(3 * WIDTH).astype(np.float32),
    "wide_bias": _RNG.standard_normal(2 * WIDTH + HEADS * VALUES).astype(np.float32),
    "w": _RNG.standard_normal((WIDTH, 3 * WIDTH)).astype(np.float32) / 3,
    "wide_w": _RNG.standard_normal((WIDTH, 2 * WIDTH + HEADS * VALUES)).astype(np.float32) / 3,
    "gamma": np.linspace(0.5, 1.5, WIDTH).astype(np.float32),
    "beta": np.linspace(-1, 1, WIDTH).astype(np.float32),
    "cos": _RNG.standard_normal((POSITIONS, SIZE // 2)).astype(np.float32),
    "sin": _RNG.standard_normal((POSITIONS, SIZE // 2)).astype(np.float32),
    "half_cos": _RNG.standard_normal((POSITIONS, SIZE // 4)).astype(np.float32),
    "half_sin": _RNG.standard_normal((POSITIONS, SIZE // 4)).astype(np.float32),
}

SELF_ATTENTION = {
    "plain": multi_head("q k v"),
    "bias": multi_head("q k v bias"),
    "scale": multi_head("q k v", scale=0.3),
    "mask": multi_head("q k v - mask"),
    "mask and its value": multi_head("q k v bias mask", mask_filter_value=-3.0),
    "mask per query": multi_head("q k v - square"),
    "lengths": multi_head("q k v - lengths"),
    "attention bias": multi_head("q k v - - bias_bhss"),
    "attention bias for all": multi_head("q k v - mask bias_1hss"),
    "attention bias for all heads": multi_head("q k v bias lengths bias_11ss"),
    "causal": multi_head("q k v", unidirectional=1),
    "causal and mask": multi_head("q k v - mask", unidirectional=1),
    "causal and all": multi_head("q k v bias square bias_1hss", unidirectional=1),
    "of a product": attention("x w bias"),
    "of a product, no bias": attention("x w"),
    "of a product, scale": attention("x w bias", scale=0.2),
    "of a product, mask": attention("x w bias mask"),
    "of a product, mask per query": attention("x w bias square"),
    "of a product, lengths": attention("x w bias lengths"),
    "of a product, ends and starts": [
        node("Concat", "lengths starts", "", "bounds", axis=0),
        *attention("x w bias bounds"),
    ],
    "of a product, attention bias": attention("x w bias - - bias_bhss"),
    "of a product, mask, bias": attention("x w bias mask - bias_11ss"),
    "of a product, causal": attention("x w bias", unidirectional=1),
    "of a product, causal, mask": attention("x w bias mask", unidirectional=1),
    "of a product, all": attention("x w bias lengths - bias_1hss", unidirectional=1),
    "of a product, sizes": attention("x w bias", qkv_hidden_sizes=[WIDTH] * 3),
}


@pytest.mark.parametrize("case", SELF_ATTENTION)
def test_self_attention_is_one_op(case: str, rng: np.random.Generator):
    graph = assert_same(model(SELF_ATTENTION[case], TENSORS), rng)
    assert ops(graph)["attention"] == 1
    assert not {"softmax", "matmul"} & set(ops(graph))


OTHER_ATTENTION = {
    "other keys": multi_head("q other_k other_v"),
    "other keys, bias": multi_head("q other_k other_v wide_bias other_mask"),
    "other keys, attention bias": multi_head("q other_k other_v - - bias_bhsk"),
    "keys by heads": multi_head("q head_k head_v"),
    "keys by heads, mask": multi_head("q head_k head_v - other_mask"),
    "wide values": multi_head("q k wide"),
    "wide values, causal": multi_head("q k wide wide_bias mask", unidirectional=1),
    "of a product, wide values": attention(
        "x wide_w wide_bias mask", qkv_hidden_sizes=[WIDTH, WIDTH, HEADS * VALUES]
    ),
}


@pytest.mark.parametrize("case", OTHER_ATTENTION)
def test_other_attention_is_spelled_out(case: str, rng: np.random.Generator):
    graph = import_model(model(OTHER_ATTENTION[case], TENSORS))
    assert ops(graph)["attention"] == 0
    assert_same(model(OTHER_ATTENTION[case], TENSORS), rng)


@pytest.mark.parametrize("inputs", ["all", "q both"])
def test_packed_operands_are_the_same_apart(inputs: str, rng: np.random.Generator):
    """ONNX Runtime has them on GPUs alone: what it computes of the parts is right."""

    def apart(proto: onnx.ModelProto, arrays: Any) -> list[Any]:
        packed = arrays[inputs.split()[-1]]
        parts = [
            packed[:, :, :, i].reshape(*packed.shape[:2], WIDTH) for i in range(packed.shape[3])
        ]
        named = dict(zip("qkv"[3 - len(parts) :], parts, strict=True))
        plain = {n: a for n, a in arrays.items() if n == "q"}
        return theirs(model(multi_head("q k v"), TENSORS), {**plain, **named})

    assert_same(model(multi_head(inputs), TENSORS), rng, wanted=apart)


def test_projections_with_biases_are_one_product(rng: np.random.Generator):
    weights = {f"w{n}": TENSORS["w"][:, i * WIDTH : (i + 1) * WIDTH] for i, n in enumerate("qkv")}
    nodes = [node("MatMul", f"x w{n}", "", f"p{n}") for n in "qkv"]
    nodes += multi_head("pq pk pv bias mask")
    graph = assert_same(model(nodes, {**TENSORS, **weights}), rng)
    assert ops(graph)["linear"] == 1
    assert ops(graph)["attention"] == 1


def test_a_mask_of_one_column_hides_nothing(rng: np.random.Generator):
    column = {"column": np.zeros((1, 1), np.int32)}
    assert_same(model(attention("x w bias column"), {**TENSORS, **column}), rng)


NORMS = {
    "layer norm": [
        node("SkipLayerNormalization", "x skip gamma beta beta", outputs="y - - sum", epsilon=1e-5)
    ],
    "one skip for all": [node("SkipLayerNormalization", "x row gamma beta", epsilon=1e-5)],
    "root mean square": [node("SkipSimplifiedLayerNormalization", "x skip gamma", epsilon=1e-6)],
    "root mean square, all": [
        node("SkipSimplifiedLayerNormalization", "x skip gamma beta", outputs="y - - sum")
    ],
}


@pytest.mark.parametrize("case", NORMS)
def test_norms_of_sums(case: str, rng: np.random.Generator):
    row = {"row": TENSORS["beta"].reshape(1, 1, WIDTH) * np.ones((1, 5, 1), np.float32)}
    sizes = [{**SIZES[1], "b": b} for b in (1, 3)] if "row" in NORMS[case][0].input else SIZES
    assert_same(model(NORMS[case], {**TENSORS, **row}), rng, sizes)


@pytest.mark.parametrize("product", ["x", "skip"])
def test_the_bias_of_a_sum_goes_to_its_product(product: str, rng: np.random.Generator):
    w = {"square_w": TENSORS["w"][:, :WIDTH]}
    nodes = [
        node("MatMul", f"{product} square_w", "", "p"),
        node("SkipLayerNormalization", "p x gamma beta beta", epsilon=1e-5)
        if product == "skip"
        else node("SkipLayerNormalization", "skip p gamma beta beta", epsilon=1e-5),
    ]
    graph = assert_same(model(nodes, {**TENSORS, **w}), rng)
    assert ops(graph) == {"linear": 1, "layer_norm": 1}


def rotary(inputs: str, **attrs: Any) -> list[Any]:
    return [node("RotaryEmbedding", inputs, **attrs)]


ROTARY = {
    "plain": rotary("x ids cos sin"),
    "heads": rotary("x ids cos sin", num_heads=HEADS),
    "first position": rotary("x first cos sin"),
    "by heads": rotary("heads ids cos sin"),
    "scale, which is ignored": rotary("x ids cos sin", scale=2.0),
    "interleaved": rotary("x ids cos sin", interleaved=1),
    "interleaved by heads": rotary("heads first cos sin", interleaved=1),
    "in part": rotary("x ids half_cos half_sin", num_heads=HEADS, rotary_embedding_dim=2),
    "in part by heads": rotary(
        "heads ids half_cos half_sin", num_heads=HEADS, rotary_embedding_dim=2, interleaved=1
    ),
}


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_embedding(case: str, rng: np.random.Generator):
    graph = assert_same(model(ROTARY[case], TENSORS), rng)
    turned = ops(graph)["rotary"]
    assert turned == (0 if any(n.name == "interleaved" for n in ROTARY[case][0].attribute) else 1)


STANDARD_ROTARY = {
    "positions": [node("RotaryEmbedding", "heads cos sin ids", "")],
    "channels": [node("RotaryEmbedding", "x cos sin ids", "", num_heads=HEADS)],
    "interleaved": [node("RotaryEmbedding", "heads cos sin ids", "", interleaved=1)],
    "in part": [
        node("RotaryEmbedding", "heads half_cos half_sin ids", "", rotary_embedding_dim=2)
    ],
    "no positions": [
        node("Gather", "cos ids", "", "c"),
        node("Gather", "sin ids", "", "d"),
        node("RotaryEmbedding", "heads c d", ""),
    ],
}


@pytest.mark.parametrize("case", STANDARD_ROTARY)
def test_the_standard_rotary_embedding(case: str, rng: np.random.Generator):
    graph = assert_same(model(STANDARD_ROTARY[case], TENSORS, 23), rng)
    assert ops(graph)["rotary"] == (0 if case == "interleaved" else 1)


@pytest.mark.parametrize("turns", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("batches", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("rank", [3, 4])
def test_products_of_turned_operands(
    turns: tuple[int, int], batches: tuple[int, int], rank: int, rng: np.random.Generator
):
    front = [2, 3][: rank - 2]
    arrays = {}
    for name, sizes, turn, moved in zip("ab", ([4, 5], [5, 6]), turns, batches, strict=True):
        *batch, rows, columns = [*front, *(sizes[::-1] if turn else sizes)]
        shape = [rows, *batch, columns] if moved else [*batch, rows, columns]
        arrays[name] = rng.standard_normal(shape).astype(np.float32)
    attrs = {"transA": turns[0], "transB": turns[1], "alpha": 0.5}
    attrs |= {"transBatchA": batches[0], "transBatchB": batches[1]}
    assert_same(model([node("FusedMatMul", "a b", **attrs)], arrays), rng, [SIZES[0]])


@pytest.mark.parametrize("more", ["", "bias", "bias z"])
@pytest.mark.parametrize("activation", ["Relu", "Tanh", "Sigmoid"])
def test_fused_convolutions(more: str, activation: str, rng: np.random.Generator):
    shapes = {"image": (2, 3, 8, 8), "w": (4, 3, 4, 4), "bias": (4,), "z": (2, 4, 2, 2)}
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    nodes = [node("FusedConv", f"image w {more}", activation=activation, strides=[4, 4])]
    assert_same(model(nodes, arrays), rng, [SIZES[0]])


def packed(numbers: Any, bits: int) -> Any:
    """Along the last axis, the lowest bits first; a row begins with a new byte."""
    per = 8 // bits
    width = -(-numbers.shape[-1] // per) * per
    padded = np.zeros((*numbers.shape[:-1], width), np.uint8)
    padded[..., : numbers.shape[-1]] = numbers
    parts = padded.reshape(*numbers.shape[:-1], width // per, per).astype(np.int64)
    return (parts << (bits * np.arange(per))).sum(axis=-1).astype(np.uint8)


DEPTH, ROWS = 40, 6  # 40 is no whole number of blocks of 16, nor its 3 zero points of bytes


def n_bits(bits: int, block: int, rng: np.random.Generator) -> dict[str, Any]:
    blocks = -(-DEPTH // block)
    zeros = rng.integers(0, 1 << bits, (ROWS, blocks))
    stored = packed(rng.integers(0, 1 << bits, (ROWS, blocks * block)), bits)
    return {
        "w": stored.reshape(ROWS, blocks, -1),
        "scales": rng.uniform(0.01, 0.1, (ROWS, blocks)).astype(np.float32),
        "zeros": packed(zeros, bits),
        "real_zeros": (zeros + 0.25).astype(np.float32),
        "row": rng.standard_normal(ROWS).astype(np.float32),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize(
    "inputs", ["", "zeros", "- - row", "zeros - row", "real_zeros", "flat zeros"]
)
def test_products_of_few_bits(bits: int, block: int, inputs: str, rng: np.random.Generator):
    if bits == 8 and inputs == "real_zeros":
        pytest.skip("ONNX Runtime has no such zero points")
    tensors = n_bits(bits, block, rng)
    if inputs.startswith("flat"):  # as older files have them
        tensors |= {name: tensors[name].reshape(-1) for name in ("scales", "zeros")}
    attrs = {"K": DEPTH, "N": ROWS, "bits": bits, "block_size": block, "accuracy_level": 1}
    nodes = [node("MatMulNBits", f"deep w scales {inputs.removeprefix('flat ')}", **attrs)]
    graph = assert_same(model(nodes, tensors), rng)
    assert ops(graph) == {"linear": 1}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["", "zeros"])
def test_tables_of_few_bits(bits: int, zeros: str, rng: np.random.Generator):
    table = rng.integers(0, 1 << bits, (POSITIONS, DEPTH))
    shape = (POSITIONS, -(-DEPTH // 16))
    tensors = {
        "table": packed(table, bits),
        "scales": rng.uniform(0.01, 0.1, shape).astype(np.float32),
        "zeros": packed(rng.integers(0, 1 << bits, shape), bits),
    }
    attrs = {"bits": bits, "block_size": 16, "gather_axis": 0, "quantize_axis": -1}
    nodes = [node("GatherBlockQuantized", f"table ids scales {zeros}", **attrs)]
    assert_same(model(nodes, tensors), rng)


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
@pytest.mark.parametrize("zeros", ["", "zeros"])
@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_tables_of_4_bit_types(
    kind: str, zeros: str, axes: tuple[int, int], rng: np.random.Generator
):
    shape, low = [POSITIONS + 2, 33], -8 if kind == "INT4" else 0  # an odd count
    small = [-(-n // 16) if i == axes[0] else n for i, n in enumerate(shape)]
    tensors = {
        "table": few_bits(kind, shape, low, rng),
        "scales": rng.uniform(0.01, 0.1, small).astype(np.float32),
        "zeros": few_bits(kind, small, low, rng),
    }
    attrs = {"block_size": 16, "quantize_axis": axes[0], "gather_axis": axes[1]}
    nodes = [node("GatherBlockQuantized", f"table ids scales {zeros}", **attrs)]
    assert_same(model(nodes, tensors), rng)


def few_bits(kind: str, shape: list[int], low: int, rng: np.random.Generator) -> TensorProto:
    numbers = rng.integers(low, low + 16, int(np.prod(shape)))
    return helper.make_tensor("t", TensorProto.DataType.Value(kind), shape, numbers.tolist())


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
@pytest.mark.parametrize("block", [0, 5, 16])
def test_dequantised_weights_of_4_bit_types(kind: str, block: int, rng: np.random.Generator):
    """Per column, and in blocks of rows."""
    low = -8 if kind == "INT4" else 0
    small = [-(-DEPTH // block), ROWS] if block else [ROWS]
    tensors = {
        "w": few_bits(kind, [DEPTH, ROWS], low, rng),
        "scales": rng.uniform(0.01, 0.1, small).astype(np.float32),
        "zeros": few_bits(kind, small, low, rng),
    }
    attrs = {"axis": 0, "block_size": block} if block else {"axis": 1}
    nodes = [
        node("DequantizeLinear", "w scales zeros", "", "d", **attrs),
        node("MatMul", "deep d", ""),
    ]
    assert_same(model(nodes, tensors), rng)


N_BITS = {"K": DEPTH, "N": ROWS, "bits": 4, "block_size": 16}
REFUSED = {
    "past": (multi_head("q k v - - - head_k head_v"), "past (operand 6)"),
    "present": (multi_head("q k v", outputs="y keys values"), "present (result 1)"),
    "past of a product": (attention("x w bias - past"), "past (operand 4)"),
    "rotary inside": (attention("x w bias", do_rotary=1), "do_rotary"),
    "causal to other keys": (multi_head("q other_k other_k", unidirectional=1), "unidirectional"),
    "no keys": (multi_head("q"), "wants queries, keys and values"),
    "heads": ([node("MultiHeadAttention", "q k v", num_heads=3)], "3 heads"),
    "bias": (multi_head("q k v gamma"), "the bias f32[8]"),
    "sizes": (attention("x w bias", qkv_hidden_sizes=[8, 8, 4]), "24 channels"),
    "order": ([node("MatMulNBits", "deep w scales - order", **N_BITS)], "g_idx"),
    "bits": ([node("MatMulNBits", "deep w scales", **{**N_BITS, "bits": 3})], "3 bits"),
    "block size": ([node("MatMulNBits", "deep w scales", **{**N_BITS, "block_size": 24})], "24"),
    "depth": (
        [node("MatMulNBits", "deep w scales", **{**N_BITS, "K": 64})],
        "6 x 4 blocks of uint8",
    ),
    "scales": ([node("MatMulNBits", "deep w few", **N_BITS)], "[6, 2] scales"),
    "weights": ([node("MatMulNBits", "deep table scales", **N_BITS)], "uint8"),
    "inputs": ([node("MatMulNBits", "deep w other", **N_BITS)], "operand 2 depends"),
    "packed": (rotary("x ids cos sin", is_packed_batching=1), "packed batches"),
    "tables": (rotary("x ids cos sin", num_heads=WIDTH), "2 columns"),
    "4-bit steps": (
        [
            node("QuantizeLinear", "x step nibble", "", "n"),
            node("DequantizeLinear", "n step nibble", ""),
        ],
        "'nibble' has the element type UINT4",
    ),
    "one CPU": ([node("Conv", "x", "com.microsoft.nchwc")], "ORT_ENABLE_EXTENDED"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(case: str, rng: np.random.Generator):
    nodes, message = REFUSED[case]
    tensors = dict(TENSORS)
    if "MatMulNBits" in nodes[0].op_type:
        tensors = n_bits(4, 16, rng)
    tensors |= {
        "past": np.zeros((2, 1, HEADS, 3, SIZE), np.float32),
        "order": np.zeros(48, np.int32),
        "few": np.ones((ROWS, 2), np.float32),
        "table": np.ones((ROWS, 3, 8), np.int8),
        "step": np.float32(0.5),
        "nibble": helper.make_tensor("nibble", TensorProto.UINT4, [], [3]),
    }
    proto = model(nodes, tensors)
    if case == "inputs":
        proto.graph.input.append(
            helper.make_tensor_value_info("other", TensorProto.FLOAT, (ROWS, 3))
        )
    with pytest.raises(CompilerError) as error:
        import_model(proto)
    assert message in str(error.value)
    assert nodes[0].name in str(error.value) or "initialiser" in str(error.value)
