"""Panels where kernels want them, one conversion per border."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.layouts import ROW_MAJOR, Panels
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType
from sparsec.passes import graph_pipeline
from sparsec.passes.assign_layouts import PANEL_SAFE, AssignLayouts

BATCH, SEQ = symbol("batch"), symbol("seq")


def linear(graph: Graph, x: Value, weight) -> Value:
    w = graph.add_constant(weight(8, 8))
    return graph.add("linear", [x, w, None, None], {"activation": "none"})


def layouts_are_consistent(graph: Graph) -> bool:
    """Every operand is in the layout that its reader wants; outputs are rows."""
    for node in graph.nodes:
        rule = OPS[node.op].panels
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            panels = isinstance(value.type.layout, Panels)
            follows = node.op in PANEL_SAFE or node.op == "reshape"
            if follows and isinstance(node.output.type.layout, Panels):
                wanted = not value.is_constant
            else:
                wanted = node.op == "from_panels" or bool(rule and index in rule.operands)
            if panels != wanted:
                return False
    return all(v.type.layout == ROW_MAJOR for v in graph.outputs)


def test_one_conversion_each_way(x32, check, weight):
    graph, x = x32
    y = linear(graph, linear(graph, x, weight), weight)
    graph.add_output("y", y)
    assert check(graph, AssignLayouts()).ops == {"to_panels": 1, "linear": 2, "from_panels": 1}
    assert layouts_are_consistent(graph)


def test_readers_share_a_conversion(x32, check, weight):
    graph, x = x32
    a, b = linear(graph, x, weight), linear(graph, x, weight)
    graph.add_output("y", graph.add("exp", [a]))
    graph.add_output("z", graph.add("div", [a, b]))
    graph.add_output("a", a)
    ops = check(graph, AssignLayouts()).ops
    assert (ops["to_panels"], ops["from_panels"]) == (1, 2)
    assert layouts_are_consistent(graph)


def test_elementwise_ops_stay_in_panels(x32, check, weight):
    graph, x = x32
    y = graph.add("mul", [linear(graph, x, weight), graph.add_constant(np.float32(2))])
    y = graph.add("add", [graph.add("relu", [y]), linear(graph, x, weight)])
    graph.add_output("y", linear(graph, y, weight))
    ops = check(graph, AssignLayouts()).ops
    assert (ops["to_panels"], ops["from_panels"]) == (1, 1)
    assert layouts_are_consistent(graph)


@pytest.mark.parametrize("op", ["exp", "log", "sqrt", "reciprocal"])
def test_ops_that_may_make_infinities_run_on_rows(x32, check, weight, op):
    """Lanes past the last token hold garbage that must stay finite."""
    graph, x = x32
    y = graph.add(op, [graph.add("abs", [linear(graph, x, weight)])])
    graph.add_output("y", y)
    check(graph, AssignLayouts())
    (node,) = (n for n in graph.nodes if n.op == op)
    assert node.input(0).type.layout == ROW_MAJOR
    assert layouts_are_consistent(graph)


def test_a_row_of_constants_is_no_operand_in_panels(x32, check, weight):
    graph, x = x32
    y = graph.add("mul", [linear(graph, x, weight), graph.add_constant(weight(8))])
    graph.add_output("y", y)
    check(graph, AssignLayouts())
    assert [n.op for n in graph.nodes] == ["to_panels", "linear", "from_panels", "mul"]


def test_a_reshape_that_keeps_the_channels_is_a_view_of_panels(x32, check, weight):
    graph, x = x32
    flat = graph.add("reshape", [linear(graph, x, weight)], {"shape": (BATCH * SEQ, 8)})
    graph.add_output("y", linear(graph, flat, weight))
    ops = check(graph, AssignLayouts()).ops
    assert ops == {"to_panels": 1, "linear": 2, "reshape": 1, "from_panels": 1}
    assert layouts_are_consistent(graph)


def test_a_reshape_that_splits_the_channels_works_on_rows(x32, check, weight):
    graph, x = x32
    heads = graph.add("reshape", [linear(graph, x, weight)], {"shape": (BATCH, SEQ, 2, 4)})
    graph.add_output("y", heads)
    check(graph, AssignLayouts())
    assert [n.op for n in graph.nodes] == ["to_panels", "linear", "from_panels", "reshape"]


def test_other_dtypes_stay_rows(check):
    graph = Graph("double")
    x = graph.add_input("x", DType.F64, (BATCH, SEQ, 8))
    gamma = graph.add_constant(np.ones(8))
    graph.add_output("y", graph.add("layer_norm", [x, gamma, None, None], {"epsilon": 1e-5}))
    assert check(graph, AssignLayouts()).ops == {"layer_norm": 1}


def test_zoo_model_keeps_its_answer(encoder, check):
    for one in graph_pipeline():
        one.run(encoder)
    ops = check(encoder, AssignLayouts()).ops
    assert layouts_are_consistent(encoder)
    assert ops["to_panels"] + ops["from_panels"] <= 3  # the pooler's row and two outputs
