"""Identities of the ops that only move elements, which canonicalize applies."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.ir.dims import Dim, product
from sparsec.ir.graph import Node, Value
from sparsec.ir.ops import OPS
from sparsec.passes.identities import is_uniform
from sparsec.passes.rewrite import Builder, Match, Pattern, Reject, RewriteRule, Term

ELEMENTWISE = tuple(name for name, spec in OPS.items() if spec.elementwise)


class DropMove(RewriteRule):
    """reshape, broadcast_to or slice to the same shape; transpose that moves nothing  ->  x"""

    def pattern(self, p: Pattern) -> Term:
        return p.any_op(("reshape", "broadcast_to", "transpose", "slice", "concat"), "x")

    def check(self, m: Match) -> Reject | None:
        node = m.root
        if node.output.type.shape != m["x"].type.shape:
            return Reject("the shape changes")
        if node.op == "transpose" and node.attrs["perm"] != tuple(range(m["x"].type.rank)):
            return Reject("axes of one size are exchanged")
        if node.op == "slice" and any(step < 0 for step in node.attrs["steps"]):
            return Reject("the order changes")
        if node.op == "concat" and len(node.inputs) != 1:
            return Reject("there are other parts")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        return m["x"]


class MergeReshapes(RewriteRule):
    """reshape(reshape(x))  ->  reshape(x)"""

    def pattern(self, p: Pattern) -> Term:
        return p.reshape(p.reshape("x"))

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.reshape(m["x"], shape=m.root.output.type.shape)


class ReshapeLast(RewriteRule):
    """reshape(linear(reshape(x), w, b))  ->  reshape(linear(x, w, b)), or the product alone"""

    def pattern(self, p: Pattern) -> Term:
        return p.reshape(p.linear(p.reshape("x"), "w", bind="product"))

    def check(self, m: Match) -> Reject | None:
        if m.node("product").optional_input(3) is not None:
            return Reject("the product has a residual")
        if m["x"].type.rank < 2 or m["x"].type.shape[-1] != m["w"].type.shape[1]:
            return Reject("the reshape before it changes the channels")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        node, shape = m.node("product"), m.root.output.type.shape
        y = g.linear(m["x"], m["w"], node.optional_input(2), None, **node.attrs)
        return y if y.type.shape == shape else g.reshape(y, shape=shape)


class MergeTransposes(RewriteRule):
    """transpose(transpose(x, a), b)  ->  transpose(x, a[b])"""

    def pattern(self, p: Pattern) -> Term:
        return p.transpose(p.transpose("x", bind="inner"))

    def rewrite(self, m: Match, g: Builder) -> Value:
        inner = m.node("inner").attrs["perm"]
        return g.transpose(m["x"], perm=tuple(inner[i] for i in m.root.attrs["perm"]))


class TransposeToReshape(RewriteRule):
    """transpose(x)  ->  reshape(x)  when only axes of size 1 move"""

    def pattern(self, p: Pattern) -> Term:
        return p.transpose("x")

    def check(self, m: Match) -> Reject | None:
        moved = [a for a in m.root.attrs["perm"] if m["x"].type.shape[a] != 1]
        return None if moved == sorted(moved) else Reject("elements move")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.reshape(m["x"], shape=m.root.output.type.shape)


class TransposeUnmerged(RewriteRule):
    """reshape(transpose(reshape(x)))  ->  transpose(x)  when the leading axes are merged between

    [b, h, s, d] -> [b * h, s, d] -> [b * h, d, s] -> [b, h, d, s]
    """

    def pattern(self, p: Pattern) -> Term:
        return p.reshape(p.transpose(p.reshape("x", bind="merged"), bind="moved"))

    def check(self, m: Match) -> Reject | None:
        return None if _unmerged_perm(m) is not None else Reject("other axes are merged")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.transpose(m["x"], perm=_unmerged_perm(m))


def _unmerged_perm(m: Match) -> tuple[int, ...] | None:
    x, merged = m["x"].type.shape, m["merged"].type.shape
    perm = m.node("moved").attrs["perm"]
    count = len(x) - len(merged) + 1
    if count < 2 or perm[0] != 0 or merged != (product(x[:count]), *x[count:]):
        return None
    whole = (*range(count), *(count - 1 + axis for axis in perm[1:]))
    return whole if m.root.output.type.shape == tuple(x[a] for a in whole) else None


class MergeBroadcasts(RewriteRule):
    """broadcast_to(broadcast_to(x))  ->  broadcast_to(x)"""

    def pattern(self, p: Pattern) -> Term:
        return p.broadcast_to(p.broadcast_to("x"))

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.broadcast_to(m["x"], shape=m.root.output.type.shape)


class BroadcastToReshape(RewriteRule):
    """broadcast_to(x)  ->  reshape(x)  when it only puts axes of size 1 in front"""

    def pattern(self, p: Pattern) -> Term:
        return p.broadcast_to("x")

    def check(self, m: Match) -> Reject | None:
        x, shape = m["x"].type, m.root.output.type.shape
        added = (1,) * (len(shape) - x.rank)
        return None if (*added, *x.shape) == shape else Reject("elements are repeated")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.reshape(m["x"], shape=m.root.output.type.shape)


class BroadcastLast(RewriteRule):
    """f(broadcast_to(a), b)  ->  broadcast_to(f(a, b)), or f(a, b) when b has the full shape

    An elementwise op broadcasts by itself, and does less work on the smaller operands. A constant
    that is the same throughout is a broadcast too.
    """

    def pattern(self, p: Pattern) -> Term:
        return p.any_op(ELEMENTWISE, bind="y")

    def check(self, m: Match) -> Reject | None:
        found = any(_is_broadcast(v) for v in _operands(m.root))
        return None if found else Reject("no operand is a broadcast")

    def rewrite(self, m: Match, g: Builder) -> Value:
        operands = [_unbroadcast(v, g) for v in _operands(m.root)]
        y = g.graph.add(m.root.op, operands, m.root.attrs, name=g.name)
        shape = m.root.output.type.shape
        return y if y.type.shape == shape else g.broadcast_to(y, shape=shape)


class ReshapeBroadcast(RewriteRule):
    """reshape(broadcast_to(x))  ->  broadcast_to(reshape(x))  when axes of size 1 come or go"""

    def pattern(self, p: Pattern) -> Term:
        return p.reshape(p.broadcast_to("x", bind="wide"))

    def check(self, m: Match) -> Reject | None:
        wide, shape = m["wide"].type.shape, m.root.output.type.shape
        if [d for d in wide if d != 1] != [d for d in shape if d != 1]:
            return Reject("axes are merged or split")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        wide, shape = m["wide"].type.shape, m.root.output.type.shape
        x = m["x"].type.shape
        padded: tuple[Dim, ...] = (1,) * (len(wide) - len(x)) + x
        kept = iter([small for small, large in zip(padded, wide, strict=True) if large != 1])
        narrow = tuple(1 if d == 1 else next(kept) for d in shape)
        return g.broadcast_to(g.reshape(m["x"], shape=narrow), shape=shape)


class TransposeBroadcast(RewriteRule):
    """transpose(broadcast_to(x))  ->  broadcast_to(transpose(x))"""

    def pattern(self, p: Pattern) -> Term:
        return p.transpose(p.broadcast_to("x", bind="wide"))

    def rewrite(self, m: Match, g: Builder) -> Value:
        x, rank = m["x"], m["wide"].type.rank
        padded = g.reshape(x, shape=(1,) * (rank - x.type.rank) + x.type.shape)
        moved = g.transpose(padded, perm=m.root.attrs["perm"])
        return g.broadcast_to(moved, shape=m.root.output.type.shape)


def _operands(node: Node) -> list[Value]:
    return [v for v in node.inputs if v is not None]


def _is_broadcast(value: Value) -> bool:
    """Not for constants with one axis: they may become a bias, whatever they hold."""
    if value.data is None:
        return value.producer is not None and value.producer.op == "broadcast_to"
    axes = sum(size > 1 for size in value.data.shape)
    least = 2 if value.type.dtype.is_float else 1
    return axes >= least and is_uniform(value.data)


def _unbroadcast(value: Value, g: Builder) -> Value:
    """The source of a broadcast_to, the element of a uniform constant, or the value itself."""
    if not _is_broadcast(value):
        return value
    if value.data is not None:
        return g.constant(value.data.reshape(-1)[:1].reshape(()))
    assert value.producer is not None
    return value.producer.input(0)


SHAPE_IDENTITIES: Sequence[RewriteRule] = (
    DropMove(),
    MergeReshapes(),
    ReshapeLast(),
    MergeTransposes(),
    TransposeToReshape(),
    TransposeUnmerged(),
    MergeBroadcasts(),
    BroadcastToReshape(),
    BroadcastLast(),
    ReshapeBroadcast(),
    TransposeBroadcast(),
)
