"""Instruction sets wrapped as TIR expressions."""

from __future__ import annotations

from sparsec.codegen.isa.avx2 import AVX2
from sparsec.codegen.isa.avx512 import AVX512
from sparsec.codegen.isa.bf16 import AMX_BF16, AVX512_BF16
from sparsec.codegen.isa.int8 import AVX512_VBMI2, INT8_ISAS
from sparsec.codegen.isa.vector import VectorIsa
from sparsec.target import Isa, Target

VECTOR_ISAS: tuple[VectorIsa, ...] = (AVX2, AVX512)  # weakest first

# LLVM features of all kernels of an instruction-set level.
FEATURES: dict[Isa, tuple[str, ...]] = {
    **{v.isa: v.features for v in VECTOR_ISAS},
    **{v.isa: v.features for v in INT8_ISAS},
    AVX512_VBMI2.isa: AVX512_VBMI2.features,
    AVX512_BF16.isa: AVX512_BF16.features,
    AMX_BF16.isa: AMX_BF16.features,  # those of int8 among them
}

__all__ = [
    "AVX2",
    "AVX512",
    "AVX512_BF16",
    "FEATURES",
    "VECTOR_ISAS",
    "VectorIsa",
    "by_name",
    "vector_isas",
]


def vector_isas(target: Target) -> list[VectorIsa]:
    """The fp32 vectors that the target has, the widest first."""
    return [v for v in reversed(VECTOR_ISAS) if target.has(v.isa)]


def by_name(name: str) -> VectorIsa:
    """The vectors of the level with this name: of VECTOR_ISAS, or those that compute in bf16."""
    return next(v for v in (*VECTOR_ISAS, AVX512_BF16, AMX_BF16) if v.name == name)
