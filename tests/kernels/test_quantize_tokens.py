"""A scale per token: bytes and scales equal to the oracle's, whatever the tokens hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.quantize_tokens import QuantizeTokens, QuantizeTokensFamily
from sparsec.ir.ops import OPS
from sparsec.ir.ops_dynamic import token_shares

Array = np.ndarray[Any, Any]
VARIANTS = QuantizeTokensFamily().variants()
TOKENS = [1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 130]
CHANNELS = [1, 2, 7, 64, 129]


def zero_points(kernel: QuantizeTokens) -> list[int]:
    return [0] if kernel.one_sided else [1, 16, 128, 254]


def check(run: Any, kernel: QuantizeTokens, x: Array, zero_point: int) -> None:
    expected, scales = OPS["quantize_tokens"].evaluate([x], {"zero_point": zero_point}, {})
    tokens, channels = x.shape
    panels = -(-tokens // 64)
    y = np.full((panels, channels, 64), 99, np.uint8)
    scale = np.full((panels, 1, 64), 99, np.float32)
    shares = [float(share) for share in token_shares(zero_point)]
    sizes = (tokens, channels, *shares, zero_point)
    args = (run.to_panels(x), y, scale, *sizes)
    assert run(kernel, *args, output=[y, scale], items=panels) == 0
    np.testing.assert_array_equal(run.from_panels(scale, tokens), scales)
    np.testing.assert_array_equal(run.from_panels(y, tokens), expected)
    assert np.isfinite(scale).all() or not np.isfinite(x).all(), "lanes past the last token"


@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_oracle(
    kernel: QuantizeTokens, run: Any, rng: np.random.Generator, tokens: int
) -> None:
    for channels in CHANNELS:
        size = 10.0 ** rng.uniform(-4, 4, (tokens, 1))  # tokens of very different sizes
        x = (rng.standard_normal((tokens, channels)) * size).astype(np.float32)
        for zero_point in zero_points(kernel):
            check(run, kernel, x, zero_point)


def test_tokens_of_one_sign_zeros_and_extremes(kernel: QuantizeTokens, run: Any) -> None:
    rows = [
        *([0.0, 0.0, 0.0], [-0.0, 0.0, -0.0], [1.0, 2.0, 255.0], [-1.0, -2.0, -255.0]),
        *([1e-38, 0, -1e-38], [3e38, -3e38, 1.0], [0.5, 1.5, 255.0], [-0.5, -1.5, -128.0]),
        *([np.inf, 1.0, 2.0], [-np.inf, 1.0, 2.0], [np.nan, 1.0, 2.0], [np.nan] * 3),
    ]
    for zero_point in zero_points(kernel):
        check(run, kernel, np.array(rows * 6, np.float32), zero_point)


def test_a_token_keeps_its_largest_channels(
    kernel: QuantizeTokens, run: Any, rng: np.random.Generator
) -> None:
    """No channel is off by more than half a step of its own token, and rounding of the scale."""
    x = rng.standard_normal((64, 40)).astype(np.float32)
    x = np.abs(x) if kernel.one_sided else x
    for zero_point in zero_points(kernel):
        check(run, kernel, x, zero_point)
        stored, scale = OPS["quantize_tokens"].evaluate([x], {"zero_point": zero_point}, {})
        real = (stored.astype(np.float32) - zero_point) * scale
        assert (np.abs(real - x) <= scale * np.float32(0.5001)).all()
