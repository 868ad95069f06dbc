"""Keep the roundings of a QDQ model where int8 products read them, and drop the others.

matmul(view(dequantize(quantize(x))), w)   ->   matmul(dequantize(quantize(view(x))), w)
matmul(q, dequantize(quantize(k)))         ->   the same, for fuse_attention to read its scale
add(dequantize(quantize(x)), y)            ->   add(x, y)

What is left is closer to the model before it was quantised than the file asks for: sums, softmax,
normalisations and look-ups are computed in fp32. Dropping some roundings changes the others: the
answers are those of the file to within its own error, not to the step. Roundings.ALL keeps them.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field, replace

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.ops_int8 import dequantize_array
from sparsec.ir.types import DType, QuantParams
from sparsec.passes.base import PassResult
from sparsec.passes.cut_off import without_rounding
from sparsec.passes.rewrite import VIEWS

SHIFT = 128  # from i8 to u8


class Roundings(enum.Enum):
    """Which roundings of a quantised model are kept: in front of int8 products, all or none."""

    PRODUCTS = "products"
    ALL = "all"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class AbsorbQdq:
    """Before all fusions, whose patterns have no roundings inside.

    Bytes that are kept are u8, which the kernels read. i8 with a zero point z is u8 with z + 128:
    every number that can be stored stays the same.
    """

    keep: Roundings = Roundings.PRODUCTS
    name: str = "absorb_qdq"

    def run(self, graph: Graph) -> PassResult:
        moved = _lift_dequantize(graph)
        pairs = {n.output: n for n in graph.nodes if quantize_of(n) is not None}
        if not pairs:
            return PassResult(moved)
        kept = _Keeping(graph, pairs)
        if self.keep is not Roundings.NONE:
            for node in [n for n in graph.nodes if n.op == "matmul"]:
                kept.visit(node)
        dropped: Counter[str] = Counter()
        for value, node in pairs.items() if self.keep is not Roundings.ALL else ():
            if (value.uses or value in graph.outputs) and value not in kept.operands:
                dropped[_drop(graph, node)] += 1
        graph.sort()
        graph.drop_dead_nodes()
        count = len(kept.rounded) + len(kept.operands)
        if self.keep is Roundings.ALL:
            return PassResult(moved + count, (f"all {len(pairs)} roundings are kept",))
        notes = [f"{count} roundings to int8 are kept in front of products"]
        if dropped:
            where = ", ".join(f"{count} of {op}" for op, count in sorted(dropped.items()))
            notes.append(f"{dropped.total()} roundings are dropped for fp32: {where}")
        return PassResult(moved + len(pairs), tuple(notes))


@dataclass(frozen=True, slots=True)
class DropQdq:
    """After fuse_attention: roundings of operands that no attention took are for nothing."""

    keep: Roundings = Roundings.PRODUCTS
    name: str = "drop_qdq"

    def run(self, graph: Graph) -> PassResult:
        changed = 0
        if self.keep is Roundings.ALL:
            return PassResult(0)
        for node in list(graph.nodes):
            quantize = quantize_of(node)
            readers = [use for use in node.outputs[0].uses if use[0].op != "linear"]
            if quantize is None or not readers:
                continue
            x = without_rounding(graph, quantize)
            for reader, index in readers:
                graph.replace_input(reader, index, x)
            changed += len(readers)
        graph.sort()
        graph.drop_dead_nodes()
        return PassResult(changed)


def quantize_of(node: Node) -> Node | None:
    """The quantize whose result a dequantize reads with the same scale: they round."""
    quantize = node.input(0).producer if node.op == "dequantize" else None
    if quantize is None or quantize.op != "quantize":
        return None
    same = all(quantize.attrs[name] == node.attrs[name] for name in ("scale", "zero_point"))
    return quantize if same else None


@dataclass(slots=True)
class _Keeping:
    """A value that several products read is rounded once."""

    graph: Graph
    pairs: dict[Value, Node]  # by what they give: the dequantize
    rounded: dict[tuple[Value, float, int], Value] = field(default_factory=dict)
    operands: set[Value] = field(default_factory=set)  # of products without a constant

    def visit(self, product: Node) -> None:
        """Rounds the operand of a product with a quantised weight as the nearest pair does."""
        w = product.input(1)
        if w.data is None and product.input(0).data is None:
            found = (self._nearest(v) for v in product.inputs)
            self.operands |= {p for p in found if p is not None and self._is_projection(p)}
        if w.data is None or w.data.ndim != 2 or w.type.quant is None:
            return
        operand = product.input(0)
        x = self._nearest(operand)
        if x is None:
            return
        quantize = _quantize_of(self.pairs[x])
        # The quantize itself cuts off what is outside its range: see cut_off.py.
        source = quantize.input(0) if operand is x else operand
        shift = SHIFT if quantize.attrs["dtype"] is DType.I8 else 0
        scale, zero_point = quantize.attrs["scale"], quantize.attrs["zero_point"] + shift
        self.graph.replace_input(product, 0, self._rounded(source, scale, zero_point))

    def _nearest(self, x: Value | None) -> Value | None:
        """What the last pair before `x` gives, with only views between."""
        while x is not None and x not in self.pairs:
            node = x.producer
            x = node.input(0) if node is not None and node.op in VIEWS else None
        return x

    def _is_projection(self, x: Value) -> bool:
        """Whether `x` is a query, key or value: a product, scaled perhaps; no probabilities."""
        node = x.producer
        while node is not None and (node.op in VIEWS or x in self.pairs or _is_scaling(node)):
            x = _quantize_of(node).input(0) if x in self.pairs else _variable(node)
            node = x.producer
        return node is not None and node.op in ("matmul", "add")

    def _rounded(self, x: Value, scale: float, zero_point: int) -> Value:
        key = (x, scale, zero_point)
        if key not in self.rounded:
            attrs = {"scale": scale, "zero_point": zero_point}
            name = f"{x.name}.quantize"
            stored = self.graph.add("quantize", [x], {**attrs, "dtype": DType.U8}, name=name)
            name = f"{x.name}.dequantize"
            self.rounded[key] = self.graph.add("dequantize", [stored], attrs, name=name)
        return self.rounded[key]


def _is_scaling(node: Node) -> bool:
    return node.op in ("mul", "div") and any(v is not None and v.is_constant for v in node.inputs)


def _variable(node: Node) -> Value:
    """The first operand, or the second where the first is constant."""
    return node.input(1) if node.input(0).is_constant else node.input(0)


def _quantize_of(pair: Node) -> Node:
    quantize = quantize_of(pair)
    assert quantize is not None, pair
    return quantize


def _drop(graph: Graph, pair: Node) -> str:
    """Lets what reads the pair read what it rounds; returns the name of the op that made it."""
    quantize = _quantize_of(pair)
    maker = quantize.input(0).producer
    graph.replace_uses(pair.output, without_rounding(graph, quantize))
    return "inputs" if maker is None else maker.op


def _lift_dequantize(graph: Graph) -> int:
    """dequantize(view(q))  ->  view(dequantize(q)); returns how often."""
    work = [n for n in graph.nodes if n.op == "dequantize"]
    count = 0
    while work:
        node = work.pop()
        view = node.input(0).producer
        if view is None or view.op not in VIEWS:
            continue
        source = view.input(0)
        lifted = _dequantized(graph, source, node)
        moved = graph.add(view.op, [lifted, *view.inputs[1:]], view.attrs, name=node.name)
        graph.replace_uses(node.output, moved)
        graph.erase(node)
        work += [lifted.producer] if lifted.producer is not None else []
        count += 1
    graph.sort()
    graph.drop_dead_nodes()
    return count


def _dequantized(graph: Graph, source: Value, node: Node) -> Value:
    if source.data is None:
        return graph.add("dequantize", [source], node.attrs, name=node.name)
    scale, zero_point = node.attrs["scale"], node.attrs["zero_point"]
    value = graph.add_constant(
        dequantize_array(source.data, scale, zero_point), graph.base_name(source.name)
    )
    quant = QuantParams((scale,), (zero_point,))
    graph.set_type(value, replace(value.type, quant=quant))  # it keeps its numbers as a table
    return value
