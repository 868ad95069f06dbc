"""Queries, keys and values by one product."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.fuse_attention import FuseAttention
from sparsec.passes.fuse_linear import FuseLinear
from sparsec.passes.merge_qkv import MergeQkv

BATCH, SEQ = symbol("batch"), symbol("seq")
ATTRS = {"heads": 2, "head_size": 4, "scale": 0.5, "q_offset": 0, "k_offset": 0, "v_offset": 0}


def linear(graph: Graph, x: Value, w: Value, b: Value | None = None, activation="none") -> Value:
    return graph.add("linear", [x, w, b, None], {"activation": activation})


def attend(graph: Graph, q: Value, k: Value, v: Value, **attrs) -> Value:
    return graph.add("attention", [q, k, v, None], ATTRS | attrs)


def constants(graph: Graph, weight, *shape: int) -> list[Value]:
    return [graph.add_constant(weight(*shape)) for _ in "qkv"]


@pytest.mark.parametrize("biases", [(0, 1, 2), (), (0, 2)], ids=str)
def test_three_products_become_one(x32, check, weight, biases):
    graph, x = x32
    ws, bs = constants(graph, weight, 8, 8), constants(graph, weight, 8)
    qkv = [linear(graph, x, w, bs[i] if i in biases else None) for i, w in enumerate(ws)]
    graph.add_output("y", attend(graph, *qkv))
    assert check(graph, MergeQkv()).ops == {"linear": 1, "attention": 1}
    first, second = graph.nodes
    assert first.input(1).type.shape == (24, 8)
    assert (first.inputs[2] is None) == (not biases)
    assert [second.attrs[f"{n}_offset"] for n in "qkv"] == [0, 8, 16]
    assert set(second.inputs[:3]) == {first.output}


def test_layers_that_share_weights_share_the_stack(x32, check, weight):
    graph, x = x32
    ws = constants(graph, weight, 8, 8)
    for _ in range(2):
        x = attend(graph, *(linear(graph, x, w) for w in ws))
    graph.add_output("y", x)
    assert check(graph, MergeQkv()).ops == {"linear": 2, "attention": 2}
    assert len(graph.constants()) == 1


def test_products_of_flattened_tokens(x32, check, weight):
    """Exports of TensorFlow multiply [batch * seq, channels]."""
    graph, x = x32
    flat = graph.add("reshape", [x], {"shape": (BATCH * SEQ, 8)})
    qkv = [
        graph.add("reshape", [linear(graph, flat, w)], {"shape": (BATCH, SEQ, 8)})
        for w in constants(graph, weight, 8, 8)
    ]
    graph.add_output("y", attend(graph, *qkv))
    assert check(graph, MergeQkv()).ops == {"linear": 1, "reshape": 2, "attention": 1}


def test_slices_of_one_product_are_offsets(x32, check, weight):
    graph, x = x32
    y = linear(graph, x, graph.add_constant(weight(24, 8)))
    parts = [
        graph.add("slice", [y], {"axes": (2,), "starts": (a,), "ends": (a + 8,), "steps": (1,)})
        for a in (0, 8, 16)
    ]
    graph.add_output("y", attend(graph, *parts))
    assert check(graph, MergeQkv()).ops == {"linear": 1, "attention": 1}
    assert graph.nodes[-1].attrs["v_offset"] == 16


def of_another_input(graph: Graph, x: Value, weight) -> Value:
    ws = constants(graph, weight, 8, 8)
    inputs = [x, x, graph.add("exp", [x])]
    return attend(graph, *(linear(graph, i, w) for i, w in zip(inputs, ws, strict=True)))


def with_activation(graph: Graph, x: Value, weight) -> Value:
    ws = constants(graph, weight, 8, 8)
    return attend(graph, *(linear(graph, x, w, activation="relu") for w in ws))


def read_twice(graph: Graph, x: Value, weight) -> Value:
    q, k, v = (linear(graph, x, w) for w in constants(graph, weight, 8, 8))
    return graph.add("add", [attend(graph, q, k, v), v])


def with_spare_channels(graph: Graph, x: Value, weight) -> Value:
    return attend(graph, *(linear(graph, x, w) for w in constants(graph, weight, 12, 8)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_another_input, ""),
        (with_activation, "q is more than a product and a bias"),
        (read_twice, "v is read elsewhere"),
        (with_spare_channels, "q has other channels than those of the heads"),
    ],
)
def test_refused_with_a_reason(x32, check, weight, make, reason):
    graph, x = x32
    graph.add_output("y", make(graph, x, weight))
    checked = check(graph, MergeQkv())
    assert checked.ops["linear"] == 3
    assert reason in checked.notes


def test_zoo_model_keeps_its_answer(encoder, check):
    for one in (Canonicalize(), FuseLinear(), FuseAttention(), Canonicalize()):
        one.run(encoder)
    before = sum(n.op == "linear" for n in encoder.nodes)
    assert check(encoder, MergeQkv()).ops["linear"] == before - 2 * 2
    stacked = [n.input(1).data for n in encoder.nodes if n.op == "linear"]
    assert sum(w.shape[0] == 3 * w.shape[1] for w in stacked if isinstance(w, np.ndarray)) == 2
