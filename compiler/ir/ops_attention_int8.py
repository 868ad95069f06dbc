"""Attention over quantised queries, keys and values.

q, k and v are u8 with zero point 128: `real = (stored - 128) * x_scale`. Each may be a part of
one value with its own scale, so the scales are attributes of the node.
"""

from __future__ import annotations

import numpy as np

from sparsec.ir.attention_types import (
    ATTENTION_ATTRS,
    infer_attention,
    join_heads,
    split_heads,
)
from sparsec.ir.op_helpers import (
    Env,
    array,
    by_sequence,
    optional_array,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.ops_int8 import check_quantization
from sparsec.ir.types import DType, TensorType

ZERO_POINT = 128
STEPS = 255  # of a probability: the largest of a query is 255


def _infer(types: Types, attrs: Attrs) -> list[TensorType]:
    for name in "qkv":
        check_quantization(attrs[f"{name}_scale"], ZERO_POINT, DType.U8)
    return infer_attention(types, attrs, DType.U8)


def _evaluate(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    """Sums are exact; a query's probabilities are whole steps, the largest of them STEPS."""
    parts = (split_heads(array(arrays, i), attrs, n) for i, n in enumerate("qkv"))
    q, k, v = (part.astype(np.float64) - ZERO_POINT for part in parts)
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
    context = (np.matmul(steps, v) * share).astype(np.float32)
    return [join_heads(context, attrs)]


ATTENTION_INT8_OPS = {
    "attention_int8": OpSpec(
        "attention_int8",
        _infer,
        by_sequence(_evaluate),
        (*ATTENTION_ATTRS, "q_scale", "k_scale", "v_scale"),
        panels=PanelRule((0, 1, 2)),
        optional_attrs=("out_scale", "out_zero_point", "longest"),
    )
}
