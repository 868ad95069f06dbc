"""A quantised model: which roundings stay, and that the products keep the model's own numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType, QuantParams
from sparsec.passes import (
    Quantization,
    Roundings,
    graph_pipeline,
    int8_pipeline,
    is_quantized,
    quantized_values,
)
from sparsec.passes.absorb_qdq import AbsorbQdq
from sparsec.passes.fuse_linear import FuseLinear
from sparsec.passes.manager import PassManager
from sparsec.passes.quantize import Quantize

U8, I8 = DType.U8, DType.I8
ROWS = (0.5, 0.25, 0.125, 1.0)  # scales per output channel: powers of two, so products are exact


def pair(
    graph: Graph, x: Value, scale: float = 0.25, zero_point: int = 3, dtype: DType = U8
) -> Value:
    """dequantize(quantize(x))"""
    attrs = {"scale": scale, "zero_point": zero_point}
    stored = graph.add("quantize", [x], {**attrs, "dtype": dtype})
    return graph.add("dequantize", [stored], attrs)


def quantised(
    graph: Graph, numbers: np.ndarray, scale: tuple[float, ...] = ROWS, axis: int | None = 1
) -> Value:
    """A constant [k, m] of numbers times scales, as the frontend leaves it."""
    factors = np.array(scale, np.float32)
    factors = factors[:, None] if axis == 0 else factors
    w = graph.add_constant((numbers * factors).astype(np.float32), "w")
    quant = QuantParams(scale, (0,) * len(scale), axis)
    graph.set_type(w, replace(w.type, quant=quant))
    return w


@pytest.fixture
def numbers(rng: np.random.Generator) -> np.ndarray:
    """Of a weight [8, 4]; the ends of i8 are among them."""
    w = rng.integers(-128, 128, (8, 4))
    w[0] = -128, 127, -127, 0
    return w


def absorbed(graph: Graph, keep: Roundings = Roundings.PRODUCTS) -> tuple[Counter[str], str]:
    (record,) = PassManager([AbsorbQdq(keep)]).run(graph)
    return Counter(n.op for n in graph.nodes), "\n".join(record["notes"])


def compiled(graph: Graph, keep_fp32: tuple[str, ...] = ()) -> str:
    """Runs all passes that know no target; returns the notes of the int8 ones."""
    PassManager(graph_pipeline()).run(graph)
    records = PassManager(int8_pipeline(Quantization({}, keep_fp32))).run(graph)
    return "\n".join(note for r in records for note in r["notes"])


def feed(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": (rng.standard_normal((2, 5, 8)) * 20).astype(np.float32)}


def test_a_rounding_in_front_of_a_product_stays(x32, numbers):
    graph, x = x32
    graph.add_output("y", graph.add("matmul", [pair(graph, x), quantised(graph, numbers)]))
    ops, notes = absorbed(graph)
    assert ops == {"quantize": 1, "dequantize": 1, "matmul": 1}
    assert notes == "1 roundings to int8 are kept in front of products"


@pytest.mark.parametrize("keep", [Roundings.PRODUCTS, Roundings.NONE])
def test_others_are_dropped(x32, keep):
    graph, x = x32
    y = pair(graph, graph.add("add", [pair(graph, x), graph.add_constant(np.float32(1))]))
    graph.add_output("y", graph.add("tanh", [y]))
    ops, notes = absorbed(graph, keep)
    assert ops == {"add": 1, "tanh": 1}
    assert "2 roundings are dropped for fp32: 1 of add, 1 of inputs" in notes


def test_in_fp32_none_stays(x32, numbers):
    graph, x = x32
    graph.add_output("y", graph.add("matmul", [pair(graph, x), quantised(graph, numbers)]))
    assert absorbed(graph, Roundings.NONE)[0] == {"matmul": 1}


def test_all_can_stay(x32, numbers, rng):
    graph, x = x32
    y = pair(graph, graph.add("matmul", [pair(graph, x), quantised(graph, numbers)]), 100.0)
    graph.add_output("y", pair(graph, graph.add("tanh", [y]), 0.01))
    inputs = feed(rng)
    before = run(graph, inputs)["y"]
    PassManager(graph_pipeline(roundings=Roundings.ALL)).run(graph)
    PassManager(int8_pipeline(Quantization({}))).run(graph)
    assert [n.op for n in graph.nodes] == [
        "quantize", "linear_int8", "dequantize", "tanh", "quantize", "dequantize"
    ]  # fmt: skip
    np.testing.assert_array_equal(run(graph, inputs)["y"], before)


def test_a_rounding_moves_behind_views(x32, numbers):
    """The nearest one counts; those before it change nothing then."""
    graph, x = x32
    y = pair(graph, graph.add("transpose", [pair(graph, x)], {"perm": (1, 0, 2)}))
    flat = graph.add("reshape", [y], {"shape": (symbol("batch") * symbol("seq"), 8)})
    graph.add_output("y", graph.add("matmul", [flat, quantised(graph, numbers)]))
    ops, _ = absorbed(graph)
    assert [n.op for n in graph.nodes] == [
        "transpose", "reshape", "quantize", "dequantize", "matmul"
    ]  # fmt: skip
    assert ops["quantize"] == 1


def test_views_of_bytes_become_views_of_fp32(x32, numbers, rng):
    graph, x = x32
    attrs = {"scale": 0.25, "zero_point": 3}
    stored = graph.add("quantize", [x], {**attrs, "dtype": U8})
    turned = graph.add("transpose", [stored], {"perm": (1, 0, 2)})
    y = graph.add("dequantize", [turned], attrs)
    graph.add_output("y", graph.add("matmul", [y, quantised(graph, numbers)]))
    inputs = feed(rng)
    before = run(graph, inputs)["y"]
    absorbed(graph)
    assert next(n.op for n in graph.nodes) == "transpose"
    np.testing.assert_array_equal(run(graph, inputs)["y"], before)


def test_a_table_of_bytes_becomes_fp32(rng):
    graph = Graph("test")
    ids = graph.add_input("ids", DType.I64, (symbol("batch"), symbol("seq")))
    table = graph.add_constant(rng.integers(0, 256, (10, 8)).astype(np.uint8), "table")
    rows = graph.add("gather", [table, ids], {"axis": 0})
    y = graph.add("dequantize", [rows], {"scale": 0.5, "zero_point": 7})
    graph.add_output("y", y)
    inputs = {"ids": rng.integers(0, 10, (2, 3))}
    before = run(graph, inputs)["y"]
    assert absorbed(graph)[0] == {"gather": 1}
    np.testing.assert_array_equal(run(graph, inputs)["y"], before)
    (lookup,) = graph.nodes
    assert lookup.input(0).type.quant == QuantParams((0.5,), (7,))  # for quantize_tables


@pytest.mark.parametrize(("dtype", "zero_point"), [(U8, 0), (I8, -128), (U8, 255)])
def test_a_zero_point_at_the_end_stands_for_a_relu(x32, numbers, dtype, zero_point, rng):
    """Quantisers remove the relu between a product and such a rounding."""
    graph, x = x32
    product = graph.add("matmul", [x, quantised(graph, numbers)])
    rounded = pair(graph, product, 100.0, zero_point, dtype)
    graph.add_output("y", graph.add("add", [rounded, product]))
    inputs = feed(rng)
    before = run(graph, inputs)["y"]
    ops, _ = absorbed(graph)
    assert ops["clip"] == 1
    # What is gone is the rounding: at most half a step.
    np.testing.assert_allclose(run(graph, inputs)["y"], before, rtol=0, atol=50.1)


def test_the_mask_of_attention_is_not_cut_off(x32):
    """A range without padding says nothing of masks: only products are cut off."""
    graph, x = x32
    mask = graph.add("mul", [x, graph.add_constant(np.float32(-3e38))])
    graph.add_output("y", graph.add("add", [pair(graph, mask, 1.0, 0), x]))
    assert "clip" not in absorbed(graph)[0]


@pytest.mark.parametrize(("dtype", "zero_point"), [(U8, 0), (U8, 131), (I8, 0), (I8, -5)])
def test_the_products_have_the_models_own_numbers(x32, numbers, dtype, zero_point, rng):
    """All sums here are exact in fp32, so not a bit may change."""
    graph, x = x32
    rounded = pair(graph, x, 0.25, zero_point, dtype)
    graph.add_output("y", graph.add("matmul", [rounded, quantised(graph, numbers)]))
    inputs = feed(rng)
    before = run(graph, inputs)["y"]
    assert compiled(graph).count("stays fp32") == 0
    (node,) = [n for n in graph.nodes if n.op == "linear_int8"]
    shift = 128 if dtype is I8 else 0
    assert (node.attrs["x_scale"], node.attrs["x_zero_point"]) == (0.25, zero_point + shift)
    np.testing.assert_array_equal(node.input(1).data, numbers.T)
    np.testing.assert_array_equal(node.input(2).data, ROWS)
    assert [n.op for n in graph.nodes] == ["quantize", "linear_int8"]
    np.testing.assert_array_equal(run(graph, inputs)["y"], before)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 1e-30, 3e-7])
def test_numbers_are_found_again_whatever_the_scale(x32, scale):
    graph, x = x32
    numbers = np.arange(-128, 128).reshape(8, 32)
    scales = tuple(np.float32(scale * (1 + i / 7)).item() for i in range(32))
    w = quantised(graph, numbers, scales)
    graph.add_output("y", graph.add("matmul", [pair(graph, x), w]))
    compiled(graph)
    (node,) = [n for n in graph.nodes if n.op == "linear_int8"]
    np.testing.assert_array_equal(node.input(1).data, numbers.T)


def test_one_scale_for_the_whole_weight(x32, numbers):
    graph, x = x32
    w = quantised(graph, numbers, (0.5,), None)
    graph.add_output("y", graph.add("matmul", [pair(graph, x), w]))
    compiled(graph)
    (node,) = [n for n in graph.nodes if n.op == "linear_int8"]
    assert node.input(2).data.tolist() == [0.5] * 4


def test_numbers_of_bytes_less_their_zero_point_may_be_wider_than_a_byte(x32, numbers):
    """u8 of ONNX Runtime's quantiser with a zero point of 0, and i8 with one of -1."""
    graph, x = x32
    for i, shift in enumerate((128, 1)):
        y = graph.add("matmul", [pair(graph, x), quantised(graph, numbers + shift)])
        graph.add_output(f"y{i}", y)
    compiled(graph)
    products = [n for n in graph.nodes if n.op == "linear_int8"]
    assert [str(n.input(1).type.dtype) for n in products] == ["i16", "i16"]
    for node, shift in zip(products, (128, 1), strict=True):
        np.testing.assert_array_equal(node.input(1).data, (numbers + shift).T)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"axis": 0, "scale": (0.5,) * 8}, "scale per input channel"),
        ({"keep_fp32": ("matmul*",)}, "its name matches"),
    ],
)
def test_what_can_not_be_kept_is_computed_in_fp32(x32, numbers, change, reason):
    graph, x = x32
    change = dict(change)
    keep_fp32 = change.pop("keep_fp32", ())
    w = quantised(graph, numbers + change.pop("numbers", 0), **change)
    graph.add_output("y", graph.add("matmul", [pair(graph, x), w], name="matmul"))
    assert reason in compiled(graph, keep_fp32)
    # Without int8 the rounding of its input would cost accuracy and time for nothing.
    assert [n.op for n in graph.nodes] == ["linear"]


def test_who_is_quantised(x32, numbers):
    graph, x = x32
    w = graph.add_constant(numbers.astype(np.float32), "plain")
    given = graph.add("matmul", [pair(graph, x), quantised(graph, numbers)])
    graph.add_output("y", given)
    graph.add_output("z", graph.add("matmul", [pair(graph, x), w]))
    PassManager(graph_pipeline()).run(graph)
    assert is_quantized(graph)
    assert quantized_values(graph) == ["x"]  # of the weight without scales alone
    PassManager(int8_pipeline(Quantization({"x": (-1.0, 1.0)}))).run(graph)
    assert Counter(n.op for n in graph.nodes)["linear_int8"] == 2
    assert not is_quantized(graph)


def attention(graph: Graph, x: Value, weights: list[Value], rounded: str = "qkvp") -> Value:
    """One head of size 4 over three products; the scale is applied to the queries."""

    def maybe(name: str, value: Value, scale: float, zero_point: int) -> Value:
        return pair(graph, value, scale, zero_point) if name in rounded else value

    q, k, v = (graph.add("matmul", [pair(graph, x), w]) for w in weights)
    q = graph.add("mul", [q, graph.add_constant(np.float32(0.5))])
    k = graph.add("transpose", [k], {"perm": (0, 2, 1)})
    q, k, v = maybe("q", q, 4.5, 128), maybe("k", k, 9.0, 128), maybe("v", v, 9.0, 101)
    scores = maybe("p", graph.add("matmul", [q, k]), 5.0, 100)
    share = maybe("p", graph.add("softmax", [scores], {"axis": 2}), 1 / 255, 0)
    return graph.add("matmul", [share, v])


def projections(graph: Graph, numbers: np.ndarray) -> list[Value]:
    return [
        quantised(graph, numbers),
        quantised(graph, numbers // 2, (0.5,), None),
        quantised(graph, numbers // 3, (2.0, 4.0, 8.0, 16.0)),
    ]


@pytest.mark.parametrize("rounded", ["", "v", "kvp"])
def test_attention_is_found_and_its_scales_are_stacked(x32, numbers, rounded):
    graph, x = x32
    found = attention(graph, x, projections(graph, numbers), rounded)
    out = quantised(graph, numbers[:4, :])
    graph.add_output("y", graph.add("matmul", [pair(graph, found, 9.0, 0), out]))
    compiled(graph)
    ops = [n.op for n in graph.nodes]
    assert ops == ["quantize", "linear_int8", "attention", "linear_int8"]
    qkv, context, _ = graph.nodes[1:]
    np.testing.assert_array_equal(qkv.input(2).data, [*ROWS, *[0.5] * 4, 2.0, 4.0, 8.0, 16.0])
    stacked = np.concatenate([numbers.T, numbers.T // 2, numbers.T // 3])
    np.testing.assert_array_equal(qkv.input(1).data, stacked)
    assert (context.attrs["out_scale"], context.attrs["out_zero_point"]) == (9.0, 0)


def test_attention_keeps_the_steps_of_its_operands(x32, numbers):
    graph, x = x32
    graph.add_output("y", attention(graph, x, projections(graph, numbers)))
    compiled(graph)
    (node,) = [n for n in graph.nodes if n.op == "attention_int8"]
    # The factor 0.5 is part of the scores' scale, so queries have twice the steps. Numbers that
    # are 154 above their zero point need larger steps around 128.
    steps = (9.0, 9.0, np.float32(9.0 * 154 / 127).item())
    assert tuple(node.attrs[f"{n}_scale"] for n in "qkv") == steps
    assert node.attrs["scale"] == 0.5
    (qkv,) = [n for n in graph.nodes if n.op == "linear_int8"]
    own = np.array([*ROWS, *[0.5] * 4, 2.0, 4.0, 8.0, 16.0], np.float32)
    np.testing.assert_array_equal(
        qkv.input(2).data, own / np.repeat(np.array(steps, np.float32), 4)
    )


def test_operands_that_no_attention_takes_are_not_rounded(x32):
    graph, x = x32
    y = graph.add("add", [x, x])
    turned = graph.add("transpose", [pair(graph, y)], {"perm": (0, 2, 1)})
    graph.add_output("y", graph.add("matmul", [pair(graph, y), turned]))
    compiled(graph)
    assert sorted(n.op for n in graph.nodes) == ["add", "matmul", "transpose"]


def test_products_that_are_quantised_unlike_are_not_merged(x32, numbers):
    graph, x = x32
    weights = [quantised(graph, numbers), quantised(graph, numbers // 2)]
    weights.append(graph.add_constant(numbers.astype(np.float32), "plain"))
    graph.add_output("y", attention(graph, x, weights))
    compiled(graph)
    assert Counter(n.op for n in graph.nodes)["linear_int8"] == 2


def relu_of(kind: str, graph: Graph, x, weight) -> Value:
    """A value on both sides of zero, of which the quantiser has removed the relu."""
    product = graph.add("matmul", [x, weight])
    match kind:
        case "sum":
            return graph.add("add", [product, x])
        case "norm":
            gamma = graph.add_constant(np.ones(8, np.float32))
            return graph.add("layer_norm", [product, gamma], {"epsilon": 1e-5})
    return product


@pytest.mark.parametrize("kind", ["product", "sum", "norm"])
@pytest.mark.parametrize("keep", [Roundings.PRODUCTS, Roundings.NONE])
def test_a_relu_that_was_removed_is_there_whatever_comes_of_the_rounding(x32, kind, keep, rng):
    """The product that reads it stays fp32 here, and so does a sum."""
    graph, x = x32
    numbers = rng.integers(-9, 10, (2, 8, 8))
    weight, other = (quantised(graph, w, (0.1,) * 8) for w in numbers)
    rounded = pair(graph, relu_of(kind, graph, x, weight), 0.05, 0, U8)
    graph.add_output("y", graph.add("matmul", [rounded, other]))
    graph.add_output("z", graph.add("neg", [rounded]))
    inputs = feed(rng)
    before = run(graph, inputs)
    for one in (AbsorbQdq(keep), FuseLinear(), Quantize({}, keep_fp32=("*",))):
        one.run(graph)
    assert {n.op for n in graph.nodes} & {"quantize", "linear_int8"} == set()
    after = run(graph, inputs)
    assert (before["z"] == 0).mean() > 0.2
    # Rounding is gone: half a step of 0.05, times 8 weights of at most 0.9.
    np.testing.assert_allclose(after["z"], before["z"], rtol=0, atol=0.026)
    np.testing.assert_allclose(after["y"], before["y"], rtol=0, atol=8 * 0.9 * 0.026)


def test_what_is_never_negative_is_not_cut_off(x32, numbers):
    """softmax, squares and their means, 1 + erf: their zero points are at the end anyway."""
    graph, x = x32
    product = graph.add("matmul", [x, quantised(graph, numbers)])
    two, one = (graph.add_constant(np.float32(v)) for v in (2, 1))
    square = graph.add("pow", [product, two])
    mean = graph.add("reduce_mean", [square], {"axes": (2,), "keepdims": True})
    made = [
        graph.add("softmax", [product], {"axis": 2}),
        graph.add("add", [graph.add("erf", [product]), one]),
        graph.add("mul", [product, product]),
        graph.add("sqrt", [graph.add("add", [mean, one])]),
        graph.add("where", [graph.add("is_nan", [product]), one, graph.add("exp", [product])]),
    ]
    made += [graph.add("reduce_mean", [product], {"axes": (2,), "keepdims": True})]
    made += [graph.add("gather", [graph.add("relu", [product]), graph.add_constant(np.array([0]))],
                       {"axis": 1})]  # fmt: skip
    for i, value in enumerate(made):
        graph.add_output(f"y{i}", pair(graph, value, 0.1, 0))
    assert "clip" not in absorbed(graph)[0]
