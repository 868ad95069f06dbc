"""Contractions and the fused ops that the transformer kernels compute."""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.attention_types import (
    ATTENTION_ATTRS,
    infer_attention,
    join_heads,
    split_heads,
)
from sparsec.ir.layouts import ROW_MAJOR, Panels
from sparsec.ir.op_helpers import (
    Env,
    Shape,
    array,
    broadcast,
    by_sequence,
    operand,
    optional,
    optional_array,
    panel_layout,
    require_equal,
    require_float,
    require_integer,
    same_dtype,
    text,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.ops_elementwise import ACTIVATIONS
from sparsec.ir.ops_int8 import is_stored, stored_result, stored_type
from sparsec.ir.ops_reduce import softmax
from sparsec.ir.ops_shape import check_indices
from sparsec.ir.types import DType, TensorType


def _infer_matmul(types: Types, attrs: Attrs) -> list[TensorType]:
    a, b = operand(types, 0), operand(types, 1)
    dtype = same_dtype([a, b])
    if dtype is DType.BOOL:
        raise InvalidGraph(f"needs numbers, got {a}")
    if a.rank == 0 or b.rank == 0:
        raise InvalidGraph(f"needs operands with axes, got {a} and {b}")
    left: Shape = a.shape if a.rank > 1 else (1, *a.shape)
    right: Shape = b.shape if b.rank > 1 else (*b.shape, 1)
    require_equal(f"inner dims of {text(a.shape)} and {text(b.shape)}", left[-1], right[-2])
    shape = broadcast([left[:-2], right[:-2]])
    shape += (left[-2],) if a.rank > 1 else ()
    shape += (right[-1],) if b.rank > 1 else ()
    return [TensorType(dtype, shape)]


def _evaluate_matmul(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return [np.asarray(np.matmul(array(arrays, 0), array(arrays, 1)))]


def _infer_linear(types: Types, attrs: Attrs) -> list[TensorType]:
    x, w = operand(types, 0), operand(types, 1)
    bias, residual = optional(types, 2), optional(types, 3)
    require_float(x)
    if attrs["activation"] not in ACTIVATIONS:
        raise InvalidGraph(f"there is no activation {attrs['activation']!r}")
    if x.rank == 0 or w.rank != 2 or x.shape[-1] != w.shape[1]:
        raise InvalidGraph(f"{x} does not end in the columns of the weight {w}")
    shape = (*x.shape[:-1], w.shape[0])
    if bias is not None and bias.shape != (w.shape[0],):
        raise InvalidGraph(f"bias {bias} is not one value per row of the weight {w}")
    if residual is not None and residual.shape != shape:
        raise InvalidGraph(f"residual {residual} does not have the shape {text(shape)}")
    return [TensorType(x.dtype, shape, panel_layout([x, residual]))]


def _evaluate_linear(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, w = array(arrays, 0), array(arrays, 1)
    bias, residual = optional_array(arrays, 2), optional_array(arrays, 3)
    result = np.matmul(x.reshape(-1, x.shape[-1]), w.T).reshape(*x.shape[:-1], w.shape[0])
    if bias is not None:
        result = result + bias
    with np.errstate(over="ignore"):
        result = ACTIVATIONS[attrs["activation"]](result)
    if residual is not None:
        result = result + residual
    return [np.asarray(result).astype(x.dtype, copy=False)]


def _evaluate_attention(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    q, k, v = (split_heads(array(arrays, i), attrs, n) for i, n in enumerate("qkv"))
    mask = optional_array(arrays, 3)
    scores = np.matmul(q, k.swapaxes(-1, -2)) * q.dtype.type(attrs["scale"])
    if mask is not None:
        scores = scores + mask
    # A query whose keys are all masked with -inf gets zeros, where softmax alone gives NaN.
    dead = np.isneginf(scores).all(axis=-1, keepdims=True)
    weights = np.where(dead, scores.dtype.type(0), softmax(np.where(dead, 0, scores), -1))
    context = np.matmul(weights.astype(v.dtype, copy=False), v)
    return [join_heads(context, attrs)]


def _infer_layer_norm(types: Types, attrs: Attrs) -> list[TensorType]:
    x, gamma = operand(types, 0), operand(types, 1)
    beta, residual, factor = (optional(types, i) for i in (2, 3, 4))
    require_float(x)
    if factor is not None and attrs.get("out_scale") is None:
        raise InvalidGraph(f"factor {factor} is for a u8 copy of the result, which is not stored")
    for name, type in (("gamma", gamma), ("beta", beta), ("factor", factor)):
        if type is not None and (x.rank == 0 or type.shape != x.shape[-1:]):
            raise InvalidGraph(f"{name} {type} is not one value per channel of {x}")
    if residual is not None and residual.shape != x.shape:
        raise InvalidGraph(f"residual {residual} does not have the shape of {x}")
    result = TensorType(x.dtype, x.shape, panel_layout([x, residual]))
    quantized = stored_type(result, attrs)
    return [result] if quantized is None else [result, quantized]


def _evaluate_layer_norm(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, gamma = array(arrays, 0), array(arrays, 1)
    beta, residual, factor = (optional_array(arrays, i) for i in (2, 3, 4))
    total = x if residual is None else x + residual
    if total.dtype == np.float16:  # statistics are fp32, as ONNX says by stash_type
        total = total.astype(np.float32)
    centred = total - total.mean(axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    result = centred / np.sqrt(variance + total.dtype.type(attrs["epsilon"])) * gamma
    result = np.asarray(result if beta is None else result + beta).astype(x.dtype, copy=False)
    copied = result if factor is None else result * factor
    return [result, stored_result(copied, attrs)] if is_stored(attrs) else [result]


def _infer_embedding(types: Types, attrs: Attrs) -> list[TensorType]:
    if not types or len(types) % 2:
        raise InvalidGraph("takes pairs of ids and table")
    ids = [operand(types, i) for i in range(0, len(types), 2)]
    tables = [operand(types, i) for i in range(1, len(types), 2)]
    for type in ids:
        require_integer(type)
    for table in tables:
        require_float(table)
        if table.rank != 2 or table.shape[1] != tables[0].shape[1]:
            raise InvalidGraph(f"tables {tables[0]} and {table} must be [rows, channels]")
    shape = broadcast([t.shape for t in ids])
    return [TensorType(same_dtype(tables), (*shape, tables[0].shape[1]), panel_layout(types))]


def _evaluate_embedding(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    total: Array | None = None
    for i in range(0, len(arrays), 2):
        ids, table = array(arrays, i), array(arrays, i + 1)
        check_indices(ids, table.shape[0])
        rows = table[ids]
        total = rows if total is None else total + rows
    assert total is not None
    return [total]


def _infer_to_panels(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    if x.rank == 0 or not isinstance(x.shape[-1], int):
        raise InvalidGraph(f"needs a last axis of known size, got {x}")
    return [x.with_layout(Panels(attrs["width"]))]


def _infer_from_panels(types: Types, attrs: Attrs) -> list[TensorType]:
    return [operand(types, 0).with_layout(ROW_MAJOR)]


def _evaluate_same(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return [array(arrays, 0)]


# With `out_scale` an attention's result is u8, and a layer_norm has a u8 copy of its result as a
# second one; with `out_bf16` that copy is bf16. A layer_norm's operand 4 multiplies, per channel,
# what the u8 copy is made of: y * factor, rounded to fp32, then quantised.
_QUANTIZED = ("out_scale", "out_zero_point")

# `longest` bounds the tokens of a sequence where they are packed.

# What a quantised model says of q, k and v: quantize_attention reads it, fp32 does not.
_STEPS = ("q_scale", "k_scale", "v_scale")

_ROWS = [
    OpSpec("matmul", _infer_matmul, _evaluate_matmul),
    OpSpec("linear", _infer_linear, _evaluate_linear, ("activation",), panels=PanelRule((0, 3))),
    OpSpec(
        "attention",
        infer_attention,
        by_sequence(_evaluate_attention),
        ATTENTION_ATTRS,
        panels=PanelRule((0, 1, 2)),
        optional_attrs=(*_QUANTIZED, *_STEPS, "longest"),
    ),
    OpSpec(
        "layer_norm",
        _infer_layer_norm,
        _evaluate_layer_norm,
        ("epsilon",),
        panels=PanelRule((0, 3)),
        optional_attrs=(*_QUANTIZED, "out_bf16"),
    ),
    OpSpec("embedding", _infer_embedding, _evaluate_embedding, panels=PanelRule(())),
    OpSpec("to_panels", _infer_to_panels, _evaluate_same, ("width",)),
    OpSpec("from_panels", _infer_from_panels, _evaluate_same),
]
CORE_OPS = {row.name: row for row in _ROWS}
