"""Identities of slices: they move towards the value that they are parts of.

A projection to queries, keys and values in one product is split in many ways; all become slices
of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.ir.dims import product
from sparsec.ir.graph import Value
from sparsec.passes.rewrite import Builder, Match, Pattern, Reject, RewriteRule, Term


class SliceBeforeTranspose(RewriteRule):
    """slice(transpose(x))  ->  transpose(slice(x))  when one place of an axis is taken"""

    def pattern(self, p: Pattern) -> Term:
        return p.slice(p.transpose("x", bind="moved"))

    def check(self, m: Match) -> Reject | None:
        taken = [m.root.output.type.shape[axis] for axis in m.root.attrs["axes"]]
        return None if all(d == 1 for d in taken) else Reject("more than one place is taken")

    def rewrite(self, m: Match, g: Builder) -> Value:
        perm, attrs = m.node("moved").attrs["perm"], m.root.attrs
        axes = tuple(perm[axis] for axis in attrs["axes"])
        return g.transpose(g.slice(m["x"], **{**attrs, "axes": axes}), perm=perm)


class SqueezeBeforeTranspose(RewriteRule):
    """reshape(transpose(slice(x)))  ->  transpose(reshape(slice(x)))  when axes of size 1 go"""

    def pattern(self, p: Pattern) -> Term:
        return p.reshape(p.transpose(p.slice("x", bind="slice"), bind="moved"))

    def check(self, m: Match) -> Reject | None:
        moved, shape = m["moved"].type.shape, m.root.output.type.shape
        if len(shape) >= len(moved) or [d for d in moved if d != 1] != list(shape):
            return Reject("more than axes of size 1 goes")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        old, perm = m["slice"].type.shape, m.node("moved").attrs["perm"]
        kept = [axis for axis, d in enumerate(old) if d != 1]
        part = g.reshape(m["slice"], shape=tuple(old[axis] for axis in kept))
        return g.transpose(part, perm=tuple(kept.index(a) for a in perm if a in kept))


class SliceOfSplitChannels(RewriteRule):
    """reshape(slice(reshape(x, [..., n, h, d]), n), [..., c])  ->  slice(x, channels)

    An axis in front of the heads says which of several projections a channel belongs to.
    """

    def pattern(self, p: Pattern) -> Term:
        return p.reshape(p.slice(p.reshape("x", bind="split"), bind="slice"))

    def check(self, m: Match) -> Reject | None:
        x, split, attrs = m["x"].type, m["split"].type, m.node("slice").attrs
        axis = x.rank - 1  # of the split value: the first one made of channels
        if x.rank < 2 or split.rank <= x.rank or split.shape[:axis] != x.shape[:-1]:
            return Reject("the channels are not split alone")
        if attrs["axes"] != (axis,) or attrs["steps"] != (1,):
            return Reject("the slice is not of the first of the axes made of channels")
        if m.root.output.type.shape[: x.rank - 1] != x.shape[:-1]:
            return Reject("the tokens change")
        sizes = (*split.shape[axis:], attrs["starts"][0], m["slice"].type.shape[axis])
        known = all(isinstance(d, int) for d in sizes) and attrs["starts"][0] >= 0
        return None if known else Reject("a size is not known")

    def rewrite(self, m: Match, g: Builder) -> Value:
        x, split, attrs = m["x"].type, m["split"].type, m.node("slice").attrs
        each = product(split.shape[x.rank :])
        start = attrs["starts"][0] * each
        end = start + m["slice"].type.shape[x.rank - 1] * each
        part = g.slice(m["x"], axes=(x.rank - 1,), starts=(start,), ends=(end,), steps=(1,))
        return g.reshape(part, shape=m.root.output.type.shape)


SLICE_IDENTITIES: Sequence[RewriteRule] = (
    SliceBeforeTranspose(),
    SqueezeBeforeTranspose(),
    SliceOfSplitChannels(),
)
