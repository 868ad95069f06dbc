"""Products over integers of values with a constant scale, as SparseML writes them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sparsec.interpreter import run
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes import Quantization, graph_pipeline, int8_pipeline, is_quantized
from sparsec.passes.absorb_integer import AbsorbInteger
from sparsec.passes.manager import PassManager

SCALE, ZERO = 0.25, 120  # of values
STEP = 0.5  # of weights


def stored(
    graph: Graph, x: Value, scale: float = SCALE, zero: int = ZERO, dtype: DType = DType.U8
) -> Value:
    return graph.add("quantize", [x], {"scale": scale, "zero_point": zero, "dtype": dtype})


def constant(graph: Graph, value: object, dtype: type) -> Value:
    return graph.add_constant(np.asarray(value, dtype), "c")


def integer_product(
    graph: Graph,
    q: Value,
    w: Value,
    *,
    scale: object = SCALE * STEP,
    zero: int = ZERO,
    w_zero: Value | None = None,
    bias: Value | None = None,
) -> Value:
    dtype = q.type.dtype.numpy
    sums = graph.add("matmul_integer", [q, w, constant(graph, zero, dtype), w_zero])
    sums = sums if bias is None else graph.add("add", [sums, bias])
    real = graph.add("cast", [sums], {"to": DType.F32})
    return graph.add("mul", [real, constant(graph, scale, np.float32)])


@pytest.fixture
def weight(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-127, 128, (8, 4)).astype(np.int8)


def feed(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": (rng.standard_normal((2, 5, 8)) * 20).astype(np.float32)}


def absorbed(graph: Graph, rng: np.random.Generator) -> tuple[Counter[str], str]:
    """Runs the pass and holds it to the graph before; returns the ops and the notes."""
    arrays = feed(rng)
    before = run(graph, arrays)
    (record,) = PassManager([AbsorbInteger()]).run(graph)
    for name, wanted in run(graph, arrays).items():
        np.testing.assert_allclose(wanted, before[name], rtol=2e-6, atol=1e-4)
    return Counter(n.op for n in graph.nodes), "\n".join(record["notes"])


def test_a_layer_with_its_bias(x32, weight, rng):
    graph, x = x32
    bias = constant(graph, rng.integers(-5000, 5000, 4), np.int32)
    y = integer_product(graph, stored(graph, x), constant(graph, weight, np.int8), bias=bias)
    graph.add_output("y", y)
    ops, _ = absorbed(graph, rng)
    assert ops == {"quantize": 1, "dequantize": 1, "matmul": 1, "add": 1}


def test_the_weights_keep_their_integers(x32, weight, rng):
    """They reach the int8 kernel as they are, of u8 too."""
    graph, x = x32
    w = constant(graph, weight.astype(np.int16) + 128, np.uint8)
    scale = SCALE * np.array([0.5, 0.25, 0.125, 1.0])
    y = integer_product(
        graph, stored(graph, x), w, scale=scale, w_zero=constant(graph, 128, np.uint8)
    )
    graph.add_output("y", y)
    PassManager(graph_pipeline()).run(graph)
    assert is_quantized(graph)
    PassManager(int8_pipeline(Quantization({}))).run(graph)
    (product,) = (n for n in graph.nodes if n.op == "linear_int8")
    np.testing.assert_array_equal(product.input(1).data, weight.T)
    np.testing.assert_array_equal(product.input(2).data, scale.astype(np.float32) / SCALE)


@pytest.mark.parametrize(("dtype", "zero"), [(DType.U8, 3), (DType.I8, -7)])
def test_views_may_lie_between(x32, weight, rng, dtype, zero):
    graph, x = x32
    moved = graph.add("transpose", [stored(graph, x, zero=zero, dtype=dtype)], {"perm": (1, 0, 2)})
    y = integer_product(graph, moved, constant(graph, weight, np.int8), zero=zero)
    graph.add_output("y", y)
    ops, _ = absorbed(graph, rng)
    assert ops == {"quantize": 1, "transpose": 1, "dequantize": 1, "matmul": 1}


@pytest.mark.parametrize(("scale", "rest"), [(0.25 * 0.125, 0), (0.25, 1)])
def test_two_values(x32, rng, scale, rest):
    graph, x = x32
    other = graph.add("transpose", [x], {"perm": (0, 2, 1)})
    right = stored(graph, other, 0.125, 5)
    sums = [stored(graph, x), right, constant(graph, ZERO, np.uint8), constant(graph, 5, np.uint8)]
    real = graph.add("cast", [graph.add("matmul_integer", sums)], {"to": DType.F32})
    graph.add_output("y", graph.add("mul", [real, constant(graph, scale, np.float32)]))
    ops, _ = absorbed(graph, rng)
    assert (ops["matmul"], ops["dequantize"], ops["mul"]) == (1, 2, rest)


def test_products_share_what_they_read(x32, weight, rng):
    graph, x = x32
    q, w = stored(graph, x), constant(graph, weight, np.int8)
    for name, scale in (("y", SCALE * STEP), ("z", SCALE)):
        graph.add_output(name, integer_product(graph, q, w, scale=scale))
    ops, _ = absorbed(graph, rng)
    assert ops == {"quantize": 1, "dequantize": 1, "matmul": 2}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"zero": ZERO + 1}, "read with another zero point"),
        ({"scale": np.full((1, 1, 4), 0.5)}, "neither one nor one per column"),
        ({"scale": -SCALE}, "not positive throughout"),
    ],
)
def test_what_is_no_such_product_stays(x32, weight, rng, options, reason):
    graph, x = x32
    w = constant(graph, weight, np.int8)
    graph.add_output("y", integer_product(graph, stored(graph, x), w, **options))
    ops, notes = absorbed(graph, rng)
    assert ops["matmul_integer"] == 1
    assert reason in notes


def test_values_that_were_not_quantised_by_a_constant_stay(x32, weight, rng):
    graph, x = x32
    bytes_ = graph.add("cast", [graph.add("abs", [x])], {"to": DType.U8})
    graph.add_output("y", integer_product(graph, bytes_, constant(graph, weight, np.int8)))
    ops, notes = absorbed(graph, rng)
    assert ops["matmul_integer"] == 1
    assert "not quantised" in notes
