"""Operators of the domain com.microsoft that ONNX Runtime's transformer optimiser writes.

SkipLayerNormalization(x, skip, ...)   ->   layer_norm(x + skip)
Meanings: docs/ContribOperators.md of ONNX Runtime. Attention is in onnx_ops_attention.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsec.errors import InvalidModel
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter
from sparsec.frontend.onnx_ops_attention import ATTENTION
from sparsec.frontend.onnx_ops_blocks import BLOCKS
from sparsec.frontend.onnx_ops_conv import conv
from sparsec.frontend.onnx_ops_integer import MICROSOFT_INTEGER, dequantized
from sparsec.frontend.onnx_ops_nn import gemm, root_mean_square
from sparsec.frontend.onnx_ops_quant import QUANT
from sparsec.frontend.onnx_ops_rotary import MICROSOFT_ROTARY
from sparsec.ir.graph import Value
from sparsec.ir.types import DType


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
    """alpha a b, the axes of either turned."""
    a, b = (_turned(call, i, name) for i, name in enumerate("AB"))
    alpha = call.attr("alpha", 1.0)
    y = call.g.add("matmul", [a, b])
    return y if alpha == 1.0 else call.g.add("mul", [y, call.g.scalar(alpha, y.type.dtype)])


def fused_gemm(call: Call) -> Operand:
    return _activated(call, gemm(replace(call, inputs=call.inputs[:3])))


def fused_conv(call: Call) -> Operand:
    """Conv; then the fourth operand is added."""
    y = conv(replace(call, inputs=call.inputs[:3]))
    z = call.optional(3)
    return _activated(call, y if z is None else call.g.add("add", [y, z]))


def _activated(call: Call, y: Operand) -> Operand:
    """By an activation without attributes."""
    kind = call.attr("activation", "")
    if kind not in ("Relu", "Tanh", "Sigmoid"):
        raise call.refuse(f"{call.op_type} with the activation {kind!r}")
    return call.g.add(kind.lower(), [y])


def _turned(call: Call, index: int, name: str) -> Operand:
    """transBatch: the first axis goes behind those of the batch; trans: then the last two change
    places."""
    x = call.input(index)
    order = list(range(x.type.rank))
    if call.attr(f"transBatch{name}", 0):
        order.insert(x.type.rank - 2, order.pop(0))
    if call.attr(f"trans{name}", 0):
        order[-2:] = order[:-3:-1]
    return call.g.transpose(x, order)


def skip_layer_norm(call: Call) -> list[Operand | None]:
    """layer_norm(x + skip + bias); the fourth result is the sum."""
    total = _sum(call, call.optional(4))
    return [_normal(call, total, call.input(2), call.optional(3)), None, None, total]


def skip_simplified_layer_norm(call: Call) -> list[Operand | None]:
    """The same by the root mean square, without beta."""
    total = _sum(call, call.optional(3))
    axes, epsilon = (total.type.rank - 1,), call.attr("epsilon", 1e-12)
    y, _ = root_mean_square(call.g, total, call.input(2), axes, epsilon)
    return [y, None, None, total]


def _sum(call: Call, bias: Operand | None) -> Operand:
    """x + skip + bias; the bias goes to the one that is a product, which computes it itself."""
    g, terms = call.g, [call.input(0), call.input(1)]
    if bias is None:
        return g.add("add", terms)
    product = next((i for i, x in enumerate(terms) if _is_product(x)), None)
    if product is None:
        return g.add("add", [g.add("add", terms), bias])
    terms[product] = g.add("add", [terms[product], bias])
    return g.add("add", terms)


def _is_product(x: Operand) -> bool:
    return isinstance(x, Value) and x.producer is not None and x.producer.op == "matmul"


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


MICROSOFT: dict[str, Converter] = {
    **ATTENTION,
    **BLOCKS,
    **MICROSOFT_INTEGER,
    **MICROSOFT_ROTARY,
    **QUANT,
    "BiasGelu": gelu("none"),
    "EmbedLayerNormalization": embed_layer_norm,
    "FastGelu": gelu("tanh"),
    "FusedConv": fused_conv,
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "Gelu": gelu("none"),
    "QEmbedLayerNormalization": q_embed_layer_norm,
    "QuickGelu": quick_gelu,
    "SkipLayerNormalization": skip_layer_norm,
    "SkipSimplifiedLayerNormalization": skip_simplified_layer_norm,
    "TransposeMatMul": fused_matmul,
}
