"""Compute the products of constant weights with tokens in int8.

linear(x, w, b, r)   ->   linear_int8(quantize(x), w in i8, scale per row of w, b, r)
linear(x, w, b, r)   ->   linear_int8(quantize_tokens(x), ...)          dynamic: a scale per token

Ranges come from calibration, or the model itself is quantised: a linear that reads a dequantize,
with a weight that remembers its scales, keeps those of both. Other activations become u8 with one
scale and zero point per tensor, weights i8 with one scale per output channel. Biases, residuals
and what comes out stay fp32: fold_quantize joins what can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from sparsec.errors import InvalidInput
from sparsec.ir.dims import Dim
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_spec import Array
from sparsec.ir.ops_int8 import MAX_DEPTHS
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.cut_off import without_rounding
from sparsec.passes.keep_fp32 import check_patterns, kept
from sparsec.passes.rewrite import replace_node

LOSES = "in int8 it loses more than --max-error leaves"
LEVELS = 255  # steps of u8
WEIGHT_LEVELS = 127  # of each sign: -128 is not used, so -w is there for every w
CENTRE = 128  # the zero point of tokens with either sign
# One-sided values, by what made them. GELU and SiLU are above -0.17 and -0.28: 16 levels below
# zero hold that at a step of 0.01 to 0.02, and finer steps are needed by no token that matters.
ZERO_POINTS = {"relu": 0, "sigmoid": 0, "gelu": 16, "gelu_tanh": 16, "silu": 16}
SMALLEST = 1e-30  # a range or a row of weights below this is all zero: its scale would underflow


@dataclass(frozen=True, slots=True)
class Quantization:
    """What to quantise: `(low, high)` per value, and patterns of node names that stay fp32.

    `fallback` names nodes that stay fp32 because they lose too much. `dynamic` gives products
    without a range a scale per token.

    Values are those of the graph that `graph_pipeline` leaves; `quantized_values` names them.
    """

    ranges: Mapping[str, tuple[float, float]]
    keep_fp32: tuple[str, ...] = ()
    dynamic: bool = False
    fallback: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Quantize:
    """After fuse_epilogue, whose activations and residuals the products keep.

    With `all_roundings` products that stay fp32 read what the model itself rounds as it does.
    """

    ranges: Mapping[str, tuple[float, float]]
    keep_fp32: tuple[str, ...] = ()
    dynamic: bool = False
    fallback: frozenset[str] = frozenset()
    all_roundings: bool = False
    name: str = "quantize"

    def run(self, graph: Graph) -> PassResult:
        """Raises InvalidInput for a range that is none, and for a pattern that fits no node."""
        found, notes = _candidates(graph, self.keep_fp32)
        without = [] if self.dynamic else [n for n in found if not self._has_scale(n)]
        losing = [n for n in found if n.name in self.fallback]
        found = [n for n in found if n not in losing]
        without = [n for n in without if n not in losing]
        notes += [f"{n.name} stays fp32: {LOSES}" for n in losing]
        notes += [
            f"{n.name} stays fp32: no range was given for its input %{n.input(0).name}"
            for n in without
        ]
        rewriting = _Quantizing(graph, self.ranges)
        for node in found:
            if node not in without:
                rewriting.visit(node)
        if not self.all_roundings:
            _drop_roundings(graph)
        graph.sort()
        graph.drop_dead_nodes()
        return PassResult(len(found) - len(without), tuple(notes))

    def _has_scale(self, node: Node) -> bool:
        return is_given(node) or node.input(0).name in self.ranges


def quantized_values(graph: Graph, keep_fp32: tuple[str, ...] = ()) -> list[str]:
    """The names of the values that Quantize wants a range of, in execution order."""
    found, _ = _candidates(graph, keep_fp32)
    return list(dict.fromkeys(n.input(0).name for n in found if not is_given(n)))


def int8_candidates(graph: Graph, keep_fp32: tuple[str, ...] = ()) -> list[Node]:
    """The products that int8 kernels compute, given the ranges of their operands."""
    return _candidates(graph, keep_fp32)[0]


def is_quantized(graph: Graph) -> bool:
    """Whether the model itself says how some product is computed in int8."""
    return any(n.op == "linear" and is_given(n) for n in graph.nodes)


def _drop_roundings(graph: Graph) -> None:
    """Of what only products read that stay fp32."""
    found: dict[Node, Value] = {}
    for node in list(graph.nodes):
        rounding = node_rounding(node)
        if rounding is None:
            continue
        if rounding not in found:
            is_static = rounding.op == "quantize"
            x = without_rounding(graph, rounding) if is_static else rounding.input(0)
            found[rounding] = x
        graph.replace_input(node, 0, found[rounding])


def is_given(node: Node) -> bool:
    """Whether the model says how a linear is quantised: its input and its weight."""
    return node.input(1).type.quant is not None and node_rounding(node) is not None


def node_rounding(node: Node) -> Node | None:
    """The node whose operand a linear reads rounded to bytes: quantize or round_tokens."""
    if node.op != "linear":
        return None
    source = node.input(0).producer
    return source if source is not None and source.op == "round_tokens" else rounding_of(node)


def rounding_of(node: Node) -> Node | None:
    """The quantize to u8 whose numbers a linear reads."""
    dequantize = node.input(0).producer
    if dequantize is None or dequantize.op != "dequantize":
        return None
    stored = dequantize.input(0)
    fits = stored.producer is not None and stored.producer.op == "quantize"
    return stored.producer if fits and stored.type.dtype is DType.U8 else None


def token_zero_point(x: Value) -> int:
    """Where zero lies among the 256 levels of a token: what made `x` tells which sign it has."""
    node = x.producer
    while node is not None and node.op == "reshape":
        node = node.input(0).producer
    if node is None:
        return CENTRE
    if node.op == "linear":  # a gated op has an activation too, but it is that of the gate
        summed = node.optional_input(3) is not None
        return CENTRE if summed else ZERO_POINTS.get(node.attrs["activation"], CENTRE)
    return ZERO_POINTS.get(node.op, CENTRE)


def affine_u8(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point that store `low..high`, widened to hold 0, in 0..255."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < SMALLEST:
        return 1.0, 0
    scale = float(np.float32((high - low) / LEVELS))
    return scale, min(max(round(-low / scale), 0), LEVELS)


def quantize_weight(w: Array) -> tuple[Array, Array]:
    """`w[m, k]` as i8 with a scale per row; zeros stay zeros."""
    most = np.abs(w).max(axis=1, initial=0.0)
    scale = np.where(most < SMALLEST, 1.0, most / WEIGHT_LEVELS).astype(np.float32)
    steps = np.rint(w.astype(np.float64) / scale[:, None])
    return np.clip(steps, -WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8), scale


def stored_weight(w: Value) -> tuple[Array, Array] | None:
    """The numbers and the scale per row that make up a quantised `w[m, k]`; None for a scale per
    column.

    The numbers are i8, or i16 where the zero point of the file's bytes is so far from their middle
    that a difference from it is none. They are found again exactly: w was computed as
    number * scale with one rounding to fp32, which is off by less than half a number.
    """
    quant = w.type.quant
    assert quant is not None, w
    assert w.data is not None, w
    if quant.axis == 1:
        return None
    scale = np.broadcast_to(np.asarray(quant.scale, np.float32), w.data.shape[:1])
    numbers = np.rint(w.data / scale[:, None])
    fits = numbers.min(initial=0) >= -128 and numbers.max(initial=0) <= 127
    return numbers.astype(np.int8 if fits else np.int16), np.ascontiguousarray(scale)


def _candidates(graph: Graph, keep_fp32: tuple[str, ...]) -> tuple[list[Node], list[str]]:
    """The products that int8 kernels compute, and why the others are none."""
    tokens = {n.input(0).type.tokens for n in graph.nodes if n.op == "attention"}
    products = [n for n in graph.nodes if n.op == "linear"]
    check_patterns(graph.nodes, keep_fp32)
    found: list[Node] = []
    notes: list[str] = []
    for node in products:
        reason = kept(node, keep_fp32) or _refusal(node, tokens)
        if reason is None:
            found.append(node)
        else:
            notes.append(f"{node.name} stays fp32: {reason}")
    return found, notes


def _refusal(node: Node, tokens: set[Dim]) -> str | None:
    x, w = node.input(0), node.input(1)
    if w.data is None or x.is_constant:
        return "its weight is not constant" if w.data is None else "its input is constant"
    if x.type.dtype is not DType.F32:
        return f"its input is {x.type}"
    given = is_given(node)
    if (x.type.tokens not in tokens) if tokens else x.type.rank < 3 and not given:
        return f"its input {x.type} is not over all tokens"
    if not np.isfinite(w.data).all():
        return "its weight is not finite"
    own = None if w.type.quant is None else stored_weight(w)
    if given and own is None:
        return "its weight has a scale per input channel"
    dtype = DType.I8 if own is None else DType.of(own[0].dtype)
    if x.type.channels > MAX_DEPTHS[dtype]:
        return f"{x.type.channels} input channels could overflow an int32 sum"
    return None


@dataclass(slots=True)
class _Quantizing:
    """Values and weights are quantised once, however many products read them."""

    graph: Graph
    ranges: Mapping[str, tuple[float, float]]
    values: dict[Value, tuple[Value, float, int]] = field(default_factory=dict)
    weights: dict[Value, tuple[Value, Value]] = field(default_factory=dict)
    tokens: dict[Value, Node] = field(default_factory=dict)

    def visit(self, node: Node) -> None:
        x = node.input(0)
        given = node_rounding(node) if is_given(node) else None
        token_scale: Value | None = None
        if given is None and x.name in self.ranges:
            stored, scale, zero_point = self._value(x)
        elif given is None or given.op == "round_tokens":
            tokens = self._tokens(x if given is None else given.input(0))
            stored, token_scale = tokens.outputs
            scale, zero_point = 1.0, tokens.attrs["zero_point"]
        else:
            stored, scale, zero_point = _stored(given)
        weight, weight_scale = self._weight(node.input(1))
        attrs = {
            "activation": node.attrs["activation"],
            "x_scale": scale,
            "x_zero_point": zero_point,
            "out_scale": None,
            "out_zero_point": 0,
        }
        bias, residual = node.optional_input(2), node.optional_input(3)
        operands = [stored, weight, weight_scale, bias, residual]
        operands += [] if token_scale is None else [token_scale]
        replace_node(self.graph, node, "linear_int8", operands, attrs)

    def _tokens(self, x: Value) -> Node:
        if x not in self.tokens:
            attrs = {"zero_point": token_zero_point(x)}
            name = f"{x.name}.quantize"
            self.tokens[x] = self.graph.add_node("quantize_tokens", [x], attrs, name=name)
        return self.tokens[x]

    def _value(self, x: Value) -> tuple[Value, float, int]:
        if x not in self.values:
            self.values[x] = self._quantize(x)
        return self.values[x]

    def _quantize(self, x: Value) -> tuple[Value, float, int]:
        scale, zero_point = affine_u8(*_checked(x.name, self.ranges[x.name]))
        attrs = {"scale": scale, "zero_point": zero_point, "dtype": DType.U8}
        stored = self.graph.add("quantize", [x], attrs, name=f"{x.name}.quantize")
        return stored, scale, zero_point

    def _weight(self, w: Value) -> tuple[Value, Value]:
        if w not in self.weights:
            assert w.data is not None
            data, scale = _numbers(w, w.data)
            stored = self.graph.add_constant(data, f"{w.name}.{DType.of(data.dtype)}")
            self.weights[w] = stored, self.graph.add_constant(scale, f"{w.name}.scale")
        return self.weights[w]


def _stored(quantize: Node) -> tuple[Value, float, int]:
    return quantize.output, quantize.attrs["scale"], quantize.attrs["zero_point"]


def _numbers(w: Value, data: Array) -> tuple[Array, Array]:
    """A weight's own numbers where it has some, else new ones."""
    own = None if w.type.quant is None else stored_weight(w)
    return quantize_weight(data) if own is None else own


def _checked(name: str, limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    # 1e36: the scale, and what it multiplies, stay finite in fp32.
    if not (math.isfinite(low) and math.isfinite(high) and low <= high and high - low < 1e36):
        raise InvalidInput(f"the range of %{name} must be finite, low first, got {low}..{high}")
    return low, high
