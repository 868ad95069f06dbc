"""AVX512-BF16: products of pairs of bf16, added in fp32.

A *pair* is two channels of a token in a 32-bit lane, the even one in the low half. The
multiply-add takes denormal inputs and results as zero and rounds after each of its two products
(Intel SDM, VDPBF16PS), so that sums differ from other orders as fp32 sums do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.amx import AMX_FEATURES
from sparsec.codegen.isa.avx512 import AVX512
from sparsec.codegen.isa.vector import keep, shuffle_of
from sparsec.ir.op_spec import Array
from sparsec.target import Isa

LANES = 16
HIGH = -65536  # the upper 16 bits of an int32

AVX512_BF16 = replace(
    AVX512,
    isa=Isa.AVX512_BF16,
    features=(*AVX512.features, "+avx512vnni", "+avx512bf16"),
)
# Tiles are multiplied by `isa.amx`; all else is as with vectors.
AMX_BF16 = replace(AVX512_BF16, isa=Isa.AMX, features=(*AVX512_BF16.features, *AMX_FEATURES))


def dot(total: Any, x: Any, words: Any) -> Any:
    """`total` plus both products of each pair; x and words are int32 vectors of pairs."""
    return T.call_pure_extern("float32x16", tir.BF16_DOT, total, x, words)


def pairs_of(even: Any, odd: Any) -> Any:
    """Two vectors of floats, rounded half to even, as one int32 vector of pairs."""
    halves = keep(T.call_pure_extern("int16x32", tir.BF16_PAIRS, even, odd))
    order = [i + LANES * part for i in range(LANES) for part in (0, 1)]
    return keep(T.reinterpret("int32x16", shuffle_of([halves], order)))


def mixed(even: Any, odd: Any) -> Any:
    """Pairs of the even channels of one vector of pairs and the odd ones of another."""
    high, low = (T.broadcast(T.int32(n), LANES) for n in (HIGH, ~HIGH))
    return keep(T.bitwise_or(T.bitwise_and(even, low), T.bitwise_and(odd, high)))


def pair_words(even: Array, odd: Array) -> Array:
    """Weights of both channels of each pair as int32 words."""
    halves = np.stack([even, odd], axis=-1).astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(halves).view("<i4")[..., 0]
