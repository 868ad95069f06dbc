"""Graph edits, text form and verifier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph
from sparsec.ir.printer import print_graph
from sparsec.ir.schedule import Choice, Schedule
from sparsec.ir.types import DType
from sparsec.ir.verifier import verify

B, S = symbol("batch"), symbol("seq")


def sample() -> Graph:
    """gelu(x @ w.T + 1) * 2 with names of its own."""
    graph = Graph("sample")
    x = graph.add_input("x", DType.F32, (B, S, 4))
    w = graph.add_constant(np.arange(12, dtype=np.float32).reshape(3, 4), "w")
    bias = graph.add_constant(np.ones(3, np.float32), "bias")
    two = graph.add_constant(np.float32(2), "two")
    y = graph.add("linear", [x, w, bias, None], {"activation": "gelu"}, name="dense")
    z = graph.add("mul", [y, two])
    graph.add_output("z", z)
    return graph


EXPECTED = """\
graph sample
input %x : f32[batch, seq, 4]
limit seq <= 128
const %w : f32[3, 4] sha 29e18891
const %bias : f32[3] sha 8a31a40e
const %two : f32[] = [2.0]
%dense = linear(%x, %w, %bias, _) {activation="gelu"} : f32[batch, seq, 3] [gemm.avx2(mr=6)]
%mul = mul(%dense, %two) : f32[batch, seq, 3]
return z = %mul
"""


def test_text_is_stable():
    graph = sample()
    graph.add_limit(S, 128, "a table has no more rows")
    graph.set_schedules(graph.nodes[0], [Choice(Schedule("gemm", "avx2", (("mr", 6),)))])
    assert print_graph(graph) == EXPECTED


def test_text_shows_a_changed_constant():
    graph, other = sample(), sample()
    data = other.constants()[0].data
    assert data is not None
    data[0, 0] = 5
    assert print_graph(graph) != print_graph(other)


def test_a_sound_graph_passes():
    verify(sample())


def test_names_are_unique():
    graph = sample()
    assert graph.add("exp", [graph.inputs[0]], name="dense").name == "dense.1"


def test_sort_keeps_order_and_finds_cycles():
    graph = sample()
    first, second = graph.nodes
    graph.nodes.reverse()
    graph.sort()
    assert graph.nodes == [first, second]
    graph.replace_input(first, 0, second.output)
    with pytest.raises(InvalidGraph, match="cycle"):
        graph.sort()


def test_drop_dead_nodes_forgets_their_uses():
    graph = sample()
    graph.add("exp", [graph.inputs[0]])
    assert graph.drop_dead_nodes() == 1
    assert [n.op for n in graph.inputs[0].users] == ["linear"]
    verify(graph)


def test_limits_are_not_repeated():
    graph = sample()
    graph.add_limit(S, 128, "one")
    graph.add_limit(S, 128, "two")
    assert [str(limit) for limit in graph.limits] == ["seq <= 128: one"]


def _wrong_order(graph: Graph) -> None:
    graph.nodes.reverse()


def _wrong_type(graph: Graph) -> None:
    value = graph.nodes[0].output
    graph.set_type(value, value.type.with_shape((B, S, 5)))


def _wrong_uses(graph: Graph) -> None:
    graph.inputs[0].uses.clear()


def _same_name(graph: Graph) -> None:
    graph.nodes[1].output.name = "x"


def _no_output(graph: Graph) -> None:
    graph.outputs.clear()
    graph.output_names.clear()


def _foreign_output(graph: Graph) -> None:
    graph.outputs[0] = sample().outputs[0]


def _extra_attribute(graph: Graph) -> None:
    graph.set_attrs(graph.nodes[1], axis=1)


def _wrong_data(graph: Graph) -> None:
    graph.constants()[0].data = np.zeros((3, 5), np.float32)


FAULTS: list[tuple[Callable[[Graph], None], str]] = [
    (_wrong_order, "before a node"),
    (_wrong_type, r"dense \(linear\): %dense has the type"),
    (_wrong_uses, "uses of %x"),
    (_same_name, "two values have the name %x"),
    (_no_output, "no output"),
    (_foreign_output, "no node produces the output %mul"),
    (_extra_attribute, r"unknown \['axis'\]"),
    (_wrong_data, "constant %w"),
]


@pytest.mark.parametrize(("break_it", "message"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_verifier_names_the_fault(break_it: Callable[[Graph], None], message: str):
    graph = sample()
    break_it(graph)
    with pytest.raises(InvalidGraph, match=message):
        verify(graph)


def test_copy_is_equal_and_apart() -> None:
    graph = sample()
    graph.add_limit(S, 128, "so many positions")
    graph.set_schedules(graph.nodes[0], [Choice(Schedule("f", "avx2", ()))])
    before = print_graph(graph)
    copy = graph.copy()
    verify(copy)
    assert print_graph(copy) == before
    assert copy.nodes[0].input(1).data is graph.nodes[0].input(1).data
    assert copy.nodes[0].schedules == graph.nodes[0].schedules
    assert copy.unique_name("dense") == graph.unique_name("dense") == "dense.1"
    copy.replace_uses(copy.nodes[1].output, copy.nodes[0].output)
    assert copy.drop_dead_nodes() == 1
    verify(copy)
    assert print_graph(graph) == before
    verify(graph)
