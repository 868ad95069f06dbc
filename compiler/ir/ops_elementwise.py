"""Ops that treat every element alike, with NumPy broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.erf import erf
from sparsec.ir.op_helpers import (
    Env,
    array,
    broadcast,
    elementwise_layout,
    operand,
    pointwise,
    require_float,
    same_dtype,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, Evaluate, Infer, OpSpec, Types
from sparsec.ir.types import DType, TensorType

Check = Callable[[TensorType], None]


def infer_elementwise(count: int, check: Check | None, result: DType | None = None) -> Infer:
    """`infer` of `count` operands of one dtype; the result has that dtype, or `result`."""

    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        if len(types) != count:
            raise InvalidGraph(f"takes {count} operands, got {len(types)}")
        operands = [operand(types, i) for i in range(count)]
        dtype = same_dtype(operands)
        if check is not None:
            check(operands[0])
        shape = broadcast([t.shape for t in operands])
        layout = elementwise_layout(operands, shape)
        return [TensorType(dtype if result is None else result, shape, layout)]

    return infer


def _numeric(type: TensorType) -> None:
    if type.dtype is DType.BOOL:
        raise InvalidGraph(f"needs numbers, got {type}")


def _bool(type: TensorType) -> None:
    if type.dtype is not DType.BOOL:
        raise InvalidGraph(f"needs a bool operand, got {type}")


def _bits(type: TensorType) -> None:
    if type.dtype.is_float:
        raise InvalidGraph(f"needs an integer or bool operand, got {type}")


def to_bool(function: Callable[..., Any]) -> Evaluate:
    """`evaluate` of an op whose result is bool."""

    def evaluate(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
        operands = [array(arrays, i) for i in range(len(arrays))]
        with np.errstate(all="ignore"):
            return [np.asarray(function(*operands), np.bool_)]

    return evaluate


def with_attrs(function: Callable[..., Any]) -> Evaluate:
    """`evaluate` of a unary op that takes its attributes as keywords."""

    def evaluate(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
        x = array(arrays, 0)
        with np.errstate(all="ignore"):
            return [np.asarray(function(x, **attrs)).astype(x.dtype, copy=False)]

    return evaluate


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)); exp may overflow to inf, whose reciprocal is the right 0."""
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def gelu(x: Array, approximate: str = "none") -> Array:
    """Gaussian error linear unit: the erf form, or the tanh form when `approximate` is "tanh"."""
    wide = x.astype(np.float64)
    if approximate == "tanh":
        inner = np.sqrt(2.0 / np.pi) * (wide + 0.044715 * wide**3)
        return np.asarray((0.5 * wide * (1.0 + np.tanh(inner))).astype(x.dtype))
    return np.asarray((0.5 * wide * (1.0 + erf(wide / np.sqrt(2.0)))).astype(x.dtype))


# What a product may apply to its result.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: gelu(x, "none"),
    "gelu_tanh": lambda x: gelu(x, "tanh"),
    "tanh": lambda x: np.asarray(np.tanh(x)),
    "silu": lambda x: np.asarray(x * sigmoid(x)),
    "sigmoid": sigmoid,
}


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) without overflow."""
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def _elu(x: Array, alpha: float) -> Any:
    return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)


def _selu(x: Array, alpha: float, gamma: float) -> Any:
    return gamma * _elu(x, alpha)


def _hard_sigmoid(x: Array, alpha: float, beta: float) -> Any:
    return np.clip(alpha * x + beta, 0, 1)


def _div(a: Array, b: Array) -> Any:
    if np.issubdtype(a.dtype, np.floating):
        return a / b
    if not np.issubdtype(a.dtype, np.signedinteger):
        return a // b
    quotient = a // b  # rounds down; C and ONNX truncate
    return quotient + ((quotient < 0) & (quotient * b != a))


def _evaluate_mod(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    a, b = array(arrays, 0), array(arrays, 1)
    with np.errstate(all="ignore"):
        result = np.fmod(a, b) if attrs.get("fmod", False) else np.mod(a, b)
    return [np.asarray(result)]


def _infer_where(types: Types, attrs: Attrs) -> list[TensorType]:
    condition, a, b = (operand(types, i) for i in range(3))
    _bool(condition)
    dtype = same_dtype([a, b])
    shape = broadcast([condition.shape, a.shape, b.shape])
    return [TensorType(dtype, shape, elementwise_layout([condition, a, b], shape))]


def _evaluate_where(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return [np.where(array(arrays, 0), array(arrays, 1), array(arrays, 2))]


def _evaluate_clip(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x = array(arrays, 0)
    low, high = attrs.get("min"), attrs.get("max")
    # When min > max ONNX wants max everywhere: NumPy does the same in this order.
    result = x if low is None else np.maximum(x, _limit(low, x.dtype))
    result = result if high is None else np.minimum(result, _limit(high, x.dtype))
    return [np.asarray(result)]


def _limit(value: float, dtype: np.dtype[Any]) -> Any:
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return dtype.type(min(max(value, info.min), info.max))
    return dtype.type(value)


def _infer_cast(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    return [TensorType(attrs["to"], x.shape, x.layout)]


def _evaluate_cast(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    to: DType = attrs["to"]
    with np.errstate(all="ignore"):
        return [array(arrays, 0).astype(to.numpy)]


# name -> (function, check of the operand)
_UNARY: dict[str, tuple[Callable[..., Any], Check]] = {
    "neg": (np.negative, _numeric),
    "abs": (np.abs, _numeric),
    "sign": (np.sign, _numeric),
    "relu": (lambda x: np.maximum(x, 0), _numeric),
    "exp": (np.exp, require_float),
    "log": (np.log, require_float),
    "sqrt": (np.sqrt, require_float),
    "reciprocal": (np.reciprocal, require_float),
    "tanh": (np.tanh, require_float),
    "erf": (erf, require_float),
    "sigmoid": (sigmoid, require_float),
    "silu": (lambda x: x * sigmoid(x), require_float),
    "softplus": (softplus, require_float),
    "softsign": (lambda x: x / (1 + np.abs(x)), require_float),
    "mish": (lambda x: x * np.tanh(softplus(x)), require_float),
    "hard_swish": (lambda x: x * np.clip(x / 6 + 0.5, 0, 1), require_float),
    "floor": (np.floor, require_float),
    "ceil": (np.ceil, require_float),
    "round": (np.rint, require_float),
    "sin": (np.sin, require_float),
    "cos": (np.cos, require_float),
    "tan": (np.tan, require_float),
    "sinh": (np.sinh, require_float),
    "cosh": (np.cosh, require_float),
    "asin": (np.arcsin, require_float),
    "acos": (np.arccos, require_float),
    "atan": (np.arctan, require_float),
    "asinh": (np.arcsinh, require_float),
    "acosh": (np.arccosh, require_float),
    "atanh": (np.arctanh, require_float),
    "logical_not": (np.logical_not, _bool),
    "bitwise_not": (np.bitwise_not, _bits),
}

_UNARY_WITH_ATTRS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "gelu": (gelu, ("approximate",)),
    "leaky_relu": (lambda x, alpha: np.where(x < 0, alpha * x, x), ("alpha",)),
    "elu": (_elu, ("alpha",)),
    "selu": (_selu, ("alpha", "gamma")),
    "hard_sigmoid": (_hard_sigmoid, ("alpha", "beta")),
}

_BINARY: dict[str, tuple[Callable[..., Any], Check]] = {
    "add": (np.add, _numeric),
    "sub": (np.subtract, _numeric),
    "mul": (np.multiply, _numeric),
    "div": (_div, _numeric),
    "pow": (np.power, _numeric),
    "maximum": (np.maximum, _numeric),
    "minimum": (np.minimum, _numeric),
    "bitwise_and": (np.bitwise_and, _bits),
    "bitwise_or": (np.bitwise_or, _bits),
    "bitwise_xor": (np.bitwise_xor, _bits),
    "logical_and": (np.logical_and, _bool),
    "logical_or": (np.logical_or, _bool),
    "logical_xor": (np.logical_xor, _bool),
}

_COMPARE: dict[str, tuple[Callable[..., Any], int]] = {
    "equal": (np.equal, 2),
    "less": (np.less, 2),
    "less_equal": (np.less_equal, 2),
    "greater": (np.greater, 2),
    "greater_equal": (np.greater_equal, 2),
    "is_nan": (np.isnan, 1),
    "is_inf": (np.isinf, 1),
}


def _rows() -> list[OpSpec]:
    rows: list[OpSpec] = []
    for name, (function, check) in _UNARY.items():
        rows.append(OpSpec(name, infer_elementwise(1, check), pointwise(function), (), True))
    for name, (function, attrs) in _UNARY_WITH_ATTRS.items():
        infer = infer_elementwise(1, require_float)
        rows.append(OpSpec(name, infer, with_attrs(function), attrs, True))
    for name, (function, check) in _BINARY.items():
        rows.append(OpSpec(name, infer_elementwise(2, check), pointwise(function), (), True))
    for name, (function, count) in _COMPARE.items():
        infer = infer_elementwise(count, None, DType.BOOL)
        rows.append(OpSpec(name, infer, to_bool(function), (), True))
    mod_infer = infer_elementwise(2, _numeric)
    clip_infer = infer_elementwise(1, _numeric)
    return [
        *rows,
        OpSpec("mod", mod_infer, _evaluate_mod, ("fmod",), True),
        OpSpec("where", _infer_where, _evaluate_where, (), True),
        OpSpec("clip", clip_infer, _evaluate_clip, ("min", "max"), True),
        OpSpec("cast", _infer_cast, _evaluate_cast, ("to",), True),
    ]


ELEMENTWISE_OPS = {row.name: row for row in _rows()}
