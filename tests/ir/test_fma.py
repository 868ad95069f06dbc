"""fma_f32 rounds once: against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from sparsec.ir.fma import fma_f32


def rounded(exact: Fraction) -> np.float32:
    """The fp32 number nearest to `exact`, the even one of two."""
    guess = np.float32(float(exact))
    below, above = (np.nextafter(guess, np.float32(end)) for end in (-np.inf, np.inf))

    def badness(x: np.float32) -> tuple[Fraction, int]:
        return abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1

    return min((below, guess, above), key=badness)


def fma(a: float, b: float, c: float) -> np.float32:
    arrays = [np.array([x], np.float32) for x in (a, b, c)]
    result: np.float32 = fma_f32(*arrays)[0]
    return result


def test_random_numbers(rng: np.random.Generator):
    for _ in range(2000):
        digits = rng.integers(-(2**24), 2**24, 3) >> rng.integers(0, 23, 3)
        a, b, c = (np.float32(x) for x in np.ldexp(digits.astype(float), rng.integers(-40, 40, 3)))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        assert fma(a, b, c) == rounded(exact), (a, b, c)


HALF_STEP = 1.0 + 2.0**-12  # squared: 1 + 2**-11 + 2**-24, half way between two fp32 numbers


@pytest.mark.parametrize("tiny", [2.0**-60, -(2.0**-60), 2.0**-100, -(2.0**-100), 0.0])
def test_a_tiny_addend_breaks_a_tie(tiny: float):
    """Rounding first to float64, or to 80 bits, would lose the addend and round to even."""
    exact = Fraction(HALF_STEP) ** 2 + Fraction(tiny)
    assert fma(HALF_STEP, HALF_STEP, tiny) == rounded(exact)
    assert fma(-HALF_STEP, HALF_STEP, tiny) == rounded(Fraction(tiny) - Fraction(HALF_STEP) ** 2)


def test_cancellation_keeps_the_low_half_of_the_product():
    assert fma(HALF_STEP, HALF_STEP, -(1.0 + 2.0**-11)) == np.float32(2.0**-24)


def test_shapes_broadcast_and_infinities_pass():
    a = np.array([[1.0], [3e38]], np.float32)
    got = fma_f32(a, np.array([2.0, 3.0], np.float32), np.float32(1))
    np.testing.assert_array_equal(got, np.float32([[3, 4], [np.inf, np.inf]]))
