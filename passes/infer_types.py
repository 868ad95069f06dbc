"""Infer the type of every Value again, with some symbols fixed to numbers.

%x : f32[batch, seq, 64]   ->   f32[1, 128, 64]   with fixed_dims {batch: 1, seq: 128}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import Dim, Expr, substitute, symbols
from sparsec.ir.graph import Graph, Limit, Node, infer_node
from sparsec.passes.base import PassResult


@dataclass(frozen=True, slots=True)
class InferTypes:
    """`fixed_dims` gives sizes to symbols; the others stay dynamic."""

    fixed_dims: Mapping[str, int] = field(default_factory=dict)
    name: str = "infer_types"

    def run(self, graph: Graph) -> PassResult:
        """Raises InvalidGraph when a fixed size is wrong or the operands of a node do not fit."""
        self._check(graph)
        changed = 0
        for value in graph.inputs:
            shape = tuple(substitute(d, self.fixed_dims) for d in value.type.shape)
            changed += shape != value.type.shape
            graph.set_type(value, value.type.with_shape(shape))
        graph.replace_limits([self._fix_limit(graph, limit) for limit in graph.limits])
        for node in graph.nodes:
            changed += self._infer(graph, node)
        return PassResult(changed)

    def _fix_limit(self, graph: Graph, limit: Limit) -> Limit:
        dim = substitute(limit.dim, self.fixed_dims)
        if isinstance(dim, int) and dim > limit.most:
            raise InvalidGraph(f"{graph.name}: the fixed sizes break {limit}; it would be {dim}")
        return replace(limit, dim=dim)

    def _check(self, graph: Graph) -> None:
        known = {s for v in graph.inputs for d in v.type.shape for s in symbols(d)}
        for symbol, size in self.fixed_dims.items():
            if symbol not in known:
                raise InvalidGraph(
                    f"{graph.name}: no input has a dim {symbol!r} to fix; it has {sorted(known)}"
                )
            if size < 1:
                raise InvalidGraph(f"{graph.name}: {symbol} is fixed to {size}; it must be >= 1")

    def _infer(self, graph: Graph, node: Node) -> int:
        attrs = {k: _substitute(v, self.fixed_dims) for k, v in node.attrs.items()}
        if attrs != dict(node.attrs):
            graph.set_attrs(node, **attrs)
        changed = 0
        for value, type in zip(node.outputs, infer_node(node), strict=True):
            if (type.dtype, type.shape) != (value.type.dtype, value.type.shape):
                changed += 1
                graph.set_type(value, value.type.with_shape(type.shape).with_dtype(type.dtype))
        return changed


def _substitute(item: Any, env: Mapping[str, Dim]) -> Any:
    match item:
        case Expr():
            return substitute(item, env)
        case tuple():
            return tuple(_substitute(i, env) for i in item)
    return item
