"""Fused multiply and add of fp32 numbers, vectorised: one rounding, as the instruction does.

Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
rounding to odd", IEEE Transactions on Computers 57(4), 2008. The product of two fp32 numbers is
exact in float64; their sum with a third, rounded to odd in float64, then rounds to fp32 as the
exact sum would, since float64 has at least two bits more than fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def fma_f32(a: Array, b: Array, c: Array | np.float32) -> Array:
    """f32(a * b + c) of fp32 arrays that broadcast, rounded once, half to even."""
    wide = np.float64
    product = np.multiply(a, b, dtype=wide)
    addend = np.asarray(c, wide)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities, and sums outside fp32
        total = np.asarray(product + addend)
        part = total - product
        error = (product - (total - part)) + (addend - part)  # exact: Knuth's TwoSum
        # An inexact sum goes to the one of its two neighbours whose last bit is set.
        even = (total.view(np.int64) & 1) == 0
        move = np.asarray(even & (error != 0) & np.isfinite(error))
        total[move] = np.nextafter(total[move], np.copysign(np.inf, error[move]))
        return np.asarray(total.astype(np.float32))
