"""Ops on bf16: operands rounded half to even from fp32, products and sums in fp32.

The kernels' multiply-add takes denormal numbers as zero and adds two products after one another:
their sums differ from these as sums in another order do, and by denormals.
"""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph
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
    operand,
    optional,
    optional_array,
    panel_layout,
    stored_bf16,
    text,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.ops_elementwise import ACTIVATIONS
from sparsec.ir.ops_int8 import is_stored, stored_result, stored_type
from sparsec.ir.types import DType, TensorType

PAIR = 2  # channels that lie together


def _infer_to_bf16(types: Types, attrs: Attrs) -> list[TensorType]:
    return [stored_bf16(operand(types, 0))]


def _evaluate_to_bf16(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return [array(arrays, 0).astype(DType.BF16.numpy)]


def _infer_linear(types: Types, attrs: Attrs) -> list[TensorType]:
    x, w = operand(types, 0), operand(types, 1)
    bias, residual = optional(types, 2), optional(types, 3)
    if attrs["activation"] not in ACTIVATIONS:
        raise InvalidGraph(f"there is no activation {attrs['activation']!r}")
    if (x.dtype, w.dtype) != (DType.BF16, DType.BF16):
        raise InvalidGraph(f"needs x and w in bf16, got {x} and {w}")
    if x.rank == 0 or w.rank != 2 or x.shape[-1] != w.shape[1]:
        raise InvalidGraph(f"{x} does not end in the columns of the weight {w}")
    if bias is not None and (bias.dtype, bias.shape) != (DType.F32, (w.shape[0],)):
        raise InvalidGraph(f"bias {bias} is not one f32 per row of the weight {w}")
    shape = (*x.shape[:-1], w.shape[0])
    if residual is not None and (residual.dtype, residual.shape) != (DType.F32, shape):
        raise InvalidGraph(f"residual {residual} is not f32{text(shape)}")
    result = TensorType(DType.F32, shape, panel_layout([x, residual]))
    return [stored_type(result, attrs) or result]


def _evaluate_linear(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, w = (array(arrays, i).astype(np.float32) for i in (0, 1))
    bias, residual = optional_array(arrays, 2), optional_array(arrays, 3)
    y = np.matmul(x.reshape(-1, x.shape[-1]), w.T).reshape(*x.shape[:-1], w.shape[0])
    y = y if bias is None else y + bias
    with np.errstate(over="ignore"):
        y = ACTIVATIONS[attrs["activation"]](y).astype(np.float32, copy=False)
    y = y if residual is None else y + residual
    return [stored_result(y, attrs) if is_stored(attrs) else y]


def _infer_attention(types: Types, attrs: Attrs) -> list[TensorType]:
    return infer_attention(types, attrs, DType.BF16, PAIR)


def _evaluate_attention(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    """The sum of the probabilities is one of fp32; rounded to bf16 they weigh the values."""
    parts = (split_heads(array(arrays, i), attrs, n) for i, n in enumerate("qkv"))
    q, k, v = (part.astype(np.float32) for part in parts)
    mask = optional_array(arrays, 3)
    scores = np.matmul(q, k.swapaxes(-1, -2)) * np.float32(attrs["scale"])
    if mask is not None:
        scores = scores + mask
    highest = scores.max(axis=-1, keepdims=True)
    dead = np.isneginf(highest)  # every key is masked with -inf: zeros
    p = np.exp(scores - np.where(dead, np.float32(0), highest))
    total = np.where(dead, np.float32(1), p.sum(axis=-1, keepdims=True))
    rounded = p.astype(DType.BF16.numpy).astype(np.float32)
    return [join_heads(np.matmul(rounded, v) / total, attrs)]


_ROWS = [
    OpSpec("to_bf16", _infer_to_bf16, _evaluate_to_bf16),
    OpSpec(
        "linear_bf16",
        _infer_linear,
        _evaluate_linear,
        ("activation",),
        panels=PanelRule((0, 3)),
        optional_attrs=("out_bf16",),
    ),
    OpSpec(
        "attention_bf16",
        _infer_attention,
        by_sequence(_evaluate_attention),
        ATTENTION_ATTRS,
        panels=PanelRule((0, 1, 2)),
        optional_attrs=("out_scale", "out_zero_point", "out_bf16", "longest"),
    ),
]
BF16_OPS = {row.name: row for row in _ROWS}
