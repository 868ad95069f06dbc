"""What `attention_int8` means: attention over the numbers that the bytes stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import symbol
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType, TensorType

B, S = symbol("batch"), symbol("seq")
ATTRS = {"heads": 2, "head_size": 8, "scale": 0.3, "q_offset": 0, "k_offset": 16, "v_offset": 32,
         "q_scale": 0.01, "k_scale": 0.02, "v_scale": 0.03}  # fmt: skip


def real(x: np.ndarray, scale: float) -> np.ndarray:
    return (x.astype(np.float64) - 128) * scale


@pytest.mark.parametrize("masked", [False, True])
def test_is_attention_with_probabilities_in_steps(masked: bool, rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (2, 9, 48)).astype(np.uint8)
    mask = rng.standard_normal((2, 1, 1, 9)).astype(np.float32) if masked else None
    (got,) = OPS["attention_int8"].evaluate([x, x, x, mask], ATTRS, {})
    plain = {n: v for n, v in ATTRS.items() if not n.endswith("k_scale")}
    (want,) = OPS["attention"].evaluate(
        [real(x, ATTRS["q_scale"]), real(x, ATTRS["k_scale"]), real(x, ATTRS["v_scale"]), mask],
        plain,
        {},
    )
    # Half a step for each of 9 keys, of at least 255 in all, moves at most twice the largest v.
    assert np.abs(got - want).max() <= 9 * 0.5 / 255 * 2 * 128 * ATTRS["v_scale"]
    assert got.dtype == np.float32


def test_no_key_gives_zeros(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (1, 3, 48)).astype(np.uint8)
    mask = np.full((1, 1, 1, 3), -np.inf, np.float32)
    (got,) = OPS["attention_int8"].evaluate([x, x, x, mask], ATTRS, {})
    assert (got == 0).all()


def test_quantised_result(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (1, 5, 48)).astype(np.uint8)
    (y,) = OPS["attention_int8"].evaluate([x, x, x, None], ATTRS, {})
    attrs = {**ATTRS, "out_scale": 0.02, "out_zero_point": 120}
    (stored,) = OPS["attention_int8"].evaluate([x, x, x, None], attrs, {})
    as_quantize = {"scale": 0.02, "zero_point": 120, "dtype": DType.U8}
    np.testing.assert_array_equal(stored, OPS["quantize"].evaluate([y], as_quantize, {})[0])


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({}, DType.F32, "q must be u8"),
        ({"v_offset": 40}, DType.U8, "channels 40..56 of v"),
        ({"k_scale": 0.0}, DType.U8, "a scale is a positive"),
        ({"out_scale": -1.0}, DType.U8, "a scale is a positive"),
    ],
)
def test_refusals(change: dict[str, Any], dtype: DType, message: str) -> None:
    x = TensorType(dtype, (B, S, 48))
    with pytest.raises(InvalidGraph, match=message):
        OPS["attention_int8"].infer([x, x, x, None], {**ATTRS, **change})
