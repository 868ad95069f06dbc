"""Chains: what can be computed some panels at a time, and what memory that needs."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

from sparsec.errors import PassFailed
from sparsec.ir.chains import READS_ACROSS, Chain
from sparsec.ir.graph import Graph
from sparsec.models.build import build_model
from sparsec.models.tiny import tiny_spec
from sparsec.options import CompileOptions
from sparsec.passes.find_chains import find_chains
from sparsec.passes.plan_memory import check_plan, find_owners, plan_memory
from sparsec.stages import scheduled_graph
from sparsec.target import Target

LAYERS = 3
L2 = 1 << 20


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A scheduled int8 graph, with a scale per token: residuals, bytes and scales in a chain."""
    path = tmp_path_factory.mktemp("chains") / "m.onnx"
    onnx.save(build_model(tiny_spec(layers=LAYERS)), path)
    target = Target.named("icelake-server")
    return scheduled_graph(path, CompileOptions(target=target, precision="int8", dynamic=True))


@pytest.fixture(scope="module")
def chains(graph: Graph) -> tuple[Chain, ...]:
    return find_chains(graph, lambda node: True, L2)


def test_a_layer_is_a_chain(graph: Graph, chains: tuple[Chain, ...]) -> None:
    ops = [[n.op for n in graph.nodes[c.first : c.last + 1]] for c in chains]
    products = [one.count("linear_int8") for one in ops]
    # Queries, keys and values of the first layer; then the rest of a layer and those of the next.
    assert products == [1, *[4] * (LAYERS - 1), 3]
    assert all(set(one) <= {*READS_ACROSS, "reshape"} for one in ops)


def test_nothing_is_read_across_panels_in_the_chain_that_makes_it(
    graph: Graph, chains: tuple[Chain, ...]
) -> None:
    owners = find_owners(graph)
    for chain in chains:
        nodes = graph.nodes[chain.first : chain.last + 1]
        made = {v for n in nodes for v in n.outputs}
        for node in nodes:
            across = [node.optional_input(i) for i in READS_ACROSS.get(node.op, ())]
            assert not made & {owners[v] for v in across if v is not None}, node


def test_own_values_are_seen_in_the_chain_alone(graph: Graph, chains: tuple[Chain, ...]) -> None:
    assert sum(len(chain.own) for chain in chains) >= 8 * LAYERS
    outputs = {v.name for v in graph.outputs}
    for chain in chains:
        outside = [*graph.nodes[: chain.first], *graph.nodes[chain.last + 1 :]]
        seen = {v.name for n in outside for v in (*n.inputs, *n.outputs) if v is not None}
        assert not (seen | outputs) & set(chain.own)


def test_a_node_without_a_kernel_of_its_own_ends_a_chain(graph: Graph) -> None:
    found = find_chains(graph, lambda node: node.op != "layer_norm", L2)
    for chain in found:
        assert "layer_norm" not in {n.op for n in graph.nodes[chain.first : chain.last + 1]}
    assert len(found) > LAYERS


def test_a_block_is_what_fits_l2_and_two_panels_at_least(graph: Graph) -> None:
    few, many = (
        {chain.block for chain in find_chains(graph, lambda node: True, size)}
        for size in (1 << 10, 1 << 22)
    )
    assert few == {2}
    assert min(many) > 2


def test_the_plan_for_chains_is_right(graph: Graph, chains: tuple[Chain, ...]) -> None:
    plan = plan_memory(graph, chains)
    check_plan(graph, plan, chains)
    check_plan(graph, plan)  # and so is a run step by step


def test_slots_of_own_values_hold_nothing_else(graph: Graph, chains: tuple[Chain, ...]) -> None:
    plan = plan_memory(graph, chains)
    own = {name for chain in chains for name in chain.own}
    slots = [{s for n, s in plan.slot_of.items() if (n in own) is kind} for kind in (True, False)]
    assert not slots[0] & slots[1]


def test_the_check_finds_a_plan_that_is_not_for_chains(
    graph: Graph, chains: tuple[Chain, ...]
) -> None:
    with pytest.raises(PassFailed, match=r"reads %.*, but slot .* holds"):
        check_plan(graph, plan_memory(graph), chains)


def test_the_check_finds_panels_of_another_size(graph: Graph, chains: tuple[Chain, ...]) -> None:
    """Two values that follow each other panel by panel must have panels of one size."""
    plan = plan_memory(graph, chains)
    values = {v.name: v.type.panel_bytes for n in graph.nodes for v in n.outputs}
    own = {name for chain in chains for name in chain.own}
    shared = [n for n in plan.slot_of if n not in own and values[n]]
    pairs = [(a, b) for a in shared for b in shared if values[a] < values[b]]
    wrong = 0
    for small, large in pairs:
        moved = replace(plan, slot_of={**plan.slot_of, small: plan.slot_of[large]})
        try:
            check_plan(graph, moved, chains)
        except PassFailed:
            wrong += 1
    assert wrong
