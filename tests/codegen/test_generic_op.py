"""Every generic kernel against the op's meaning, at sizes around the edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.generic_op import BUILDERS, GenericOp, generic_op
from sparsec.ir.dims import Dim, evaluate, maximum, minimum, symbol
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType, TensorType

B, S = symbol("batch"), symbol("seq")
F16, F32, F64 = DType.F16, DType.F32, DType.F64
I8, U8, I32, I64, BOOL = DType.I8, DType.U8, DType.I32, DType.I64, DType.BOOL
SIZES = [(1, 1), (1, 7), (3, 1), (2, 33), (5, 16)]
Array = np.ndarray[Any, Any]


def t(dtype: DType, *shape: Dim) -> TensorType:
    return TensorType(dtype, shape)


def case(op: str, *operands: TensorType, **attrs: Any) -> GenericOp:
    (result,) = OPS[op].infer(operands, attrs)
    return generic_op(op, attrs, operands, result, "avx2")


def title(kernel: GenericOp) -> str:
    """A test's name."""
    types = "-".join(str(t).replace(" ", "") for t in kernel.operands)
    return f"{kernel.op}-{types}-{'-'.join(str(v) for _, v in kernel.attrs)}"


FULL = t(F32, B, S, 6)
UNARY = [
    *("neg", "abs", "sign", "relu", "exp", "log", "sqrt", "reciprocal", "tanh", "erf", "sigmoid"),
    *(
        "silu",
        "softplus",
        "softsign",
        "mish",
        "hard_swish",
        "floor",
        "ceil",
        "round",
        "sin",
        "cos",
    ),
    *("tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh"),
    *("is_nan", "is_inf"),
]
COMPARE = ["equal", "less", "less_equal", "greater", "greater_equal"]
ARITHMETIC = ["add", "sub", "mul", "div", "pow", "maximum", "minimum"]
BITS = ["bitwise_and", "bitwise_or", "bitwise_xor"]
LOGICAL = ["logical_and", "logical_or", "logical_xor"]
NUMBERS = [F16, F64, I8, U8, I32, I64, DType.U32]
CASTS = [BOOL, I8, U8, DType.I16, I32, I64, F16, F32, F64]
KEPT = [((0,), False), ((1,), True), ((2,), False), ((0, 2), False), ((0, 1, 2), True)]
REDUCTIONS = ["sum", "mean", "max", "min", "prod", "l2"]
ELEMENTWISE_CASES = [
    *(case(op, FULL) for op in UNARY),
    *(case(op, t(F16, S, 3)) for op in ("neg", "exp", "erf", "sqrt", "sigmoid", "is_nan")),
    *(case(op, t(F64, S, 3)) for op in ("abs", "exp", "erf", "tanh", "round")),
    *(case(op, t(I32, S, 3)) for op in ("neg", "abs", "sign", "relu", "bitwise_not")),
    *(case(op, t(U8, S, 3)) for op in ("neg", "abs", "sign", "relu", "bitwise_not")),
    *(case(op, t(BOOL, S, 3)) for op in ("logical_not", "bitwise_not")),
    *(case("gelu", t(d, S, 3), approximate=a) for d in (F16, F32, F64) for a in ("none", "tanh")),
    case("leaky_relu", FULL, alpha=0.1),
    case("elu", FULL, alpha=0.7),
    case("selu", FULL, alpha=1.6, gamma=1.05),
    case("hard_sigmoid", FULL, alpha=0.2, beta=0.5),
    *(case("clip", t(d, S, 3), min=-1.0, max=1.5) for d in (F16, F32, I32, U8)),
    case("clip", FULL, min=None, max=0.5),
    case("clip", FULL, min=-3.4e38, max=None),
    case("clip", t(I8, S), min=-1000.0, max=1000.0),
    *(case(op, FULL, t(F32, 6)) for op in (*ARITHMETIC, *COMPARE)),
    *(case(op, t(d, S, 3), t(d, 3)) for op in ("add", "sub", "mul", "div") for d in NUMBERS),
    *(case(op, t(d, S, 3), t(d, 3)) for op in ("maximum", "less_equal", "equal") for d in NUMBERS),
    *(case("pow", t(d, S, 3), t(d, 3)) for d in (I8, U8, I32, I64, F64)),
    *(case("mod", t(d, S, 3), t(d, 3), fmod=f) for f in (True, False) for d in (F32, *NUMBERS)),
    *(case(op, t(d, S, 3), t(d, S, 3)) for op in BITS for d in (I8, U8, I64, BOOL)),
    *(case(op, t(BOOL, S, 3), t(BOOL, 3)) for op in LOGICAL),
    case("equal", t(BOOL, S, 3), t(BOOL, 3)),
    # broadcasting
    case("add", FULL, FULL),
    case("add", t(F32, B, 1, 6), t(F32, S, 1)),
    case("add", t(F32), t(F32, B, S)),
    case("add", t(F32), t(F32)),
    case("add", t(F32, B, 1, S, 1), t(F32, 1, 4, 1, 3)),
    case("add", t(F32, B, 1, 1, S), t(F32, B, 4, S, S)),
    case("mul", t(F32, 1, 1), t(F32, 1)),
    case("where", t(BOOL, B, 1, S), t(F32, S, S), t(F32)),
    case("where", t(BOOL, S), t(I64), t(I64, S)),
    case("where", t(BOOL, S), t(BOOL, S), t(BOOL, B, 1)),
    *(case("cast", t(a, S, 3), to=b) for a in (BOOL, U8, I32, I64, F16, F32, F64) for b in CASTS),
]
REDUCE_CASES = [
    *(
        case(f"reduce_{op}", FULL, axes=axes, keepdims=keep)
        for op in REDUCTIONS
        for axes, keep in KEPT
    ),
    *(
        case(f"reduce_{op}", t(d, S, 3), axes=(0,), keepdims=False)
        for op in REDUCTIONS
        for d in (F16, F64, I8, I32, I64)
    ),
    case("reduce_sum", t(F32, B, 1, 6), axes=(1,), keepdims=False),
    case("reduce_l2", t(F32, B, 1, 6), axes=(1,), keepdims=False),
    case("reduce_sum", FULL, axes=(), keepdims=False),
    case("reduce_mean", t(F32, B, S, 768), axes=(2,), keepdims=True),
    *(
        case(op, t(d, B, S, 6), axis=axis, keepdims=keep)
        for op in ("arg_max", "arg_min")
        for axis, keep in ((0, True), (1, False), (2, False))
        for d in (F32, F16, I32)
    ),
    case("arg_max", t(F32, S), axis=0, keepdims=False),
    case("arg_max", t(F32, 1, S), axis=0, keepdims=False),
    *(
        case(op, t(d, B, S, 6), axis=axis)
        for op in ("softmax", "log_softmax")
        for axis in (0, 1, 2)
        for d in (F16, F32, F64)
    ),
    case("softmax", t(F32, S), axis=0),
    case("softmax", t(F32, B, 1, S, 1), axis=1),
    *(
        case("cumsum", t(d, B, S, 3), axis=axis, exclusive=e, reverse=r)
        for e in (False, True)
        for r in (False, True)
        for axis, d in ((0, I64), (1, F32), (2, F64), (1, F16), (2, I32))
    ),
]
PERMUTATIONS = [(0, 2, 1, 3), (3, 2, 1, 0), (2, 3, 0, 1)]
SHAPE_CASES = [
    case("reshape", FULL, shape=(B * S, 6)),
    case("reshape", t(BOOL, 2, 3), shape=(6,)),
    case("reshape", t(F32, 1, 1), shape=()),
    *(case("transpose", t(F32, B, S, 4, 5), perm=p) for p in PERMUTATIONS),
    case("transpose", t(I64, S, B), perm=(1, 0)),
    case("transpose", t(F16, 1, S, 1, 3), perm=(2, 3, 0, 1)),
    case("transpose", t(F32, B, S), perm=(0, 1)),
    case("transpose", t(F32, 2, 1, B, 3), perm=(1, 2, 3, 0)),
    case("broadcast_to", t(F32, S, 1), shape=(B, S, 3)),
    case("broadcast_to", t(BOOL), shape=(B, S)),
    case("concat", t(F32, B, S, 3), t(F32, B, 2, 3), t(F32, B, S, 3), axis=1),
    case("concat", t(I64, S), t(I64, 1), axis=0),
    case("concat", t(F16, B, S, 3), t(F16, B, S, 5), axis=2),
    case("slice", FULL, axes=(1, 2), starts=(0, 1), ends=(S, 5), steps=(1, 2)),
    case("slice", FULL, axes=(1,), starts=(S - 1,), ends=(-1,), steps=(-1,)),
    case("slice", t(I32, S + 5), axes=(0,), starts=(minimum(S, 3),), ends=(S + 2,), steps=(1,)),
    case("gather", t(F32, 5, 6), t(I64, B, S), axis=0),
    case("gather", t(F32, B, S, 5, 3), t(I32, 4), axis=2),
    case("gather", t(F32, B, 5), t(I64), axis=1),
    case("gather", t(BOOL, 5, S), t(I8, 1), axis=0),
    case("gather_elements", t(F32, 5, S), t(I64, 5, S), axis=0),
    case("gather_elements", t(F32, B, 5, 3), t(I32, B, S, 2), axis=1),
    case("gather_nd", t(F32, 6, 5, S), t(I64, B, 2), batch_dims=0),
    case("gather_nd", t(F32, B, 5, 3), t(I64, B, 1), batch_dims=1),
    case("gather_nd", t(F32, 5, 6), t(I64, 2), batch_dims=0),
    case("pad", t(F32, S, 3), pads_before=(1, 0), pads_after=(S, 2), value=-1.5),
    case("pad", t(I64, S, 3), pads_before=(0, -1), pads_after=(0, 2), value=7.0),
    case("pad", t(F16, B, 1), pads_before=(0, 0), pads_after=(0, 1), value=1.0),
    *(case("trilu", t(F32, B, S, S), upper=u, k=k) for u in (True, False) for k in (-1, 0, 2)),
    case("trilu", t(I64, S, 3), upper=True, k=0),
    case("one_hot", t(I64, B, S), t(F32, 2), depth=5, axis=2),
    case("one_hot", t(I32, B, S), t(I64, 2), depth=S, axis=0),
    case("iota", start=0, step=1, length=S, dtype=I64),
    case("iota", start=S, step=-2, length=maximum(S - 3, 0) + 1, dtype=F32),
    case("dims", values=(B, S, B * S - 1, S // 2, S % 3), dtype=I64, shape=(5,)),
    case("dims", values=(S,), dtype=F32, shape=()),
]
MATMUL_CASES = [
    case("matmul", t(F32, B, S, 5), t(F32, 5, 37)),
    case("matmul", t(F32, B, 4, S, 5), t(F32, B, 4, 5, S)),
    case("matmul", t(F32, B, 1, S, 5), t(F32, 4, 5, 3)),
    case("matmul", t(F32, S, 5), t(F32, B, 5, S)),
    case("matmul", t(F32, S), t(F32, S)),
    case("matmul", t(F32, S, 5), t(F32, 5)),
    case("matmul", t(F32, S), t(F32, B, S, 3)),
    *(case("matmul", t(d, S, 6), t(d, 6, 70)) for d in (F16, F64, I8, I32, I64)),
]


def conv(x: TensorType, w: TensorType, *bias: TensorType, **changes: Any) -> GenericOp:
    axes = x.rank - 2
    plain = {"strides": (1,) * axes, "dilations": (1,) * axes, "groups": 1}
    return case("conv", x, w, *bias, **{**plain, **PADS[axes], **changes})


PADS = {1: {"begins": (1,), "ends": (2,)}, 2: {"begins": (1, 2), "ends": (2, 0)}}
CONV_CASES = [
    conv(t(F32, B, 6, S), t(F32, 4, 6, 3), t(F32, 4)),
    conv(t(F32, B, 6, S), t(F32, 4, 3, 3), groups=2, strides=(2,)),
    conv(t(F32, B, 6, S), t(F32, 6, 1, 2), t(F32, 6), groups=6, dilations=(2,)),
    conv(t(F32, B, 3, S, 5), t(F32, 1, 3, 3, 2), t(F32, 1), strides=(2, 3)),
    conv(t(F32, 1, 1, S), t(F32, 1, 1, 1)),
    *(conv(t(d, B, 6, S), t(d, 4, 6, 3), t(d, 4)) for d in (F16, F64)),
]
CASES = [*ELEMENTWISE_CASES, *REDUCE_CASES, *SHAPE_CASES, *MATMUL_CASES, *CONV_CASES]


@pytest.fixture(scope="module", params=["avx2", "avx512"])
def library(request: pytest.FixtureRequest, link_kernels: Any) -> Any:
    return link_kernels([dataclasses.replace(k, isa=request.param) for k in CASES]), request.param


def random_arrays(
    kernel: GenericOp, env: Mapping[str, int], rng: np.random.Generator
) -> list[Array]:
    return [_random(kernel, t, [evaluate(d, env) for d in t.shape], rng) for t in kernel.operands]


def _random(
    kernel: GenericOp, type: TensorType, shape: list[int], rng: np.random.Generator
) -> Array:
    if type.dtype.is_float:
        return np.asarray(rng.standard_normal(shape) * 2, type.dtype.numpy)
    if type.dtype is BOOL:
        return np.asarray(rng.integers(0, 2, shape), np.bool_)
    # Negative powers of integers have no meaning in NumPy.
    low = 0 if type.dtype.numpy.kind == "u" or kernel.op == "pow" else -5
    return np.asarray(rng.integers(low, 5, shape), type.dtype.numpy)


def tolerance(kernel: GenericOp) -> dict[str, float]:
    """Room for some roundings in the result's type, more where many terms are summed."""
    if not kernel.result.dtype.is_float:
        return {"rtol": 0, "atol": 0}
    epsilon = float(np.finfo(kernel.result.dtype.numpy).eps)
    many = kernel in REDUCE_CASES or kernel in MATMUL_CASES or kernel in CONV_CASES
    terms = 64 if many else 8
    if kernel.op == "reduce_prod" and kernel.result.dtype is F16:
        terms = 256  # NumPy rounds to float16 after each step
    return {"rtol": terms * epsilon, "atol": (64 if many else 4) * epsilon}


@pytest.mark.parametrize("kernel", CASES, ids=title)
def test_kernel_equals_oracle(kernel: GenericOp, library: Any, rng: np.random.Generator) -> None:
    kernels, isa = library
    for size in SIZES:
        env = dict(zip(("batch", "seq"), size, strict=True))
        arrays = random_arrays(kernel, env, rng)
        (expected,) = OPS[kernel.op].evaluate(arrays, dict(kernel.attrs), env)
        status, result = kernels.run(dataclasses.replace(kernel, isa=isa), arrays, env)
        assert status == 0
        np.testing.assert_allclose(result, expected, **tolerance(kernel), err_msg=str(size))


@pytest.mark.parametrize("kernel", CASES, ids=title)
def test_pieces_give_the_same_bits(
    kernel: GenericOp, library: Any, rng: np.random.Generator
) -> None:
    kernels, isa = library
    kernel = dataclasses.replace(kernel, isa=isa)
    for size in [(3, 1), (2, 33)]:
        env = dict(zip(("batch", "seq"), size, strict=True))
        arrays = random_arrays(kernel, env, rng)
        _, whole = kernels.run(kernel, arrays, env)
        for pieces in (2, 3, 7):
            _, cut = kernels.run(kernel, arrays, env, pieces)
            assert whole.tobytes() == cut.tobytes(), (size, pieces)


def test_every_op_has_a_case() -> None:
    assert {k.op for k in CASES} == set(BUILDERS)
