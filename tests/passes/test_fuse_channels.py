"""Gated activations, rotary embedding, and the ways to split one product into parts."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.fuse_attention import FuseAttention
from sparsec.passes.fuse_channels import FuseChannels, FuseRotaryEmbedding
from sparsec.passes.merge_qkv import MergeQkv

BATCH, SEQ = symbol("batch"), symbol("seq")
HEADS, SIZE = 2, 4


def cut(graph: Graph, x: Value, axis: int, start: int, end: int) -> Value:
    attrs = {"axes": (axis,), "starts": (start,), "ends": (end,), "steps": (1,)}
    return graph.add("slice", [x], attrs)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gated_activation(x32, check, gate_first, activation):
    graph, x = x32
    halves = cut(graph, x, 2, 0, 4), cut(graph, x, 2, 4, 8)
    gate, value = halves if gate_first else halves[::-1]
    attrs = {"approximate": "tanh"} if activation == "gelu" else {}
    active = graph.add(activation, [gate], attrs)
    graph.add_output("y", graph.add("mul", [value, active]))
    assert check(graph, FuseChannels()).ops == {"gated": 1}
    found = graph.nodes[0].attrs
    assert (found["offset"], found["gate_offset"]) == ((4, 0) if gate_first else (0, 4))
    assert found["activation"] == ("gelu_tanh" if activation == "gelu" else "silu")


def test_a_gate_over_tokens_is_not_one_over_channels(x32, check):
    graph, x = x32
    gate = graph.add("silu", [cut(graph, x, 1, 0, 1)])
    graph.add_output("y", graph.add("mul", [cut(graph, x, 1, 0, 1), gate]))
    checked = check(graph, FuseChannels())
    assert "gated" not in checked.ops
    assert "not a slice of consecutive channels" in checked.notes


def rotated(graph: Graph, x: Value, cos: Value, sin: Value, *, swapped: bool = False) -> Value:
    """x * cos + [-high, low] * sin over the last of four axes."""
    size = x.type.shape[3]
    low, high = cut(graph, x, 3, 0, size // 2), cut(graph, x, 3, size // 2, size)
    parts = [low, graph.add("neg", [high])] if swapped else [graph.add("neg", [high]), low]
    turned = graph.add("concat", parts, {"axis": 3})
    return graph.add("add", [graph.add("mul", [x, cos]), graph.add("mul", [turned, sin])])


def heads_of(graph: Graph, x: Value, *, heads_first: bool) -> Value:
    split = graph.add("reshape", [x], {"shape": (BATCH, SEQ, HEADS, SIZE)})
    return graph.add("transpose", [split], {"perm": (0, 2, 1, 3)}) if heads_first else split


@pytest.mark.parametrize("heads_first", [True, False])
def test_rotary(x32, check, heads_first):
    graph, x = x32
    tables = [graph.add_input(n, DType.F32, (1, SEQ, SIZE)) for n in ("cos", "sin")]
    shape = (1, 1, SEQ, SIZE) if heads_first else (1, SEQ, 1, SIZE)
    cos, sin = (graph.add("reshape", [t], {"shape": shape}) for t in tables)
    y = rotated(graph, heads_of(graph, x, heads_first=heads_first), cos, sin)
    graph.add_output("y", y)
    ops = check(graph, FuseRotaryEmbedding(), Canonicalize()).ops
    assert (ops["rotary"], ops["concat"], ops["neg"]) == (1, 0, 0)


def test_halves_the_other_way_round_are_no_rotation(x32, check):
    graph, x = x32
    tables = [graph.add_input(n, DType.F32, (1, 1, SEQ, SIZE)) for n in ("cos", "sin")]
    y = rotated(graph, heads_of(graph, x, heads_first=True), *tables, swapped=True)
    graph.add_output("y", y)
    assert check(graph, FuseRotaryEmbedding()).ops["rotary"] == 0


def test_tables_per_head_are_no_rotary(x32, check):
    graph, x = x32
    tables = [graph.add_input(n, DType.F32, (1, HEADS, SEQ, SIZE)) for n in ("cos", "sin")]
    y = rotated(graph, heads_of(graph, x, heads_first=True), *tables)
    graph.add_output("y", y)
    checked = check(graph, FuseRotaryEmbedding())
    assert checked.ops["rotary"] == 0
    assert "not one value per token" in checked.notes


def split(graph: Graph, y: Value, how: str) -> list[Value]:
    """[batch, seq, 3 * 8] as q, k and v of [batch, heads, seq, size]."""
    five = graph.add("reshape", [y], {"shape": (BATCH, SEQ, 3, HEADS, SIZE)})
    axis = 2
    if how == "after the transpose":
        five = graph.add("transpose", [five], {"perm": (0, 3, 2, 1, 4)})
    parts = [cut(graph, five, axis, n, n + 1) for n in range(3)]
    if how == "after the transpose":
        shape = (BATCH, HEADS, SEQ, SIZE)
        return [graph.add("reshape", [p], {"shape": shape}) for p in parts]
    shape = (BATCH, SEQ, HEADS, SIZE)
    four = [graph.add("reshape", [p], {"shape": shape}) for p in parts]
    return [graph.add("transpose", [p], {"perm": (0, 2, 1, 3)}) for p in four]


@pytest.mark.parametrize("how", ["before the transpose", "after the transpose"])
@pytest.mark.parametrize("rotary", [True, False])
def test_parts_of_one_product_need_no_copies(x32, check, weight, how, rotary):
    graph, x = x32
    w = graph.add_constant(weight(24, 8))
    y = graph.add("linear", [x, w, None, None], {"activation": "none"})
    q, k, v = split(graph, y, how)
    if rotary:
        angles = np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)
        cos, sin = (graph.add_constant(f(angles)) for f in (np.cos, np.sin))
        shape = {"shape": (1, 1, SEQ, SIZE)}
        cos, sin = (graph.add("broadcast_to", [t], shape) for t in (cos, sin))
        q, k = (rotated(graph, p, cos, sin) for p in (q, k))
    scores = graph.add("matmul", [q, graph.add("transpose", [k], {"perm": (0, 1, 3, 2)})])
    context = graph.add("matmul", [graph.add("softmax", [scores], {"axis": 3}), v])
    graph.add_output("y", context)
    passes = [Canonicalize(), FuseRotaryEmbedding(), FuseAttention(), Canonicalize()]
    ops = check(graph, *passes, FuseChannels(), MergeQkv()).ops
    assert (ops["linear"], ops["attention"], ops["slice"]) == (1, 1, 0)
    assert ops["rotary"] == (2 if rotary else 0)
