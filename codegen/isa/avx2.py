"""AVX2 with FMA: 8 floats to a vector."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.vector import VectorIsa, keep, power_of_two, splat
from sparsec.target import Isa

FEATURES = ("+avx2", "+avx", "+fma", "+f16c", "+bmi", "+bmi2", "+lzcnt", "+popcnt", "+movbe")


def _scale_normal(p: Any, n: Any) -> Any:
    return p * power_of_two(n, 8)


def _scale(p: Any, n: Any) -> Any:
    # In two steps, as 2**n itself may not be a float although p * 2**n is.
    half = keep(T.floor(n * splat(0.5, 8)))
    return p * power_of_two(half, 8) * power_of_two(n - half, 8)


AVX2 = VectorIsa(Isa.AVX2, 8, FEATURES, _scale, _scale_normal)
