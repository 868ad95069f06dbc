"""AVX-512 F, BW, DQ and VL: 16 floats to a vector."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa import avx2
from sparsec.codegen.isa.vector import VectorIsa, splat
from sparsec.target import Isa

FEATURES = (
    *avx2.FEATURES,
    "+avx512f",
    "+avx512bw",
    "+avx512dq",
    "+avx512vl",
    "-prefer-256-bit",
)
_CURRENT_ROUNDING = 4


def _scale(p: Any, n: Any) -> Any:
    return T.call_llvm_pure_intrin(
        "float32x16",
        "llvm.x86.avx512.mask.scalef.ps.512",
        p,
        n,
        splat(0.0, 16),
        tirx.const(-1, "int16"),
        tirx.const(_CURRENT_ROUNDING, "int32"),
    )


AVX512 = VectorIsa(Isa.AVX512, 16, FEATURES, _scale, _scale)
