"""Operators of the domain com.microsoft that ONNX Runtime's transformer optimiser writes.

Attention(x, w, b, mask)   ->   attention of slices of matmul(x, w) + b
Meanings: docs/ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter
from sparsec.frontend.onnx_ops_integer import MICROSOFT_INTEGER, dequantized, integer_product
from sparsec.frontend.onnx_ops_nn import gemm
from sparsec.frontend.onnx_ops_quant import QUANT
from sparsec.ir.types import DType

MASKED = -10000.0  # what ONNX Runtime adds to masked scores unless the node says otherwise


def gelu(approximate: str) -> Converter:
    """Of x, or of x plus a bias."""

    def convert(call: Call) -> Operand:
        x, bias = call.input(0), call.optional(1)
        total = x if bias is None else call.g.add("add", [x, bias])
        return call.g.add("gelu", [total], approximate=approximate)

    return convert


def quick_gelu(call: Call) -> Operand:
    """x * sigmoid(alpha x)"""
    x = call.input(0)
    scaled = call.g.add("mul", [x, call.g.scalar(call.attr("alpha", 1.702), x.type.dtype)])
    return call.g.add("mul", [x, call.g.add("sigmoid", [scaled])])


def fused_matmul(call: Call) -> Operand:
    """alpha a b, the last two axes of either transposed."""
    if call.attr("transBatchA", 0) or call.attr("transBatchB", 0):
        raise call.refuse("FusedMatMul with transBatchA or transBatchB")
    a, b = (_turned(call, i, name) for i, name in enumerate(("transA", "transB")))
    alpha = call.attr("alpha", 1.0)
    y = call.g.add("matmul", [a, b])
    return y if alpha == 1.0 else call.g.add("mul", [y, call.g.scalar(alpha, y.type.dtype)])


def fused_gemm(call: Call) -> Operand:
    """Gemm and then an activation without attributes."""
    kind = call.attr("activation", "")
    if kind not in ("Relu", "Tanh", "Sigmoid"):
        raise call.refuse(f"FusedGemm with the activation {kind!r}")
    return call.g.add(kind.lower(), [gemm(replace(call, inputs=call.inputs[:3]))])


def _turned(call: Call, index: int, name: str) -> Operand:
    x = call.input(index)
    if not call.attr(name, 0):
        return x
    order = [*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2]
    return call.g.transpose(x, order)


def skip_layer_norm(call: Call) -> list[Operand | None]:
    """layer_norm(x + skip + bias); the fourth result is the sum."""
    total = call.g.add("add", [call.input(0), call.input(1)])
    bias = call.optional(4)
    total = total if bias is None else call.g.add("add", [total, bias])
    return [_normal(call, total, call.input(2), call.optional(3)), None, None, total]


def _normal(call: Call, x: Operand, gamma: Operand, beta: Operand | None) -> Operand:
    epsilon = call.attr("epsilon", 1e-12)
    return call.g.add("layer_norm", [x, gamma, beta, None], epsilon=epsilon)


def embed_layer_norm(call: Call) -> list[Operand | None]:
    """ids, types?, words, positions, types' table?, gamma, beta, mask?, position ids?"""
    tables = [call.optional(i) for i in (2, 3, 4)]
    norm = (call.input(5), call.optional(6))
    return _embedded(call, tables, norm, (call.optional(7), call.optional(8)))


def q_embed_layer_norm(call: Call) -> list[Operand | None]:
    """As embed_layer_norm, but bytes; operands 8 to 12 are scales, 13 to 17 zero points."""
    tables: list[Operand | None] = [
        None if call.optional(i) is None else dequantized(call, i, 1, scale=s, zero_point=s + 5)
        for i, s in ((2, 8), (3, 9), (4, 10))
    ]
    norm = tuple(dequantized(call, i, 0, scale=i + 6, zero_point=i + 11) for i in (5, 6))
    return _embedded(call, tables, (norm[0], norm[1]), (call.optional(7), None))


def _embedded(
    call: Call,
    tables: list[Operand | None],
    norm: tuple[Operand, Operand | None],
    extra: tuple[Operand | None, Operand | None],
) -> list[Operand | None]:
    g, (mask, positions) = call.g, extra
    words, places, types = tables
    if words is None or places is None:
        raise InvalidModel("the tables of words and positions are required")
    ids = call.input(0)
    seq = ids.type.shape[1]
    if positions is None:
        positions = g.add("iota", [], start=0, step=1, length=seq, dtype=DType.I32)
        rows = places.type.shape[0]
        if isinstance(rows, int):
            g.graph.add_limit(seq, rows, "the table of positions has no more rows")
    total = g.add("gather", [words, ids], axis=0)
    kind = call.optional(1)
    if (kind is None) != (types is None):
        raise InvalidModel("segment ids and their table go together; one of them is absent")
    if kind is not None and types is not None:
        total = g.add("add", [total, g.add("gather", [types, kind], axis=0)])
    total = g.add("add", [total, g.add("gather", [places, positions], axis=0)])
    return [_normal(call, total, *norm), _lengths(call, ids, mask), total]


def _lengths(call: Call, ids: Operand, mask: Operand | None) -> Operand | None:
    """How many tokens of each sequence are not masked: zeros where no mask is given."""
    if len(call.outputs) < 2 or not call.outputs[1]:
        return None
    if mask is not None:
        return call.g.add("reduce_sum", [mask], axes=(1,), keepdims=False)
    zeros = call.g.constant(np.zeros(1, np.int32))
    return call.g.broadcast_to(zeros, (ids.type.shape[0],))


def attention(call: Call) -> Operand:
    """x, weights [k, 3 m], bias [3 m]?, mask?"""
    _refuse_other_inputs(call, 4)
    y = call.g.add("matmul", [call.input(0), call.input(1)])
    return _attention(call, y, call.optional(2), call.optional(3))


def q_attention(call: Call) -> Operand:
    """x, weights, bias, scale of x, of the weights, mask?, zero point of x?, of the weights?"""
    _refuse_other_inputs(call, 8)
    g, scale, zero = call.g, call.g.value(call.input(3)), call.optional(6)
    if scale.is_constant and (zero is None or g.value(zero).is_constant):
        x = dequantized(call, 0, scale=3, zero_point=6)
        y = g.add("matmul", [x, dequantized(call, 1, 1, scale=4, zero_point=7)])
        return _attention(call, y, call.optional(2), call.optional(5))
    operands = [call.input(0), call.input(1), zero, call.optional(7)]
    scales = [scale, g.value(call.input(4))]
    y = integer_product(call, operands, scales, len(call.inputs))
    return _attention(call, y, call.optional(2), call.optional(5))


def _refuse_other_inputs(call: Call, count: int) -> None:
    flags = [n for n in ("unidirectional", "do_rotary", "past_present_share_buffer")
             if call.attr(n, 0)]  # fmt: skip
    if flags or any(x is not None for x in call.inputs[count:]) or any(call.outputs[1:]):
        what = ", ".join(flags) or "past, attention bias or present"
        raise UnsupportedOp(f"{call.op_type} with {what} is not supported; optimise as an encoder")


def _attention(call: Call, y: Operand, bias: Operand | None, mask: Operand | None) -> Operand:
    """`y` [batch, seq, 3 m] holds queries, keys and values, m channels each."""
    g, heads = call.g, call.required("num_heads")
    y = y if bias is None else g.add("add", [y, bias])
    width = y.type.shape[-1]
    sizes = call.attr("qkv_hidden_sizes", ())
    if (
        y.type.rank != 3
        or not isinstance(width, int)
        or width % (3 * heads)
        or len(set(sizes)) > 1
    ):
        raise UnsupportedOp(
            f"queries, keys and values {y.type} are not alike for {heads} heads: "
            "[batch, seq, 3 * heads * size] is wanted"
        )
    size = width // (3 * heads)
    offsets = {f"{n}_offset": i * heads * size for i, n in enumerate("qkv")}
    scale = call.attr("scale", 0.0) or float(np.float32(1 / np.sqrt(size)))
    attrs = {"heads": heads, "head_size": size, "scale": scale, **offsets}
    added = None if mask is None else _added_mask(call, mask, y)
    return g.add("attention", [y, y, y, added], **attrs)


def _added_mask(call: Call, mask: Operand, y: Operand) -> Operand:
    """What is added to the scores: 0 or less, [batch, 1, 1 or seq, seq]."""
    g, (batch, seq, _) = call.g, y.type.shape
    shape = mask.type.shape
    if len(shape) == 1:
        g.equal(shape[0], batch)
        places = g.add("iota", [], start=0, step=1, length=seq, dtype=mask.type.dtype)
        kept = g.add("less", [places, g.reshape(mask, (shape[0], 1, 1, 1))])
        kept = g.cast(kept, DType.F32)
    elif len(shape) in (2, 3):
        kept = g.cast(
            g.reshape(mask, (shape[0], 1, *((1,) * (3 - len(shape))), *shape[1:])), DType.F32
        )
    else:
        raise UnsupportedOp(
            f"a mask {mask.type}; [batch], [batch, seq] or [batch, seq, seq] is wanted"
        )
    lowest = g.scalar(call.attr("mask_filter_value", MASKED), DType.F32)
    return g.add("mul", [g.add("sub", [g.scalar(1.0, DType.F32), kept]), lowest])


MICROSOFT: dict[str, Converter] = {
    **MICROSOFT_INTEGER,
    **QUANT,
    "Attention": attention,
    "BiasGelu": gelu("none"),
    "EmbedLayerNormalization": embed_layer_norm,
    "FastGelu": gelu("tanh"),
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "Gelu": gelu("none"),
    "QAttention": q_attention,
    "QEmbedLayerNormalization": q_embed_layer_norm,
    "QuickGelu": quick_gelu,
    "SkipLayerNormalization": skip_layer_norm,
}
