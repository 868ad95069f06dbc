"""What is left of a rounding for readers that are to have its operand as it is: what it cuts off.

quantize(x)   ->   clip(x)   where the quantize alone keeps x on one side of zero
quantize(x)   ->   x         else

Quantisers remove a relu or a clip in front of a quantize that cuts off alike: its zero point is
the least number then, or the greatest. A clip with bounds on both sides of zero that was removed
leaves no such trace, and is lost.
"""

from __future__ import annotations

import numpy as np

from sparsec.ir.graph import Graph, Node, Value
from sparsec.passes.rewrite import VIEWS

_KEEPS_SIGNS = VIEWS | {"quantize", "dequantize"}


def without_rounding(graph: Graph, quantize: Node) -> Value:
    """What a quantize reads, and where it stands for a relu or a clip, that cut off."""
    x = quantize.input(0)
    limits = np.iinfo(quantize.attrs["dtype"].numpy)
    scale, zero_point = quantize.attrs["scale"], quantize.attrs["zero_point"]
    if zero_point not in (limits.min, limits.max) or not _has_both_signs(x):
        return x
    low, high = ((end - zero_point) * scale for end in (limits.min, limits.max))
    return graph.add("clip", [x], {"min": low, "max": high}, name=f"{x.name}.clip")


def _has_both_signs(x: Value) -> bool:
    """Whether `x` is affine in something, or the sum of such a value and another.

    The range of anything else may well end at zero by itself: probabilities, squares and their
    means, masks of which the samples had none, scores.
    """
    waiting, seen = [x], set[Node]()
    while waiting:
        node = waiting.pop().producer
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_affine(node):
            return True
        if node.op in _KEEPS_SIGNS:
            waiting.append(node.input(0))
        elif node.op == "add" or (node.op in ("mul", "div") and _constants(node)):
            waiting += node.inputs[:2]  # type: ignore[arg-type]  # both are there
    return False


def _is_affine(node: Node) -> bool:
    """A product with a constant, or a sum with a constant per channel."""
    constants = _constants(node)
    if node.op == "matmul":
        return bool(constants)
    if node.op == "add":
        return any(v.type.elements != 1 for v in constants)
    if node.op in ("linear", "linear_int8"):
        return bool(node.attrs["activation"] == "none")
    return node.op in ("conv", "layer_norm")


def _constants(node: Node) -> list[Value]:
    return [v for v in node.inputs if v is not None and v.is_constant]
