"""Attention of the domain com.microsoft: of its own product, or of queries, keys and values.

Attention(x, w, b, mask)          ->   attention of slices of matmul(x, w) + b
MultiHeadAttention(q, k, v, b)    ->   attention(q + b0, k + b1, v + b2)

What the op attention does not take (other numbers of keys than of queries, wider values) becomes
matmul, softmax, matmul. Meanings: docs/ContribOperators.md of ONNX Runtime, and what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Builder, Operand
from sparsec.frontend.call import Call, Converter
from sparsec.frontend.onnx_ops_integer import dequantized, integer_product
from sparsec.ir.dims import Dim
from sparsec.ir.types import DType

MASKED = -10000.0  # what ONNX Runtime adds to masked scores unless the node says otherwise
LATER = float(np.finfo(np.float32).min)  # what it adds to those of later tokens


@dataclass(frozen=True, slots=True)
class Part:
    """Queries, keys or values: `width` channels of `value` [batch, tokens, channels]."""

    value: Operand
    offset: int
    width: int

    @property
    def tokens(self) -> Dim:
        return self.value.type.shape[1]

    def plain(self, g: Builder) -> Operand:
        return g.slice(self.value, 2, self.offset, self.offset + self.width)


Parts = tuple[Part, Part, Part]


def attention(call: Call) -> Operand:
    """x, weights [k, q + k + v], bias?, mask?, past?, attention bias?, past length?"""
    _refuse_state(call, past=(4, 6))
    y = call.g.add("matmul", [call.input(0), call.input(1)])
    return _of_product(call, y, call.optional(2), call.optional(3), call.optional(5))


def q_attention(call: Call) -> Operand:
    """x, weights, bias, scale of x, of the weights, mask?, zero point of x?, of the weights?"""
    _refuse_state(call, past=(8,))
    g, scale, zero = call.g, call.g.value(call.input(3)), call.optional(6)
    if scale.is_constant and (zero is None or g.value(zero).is_constant):
        x = dequantized(call, 0, scale=3, zero_point=6)
        y = g.add("matmul", [x, dequantized(call, 1, 1, scale=4, zero_point=7)])
        return _of_product(call, y, call.optional(2), call.optional(5), None)
    operands = [call.input(0), call.input(1), zero, call.optional(7)]
    scales = [scale, g.value(call.input(4))]
    y = integer_product(call, operands, scales, len(call.inputs))
    return _of_product(call, y, call.optional(2), call.optional(5), None)


def multi_head_attention(call: Call) -> Operand:
    """q, k?, v?, bias of all three?, mask?, attention bias?, past and its like"""
    _refuse_state(call, past=(6, 7, 8, 9))
    g, parts = call.g, _with_bias(call, _operands(call))
    for part in parts[1:]:
        g.equal(parts[0].value.type.shape[0], part.value.type.shape[0])
    g.equal(parts[1].tokens, parts[2].tokens)
    return _attend(call, parts, call.optional(4), call.optional(5))


def _refuse_state(call: Call, past: tuple[int, ...]) -> None:
    """What only decoders have: keys and values of earlier tokens, read or given."""
    flags = [n for n in ("do_rotary", "past_present_share_buffer") if call.attr(n, 0)]
    states = [f"past (operand {i})" for i in past if call.optional(i) is not None]
    results = [f"present (result {i})" for i, n in enumerate(call.outputs) if i and n]
    found = [*flags, *states, *results]
    if found:
        raise UnsupportedOp(
            f"{call.op_type} with {', '.join(found)} is not supported; export an encoder, "
            "without a cache of keys and values"
        )


def _of_product(
    call: Call, y: Operand, bias: Operand | None, mask: Operand | None, added: Operand | None
) -> Operand:
    """`y` [batch, seq, q + k + v] holds queries, keys and values beside each other."""
    y = y if bias is None else call.g.add("add", [y, bias])
    width, heads = y.type.shape[-1], call.required("num_heads")
    if y.type.rank != 3 or not isinstance(width, int):
        raise UnsupportedOp(f"queries, keys and values are {y.type}, not [batch, seq, channels]")
    widths = tuple(call.attr("qkv_hidden_sizes", ())) or (width // 3,) * 3
    if len(widths) != 3 or sum(widths) != width or any(w % heads or w < 1 for w in widths):
        raise InvalidModel(
            f"{width} channels are not queries, keys and values ({list(widths)}) of {heads} heads"
        )
    q, k, v = widths
    return _attend(call, (Part(y, 0, q), Part(y, q, k), Part(y, q + k, v)), mask, added)


def _operands(call: Call) -> Parts:
    """Queries, keys and values apart, or packed per head: [batch, seq, heads, 2 or 3, size]."""
    q, k, v = call.input(0), call.optional(1), call.optional(2)
    if k is None and v is None and q.type.rank == 5:
        first, second, third = _unpacked(call, q, 3)
        return first, second, third
    if k is not None and v is None and k.type.rank == 5 and call.optional(3) is None:
        return _part(call, q), *_unpacked(call, k, 2)  # type: ignore[return-value]
    if k is None or v is None:
        raise UnsupportedOp(
            "MultiHeadAttention wants queries, keys and values, or [batch, seq, heads, 3, size] "
            "alone, or queries and [batch, seq, heads, 2, size] without a bias"
        )
    return _part(call, q), _part(call, k), _part(call, v)


def _unpacked(call: Call, x: Operand, count: int) -> tuple[Part, ...]:
    g, heads = call.g, int(call.required("num_heads"))
    batch, seq, own, packed, size = x.type.shape
    if (own, packed) != (heads, count) or not isinstance(size, int):
        raise InvalidModel(f"packed operands {x.type} are not [batch, seq, heads, {count}, size]")
    width = heads * size
    return tuple(
        Part(g.reshape(g.slice(x, 3, i, i + 1), (batch, seq, width)), 0, width)
        for i in range(count)
    )


def _part(call: Call, x: Operand) -> Part:
    """[batch, seq, channels], or what cross-attention keeps: [batch, heads, seq, size]"""
    g, heads = call.g, call.required("num_heads")
    if x.type.rank == 4 and call.optional(3) is None:
        batch, own, seq, size = x.type.shape
        if own != heads:
            raise InvalidModel(f"{x.type} are not [batch, {heads} heads, seq, size]")
        x = g.reshape(g.transpose(x, (0, 2, 1, 3)), (batch, seq, own * size))
    width = x.type.shape[-1]
    if x.type.rank != 3 or not isinstance(width, int) or width % heads:
        raise UnsupportedOp(f"{x.type} is not [batch, seq, channels] for {heads} heads")
    return Part(x, 0, width)


def _with_bias(call: Call, parts: Parts) -> Parts:
    bias = call.optional(3)
    if bias is None:
        return parts
    g, widths = call.g, [p.width for p in parts]
    if bias.type.shape != (sum(widths),):
        raise InvalidModel(f"the bias {bias.type} is not one value per channel of {widths}")
    starts = (0, widths[0], widths[0] + widths[1])
    q, k, v = (
        replace(p, value=g.add("add", [p.value, g.slice(bias, 0, start, start + p.width)]))
        for p, start in zip(parts, starts, strict=True)
    )
    return q, k, v


def _attend(call: Call, parts: Parts, mask: Operand | None, bias: Operand | None) -> Operand:
    g, (q, k, v), heads = call.g, parts, call.required("num_heads")
    if q.width != k.width:
        raise InvalidModel(f"queries have {q.width} channels, keys {k.width}")
    size = q.width // heads
    scale = call.attr("scale", 0.0) or float(np.float32(1 / np.sqrt(size)))
    added = _added(call, mask, bias, (q.value.type.shape[0], q.tokens, k.tokens))
    if q.tokens != k.tokens or q.width != v.width:
        return _spelled_out(g, parts, heads, scale, added)
    offsets = {f"{n}_offset": part.offset for n, part in zip("qkv", parts, strict=True)}
    attrs = {"heads": heads, "head_size": size, "scale": scale, **offsets}
    return g.add("attention", [q.value, k.value, v.value, added], **attrs)


def _spelled_out(
    g: Builder, parts: Parts, heads: int, scale: float, added: Operand | None
) -> Operand:
    def split(part: Part, perm: tuple[int, ...]) -> Operand:
        x = part.plain(g)
        shape = (*x.type.shape[:2], heads, part.width // heads)
        return g.transpose(g.reshape(x, shape), perm)

    q, k, v = parts
    scores = g.add("matmul", [split(q, (0, 2, 1, 3)), split(k, (0, 2, 3, 1))])
    scores = g.add("mul", [scores, g.scalar(scale, scores.type.dtype)])
    scores = scores if added is None else g.add("add", [scores, added])
    shares = g.add("softmax", [scores], axis=3)
    context = g.transpose(g.add("matmul", [shares, split(v, (0, 2, 1, 3))]), (0, 2, 1, 3))
    return g.reshape(context, (*context.type.shape[:2], v.width))


def _added(
    call: Call, mask: Operand | None, bias: Operand | None, sizes: tuple[Dim, Dim, Dim]
) -> Operand | None:
    """What is added to the scores, [batch or 1, heads or 1, queries or 1, keys]."""
    g, (_, queries, keys) = call.g, sizes
    total = None if mask is None else _of_mask(call, mask, sizes)
    if call.attr("unidirectional", 0):
        if queries != keys:
            raise UnsupportedOp(f"unidirectional attention of {queries} queries to {keys} keys")
        total = _causal(g, queries, total)
    if bias is None:
        return total
    bias = _fitted_bias(call, bias, sizes)
    return bias if total is None else g.add("add", [bias, total])


def _fitted_bias(call: Call, bias: Operand, sizes: tuple[Dim, Dim, Dim]) -> Operand:
    g, (batch, queries, keys) = call.g, sizes
    shape = bias.type.shape
    if len(shape) != 4 or shape[1] not in (1, call.required("num_heads")):
        raise UnsupportedOp(f"an attention bias {bias.type}; [batch, heads, seq, keys] is wanted")
    if shape[0] != 1:
        g.equal(shape[0], batch)
    g.equal(shape[2], queries)
    g.equal(shape[3], keys)
    return bias


def _causal(g: Builder, seq: Dim, added: Operand | None) -> Operand:
    """The lowest number for later tokens, whatever else is added to their scores."""
    places = g.add("iota", [], start=0, step=1, length=seq, dtype=DType.I64)
    later = g.add("greater", [g.reshape(places, (1, seq)), g.reshape(places, (seq, 1))])
    other = g.scalar(0.0, DType.F32) if added is None else added
    chosen = g.add(
        "where", [g.reshape(later, (1, 1, seq, seq)), g.scalar(LATER, DType.F32), other]
    )
    return chosen


def _of_mask(call: Call, mask: Operand, sizes: tuple[Dim, Dim, Dim]) -> Operand | None:
    """0 where a key is seen, else the filter value; None where all keys are alike."""
    g, (batch, queries, keys) = call.g, sizes
    shape = mask.type.shape
    if len(shape) == 1:
        kept = _of_lengths(g, mask, batch, keys)
    elif len(shape) in (2, 3):
        if shape[-1] == 1 and keys != 1 and call.op_type != "MultiHeadAttention":
            return None  # [batch, 1] and [1, 1] hide all keys or none, which is the same
        wanted = (batch, keys) if len(shape) == 2 else (batch, queries, keys)
        for own, other in zip(shape, wanted, strict=True):
            g.equal(own, other)
        shape = mask.type.shape
        rows = g.reshape(mask, (shape[0], 1, *((1,) * (3 - len(shape))), *shape[1:]))
        kept = g.add("greater", [rows, g.scalar(0, mask.type.dtype)])
    else:
        raise UnsupportedOp(
            f"a mask {mask.type}; [batch], [batch, seq] or [batch, seq, seq] is wanted"
        )
    hidden = g.scalar(call.attr("mask_filter_value", MASKED), DType.F32)
    return g.add("where", [kept, g.scalar(0.0, DType.F32), hidden])


def _of_lengths(g: Builder, mask: Operand, batch: Dim, keys: Dim) -> Operand:
    """[batch]: where each sequence ends; [2 batch]: the ends and then the starts."""
    (count,) = mask.type.shape
    places = g.add("iota", [], start=0, step=1, length=keys, dtype=mask.type.dtype)
    if count != batch * 2:
        g.equal(count, batch)
        return g.add("less", [places, g.reshape(mask, (batch, 1, 1, 1))])
    ends, starts = (
        g.reshape(g.slice(mask, 0, batch * i, batch * (i + 1)), (batch, 1, 1, 1)) for i in (0, 1)
    )
    before, after = (
        g.add("less", [places, ends]),
        g.add("greater_equal", [places, starts]),
    )
    return g.add("logical_and", [before, after])


ATTENTION: dict[str, Converter] = {
    "Attention": attention,
    "MultiHeadAttention": multi_head_attention,
    "QAttention": q_attention,
}
