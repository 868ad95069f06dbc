"""Quantisation whose scales are found when the model runs: no calibration.

`quantize_tokens` is what the kernels compute: each token has the finest scale that holds its own
channels, around a zero point that is known when compiling. `dynamic_quantize` and
`matmul_integer` are ONNX's DynamicQuantizeLinear and MatMulInteger, one scale for a whole tensor:
the pass absorb_dynamic replaces them.
"""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.op_helpers import (
    Env,
    array,
    broadcast,
    operand,
    optional,
    optional_array,
    require_equal,
    text,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.types import DType, TensorType

LEVELS = 255
SMALLEST_SCALE = 1e-30  # of a token that is all zero; its reciprocal is finite in fp32
_BYTES = (DType.U8, DType.I8)


def token_shares(zero_point: int) -> tuple[np.float32, np.float32]:
    """What the largest and the smallest channel of a token are multiplied by for its scale."""
    below = np.float32(0) if zero_point == 0 else np.float32(-1) / np.float32(zero_point)
    return np.float32(1) / np.float32(LEVELS - zero_point), below


def quantize_tokens(x: Array, zero_point: int) -> tuple[Array, Array]:
    """`x[..., channels]` as u8, and the scale `[..., 1]` of each token.

    scale = max(f32(largest * f32(1 / (255 - zero_point))), f32(smallest * f32(-1 / zero_point)),
    SMALLEST_SCALE); stored = clip(rint(f32(x * f32(1 / scale))) + zero_point), half to even.
    """
    above, below = token_shares(zero_point)
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.fmax.reduce(x, axis=-1, keepdims=True, initial=np.float32(-np.inf))
        smallest = np.fmin.reduce(x, axis=-1, keepdims=True, initial=np.float32(np.inf))
        scale = np.fmax(largest * above, np.float32(SMALLEST_SCALE))
        scale = scale if zero_point == 0 else np.fmax(scale, smallest * below)
        steps = np.rint(x * (np.float32(1) / scale))
    low, high = np.float32(-zero_point), np.float32(LEVELS - zero_point)
    stored = np.fmin(np.fmax(steps, low), high).astype(np.int32) + zero_point
    return stored.astype(np.uint8), scale


def _check_zero_point(attrs: Attrs) -> None:
    if not 0 <= attrs["zero_point"] < LEVELS:
        raise InvalidGraph(f"a zero point of tokens is 0..254, got {attrs['zero_point']}")


def _infer_quantize_tokens(types: Types, attrs: Attrs) -> list[TensorType]:
    (x,) = _infer_round_tokens(types, attrs)
    stored = TensorType(DType.U8, x.shape, x.layout)
    return [stored, TensorType(DType.F32, (*x.shape[:-1], 1), x.layout)]


def _evaluate_quantize_tokens(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return list(quantize_tokens(array(arrays, 0), attrs["zero_point"]))


def _infer_round_tokens(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    if x.dtype is not DType.F32 or x.rank < 2:
        raise InvalidGraph(f"needs f32[..., channels], got {x}")
    _check_zero_point(attrs)
    return [TensorType(DType.F32, x.shape, x.layout)]


def _evaluate_round_tokens(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    stored, scale = quantize_tokens(array(arrays, 0), attrs["zero_point"])
    return [(stored.astype(np.int32) - attrs["zero_point"]).astype(np.float32) * scale]


def _infer_dynamic_quantize(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    if x.dtype is not DType.F32:
        raise InvalidGraph(f"needs an f32 operand, got {x}")
    return [TensorType(DType.U8, x.shape), TensorType(DType.F32, ()), TensorType(DType.U8, ())]


def _evaluate_dynamic_quantize(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    """As the ONNX standard says; a tensor that is all zero gets the scale 1."""
    x = array(arrays, 0)
    low = np.float32(min(x.min(initial=0.0), 0.0))
    high = np.float32(max(x.max(initial=0.0), 0.0))
    scale = (high - low) / np.float32(LEVELS) or np.float32(1)
    zero_point = np.clip(np.rint(-low / scale), 0, LEVELS).astype(np.uint8)
    stored = np.clip(np.rint(x / scale) + np.float32(zero_point), 0, LEVELS)
    return [stored.astype(np.uint8), np.asarray(scale, np.float32), np.asarray(zero_point)]


def _infer_matmul_integer(types: Types, attrs: Attrs) -> list[TensorType]:
    a, b = operand(types, 0), operand(types, 1)
    for type, zero in ((a, optional(types, 2)), (b, optional(types, 3))):
        if type.dtype not in _BYTES or type.rank < 2:
            raise InvalidGraph(f"needs u8 or i8 operands with two axes or more, got {type}")
        if zero is not None and zero.dtype is not type.dtype:
            raise InvalidGraph(f"the zero point is {zero.dtype}, its operand {type.dtype}")
    zero = optional(types, 2)
    if zero is not None and zero.elements != 1:
        raise InvalidGraph(f"zero point {zero} of a: one is wanted")
    zero = optional(types, 3)
    if zero is not None and zero.shape not in ((), (1,), (b.shape[-1],)):
        raise InvalidGraph(f"zero point {zero} of b: one or {b.shape[-1]} are wanted")
    require_equal(f"inner dims of {text(a.shape)} and {text(b.shape)}", a.shape[-1], b.shape[-2])
    front = broadcast([a.shape[:-2], b.shape[:-2]])
    return [TensorType(DType.I32, (*front, a.shape[-2], b.shape[-1]))]


def _evaluate_matmul_integer(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    a, b = (_centred(array(arrays, i), optional_array(arrays, i + 2)) for i in range(2))
    # float64 holds these integers exactly; BLAS has no integer product.
    return [np.asarray(np.matmul(a, b)).astype(np.int32)]


def _centred(x: Array, zero: Array | None) -> Array:
    return x.astype(np.float64) - (0.0 if zero is None else zero.astype(np.float64))


_ROWS = [
    OpSpec(
        "quantize_tokens",
        _infer_quantize_tokens,
        _evaluate_quantize_tokens,
        ("zero_point",),
        panels=PanelRule((0,)),
    ),
    OpSpec("round_tokens", _infer_round_tokens, _evaluate_round_tokens, ("zero_point",)),
    OpSpec("dynamic_quantize", _infer_dynamic_quantize, _evaluate_dynamic_quantize),
    OpSpec("matmul_integer", _infer_matmul_integer, _evaluate_matmul_integer),
]
DYNAMIC_OPS = {row.name: row for row in _ROWS}
