"""Turn products over the integers of values with a constant scale into products of fp32 numbers.

q = quantize(x) by the scale sx, moved perhaps by views
mul(cast(add(matmul_integer(q, w, z, zw), b)), s)   ->   add(matmul(dequantize(q), w'), b s)
mul(cast(matmul_integer(q, r, z, y)), sx sr)        ->   matmul(dequantize(q), dequantize(r))

w' is (w - zw) s / sx, which remembers its integers. No rounding comes or goes, so that this holds
whichever are kept. SparseML writes models for DeepSparse in this form.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_spec import Array
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.integer_weights import has_scale_per_column, real_weight
from sparsec.passes.rewrite import (
    VIEWS,
    Builder,
    Match,
    Pattern,
    Reject,
    RewriteRule,
    Term,
    apply_rules,
    is_close,
)


@dataclass(frozen=True, slots=True)
class AbsorbInteger:
    """Before AbsorbQdq, which sees what the same model is in QDQ form."""

    name: str = "absorb_integer"

    def run(self, graph: Graph) -> PassResult:
        if not any(n.op == "matmul_integer" for n in graph.nodes):
            return PassResult(0)
        return apply_rules(graph, [ToDequantized()])


@dataclass(slots=True)
class ToDequantized(RewriteRule):
    """Values are dequantised and weights replaced once, however many products read them."""

    values: dict[Value, Value] = field(default_factory=dict)
    weights: dict[tuple[Value | float | None, ...], Value] = field(default_factory=dict)

    def pattern(self, p: Pattern) -> Term:
        sums = p.matmul_integer("a", "b", bind="sums")
        biased = p.one_of(p.add(sums, p.constant(bind="bias")), sums)
        return p.mul(p.cast(biased), p.constant(bind="scale"))

    def check(self, m: Match) -> Reject | None:
        sums, scale = m.node("sums"), m["scale"]
        if _stored_by(sums, 0) is None:
            return Reject("its first operand is not quantised, or read with another zero point")
        if m["b"].data is None:
            if _stored_by(sums, 1) is None:
                return Reject("its second operand is neither constant nor quantised alike")
            if scale.type.elements != 1:
                return Reject(f"of two values that are not constant the scale is one, not {scale}")
        elif m["b"].type.rank != 2 or not _is_constant(sums.optional_input(3)):
            return Reject("its weight is not a constant matrix")
        elif not has_scale_per_column(scale, m["b"]):
            return Reject(f"{scale} is neither one nor one per column of {m['b'].type}")
        if not (_data(scale) > 0).all():
            return Reject(f"its scale {scale} is not positive throughout")
        if m.root.output.type != sums.output.type.with_dtype(DType.F32):
            return Reject("it is no product in fp32")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        sums, scale = m.node("sums"), _data(m["scale"])
        source = _known(_stored_by(sums, 0))
        x, x_scale = self._value(m["a"], source, g), float(source.attrs["scale"])
        if m["b"].data is not None:
            product = g.matmul(x, self._weight(sums, m["scale"], x_scale, g))
        else:
            other = _known(_stored_by(sums, 1))
            product = g.matmul(x, self._value(m["b"], other, g))
            rest = float(scale.reshape(())) / (x_scale * float(other.attrs["scale"]))
            product = product if is_close(rest, 1.0) else g.mul(product, g.scalar(rest, product))
        bias = m.get("bias")
        if bias is None:
            return product
        real = (_data(bias).astype(np.float64) * scale).astype(np.float32)
        return g.add(product, g.constant(real, g.graph.base_name(bias.name)))

    def _value(self, q: Value, source: Node, g: Builder) -> Value:
        if q not in self.values:
            attrs = {name: source.attrs[name] for name in ("scale", "zero_point")}
            name = f"{q.name}.dequantize"
            self.values[q] = g.graph.add("dequantize", [q], attrs, name=name)
        return self.values[q]

    def _weight(self, sums: Node, scale: Value, x_scale: float, g: Builder) -> Value:
        w, zero = sums.input(1), sums.optional_input(3)
        key = (w, zero, scale, x_scale)
        if key not in self.weights:
            self.weights[key] = real_weight(g, w, _data(scale) / np.float32(x_scale), zero)
        return self.weights[key]


def _stored_by(product: Node, index: int) -> Node | None:
    """The quantize whose numbers an operand of a product is, read with their own zero point."""
    value, zero = product.input(index), product.optional_input(index + 2)
    while value.producer is not None and value.producer.op in VIEWS:
        value = value.producer.input(0)
    node = value.producer
    if node is None or node.op != "quantize" or not _is_constant(zero):
        return None
    read_as = np.zeros(1, np.int64) if zero is None else _data(zero).reshape(-1)
    return node if read_as.tolist() == [node.attrs["zero_point"]] else None


def _is_constant(value: Value | None) -> bool:
    return value is None or value.is_constant


def _known(node: Node | None) -> Node:
    assert node is not None
    return node


def _data(value: Value) -> Array:
    assert value.data is not None, value
    return value.data
