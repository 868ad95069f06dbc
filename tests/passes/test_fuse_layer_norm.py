"""Layer normalisation as it is spelled by exporters, and the sum before it."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.fuse_layer_norm import FuseLayerNorm

EPSILON = 1e-5


def mean(graph: Graph, x: Value, axes: tuple[int, ...] = (2,)) -> Value:
    return graph.add("reduce_mean", [x], {"axes": axes, "keepdims": True})


def number(graph: Graph, value: float) -> Value:
    return graph.add_constant(np.float32(value))


def spread(graph: Graph, d: Value, power: bool, axes: tuple[int, ...] = (2,)) -> Value:
    """sqrt(mean(d ** 2) + epsilon)"""
    square = graph.add("pow", [d, number(graph, 2)]) if power else graph.add("mul", [d, d])
    variance = mean(graph, square, axes)
    return graph.add("sqrt", [graph.add("add", [variance, number(graph, EPSILON)])])


def affine(graph: Graph, y: Value, weight) -> Value:
    scaled = graph.add("mul", [y, graph.add_constant(weight(8))])
    return graph.add("add", [scaled, graph.add_constant(weight(8))])


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("power", [True, False])
@pytest.mark.parametrize("twice", [True, False])
def test_spelled_out(x32, check, weight, divide, power, twice):
    graph, x = x32
    d = graph.add("sub", [x, mean(graph, x)])
    again = graph.add("sub", [x, mean(graph, x)]) if twice else d
    deviation = spread(graph, again, power)
    if divide:
        y = graph.add("div", [d, deviation])
    else:
        y = graph.add("mul", [d, graph.add("reciprocal", [deviation])])
    graph.add_output("y", affine(graph, y, weight))
    assert check(graph, Canonicalize(), FuseLayerNorm()).ops == {"layer_norm": 1}
    assert graph.nodes[0].attrs["epsilon"] == pytest.approx(EPSILON)
    assert all(v is not None for v in graph.nodes[0].inputs[:3])


def test_casts_to_the_same_dtype_are_no_hindrance(x32, check, weight):
    graph, x = x32
    cast = {"to": DType.F32}
    d = graph.add("cast", [graph.add("sub", [x, mean(graph, x)])], cast)
    y = graph.add("div", [d, graph.add("cast", [spread(graph, d, True)], cast)])
    graph.add_output("y", affine(graph, y, weight))
    assert check(graph, Canonicalize(), FuseLayerNorm()).ops == {"layer_norm": 1}


def test_scale_and_shift_folded_as_tensorflow_does(x32, check, weight):
    graph, x = x32
    centre = mean(graph, x)
    d = graph.add("sub", [x, centre])
    inverse = graph.add("reciprocal", [spread(graph, d, False)])
    scale = graph.add("mul", [inverse, graph.add_constant(weight(8))])
    shift = graph.add("sub", [graph.add_constant(weight(8)), graph.add("mul", [centre, scale])])
    graph.add_output("y", graph.add("add", [graph.add("mul", [x, scale]), shift]))
    assert check(graph, FuseLayerNorm()).ops == {"layer_norm": 1}


def test_without_scale_and_shift(x32, check):
    graph, x = x32
    d = graph.add("sub", [x, mean(graph, x)])
    graph.add_output("y", graph.add("div", [d, spread(graph, d, False)]))
    assert check(graph, FuseLayerNorm()).ops == {"layer_norm": 1}


@pytest.mark.parametrize("axes", [(1,), (1, 2)])
def test_over_other_axes_it_stays(x32, check, axes):
    graph, x = x32
    d = graph.add("sub", [x, mean(graph, x, axes)])
    graph.add_output("y", graph.add("div", [d, spread(graph, d, False, axes)]))
    checked = check(graph, FuseLayerNorm(), sizes=[(2, 5)])
    assert "layer_norm" not in checked.ops
    assert "the mean is not over the last axis alone" in checked.notes


def norm(graph: Graph, x: Value, weight) -> Value:
    gamma, beta = graph.add_constant(weight(8)), graph.add_constant(weight(8))
    return graph.add("layer_norm", [x, gamma, beta, None], {"epsilon": EPSILON})


def residual(graph: Graph) -> Value:
    return graph.add_input("r", DType.F32, (symbol("batch"), symbol("seq"), 8))


def test_the_sum_before_it_becomes_the_residual(x32, check, weight):
    graph, x = x32
    total = graph.add("add", [x, residual(graph)])
    graph.add_output("y", norm(graph, total, weight))
    assert check(graph, FuseLayerNorm()).ops == {"layer_norm": 1}


def test_a_sum_that_is_read_elsewhere_stays(x32, check, weight):
    graph, x = x32
    total = graph.add("add", [x, residual(graph)])
    graph.add_output("y", norm(graph, total, weight))
    graph.add_output("sum", total)
    checked = check(graph, FuseLayerNorm())
    assert checked.ops == {"add": 1, "layer_norm": 1}
    assert "AbsorbResidual at layer_norm: the sum is read elsewhere" in checked.notes


def test_a_summand_of_another_shape_is_no_residual(x32, check, weight):
    graph, x = x32
    row = graph.add_input("row", DType.F32, (1, 1, 8))
    graph.add_output("y", norm(graph, graph.add("add", [x, row]), weight))
    assert "differ in shape" in check(graph, FuseLayerNorm()).notes


@pytest.mark.parametrize("op", ["mul", "add"])
@pytest.mark.parametrize("shape", [(8, 1), (1, 8, 1)], ids=str)
def test_a_number_per_token_is_no_affine(op, shape, check, weight):
    """Not even where there are as many tokens as channels."""
    graph = Graph("square")
    x = graph.add_input("x", DType.F32, (2, 8, 8))
    ones = graph.add_constant(np.ones(8, np.float32))
    y = graph.add("layer_norm", [x, ones], {"epsilon": 1e-5})
    graph.add_output("y", graph.add(op, [y, graph.add_constant(weight(*shape))]))
    assert check(graph, FuseLayerNorm()).ops == {"layer_norm": 1, op: 1}


def test_scale_after_a_full_layer_norm_stays(x32, check, weight):
    graph, x = x32
    y = norm(graph, x, weight)
    graph.add_output("y", graph.add("mul", [y, graph.add_constant(weight(8))]))
    assert check(graph, FuseLayerNorm()).ops == {"layer_norm": 1, "mul": 1}


def test_zoo_model_keeps_its_answer(encoder, check):
    Canonicalize().run(encoder)
    ops = check(encoder, FuseLayerNorm()).ops
    assert ops["layer_norm"] == 5
    assert not ops["reduce_mean"]
