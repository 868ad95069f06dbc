"""bf16 attention over packed tokens, sequence by sequence, against float64 NumPy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.isa.amx import ALL_FULL
from sparsec.codegen.kernels.attention_bf16 import AttentionBf16, AttentionBf16Family
from sparsec.codegen.kernels.quantize import inverse_of
from sparsec.codegen.kernels.query_blocks import PACKED
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType

Array = np.ndarray[Any, Any]
ALL = [k for k in AttentionBf16Family().variants() if isinstance(k, AttentionBf16)]
VARIANTS = [k for k in ALL if k.mask == PACKED and k.result == "f32"]
SOME = [k for k in ALL if k.mask == PACKED and k.result != "f32" and k.rows in (4, 16)]
EPS = float(np.finfo(np.float32).eps)
BF16 = DType.BF16.numpy
HEADS = 2
# Around the edges of pairs (2), groups (16), the copy of the values (32) and panels (64); odd
# lengths make later sequences begin inside a pair.
LENGTHS = [
    [1],
    [2],
    [5, 1, 2, 8, 3],
    [15, 16, 17],
    [31, 32, 33, 1],
    [64],
    [63, 1, 65],
    [128, 3, 61, 64],
    [1] * 70,
    [200, 7],
]
IDS = ["-".join(map(str, n[:4])) for n in LENGTHS]


def operands(lengths: list[int], size: int) -> tuple[Array, Array]:
    """q, k and v of both heads, bf16[tokens, 3 * channels]; what is added to a key's scores."""
    rng = np.random.default_rng([size, *lengths])
    tokens = sum(lengths)
    x = rng.standard_normal((tokens, 3 * HEADS * size)).astype(BF16)
    mask = rng.standard_normal(tokens).astype(np.float32)
    mask[rng.random(tokens) < 0.2] = -1e4
    if len(lengths) > 1:
        mask[: lengths[0]] = -np.inf  # no key at all: zeros
    return x, mask


def call(
    run: Any, kernel: AttentionBf16, x: Array, mask: Array, lengths: list[int], *quant: Any
) -> Array:
    """The panels that the kernel writes."""
    channels, panels = x.shape[1] // 3, run.to_pairs(x)
    size = channels // HEADS
    dtype, rows = {
        "f32": (np.float32, channels),
        "u8": (np.uint8, channels),
        "bf16": (np.int32, channels // 2),
    }[kernel.result]
    y = np.full((panels.shape[0], rows, 64), 99, dtype)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sequence_of = np.repeat(np.arange(len(lengths)), lengths).astype(np.int64)
    places = [n for i in range(3) for n in (3 * channels // 2, i * channels // 2)]
    pointers = [panels, panels, panels, mask, sequence_of, starts, y]
    numbers = [len(x), HEADS, size, *places, size**-0.5, *quant]
    scratch = int(kernel.block.scratch_bytes(max(lengths), size))  # type: ignore[call-overload]
    tiles = [ALL_FULL] if kernel.has_tiles else []
    status = run(kernel, *pointers, *numbers, *tiles, output=y, items=y.shape[0] * HEADS,
                 scratch_bytes=scratch)  # fmt: skip
    assert status == 0
    return y


def exact(x: Array, mask: Array, lengths: list[int]) -> tuple[Array, Array]:
    """The same of each sequence alone, in fp64, and that with the sizes of the values."""
    channels = x.shape[1] // 3
    size = channels // HEADS
    offsets = {f"{name}_offset": i * channels for i, name in enumerate("qkv")}
    attrs = {"heads": HEADS, "head_size": size, "scale": size**-0.5, **offsets}
    parts: tuple[list[Array], list[Array]] = ([], [])
    for start, stop in pairwise([0, *np.cumsum(lengths)]):
        own = x[None, start:stop].astype(np.float64)
        scores = mask[start:stop].reshape(1, 1, 1, -1)
        for part, values in zip(parts, (own, np.abs(own)), strict=True):
            part.append(OPS["attention"].evaluate([own, own, values, scores], attrs, {})[0][0])
    return np.concatenate(parts[0]), np.concatenate(parts[1])


@pytest.mark.parametrize("lengths", LENGTHS, ids=IDS)
@pytest.mark.parametrize("units", [1, 3])
def test_against_exact_softmax(
    kernel: AttentionBf16, run: Any, lengths: list[int], units: int
) -> None:
    size = units * kernel.block.head_unit
    x, mask = operands(lengths, size)
    got = run.from_panels(call(run, kernel, x, mask, lengths), len(x))
    wanted, sizes = exact(x, mask, lengths)
    # Probabilities are rounded to bf16, half to even, and sums are off by a few eps a term, as
    # where tokens are not packed.
    bound = (2.0**-8 + (8 * size + max(lengths) + 64) * EPS) * sizes + 1e-30
    assert (np.abs(got - wanted) <= bound).all(), np.abs(got - wanted).max()


@pytest.mark.parametrize("lengths", [LENGTHS[2], LENGTHS[6]], ids=[IDS[2], IDS[6]])
def test_stored_results_are_those_of_fp32(
    some_kernel: AttentionBf16, run: Any, lengths: list[int]
) -> None:
    x, mask = operands(lengths, 3 * some_kernel.block.head_unit)
    plain = replace(some_kernel, result="f32")
    y = run.from_panels(call(run, plain, x, mask, lengths), len(x))
    if some_kernel.result == "bf16":
        stored = run.from_pairs(call(run, some_kernel, x, mask, lengths), len(x))
        np.testing.assert_array_equal(stored, y.astype(BF16))
        return
    scale, zero_point = 0.011, 120
    stored = call(run, some_kernel, x, mask, lengths, inverse_of(scale), zero_point)
    attrs = {"scale": scale, "zero_point": zero_point, "dtype": DType.U8}
    (expected,) = OPS["quantize"].evaluate([y], attrs, {})
    np.testing.assert_array_equal(run.from_panels(stored, len(x)), expected)


def test_a_sequence_does_not_see_the_values_of_its_neighbours(run: Any) -> None:
    """Sequences of odd length share pairs of keys: infinities stay where they are."""
    lengths = [5, 5, 7]
    x, _ = operands(lengths, 4)
    x[5:10, 2 * HEADS * 4 :] = np.inf
    mask = np.zeros(len(x), np.float32)
    y = run.from_panels(call(run, VARIANTS[0], x, mask, lengths), len(x))
    assert np.isfinite(np.delete(y, range(5, 10), 0)).all()
    assert np.isinf(y[5:10]).all()
