"""Elementwise kernels against float64, in units in the last place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.pointwise import BINARY, CHUNK, Pointwise, PointwiseFamily
from sparsec.ir.ops import OPS

Array = np.ndarray[Any, Any]
VARIANTS = PointwiseFamily().variants()
EXACT = {"abs", "ceil", "floor", "neg", "relu", "round", "maximum", "minimum",
         "add", "sub", "mul", "div", "sqrt", "reciprocal"}  # fmt: skip
ULPS = {"exp": 2, "erf": 8, "tanh": 8, "sigmoid": 4}
SMALLEST = float(np.finfo(np.float32).tiny)


def oracle(kernel: Pointwise, operands: list[Array], dtype: Any) -> Array:
    op, attrs = kernel.op, {}
    if op.startswith("gelu"):
        op, attrs = "gelu", {"approximate": "tanh" if op == "gelu_tanh" else "none"}
    with np.errstate(all="ignore"):
        (y,) = OPS[op].evaluate([a.astype(dtype) for a in operands], attrs, {})
    return np.asarray(y)


def call(kernel: Pointwise, run: Any, operands: list[Array], count: int) -> Array:
    y = np.full(count, np.nan, np.float32)
    assert run(kernel, *operands, y, count, output=y, items=-(-count // CHUNK)) == 0
    return y


def operands_of(kernel: Pointwise, x: Array, rng: np.random.Generator) -> list[Array]:
    if kernel.op not in BINARY:
        return [x]
    other = rng.permutation(x)
    one = np.array([rng.choice(x)], np.float32)
    return {"same": [x, other], "scalar_right": [x, one], "scalar_left": [one, x]}[kernel.form]


def samples(rng: np.random.Generator) -> Array:
    near = rng.standard_normal(20000) * 3
    far = rng.uniform(-120, 120, 20000)
    tiny = np.exp(rng.uniform(-90, 0, 5000)) * rng.choice([-1, 1], 5000)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 88.8, -104.5, 1e38, -1e38, 0.5, 1.5, 2.5]
    return np.concatenate([near, far, tiny, special]).astype(np.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values(kernel: Pointwise, run: Any, rng: np.random.Generator) -> None:
    x = samples(rng)
    operands = operands_of(kernel, x, rng)
    y = call(kernel, run, operands, len(x))
    if kernel.op in EXACT:
        np.testing.assert_array_equal(y, oracle(kernel, operands, np.float32))
        return
    expected = oracle(kernel, operands, np.float64)
    single = expected.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(single))
    good = np.isfinite(single)
    error = np.abs(y[good] - expected[good])
    if kernel.op in ULPS:
        bound = ULPS[kernel.op] * np.spacing(np.abs(single[good])) + 2 * SMALLEST
    else:  # x times a function of x that is off by 1e-6 at most
        bound = 1e-6 * np.maximum(1, np.abs(x[good]))
    assert (error <= bound).all(), (x[good][np.argmax(error - bound)], (error / bound).max())


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 4095, 4096, 4097, 3 * 4096 + 5])
def test_counts(kernel: Pointwise, run: Any, rng: np.random.Generator, count: int) -> None:
    x = rng.uniform(0.5, 2, count).astype(np.float32)
    operands = operands_of(kernel, x, rng)
    y = call(kernel, run, operands, count)
    expected = oracle(kernel, operands, np.float64)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
