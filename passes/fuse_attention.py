"""Replace spelled-out multi-head attention by one op.

    softmax(scale * q k^T + mask) v   with q, k, v [batch, heads, seq, head_size]
        ->   attention(q, k, v, mask) on [batch, seq, heads * head_size]

The reshapes and transposes that make and undo the heads meet their inverses around the new op:
canonicalize cancels them, whatever their order was. A query whose keys are all masked with -inf
gets zeros, as the exporters' guard `where(is_nan(p), 0, p)` says, and the standard's Attention:
`where(max over keys of mask == -inf, 0, p)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsec.ir.graph import Graph, Value
from sparsec.passes.absorb_qdq import Roundings
from sparsec.passes.attention_mask import build_mask
from sparsec.passes.attention_parts import Attention, read_attention
from sparsec.passes.base import PassResult
from sparsec.passes.rewrite import (
    Builder,
    Match,
    Pattern,
    Reject,
    RewriteRule,
    Term,
    apply_rules,
)


@dataclass(frozen=True, slots=True)
class FuseAttention:
    """Self-attention in fp32, any head size and any mask that adds to or replaces scores.

    Where all roundings are kept, attention whose operands have some stays as it is.
    """

    keep: Roundings = Roundings.PRODUCTS
    name: str = "fuse_attention"

    def run(self, graph: Graph) -> PassResult:
        heads = MultiHead(graph, self.keep is Roundings.ALL)
        return apply_rules(graph, [Softmax(graph)]) + apply_rules(graph, [heads])


@dataclass(frozen=True, slots=True)
class Softmax(RewriteRule):
    """e = exp(x - max(x)); e / sum(e)  ->  softmax(x)"""

    graph: Graph

    def pattern(self, p: Pattern) -> Term:
        shifted = p.sub("x", p.reduce_max("x", bind="max"))
        e = p.one_of(p.exp(shifted, bind="e"), p.exp("x", bind="e"))
        total = p.reduce_sum("e", bind="sum")
        return p.one_of(p.div(e, total), p.mul(e, p.reciprocal(total)))

    def check(self, m: Match) -> Reject | None:
        for name in ("sum", "max"):
            if m.get(name) is None:
                continue
            attrs = m.node(name).attrs
            if attrs["axes"] != (m["x"].type.rank - 1,) or not attrs["keepdims"]:
                return Reject(f"the {name} is not over the last axis alone")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.softmax(m["x"], axis=m["x"].type.rank - 1)


@dataclass(frozen=True, slots=True)
class MultiHead(RewriteRule):
    """matmul(softmax(scale * q k^T + mask), v)  ->  attention(q, k, v, mask)"""

    graph: Graph
    keeps_roundings: bool = False

    def pattern(self, p: Pattern) -> Term:
        softmax = p.softmax("scores", bind="softmax")
        zero = p.scalar(0.0)
        guarded = p.where(p.is_nan(softmax), zero, "softmax", bind="guard")
        dead = p.equal(p.reduce_max("bias", bind="row_max"), p.scalar(-math.inf))
        zeroed = p.where(dead, zero, softmax, bind="guard")
        return p.matmul(p.maybe("reshape", p.one_of(guarded, zeroed, softmax)), "v")

    def check(self, m: Match) -> Reject | None:
        found = read_attention(m, self.graph)
        if isinstance(found, Reject):
            return found
        rounded = any(part.step is not None for part in (found.q, found.k, found.v))
        if self.keeps_roundings and rounded:
            return Reject("its operands are rounded, and all roundings are kept")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        found = read_attention(m, self.graph)
        assert isinstance(found, Attention)
        batch, heads, seq, size = found.batch, found.heads, found.seq, found.head_size

        def tokens(value: Value) -> Value:
            """[batch, heads, seq, head_size], or batch * heads in one -> [batch, seq, channels]"""
            apart = g.reshape(value, shape=(batch, heads, seq, size))
            moved = g.transpose(apart, perm=(0, 2, 1, 3))
            return g.reshape(moved, shape=(batch, seq, heads * size))

        transposed = found.k.build(g)
        rank = transposed.type.rank
        k = g.transpose(transposed, perm=(*range(rank - 2), rank - 1, rank - 2))
        context = Builder(g.graph, f"{g.name}.attention").attention(
            tokens(found.q.build(g)),
            tokens(k),
            tokens(found.v.build(g)),
            build_mask(found, g),
            heads=heads,
            head_size=size,
            scale=found.scale,
            q_offset=0,
            k_offset=0,
            v_offset=0,
            **_steps(found),
        )
        split = g.reshape(context, shape=(batch, seq, heads, size))
        moved = g.transpose(split, perm=(0, 2, 1, 3))
        return g.reshape(moved, shape=m.root.output.type.shape)


def _steps(found: Attention) -> dict[str, float]:
    """The attributes that say how a quantised model stores q, k and v; all of them or none."""
    steps = {"q_scale": found.q.step, "k_scale": found.k.step, "v_scale": found.v.step}
    known = {name: step for name, step in steps.items() if step is not None}
    return known if len(known) == len(steps) else {}
