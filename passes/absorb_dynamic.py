"""Turn products of dynamically quantised values into products that round tokens.

q, s, z = dynamic_quantize(x)
mul(cast(matmul_integer(q, w, z, zw)), mul(s, sw))   ->   matmul(round_tokens(x), dequantised w)

The file has one scale for all of x, the products here one per token: never a coarser one, and no
token's answer depends on the others. With Roundings.ALL, and for what is no such product (a
weight that is not constant), the ops are spelled out in element-wise ones instead: the file's own
numbers, and slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.ops_dynamic import LEVELS
from sparsec.ir.types import DType
from sparsec.passes.absorb_qdq import Roundings
from sparsec.passes.base import PassResult
from sparsec.passes.integer_weights import has_scale_per_column, real_weight
from sparsec.passes.rewrite import (
    Builder,
    Match,
    Pattern,
    Reject,
    RewriteRule,
    Term,
    apply_rules,
)

CENTRE = 128


@dataclass(frozen=True, slots=True)
class AbsorbDynamic:
    """Before all fusions, which then see a product of fp32 numbers."""

    keep: Roundings = Roundings.PRODUCTS
    name: str = "absorb_dynamic"

    def run(self, graph: Graph) -> PassResult:
        if not any(n.op in ("dynamic_quantize", "matmul_integer") for n in graph.nodes):
            return PassResult(0)
        result = PassResult(0)
        if self.keep is not Roundings.ALL:
            result = apply_rules(graph, [ToRoundedTokens(self.keep is Roundings.PRODUCTS)])
        spelled = 0
        for node in [n for n in graph.nodes if n.op in _SPELLED]:
            _SPELLED[node.op](graph, node)
            spelled += 1
        graph.sort()
        graph.drop_dead_nodes()
        notes = [f"{result.changed} products of dynamically quantised values round tokens"]
        if spelled:
            notes.append(f"{spelled} dynamic ops are spelled out, which is slow")
        return PassResult(result.changed + spelled, (*result.notes, *notes))


@dataclass(slots=True)
class ToRoundedTokens(RewriteRule):
    """Values and weights are replaced once, however many products read them."""

    rounds: bool
    rounded: dict[Value, Value] = field(default_factory=dict)
    weights: dict[tuple[Value | None, ...], Value] = field(default_factory=dict)

    def pattern(self, p: Pattern) -> Term:
        total = p.matmul_integer("q", p.constant(bind="w"), bind="sums")
        scales = p.mul("s", p.constant(bind="w_scale"))
        return p.mul(p.cast(total), scales)

    def check(self, m: Match) -> Reject | None:
        source, sums = m["q"].producer, m.node("sums")
        if source is None or source.op != "dynamic_quantize" or m["q"] is not source.outputs[0]:
            return Reject("its first operand is not dynamically quantised")
        if m.get("s") is not source.outputs[1] or sums.optional_input(2) is not source.outputs[2]:
            return Reject("it is not read with the scale and zero point that it was stored with")
        zero = sums.optional_input(3)
        if m["w"].type.rank != 2 or (zero is not None and not zero.is_constant):
            return Reject("its weight is not a constant matrix")
        if not has_scale_per_column(m["w_scale"], m["w"]):
            scales = m["w_scale"].type
            return Reject(f"scales {scales} are neither one nor one per column of {m['w'].type}")
        if m.root.output.type.shape != sums.output.type.shape or source.input(0).type.rank < 2:
            return Reject("it is no product over tokens")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        source = m.node("q")
        x = source.input(0)
        if self.rounds and x not in self.rounded:
            attrs = {"zero_point": CENTRE}
            self.rounded[x] = g.graph.add("round_tokens", [x], attrs, name=source.name)
        zero = m.node("sums").optional_input(3)
        return g.matmul(self.rounded.get(x, x), self._weight(m["w"], m["w_scale"], zero, g))

    def _weight(self, w: Value, scale: Value, zero: Value | None, g: Builder) -> Value:
        """The weight in fp32, which remembers its numbers."""
        key = (w, scale, zero)
        if key not in self.weights:
            assert scale.data is not None, scale
            self.weights[key] = real_weight(g, w, scale.data, zero)
        return self.weights[key]


def _spell_quantize(graph: Graph, node: Node) -> None:
    """The standard's own definition of DynamicQuantizeLinear."""
    g, x = Builder(graph, node.name), node.input(0)
    axes = tuple(range(x.type.rank))
    zero = g.scalar(0.0, x)
    low = g.minimum(g.reduce_min(x, axes=axes, keepdims=False), zero)
    high = g.maximum(g.reduce_max(x, axes=axes, keepdims=False), zero)
    span = g.div(g.sub(high, low), g.scalar(LEVELS, x))
    scale = g.where(g.equal(span, zero), g.scalar(1.0, x), span)
    place = g.clip(g.round(g.div(g.sub(zero, low), scale)), min=0.0, max=float(LEVELS))
    steps = g.add(g.round(g.div(x, scale)), place)
    stored = g.cast(g.clip(steps, min=0.0, max=float(LEVELS)), to=DType.U8)
    results = (stored, scale, g.cast(place, to=DType.U8))
    for old, new in zip(node.outputs, results, strict=True):
        graph.replace_uses(old, new)
    graph.erase(node)


def _spell_matmul(graph: Graph, node: Node) -> None:
    g = Builder(graph, node.name)
    wide = []
    for index in range(2):
        x, zero = g.cast(node.input(index), to=DType.I32), node.optional_input(index + 2)
        wide.append(x if zero is None else g.sub(x, g.cast(zero, to=DType.I32)))
    graph.replace_uses(node.output, g.matmul(*wide))
    graph.erase(node)


_SPELLED = {"dynamic_quantize": _spell_quantize, "matmul_integer": _spell_matmul}
