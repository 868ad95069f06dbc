"""fp32 to bytes and back: equal to the oracle, rounding, clipping, infinity and NaN included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.quantize import CHUNK, QuantizeFamily, Requantise, inverse_of
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType

Array = np.ndarray[Any, Any]
VARIANTS = QuantizeFamily().variants()
SOME = [k for k in VARIANTS if isinstance(k, Requantise) and k.op == "quantize"]
COUNTS = [1, 31, 32, 33, 63, 64, 65, CHUNK - 1, CHUNK, 2 * CHUNK + 65]


def zero_points(dtype: str) -> list[int]:
    limits = np.iinfo(np.dtype(dtype))
    return [int(limits.min), 0, 3, int(limits.max)]


def check(run: Any, kernel: Requantise, x: Array, scale: float, zero_point: int) -> None:
    byte_type = DType(kernel.dtype)
    attrs = {"scale": scale, "zero_point": zero_point, "dtype": byte_type}
    (expected,) = OPS[kernel.op].evaluate([x], attrs, {})
    factor = inverse_of(scale) if kernel.op == "quantize" else scale
    y = np.full_like(expected, 99)
    items = -(-x.size // CHUNK)
    assert run(kernel, x, y, x.size, factor, zero_point, output=y, items=items) == 0
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("scale", [0.5, 0.0173, 1e-3])
def test_equals_the_oracle(
    kernel: Requantise, run: Any, rng: np.random.Generator, count: int, scale: float
) -> None:
    for zero_point in zero_points(kernel.dtype):
        if kernel.op == "quantize":
            x = (rng.standard_normal(count) * scale * 100).astype(np.float32)
        else:
            x = rng.integers(*byte_range(kernel.dtype), count).astype(kernel.dtype)
        check(run, kernel, x, scale, zero_point)


def byte_range(dtype: str) -> tuple[int, int]:
    limits = np.iinfo(np.dtype(dtype))
    return int(limits.min), int(limits.max) + 1


def test_ties_go_to_even(some_kernel: Requantise, run: Any) -> None:
    """Every half between two bytes, and its neighbours among the floats."""
    halves = np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)
    near = [np.nextafter(halves, np.float32(end)) for end in (-1e9, 1e9)]
    for scale in (1.0, 0.25):
        x = np.concatenate([halves, *near]) * np.float32(scale)
        for zero_point in zero_points(some_kernel.dtype):
            check(run, some_kernel, x.astype(np.float32), scale, zero_point)


def test_numbers_that_no_byte_holds(some_kernel: Requantise, run: Any) -> None:
    large = [32766.5, 32768.0, 65536.0, 2.0**31, 2.0**32, 1e20, 3.4e38, np.inf]
    values = [*large, *(-x for x in large), np.nan, 0.0, -0.0, 1e-45]
    x = np.array(values * 7, np.float32)
    for scale in (1.0, 1.1e-37, 9e36):
        for zero_point in zero_points(some_kernel.dtype):
            check(run, some_kernel, x, scale, zero_point)


def test_every_byte_survives_the_way_there_and_back(some_kernel: Requantise, run: Any) -> None:
    low, high = byte_range(some_kernel.dtype)
    stored = np.arange(low, high).astype(some_kernel.dtype)
    for scale in (0.1, 0.0173, 1e-7):
        for zero_point in zero_points(some_kernel.dtype):
            attrs = {"scale": scale, "zero_point": zero_point}
            (x,) = OPS["dequantize"].evaluate([stored], attrs, {})
            y = np.zeros_like(stored)
            factor = inverse_of(scale)
            args = (np.asarray(x), y, stored.size, factor, zero_point)
            assert run(some_kernel, *args, output=y, items=1) == 0
            np.testing.assert_array_equal(y, stored)
