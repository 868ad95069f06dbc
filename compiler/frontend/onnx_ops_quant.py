"""ONNX quantisation: constants become fp32 that remembers its scales, the rest ops.

DequantizeLinear(constant)         ->   fp32 constant, with QuantParams in its type if of bytes
QuantizeLinear(x)                  ->   quantize(x)
DequantizeLinear(q)                ->   dequantize(q)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter, wrap_axis
from sparsec.frontend.onnx_ops_blocks import dequantize_blocks
from sparsec.frontend.tensors import dtype_of
from sparsec.ir.graph import Value
from sparsec.ir.op_helpers import text
from sparsec.ir.op_spec import Array
from sparsec.ir.types import DType, QuantParams

BYTES = (DType.U8, DType.I8)
STORED = (*BYTES, DType.U16, DType.I16)
# Their reciprocals are normal numbers of fp32 too, so that dividing and multiplying agree.
SMALLEST_SCALE, LARGEST_SCALE = 1e-37, 1e37


@dataclass(frozen=True, slots=True)
class Affine:
    """`real = (stored - zero_point) * scale`; one of each, or one per index of `axis`."""

    scale: Array  # float32
    zero_point: Array  # int64, of the shape of scale
    dtype: DType
    axis: int | None

    def along(self, parameter: Array, rank: int) -> Array:
        """A parameter that broadcasts over a tensor of `rank` axes."""
        if self.axis is None:
            return parameter.reshape(())
        return parameter.reshape([-1 if a == self.axis else 1 for a in range(rank)])

    @property
    def params(self) -> QuantParams:
        return QuantParams(tuple(self.scale.tolist()), tuple(self.zero_point.tolist()), self.axis)

    @property
    def attrs(self) -> dict[str, float | int]:
        return {"scale": float(self.scale[0]), "zero_point": int(self.zero_point[0])}


def quantize_linear(call: Call) -> Operand:
    """Rounds half to even; the result's type is that of the zero point."""
    if call.dtype() is not DType.F32:
        raise UnsupportedOp(f"only float32 is quantised, not {call.dtype().value}")
    affine = _affine(call, _stored_dtype(call))
    if affine.dtype not in STORED:
        raise _unsupported(affine.dtype)
    x = call.g.value(call.input(0))
    if x.data is not None:
        return call.g.graph.add_constant(_quantised(x.data, affine), _name(call, x))
    _require_one_scale(affine)
    return call.g.add("quantize", [x], dtype=affine.dtype, **affine.attrs)


def dequantize_linear(call: Call) -> Operand:
    """Constants are computed; those of bytes keep their scales in their type."""
    if call.attr("output_dtype", 0) and dtype_of(call.attr("output_dtype", 0), "") != DType.F32:
        raise UnsupportedOp("only float32 is made of quantised numbers; set no output_dtype")
    if call.attr("block_size", 0):
        return dequantize_blocks(call)
    affine = _affine(call, call.dtype())
    x = call.g.value(call.input(0))
    if x.data is not None:
        return _dequantised(call, x, affine)
    if affine.dtype not in STORED:
        raise _unsupported(affine.dtype)
    _require_one_scale(affine)
    return call.g.add("dequantize", [x], **affine.attrs)


def _stored_dtype(call: Call) -> DType:
    """What QuantizeLinear stores: the operand says it, or else the attribute, or else uint8."""
    wanted = call.attr("output_dtype", 0)
    zero_point = call.optional(2)
    if zero_point is None:
        return dtype_of(wanted, "output_dtype") if wanted else DType.U8
    if wanted and dtype_of(wanted, "output_dtype") is not zero_point.type.dtype:
        raise InvalidModel(f"output_dtype is not {zero_point.type.dtype.value}, the zero point's")
    return zero_point.type.dtype


def _affine(call: Call, dtype: DType) -> Affine:
    """The scale and zero point of a node, checked."""
    if call.attr("block_size", 0) or call.rank(1) > 1:
        raise UnsupportedOp("scales per block are not supported; quantise per tensor or channel")
    scale = _constant(call, 1, "scale")
    if scale.dtype != np.float32:
        raise UnsupportedOp(f"the scale is {scale.dtype}, only float32 is supported")
    _check_scale(scale)
    zero_point = np.zeros(scale.shape, np.int64)
    if call.optional(2) is not None:
        given = _constant(call, 2, "zero point")
        if DType.of(given.dtype) is not dtype:
            raise InvalidModel(f"the zero point is {given.dtype}, its tensor {dtype.value}")
        if given.size != scale.size:
            raise InvalidModel(f"{given.size} zero points do not go with {scale.size} scales")
        zero_point = given.astype(np.int64)
    return Affine(scale.reshape(-1), zero_point.reshape(-1), dtype, _axis(call, scale))


def _axis(call: Call, scale: Array) -> int | None:
    """The axis that the scales are along; one scale is for the whole tensor."""
    if scale.size == 1:
        return None
    axis = wrap_axis(call.attr("axis", 1), call.rank())
    size = call.shape()[axis]
    if size != scale.size:
        raise InvalidModel(
            f"{scale.size} scales do not go with axis {axis} of {text(call.shape())}: "
            f"one or {size} are wanted"
        )
    return axis


def _check_scale(scale: Array) -> None:
    if scale.size == 0:
        raise InvalidModel("there is no scale")
    wrong = scale[~((scale > SMALLEST_SCALE) & (scale < LARGEST_SCALE))]  # NaN is wrong too
    if wrong.size:
        raise InvalidModel(
            f"the scale {float(wrong.reshape(-1)[0])} is not a positive finite number "
            f"(between {SMALLEST_SCALE} and {LARGEST_SCALE}); quantise the model again"
        )


def _constant(call: Call, index: int, what: str) -> Array:
    data = call.g.value(call.input(index)).data
    if data is None:
        raise UnsupportedOp(
            f"the {what} depends on the inputs; only static quantisation is supported"
        )
    return data


def _require_one_scale(affine: Affine) -> None:
    if affine.axis is not None:
        raise UnsupportedOp(
            f"{affine.scale.size} scales for values that are no constant: activations have one "
            "scale per tensor; quantise only the weights per channel"
        )


def _unsupported(dtype: DType) -> UnsupportedOp:
    return UnsupportedOp(
        f"activations are quantised to integers of 8 or 16 bits, not to {dtype.value}"
    )


def _quantised(x: Array, affine: Affine) -> Array:
    limits = np.iinfo(affine.dtype.numpy)
    steps = np.rint(x / affine.along(affine.scale, x.ndim)).astype(np.float64)
    stored = steps + affine.along(affine.zero_point, x.ndim)
    return np.asarray(np.clip(stored, limits.min, limits.max)).astype(affine.dtype.numpy)


def _dequantised(call: Call, x: Value, affine: Affine) -> Value:
    assert x.data is not None
    if affine.dtype not in (*STORED, DType.I32):
        raise UnsupportedOp(
            f"constants are stored as integers of 8 or 16 bits or as int32, not {x.type}"
        )
    centred = x.data.astype(np.int64) - affine.along(affine.zero_point, x.data.ndim)
    with np.errstate(over="ignore"):
        data = centred.astype(np.float32) * affine.along(affine.scale, x.data.ndim)
    # The lowest number of fp32, which masks are made of, must not become -inf: 0 * -inf is NaN.
    largest = np.finfo(np.float32).max
    data = np.clip(data, -largest, largest)
    value = call.g.graph.add_constant(np.asarray(data, np.float32), _name(call, x))
    if affine.dtype in BYTES:
        call.g.graph.set_type(value, replace(value.type, quant=affine.params))
    return value


def _name(call: Call, x: Value) -> str:
    """Weights keep their name."""
    return call.g.graph.base_name(x.name)


QUANT: dict[str, Converter] = {
    "DequantizeLinear": dequantize_linear,
    "QuantizeLinear": quantize_linear,
}
