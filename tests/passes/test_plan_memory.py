"""Slots: no two values that are live together overlap, and memory is reused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparsec.errors import PassFailed
from sparsec.ir.dims import Dim, floordiv, maximum, minimum, symbol
from sparsec.ir.graph import Graph
from sparsec.ir.types import DType
from sparsec.passes import graph_pipeline
from sparsec.passes.assign_layouts import AssignLayouts
from sparsec.passes.plan_memory import at_least, check_plan, plan_memory

BATCH, SEQ = symbol("batch"), symbol("seq")
ENV = {"batch": 2, "seq": 5}
BYTES = 2 * 5 * 8 * 4  # of x32's tensors under ENV; a multiple of 64


def test_a_chain_needs_two_slots(x32):
    graph, x = x32
    for _ in range(6):
        x = graph.add("exp", [x])
    graph.add_output("y", x)
    plan = plan_memory(graph)
    check_plan(graph, plan)
    assert len(plan.slot_of) == 5  # the last value is the output
    assert plan.slots == (BATCH * SEQ * 32,) * 2
    assert plan.arena_bytes(ENV) == 2 * BYTES


def test_a_value_that_is_read_late_keeps_its_slot(x32):
    graph, x = x32
    first = graph.add("exp", [x])
    y = graph.add("neg", [graph.add("neg", [first])])
    graph.add_output("y", graph.add("add", [y, first]))
    plan = plan_memory(graph)
    check_plan(graph, plan)
    assert len(plan.slots) == 3


def test_inputs_outputs_and_constants_have_no_slot(x32):
    graph, x = x32
    y = graph.add("add", [x, graph.add_constant(np.ones(8, np.float32))])
    graph.add_output("y", graph.add("exp", [y]))
    graph.add_output("x", x)
    plan = plan_memory(graph)
    check_plan(graph, plan)
    assert set(plan.slot_of) == {"add"}


def test_views_share_the_slot_of_their_source(x32):
    graph, x = x32
    y = graph.add("exp", [x])
    flat = graph.add("reshape", [y], {"shape": (BATCH * SEQ * 8,)})
    split = graph.add("reshape", [flat], {"shape": (BATCH, SEQ, 2, 4)})
    other = graph.add("neg", [y])  # the view keeps y alive past this
    total = graph.add("add", [graph.add("reshape", [other], {"shape": split.type.shape}), split])
    graph.add_output("z", graph.add("exp", [total]))
    plan = plan_memory(graph)
    check_plan(graph, plan)
    assert plan.root(split.name) == y.name
    assert plan.slot_of.keys() == {y.name, other.name, total.name}
    assert plan.slot_of[other.name] != plan.slot_of[y.name]


def test_an_output_that_is_a_view_lies_in_its_own_memory(x32):
    graph, x = x32
    y = graph.add("exp", [x])
    graph.add_output("flat", graph.add("reshape", [y], {"shape": (BATCH * SEQ, 8)}))
    graph.add_output("view of x", graph.add("reshape", [x], {"shape": (BATCH * SEQ, 8)}))
    graph.add_output("twice", graph.outputs[0])
    plan = plan_memory(graph)
    check_plan(graph, plan)
    assert plan.slots == ()
    assert [plan.root(v.name) for v in graph.outputs] == ["exp", "x", "exp"]


def test_small_values_use_free_large_slots(x32):
    graph, x = x32
    wide = graph.add("concat", [x, x, x], {"axis": 2})
    row = graph.add("reduce_sum", [wide], {"axes": (2,), "keepdims": True})
    again = graph.add("exp", [row])
    graph.add_output("y", graph.add("neg", [again]))
    plan = plan_memory(graph)
    check_plan(graph, plan)
    assert plan.slots == (BATCH * SEQ * 96, BATCH * SEQ * 4)
    assert plan.slot_of[again.name] == plan.slot_of[wide.name]


def normalised(graph, x):
    """layer_norm of a product of `x`, in panels; the product, and the result."""
    weight, gamma = (graph.add_constant(np.ones(s, np.float32)) for s in ((8, 8), 8))
    product = graph.add("linear", [x, weight], {"activation": "none"})
    y = graph.add("layer_norm", [product, gamma], {"epsilon": 1e-5})
    return product, graph.add("exp", [graph.add("neg", [y])])


def test_a_normalisation_is_written_over_what_it_reads(x32):
    graph, x = x32
    product, y = normalised(graph, x)
    graph.add_output("y", y)
    AssignLayouts().run(graph)
    plan = plan_memory(graph)
    check_plan(graph, plan)
    (norm,) = (n for n in graph.nodes if n.op == "layer_norm")
    assert plan.in_place == {norm.output.name: product.name}
    assert plan.root(norm.output.name) == product.name
    assert plan.content(norm.output.name) == norm.output.name


def test_what_others_read_is_not_written_over(x32):
    graph, x = x32
    product, y = normalised(graph, x)
    graph.add_output("y", y)
    graph.add_output("z", graph.add("neg", [product]))
    AssignLayouts().run(graph)
    plan = plan_memory(graph)
    check_plan(graph, plan)
    assert not plan.in_place
    (norm,) = (n for n in graph.nodes if n.op == "layer_norm")
    wrong = replace(plan, in_place={norm.output.name: product.name})
    slots = {n: s for n, s in plan.slot_of.items() if n != norm.output.name}
    with pytest.raises(PassFailed, match=r"neg.* reads %linear, but slot . holds layer_norm"):
        check_plan(graph, replace(wrong, slot_of=slots))


PANELS = floordiv(BATCH * SEQ + 63, 64) * 64  # tokens rounded up to whole panels


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (3, 3, True),
        (2, 3, False),
        (BATCH * SEQ, BATCH, True),
        (BATCH, SEQ, False),
        (PANELS * 8, PANELS * 4, True),
        (PANELS * 4, BATCH * SEQ * 4, True),  # whole panels hold the rows
        (BATCH * SEQ * 4, PANELS * 4, False),
        (maximum(BATCH, SEQ), SEQ, True),
        (PANELS * 4, floordiv(BATCH + 63, 64) * 256, True),  # more tokens, more panels
        (PANELS * 4, floordiv(BATCH + 63, 64) * 512, False),
        (PANELS * 4, 256, True),  # a panel at least
        (minimum(SEQ, 5) * BATCH, 1, True),
        (minimum(SEQ, 5) * BATCH, 2, False),
    ],
)
def test_at_least(a: Dim, b: Dim, expected: bool):
    assert at_least(a, b) is expected


def test_a_size_of_the_first_tokens_holds_one_token():
    graph = Graph("g")
    x = graph.add_input("x", DType.F32, (BATCH, minimum(SEQ, 5), 8))
    y = graph.add("exp", [graph.add("exp", [x])])
    one = {"axes": (0, 1), "keepdims": True}
    z = graph.add("exp", [graph.add("exp", [graph.add("reduce_mean", [y], one)])])
    graph.add_output("z", graph.add("exp", [z]))
    plan = plan_memory(graph)
    assert plan.slots == (BATCH * minimum(SEQ, 5) * 32,) * 2


@pytest.fixture
def planned(encoder):
    for one in (*graph_pipeline(), AssignLayouts()):
        one.run(encoder)
    return encoder, plan_memory(encoder)


def test_zoo_model(planned):
    graph, plan = planned
    check_plan(graph, plan)
    names = {str(d) for d in graph.inputs[0].type.shape}
    total = plan.arena_bytes(dict.fromkeys(names, 8))
    channel = 64 * 4  # bytes of one channel of the only panel
    # Live at once at most: queries, keys, values (96), input and context (32 each), or the
    # normalised value, the FFN's inside (64) and its result; then the mask, ids and so on.
    assert (96 + 3 * 32) * channel <= total < (96 + 4 * 32) * channel


def test_the_check_finds_an_overlap(planned):
    graph, plan = planned
    one_slot = dict.fromkeys(plan.slot_of, 0)
    large = (sum(plan.slots, 0),)
    with pytest.raises(PassFailed, match="over what it reads"):
        check_plan(graph, replace(plan, slot_of=one_slot, slots=large))


def test_the_check_finds_a_small_slot(planned):
    graph, plan = planned
    with pytest.raises(PassFailed, match="is small for"):
        check_plan(graph, replace(plan, slots=tuple(64 for _ in plan.slots)))


def test_the_check_finds_a_missing_slot(planned):
    graph, plan = planned
    name = next(iter(plan.slot_of))
    rest = {n: s for n, s in plan.slot_of.items() if n != name}
    with pytest.raises(PassFailed, match="wrong values have slots"):
        check_plan(graph, replace(plan, slot_of=rest))


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs(seed):
    rng = np.random.default_rng(seed)
    graph = Graph("random")
    shapes = [(BATCH, SEQ, 8), (BATCH * SEQ, 8), (BATCH * SEQ * 8,)]
    values = [graph.add_input("x", DType.F32, shapes[0])]
    for _ in range(40):
        a, b = (values[int(i)] for i in rng.integers(max(0, len(values) - 8), len(values), 2))
        if rng.random() < 0.3:
            shape = shapes[int(rng.integers(3))]
            values.append(graph.add("reshape", [a], {"shape": shape}))
        else:
            flat = [graph.add("reshape", [v], {"shape": shapes[2]}) for v in (a, b)]
            values.append(graph.add("add", flat))
    for i in rng.choice(len(values), 3, replace=False):
        graph.add_output(f"y{i}", values[int(i)])
    graph.drop_dead_nodes()
    plan = plan_memory(graph)
    check_plan(graph, plan)
    assert plan.arena_bytes(ENV) <= BYTES * len(plan.slot_of)
