"""Identities of gathers whose indices are ranges, which canonicalize applies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsec.ir.dims import compare, product
from sparsec.ir.graph import Value
from sparsec.passes.affine import Affine, Shape, affine_of, affine_of_constant
from sparsec.passes.identities import is_uniform
from sparsec.passes.rewrite import Builder, Match, Pattern, Reject, RewriteRule, Term


class GatherAll(RewriteRule):
    """gather(reshape(x, [n, ...]), range over all n)  ->  broadcast_to(reshape(x))

    The indices have one axis per axis of x that was flattened, in the same order.
    """

    def pattern(self, p: Pattern) -> Term:
        return p.gather(p.maybe("reshape", "x"), "indices")

    def check(self, m: Match) -> Reject | None:
        return None if _narrow_gather(m) is not None else Reject("not all of x in order")

    def rewrite(self, m: Match, g: Builder) -> Value:
        narrow = _narrow_gather(m)
        assert narrow is not None
        shape = m.root.output.type.shape
        return g.broadcast_to(g.reshape(m["x"], shape=narrow), shape=shape)


class GatherNdAll(RewriteRule):
    """gather_nd(x, concat(range over axis 0, range over axis 1, ...))  ->  broadcast_to(x)"""

    def pattern(self, p: Pattern) -> Term:
        return p.gather_nd("x", "indices")

    def check(self, m: Match) -> Reject | None:
        return None if _narrow_gather_nd(m) is not None else Reject("not all of x in order")

    def rewrite(self, m: Match, g: Builder) -> Value:
        narrow = _narrow_gather_nd(m)
        assert narrow is not None
        shape = m.root.output.type.shape
        return g.broadcast_to(g.reshape(m["x"], shape=narrow), shape=shape)


class NotLess(RewriteRule):
    """logical_not(less(a, b))  ->  greater_equal(a, b), of numbers that are never NaN"""

    def pattern(self, p: Pattern) -> Term:
        return p.logical_not(p.less("a", "b"))

    def check(self, m: Match) -> Reject | None:
        return Reject("the operands are floats") if m["a"].type.dtype.is_float else None

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.greater_equal(m["a"], m["b"])


class RangeIsPositive(RewriteRule):
    """greater_equal(range, c)  ->  true  when the least element is at least c"""

    def pattern(self, p: Pattern) -> Term:
        return p.any_op(("greater_equal", "greater"), "range", p.scalar(bind="c"))

    def check(self, m: Match) -> Reject | None:
        affine = affine_of(m["range"])
        if affine is None or any(compare(c, 0) not in (0, 1) for c in affine.coefficients):
            return Reject("the least element is not known")
        sign = compare(affine.offset, int(m.scalar("c")))
        known = (0, 1) if m.root.op == "greater_equal" else (1,)
        return None if sign in known else Reject("the comparison may be false")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.broadcast_to(g.constant(np.asarray(True)), shape=m.root.output.type.shape)


class SliceOfRange(RewriteRule):
    """slice(constant 0, 1, 2, ...)  ->  reshape(iota)"""

    def pattern(self, p: Pattern) -> Term:
        return p.slice("x")

    def check(self, m: Match) -> Reject | None:
        affine = affine_of(m.root.output)
        if affine is None:
            return Reject("not a range")
        moving = [c for c in affine.coefficients if c != 0]
        wide = [d for d in m.root.output.type.shape if d != 1]
        if len(moving) != 1 or len(wide) != 1 or not isinstance(moving[0], int):
            return Reject("not a range along one axis")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        affine, type = affine_of(m.root.output), m.root.output.type
        assert affine is not None
        (step,) = (c for c in affine.coefficients if c != 0)
        (length,) = (d for d in type.shape if d != 1)
        attrs = {"start": affine.offset, "step": step, "length": length, "dtype": type.dtype}
        return g.reshape(g.iota(**attrs), shape=type.shape)


class SelectUniform(RewriteRule):
    """slice or gather_elements of a constant that is c throughout  ->  broadcast_to(c)"""

    def pattern(self, p: Pattern) -> Term:
        x = p.maybe("broadcast_to", p.constant(is_uniform, bind="x"))
        return p.one_of(p.slice(x), p.gather_elements(x))

    def rewrite(self, m: Match, g: Builder) -> Value:
        assert m["x"].data is not None
        c = g.constant(m["x"].data.reshape(-1)[:1].reshape(()))
        return g.broadcast_to(c, shape=m.root.output.type.shape)


def _narrow_gather(m: Match) -> Shape | None:
    """The shape that x is reshaped to before it is broadcast to the result's shape."""
    flat = m.root.input(0).type.shape
    affine = affine_of(m["indices"])
    if m.root.attrs["axis"] != 0 or affine is None or affine.offset != 0:
        return None
    rows = _leading_axes(m["x"].type.shape, flat)
    if rows is None:
        return None
    strides = tuple(product(rows[i + 1 :]) for i in range(len(rows)))
    found = [i for i, c in enumerate(affine.coefficients) if c != 0]
    wanted = [(d, s) for d, s in zip(rows, strides, strict=True) if d != 1]
    shape = m["indices"].type.shape
    if [(shape[i], affine.coefficients[i]) for i in found] != wanted:
        return None
    return tuple(d if i in found else 1 for i, d in enumerate(shape)) + flat[1:]


def _leading_axes(x: Shape, flat: Shape) -> Shape | None:
    """The axes of x that became axis 0 of `flat`; the others must be as they were."""
    for count in range(len(x) + 1):
        tail = [d for d in x[count:] if d != 1]
        if product(x[:count]) == flat[0] and tail == [d for d in flat[1:] if d != 1]:
            return x[:count]
    return None


def _narrow_gather_nd(m: Match) -> Shape | None:
    x, shape = m["x"].type.shape, m["indices"].type.shape
    columns = _columns(m["indices"])
    if m.root.attrs["batch_dims"] or columns is None:
        return None
    axes: list[int] = []
    for column, size in zip(columns, x, strict=False):
        moving = [i for i, c in enumerate(column.coefficients) if c != 0]
        if column.offset != 0 or len(moving) != (0 if size == 1 else 1):
            return None
        if any(column.coefficients[i] != 1 or shape[i] != size for i in moving):
            return None
        axes += moving
    if axes != sorted(set(axes)):
        return None
    return tuple(d if i in axes else 1 for i, d in enumerate(shape[:-1])) + x[len(columns) :]


def _columns(indices: Value) -> list[Affine] | None:
    """What indexes each axis: the slices of the indices along their last axis."""
    if indices.data is not None:
        parts = np.split(indices.data, indices.data.shape[-1], axis=-1)
        columns = [affine_of_constant(part) for part in parts]
    else:
        node = indices.producer
        if node is None or node.op != "concat" or node.attrs["axis"] != indices.type.rank - 1:
            return None
        if any(v is None or v.type.shape[-1] != 1 for v in node.inputs):
            return None
        columns = [affine_of(node.input(i)) for i in range(len(node.inputs))]
    known = [c for c in columns if c is not None]
    return known if len(known) == len(columns) else None


INDEX_IDENTITIES: Sequence[RewriteRule] = (
    GatherAll(),
    GatherNdAll(),
    NotLess(),
    RangeIsPositive(),
    SliceOfRange(),
    SelectUniform(),
)
