"""Element-wise ONNX ops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from sparsec.errors import UnsupportedOp
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter
from sparsec.frontend.tensors import dtype_of
from sparsec.ir.graph import Value


def direct(op: str, **fixed: Any) -> Converter:
    """An ONNX op that is an op of the IR, operand by operand."""

    def convert(call: Call) -> Operand:
        return call.g.add(op, call.present(), **fixed)

    return convert


def with_attributes(op: str, **defaults: Any) -> Converter:
    """As `direct`, with attributes of the same names as in ONNX."""

    def convert(call: Call) -> Operand:
        attrs = {name: call.attr(name, default) for name, default in defaults.items()}
        return call.g.add(op, call.present(), **attrs)

    return convert


def variadic(op: str) -> Converter:
    """An ONNX op of any number of operands, folded from the left."""

    def convert(call: Call) -> Operand:
        return reduce(lambda a, b: call.g.add(op, [a, b]), call.present())

    return convert


def mean(call: Call) -> Operand:
    total = variadic("add")(call)
    assert not isinstance(total, list)
    count = call.g.scalar(len(call.inputs), total.type.dtype)
    return call.g.add("div", [total, count])


def power(call: Call) -> Operand:
    """The result has the dtype of the base; the exponent may have another."""
    base, exponent = call.input(0), call.input(1)
    if base.type.dtype is exponent.type.dtype:
        return call.g.add("pow", [base, exponent])
    if base.type.dtype.is_float or not exponent.type.dtype.is_float:
        return call.g.add("pow", [base, call.g.cast(exponent, base.type.dtype)])
    wide = call.g.add("pow", [call.g.cast(base, exponent.type.dtype), exponent])
    return call.g.cast(wide, base.type.dtype)


def mod(call: Call) -> Operand:
    return call.g.add("mod", call.present(), fmod=bool(call.attr("fmod", 0)))


def clip(call: Call) -> Operand:
    """Constant limits are attributes of clip; others become maximum and minimum."""
    x, low, high = call.input(0), call.optional(1), call.optional(2)
    if _is_limit(low) and _is_limit(high):
        return call.g.add("clip", [x], min=_number(low), max=_number(high))
    x = x if low is None else call.g.add("maximum", [x, low])
    return x if high is None else call.g.add("minimum", [x, high])


def _is_limit(limit: Operand | None) -> bool:
    return limit is None or (isinstance(limit, Value) and limit.is_constant)


def _number(limit: Operand | None) -> float | None:
    if not isinstance(limit, Value) or limit.data is None:
        return None
    return float(limit.data.reshape(()))


def cast(call: Call) -> Operand:
    return call.g.cast(call.input(0), dtype_of(call.required("to"), "the cast"))


def cast_like(call: Call) -> Operand:
    return call.g.cast(call.input(0), call.dtype(1))


def is_inf(call: Call) -> Operand:
    x = call.input(0)
    infinite = call.g.add("is_inf", [x])
    zero = call.g.scalar(0, x.type.dtype)
    if not call.attr("detect_negative", 1):
        infinite = call.g.add("logical_and", [infinite, call.g.add("greater", [x, zero])])
    if not call.attr("detect_positive", 1):
        infinite = call.g.add("logical_and", [infinite, call.g.add("less", [x, zero])])
    return infinite


def gelu(call: Call) -> Operand:
    return call.g.add("gelu", call.present(), approximate=call.attr("approximate", "none"))


def swish(call: Call) -> Operand:
    x, alpha = call.input(0), call.attr("alpha", 1.0)
    if alpha == 1.0:
        return call.g.add("silu", [x])
    scaled = call.g.add("mul", [x, call.g.scalar(alpha, x.type.dtype)])
    return call.g.add("mul", [x, call.g.add("sigmoid", [scaled])])


def prelu(call: Call) -> Operand:
    x, slope = call.input(0), call.input(1)
    negative = call.g.add("less", [x, call.g.scalar(0, x.type.dtype)])
    return call.g.add("where", [negative, call.g.add("mul", [x, slope]), x])


def dropout(call: Call) -> list[Operand | None]:
    """Inference: the data passes unchanged and the mask is true everywhere."""
    training = call.optional(2)
    if training is not None and any(call.g.ints(training, "training_mode")):
        raise call.refuse("training mode (export the model with eval())")
    x = call.input(0)
    if len(call.outputs) < 2 or not call.outputs[1]:
        return [x]
    true = call.g.constant(np.asarray(True))
    return [x, call.g.broadcast_to(true, x.type.shape)]


def quantised(call: Call) -> Operand:
    raise UnsupportedOp(
        f"{call.op_type} has no lowering; quantise the model statically in QDQ format "
        "(QuantizeLinear and DequantizeLinear), or compile the float32 model"
    )


def _table(rows: Sequence[tuple[str, str]]) -> dict[str, Converter]:
    return {onnx_name: direct(op) for onnx_name, op in rows}


_DIRECT = [
    ("Abs", "abs"),
    ("Acos", "acos"),
    ("Acosh", "acosh"),
    ("Add", "add"),
    ("And", "logical_and"),
    ("Asin", "asin"),
    ("Asinh", "asinh"),
    ("Atan", "atan"),
    ("Atanh", "atanh"),
    ("BitwiseAnd", "bitwise_and"),
    ("BitwiseNot", "bitwise_not"),
    ("BitwiseOr", "bitwise_or"),
    ("BitwiseXor", "bitwise_xor"),
    ("Ceil", "ceil"),
    ("Cos", "cos"),
    ("Cosh", "cosh"),
    ("Div", "div"),
    ("Equal", "equal"),
    ("Erf", "erf"),
    ("Exp", "exp"),
    ("Floor", "floor"),
    ("Greater", "greater"),
    ("GreaterOrEqual", "greater_equal"),
    ("HardSwish", "hard_swish"),
    ("IsNaN", "is_nan"),
    ("Less", "less"),
    ("LessOrEqual", "less_equal"),
    ("Log", "log"),
    ("Mish", "mish"),
    ("Mul", "mul"),
    ("Neg", "neg"),
    ("Not", "logical_not"),
    ("Or", "logical_or"),
    ("Reciprocal", "reciprocal"),
    ("Relu", "relu"),
    ("Round", "round"),
    ("Sigmoid", "sigmoid"),
    ("Sign", "sign"),
    ("Sin", "sin"),
    ("Sinh", "sinh"),
    ("Softplus", "softplus"),
    ("Softsign", "softsign"),
    ("Sqrt", "sqrt"),
    ("Sub", "sub"),
    ("Tan", "tan"),
    ("Tanh", "tanh"),
    ("Where", "where"),
    ("Xor", "logical_xor"),
]

_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875

MATH: dict[str, Converter] = {
    **_table(_DIRECT),
    "Cast": cast,
    "CastLike": cast_like,
    "Clip": clip,
    "Dropout": dropout,
    "Elu": with_attributes("elu", alpha=1.0),
    "Gelu": gelu,
    "HardSigmoid": with_attributes("hard_sigmoid", alpha=0.2, beta=0.5),
    "IsInf": is_inf,
    "LeakyRelu": with_attributes("leaky_relu", alpha=0.01),
    "Max": variadic("maximum"),
    "Mean": mean,
    "Min": variadic("minimum"),
    "Mod": mod,
    "PRelu": prelu,
    "Pow": power,
    "Selu": with_attributes("selu", alpha=_SELU_ALPHA, gamma=_SELU_GAMMA),
    "Sum": variadic("add"),
    "Swish": swish,
}
