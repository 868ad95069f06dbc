"""Weights as bitmaps: what is stored, and when the kernel is chosen; its results are in
test_int8_gemm.py and test_int8_family.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.int8_bitmap import LANES, pack_bitmap
from sparsec.codegen.kernels.int8_family import Int8GemmFamily
from sparsec.ir.schedule import EVERY, Bucket, Workload
from sparsec.rates import default_rates, product_of
from sparsec.target import Isa, Target


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_masks_say_where_the_values_are(density: float, rng: Any) -> None:
    m, k = 37, 30
    w = (rng.integers(1, 128, (m, k)) * (rng.random((m, k)) < density)).astype(np.int8)
    packed = pack_bitmap(w)
    assert len(packed.values) == packed.starts[-1] + 64  # what is read past the last value
    masks = packed.masks.reshape(len(packed.starts) - 1, -1)
    found = np.zeros((len(masks) * LANES, masks.shape[1] * 4), np.int8)
    for group, start in enumerate(packed.starts[:-1]):
        for quad, mask in enumerate(masks[group]):
            for bit in range(64):
                if int(mask) >> bit & 1:
                    row, channel = group * LANES + bit // 4, quad * 4 + bit % 4
                    found[row, channel] = packed.values[start : start + 1].view(np.int8)[0]
                    start += 1
    np.testing.assert_array_equal(found[:m, :k], w)
    assert not found[m:].any()
    assert not found[:, k:].any()


def first(bucket: Bucket, target: str, layout: str = "bsr4x1", density: float = 0.59) -> str:
    sizes = (("m", 768), ("k", 768))
    work = Workload("linear_int8", sizes, "u8s8", layout, "none u8", density, bucket)
    return Int8GemmFamily().schedules(work, Target.named(target))[0].family


def test_few_tokens_of_weights_with_zeros_take_it() -> None:
    few = Bucket(0, 8)
    for target in ("icelake-server", "znver4"):
        assert first(few, target) == "int8_bitmap"
        assert first(few, target, "dense", 0.5) == "int8_bitmap"
        assert first(few, target, "dense", 1.0) == "int8_gemm"
        assert first(Bucket(16, 32), target) == first(EVERY, target) == "int8_gemm"
    assert first(few, "cooperlake") == first(few, "haswell") == "int8_gemm"


def test_it_is_a_choice_for_a_tuner_up_to_16_tokens() -> None:
    sizes = (("m", 768), ("k", 768))
    for bucket, is_there in ((Bucket(0, 8), True), (Bucket(8, 16), True), (Bucket(16, 32), False)):
        work = Workload("linear_int8", sizes, "u8s8", "bsr4x1", "none u8", 0.59, bucket)
        families = {s.family for s in Int8GemmFamily().schedules(work, Target.named("znver4"))}
        assert ("int8_bitmap" in families) == is_there


def test_int8_products_of_all_levels_have_a_peak() -> None:
    for isa in (Isa.AVX2, Isa.AVX512_VNNI, Isa.AVX512_VBMI2, Isa.AMX):
        assert default_rates("").peak(product_of("linear_int8", isa.value)) > 0
