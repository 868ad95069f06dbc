"""Turn a product with a constant matrix, and the bias added to it, into `linear`.

matmul(x[..., k], w[k, m]) + b[m]   ->   linear(x, transposed w[m, k], b)

Exporters flatten the tokens before a Gemm and split them after it. A linear layer takes any token
axes, so the reshape moves behind it and meets its inverse there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from sparsec.ir.graph import Graph, Value
from sparsec.ir.ops_int8 import moved_quant
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.identities_shape import ReshapeLast
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
class FuseLinear:
    """fp32 only; the weight of several products is transposed once, its scales with it."""

    name: str = "fuse_linear"

    def run(self, graph: Graph) -> PassResult:
        rules = [MatmulToLinear(), FuseBias(graph), ReshapeLast()]
        return apply_rules(graph, rules)


@dataclass(slots=True)
class MatmulToLinear(RewriteRule):
    """matmul(x, w[k, m])  ->  linear(x, w[m, k])"""

    transposed: dict[Value, Value] = field(default_factory=dict)

    def pattern(self, p: Pattern) -> Term:
        return p.matmul("x", p.constant(lambda w: w.ndim == 2, bind="w"))

    def check(self, m: Match) -> Reject | None:
        if m["x"].type.dtype is not DType.F32:
            return Reject(f"the product is computed in {m['x'].type.dtype}")
        if m["x"].type.rank < 2:
            return Reject(f"{m['x'].type} has no token axis")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        w = self.transposed.get(m["w"])
        if w is None:
            assert m["w"].data is not None
            w = g.constant(np.ascontiguousarray(m["w"].data.T), f"{g.name}.weight")
            quant = moved_quant("transpose", m["w"].type, {"perm": (1, 0)})
            g.graph.set_type(w, replace(w.type, quant=quant))
            self.transposed[m["w"]] = w
        return g.linear(m["x"], w, None, None, activation="none")


@dataclass(frozen=True, slots=True)
class FuseBias(RewriteRule):
    """add(linear(x, w), b)  ->  linear(x, w, b)"""

    graph: Graph

    def pattern(self, p: Pattern) -> Term:
        return p.add(p.linear("x", "w", bind="product"), p.constant(bind="b"))

    def check(self, m: Match) -> Reject | None:
        node = m.node("product")
        if not read_once(m["product"], self.graph.outputs):
            return Reject("the product is read elsewhere")
        if node.attrs["activation"] != "none" or any(v is not None for v in node.inputs[2:]):
            return Reject("something is applied to the product already")
        if not is_row(m["b"], m["w"].type.shape[0]):
            return Reject(f"bias {m['b'].type} is not one value per row of {m['w'].type}")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.linear(m["x"], m["w"], as_row(m["b"], g), None, activation="none")
