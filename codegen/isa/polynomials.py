"""Elementary functions as polynomials, because LLVM would call libm once per lane.

Each takes a vector and returns a vector, and emits bound intermediate values into the kernel
that is being built. Error bounds, in units in the last place (ulp) of fp32, are asserted by the
tests. NaN gives NaN. The coefficients are minimax fits of the relative error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.vector import VectorIsa, keep, splat

Unary = Callable[[VectorIsa, Any], Any]

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # 9 bits of mantissa: n * _LN2_HIGH is exact
_LN2_LOW = -2.12194440e-4
# exp(r) = 1 + r + r**2 * p(r) for |r| <= ln(2) / 2, relative error 3.1e-9
_EXP = (0.4999999344778319, 0.16666520631667825, 0.04166838804802007, 8.368716883564222e-3,
        1.381459851354423e-3)  # fmt: skip
# erf(x) = x * p(x**2) / q(x**2) for |x| <= 3.925, relative error 5.3e-8
_ERF_LIMIT = 3.925
_ERF_P = (1.1283791081446213, 0.20036431046560776, 0.0506311041292941, 3.7191467995490923e-3,
          1.4217049433239905e-4, -1.956586501363759e-6, 1.9869518618489664e-8)  # fmt: skip
_ERF_Q = (1.0, 0.5108998786042566, 0.11517964092644985, 0.01438995693710652,
          9.599595764737027e-4)  # fmt: skip
# tanh(x) = x * p(x**2) / q(x**2) for |x| <= 9.02, relative error 1.4e-9
_TANH_LIMIT = 9.02
_TANH_P = (0.9999999986920957, 0.136799149555493, 3.868327618267587e-3, 2.8007457079123927e-5,
           3.0585020490282276e-8, -1.2203466128640451e-11)  # fmt: skip
_TANH_Q = (1.0, 0.470132470162771, 0.027245838300420672, 3.9386309197282453e-4,
           1.2873665078362294e-6)  # fmt: skip


def exp(v: VectorIsa, x: Any) -> Any:
    """e**x over the whole range, denormals and infinity included; at most 2 ulp."""
    p, n = _exp_reduced(v, clamp(v, x, -104.0, 89.0))
    return keep(v.scale(p, n))


def exp_negative(v: VectorIsa, x: Any) -> Any:
    """e**x for x <= 0, at most 2 ulp; 1.2e-38, the least normal float, below its logarithm."""
    p, n = _exp_reduced(v, at_least(v, x, -87.336))
    return keep(v.scale_normal(p, n))


def _exp_reduced(v: VectorIsa, x: Any) -> tuple[Any, Any]:
    """(p, n) with e**x = p * 2**n."""
    n = keep(T.nearbyint(x * splat(_LOG2_E, v.lanes)))
    r = keep(x - n * splat(_LN2_HIGH, v.lanes))
    r = keep(r - n * splat(_LN2_LOW, v.lanes))
    tail = horner(v, r, _EXP)
    return keep(r * r * tail + r + splat(1.0, v.lanes)), n


def erf(v: VectorIsa, x: Any) -> Any:
    """The error function, at most 8 ulp."""
    return _odd_rational(v, x, _ERF_LIMIT, _ERF_P, _ERF_Q)


def tanh(v: VectorIsa, x: Any) -> Any:
    """The hyperbolic tangent, at most 8 ulp."""
    return _odd_rational(v, x, _TANH_LIMIT, _TANH_P, _TANH_Q)


def _odd_rational(
    v: VectorIsa, x: Any, limit: float, above: Sequence[float], below: Sequence[float]
) -> Any:
    x = clamp(v, x, -limit, limit)
    square = keep(x * x)
    value = keep(x * horner(v, square, above) / horner(v, square, below))
    return clamp(v, value, -1.0, 1.0)


def gelu(v: VectorIsa, x: Any) -> Any:
    """x * Phi(x), through erf; absolute error below 1e-6 * max(1, |x|)."""
    half = keep(x * splat(0.5, v.lanes))
    return half * erf(v, x * splat(0.7071067811865476, v.lanes)) + half


def gelu_tanh(v: VectorIsa, x: Any) -> Any:
    """x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x**3): the tanh form of GELU."""
    slope, cubic = 0.7978845608028654, 0.7978845608028654 * 0.044715
    u = x * (x * x * splat(2 * cubic, v.lanes) + splat(2 * slope, v.lanes))
    return x * sigmoid(v, keep(u))


def sigmoid(v: VectorIsa, x: Any) -> Any:
    """1 / (1 + e**-x), at most 4 ulp where the result is a normal float."""
    one = splat(1.0, v.lanes)
    return keep(one / (one + exp(v, keep(splat(0.0, v.lanes) - x))))


def silu(v: VectorIsa, x: Any) -> Any:
    """x * sigmoid(x)."""
    return x * sigmoid(v, x)


def relu(v: VectorIsa, x: Any) -> Any:
    """max(x, 0), NaN for NaN."""
    return at_least(v, x, 0.0)


def identity(v: VectorIsa, x: Any) -> Any:
    """x."""
    return x


ACTIVATIONS: dict[str, Unary] = {
    "none": identity,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "tanh": tanh,
    "silu": silu,
    "sigmoid": sigmoid,
}


def horner(v: VectorIsa, x: Any, coefficients: Sequence[float]) -> Any:
    """c[0] + c[1] x + c[2] x**2 ..., one fused multiply-add per step."""
    *rest, last = coefficients
    value = splat(last, v.lanes)
    for c in reversed(rest):
        value = value * x + splat(c, v.lanes)
    return keep(value)


def at_least(v: VectorIsa, x: Any, low: float) -> Any:
    """max(x, low), NaN for NaN: the comparison is false then and x stays."""
    bound = splat(low, v.lanes)
    return keep(T.Select(bound > x, bound, x))


def at_most(v: VectorIsa, x: Any, high: float) -> Any:
    """min(x, high), NaN for NaN."""
    bound = splat(high, v.lanes)
    return keep(T.Select(bound < x, bound, x))


def clamp(v: VectorIsa, x: Any, low: float, high: float) -> Any:
    """x limited to [low, high], NaN for NaN."""
    return at_most(v, at_least(v, x, low), high)
