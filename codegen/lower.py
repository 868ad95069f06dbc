"""Graph -> Program: every node becomes kernel calls over buffers, and no graph is left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from sparsec.codegen.generic_op import GENERIC
from sparsec.codegen.kernels import family_for
from sparsec.codegen.kernels.base import KernelFamily
from sparsec.codegen.program import (
    Arg,
    BufferRef,
    CallChain,
    Found,
    KernelCall,
    Own,
    Port,
    Program,
    Region,
    Weight,
)
from sparsec.errors import InvalidGraph, NoSchedule
from sparsec.ir.chains import Chain, Chained
from sparsec.ir.dims import Dim, minimum, symbol, symbols
from sparsec.ir.graph import Graph, Node, Value, bound_symbol
from sparsec.ir.layouts import ROW_MAJOR
from sparsec.ir.memory_plan import MemoryPlan
from sparsec.ir.op_spec import Array
from sparsec.ir.schedule import EVERY, Bucket, Choice, Schedule
from sparsec.ir.types import DType, TensorType
from sparsec.target import Target

# Ops that read as much of an operand as they write of a result.
LOOK_UPS = ("embedding", "embedding_int8", "gather", "gather_elements", "gather_nd", "slice")


def family_of(node: Node, target: Target) -> KernelFamily:
    """The hand-made family that takes the node on this target, else the generic one."""
    family = family_for(node)
    if family is not None and family.schedules(family.workload(node), target):
        return family
    return GENERIC


def schedules_of(node: Node, target: Target, bucket: Bucket = EVERY) -> list[Schedule]:
    """All that compute the node for token counts in the bucket, the heuristic's choice first."""
    family = family_of(node, target)
    return family.schedules(replace(family.workload(node), bucket=bucket), target)


def schedule_of(node: Node, target: Target, bucket: Bucket = EVERY) -> Schedule | None:
    """The heuristic's schedule."""
    return next(iter(schedules_of(node, target, bucket)), None)


def lower(
    graph: Graph, plan: MemoryPlan, target: Target, chained: Chained | None = None
) -> Program:
    """The flat form of a scheduled graph under a memory plan.

    With `chained` a run may make use of those chains, and then has that plan. Raises NoSchedule
    when a node has no schedule, UnsupportedOp when a node has no lowering.
    """
    binder = _Binder(graph, plan, chained)
    calls: list[KernelCall] = []
    found: list[Found] = []
    before: list[int] = []  # how many calls there were before each node
    for node in graph.nodes:
        before.append(len(calls))
        if node.outputs[0].name in plan.view_of:
            continue
        if not node.schedules:
            raise NoSchedule(f"{node.name} ({node.op}): no schedule was assigned")
        for choice in node.schedules:
            calls += _calls(node, choice, target, binder)
        if (name := bound_symbol(node)) is not None:
            place = binder.ref(node.outputs[0])
            found.append(Found(name, node.attrs["most"], len(calls) - 1, place))
    before.append(len(calls))
    chains: list[CallChain] = []
    for chain in chained.chains if chained else ():
        first, last = before[chain.first], before[chain.last + 1] - 1
        calls[first : last + 1] = binder.with_own(chain, calls[first : last + 1])
        chains.append(CallChain(first, last, chain.panels, chain.block))
    calls += binder.output_copies(target)
    shared, own = ((), ()) if chained is None else _chained_slots(chained)
    return Program(
        name=graph.name,
        inputs=tuple(Port(v.name, v.type) for v in graph.inputs),
        outputs=tuple(
            Port(n, v.type) for n, v in zip(graph.output_names, graph.outputs, strict=True)
        ),
        symbols=_symbols([v.type for v in graph.inputs]),
        weights=tuple(binder.weights),
        slots=plan.slots,
        calls=tuple(calls),
        chains=tuple(chains),
        chained_slots=shared,
        own_slots=own,
        places=binder.places,
        limits=tuple(graph.limits),
        found=tuple(found),
    )


def lower_alone(node: Node, schedule: Schedule, target: Target) -> Program:
    """A program of this one node: what a tuner builds to time a schedule.

    Its operands and results lie in the arena, whatever is in there; one input, `sizes`, has an
    axis for every symbol of their shapes and is not read.
    """
    operands = [v for v in (*node.inputs, *node.outputs) if v is not None and v.data is None]
    types = {v.name: v.type for v in operands}
    slots = tuple(type.nbytes for type in types.values())
    plan = MemoryPlan({name: index for index, name in enumerate(types)}, slots, {})
    binder = _Binder(Graph(node.name), plan)
    calls = _calls(node, Choice(schedule), target, binder)
    names = _symbols(types.values())
    sizes = TensorType(DType.U8, tuple(symbol(name) for name in names))
    return Program(
        name=node.name,
        inputs=(Port("sizes", sizes),),
        outputs=(),
        symbols=names,
        weights=tuple(binder.weights),
        slots=slots,
        calls=tuple(calls),
    )


def _chained_slots(chained: Chained) -> tuple[tuple[Dim, ...], tuple[int, ...]]:
    """The sizes of shared slots, and of a panel in those that workers have for themselves."""
    panel: dict[int, int] = {}
    for chain in chained.chains:
        for name, size in chain.own.items():
            slot = chained.plan.slot_of[name]
            panel[slot] = max(size, panel.get(slot, 0))
    sizes = enumerate(chained.plan.slots)
    shared = tuple(0 if slot in panel else size for slot, size in sizes)
    return shared, tuple(panel.get(slot, 0) for slot in range(len(shared)))


def _calls(node: Node, choice: Choice, target: Target, binder: _Binder) -> list[KernelCall]:
    """The calls of a node for the token counts of one of its choices."""
    made = family_of(node, target).lower(node, choice.schedule, binder)
    schedule, tokens = str(choice.schedule), node.tokens if choice.bucket != EVERY else 0
    return [
        replace(call, op=node.op, node=node.name, schedule=schedule, tokens=tokens,
                bucket=choice.bucket, bytes=binder.bytes_moved(call, node.op))
        for call in made
    ]  # fmt: skip


def _symbols(types: Iterable[TensorType]) -> tuple[str, ...]:
    """The symbols of the shapes in order of first appearance."""
    names: list[str] = []
    for type in types:
        for dim in type.shape:
            names += sorted(symbols(dim) - set(names))
    return tuple(names)


@dataclass
class _Binder:
    """Where each value lies. An output's memory is the caller's: its producer writes it there."""

    graph: Graph
    plan: MemoryPlan
    chained: Chained | None = None
    weights: list[Weight] = field(default_factory=list)
    _constants: dict[str, BufferRef] = field(default_factory=dict)
    _forms: dict[str, list[BufferRef]] = field(default_factory=dict)
    _output_of: dict[str, int] = field(default_factory=dict)
    _places: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._produced = {v.name for n in self.graph.nodes for v in n.outputs}
        for index, value in enumerate(self.graph.outputs):
            root = self.plan.root(value.name)
            if root in self._produced:
                self._output_of.setdefault(root, index)

    def ref(self, value: Value) -> BufferRef:
        if value.data is not None:
            return self._constant(value, value.data)
        root = self.plan.root(value.name)
        for index, given in enumerate(self.graph.inputs):
            if given.name == root:
                return BufferRef(Region.INPUT, index, value.type, value.name)
        if root in self._output_of:
            return BufferRef(Region.OUTPUT, self._output_of[root], value.type, value.name)
        if root not in self.plan.slot_of:
            raise InvalidGraph(f"{value.name}: the memory plan has no slot for it")
        return BufferRef(Region.ARENA, self._place(root), value.type, value.name)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """The slot and the chained slot of each; none without chains."""
        return tuple(self._places)

    def with_own(self, chain: Chain, calls: list[KernelCall]) -> list[KernelCall]:
        """The calls of a chain, which then know what a worker has for itself."""
        assert all(call.per_panel for call in calls), chain

        def own(call: KernelCall) -> tuple[Own, ...]:
            refs = (a for a in call.args if isinstance(a, BufferRef) and a.region is Region.ARENA)
            roots = dict.fromkeys(self.plan.root(ref.name) for ref in refs)
            return tuple(Own(self._place(n), chain.own[n]) for n in roots if n in chain.own)

        return [replace(call, own=own(call)) for call in calls]

    def _place(self, root: str) -> int:
        """Its number: with chains one for each pair of slots, else the slot."""
        slot = self.plan.slot_of[root]
        if self.chained is None:
            return slot
        pair = slot, self.chained.plan.slot_of[root]
        return self._places.setdefault(pair, len(self._places))

    def weight(self, name: str, data: Array) -> BufferRef:
        """A new one unless this name has the same contents: kernels may want different forms."""
        for ref in self._forms.setdefault(name, []):
            known = self.weights[ref.index].data
            if known.dtype == data.dtype and np.array_equal(known, data):
                return ref
        ref = self._add(name, data, TensorType(DType.of(data.dtype), data.shape))
        self._forms[name].append(ref)
        return ref

    def optional(self, value: Value | None) -> Arg:
        return None if value is None else self.ref(value)

    def bytes_moved(self, call: KernelCall, op: str) -> Dim:
        """Of all that the call points to: see KernelCall. One buffer counts once."""
        refs = {(r.region, r.index): r for r in call.args if isinstance(r, BufferRef)}
        *_, result = (r for r in call.args if isinstance(r, BufferRef))
        found: Dim = 0
        for ref in refs.values():
            size = ref.type.elements * ref.type.dtype.bytes  # in panels too: no lanes past the end
            if ref.region is Region.WEIGHTS:
                size = self.weights[ref.index].data.nbytes
            if op in LOOK_UPS:
                size = minimum(size, result.type.elements * result.type.dtype.bytes)
            found += size
        return found

    def output_copies(self, target: Target) -> list[KernelCall]:
        """Copies for the outputs that are an input, a constant or another output."""
        calls: list[KernelCall] = []
        for index, value in enumerate(self.graph.outputs):
            root = self.plan.root(value.name)
            if self._output_of.get(root) == index:
                continue
            name = self.graph.output_names[index]
            to = BufferRef(Region.OUTPUT, index, value.type.with_layout(ROW_MAJOR), name)
            call = GENERIC.copy(self.ref(value), to, target)
            calls.append(replace(call, bytes=self.bytes_moved(call, "copy")))
        return calls

    def _constant(self, value: Value, data: Array) -> BufferRef:
        if value.name not in self._constants:
            self._constants[value.name] = self._add(value.name, data, value.type)
        return self._constants[value.name]

    def _add(self, name: str, data: Array, type: TensorType) -> BufferRef:
        self.weights.append(Weight(name, data))
        return BufferRef(Region.WEIGHTS, len(self.weights) - 1, type, name)
