"""Compute the queries, keys and values of an attention with one product.

attention(linear(x, wq), linear(x, wk), linear(x, wv))
    ->   y = linear(x, [wq; wk; wv]);  attention(y, y, y) at channel offsets 0, m, 2m
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.types import QuantParams
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


@dataclass(frozen=True, slots=True)
class MergeQkv:
    """Layers that share their weights share the stacked weight; scales per row are stacked too."""

    name: str = "merge_qkv"

    def run(self, graph: Graph) -> PassResult:
        return apply_rules(graph, [SliceToOffset(), StackProjections(graph)])


class SliceToOffset(RewriteRule):
    """attention(slice(y, channels a..), k, v)  ->  attention(y, k, v) at channel offset a"""

    def pattern(self, p: Pattern) -> Term:
        cut = p.slice("y", bind="slice")
        return p.one_of(
            p.attention(cut, "k", "v"), p.attention("q", cut, "v"), p.attention("q", "k", cut)
        )

    def check(self, m: Match) -> Reject | None:
        attrs = m.node("slice").attrs
        known = all(isinstance(start, int) for start in attrs["starts"])
        if attrs["axes"] != (2,) or attrs["steps"] != (1,) or not known:
            return Reject("the slice is not of consecutive channels")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        attrs, operands = dict(m.root.attrs), list(m.root.inputs)
        start = m.node("slice").attrs["starts"][0]
        for index, name in enumerate("qkv"):
            if operands[index] is m["slice"]:
                operands[index] = m["y"]
                attrs[f"{name}_offset"] += start
        return g.attention(*operands, **attrs)


@dataclass(slots=True)
class StackProjections(RewriteRule):
    """attention of three products of x  ->  attention of one"""

    graph: Graph
    stacked: dict[tuple[Value | None, ...], Value] = field(default_factory=dict)

    def pattern(self, p: Pattern) -> Term:
        products = [p.linear("x", f"w{n}", bind=n) for n in "qkv"]
        # Exporters of TensorFlow flatten batch and seq around each product.
        views = [p.reshape(product, bind=f"{product.bind}_view") for product in products]
        return p.one_of(p.attention(*products), p.attention(*views))

    def check(self, m: Match) -> Reject | None:
        if any(m.root.attrs[f"{n}_offset"] for n in "qkv"):
            return Reject("the projections are slices of one value already")
        width = m.root.attrs["heads"] * m.root.attrs["head_size"]
        for name in "qkv":
            node = m.node(name)
            read = [v for v in (m[name], m.get(f"{name}_view")) if v is not None]
            if not all(read_once(v, self.graph.outputs) for v in read):
                return Reject(f"{name} is read elsewhere")
            if node.attrs["activation"] != "none" or node.optional_input(3) is not None:
                return Reject(f"{name} is more than a product and a bias")
            if m[f"w{name}"].type.shape[0] != width:
                return Reject(f"{name} has other channels than those of the heads")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        nodes = [m.node(n) for n in "qkv"]
        attrs = dict(m.root.attrs)
        width = attrs["heads"] * attrs["head_size"]
        base = g.graph.base_name(nodes[0].name)
        w = self._stack([n.input(1) for n in nodes], base, g)
        operands = [m["x"], w, self._bias(nodes, base, g), None]
        y = g.graph.add("linear", operands, {"activation": "none"}, name=f"{base}.qkv")
        shape = (*m.root.output.type.shape[:2], 3 * width)
        y = y if y.type.shape == shape else g.reshape(y, shape=shape)
        attrs |= {"q_offset": 0, "k_offset": width, "v_offset": 2 * width}
        return g.attention(y, y, y, m.root.optional_input(3), **attrs)

    def _bias(self, nodes: list[Node], name: str, g: Builder) -> Value | None:
        biases = [n.optional_input(2) for n in nodes]
        if all(b is None for b in biases):
            return None
        rows = nodes[0].input(1).type.shape[0]
        assert isinstance(rows, int)
        zeros = np.zeros(rows, np.float32)
        key = tuple(biases)
        if key not in self.stacked:
            data = np.concatenate([zeros if b is None else _data(b) for b in biases])
            self.stacked[key] = g.constant(data, f"{name}.qkv_bias")
        return self.stacked[key]

    def _stack(self, weights: list[Value], name: str, g: Builder) -> Value:
        key = tuple(weights)
        if key not in self.stacked:
            data = np.concatenate([_data(w) for w in weights])
            self.stacked[key] = w = g.constant(data, f"{name}.qkv_weight")
            if all(_is_per_row(v) for v in weights):
                g.graph.set_type(w, replace(w.type, quant=_stacked_quant(weights)))
        return self.stacked[key]


def _is_per_row(w: Value) -> bool:
    """Whether a weight has a scale per row, or one for all."""
    return w.type.quant is not None and w.type.quant.axis in (None, 0)


def _stacked_quant(weights: list[Value]) -> QuantParams:
    scale: list[float] = []
    zero_point: list[int] = []
    for w in weights:
        quant, rows = w.type.quant, w.type.shape[0]
        assert quant is not None, w
        assert isinstance(rows, int), w
        repeat = rows if quant.axis is None else 1
        scale += quant.scale * repeat
        zero_point += quant.zero_point * repeat
    return QuantParams(tuple(scale), tuple(zero_point), 0)


def _data(value: Value) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    assert value.data is not None, value
    return value.data
