"""Replace a spelled-out layer normalisation, and the sum before it, by one op.

d = x - mean(x)
d / sqrt(mean(d * d) + epsilon) * gamma + beta   ->   layer_norm(x, gamma, beta)
layer_norm(a + b, gamma, beta)                   ->   layer_norm(a, gamma, beta, residual=b)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.rewrite import (
    Builder,
    Match,
    Pattern,
    Reject,
    RewriteRule,
    Term,
    apply_rules,
    as_row,
    is_row,
    read_once,
)


@dataclass(frozen=True, slots=True)
class FuseLayerNorm:
    """Over the last axis only, in fp32."""

    name: str = "fuse_layer_norm"

    def run(self, graph: Graph) -> PassResult:
        rules = [
            LayerNormFolded(),
            LayerNorm(),
            AbsorbScale(graph),
            AbsorbShift(graph),
            AbsorbResidual(graph),
        ]
        return apply_rules(graph, rules)


def _spread(p: Pattern, d: Term = "d") -> Term:
    """The variance of x plus epsilon. `d` is x less its mean, as it is met first: later "d"."""
    variance = p.reduce_mean(p.mul(d, "d"), bind="variance")
    return p.add(variance, p.scalar(bind="epsilon"))


def _inverse(p: Pattern, d: Term = "d") -> Term:
    """1 / standard deviation, of such a `d`."""
    spread = _spread(p, d)
    return p.one_of(p.reciprocal(p.sqrt(spread)), p.pow(spread, p.scalar(-0.5)))


def _check_means(m: Match) -> Reject | None:
    x = m["x"].type
    if x.dtype is not DType.F32 or not isinstance(x.shape[-1], int):
        return Reject(f"{x} is not fp32 with a known number of channels")
    for name in ("mean", "variance"):
        attrs = m.node(name).attrs
        if attrs["axes"] != (x.rank - 1,) or not attrs["keepdims"]:
            return Reject(f"the {name} is not over the last axis alone")
    return None


@dataclass(slots=True)
class LayerNorm(RewriteRule):
    """(x - mean(x)) / sqrt(variance(x) + epsilon)  ->  layer_norm(x, ones)"""

    ones: dict[int, Value] = field(default_factory=dict)

    def pattern(self, p: Pattern) -> Term:
        d = p.sub("x", p.reduce_mean("x", bind="mean"), bind="d")
        return p.one_of(p.div(d, p.sqrt(_spread(p))), p.mul(d, _inverse(p)))

    def check(self, m: Match) -> Reject | None:
        return _check_means(m)

    def rewrite(self, m: Match, g: Builder) -> Value:
        channels = m["x"].type.channels
        ones = self.ones.get(channels)
        if ones is None:
            ones = g.constant(np.ones(channels, np.float32), "ones")
            self.ones[channels] = ones
        return g.layer_norm(m["x"], ones, None, None, epsilon=m.scalar("epsilon"))


class LayerNormFolded(RewriteRule):
    """x * s + (beta - mean(x) * s) with s = gamma / deviation  ->  layer_norm(x, gamma, beta)"""

    def pattern(self, p: Pattern) -> Term:
        mean = p.reduce_mean("x", bind="mean")
        # `d` is reached through the variance here, so it is bound there.
        d = p.sub("x", mean, bind="d")
        scale = p.mul(_inverse(p, d), p.constant(bind="gamma"), bind="scale")
        shift = p.sub(p.constant(bind="beta"), p.mul("mean", "scale"))
        return p.add(p.mul("x", scale), shift)

    def check(self, m: Match) -> Reject | None:
        for name in ("gamma", "beta"):
            if m[name].type.shape != m["x"].type.shape[-1:]:
                return Reject(f"{name} {m[name].type} is not one value per channel")
        return _check_means(m)

    def rewrite(self, m: Match, g: Builder) -> Value:
        epsilon = m.scalar("epsilon")
        return g.layer_norm(m["x"], m["gamma"], m["beta"], None, epsilon=epsilon)


def _check_affine(graph: Graph, m: Match, factor: str) -> Reject | None:
    if not read_once(m["norm"], graph.outputs):
        return Reject("the normalised value is read elsewhere")
    if m.node("norm").optional_input(2) is not None:
        return Reject("the normalised value is shifted already")
    if not is_row(m[factor], m["norm"].type.shape[-1]):
        return Reject(f"{factor} {m[factor].type} is not one value per channel")
    return None


@dataclass(frozen=True, slots=True)
class AbsorbScale(RewriteRule):
    """layer_norm(x, ones) * gamma  ->  layer_norm(x, gamma)"""

    graph: Graph

    def pattern(self, p: Pattern) -> Term:
        norm = p.layer_norm("x", p.constant(lambda w: bool((w == 1).all())), bind="norm")
        return p.mul(norm, p.constant(bind="gamma"))

    def check(self, m: Match) -> Reject | None:
        return _check_affine(self.graph, m, "gamma")

    def rewrite(self, m: Match, g: Builder) -> Value:
        norm = m.node("norm")
        residual, epsilon = norm.optional_input(3), norm.attrs["epsilon"]
        return g.layer_norm(m["x"], as_row(m["gamma"], g), None, residual, epsilon=epsilon)


@dataclass(frozen=True, slots=True)
class AbsorbShift(RewriteRule):
    """layer_norm(x, gamma) + beta  ->  layer_norm(x, gamma, beta)"""

    graph: Graph

    def pattern(self, p: Pattern) -> Term:
        return p.add(p.layer_norm("x", "gamma", bind="norm"), p.constant(bind="beta"))

    def check(self, m: Match) -> Reject | None:
        return _check_affine(self.graph, m, "beta")

    def rewrite(self, m: Match, g: Builder) -> Value:
        norm, beta = m.node("norm"), as_row(m["beta"], g)
        residual, epsilon = norm.optional_input(3), norm.attrs["epsilon"]
        return g.layer_norm(m["x"], m["gamma"], beta, residual, epsilon=epsilon)


@dataclass(frozen=True, slots=True)
class AbsorbResidual(RewriteRule):
    """layer_norm(a + b, gamma, beta)  ->  layer_norm(a, gamma, beta, residual=b)"""

    graph: Graph

    def pattern(self, p: Pattern) -> Term:
        return p.layer_norm(p.add("a", "b", bind="sum"), "gamma")

    def check(self, m: Match) -> Reject | None:
        if not read_once(m["sum"], self.graph.outputs):
            return Reject("the sum is read elsewhere")
        if m.root.optional_input(3) is not None:
            return Reject("there is a residual already")
        if m["sum"].type.dtype is not DType.F32:
            return Reject(f"the sum is {m['sum'].type.dtype}")
        if m["a"].type.shape != m["b"].type.shape:
            return Reject(f"summands {m['a'].type} and {m['b'].type} differ in shape")
        if m["a"].is_constant or m["b"].is_constant:
            return Reject("a summand is constant")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        x, residual = m["a"], m["b"]
        if residual.producer is not None and residual.producer.op == "linear":
            x, residual = residual, x
        beta = m.root.optional_input(2)
        epsilon = m.root.attrs["epsilon"]
        return g.layer_norm(x, m["gamma"], beta, residual, epsilon=epsilon)
