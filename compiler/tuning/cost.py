"""Expected time of kernels and layers on a target, and the weight layouts chosen by it.

The families say what their kernels issue (`codegen/kernels/costs.py`), the target's `Rates` what
that takes. What has no count (elementwise ops, changes of layout, attention in bf16, generic ops)
is taken to cost the bytes that it moves, or its multiply-accumulates at the peak if that is more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparsec.codegen.kernels import family_for
from sparsec.codegen.kernels.costs import COUNTS, Shape
from sparsec.codegen.kernels.counts import seconds, streaming_seconds
from sparsec.codegen.program import KernelCall, Program
from sparsec.ir.dims import evaluate
from sparsec.ir.graph import Graph, Node
from sparsec.ir.layouts import Bsr, Layout
from sparsec.ir.schedule import EVERY, Schedule, Workload
from sparsec.rates import product_of
from sparsec.target import Target

USUAL = Shape(1, 128)  # what layouts are chosen for: more tokens change all candidates alike
PORTS, BYTES = "ports", "bytes"
WORTH_BLOCKS = 0.9  # share of a dense layer's time: expectations are no nearer, and indices cost


def usual_shape(graph: Graph) -> Shape:
    """`USUAL`, with the sizes that are fixed in the model's first input of two axes or more."""
    for value in graph.inputs:
        if value.type.rank > 1:
            batch, seq = value.type.shape[:2]
            return Shape(
                batch if isinstance(batch, int) else USUAL.batch,
                seq if isinstance(seq, int) else USUAL.seq,
            )
    return USUAL


def expected_seconds(
    workload: Workload, schedule: Schedule, shape: Shape, target: Target, threads: int = 1
) -> float | None:
    """Of one call of the schedule's kernel; None when its family has no count."""
    count = COUNTS.get(schedule.family)
    if count is None:
        return None
    return seconds(count(workload, schedule, shape, target), target, threads)


def expected_call_seconds(
    call: KernelCall, symbols: Mapping[str, int], target: Target, threads: int = 1
) -> float:
    """Of any call, by the bytes that it moves and its multiply-accumulates alone."""
    nbytes, items, macs, grain = (
        evaluate(n, symbols) for n in (call.bytes, call.items, call.macs, call.grain)
    )
    # What multiplies nothing may be of an instruction set that has no such product.
    least = macs / target.rates.peak(product_of(call.op, call.kernel.isa)) if macs else 0.0
    return streaming_seconds(nbytes, target, items, grain, threads, least_seconds=least)


def fp32_is_faster(fp32: Node, int8: Node, shape: Shape, target: Target) -> str | None:
    """How much faster the first of two nodes is expected to be, in words; None if it is not.

    Both have kernels on the target. None also where a family has no count.
    """
    times = []
    for node in (fp32, int8):
        family = family_for(node)
        assert family is not None, node
        work = family.workload(node)
        time = expected_seconds(work, family.schedules(work, target)[0], shape, target)
        times.append(math.nan if time is None else time * 1e6)
    if not times[0] < times[1]:
        return None
    return (
        f"that is expected to be faster on this target: {times[0]:.1f} us for {shape.batch} x "
        f"{shape.seq} tokens, {times[1]:.1f} us in int8"
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout of a weight, the best schedule for it, and its expected time."""

    layout: Layout
    density: float
    schedule: Schedule
    seconds: float


@dataclass(frozen=True, slots=True)
class CheapestLayout:
    """The layout with the least expected time, or dense where that is little more.

    A `LayoutChoice` of the passes. `considered` holds the candidates of each node by its name,
    cheapest first.
    """

    target: Target
    shape: Shape = USUAL
    threads: int = 1
    considered: dict[str, list[Candidate]] = field(default_factory=dict)

    def __call__(self, node: Node, candidates: Sequence[tuple[Layout, float]]) -> Layout:
        family = family_for(node)
        assert family is not None, node
        work, found = family.workload(node), []
        for layout, density in candidates:
            asked = replace(work, layout=_layout_name(layout), density=density)
            for schedule in family.schedules(asked, self.target)[:1]:
                time = expected_seconds(asked, schedule, self.shape, self.target, self.threads)
                assert time is not None, schedule
                found.append(Candidate(layout, density, schedule, time))
        if not found:  # no kernel at all: AssignSchedules says so, and of what
            return candidates[0][0]
        dense = found[0]
        found.sort(key=lambda c: c.seconds)
        self.considered[node.name] = found
        best = found[0]
        return best.layout if best.seconds < WORTH_BLOCKS * dense.seconds else dense.layout


def expected_layers(
    graph: Graph, program: Program, layouts: CheapestLayout
) -> list[dict[str, Any]]:
    """Per node of a scheduled graph its expected microseconds, for the shape of `layouts`.

    `basis` is "ports" or "bytes"; `candidates` are the layouts that were compared.
    """
    calls: dict[str, list[KernelCall]] = {}
    for call in program.calls:
        calls.setdefault(call.node, []).append(call)
    symbols = symbols_of(program, layouts.shape)
    rows = []
    for node in graph.nodes:
        if node.name not in calls:
            continue
        time, basis = _node_seconds(node, calls[node.name], symbols, layouts)
        row: dict[str, Any] = {"node": node.name, "op": node.op, "basis": basis}
        row["expected_us"] = round(time * 1e6, 3)
        considered = layouts.considered.get(node.name, [])
        if considered:
            row["candidates"] = [_described(c) for c in considered]
        rows.append(row)
    return rows


def _described(candidate: Candidate) -> dict[str, Any]:
    return {
        "layout": _layout_name(candidate.layout),
        "density": round(candidate.density, 4),
        "schedule": str(candidate.schedule),
        "expected_us": round(candidate.seconds * 1e6, 3),
    }


def _layout_name(layout: Layout) -> str:
    """As a Workload has it."""
    return str(layout) if isinstance(layout, Bsr) else "dense"


def _node_seconds(
    node: Node, calls: Sequence[KernelCall], symbols: Mapping[str, int], given: CheapestLayout
) -> tuple[float, str]:
    family, tokens = family_for(node), evaluate(node.tokens, symbols)
    schedule = next((c.schedule for c in node.schedules if tokens in c.bucket), None)
    if family is not None and schedule is not None:
        work, shape = family.workload(node), shape_of(node, symbols)
        time = expected_seconds(work, schedule, shape, given.target, given.threads)
        if time is not None:
            return time, PORTS
    made = [c for c in calls if c.bucket == EVERY or tokens in c.bucket]
    times = [expected_call_seconds(c, symbols, given.target, given.threads) for c in made]
    return sum(times), BYTES


def shape_of(node: Node, symbols: Mapping[str, int]) -> Shape:
    """The tokens that the node works on; a pooler has one per sequence."""
    *outer, seq, _ = (evaluate(d, symbols) for d in (1, 1, *node.input(0).type.shape))
    return Shape(math.prod(outer), seq)


def symbols_of(program: Program, shape: Shape) -> dict[str, int]:
    """The first symbol of an input of two axes or more is its batch, all others lengths.

    What steps find is the most that it can be: no token is padding.
    """
    first = {str(port.type.shape[0]) for port in program.inputs if port.type.rank > 1}
    found = {name: shape.batch if name in first else shape.seq for name in program.symbols}
    return found | {f.symbol: evaluate(f.most, found) for f in program.found}
