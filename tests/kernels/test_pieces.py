"""Tables of straight pieces for activations; tests/kernels/test_int8_gemm.py runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.isa.pieces import (
    MAX_ERROR,
    PIECES,
    PIECEWISE,
    evaluate,
    piece_table,
    units_per_step,
)
from sparsec.ir.ops_elementwise import ACTIVATIONS

Array = np.ndarray[Any, Any]
EVERY_UNIT = np.arange(-(2**15), 2**15)
SCALES = [2.0**n for n in range(-10, 6)] + [0.0235, 0.05, 0.3]


def exact(activation: str, scale: float, units: Array, table: Array) -> Array:
    """Results in steps, not rounded."""
    x = units * (scale / units_per_step(table))
    with np.errstate(over="ignore"):  # e**x of silu
        return np.asarray(ACTIVATIONS[activation](x.astype(np.float64)) / scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("activation", PIECEWISE)
def test_a_table_is_within_its_error_everywhere_or_there_is_none(
    activation: str, scale: float
) -> None:
    table = piece_table(activation, scale)
    if table is None:
        assert scale < 1 / 64 if activation != "silu" else scale < 1 / 16
        return
    wanted = exact(activation, scale, EVERY_UNIT, table)
    found = evaluate(EVERY_UNIT, table)
    assert np.abs(found - wanted).max() <= 0.5 + MAX_ERROR
    # What int16 cuts off is no u8 with any zero point.
    assert units_per_step(table) <= 2**7
    assert found[0] == 0 or wanted[0] > -MAX_ERROR


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("scale", [0.0235, 0.05, 0.3])
def test_seldom_is_a_result_another_step_at_scales_of_models(
    activation: str, scale: float
) -> None:
    table = piece_table(activation, scale)
    assert table is not None
    x = np.random.default_rng(0).normal(0, 1.5, 100_000)
    units = np.clip(np.rint(x * (units_per_step(table) / scale)), *EVERY_UNIT[[0, -1]])
    wanted = np.minimum(np.rint(ACTIVATIONS[activation](x) / scale), 2**8)  # as far as units go
    apart = np.abs(evaluate(units, table) - wanted)
    assert apart.max() <= 1
    assert apart.mean() < 0.012


def test_activations_without_a_bump_have_no_table() -> None:
    assert [a for a in ACTIVATIONS if piece_table(a, 0.05) is not None] == list(PIECEWISE)


def test_the_last_piece_is_zero() -> None:
    """Beyond the bump, and for the size of -2**15, which int16 holds as a negative number."""
    table = piece_table("gelu", 0.05)
    assert table is not None
    assert not table[:2, PIECES - 1].any()
