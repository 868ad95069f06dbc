"""Let the matrix product apply what follows it before it stores its result.

gelu(linear(x, w, b))          ->   linear(x, w, b, activation=gelu)
add(linear(x, w, b), r)        ->   linear(x, w, b, residual=r)
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.ir.graph import Graph, Value
from sparsec.passes.base import PassResult
from sparsec.passes.rewrite import (
    Builder,
    Match,
    Pattern,
    Reject,
    RewriteRule,
    Term,
    apply_rules,
    read_once,
)

ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "sigmoid")


@dataclass(frozen=True, slots=True)
class FuseEpilogue:
    """After fuse_layer_norm, which takes the sums that a normalisation reads."""

    name: str = "fuse_epilogue"

    def run(self, graph: Graph) -> PassResult:
        return apply_rules(graph, [FuseActivation(graph), FuseResidual(graph)])


@dataclass(frozen=True, slots=True)
class FuseActivation(RewriteRule):
    """gelu(linear(x, w, b))  ->  linear(x, w, b, activation=gelu)"""

    graph: Graph

    def pattern(self, p: Pattern) -> Term:
        return p.any_op(ACTIVATIONS, p.linear("x", "w", bind="product"))

    def check(self, m: Match) -> Reject | None:
        node = m.node("product")
        if not read_once(m["product"], self.graph.outputs):
            return Reject("the product is read elsewhere")
        if node.attrs["activation"] != "none" or node.optional_input(3) is not None:
            return Reject("the product has an activation or a residual already")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        activation = m.root.op
        if activation == "gelu" and m.root.attrs["approximate"] == "tanh":
            activation = "gelu_tanh"
        return g.linear(*m.node("product").inputs, activation=activation)


@dataclass(frozen=True, slots=True)
class FuseResidual(RewriteRule):
    """add(linear(x, w, b), r)  ->  linear(x, w, b, residual=r)"""

    graph: Graph

    def pattern(self, p: Pattern) -> Term:
        return p.add(p.linear("x", "w", bind="product"), "r")

    def check(self, m: Match) -> Reject | None:
        # r can not depend on the product, which nothing but the sum reads: no cycle arises.
        if not read_once(m["product"], self.graph.outputs):
            return Reject("the product is read elsewhere")
        if m.node("product").optional_input(3) is not None:
            return Reject("the product has a residual already")
        if m["r"].type.shape != m["product"].type.shape:
            return Reject(f"{m['r'].type} does not have the shape of {m['product'].type}")
        if m["r"].is_constant:
            return Reject("the other summand is constant")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        node = m.node("product")
        bias = node.optional_input(2)
        return g.linear(m["x"], m["w"], bias, m["r"], activation=node.attrs["activation"])
