"""A schedule per node, or an error that names the node."""

from __future__ import annotations

import pytest

from sparsec.errors import NoSchedule
from sparsec.ir.schedule import Schedule
from sparsec.passes.assign_schedules import AssignSchedules


def test_every_node_gets_what_the_lookup_says(x32):
    graph, x = x32
    graph.add_output("y", graph.add("exp", [graph.add("neg", [x])]))
    AssignSchedules(lambda node: Schedule(node.op, "avx2")).run(graph)
    assert [str(n.schedule) for n in graph.nodes] == ["neg.avx2()", "exp.avx2()"]


def test_the_error_names_node_op_and_types(x32):
    graph, x = x32
    graph.add_output("y", graph.add("exp", [x], name="layer/exp"))
    with pytest.raises(NoSchedule, match=r"layer/exp: .* exp\(f32\[batch, seq, 8\]\) -> f32"):
        AssignSchedules(lambda node: None).run(graph)
