"""Elementwise ops as scalar expressions, and their broadcasting loops.

Bool values are bytes here, 0 or 1; a comparison may stay a TIR bool, the store converts it.
Functions that no instruction computes come from libm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from sparsec.codegen.generic_base import Application, Plan, convert, injective, storage, wide
from sparsec.ir.dims import Dim, product
from sparsec.ir.types import DType

Scalar = Callable[..., Any]


def elementwise(app: Application) -> Plan:
    """Adjacent axes that every operand treats alike are one loop."""
    operands = app.operands
    runs = broadcast_runs(app.result.shape, [t.shape for t in operands])
    dims = [product(app.result.shape[a] for a in axes) for axes, _ in runs]
    places = [[r for r, (_, full) in enumerate(runs) if full[n]] for n in range(len(operands))]
    inputs = [app.placeholder(n, [dims[r] for r in place]) for n, place in enumerate(places)]

    def value(*index: Any) -> Any:
        scalars = []
        for tensor, place, type in zip(inputs, places, operands, strict=True):
            at = [index[r] for r in place] or [0]
            scalars.append(convert(tensor(*at), wide(type.dtype)))
        return _evaluate(app, scalars)

    return injective(app, dims, inputs, value)


def broadcast_runs(
    shape: Sequence[Dim], operands: Sequence[Sequence[Dim]]
) -> list[tuple[list[int], tuple[bool, ...]]]:
    """The axes of `shape` longer than 1, in runs, with the operands that are not broadcast."""
    runs: list[tuple[list[int], tuple[bool, ...]]] = []
    for axis, dim in enumerate(shape):
        back = axis - len(shape)
        full = tuple(len(o) >= -back and o[back] != 1 for o in operands)
        if dim == 1:
            continue
        if runs and runs[-1][1] == full:
            runs[-1][0].append(axis)
        else:
            runs.append(([axis], full))
    return runs


def _evaluate(app: Application, scalars: list[Any]) -> Any:
    if app.op == "cast":
        return _cast(scalars[0], app.operands[0].dtype, app.result.dtype)
    if app.op == "bitwise_not" and app.result.dtype is DType.BOOL:
        return equals(scalars[0], 0)
    return SCALARS[app.op](*scalars, **app.attrs)


def _dtype(x: Any) -> str:
    return str(x.ty.dtype)


def _is_float(x: Any) -> bool:
    return _dtype(x).startswith("float")


def _const(value: float, like: Any) -> Any:
    return tirx.const(value, _dtype(like))


def equals(a: Any, b: Any) -> Any:
    """a == b as an expression; `b` may be a number."""
    return tirx.EQ(a, _const(b, a) if isinstance(b, int | float) else b)


def differs(a: Any, b: Any) -> Any:
    """a != b as an expression; `b` may be a number. False for NaN."""
    return tirx.NE(a, _const(b, a) if isinstance(b, int | float) else b)


def _libm(name: str) -> Scalar:
    def call(*args: Any) -> Any:
        suffix = "f" if _dtype(args[0]) == "float32" else ""
        return tirx.call_pure_extern(_dtype(args[0]), name + suffix, *args)

    return call


exp, log, _tanh = _libm("exp"), _libm("log"), _libm("tanh")


def _abs(x: Any) -> Any:
    if _dtype(x).startswith("uint"):
        return x
    return tirx.abs(x) if _is_float(x) else tirx.Select(x < 0, _const(0, x) - x, x)


def _sign(x: Any) -> Any:
    if _dtype(x).startswith("uint"):
        return tirx.Select(x > 0, _const(1, x), _const(0, x))
    negative = tirx.Select(x < 0, _const(-1, x), x)  # x itself: 0 and NaN
    return tirx.Select(x > 0, _const(1, x), negative)


def maximum(a: Any, b: Any) -> Any:
    """The larger; NaN when there is one, as NumPy and ONNX have it."""
    return tirx.Select(tirx.any(a > b, tirx.isnan(a)) if _is_float(a) else a > b, a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller; NaN when there is one."""
    return tirx.Select(tirx.any(a < b, tirx.isnan(a)) if _is_float(a) else a < b, a, b)


def _relu(x: Any) -> Any:
    return tirx.Select(x < 0, _const(0, x), x)


def _sigmoid(x: Any) -> Any:
    return _const(1, x) / (_const(1, x) + exp(-x))


def _softplus(x: Any) -> Any:
    return _relu(x) + _libm("log1p")(exp(-tirx.abs(x)))


def _hard_swish(x: Any) -> Any:
    return x * _clip(x / _const(6, x) + _const(0.5, x), 0, 1)


def _gelu(x: Any, approximate: str = "none") -> Any:
    # Both forms are written without 1 + f(x), which would cancel for large negative x.
    if approximate == "tanh":
        inner = x + _const(0.044715, x) * x * x * x
        return x / (_const(1, x) + exp(_const(-2 * math.sqrt(2 / math.pi), x) * inner))
    return _const(0.5, x) * x * _libm("erfc")(x * _const(-math.sqrt(0.5), x))


def _leaky_relu(x: Any, alpha: float) -> Any:
    return tirx.Select(x < 0, _const(alpha, x) * x, x)


def _elu(x: Any, alpha: float) -> Any:
    low = tirx.Select(x < 0, x, _const(0, x))
    return tirx.Select(x < 0, _const(alpha, x) * _libm("expm1")(low), x)


def _selu(x: Any, alpha: float, gamma: float) -> Any:
    return _const(gamma, x) * _elu(x, alpha)


def _hard_sigmoid(x: Any, alpha: float, beta: float) -> Any:
    return _clip(_const(alpha, x) * x + _const(beta, x), 0, 1)


def _clip(x: Any, min: float | None = None, max: float | None = None) -> Any:
    if min is not None:
        x = maximum(x, _limit(min, x))
    return x if max is None else minimum(x, _limit(max, x))


def _limit(value: float, x: Any) -> Any:
    if _is_float(x):
        return _const(value, x)
    info = DType(_dtype(x)).numpy
    signed = info.kind == "i"
    bits = 8 * info.itemsize - signed
    low, high = (-(1 << bits) if signed else 0), (1 << bits) - 1
    return tirx.const(int(_clamp(value, low, high)), _dtype(x))


def _clamp(value: float, low: int, high: int) -> float:
    return low if value < low else high if value > high else value


def _safe_divisor(b: Any) -> Any:
    """`b`, but 1 where the CPU would trap: for 0, and for -1, where the quotient may overflow."""
    trap = equals(b, 0)
    if _dtype(b).startswith("int"):
        trap = tirx.any(trap, equals(b, -1))
    return tirx.Select(trap, _const(1, b), b)


def _div(a: Any, b: Any) -> Any:
    if _is_float(a):
        return a / b
    quotient = tirx.truncdiv(a, _safe_divisor(b))
    if _dtype(b).startswith("int"):
        quotient = tirx.Select(equals(b, -1), _const(0, a) - a, quotient)
    return tirx.Select(equals(b, 0), _const(0, a), quotient)


def _mod(a: Any, b: Any, fmod: bool = False) -> Any:
    if _is_float(a):
        rest = _libm("fmod")(a, b)
    else:
        rest = tirx.truncmod(a, _safe_divisor(b))
        rest = tirx.Select(equals(b, 0), _const(0, a), rest)
    if fmod or _dtype(a).startswith("uint"):
        return rest
    signs_differ = tirx.any(tirx.all(rest < 0, b > 0), tirx.all(rest > 0, b < 0))
    return tirx.Select(signs_differ, rest + b, rest)


def _cast(x: Any, source: DType, to: DType) -> Any:
    if to is DType.BOOL:
        # TVM's != is false for NaN.
        return tirx.any(differs(x, 0), tirx.isnan(x)) if source.is_float else differs(x, 0)
    if source.is_float and not to.is_float and to.bytes < 8:
        # Through a type that is wide enough, then wrapped: what x86 does for NumPy.
        x = x.astype("int32" if to.bytes < 4 or to is DType.I32 else "int64")
    return convert(x, storage(to))


def _is_nan(x: Any) -> Any:
    return tirx.isnan(x) if _is_float(x) else tirx.const(False, "bool")


def _is_inf(x: Any) -> Any:
    if not _is_float(x):
        return tirx.const(False, "bool")
    return equals(tirx.abs(x), math.inf)


SCALARS: dict[str, Scalar] = {
    "neg": lambda x: _const(0, x) - x if not _is_float(x) else -x,
    "abs": _abs,
    "sign": _sign,
    "relu": _relu,
    "sqrt": tirx.sqrt,
    "reciprocal": lambda x: _const(1, x) / x,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "softplus": _softplus,
    "softsign": lambda x: x / (_const(1, x) + tirx.abs(x)),
    "mish": lambda x: x * _tanh(_softplus(x)),
    "hard_swish": _hard_swish,
    "floor": tirx.floor,
    "ceil": tirx.ceil,
    "round": tirx.nearbyint,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "selu": _selu,
    "hard_sigmoid": _hard_sigmoid,
    "logical_not": lambda x: equals(x, 0),
    "bitwise_not": lambda x: ~x,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _div,
    "mod": _mod,
    "pow": _libm("pow"),
    "maximum": maximum,
    "minimum": minimum,
    "bitwise_and": lambda a, b: a & b,
    "bitwise_or": lambda a, b: a | b,
    "bitwise_xor": lambda a, b: a ^ b,
    "logical_and": lambda a, b: tirx.all(differs(a, 0), differs(b, 0)),
    "logical_or": lambda a, b: tirx.any(differs(a, 0), differs(b, 0)),
    "logical_xor": differs,
    "equal": equals,
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: tirx.any(a < b, equals(a, b)),
    "greater": lambda a, b: b < a,
    "greater_equal": lambda a, b: tirx.any(b < a, equals(a, b)),
    "is_nan": _is_nan,
    "is_inf": _is_inf,
    "where": lambda condition, a, b: tirx.Select(differs(condition, 0), a, b),
    "clip": _clip,
    "broadcast_to": lambda x, shape: x,
    **{
        name: _libm(function)
        for name, function in (
            *((n, n) for n in ("exp", "log", "tanh", "erf", "sin", "cos", "tan", "sinh", "cosh")),
            *((n, n) for n in ("asinh", "acosh", "atanh", "asin", "acos", "atan")),
        )
    },
}
ELEMENTWISE: dict[str, Callable[[Application], Plan]] = {
    name: elementwise for name in [*SCALARS, "cast"]
}
