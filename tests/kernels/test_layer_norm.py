"""LayerNorm over token panels against float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.layer_norm import LayerNorm, LayerNormFamily
from sparsec.ir.ops import OPS

VARIANTS = LayerNormFamily().variants()
EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 64, 385])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_layer_norm(kernel: LayerNorm, run: Any, tokens: int, channels: int, mean: float) -> None:
    rng = np.random.default_rng([tokens, channels])
    x, residual = rng.standard_normal((2, tokens, channels)).astype(np.float32)
    x += np.float32(mean)
    gamma, beta = rng.standard_normal((2, channels)).astype(np.float32)
    y = np.full_like(run.to_panels(x), np.nan)
    operands: list[Any] = [run.to_panels(x), run.to_panels(residual), gamma, beta, y]
    kept = [True, kernel.has_residual, True, kernel.has_beta, True]
    pointers = [a for a, keep in zip(operands, kept, strict=True) if keep]
    groups = -(-tokens // 16)
    assert run(kernel, *pointers, channels, 1e-5, output=y, items=groups) == 0
    wide = [a.astype(np.float64) for a in (x, gamma, beta, residual)]
    inputs = [wide[0], wide[1], wide[2] if kernel.has_beta else None,
              wide[3] if kernel.has_residual else None]  # fmt: skip
    (expected,) = OPS["layer_norm"].evaluate(inputs, {"epsilon": 1e-5}, {})
    total = wide[0] + (wide[3] if kernel.has_residual else 0)
    # The mean is off by at most (channels / 4 + 4) eps |x|; so is each difference to it, which
    # the division by the deviation and gamma then scale. The variance adds as much, relatively.
    deviation = np.sqrt(total.var(axis=1, keepdims=True) + 1e-5)
    slack = (channels / 4 + 8) * EPS * np.abs(total).max(axis=1, keepdims=True) / deviation
    size = np.abs((total - total.mean(axis=1, keepdims=True)) / deviation)
    bound = slack * (1 + size + size**2 + slack) * np.abs(gamma) + 4 * EPS * (1 + np.abs(expected))
    bound += (channels / 4 + 8) * EPS * size * np.abs(gamma)
    assert (np.abs(run.from_panels(y, tokens) - expected) <= bound).all()
    lanes = y.transpose(0, 2, 1).reshape(-1, channels)
    assert np.isfinite(lanes[: groups * 16]).all()
