"""What is left of a rounding for readers that are to have its operand as it is: what it cuts off.

quantize(x)   ->   clip(x)   where the quantize alone keeps x on one side of zero
quantize(x)   ->   x         else

Quantisers remove a relu or a clip in front of a quantize that cuts off alike: its zero point is
the least number then, or the greatest. A clip with bounds on both sides of zero that was removed
leaves no such trace, and is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from sparsec.ir.graph import Graph, Node, Value

# Lower bounds of results, of all operands.
_LEAST: Mapping[str, float] = {
    "relu": 0.0, "sigmoid": 0.0, "hard_sigmoid": 0.0, "softplus": 0.0, "softmax": 0.0,
    "exp": 0.0, "abs": 0.0, "sqrt": 0.0, "reduce_l2": 0.0, "is_nan": 0.0, "is_inf": 0.0,
    "erf": -1.0, "tanh": -1.0, "sin": -1.0, "cos": -1.0, "gelu": -0.171, "silu": -0.279,
}  # fmt: skip
_RESIDUAL = {"linear": 3, "linear_int8": 4}  # what is added after the activation
_PRODUCTS = frozenset({"matmul", "matmul_integer", "linear", "linear_int8", "conv"})


def without_rounding(graph: Graph, quantize: Node) -> Value:
    """What a quantize reads, and where it stands for a relu or a clip, that cut off."""
    x = quantize.input(0)
    limits = np.iinfo(quantize.attrs["dtype"].numpy)
    scale, zero_point = quantize.attrs["scale"], quantize.attrs["zero_point"]
    removed = (zero_point == limits.min and least(x) < 0 and _has_product(x)) or (
        zero_point == limits.max and _is_product(x)
    )
    if not removed:
        return x
    low, high = ((end - zero_point) * scale for end in (limits.min, limits.max))
    return graph.add("clip", [x], {"min": low, "max": high}, name=f"{x.name}.clip")


def least(x: Value) -> float:
    """A lower bound of all that `x` can be; -inf where none is known."""
    return _least(x, {})


def _least(x: Value, known: dict[Value, float]) -> float:
    if x not in known:
        known[x] = _bound(x, known)
    return known[x]


def _bound(x: Value, known: dict[Value, float]) -> float:
    if x.data is not None:
        return float(x.data.min(initial=np.inf))
    node = x.producer
    if node is None:
        return 0.0 if x.type.dtype.numpy.kind in "bu" else -np.inf
    made = node.op
    if made in _RESIDUAL and node.optional_input(_RESIDUAL[made]) is None:
        made = str(node.attrs["activation"])
    if made in _LEAST:
        return _LEAST[made]
    rule = _RULES.get(node.op)
    if rule is None:
        return -np.inf
    return rule(node, [_least(v, known) for v in node.inputs if v is not None])


def _of_positive(node: Node, operands: list[float]) -> float:
    """0 for products and quotients of what is not negative, and for squares."""
    square = node.op == "mul" and node.input(0) is node.input(1)
    return 0.0 if square or min(operands) >= 0 else -np.inf


def _of_power(node: Node, operands: list[float]) -> float:
    exponent = node.input(1).data
    even = exponent is not None and bool((exponent % 2 == 0).all())
    return 0.0 if even or operands[0] >= 0 else -np.inf


def _of_clip(node: Node, operands: list[float]) -> float:
    low = node.attrs.get("min")
    return max(operands[0], -np.inf if low is None else float(low))


Rule = Callable[[Node, list[float]], float]
_VIEWS = ("reshape", "transpose", "broadcast_to", "slice", "gather")
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (*_VIEWS, "reduce_max", "reduce_min", "reduce_mean"), lambda node, operands: operands[0]
    ),
    "cast": lambda node, operands: min(operands[0], 0.0),  # to bool
    **dict.fromkeys(("concat", "minimum"), lambda node, operands: min(operands)),
    **dict.fromkeys(("mul", "div", "reduce_sum", "reciprocal"), _of_positive),
    "add": lambda node, operands: sum(operands),
    "maximum": lambda node, operands: max(operands),
    "where": lambda node, operands: min(operands[1:]),
    "pow": _of_power,
    "clip": _of_clip,
}


def _has_product(x: Value) -> bool:
    """Whether a product goes into `x`; none does into masks, whose ranges say nothing."""
    return any(node.op in _PRODUCTS for node in _before(x))


def _before(x: Value) -> Iterator[Node]:
    """The nodes that `x` is computed by."""
    waiting, seen = [x], set[Node]()
    while waiting:
        node = waiting.pop().producer
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [v for v in node.inputs if v is not None]


def _is_product(x: Value) -> bool:
    """Whether `x` is a product with a constant, with or without a bias."""
    node = x.producer
    if node is None or node.op not in ("add", *_PRODUCTS):
        return False
    constant = any(v is not None and v.is_constant for v in node.inputs)
    inner = (v.producer for v in node.inputs if v is not None)
    return constant and (
        node.op != "add" or any(n is not None and n.op in _PRODUCTS for n in inner)
    )
