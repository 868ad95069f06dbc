"""LayerNorm over token panels against float64 NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.layer_norm import LayerNorm, LayerNormFamily
from sparsec.codegen.kernels.quantize import inverse_of
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType

VARIANTS = [
    k for k in LayerNormFamily().variants() if isinstance(k, LayerNorm) and k.result == "f32"
]
SOME = [k for k in LayerNormFamily().variants() if isinstance(k, LayerNorm) and k.has_bytes]
PAIRS = [k for k in LayerNormFamily().variants() if isinstance(k, LayerNorm) and k.has_pairs]
EPS = float(np.finfo(np.float32).eps)
Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 64, 385])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_layer_norm(kernel: LayerNorm, run: Any, tokens: int, channels: int, mean: float) -> None:
    rng = np.random.default_rng([tokens, channels])
    x, residual = rng.standard_normal((2, tokens, channels)).astype(np.float32)
    x += np.float32(mean)
    gamma, beta = rng.standard_normal((2, channels)).astype(np.float32)
    in_panels = run.to_panels(x)
    y = in_panels if kernel.in_place else np.full_like(in_panels, np.nan)
    operands: list[Any] = [in_panels, run.to_panels(residual), gamma, beta, y]
    kept = [True, kernel.has_residual, True, kernel.has_beta, not kernel.in_place]
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


def operands(
    kernel: LayerNorm, run: Any, tokens: int, channels: int
) -> tuple[list[Array], dict[str, Array]]:
    """Pointers of the kernel's operands, and of its outputs by name."""
    rng = np.random.default_rng([tokens, channels])
    x, residual = (
        run.to_panels(a) for a in rng.standard_normal((2, tokens, channels), np.float32)
    )
    gamma, beta = rng.standard_normal((2, channels), np.float32)
    factor = factors(channels)
    kept = [True, kernel.has_residual, True, kernel.has_beta, kernel.has_factor]
    places = {"x": x, "y": np.full_like(x, np.nan)}
    outputs = {"y": places[kernel.target]} if kernel.has_floats else {}
    if kernel.has_bytes:
        outputs["bytes"] = np.full(x.shape, 99, np.uint8)
    if kernel.has_pairs:
        outputs["pairs"] = np.full((len(x), channels // 2, 64), 99, np.int32)
    arrays = [x, residual, gamma, beta, factor]
    return [a for a, keep in zip(arrays, kept, strict=True) if keep], outputs


def plain_result(kernel: LayerNorm, run: Any, tokens: int, channels: int) -> Array:
    """Of the kernel that stores fp32 alone, in memory of its own."""
    plain = replace(kernel, result="f32", has_factor=False, in_place=False)
    inputs, outputs = operands(plain, run, tokens, channels)
    y = outputs["y"]
    groups = -(-tokens // 16)
    assert run(plain, *inputs, y, channels, 1e-5, output=y, items=groups) == 0
    return np.asarray(y)


def factors(channels: int) -> Array:
    """What the copy's channels are multiplied by: of a span that balancing gives."""
    return np.random.default_rng(channels).uniform(0.05, 4.0, channels).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 16, 17, 31, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("channels", [1, 5, 64, 129])
@pytest.mark.parametrize(("scale", "zero_point"), [(0.02, 128), (0.013, 3), (1e-3, 255)])
def test_quantised_copy(
    some_kernel: LayerNorm, run: Any, tokens: int, channels: int, scale: float, zero_point: int
) -> None:
    """The fp32 result is that of the plain kernel, bit for bit, and the bytes are quantised it.

    With a factor they are quantised products: of fp32, rounded before the scale multiplies them.
    """
    expected = plain_result(some_kernel, run, tokens, channels)
    inputs, outputs = operands(some_kernel, run, tokens, channels)
    numbers = [tokens, channels, 1e-5, inverse_of(scale), zero_point]
    stored = list(outputs.values())
    pointers = stored[some_kernel.in_place :]
    panels = -(-tokens // 64)
    assert run(some_kernel, *inputs, *pointers, *numbers, output=stored, items=panels) == 0
    if some_kernel.has_floats:
        np.testing.assert_array_equal(outputs["y"], expected)
    attrs = {"scale": scale, "zero_point": zero_point, "dtype": DType.U8}
    rows = run.from_panels(expected, tokens)
    rows = rows * factors(channels) if some_kernel.has_factor else rows
    (quantised,) = OPS["quantize"].evaluate([rows], attrs, {})
    np.testing.assert_array_equal(run.from_panels(outputs["bytes"], tokens), quantised)


@pytest.mark.isa("avx512bf16")
@pytest.mark.parametrize("paired", PAIRS, ids=lambda k: k.name)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 2), (17, 6), (64, 64), (130, 130)])
def test_copy_in_bf16(paired: LayerNorm, run: Any, tokens: int, channels: int) -> None:
    """The fp32 result is that of the plain paired, bit for bit, and the copy is it rounded."""
    expected = plain_result(paired, run, tokens, channels)
    inputs, outputs = operands(paired, run, tokens, channels)
    stored = list(outputs.values())
    pointers, numbers = stored[paired.in_place :], [channels, 1e-5]
    groups = -(-tokens // 16)
    assert run(paired, *inputs, *pointers, *numbers, output=stored, items=groups) == 0
    rows = run.from_panels(expected, tokens)
    if paired.has_floats:
        np.testing.assert_array_equal(run.from_panels(outputs["y"], tokens), rows)
    copy = run.from_pairs(outputs["pairs"], tokens)
    np.testing.assert_array_equal(copy, rows.astype(DType.BF16.numpy))
