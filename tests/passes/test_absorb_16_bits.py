"""Roundings to 16 bits: dropped, or spelled out with the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes import Roundings, graph_pipeline
from sparsec.passes.absorb_16_bits import Absorb16Bits
from sparsec.passes.manager import PassManager

WIDE = (DType.I16, DType.U16)
SCALE = 0.001


def stored(graph: Graph, x: Value, dtype: DType, zero_point: int) -> Value:
    attrs = {"scale": SCALE, "zero_point": zero_point, "dtype": dtype}
    return graph.add("quantize", [x], attrs)


def real(graph: Graph, q: Value, zero_point: int) -> Value:
    return graph.add("dequantize", [q], {"scale": SCALE, "zero_point": zero_point})


def rounded(dtype: DType, zero_point: int) -> Graph:
    graph = Graph("g")
    x = graph.add_input("x", DType.F32, (symbol("n"), 4))
    graph.add_output("y", real(graph, stored(graph, x, dtype, zero_point), zero_point))
    return graph


def test_roundings_are_dropped():
    graph = rounded(DType.I16, 5)
    result = Absorb16Bits().run(graph)
    assert not graph.nodes
    assert result.notes == ("1 roundings to 16 bits are dropped for fp32",)


def test_what_such_a_rounding_cuts_off_stays_cut_off():
    """A relu that a quantiser removed."""
    graph = Graph("g")
    x = graph.add_input("x", DType.F32, (symbol("n"), 4))
    sum = graph.add("add", [x, graph.add_constant(np.ones(4, np.float32))])
    graph.add_output("y", real(graph, stored(graph, sum, DType.U16, 0), 0))
    Absorb16Bits().run(graph)
    assert [n.op for n in graph.nodes] == ["add", "clip"]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("zero_point", [0, 1234])
def test_all_roundings_keep_their_numbers(dtype: DType, zero_point: int, rng: np.random.Generator):
    graph = rounded(dtype, zero_point)
    ends = np.iinfo(dtype.numpy)
    x = rng.uniform(1.2 * ends.min * SCALE - 1, 1.2 * ends.max * SCALE, (500, 4))
    feed = {"x": x.astype(np.float32)}
    before = run(graph, feed)["y"]
    Absorb16Bits(Roundings.ALL).run(graph)
    assert not {"quantize", "dequantize"} & {n.op for n in graph.nodes}
    np.testing.assert_array_equal(run(graph, feed)["y"], before)


@pytest.mark.parametrize("dtype", WIDE)
def test_inputs_and_outputs_stay_integers(dtype: DType, rng: np.random.Generator):
    graph = Graph("g")
    q = graph.add_input("q", dtype, (symbol("n"), 4))
    x = graph.add("neg", [real(graph, q, 7)])
    graph.add_output("p", stored(graph, x, dtype, 9))
    ends = np.iinfo(dtype.numpy)
    feed = {"q": rng.integers(ends.min, ends.max, (100, 4)).astype(dtype.numpy)}
    before = run(graph, feed)["p"]
    PassManager(graph_pipeline()).run(graph)
    assert not {"quantize", "dequantize"} & {n.op for n in graph.nodes}
    np.testing.assert_array_equal(run(graph, feed)["p"], before)


def test_roundings_to_bytes_are_left_alone():
    graph = rounded(DType.U8, 5)
    assert Absorb16Bits().run(graph).changed == 0
    assert [n.op for n in graph.nodes] == ["quantize", "dequantize"]
