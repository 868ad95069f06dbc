"""A schedule per node, or an error that names the node."""

from __future__ import annotations

import pytest

from sparsec.errors import NoSchedule
from sparsec.ir.graph import Graph
from sparsec.ir.schedule import BUCKET_LIMITS, Bucket, Choice, Schedule, buckets
from sparsec.ir.types import DType
from sparsec.passes.assign_schedules import AssignSchedules


def test_every_node_gets_what_the_lookup_says(x32):
    graph, x = x32
    graph.add_output("y", graph.add("exp", [graph.add("neg", [x])]))
    AssignSchedules(lambda node, bucket: Schedule(node.op, "avx2")).run(graph)
    assert ["; ".join(map(str, n.schedules)) for n in graph.nodes] == ["neg.avx2()", "exp.avx2()"]


def test_the_error_names_node_op_and_types(x32):
    graph, x = x32
    graph.add_output("y", graph.add("exp", [x], name="layer/exp"))
    with pytest.raises(NoSchedule, match=r"layer/exp: .* exp\(f32\[batch, seq, 8\]\) -> f32"):
        AssignSchedules(lambda node, bucket: None).run(graph)


def test_buckets_hold_every_number_of_tokens_once():
    for tokens in range(1, BUCKET_LIMITS[-1] + 3):
        assert sum(tokens in bucket for bucket in buckets()) == 1
    assert [str(b) for b in (Bucket(), Bucket(0, 8), Bucket(384))] == [
        "", "1 to 8 tokens", "over 384 tokens"
    ]  # fmt: skip


def test_neighbouring_buckets_with_one_schedule_are_one(x32):
    graph, x = x32
    graph.add_output("y", graph.add("exp", [x]))
    few, many = Schedule("few", "avx2"), Schedule("many", "avx2")
    limits = (4, 8, 16, 384)
    AssignSchedules(lambda node, bucket: few if bucket.most in limits else many).run(graph)
    assert graph.nodes[0].schedules == (
        Choice(few, Bucket(0, 16)),
        Choice(many, Bucket(16, 128)),
        Choice(few, Bucket(128, 384)),
        Choice(many, Bucket(384)),
    )


def test_a_known_number_of_tokens_asks_for_one_bucket():
    graph = Graph("g")
    graph.add_output("y", graph.add("exp", [graph.add_input("x", DType.F32, (2, 9, 8))]))
    asked = []
    AssignSchedules(lambda node, b: asked.append(b) or Schedule("exp", "avx2")).run(graph)
    assert asked == [Bucket(16, 32)]
    assert graph.nodes[0].schedules == (Choice(Schedule("exp", "avx2")),)


def test_no_tokens_at_all_ask_for_the_smallest_bucket():
    graph = Graph("g")
    graph.add_output("y", graph.add("exp", [graph.add_input("x", DType.F32, (2, 0, 8))]))
    asked = []
    AssignSchedules(lambda node, b: asked.append(b) or Schedule("exp", "avx2")).run(graph)
    assert asked == [next(buckets())]
