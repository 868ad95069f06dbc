"""Dense fp32 GEMM over token panels against float64 NumPy."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.dense_gemm import (
    DenseGemm,
    DenseGemmFamily,
    pack_bias,
    pack_weight,
)
from sparsec.ir.ops import OPS

Array = np.ndarray[Any, Any]
VARIANTS = [k for k in DenseGemmFamily().variants() if isinstance(k, DenseGemm)]
SOME = [k for k in VARIANTS if k.activation == "none"]
EPS = float(np.finfo(np.float32).eps)
TOKENS = [1, 15, 16, 17, 33, 48, 63, 64, 65, 130]
M = [1, 5, 6, 7, 12, 13, 64]
K = [1, 5, 6, 13, 64]


def call(
    run: Any, kernel: DenseGemm, data: dict[str, Array], *, kc: int = 512, group: int = 2
) -> Array:
    (tokens, k), (m, _) = data["x"].shape, data["w"].shape
    y = np.full(run.to_panels(np.zeros((tokens, m), np.float32)).shape, np.nan, np.float32)
    residual = [run.to_panels(data["residual"])] if kernel.has_residual else []
    weights = [pack_weight(data["w"], kernel.mr, kernel.strips, kc)]
    weights.append(pack_bias(data["bias"], m, kernel.rows))
    items = -(-m // kernel.rows) * len(y)
    pointers: list[Any] = [run.to_panels(data["x"]), *weights, *residual, y]
    status = run(kernel, *pointers, tokens, m, k, kc, group, output=y, items=items)
    assert status == 0
    lanes = y.transpose(0, 2, 1).reshape(-1, m)
    assert np.isfinite(lanes[: -(-tokens // 16) * 16]).all(), "lanes of the last group"
    return np.asarray(run.from_panels(y, tokens))


def check(run: Any, kernel: DenseGemm, sizes: tuple[int, int, int], **blocks: int) -> None:
    tokens, m, k = sizes
    rng = np.random.default_rng([tokens, m, k])
    shapes = {"x": (tokens, k), "w": (m, k), "bias": (m,), "residual": (tokens, m)}
    data = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    y = call(run, kernel, data, **blocks)
    wide = {n: a.astype(np.float64) for n, a in data.items()}
    operands = [
        wide["x"],
        wide["w"],
        wide["bias"],
        wide["residual"] if kernel.has_residual else None,
    ]
    (expected,) = OPS["linear"].evaluate(operands, {"activation": kernel.activation}, {})
    # A sum of k products in any order is off by at most k eps sum |w x|; every activation's slope
    # is below 1.13, and its own error below 1e-6 max(1, |x|).
    size = np.abs(wide["x"]) @ np.abs(wide["w"]).T + np.abs(wide["bias"])
    bound = (1.13 * (k + 2) * EPS + 1e-6) * size + 1e-6 + 2 * EPS * np.abs(expected)
    assert (np.abs(y - expected) <= bound).all(), (sizes, blocks, np.abs(y - expected).max())


@pytest.mark.parametrize("tokens", TOKENS)
def test_sizes_at_the_edges_of_blocks(some_kernel: DenseGemm, run: Any, tokens: int) -> None:
    for m, k in product(M, K):
        check(run, some_kernel, (tokens, m, k))


def test_blocks_of_channels_and_panels(kernel: DenseGemm, run: Any) -> None:
    for kc, group in product((8, 24, 64), (1, 2, 5)):
        check(run, kernel, (200, 25, 61), kc=kc, group=group)


def test_a_model_sized_layer(kernel: DenseGemm, run: Any) -> None:
    check(run, kernel, (71, 100, 384), kc=192)
