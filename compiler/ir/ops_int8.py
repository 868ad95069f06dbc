"""Quantised ops. What they round, and when, is exact: kernels are held to it bit for bit.

Affine: `real = (stored - zero_point) * scale`. Scales are fp32 numbers; `f32(...)` below is one
rounding to fp32, half to even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.fma import fma_f32
from sparsec.ir.op_helpers import (
    Env,
    array,
    broadcast,
    operand,
    optional,
    optional_array,
    panel_layout,
    require_integer,
    stored_bf16,
    text,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.ops_elementwise import ACTIVATIONS
from sparsec.ir.ops_shape import check_indices
from sparsec.ir.types import DType, QuantParams, TensorType

# Columns of a weight by its type: 255 * 128 * 65536 < 2**31, so that an int32 sum never overflows.
# Numbers of i16 are those of bytes less their own zero point: at most 255 on either side.
MAX_DEPTHS = {DType.I8: 65536, DType.I16: 32768}
_CHUNK = 1 << 22  # accumulators at a time: 32 MB of float64
# 16 bits as quantised files have them: the pass absorb_wide leaves none of them.
_STORED = (DType.U8, DType.I8, DType.U16, DType.I16)
_SHIFT = 256  # greatest zero point of a table, on either side: numbers of u8 less their own, as i8


def check_quantization(scale: float, zero_point: int, dtype: DType) -> QuantParams:
    """The parameters of one tensor; InvalidGraph when nothing can be stored with them."""
    # 1e-37: its reciprocal is finite in fp32, and it is no subnormal number.
    if not (math.isfinite(scale) and 1e-37 < scale < 1e37):
        raise InvalidGraph(f"a scale is a positive finite number of fp32, got {scale}")
    limits = np.iinfo(dtype.numpy)
    if not limits.min <= zero_point <= limits.max:
        raise InvalidGraph(f"zero point {zero_point} is outside {dtype}")
    return QuantParams((scale,), (zero_point,))


def quantize_array(x: Array, scale: float, zero_point: int, dtype: DType) -> Array:
    """clip(rint(f32(x * f32(1 / scale))) + zero_point); NaN gives the lowest number."""
    limits = np.iinfo(dtype.numpy)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(x * (np.float32(1) / np.float32(scale)))
    # Clipped before the zero point is added, where every limit is exact in fp32.
    low, high = np.float32(limits.min - zero_point), np.float32(limits.max - zero_point)
    clipped = np.fmin(np.fmax(steps, low), high).astype(np.int32)
    return np.asarray(clipped + np.int32(zero_point)).astype(dtype.numpy)


def dequantize_array(x: Array, scale: float, zero_point: int) -> Array:
    """f32((x - zero_point) * scale)"""
    return np.asarray((x.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale))


def moved_quant(op: str, x: TensorType, attrs: Attrs) -> QuantParams | None:
    """The parameters of `op(x)` where the op only moves the elements of x; None when none fit."""
    if x.quant is None or op not in ("reshape", "transpose"):
        return None
    if x.quant.axis is None:
        return x.quant
    return replace(x.quant, axis=attrs["perm"].index(x.quant.axis)) if op == "transpose" else None


def stored_type(type: TensorType, attrs: Attrs) -> TensorType | None:
    """`type` as it is stored; None for fp32.

    u8 by the attributes `out_scale` and `out_zero_point`, bf16 by `out_bf16`.
    """
    scale = attrs.get("out_scale")
    if attrs.get("out_bf16"):
        if scale is not None:
            raise InvalidGraph("a result is stored as u8 or as bf16, not as both")
        return stored_bf16(type)
    if scale is None:
        return None
    if type.dtype is not DType.F32:
        raise InvalidGraph(f"only f32 results are quantised, got {type}")
    quant = check_quantization(scale, attrs.get("out_zero_point", 0), DType.U8)
    return TensorType(DType.U8, type.shape, type.layout, quant)


def is_stored(attrs: Attrs) -> bool:
    """Whether `stored_type` gives a type other than fp32."""
    return attrs.get("out_scale") is not None or bool(attrs.get("out_bf16"))


def stored_result(y: Array, attrs: Attrs) -> Array:
    """What is stored for `y` by the attributes of `stored_type`."""
    if attrs.get("out_bf16"):
        return y.astype(DType.BF16.numpy)
    return quantize_array(y, attrs["out_scale"], attrs.get("out_zero_point", 0), DType.U8)


def _infer_quantize(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    if x.dtype is not DType.F32:
        raise InvalidGraph(f"needs an f32 operand, got {x}")
    if attrs["dtype"] not in _STORED:
        raise InvalidGraph(f"quantised numbers are integers of 8 or 16 bits, not {attrs['dtype']}")
    quant = check_quantization(attrs["scale"], attrs["zero_point"], attrs["dtype"])
    return [TensorType(attrs["dtype"], x.shape, x.layout, quant)]


def _evaluate_quantize(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x = array(arrays, 0)
    return [quantize_array(x, attrs["scale"], attrs["zero_point"], attrs["dtype"])]


def _infer_dequantize(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    if x.dtype not in _STORED:
        raise InvalidGraph(f"needs integers of 8 or 16 bits, got {x}")
    _require_quant(x, attrs["scale"], attrs["zero_point"])
    return [TensorType(DType.F32, x.shape, x.layout)]


def _evaluate_dequantize(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return [dequantize_array(array(arrays, 0), attrs["scale"], attrs["zero_point"])]


@dataclass(frozen=True, slots=True)
class Rows:
    """The fp32 result of each row: sum * multiplier + bias, stored with `out_scale` or not."""

    multiplier: Array
    bias: Array
    out_scale: float | None


def rows_of(attrs: Attrs, w_scale: Array, bias: Array | None, is_plain: bool) -> Rows:
    """Of a `linear_int8`.

    A product that `is_plain`, with no activation, residual or scales of tokens, and is stored
    gives steps at once, f32(f32(x_scale * w_scale) / out_scale) and f32(bias / out_scale), as
    ONNX Runtime's QLinearMatMul does: one rounding less. It is stored with scale 1 then.
    """
    scale = np.float32(attrs["x_scale"]) * w_scale.astype(np.float32)
    start = np.zeros(scale.shape, np.float32) if bias is None else bias
    rows = Rows(scale, start, attrs["out_scale"])
    if rows.out_scale is None or not is_plain or attrs["activation"] != "none":
        return rows
    with np.errstate(over="ignore"):
        joined = Rows(scale / np.float32(rows.out_scale), start / np.float32(rows.out_scale), 1.0)
    is_finite = all(np.isfinite(x).all() for x in (joined.multiplier, joined.bias))
    return joined if is_finite else rows


def _infer_linear_int8(types: Types, attrs: Attrs) -> list[TensorType]:
    x, w, w_scale = operand(types, 0), operand(types, 1), operand(types, 2)
    bias, residual, token_scale = (optional(types, i) for i in (3, 4, 5))
    if attrs["activation"] not in ACTIVATIONS:
        raise InvalidGraph(f"there is no activation {attrs['activation']!r}")
    if x.dtype is not DType.U8 or w.dtype not in MAX_DEPTHS:
        raise InvalidGraph(f"needs x in u8 and w in i8 or i16, got {x} and {w}")
    if x.rank == 0 or w.rank != 2 or x.shape[-1] != w.shape[1]:
        raise InvalidGraph(f"{x} does not end in the columns of the weight {w}")
    if x.channels > MAX_DEPTHS[w.dtype]:
        raise InvalidGraph(f"{x.channels} columns overflow int32; at most {MAX_DEPTHS[w.dtype]}")
    for name, row in (("w_scale", w_scale), ("bias", bias)):
        if row is not None and (row.dtype, row.shape) != (DType.F32, (w.shape[0],)):
            raise InvalidGraph(f"{name} {row} is not one f32 per row of the weight {w}")
    shape = (*x.shape[:-1], w.shape[0])
    if residual is not None and (residual.dtype, residual.shape) != (DType.F32, shape):
        raise InvalidGraph(f"residual {residual} is not f32{text(shape)}")
    scales = (*x.shape[:-1], 1)
    if token_scale is not None and (token_scale.dtype, token_scale.shape) != (DType.F32, scales):
        raise InvalidGraph(f"the scales of tokens {token_scale} are not f32{text(scales)}")
    _require_quant(x, attrs["x_scale"], attrs["x_zero_point"])
    result = TensorType(DType.F32, shape, panel_layout([x, residual]))
    return [stored_type(result, attrs) or result]


def _require_quant(x: TensorType, scale: float, zero_point: int) -> None:
    """The reader's scale must be the one that `x` was stored with, where that is known."""
    quant = check_quantization(scale, zero_point, x.dtype)
    if x.quant is not None and x.quant != quant:
        raise InvalidGraph(f"{x} is read with {quant}")


def _evaluate_linear_int8(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    """Where tokens have scales, f32(sum) is multiplied by them first, with a rounding."""
    x, w = array(arrays, 0), array(arrays, 1)
    bias, residual, token_scale = (optional_array(arrays, i) for i in (3, 4, 5))
    by_token = None if token_scale is None else token_scale.reshape(-1, 1)
    rows = rows_of(attrs, array(arrays, 2), bias, residual is None and token_scale is None)
    tokens = x.reshape(-1, x.shape[-1])
    result = np.empty((len(tokens), len(w)), np.float32)
    # float64 sums of these integers are exact: |sum| < 2**31. BLAS has no integer product.
    wide = w.T.astype(np.float64)
    step = max(1, _CHUNK // max(1, len(w)))
    for first in range(0, len(tokens), step):
        part = slice(first, first + step)
        centred = tokens[part].astype(np.float64) - attrs["x_zero_point"]
        sums = np.matmul(centred, wide).astype(np.float32)
        sums = sums if by_token is None else sums * by_token[part]
        result[part] = fma_f32(sums, rows.multiplier, rows.bias)
    y = result.reshape(*x.shape[:-1], len(w))
    with np.errstate(over="ignore"):
        y = ACTIVATIONS[attrs["activation"]](y).astype(np.float32, copy=False)
    if residual is not None:
        y = y + residual
    stored = {**attrs, "out_scale": rows.out_scale}
    return [y if rows.out_scale is None else stored_result(y, stored)]


def _infer_embedding_int8(types: Types, attrs: Attrs) -> list[TensorType]:
    if not types or len(types) % 3:
        raise InvalidGraph("takes ids, table and scale in turns")
    ids = [operand(types, i) for i in range(0, len(types), 3)]
    tables = [operand(types, i) for i in range(1, len(types), 3)]
    scales = [optional(types, i) for i in range(2, len(types), 3)]
    zero_points = attrs["zero_points"]
    if len(zero_points) != len(tables):
        raise InvalidGraph(f"{len(zero_points)} zero points for {len(tables)} tables")
    for type in ids:
        require_integer(type)
    for table, scale, zero_point in zip(tables, scales, zero_points, strict=True):
        if table.rank != 2 or table.shape[1] != tables[0].shape[1]:
            raise InvalidGraph(f"tables {tables[0]} and {table} must be [rows, channels]")
        if table.dtype is not (DType.F32 if scale is None else DType.I8):
            raise InvalidGraph(f"a table is f32, or i8 with a scale per row, got {table}")
        if scale is not None and (scale.dtype, scale.shape) != (DType.F32, table.shape[:1]):
            raise InvalidGraph(f"scale {scale} is not one f32 per row of the table {table}")
        if abs(zero_point) > _SHIFT:
            raise InvalidGraph(f"zero point {zero_point} is not between -{_SHIFT} and {_SHIFT}")
    shape = broadcast([t.shape for t in ids])
    return [TensorType(DType.F32, (*shape, tables[0].shape[1]))]


def _evaluate_embedding_int8(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    """In the order of the tables: an f32 row is added, an i8 one with one multiply-add."""
    total: Array = np.zeros(1, np.float32)
    for i, zero_point in enumerate(attrs["zero_points"]):
        ids, table = array(arrays, 3 * i), array(arrays, 3 * i + 1)
        scale = optional_array(arrays, 3 * i + 2)
        check_indices(ids, table.shape[0])
        if scale is None:
            total = total + table[ids]
        else:
            centred = (table[ids].astype(np.int32) - zero_point).astype(np.float32)
            total = fma_f32(centred, scale[ids][..., None], total)
    return [total]


_LINEAR = ("activation", "x_scale", "x_zero_point", "out_scale", "out_zero_point")

_ROWS = [
    OpSpec("quantize", _infer_quantize, _evaluate_quantize, ("scale", "zero_point", "dtype")),
    OpSpec("dequantize", _infer_dequantize, _evaluate_dequantize, ("scale", "zero_point")),
    OpSpec(
        "linear_int8",
        _infer_linear_int8,
        _evaluate_linear_int8,
        _LINEAR,
        panels=PanelRule((0, 4, 5)),
    ),
    OpSpec(
        "embedding_int8",
        _infer_embedding_int8,
        _evaluate_embedding_int8,
        ("zero_points",),
        panels=PanelRule(()),
    ),
]
INT8_OPS = {row.name: row for row in _ROWS}
