"""Decide where intermediate values lie: values that are never live together share a slot.

    a = f(x); b = g(a); c = h(b)   ->   a and c in slot 0, b in slot 1

Where chains are made use of, a value that a chain shares with the rest is live all through the
chain: some of its panels are not made, or still to be read, while others are done. The values that
a worker in a chain has for itself have slots of their own: those hold some panels of each worker.

Views (a reshape, also one of panels that keeps the channels) lie where their source lies. So does
the result of a kernel that goes through an operand once, where nobody else reads that: it is
written over it, so that a line of the cache is read and written instead of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import networkx as nx

from sparsec.errors import PassFailed
from sparsec.ir.chains import Chain, read_across
from sparsec.ir.dims import Call, Dim, Expr, evaluate, maximum, substitute, symbol, symbols
from sparsec.ir.graph import Graph, Node, Value, run_time_bounds
from sparsec.ir.layouts import ROW_MAJOR, Panels
from sparsec.ir.memory_plan import MemoryPlan
from sparsec.passes.rewrite import read_once

# Sizes are symbolic: they are ranked as they would be at this size of every symbol.
TYPICAL_SIZE = 64
# Ops whose kernels read an element of this operand for the last time when they write the same
# element of their first result.
IN_PLACE: Mapping[str, int] = {"layer_norm": 0, "linear_int8": 4}
BLOCKS = (0, 1)  # of panels, that check_plan tells apart


@dataclass(frozen=True, slots=True)
class Family:
    """A value that owns memory; what lies there is live from step `first` to step `last`."""

    owner: Value
    first: int
    last: int


def plan_memory(graph: Graph, chains: Sequence[Chain] = ()) -> MemoryPlan:
    """The plan for the present order of nodes, those of the chains computed some panels at a time.

    Graph inputs, outputs and constants lie outside the arena: neither they nor the values that
    share their memory get a slot. Outputs that share memory are left for the lowering to copy.
    A size that is found when the model runs counts as the most that it can be.
    """
    owners = find_owners(graph)
    families = find_families(graph, owners)
    bounds = run_time_bounds(graph)
    interference = _interference(_lifetimes(graph, owners, families, chains))
    slot_of: dict[str, int] = {}
    slots: list[_Slot] = []
    # Large first: later values then find slots that are large enough. The order is total.
    sizes = {f.owner.name: substitute(f.owner.type.nbytes, bounds) for f in families}
    order = sorted(families, key=lambda f: (-typical(sizes[f.owner.name]), f.first, f.owner.name))
    own = {name for chain in chains for name in chain.own}
    made: dict[bool, set[int]] = {True: set(), False: set()}  # slots of own and of other values
    for family in order:
        name, size = family.owner.name, sizes[family.owner.name]
        taken = {slot_of[n] for n in interference[name] if n in slot_of}
        taken |= made[name not in own]
        index = _choose(size, slots, taken)
        if index == len(slots):
            slots.append(_Slot())
        slots[index] = slots[index].including(size)
        slot_of[name] = index
        made[name in own].add(index)
    views = {v.name: n.input(0).name for n in graph.nodes if is_view(n) for v in n.outputs}
    over = {n.outputs[0].name: x.name for n in graph.nodes if (x := written_over(n, graph))}
    plan = MemoryPlan(slot_of, tuple(s.nbytes for s in slots), views, over)
    check_plan(graph, plan, chains)
    return plan


def is_view(node: Node) -> bool:
    """Whether the result has the bytes of operand 0 in the same order."""
    if node.op != "reshape":
        return False
    source, result = node.input(0).type, node.output.type
    if source.layout != result.layout:
        return False
    return result.layout == ROW_MAJOR or source.shape[-1:] == result.shape[-1:]


def written_over(node: Node, graph: Graph) -> Value | None:
    """The operand that the node's first result is written over, which is read by it alone."""
    place = IN_PLACE.get(node.op)
    x = None if place is None else node.optional_input(place)
    if x is None or x.producer is None or is_view(x.producer):
        return None
    fits = x.type == node.outputs[0].type and isinstance(x.type.layout, Panels)
    return x if fits and read_once(x, graph.outputs) else None


def find_owners(graph: Graph) -> dict[Value, Value]:
    """For every value the one whose memory it lies in; itself when it has its own."""
    owners: dict[Value, Value] = {v: v for v in [*graph.inputs, *graph.constants()]}
    for node in graph.nodes:
        owners |= {v: v for v in node.outputs}
        source = node.input(0) if is_view(node) else written_over(node, graph)
        if source is not None:
            owners[node.outputs[0]] = owners[source]
    return owners


def find_families(graph: Graph, owners: Mapping[Value, Value]) -> list[Family]:
    """The values that need a slot, with their lifetimes, in order of birth."""
    outside = {*graph.inputs, *graph.constants(), *(owners[v] for v in graph.outputs)}
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for step, node in enumerate(graph.nodes):
        for value in node.outputs:
            first.setdefault(owners[value], step)
            last[owners[value]] = step
        for operand in node.inputs:
            if operand is not None:
                last[owners[operand]] = step
    return [Family(v, first[v], last[v]) for v in first if v not in outside]


def check_plan(graph: Graph, plan: MemoryPlan, chains: Sequence[Chain] = ()) -> None:
    """PassFailed unless every operand is still whole when it is read.

    Replays the nodes, those of a chain for a first and then for a second block of panels, and
    tracks what each slot holds: independent of how the plan was made.
    """
    slots = _Slots(plan, run_time_bounds(graph))
    step = 0
    for chain in chains:
        for node in graph.nodes[step : chain.first]:
            slots.compute(node, BLOCKS, None)
        for block, node in product(BLOCKS, graph.nodes[chain.first : chain.last + 1]):
            slots.compute(node, (block,), chain)
        step = chain.last + 1
    for node in graph.nodes[step:]:
        slots.compute(node, BLOCKS, None)
    names = {f.owner.name for f in find_families(graph, find_owners(graph))}
    if names != set(plan.slot_of):
        raise PassFailed(f"wrong values have slots: {sorted(names ^ set(plan.slot_of))}")


@dataclass
class _Slots:
    """What each slot holds for each of two blocks of panels: a name, and the bytes of a panel."""

    plan: MemoryPlan
    bounds: Mapping[str, Dim]
    holds: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)

    def compute(self, node: Node, blocks: Sequence[int], chain: Chain | None) -> None:
        """Of a node the results of these blocks."""
        if is_view(node):
            return
        across = [] if chain is None else read_across(node)
        own = frozenset() if chain is None else frozenset(chain.own)
        read = self._with_slots(node.inputs)
        for value, slot in read.items():
            name = self.plan.content(value.name)
            is_whole = value in across or self.plan.root(value.name) in own
            for block in BLOCKS if is_whole else blocks:
                held, _ = self.holds.get((slot, block), ("nothing", 0))
                if held != name:
                    raise PassFailed(f"{node.name} reads %{name}, but slot {slot} holds {held}")
        written = self._with_slots(node.outputs)
        if len(set(written.values())) < len(written):
            raise PassFailed(f"{node.name} writes two results into one slot")
        for value, slot in written.items():
            over = {v.name for v in read if read[v] == slot}
            if over - {self.plan.in_place.get(value.name)}:
                raise PassFailed(f"{node.name} writes %{value.name} over what it reads")
            is_whole = self.plan.root(value.name) in own
            self._write(value, slot, BLOCKS if is_whole else blocks)

    def _with_slots(self, values: Sequence[Value | None]) -> dict[Value, int]:
        """Those that lie in the arena, and where."""
        roots = {v: self.plan.root(v.name) for v in values if v is not None}
        return {v: self.plan.slot_of[r] for v, r in roots.items() if r in self.plan.slot_of}

    def _write(self, value: Value, slot: int, blocks: Sequence[int]) -> None:
        """Other blocks of the slot stay what they are if their panels are as large."""
        size = self.plan.slots[slot]
        if not at_least(size, substitute(value.type.nbytes, self.bounds)):
            raise PassFailed(f"slot {slot}, {size} bytes, is small for {value!r}")
        panel_bytes = value.type.panel_bytes
        for block in BLOCKS:
            name, before = self.holds.get((slot, block), ("nothing", 0))
            if block in blocks:
                self.holds[slot, block] = value.name, panel_bytes
            elif name != value.name and (before != panel_bytes or not panel_bytes):
                self.holds.pop((slot, block), None)


def typical(size: Dim) -> int:
    """A size at TYPICAL_SIZE."""
    return evaluate(size, dict.fromkeys(symbols(size), TYPICAL_SIZE))


def at_least(a: Dim, b: Dim) -> bool:
    """Whether `a >= b` is certain for all sizes: at least where `maximum` takes `a` at once."""
    if maximum(a, b) == a or any(at_least(part, b) for part in _maximum_parts(a)):
        return True
    match a, b:  # whole panels of more tokens
        case (
            Expr(terms=(((Call("floordiv", (e, int(c))),), x),)),
            Expr(terms=(((Call("floordiv", (f, int(d))),), y),)),
        ) if c == d and x >= y >= 0 and at_least(e, f):
            return True
    return _never_negative(a - b) or _never_negative(_below(a - b))


@dataclass(frozen=True, slots=True)
class _Slot:
    """A slot's size is the largest of `sizes`, none of which is certain to be the largest."""

    sizes: tuple[Dim, ...] = ()

    @property
    def nbytes(self) -> Dim:
        total: Dim = 0
        for size in self.sizes:
            total = maximum(total, size)
        return total

    def holds(self, size: Dim) -> bool:
        return any(at_least(s, size) for s in self.sizes)

    def including(self, size: Dim) -> _Slot:
        if self.holds(size):
            return self
        return _Slot((*(s for s in self.sizes if not at_least(size, s)), size))


@dataclass(frozen=True, slots=True)
class _Lifetime:
    """When no other value may lie there: from step `first` to step `last`, which is that of the
    family but for what a chain shares with the rest.

    Two values of the same `panels`, the bytes of one, may follow each other in a chain panel by
    panel. 0: not so, because someone reads it across panels, or a worker keeps it for itself.
    """

    family: Family
    first: int
    last: int
    panels: int

    def collides(self, other: _Lifetime) -> bool:
        """Of two that overlap."""
        if not self.panels or self.panels != other.panels:
            return True
        return self.family.first <= other.family.last and other.family.first <= self.family.last


def _lifetimes(
    graph: Graph,
    owners: Mapping[Value, Value],
    families: Sequence[Family],
    chains: Sequence[Chain],
) -> list[_Lifetime]:
    """In order of birth."""
    touched = _touched(graph, owners, chains)
    found = []
    for family in families:
        owner, first, last = family.owner, family.first, family.last
        shared = [n for n in touched.get(owner, {}) if owner.name not in chains[n].own]
        for n in shared:
            first, last = min(first, chains[n].first), max(last, chains[n].last)
        follows = shared and not any(touched[owner][n] for n in shared)
        found.append(_Lifetime(family, first, last, owner.type.panel_bytes if follows else 0))
    return sorted(found, key=lambda one: one.first)


def _touched(
    graph: Graph, owners: Mapping[Value, Value], chains: Sequence[Chain]
) -> dict[Value, dict[int, bool]]:
    """The chains that read or write a value, and whether one of their nodes reads it across."""
    found: dict[Value, dict[int, bool]] = {}
    for number, chain in enumerate(chains):
        for node in graph.nodes[chain.first : chain.last + 1]:
            across = set() if is_view(node) else {owners[v] for v in read_across(node)}
            operands = (v for v in node.inputs if v is not None)
            for owner in {owners[v] for v in (*operands, *node.outputs)}:
                before = found.setdefault(owner, {}).get(number, False)
                found[owner][number] = before or owner in across
    return found


def _interference(lifetimes: Sequence[_Lifetime]) -> nx.Graph[str]:
    """An edge between families that are live at the same step.

    A node's result may not overlap its operands, so a birth at the step of a death collides.
    """
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(one.family.owner.name for one in lifetimes)
    live: list[_Lifetime] = []
    for one in lifetimes:
        live = [other for other in live if other.last >= one.first]
        graph.add_edges_from(
            (other.family.owner.name, one.family.owner.name)
            for other in live
            if one.collides(other)
        )
        live.append(one)
    return graph


def _choose(size: Dim, slots: list[_Slot], taken: set[int]) -> int:
    """The free slot that wastes least: the same size, then one that holds it, then any."""

    def cost(index: int) -> tuple[int, int, int]:
        slot = slots[index]
        if slot.sizes == (size,):
            return 0, 0, index
        if slot.holds(size):
            return 1, typical(slot.nbytes), index
        grown = slot.including(size)
        return 2 + len(grown.sizes), typical(grown.nbytes) - typical(slot.nbytes), index

    free = [i for i in range(len(slots)) if i not in taken]
    return min(free, key=cost, default=len(slots))


def _never_negative(size: Dim) -> bool:
    """Sufficient: with every symbol written as 1 + t, t >= 0, no coefficient is negative."""
    shifted = substitute(size, {name: symbol(name) + 1 for name in symbols(size)})
    if isinstance(shifted, int):
        return shifted >= 0
    return all(factor >= 0 for _, factor in shifted.terms)


def _maximum_parts(size: Dim) -> tuple[Dim, ...]:
    match size:
        case Expr(terms=(((Call("max", parts),), 1),)):
            return parts
    return ()


def _below(size: Dim) -> Dim:
    """A lower bound of `size` without quotients: (e - c + 1) / c <= floordiv(e, c) <= e / c."""
    if isinstance(size, int):
        return size
    total: Dim = 0
    for monomial, factor in size.terms:
        match monomial:
            case (Call("floordiv", (e, int(c))),) if factor % c == 0:
                total = total + (e - (c - 1) if factor > 0 else e) * (factor // c)
            case _:
                total = total + Expr(((monomial, factor),)) if monomial else total + factor
    return total
