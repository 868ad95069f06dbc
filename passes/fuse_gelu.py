"""Replace spelled-out activations by one op.

x * 0.5 * (1 + erf(x / sqrt(2)))                              ->  gelu(x)
x * 0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))     ->  gelu(x), tanh form
x * sigmoid(x)                                                ->  silu(x)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsec.ir.graph import Graph, Value
from sparsec.passes.base import PassResult
from sparsec.passes.rewrite import (
    Builder,
    Match,
    Pattern,
    RewriteRule,
    Term,
    apply_rules,
)

TANH_SCALE = math.sqrt(2.0 / math.pi)
TANH_CUBIC = 0.044715


@dataclass(frozen=True, slots=True)
class FuseGelu:
    """Matches every order of association that exporters write."""

    name: str = "fuse_gelu"

    def run(self, graph: Graph) -> PassResult:
        return apply_rules(graph, [GeluErf(), GeluTanh(), Silu()])


class GeluErf(RewriteRule):
    """x * 0.5 * (1 + erf(x / sqrt(2)))  ->  gelu(x)"""

    def pattern(self, p: Pattern) -> Term:
        scaled = p.one_of(
            p.div("x", p.scalar(math.sqrt(2.0))), p.mul("x", p.scalar(math.sqrt(0.5)))
        )
        return _half_product(p, p.add(p.erf(scaled), p.scalar(1.0)))

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.gelu(m["x"], approximate="none")


class GeluTanh(RewriteRule):
    """x * 0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))  ->  gelu(x), tanh form"""

    def pattern(self, p: Pattern) -> Term:
        cubic, scale = p.scalar(TANH_CUBIC), p.scalar(TANH_SCALE)
        cube = product(p, cubic, "x", "x", "x")
        factor = p.add(product(p, cubic, "x", "x"), p.scalar(1.0))
        inner = p.one_of(p.mul(p.add("x", cube), scale), product(p, "x", scale, factor))
        return _half_product(p, p.add(p.tanh(inner), p.scalar(1.0)))

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.gelu(m["x"], approximate="tanh")


class Silu(RewriteRule):
    """x * sigmoid(x)  ->  silu(x)"""

    def pattern(self, p: Pattern) -> Term:
        return p.mul("x", p.sigmoid("x"))

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.silu(m["x"])


def _half_product(p: Pattern, gate: Term) -> Term:
    """x * 0.5 * gate; a division by 2 is a product with 0.5 after canonicalize."""
    return product(p, "x", p.scalar(0.5), gate)


def product(p: Pattern, *factors: Term) -> Term:
    """The product of all factors, in any order and association."""
    if len(factors) == 1:
        return factors[0]
    first, *rest = factors  # it stays left: mul matches both ways round
    splits: dict[tuple[str | int, ...], Term] = {}
    for mask in range(2 ** len(rest) - 1):
        left = [first] + [f for i, f in enumerate(rest) if mask >> i & 1]
        right = [f for i, f in enumerate(rest) if not mask >> i & 1]
        key = tuple(f if isinstance(f, str) else id(f) for f in left)
        splits.setdefault(key, p.mul(product(p, *left), product(p, *right)))
    return p.one_of(*splits.values())
