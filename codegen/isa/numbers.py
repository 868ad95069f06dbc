"""What the operands of float products are: fp32 numbers, or pairs of bf16 in a 32-bit lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.codegen.isa import bf16
from sparsec.codegen.isa.avx2 import AVX2
from sparsec.codegen.isa.avx512 import AVX512
from sparsec.codegen.isa.vector import VectorIsa


@dataclass(frozen=True, slots=True)
class Numbers:
    """`dtype` is that of a lane, which holds `per_lane` channels.

    `dot(sum, x, w)` adds the products of each lane; `join` makes an operand of the
    `indices_per_step` rows that a step of a sparse weight reads; `pairs_of` rounds two vectors of
    floats to one of pairs, where the instruction set has bf16.
    """

    name: str
    vector: VectorIsa
    dtype: str
    per_lane: int
    dot: Callable[[Any, Any, Any], Any]
    join: Callable[[Sequence[Any]], Any]
    pairs_of: Callable[[Any, Any], Any] = bf16.pairs_of

    @property
    def indices_per_step(self) -> int:
        return self.per_lane

    def __repr__(self) -> str:
        return f"Numbers({self.name}, {self.vector.name})"


def _f32(vector: VectorIsa) -> Numbers:
    return Numbers(
        "f32", vector, "float32", 1, lambda total, x, w: total + w * x, lambda rows: rows[0]
    )


def _bf16(vector: VectorIsa) -> Numbers:
    return Numbers("bf16", vector, "int32", 2, bf16.dot, lambda rows: bf16.mixed(*rows))


F32_NUMBERS = (_f32(AVX2), _f32(AVX512))
BF16_NUMBERS = (_bf16(bf16.AVX512_BF16), _bf16(bf16.AMX_BF16))
NUMBERS = (*F32_NUMBERS, *BF16_NUMBERS)  # of each name weakest first


def numbers_of(name: str, isa: str) -> Numbers:
    """The entry of NUMBERS of this name and level."""
    return next(n for n in NUMBERS if (n.name, n.vector.name) == (name, isa))
