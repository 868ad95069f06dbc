"""The pattern language and its driver, on rules made up for the purpose."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.graph import Value
from sparsec.ir.types import DType
from sparsec.passes.rewrite import (
    Builder,
    Match,
    Pattern,
    Reject,
    RewriteRule,
    Term,
    apply_rules,
    matches,
)


def fits(term: Term, value: Value) -> list[dict[str, Value]]:
    return [dict(b) for b in matches(term, value, {})]


def test_commutative_operands_match_both_ways(x32):
    graph, x = x32
    y = graph.add("add", [graph.add("exp", [x]), x])
    p = Pattern()
    assert fits(p.add(p.exp("a"), "b"), y) == [{"a": x, "b": x}]
    assert fits(p.add("b", p.exp("a")), y) == [{"a": x, "b": x}]
    assert fits(p.sub("b", p.exp("a")), graph.add("sub", [y, x])) == []


def test_a_name_binds_one_value(x32):
    graph, x = x32
    e = graph.add("exp", [x])
    p = Pattern()
    assert fits(p.mul("a", "a"), graph.add("mul", [x, x]))
    assert not fits(p.mul("a", "a"), graph.add("mul", [x, e]))


def test_optional_node_and_choice(x32):
    graph, x = x32
    p = Pattern()
    term = p.exp(p.maybe("neg", "a"))
    plain = graph.add("exp", [x])
    negative = graph.add("neg", [x])
    assert fits(term, plain) == [{"a": x}]
    assert {"a": x} in fits(term, graph.add("exp", [negative]))
    assert fits(p.one_of(p.tanh("a"), p.exp("a")), plain) == [{"a": x}]


@pytest.mark.parametrize(("value", "found"), [(0.5, True), (0.500001, True), (0.51, False)])
def test_scalar_constants_match_by_value(x32, value, found):
    graph, x = x32
    y = graph.add("mul", [x, graph.add_constant(np.float32([value]))])
    p = Pattern()
    assert bool(fits(p.mul("a", p.scalar(0.5)), y)) is found


class Collapse(RewriteRule):
    """neg(neg(x)) -> x, but only fp32"""

    def pattern(self, p: Pattern) -> Term:
        return p.neg(p.neg("x"))

    def check(self, m: Match) -> Reject | None:
        return None if m["x"].type.dtype is DType.F32 else Reject("not fp32")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return m["x"]


def test_driver_reaches_the_fixed_point_and_drops_what_is_dead(x32):
    graph, x = x32
    y = x
    for _ in range(7):
        y = graph.add("neg", [y])
    graph.add_output("y", y)
    result = apply_rules(graph, [Collapse()])
    assert result.changed == 3
    assert [n.op for n in graph.nodes] == ["neg"]
    assert len(x.uses) == 1


def test_refusals_are_noted_with_node_and_reason(x32):
    graph, x = x32
    wide = graph.add("cast", [x], {"to": DType.F64})
    y = graph.add("neg", [graph.add("neg", [wide])], name="second")
    graph.add_output("y", y)
    result = apply_rules(graph, [Collapse()])
    assert result.changed == 0
    assert result.notes == ("Collapse at second: not fp32",)


class Narrow(RewriteRule):
    """A wrong rule: the result has another shape."""

    def pattern(self, p: Pattern) -> Term:
        return p.exp("x")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.reduce_sum(m["x"], axes=(0,), keepdims=False)


def test_a_result_of_another_type_is_refused_and_removed(x32):
    graph, x = x32
    graph.add_output("y", graph.add("exp", [x]))
    result = apply_rules(graph, [Narrow()])
    assert result.changed == 0
    assert "the result would be f32[seq, 8]" in result.notes[0]
    assert [n.op for n in graph.nodes] == ["exp"]


class ToTanh(RewriteRule):
    """exp(x) -> tanh(x)"""

    def pattern(self, p: Pattern) -> Term:
        return p.exp("x")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.tanh(m["x"])


def test_the_new_node_takes_the_name_of_the_old(x32):
    graph, x = x32
    graph.add_output("y", graph.add("exp", [x], name="layer.0"))
    apply_rules(graph, [ToTanh()])
    assert [n.name for n in graph.nodes] == ["layer.0"]
    assert graph.outputs[0].name == "layer.0"
