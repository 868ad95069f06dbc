"""fp32 GEMM with output channels in the lanes, for at most 8 tokens, against float64 NumPy."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.dense_gemm import DenseGemmFamily, pack_bias, pack_weight
from sparsec.codegen.kernels.few_tokens_gemm import MOST_TOKENS, STRIP, FewTokensGemm
from sparsec.ir.ops import OPS
from sparsec.ir.schedule import Bucket, Workload
from sparsec.target import Target

VARIANTS = [k for k in DenseGemmFamily().variants() if isinstance(k, FewTokensGemm)]
SOME = [k for k in VARIANTS if k.activation == "none"]
EPS = float(np.finfo(np.float32).eps)


def check(run: Any, kernel: FewTokensGemm, tokens: int, m: int, k: int, kc: int = 40) -> None:
    rng = np.random.default_rng([tokens, m, k])
    shapes = {"x": (tokens, k), "w": (m, k), "bias": (m,), "residual": (tokens, m)}
    data = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    y = np.full((1, m, 64), np.nan, np.float32)
    residual = [run.to_panels(data["residual"])] if kernel.has_residual else []
    weights = [pack_weight(data["w"], STRIP, kernel.strips, kc)]
    weights.append(pack_bias(data["bias"], m, kernel.rows))
    status = run(kernel, run.to_panels(data["x"]), *weights, *residual, y, tokens, m, k, kc,
                 output=y, items=-(-m // kernel.rows),
                 scratch_bytes=kernel.scratch_bytes(k))  # fmt: skip
    assert status == 0
    assert not np.isnan(y[0, :, tokens:16]).any(), "lanes of the only group"
    wide = {n: a.astype(np.float64) for n, a in data.items()}
    operands = [wide["x"], wide["w"], wide["bias"]]
    operands += [wide["residual"]] if kernel.has_residual else []
    (expected,) = OPS["linear"].evaluate([*operands, None][:4], {"activation": kernel.activation},
                                         {})  # fmt: skip
    # As in test_dense_gemm: k roundings of the sum, slopes below 1.13, activations good to 1e-6.
    size = np.abs(wide["x"]) @ np.abs(wide["w"]).T + np.abs(wide["bias"])
    bound = (1.13 * (k + 2) * EPS + 1e-6) * size + 1e-6 + 2 * EPS * np.abs(expected)
    apart = np.abs(run.from_panels(y, tokens) - expected)
    assert (apart <= bound).all(), (tokens, m, k, apart.max())


@pytest.mark.parametrize("tokens", range(1, MOST_TOKENS + 1))
def test_sizes_at_the_edges_of_blocks(some_kernel: FewTokensGemm, run: Any, tokens: int) -> None:
    for m, k in product((1, 5, 6, 7, 12, 13, 64), (1, 7, 8, 9, 40, 61)):
        check(run, some_kernel, tokens, m, k)


def test_a_model_sized_layer(kernel: FewTokensGemm, run: Any) -> None:
    check(run, kernel, 7, 100, 384)


def test_only_few_tokens_are_scheduled_so() -> None:
    work = Workload("linear", (("m", 64), ("k", 64)), "f32", "dense", "none")
    target = Target.named("skylake-avx512")
    for bucket, family in (
        (Bucket(0, 8), "few_tokens_gemm"),
        (Bucket(8, 16), "dense_gemm"),
        (Bucket(), "dense_gemm"),
    ):
        asked = Workload(work.op, work.sizes, work.dtype, work.layout, work.epilogue, 1.0, bucket)
        schedules = DenseGemmFamily().schedules(asked, target)
        assert schedules[0].family == family
        assert (bucket.most == 8) == any(s.family == "few_tokens_gemm" for s in schedules)
