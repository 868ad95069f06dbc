"""Attention over quantised queries, keys and values.

q, k and v are u8 with zero point 128: `real = (stored - 128) * x_scale`. Each may be a part of
one value with its own scale, so the scales are attributes of the node.
"""

from __future__ import annotations

import numpy as np

from sparsec.ir.attention_types import infer_attention
from sparsec.ir.op_helpers import (
    Env,
    array,
    by_sequence,
    optional_array,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.ops_int8 import check_quantization, is_stored, stored_result
from sparsec.ir.types import DType, TensorType

ZERO_POINT = 128
STEPS = 255  # of a probability: the largest of a query is 255


def _infer(types: Types, attrs: Attrs) -> list[TensorType]:
    for name in "qkv":
        check_quantization(attrs[f"{name}_scale"], ZERO_POINT, DType.U8)
    return infer_attention(types, attrs, DType.U8)


def _evaluate(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    """Sums are exact; a query's probabilities are whole steps, the largest of them STEPS."""
    q, k, v = (_heads(array(arrays, i), attrs, n) for i, n in enumerate("qkv"))
    mask = optional_array(arrays, 3)
    factor = np.float32(attrs["scale"] * attrs["q_scale"] * attrs["k_scale"])
    scores = np.matmul(q, k.swapaxes(-1, -2)).astype(np.float32) * factor
    if mask is not None:
        scores = scores + mask
    highest = scores.max(axis=-1, keepdims=True)
    highest = np.where(np.isneginf(highest), np.float32(0), highest)
    steps = np.rint(np.exp(scores - highest) * np.float32(STEPS)).astype(np.float64)
    total = steps.sum(axis=-1, keepdims=True)  # 0 where every key is masked with -inf
    share = np.float32(attrs["v_scale"]) / np.maximum(total, 1)
    context = (np.matmul(steps, v) * share).astype(np.float32).transpose(0, 2, 1, 3)
    batch, seq, heads, size = context.shape
    result = context.reshape(batch, seq, heads * size)
    return [stored_result(result, attrs) if is_stored(attrs) else result]


def _heads(x: Array, attrs: Attrs, name: str) -> Array:
    """[batch, seq, channels] -> [batch, heads, seq, head_size], less the zero point"""
    heads, size, offset = attrs["heads"], attrs["head_size"], attrs[f"{name}_offset"]
    part = x[:, :, offset : offset + heads * size].astype(np.float64) - ZERO_POINT
    return part.reshape(*x.shape[:2], heads, size).transpose(0, 2, 1, 3)


_ATTRS = ("heads", "head_size", "scale", "q_offset", "k_offset", "v_offset",
          "q_scale", "k_scale", "v_scale")  # fmt: skip

ATTENTION_INT8_OPS = {
    "attention_int8": OpSpec(
        "attention_int8",
        _infer,
        by_sequence(_evaluate),
        _ATTRS,
        panels=PanelRule((0, 1, 2)),
        optional_attrs=("out_scale", "out_zero_point", "longest"),
    )
}
