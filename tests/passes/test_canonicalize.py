"""Identities, folding and sharing, one graph each."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes.canonicalize import GROWTH_BYTES, Canonicalize

BATCH, SEQ = symbol("batch"), symbol("seq")


def constant(graph: Graph, *values: float) -> Value:
    data = np.array(values[0] if len(values) == 1 else values, np.float32)
    return graph.add_constant(data)


NEUTRAL = {
    "x + 0": lambda g, x: g.add("add", [x, constant(g, 0)]),
    "0 + x": lambda g, x: g.add("add", [constant(g, 0), x]),
    "x - 0": lambda g, x: g.add("sub", [x, constant(g, 0)]),
    "x * 1": lambda g, x: g.add("mul", [x, constant(g, *[1] * 8)]),
    "x / 1": lambda g, x: g.add("div", [x, constant(g, 1)]),
    "x ** 1": lambda g, x: g.add("pow", [x, constant(g, 1)]),
    "cast to own dtype": lambda g, x: g.add("cast", [x], {"to": DType.F32}),
    "two negations": lambda g, x: g.add("neg", [g.add("neg", [x])]),
    "reshape to own shape": lambda g, x: g.add("reshape", [x], {"shape": x.type.shape}),
    "reshape there and back": lambda g, x: g.add(
        "reshape",
        [g.add("reshape", [x], {"shape": (BATCH * SEQ, 8)})],
        {"shape": x.type.shape},
    ),
    "transpose there and back": lambda g, x: g.add(
        "transpose", [g.add("transpose", [x], {"perm": (2, 0, 1)})], {"perm": (1, 2, 0)}
    ),
    "broadcast to own shape": lambda g, x: g.add("broadcast_to", [x], {"shape": x.type.shape}),
    "full slice": lambda g, x: g.add(
        "slice", [x], {"axes": (2,), "starts": (0,), "ends": (8,), "steps": (1,)}
    ),
    "concat of one": lambda g, x: g.add("concat", [x], {"axis": 0}),
    "where(true, x, y)": lambda g, x: g.add(
        "where", [g.add_constant(np.array([True])), x, g.add("exp", [x])]
    ),
    "where(c, x, x)": lambda g, x: g.add("where", [g.add("less", [x, g.add("exp", [x])]), x, x]),
}


@pytest.mark.parametrize("make", NEUTRAL.values(), ids=NEUTRAL.keys())
def test_what_changes_nothing_goes(x32, check, make):
    graph, x = x32
    graph.add_output("y", graph.add("exp", [make(graph, x)]))
    assert check(graph, Canonicalize()).ops == {"exp": 1}


def reshape(graph: Graph, x: Value, *shape) -> Value:
    return graph.add("reshape", [x], {"shape": shape})


def split(graph: Graph, x: Value) -> Value:
    """[batch, seq, 2, 4], by a node that does not melt into other reshapes."""
    return graph.add("exp", [reshape(graph, x, BATCH, SEQ, 2, 4)])


SIMPLER = {
    "x / 8": (lambda g, x: g.add("div", [x, constant(g, 8)]), {"mul": 1}),
    "x / 3 stays": (lambda g, x: g.add("div", [x, constant(g, 3)]), {"div": 1}),
    "1 / x": (lambda g, x: g.add("div", [constant(g, 1), x]), {"reciprocal": 1}),
    "x - c": (lambda g, x: g.add("sub", [x, constant(g, 3)]), {"add": 1}),
    "x ** 2": (lambda g, x: g.add("pow", [x, constant(g, 2)]), {"mul": 1}),
    "x ** 3": (lambda g, x: g.add("pow", [x, constant(g, 3)]), {"mul": 2}),
    "x ** 5 stays": (lambda g, x: g.add("pow", [x, constant(g, 5)]), {"pow": 1}),
    "where(not c, a, b)": (
        lambda g, x: g.add(
            "where",
            [g.add("logical_not", [g.add("less", [x, constant(g, 0)])]), x, constant(g, 2)],
        ),
        {"less": 1, "where": 1},
    ),
    "transpose of axes of size 1": (
        lambda g, x: g.add("transpose", [reshape(g, x, BATCH, SEQ, 1, 8)], {"perm": (0, 2, 1, 3)}),
        {"reshape": 1},
    ),
    "transpose under merged axes": (
        lambda g, x: reshape(
            g,
            g.add("transpose", [reshape(g, split(g, x), BATCH * SEQ, 2, 4)], {"perm": (0, 2, 1)}),
            *(BATCH, SEQ, 4, 2),
        ),
        {"reshape": 1, "exp": 1, "transpose": 1},
    ),
    "broadcast before a sum": (
        lambda g, x: g.add(
            "add",
            [x, g.add("broadcast_to", [reshape(g, x, BATCH, SEQ, 8)], {"shape": x.type.shape})],
        ),
        {"add": 1},
    ),
    "uniform constant": (
        lambda g, x: g.add("mul", [x, g.add_constant(np.full((1, 1, 8), 2, np.float32))]),
        {"mul": 1},
    ),
}


@pytest.mark.parametrize(("make", "ops"), SIMPLER.values(), ids=SIMPLER.keys())
def test_simpler_form(x32, check, make, ops):
    graph, x = x32
    graph.add_output("y", make(graph, x))
    assert check(graph, Canonicalize()).ops == ops


def test_an_elementwise_op_runs_before_the_broadcast(x32, check):
    graph, x = x32
    wide = graph.add("broadcast_to", [x], {"shape": (4, BATCH, SEQ, 8)})
    y = graph.add("exp", [graph.add("mul", [wide, constant(graph, 2)])])
    graph.add_output("y", y)
    assert check(graph, Canonicalize()).ops == {"mul": 1, "exp": 1, "broadcast_to": 1}
    assert [n.op for n in graph.nodes][-1] == "broadcast_to"


def test_constants_fold_and_large_ones_do_not_grow(x32, check):
    graph, x = x32
    c = graph.add("exp", [constant(graph, *range(8))])
    rows = GROWTH_BYTES // 32 + 2  # 32 bytes each
    table = graph.add("broadcast_to", [constant(graph, *range(8))], {"shape": (rows, 8)})
    graph.add_output("y", graph.add("add", [x, c]))
    graph.add_output("z", table)
    assert check(graph, Canonicalize()).ops == {"add": 1, "broadcast_to": 1}


def test_a_constant_look_up_out_of_range_is_left_to_the_run(x32):
    graph, x = x32
    table, wrong = constant(graph, 1, 2), graph.add_constant(np.array([5]))
    y = graph.add("add", [x, graph.add("gather", [table, wrong], {"axis": 0})])
    graph.add_output("y", y)
    Canonicalize().run(graph)
    assert [n.op for n in graph.nodes] == ["gather", "add"]


def test_repeated_nodes_and_constants_are_shared(x32, check):
    graph, x = x32
    a = graph.add("add", [graph.add("exp", [x]), constant(graph, 1, 2, 3, 4, 5, 6, 7, 8)])
    b = graph.add("add", [graph.add("exp", [x]), constant(graph, 1, 2, 3, 4, 5, 6, 7, 8)])
    graph.add_output("y", graph.add("mul", [a, b]))
    assert check(graph, Canonicalize()).ops == {"exp": 1, "add": 1, "mul": 1}
    assert len(graph.constants()) == 1


def test_constants_that_differ_in_the_sign_of_zero_are_not_shared(x32):
    graph, x = x32
    for name, zero in (("plus", 0.0), ("minus", -0.0)):
        c = constant(graph, zero, 1, 2, 3, 4, 5, 6, 7)
        graph.add_output(name, graph.add("mul", [x, c]))
    Canonicalize().run(graph)
    plus, minus = (n.input(1).data for n in graph.nodes)
    assert not np.signbit(plus[0])
    assert np.signbit(minus[0])


def iota(graph: Graph, length, *shape) -> Value:
    attrs = {"start": 0, "step": 1, "length": length, "dtype": DType.I64}
    return graph.add("reshape", [graph.add("iota", [], attrs)], {"shape": shape})


@pytest.fixture
def mask() -> tuple[Graph, Value]:
    graph = Graph("mask")
    return graph, graph.add_input("mask", DType.BOOL, (BATCH, SEQ))


def test_gather_nd_by_ranges_is_a_reshape(mask, check):
    """torch's mask[batch_index, key_index] in the form of the dynamo exporter."""
    graph, x = mask
    shape = (BATCH, 1, 1, SEQ, 1)
    wide = {"shape": shape}
    columns = [iota(graph, BATCH, BATCH, 1, 1, 1, 1), iota(graph, SEQ, 1, 1, 1, SEQ, 1)]
    columns = [graph.add("broadcast_to", [c], wide) for c in columns]
    indices = graph.add("concat", columns, {"axis": 4})
    graph.add_output("y", graph.add("gather_nd", [x, indices], {"batch_dims": 0}))
    assert check(graph, Canonicalize()).ops == {"reshape": 1}


def test_gather_by_flat_ranges_is_a_reshape(mask, check):
    """The same in the form of the TorchScript exporter: mask.flatten()[b * seq + s]."""
    graph, x = mask
    flat = graph.add("reshape", [x], {"shape": (BATCH * SEQ, 1)})
    step = graph.add("dims", [], {"values": (SEQ,), "dtype": DType.I64, "shape": (1,)})
    rows = graph.add("mul", [iota(graph, BATCH, BATCH, 1, 1, 1), step])
    indices = graph.add("add", [iota(graph, SEQ, 1, 1, 1, SEQ), rows])
    graph.add_output("y", graph.add("gather", [flat, indices], {"axis": 0}))
    assert check(graph, Canonicalize()).ops == {"reshape": 1}


@pytest.mark.parametrize("wrong", ["start", "step", "order"])
def test_other_ranges_still_gather(mask, check, wrong):
    graph, x = mask
    attrs = {"start": SEQ - 1 if wrong == "step" else 0, "step": 1, "length": SEQ}
    attrs |= {"step": -1} if wrong == "step" else {}
    attrs |= {"start": -1} if wrong == "start" else {}
    keys = graph.add("iota", [], attrs | {"dtype": DType.I64})
    shape = (SEQ, BATCH, 1) if wrong == "order" else (BATCH, SEQ, 1)
    b, s = ((1, BATCH, 1), (SEQ, 1, 1)) if wrong == "order" else ((BATCH, 1, 1), (1, SEQ, 1))
    columns = [iota(graph, BATCH, *b), graph.add("reshape", [keys], {"shape": s})]
    columns = [graph.add("broadcast_to", [c], {"shape": shape}) for c in columns]
    indices = graph.add("concat", columns, {"axis": 2})
    graph.add_output("y", graph.add("gather_nd", [x, indices], {"batch_dims": 0}))
    assert check(graph, Canonicalize()).ops["gather_nd"] == 1


def test_a_range_is_not_negative(mask, check):
    graph, x = mask
    zero = graph.add_constant(np.array(0))
    real = graph.add("greater_equal", [iota(graph, SEQ, 1, SEQ), zero])
    graph.add_output("y", graph.add("logical_and", [x, real]))
    graph.add_output("z", graph.add("logical_not", [graph.outputs[0]]))
    assert check(graph, Canonicalize()).ops == {"logical_not": 1}


def test_a_range_is_not_less_than_its_start(mask, check):
    graph, x = mask
    zero = graph.add_constant(np.array(0))
    below = graph.add("less", [iota(graph, SEQ, 1, SEQ), zero])
    real = graph.add("logical_not", [below])
    graph.add_output("y", graph.add("logical_not", [graph.add("logical_and", [x, real])]))
    assert check(graph, Canonicalize()).ops == {"logical_not": 1}


def test_floats_may_be_neither_less_nor_greater(x32, check):
    graph, x = x32
    less = graph.add("less", [x, graph.add_constant(np.array(0, np.float32))])
    graph.add_output("y", graph.add("logical_not", [less]))
    assert check(graph, Canonicalize()).ops == {"less": 1, "logical_not": 1}


def test_a_slice_of_a_stored_range_is_a_range(check):
    graph = Graph("ids")
    graph.add_input("x", DType.F32, (BATCH, SEQ))
    stored = graph.add_constant(np.arange(64)[None])
    attrs = {"axes": (1,), "starts": (2,), "ends": (SEQ + 2,), "steps": (1,)}
    graph.add_output("y", graph.add("slice", [stored], attrs))
    assert check(graph, Canonicalize()).ops == {"iota": 1, "reshape": 1}


def test_zoo_model_keeps_its_answer_and_its_normal_form(encoder, check):
    check(encoder, Canonicalize())
    assert Canonicalize().run(encoder).changed == 0
