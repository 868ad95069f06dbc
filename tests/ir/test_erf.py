"""The vectorised error function against the C library's."""

from __future__ import annotations

import math

import numpy as np

from sparsec.ir.erf import erf


def test_equals_math_erf():
    x = np.linspace(-8.0, 8.0, 40001)
    expected = np.array([math.erf(v) for v in x])
    # Two roundings of a double near 1 and the truncation of the series: well under 1e-12.
    np.testing.assert_allclose(erf(x), expected, rtol=0, atol=1e-12)


def test_keeps_dtype_and_shape():
    x = np.array([[0.5], [2.5]], np.float32)
    assert erf(x).dtype == np.float32
    assert erf(x).shape == (2, 1)


def test_special_values():
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0])
    y = erf(x)
    assert y[0] == 1.0
    assert y[1] == -1.0
    assert np.isnan(y[2])
    assert not np.signbit(y[3])
    assert np.signbit(y[4])
