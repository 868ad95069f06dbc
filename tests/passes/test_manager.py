"""The pass manager names the pass that is to blame."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sparsec.errors import NoSchedule, PassFailed
from sparsec.ir.graph import Graph
from sparsec.passes.base import PassResult
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.manager import PassManager


@dataclass(frozen=True)
class BreakOrder:
    name: str = "break_order"

    def run(self, graph: Graph) -> PassResult:
        graph.nodes.reverse()
        return PassResult(1)


@dataclass(frozen=True)
class Crash:
    error: Exception
    name: str = "crash"

    def run(self, graph: Graph) -> PassResult:
        raise self.error


@pytest.fixture
def graph(x32):
    graph, x = x32
    graph.add_output("y", graph.add("neg", [graph.add("exp", [x])]))
    return graph


def test_the_verifier_names_the_culprit(graph):
    with pytest.raises(PassFailed, match="pass break_order left test in a wrong state"):
        PassManager([Canonicalize(), BreakOrder()]).run(graph)


def test_a_crash_names_the_culprit(graph):
    with pytest.raises(PassFailed, match="pass crash failed on test: KeyError: 'k'"):
        PassManager([Crash(KeyError("k"))]).run(graph)


def test_errors_for_the_user_pass_unchanged(graph):
    with pytest.raises(NoSchedule, match="nothing computes this"):
        PassManager([Crash(NoSchedule("nothing computes this"))]).run(graph)


def test_records_and_dumps_follow_the_order(graph):
    seen = []
    manager = PassManager([Canonicalize(), Canonicalize("again")], dump=lambda *a: seen.append(a))
    records = manager.run(graph)
    assert [(r["name"], r["nodes"]) for r in records] == [("canonicalize", 2), ("again", 2)]
    assert seen == [("canonicalize", graph), ("again", graph)]
    assert all(r["seconds"] >= 0 for r in records)
