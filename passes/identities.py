"""Identities of arithmetic and logic that canonicalize applies.

All are exact in floating point: no rounding changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sparsec.ir.graph import Value
from sparsec.ir.op_spec import Array
from sparsec.ir.types import DType
from sparsec.passes.rewrite import Builder, Match, Pattern, Reject, RewriteRule, Term


def _all_equal(value: float) -> Term:
    """A constant that is `value` throughout, of any shape."""
    return Pattern().constant(lambda data: data.size > 0 and bool((data == value).all()))


class DropNeutral(RewriteRule):
    """add(x, 0), sub(x, 0), mul(x, 1), div(x, 1), pow(x, 1)  ->  x"""

    def pattern(self, p: Pattern) -> Term:
        zero, one = _all_equal(0), _all_equal(1)
        return p.one_of(
            p.add("x", zero),
            p.sub("x", zero),
            p.mul("x", one),
            p.div("x", one),
            p.pow("x", one),
            p.logical_and("x", one),
            p.logical_or("x", zero),
        )

    def rewrite(self, m: Match, g: Builder) -> Value:
        shape = m.root.output.type.shape
        return m["x"] if m["x"].type.shape == shape else g.broadcast_to(m["x"], shape=shape)


class DropCast(RewriteRule):
    """cast(x, to=the dtype of x)  ->  x;  cast of a cast of a bool  ->  one cast"""

    def pattern(self, p: Pattern) -> Term:
        return p.one_of(p.cast(p.cast("x")), p.cast("x"))

    def check(self, m: Match) -> Reject | None:
        to = m.root.attrs["to"]
        between = m.root.input(0)
        if m["x"].type.dtype is DType.BOOL and between is not m["x"]:
            return None
        if between is m["x"] and to is m["x"].type.dtype:
            return None
        return Reject(f"{m['x'].type.dtype} as {between.type.dtype} as {to} may change values")

    def rewrite(self, m: Match, g: Builder) -> Value:
        x, to = m["x"], m.root.attrs["to"]
        return x if x.type.dtype is to else g.cast(x, to=to)


class DropDouble(RewriteRule):
    """neg(neg(x)), logical_not(logical_not(x))  ->  x"""

    def pattern(self, p: Pattern) -> Term:
        return p.one_of(p.neg(p.neg("x")), p.logical_not(p.logical_not("x")))

    def rewrite(self, m: Match, g: Builder) -> Value:
        return m["x"]


class DivideByPowerOfTwo(RewriteRule):
    """div(x, c)  ->  mul(x, 1 / c)  when 1 / c is exact"""

    def pattern(self, p: Pattern) -> Term:
        return p.div("x", p.scalar(bind="c"))

    def check(self, m: Match) -> Reject | None:
        c = m.scalar("c")
        if not m["x"].type.dtype.is_float or not math.isfinite(c) or c == 0:
            return Reject("the divisor is not a finite float")
        if abs(math.frexp(c)[0]) != 0.5 or abs(math.log2(abs(c))) > 14:
            return Reject(f"1 / {c} is not exact")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.mul(m["x"], g.scalar(1.0 / m.scalar("c"), m["x"]))


class OneDividedBy(RewriteRule):
    """div(1, x)  ->  reciprocal(x)"""

    def pattern(self, p: Pattern) -> Term:
        return p.div(_all_equal(1), "x")

    def check(self, m: Match) -> Reject | None:
        return None if m["x"].type.dtype.is_float else Reject("integers truncate")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.reciprocal(m["x"])


class SubtractConstant(RewriteRule):
    """sub(x, c)  ->  add(x, -c)"""

    def pattern(self, p: Pattern) -> Term:
        return p.sub("x", p.scalar(bind="c"))

    def check(self, m: Match) -> Reject | None:
        return None if m["x"].type.dtype.is_float else Reject("only floats are normalised")

    def rewrite(self, m: Match, g: Builder) -> Value:
        c = m["c"].data
        assert c is not None
        return g.add(m["x"], g.constant(np.negative(c)))


class ExpandPower(RewriteRule):
    """pow(x, 2)  ->  x * x;  pow(x, 3)  ->  x * x * x;  also 0.5 and -1"""

    EXPONENTS = (2.0, 3.0, 0.5, -1.0)

    def pattern(self, p: Pattern) -> Term:
        return p.pow("x", p.scalar(bind="c"))

    def check(self, m: Match) -> Reject | None:
        if m.scalar("c") not in self.EXPONENTS or not m["x"].type.dtype.is_float:
            return Reject(f"the power {m.scalar('c')} of {m['x'].type.dtype} is not spelled out")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        x = m["x"]
        match m.scalar("c"):
            case 2.0:
                return g.mul(x, x)
            case 3.0:
                return g.mul(g.mul(x, x), x)
            case 0.5:
                return g.sqrt(x)
        return g.reciprocal(x)


class WhereConstant(RewriteRule):
    """where(all true, a, b)  ->  a;  where(all false, a, b)  ->  b"""

    def pattern(self, p: Pattern) -> Term:
        return p.where(p.constant(is_uniform, bind="condition"), "a", "b")

    def rewrite(self, m: Match, g: Builder) -> Value:
        data = m["condition"].data
        assert data is not None
        kept = m["a"] if data.all() else m["b"]
        shape = m.root.output.type.shape
        return kept if kept.type.shape == shape else g.broadcast_to(kept, shape=shape)


class WhereSame(RewriteRule):
    """where(c, x, x)  ->  x"""

    def pattern(self, p: Pattern) -> Term:
        return p.where("condition", "x", "x")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return m["x"]


class WhereNot(RewriteRule):
    """where(logical_not(c), a, b)  ->  where(c, b, a)"""

    def pattern(self, p: Pattern) -> Term:
        return p.where(p.logical_not("c"), "a", "b")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.where(m["c"], m["b"], m["a"])


def is_uniform(data: Array) -> bool:
    """Whether all elements are equal."""
    return data.size > 0 and bool((data == data.reshape(-1)[0]).all())


IDENTITIES: Sequence[RewriteRule] = (
    DropNeutral(),
    DropCast(),
    DropDouble(),
    DivideByPowerOfTwo(),
    OneDividedBy(),
    SubtractConstant(),
    ExpandPower(),
    WhereConstant(),
    WhereSame(),
    WhereNot(),
)
