"""Find the chains of a graph: neighbouring nodes that can be computed some panels at a time.

    attention -> linear -> layer_norm -> linear -> linear -> layer_norm -> linear | attention ...

An attention reads the keys and values of all tokens, so it can only begin a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from sparsec.ir.chains import READS_ACROSS, Chain, read_across
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import PANEL_WIDTH
from sparsec.passes.plan_memory import Family, find_families, find_owners, is_view

# What a node reads and writes for a block may be so many times as large as L2: more panels read
# the weights less often. Twice 64 tokens at least, or weights of large layers stream in vain.
SHARE_OF_L2 = 1.25
LEAST_BLOCK = 2


def find_chains(
    graph: Graph, supported: Callable[[Node], bool], l2_bytes: int
) -> tuple[Chain, ...]:
    """The chains of at least two nodes. `supported` says whether a kernel made for its op computes
    a node on the target: one that takes the items of one panel after those of another."""
    owners = find_owners(graph)
    families = find_families(graph, owners)
    found = []
    for first, last in _runs(graph, owners, supported):
        nodes = [n for n in graph.nodes[first : last + 1] if not is_view(n)]
        if len(nodes) < 2:
            continue
        block = int(SHARE_OF_L2 * l2_bytes / max(_bytes_per_panel(n, owners) for n in nodes))
        own = {f.owner.name: size for f in families if (size := _own(f, first, last))}
        panels = ceildiv(nodes[0].tokens, PANEL_WIDTH)
        found.append(Chain(first, last, panels, max(LEAST_BLOCK, block), own))
    return tuple(found)


def _runs(
    graph: Graph, owners: Mapping[Value, Value], supported: Callable[[Node], bool]
) -> Iterator[tuple[int, int]]:
    """First and last node of each run, views between its nodes included."""
    begun: list[int] = []  # the nodes of the run so far
    made: set[Value] = set()
    for step, node in enumerate(graph.nodes):
        if is_view(node):
            continue
        fits = node.op in READS_ACROSS and supported(node)
        goes_on = (
            fits
            and begun
            and node.tokens == graph.nodes[begun[0]].tokens
            and not made & {owners[v] for v in read_across(node)}
        )
        if begun and not goes_on:
            yield begun[0], begun[-1]
            begun, made = [], set()
        if fits:
            begun.append(step)
            made |= {owners[v] for v in node.outputs}
    if begun:
        yield begun[0], begun[-1]


def _own(family: Family, first: int, last: int) -> int:
    """The bytes of a panel of a value that lives inside the chain alone; else 0."""
    inside = first <= family.first and family.last <= last
    return family.owner.type.panel_bytes if inside else 0


def _bytes_per_panel(node: Node, owners: Mapping[Value, Value]) -> int:
    values = (v for v in (*node.inputs, *node.outputs) if v is not None and not v.is_constant)
    return max(1, sum(v.type.panel_bytes for v in {owners[v] for v in values}))
