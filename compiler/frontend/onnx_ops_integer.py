"""Operators of quantised tensors: QLinear* and the integer product with its dynamic scales.

QLinearMatMul(a, .., b, .., y scale)   ->   quantize(matmul(dequantize(a), dequantize(b)))
DynamicQuantizeLinear, MatMulInteger   ->   ops of their own, for the pass absorb_dynamic

The first is what the standard says these operators mean; passes find the int8 products in it as
they do in a QDQ model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sparsec.errors import InvalidModel
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter
from sparsec.frontend.onnx_ops_math import MATH
from sparsec.frontend.onnx_ops_nn import gemm
from sparsec.frontend.onnx_ops_quant import BYTES, dequantize_linear, quantize_linear
from sparsec.frontend.onnx_ops_reduce import REDUCE
from sparsec.frontend.onnx_ops_shape import SHAPE
from sparsec.ir.graph import Value
from sparsec.ir.types import DType


def dequantized(
    call: Call, index: int, axis: int = -1, *, scale: int = 0, zero_point: int = 0
) -> Operand:
    """The fp32 numbers of operand `index`, whose scale and zero point are the next two.

    Scales per channel are along `axis`. `scale` and `zero_point` are the indices of those that
    lie elsewhere.
    """
    places = (index, scale or index + 1, zero_point or index + 2)
    x, scales, zeros = (call.optional(i) for i in places)
    if x is None or scales is None:
        raise InvalidModel(f"operand {index} and its scale (operand {places[1]}) are required")
    wanted = {DType.I32} if zeros is None else {zeros.type.dtype}
    if x.type.dtype not in BYTES and x.type.dtype not in wanted:
        raise InvalidModel(f"operand {index} must be uint8 or int8, got {x.type.dtype.value}")
    attrs = {"axis": axis} if x.type.rank else {}
    return _one(dequantize_linear(replace(call, inputs=(x, scales, zeros), attrs=attrs)))


def quantized(call: Call, y: Operand, scale: int) -> Operand:
    """`y` stored with the scale at operand `scale` and the zero point behind it."""
    inputs = (y, call.input(scale), call.optional(scale + 1))
    return quantize_linear(replace(call, inputs=inputs, attrs={}))


def _one(result: Operand | list[Operand | None]) -> Operand:
    operand = result[0] if isinstance(result, list) else result
    assert operand is not None
    return operand


def qlinear_matmul(call: Call) -> Operand:
    b_axis = max(call.rank(3) - 1, 0)
    a, b = dequantized(call, 0, max(call.rank() - 2, 0)), dequantized(call, 3, b_axis)
    return quantized(call, call.g.add("matmul", [a, b]), 6)


def qgemm(call: Call) -> Operand:
    """alpha a b + c, with c in steps of alpha * (scale of a) * (scale of b); u8, i8 or fp32."""
    a, b = dequantized(call, 0), dequantized(call, 3, 0 if call.attr("transB", 0) else 1)
    c = call.optional(6)
    if c is not None:
        if c.type.dtype is not DType.I32:
            raise InvalidModel(f"operand 6 (C) must be int32, got {c.type.dtype.value}")
        g, alpha = call.g, call.g.scalar(call.attr("alpha", 1.0), DType.F32)
        step = g.add("mul", [g.add("mul", [call.input(1), call.input(4)]), alpha])
        c = g.add("mul", [g.cast(c, DType.F32), step])
    y = gemm(replace(call, inputs=(a, b, c)))
    return y if call.optional(7) is None else quantized(call, y, 7)


def on_numbers(converter: Converter, count: int) -> Converter:
    """An op over `count` quantised operands, each with its scale and zero point."""

    def convert(call: Call) -> Operand:
        inputs = tuple(dequantized(call, 3 * i) for i in range(count))
        return quantized(call, _one(converter(replace(call, inputs=inputs))), 3 * count)

    return convert


def qlinear_softmax(call: Call) -> Operand:
    """The attribute `opset` says which standard's softmax is meant; its axis is the last one."""
    x, axis = dequantized(call, 0), {"axis": call.attr("axis", -1)}
    plain = replace(call, inputs=(x,), opset=call.attr("opset", 13), attrs={**call.attrs, **axis})
    return quantized(call, _one(REDUCE["Softmax"](plain)), 3)


def qlinear_concat(call: Call) -> Operand:
    inputs = tuple(dequantized(call, i) for i in range(2, len(call.inputs), 3))
    return quantized(call, _one(SHAPE["Concat"](replace(call, inputs=inputs))), 0)


def qlinear_where(call: Call) -> Operand:
    operands = [call.input(0), dequantized(call, 1), dequantized(call, 4)]
    return quantized(call, call.g.add("where", operands), 7)


def dynamic_quantize_linear(call: Call) -> list[Operand | None]:
    return list(_dynamic(call, call.input(0)))


def _dynamic(call: Call, x: Operand) -> tuple[Value, ...]:
    node = call.g.graph.add_node("dynamic_quantize", [call.g.value(x)], name=call.g.name or None)
    return node.outputs


def matmul_integer(call: Call) -> Operand:
    return call.g.add("matmul_integer", [call.optional(i) for i in range(4)])


def matmul_integer_to_float(call: Call) -> Operand:
    """a, b, scale of a, scale of b, zero point of a?, of b?, bias?"""
    scale, zero = call.g.value(call.input(2)), call.optional(4)
    if scale.is_constant and (zero is None or call.g.value(zero).is_constant):
        a = dequantized(call, 0, scale=2, zero_point=4)
        b = dequantized(call, 1, scale=3, zero_point=5)
        return _plus(call, call.g.add("matmul", [a, b]), 6)
    factors = [call.g.value(call.input(i)) for i in (2, 3)]
    return integer_product(call, [call.optional(i) for i in (0, 1, 4, 5)], factors, 6)


def dynamic_quantize_matmul(call: Call) -> Operand:
    """a in fp32, b, scale of b, zero point of b?, bias?"""
    stored, scale, zero = _dynamic(call, call.input(0))
    operands = [stored, call.input(1), zero, call.optional(3)]
    return integer_product(call, operands, [scale, call.g.value(call.input(2))], 4)


def integer_product(
    call: Call, operands: list[Operand | None], scales: list[Value], bias: int
) -> Operand:
    """matmul_integer in fp32, with the bias at operand `bias`, spelled as exporters spell it."""
    g = call.g
    total = g.cast(g.add("matmul_integer", operands), DType.F32)
    return _plus(call, g.add("mul", [total, g.add("mul", scales)]), bias)


def _plus(call: Call, y: Operand, index: int) -> Operand:
    bias = call.optional(index)
    return y if bias is None else call.g.add("add", [y, bias])


INTEGER: dict[str, Converter] = {
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QLinearMatMul": qlinear_matmul,
}
# Of the domain com.microsoft, which ONNX Runtime's quantiser writes.
_ON_NUMBERS: Mapping[str, tuple[Converter, int]] = {
    "QLinearAdd": (MATH["Add"], 2),
    "QLinearLeakyRelu": (MATH["LeakyRelu"], 1),
    "QLinearMul": (MATH["Mul"], 2),
    "QLinearReduceMean": (REDUCE["ReduceMean"], 1),
    "QLinearSigmoid": (MATH["Sigmoid"], 1),
}
MICROSOFT_INTEGER: dict[str, Converter] = {
    **{name: on_numbers(*row) for name, row in _ON_NUMBERS.items()},
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "MatMulIntegerToFloat": matmul_integer_to_float,
    "QGemm": qgemm,
    "QLinearConcat": qlinear_concat,
    "QLinearSoftmax": qlinear_softmax,
    "QLinearWhere": qlinear_where,
}
