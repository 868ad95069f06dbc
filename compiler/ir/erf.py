"""The error function, vectorised, without SciPy.

Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.5 (Maclaurin series, used
for |x| < 2) and 7.1.14 (continued fraction of erfc, used above), both in float64.
The error is below 1e-12 everywhere (measured against math.erf).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_SPLIT = 2.0
_SERIES_TERMS = 40  # 2 * 2**(2n+1) / sqrt(pi) / n! / (2n+1) < 1e-24 at n = 40
# of x**(2n + 1), lowest first
_SERIES = [
    2.0 / math.sqrt(math.pi) * (-1.0) ** n / (math.factorial(n) * (2 * n + 1))
    for n in range(_SERIES_TERMS)
]
_FRACTION_DEPTH = 60  # converges to 1e-13 at x = 2
_CHUNK = 8192  # elements at a time: all temporaries stay in the cache
_ALWAYS_ONE = 6.0  # 1 - erf(6) < 3e-17


def erf(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """erf of every element, in the dtype of `x` (float64 inside)."""
    wide = np.asarray(x, np.float64).reshape(-1)
    result = np.empty(wide.shape, x.dtype)
    for start in range(0, wide.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        result[part] = _erf(wide[part])
    return result.reshape(x.shape)


def _erf(wide: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    size = np.minimum(np.abs(wide), _ALWAYS_ONE)  # minimum passes NaN on
    large = size > _SPLIT
    result = _series(np.where(large, 0.0, size))
    if large.any():
        result[large] = 1.0 - _complement(size[large])
    return np.asarray(np.copysign(result, wide))


def _series(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    square = x * x
    total = np.full_like(x, _SERIES[-1])
    for coefficient in _SERIES[-2::-1]:
        total *= square
        total += coefficient
    return np.asarray(total * x)


def _complement(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    fraction = x
    for n in range(_FRACTION_DEPTH, 0, -1):
        fraction = x + (n / 2.0) / fraction
    return np.asarray(np.exp(-x * x) / (np.sqrt(np.pi) * fraction))
