"""Compute attention from quantised queries, keys and values.

attention(linear_int8(x))           ->   attention_int8(linear_int8(x) stored as u8)
attention(rotary(linear_int8(x)))   ->   attention_int8(quantize(rotary(linear_int8(x))))

Queries, keys and values get a scale each, also as parts of one product: its rows are scaled to
the steps of what they become, so that the product itself stores with scale 1. What stays fp32
between (a rotary embedding) or beside (another reader) is quantised by a step of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_spec import Array
from sparsec.ir.ops_attention_int8 import ZERO_POINT
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.keep_fp32 import kept
from sparsec.passes.quantize import LOSES
from sparsec.passes.rewrite import replace_node
from sparsec.ranges import Channels

STEPS = 127  # of each sign around the zero point
SMALLEST = 1e-30  # a range below this is all zero
OPERANDS = "qkv"
Objection = Callable[[Node, Node], str | None]
NO_KERNEL = "no int8 kernel takes its mask and head size on this target"


@dataclass(frozen=True, slots=True)
class QuantizeAttention:
    """After fold_quantize. `supported` says whether a kernel computes a node on the target.

    An attention stays fp32 whose name `fallback` has or a pattern of `keep_fp32` fits. `objection`
    is given an attention in fp32 and the same in int8: why the first should stay, or None.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    supported: Callable[[Node], bool] = lambda node: True
    keep_fp32: tuple[str, ...] = ()
    fallback: frozenset[str] = frozenset()
    objection: Objection = lambda fp32, int8: None
    name: str = "quantize_attention"

    def run(self, graph: Graph) -> PassResult:
        done, notes = 0, []
        for node in [n for n in graph.nodes if n.op == "attention"]:
            refusal = self._visit(graph, node)
            done += refusal is None
            notes += [] if refusal is None else [f"{node.name} stays fp32 inside: {refusal}"]
        graph.sort()
        graph.drop_dead_nodes()
        return PassResult(done, tuple(notes))

    def _visit(self, graph: Graph, node: Node) -> str | None:
        """Rewrites one attention, or says why not."""
        if node.name in self.fallback:
            return LOSES
        if (by_name := kept(node, self.keep_fp32)) is not None:
            return by_name
        parts = attention_parts(node)
        given = _given(node)
        missing = [p for p in parts if not given and str(p) not in self.ranges]
        if missing:
            return f"no range was given for %{missing[0]}"
        values = [node.input(i) for i in range(len(OPERANDS))]
        for value in values:
            refusal = _refusal(value)
            if refusal is not None:
                return refusal
        chosen = given or [symmetric_scale(*self.ranges[str(p)]) for p in parts]
        scales = {str(p): scale for p, scale in zip(parts, chosen, strict=True)}
        whole = [v for v in dict.fromkeys(values) if _can_store(graph, v, node)]
        stored = {v: _stored(graph, v, parts, scales) for v in whole}
        steps = list(zip(values, chosen, strict=True))
        apart = {
            (v, s): _quantized(graph, v, s) for v, s in dict.fromkeys(steps) if v not in stored
        }
        operands = [stored[v] if v in stored else apart[v, s] for v, s in steps]
        named = {f"{x}_scale": scales[str(p)] for x, p in zip(OPERANDS, parts, strict=True)}
        attrs = {**node.attrs, **named}
        inputs = [*operands, node.optional_input(3)]
        trial = graph.add_node("attention_int8", inputs, attrs, name=node.name)
        refusal = self.objection(node, trial) if self.supported(trial) else NO_KERNEL
        graph.erase(trial)
        if refusal is not None:
            return refusal
        replace_node(graph, node, "attention_int8", inputs, attrs)
        for old, new in stored.items():
            _take_name(graph, old, new)
        return None


def attention_values(graph: Graph) -> list[Channels]:
    """The channels whose ranges QuantizeAttention wants, in execution order."""
    nodes = [n for n in graph.nodes if n.op == "attention" and not _given(n)]
    return list(dict.fromkeys(part for node in nodes for part in attention_parts(node)))


def attention_parts(node: Node) -> list[Channels]:
    """Where the queries, keys and values of an attention are."""
    width = node.attrs["heads"] * node.attrs["head_size"]
    starts = [node.attrs[f"{x}_offset"] for x in OPERANDS]
    return [Channels(node.input(i).name, s, s + width) for i, s in enumerate(starts)]


def _given(node: Node) -> list[float]:
    """The scales of q, k and v where the model itself is quantised; else empty."""
    return [node.attrs[f"{x}_scale"] for x in OPERANDS if f"{x}_scale" in node.attrs]


def product_behind(value: Value) -> Node | None:
    """What makes an operand of an attention, but for a rotary embedding."""
    source = value.producer
    if source is not None and source.op == "rotary":
        source = source.input(0).producer
    return source


def _refusal(value: Value) -> str | None:
    source = product_behind(value)
    if source is None or source.op != "linear_int8":
        return f"%{value.name} is not a product in int8"
    if value.type.dtype is not DType.F32:
        return f"%{value.name} is {value.type.dtype} already"
    return None


def _can_store(graph: Graph, value: Value, reader: Node) -> bool:
    """Whether the kernel that makes the value can store bytes in its place."""
    source = value.producer
    if source is None or source.op != "linear_int8" or source.attrs["activation"] != "none":
        return False
    # A residual stays fp32, and so does what is read with a scale per token.
    plain = source.optional_input(4) is None and source.optional_input(5) is None
    return plain and value.users == [reader] and value not in graph.outputs


def _quantized(graph: Graph, value: Value, scale: float) -> Value:
    attrs = {"scale": scale, "zero_point": ZERO_POINT, "dtype": DType.U8}
    return graph.add("quantize", [value], attrs, name=f"{value.name}.quantize")


def symmetric_scale(low: float, high: float) -> float:
    """The step of u8 around 128 that holds `low..high`."""
    most = max(abs(low), abs(high))
    return 1.0 if most < SMALLEST else float(np.float32(most / STEPS))


def _stored(
    graph: Graph, value: Value, parts: list[Channels], scales: Mapping[str, float]
) -> Value:
    """A product beside the one that makes `value`, which stores steps of its parts' scales."""
    source = value.producer
    assert source is not None
    rows = np.ones(value.type.channels, np.float32)
    for part in parts:
        if part.value == value.name:
            rows[part.start : part.stop] = scales[str(part)]
    x, w, w_scale, bias = (source.optional_input(i) for i in range(4))
    inputs = [x, w, _divided(graph, w_scale, rows), _divided(graph, bias, rows), None]
    attrs = {**source.attrs, "out_scale": 1.0, "out_zero_point": ZERO_POINT}
    return graph.add("linear_int8", inputs, attrs, name=source.name)


def _take_name(graph: Graph, old: Value, new: Value) -> None:
    """The product that nothing reads any more leaves, and the other one gets its name."""
    assert old.producer is not None
    assert new.producer is not None
    name = old.producer.name
    graph.erase(old.producer)
    graph.rename(new.producer, name)


def _divided(graph: Graph, value: Value | None, rows: Array) -> Value | None:
    if value is None:
        return None
    assert value.data is not None, value
    return graph.add_constant((value.data / rows).astype(np.float32), value.name)
