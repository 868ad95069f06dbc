"""Runs of nodes that some token panels go through at a time: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsec.ir.dims import Dim
from sparsec.ir.graph import Node, Value
from sparsec.ir.memory_plan import MemoryPlan

# The ops that compute some panels alone, with the operands that they read beyond those panels.
READS_ACROSS: Mapping[str, tuple[int, ...]] = {
    "attention_int8": (1, 2, 3, 4, 5),
    "layer_norm": (),
    "linear_int8": (),
    "quantize_tokens": (),
}


@dataclass(frozen=True, slots=True)
class Chain:
    """Nodes `first` to `last` of a graph: each makes a panel of its results of the same panel of
    what the others made.

    A worker takes `block` of the `panels` through all of them before it goes on to the next: what
    one node made is in its L2 when the next one reads it, and no worker waits for another in
    between. `own` has the values that nothing outside the chain reads, by the name of the value
    that has the memory: the bytes of one panel. A worker needs them for one block at a time.
    """

    first: int
    last: int
    panels: Dim
    block: int
    own: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Chained:
    """The chains of a graph in its order, and where values lie when they are made use of."""

    chains: tuple[Chain, ...]
    plan: MemoryPlan


def read_across(node: Node) -> list[Value]:
    """The operands of a node of READS_ACROSS that it reads beyond the panels it computes."""
    operands = [node.optional_input(i) for i in READS_ACROSS[node.op]]
    return [v for v in operands if v is not None]
