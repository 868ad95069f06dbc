"""Keep the roundings of a QDQ model where int8 products read them, and drop the others.

matmul(view(dequantize(quantize(x))), w)   ->   matmul(dequantize(quantize(view(x))), w)
add(dequantize(quantize(x)), y)            ->   add(x, y)

What is left is closer to the model before it was quantised than the file asks for: sums, softmax,
normalisations and look-ups are computed in fp32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.ops_int8 import dequantize_array
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult

# They move elements of their first operand and round with it or without it alike.
VIEWS = frozenset({"reshape", "transpose", "broadcast_to", "slice", "gather"})
SHIFT = 128  # from i8 to u8


@dataclass(frozen=True, slots=True)
class AbsorbQdq:
    """Before all fusions, whose patterns have no roundings inside.

    Bytes that are kept are u8, which the kernels read. i8 with a zero point z is u8 with z + 128:
    every number that can be stored stays the same. Without `keep` the model is computed in fp32.
    """

    keep: bool = True
    name: str = "absorb_qdq"

    def run(self, graph: Graph) -> PassResult:
        moved = _lift_dequantize(graph)
        pairs = {n.output: n for n in graph.nodes if _is_pair(n)}
        if not pairs:
            return PassResult(moved)
        kept = _Keeping(graph, pairs)
        if self.keep:
            for node in [n for n in graph.nodes if n.op == "matmul"]:
                kept.visit(node)
        dropped: Counter[str] = Counter()
        for value, node in pairs.items():
            if value.uses or value in graph.outputs:
                dropped[_drop(graph, node)] += 1
        graph.sort()
        graph.drop_dead_nodes()
        notes = [f"{len(kept.rounded)} roundings to int8 are kept in front of products"]
        if dropped:
            where = ", ".join(f"{count} of {op}" for op, count in sorted(dropped.items()))
            notes.append(f"{dropped.total()} roundings are dropped for fp32: {where}")
        return PassResult(moved + len(pairs), tuple(notes))


@dataclass(slots=True)
class _Keeping:
    """A value that several products read is rounded once."""

    graph: Graph
    pairs: dict[Value, Node]  # by what they give: the dequantize
    rounded: dict[tuple[Value, float, int], Value] = field(default_factory=dict)

    def visit(self, product: Node) -> None:
        """Rounds the operand of a product with a quantised weight as the nearest pair does."""
        w = product.input(1)
        if w.data is None or w.data.ndim != 2 or w.type.quant is None:
            return
        x = operand = product.input(0)
        while x not in self.pairs and x.producer is not None and x.producer.op in VIEWS:
            x = x.producer.input(0)
        pair = self.pairs.get(x)
        if pair is None:
            return
        quantize = _quantize_of(pair)
        # The quantize itself cuts off what is outside its range: see _drop.
        source = quantize.input(0) if operand is x else operand
        shift = SHIFT if quantize.attrs["dtype"] is DType.I8 else 0
        scale, zero_point = quantize.attrs["scale"], quantize.attrs["zero_point"] + shift
        self.graph.replace_input(product, 0, self._rounded(source, scale, zero_point))

    def _rounded(self, x: Value, scale: float, zero_point: int) -> Value:
        key = (x, scale, zero_point)
        if key not in self.rounded:
            attrs = {"scale": scale, "zero_point": zero_point}
            name = f"{x.name}.quantize"
            stored = self.graph.add("quantize", [x], {**attrs, "dtype": DType.U8}, name=name)
            name = f"{x.name}.dequantize"
            self.rounded[key] = self.graph.add("dequantize", [stored], attrs, name=name)
        return self.rounded[key]


def _is_pair(node: Node) -> bool:
    if node.op != "dequantize":
        return False
    quantize = node.input(0).producer
    if quantize is None or quantize.op != "quantize":
        return False
    return all(quantize.attrs[name] == node.attrs[name] for name in ("scale", "zero_point"))


def _quantize_of(pair: Node) -> Node:
    quantize = pair.input(0).producer
    assert quantize is not None, pair
    return quantize


def _drop(graph: Graph, pair: Node) -> str:
    """Lets what reads the pair read what it rounds; returns the name of the op that made it.

    Quantisers remove a relu or clip where the quantize cuts off alike: its zero point is the least
    or the greatest number then. Behind products that cutting off stays.
    """
    quantize = _quantize_of(pair)
    x = quantize.input(0)
    limits = np.iinfo(quantize.attrs["dtype"].numpy)
    scale, zero_point = quantize.attrs["scale"], quantize.attrs["zero_point"]
    op = "inputs" if x.producer is None else x.producer.op
    if zero_point in (limits.min, limits.max) and _is_product(x):
        attrs = {
            "min": (limits.min - zero_point) * scale,
            "max": (limits.max - zero_point) * scale,
        }
        x = graph.add("clip", [x], attrs, name=f"{x.name}.clip")
    graph.replace_uses(pair.output, x)
    return op


def _is_product(x: Value) -> bool:
    """Whether `x` is a product with a constant, with or without a bias."""
    node = x.producer
    if node is None or node.op not in ("add", "matmul"):
        return False
    constant = any(v is not None and v.is_constant for v in node.inputs)
    inner = (v.producer for v in node.inputs if v is not None)
    return constant and (
        node.op == "matmul" or any(n is not None and n.op == "matmul" for n in inner)
    )


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
    data = dequantize_array(source.data, node.attrs["scale"], node.attrs["zero_point"])
    return graph.add_constant(data, graph.base_name(source.name))
