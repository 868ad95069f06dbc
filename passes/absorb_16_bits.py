"""Drop roundings to 16 bits, which no product reads, or spell them out.

dequantize(quantize(x to i16))   ->   x
quantize(x to i16)               ->   cast(clip(round(x / scale)) + zero_point)

Products of what such a file rounds stay fp32, or become int8 as those of an fp32 model do. Kernels
know bytes only; hence what has to stay, at inputs and outputs or with Roundings.ALL, is made of
element-wise ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.types import DType
from sparsec.passes.absorb_qdq import Roundings, quantize_of
from sparsec.passes.base import PassResult
from sparsec.passes.cut_off import without_rounding
from sparsec.passes.rewrite import Builder

OF_16_BITS = (DType.I16, DType.U16)


@dataclass(frozen=True, slots=True)
class Absorb16Bits:
    """Before absorb_qdq, which then sees bytes alone."""

    keep: Roundings = Roundings.PRODUCTS
    name: str = "absorb_16_bits"

    def run(self, graph: Graph) -> PassResult:
        dropped = 0 if self.keep is Roundings.ALL else _drop_pairs(graph)
        graph.drop_dead_nodes()
        left = [n for n in graph.nodes if n.op in _SPELLED and _stored(n) in OF_16_BITS]
        for node in left:
            graph.replace_uses(node.output, _SPELLED[node.op](Builder(graph, node.name), node))
            graph.erase(node)
        graph.sort()
        graph.drop_dead_nodes()
        notes = [f"{dropped} roundings to 16 bits are dropped for fp32"] if dropped else []
        notes += [f"{len(left)} steps to or from 16 bits are spelled out"] if left else []
        return PassResult(dropped + len(left), tuple(notes))


def _stored(node: Node) -> DType:
    return node.output.type.dtype if node.op == "quantize" else node.input(0).type.dtype


def _drop_pairs(graph: Graph) -> int:
    pairs = [n for n in graph.nodes if quantize_of(n) is not None and _stored(n) in OF_16_BITS]
    for pair in pairs:
        quantize = quantize_of(pair)
        assert quantize is not None, pair
        graph.replace_uses(pair.output, without_rounding(graph, quantize))
    return len(pairs)


def _quantized(g: Builder, node: Node) -> Value:
    x, dtype, zero_point = node.input(0), node.attrs["dtype"], node.attrs["zero_point"]
    limits = np.iinfo(dtype.numpy)
    inverse = np.float32(1) / np.float32(node.attrs["scale"])
    steps = g.round(g.mul(x, g.constant(np.asarray(inverse))))
    # Clipped before the zero point is added, where every limit is exact in fp32.
    low, high = float(limits.min - zero_point), float(limits.max - zero_point)
    clipped = g.cast(g.clip(steps, min=low, max=high), to=DType.I32)
    return g.cast(g.add(clipped, g.constant(np.asarray(zero_point, np.int32))), to=dtype)


def _dequantized(g: Builder, node: Node) -> Value:
    zero_point = np.asarray(node.attrs["zero_point"], np.int32)
    centred = g.sub(g.cast(node.input(0), to=DType.I32), g.constant(zero_point))
    scale = np.asarray(node.attrs["scale"], np.float32)
    return g.mul(g.cast(centred, to=DType.F32), g.constant(scale))


_SPELLED: dict[str, Callable[[Builder, Node], Value]] = {
    "quantize": _quantized,
    "dequantize": _dequantized,
}
