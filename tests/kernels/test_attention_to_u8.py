"""Attention that quantises its result: the bytes are those of the fp32 kernel's numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.attention import Attention, AttentionFamily
from sparsec.codegen.kernels.quantize import inverse_of
from sparsec.codegen.kernels.query_blocks import PACKED
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType

Array = np.ndarray[Any, Any]
VARIANTS = [
    k
    for k in AttentionFamily().variants()
    if isinstance(k, Attention) and k.result == "u8" and k.mask != PACKED
]


def masks(
    kind: str, batch: int, seq: int, rng: np.random.Generator
) -> tuple[list[Array], list[int]]:
    """The mask of a kernel and its (batch, head, query) steps; the last sequence has no key."""
    if kind == "none":
        return [], []
    queries = 1 if kind == "key" else seq
    mask = rng.standard_normal((batch, 1, queries, seq)).astype(np.float32)
    mask[-1] = -np.inf
    return [mask], [queries * seq, 0, 0 if queries == 1 else seq]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 7, 16, 17, 33, 48, 64, 65, 129])
@pytest.mark.parametrize("head_size", [5, 8, 33])
def test_bytes_are_the_quantised_numbers(
    kernel: Attention, run: Any, batch: int, seq: int, head_size: int
) -> None:
    rng = np.random.default_rng([batch, seq, head_size])
    tokens, heads, scale, zero_point = batch * seq, 2, 0.011, 120
    channels = heads * head_size
    x = run.to_panels(rng.standard_normal((tokens, 3 * channels)).astype(np.float32))
    mask, steps = masks(kernel.mask, batch, seq, rng)
    places = [size for i in range(3) for size in (3 * channels, i * channels)]
    numbers = [tokens, seq, heads, head_size, *places, *steps, head_size**-0.5]
    scratch, items = -(-seq // 16) * 16 * 64 * 4, x.shape[0] * heads

    y = np.full((x.shape[0], channels, 64), np.nan, np.float32)
    plain = replace(kernel, result="f32")
    pointers = [x, x, x, *mask]
    assert run(plain, *pointers, y, *numbers, output=y, items=items, scratch_bytes=scratch) == 0

    stored = np.full(y.shape, 99, np.uint8)
    numbers += [inverse_of(scale), zero_point]
    status = run(kernel, *pointers, stored, *numbers, output=stored, items=items,
                 scratch_bytes=scratch)  # fmt: skip
    assert status == 0
    attrs = {"scale": scale, "zero_point": zero_point, "dtype": DType.U8}
    (expected,) = OPS["quantize"].evaluate([run.from_panels(y, tokens)], attrs, {})
    np.testing.assert_array_equal(run.from_panels(stored, tokens), expected)
