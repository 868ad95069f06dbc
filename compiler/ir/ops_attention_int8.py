"""Attention over quantised queries, keys and values.

q, k and v are u8 with zero point 128: `real = (stored - 128) * x_scale`. Each may be a part of
one value with its own scale, so the scales are attributes of the node.
"""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.op_helpers import (
    Env,
    array,
    broadcastable_to,
    by_sequence,
    check_sequences,
    operand,
    optional,
    optional_array,
    panel_layout,
    require_equal,
    require_float,
    text,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.ops_int8 import check_quantization, is_stored, stored_result, stored_type
from sparsec.ir.types import DType, TensorType

ZERO_POINT = 128
STEPS = 255  # of a probability: the largest of a query is 255


def _infer(types: Types, attrs: Attrs) -> list[TensorType]:
    q, mask = operand(types, 0), optional(types, 3)
    width = attrs["heads"] * attrs["head_size"]
    for index, name in enumerate("qkv"):
        type, offset = operand(types, index), attrs[f"{name}_offset"]
        if type.dtype is not DType.U8 or type.rank != 3 or not isinstance(type.shape[2], int):
            raise InvalidGraph(f"{name} must be u8[batch, seq, channels], got {type}")
        if not 0 <= offset <= type.shape[2] - width:
            raise InvalidGraph(f"channels {offset}..{offset + width} of {name} are not in {type}")
        require_equal(f"batch of q and {name}", q.shape[0], type.shape[0])
        require_equal(f"length of q and {name}", q.shape[1], type.shape[1])
        check_quantization(attrs[f"{name}_scale"], ZERO_POINT, DType.U8)
    scores = (q.shape[0], attrs["heads"], q.shape[1], q.shape[1])
    if mask is not None:
        require_float(mask)
        if not broadcastable_to(mask.shape, scores):
            raise InvalidGraph(f"mask {mask} does not broadcast to {text(scores)}")
    check_sequences(q, types, attrs)
    result = TensorType(DType.F32, (*q.shape[:2], width), panel_layout(types[:3]))
    return [stored_type(result, attrs) or result]


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
