"""Attention over packed tokens gives what the same attention gives with padding masked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.isa.amx import ALL_FULL
from sparsec.codegen.kernels.attention import Attention, AttentionFamily
from sparsec.codegen.kernels.attention_int8 import AttentionInt8, AttentionInt8Family
from sparsec.codegen.kernels.attention_int8_tiles import LEAST_HEAD_SIZE
from sparsec.codegen.kernels.quantize import inverse_of
from sparsec.codegen.kernels.query_blocks import PACKED
from sparsec.ir.dims import evaluate

Array = np.ndarray[Any, Any]
Kernel = Attention | AttentionInt8
ALL = [*AttentionFamily().variants(), *AttentionInt8Family().variants()]
VARIANTS = [k for k in ALL if isinstance(k, Kernel) and k.mask == PACKED]
EPS = float(np.finfo(np.float32).eps)
HEADS, V_SCALE = 2, 0.013
OUT = (0.011, 100)
# Around the edges of quads (4), groups (16), blocks of two and four groups, and panels (64).
LENGTHS = [
    [1],
    [5, 1, 2, 8, 3],
    [15, 16, 17],
    [64],
    [63, 1, 65],
    [32, 32, 31, 33],
    [128, 3, 61, 64],
    [1] * 70,
    [200, 7],
]


def run_kernel(
    run: Any, kernel: Kernel, x: Array, size: int, between: tuple[list[Any], list[Any]],
    longest: int,
) -> Array:  # fmt: skip
    """`x` is [tokens, 3 * channels]; `between` are the arguments around y and tokens."""
    tokens, channels = len(x), HEADS * size
    panels = run.to_panels(x)
    fill, dtype = (np.nan, np.float32) if kernel.result == "f32" else (99, np.uint8)
    y = np.full((panels.shape[0], channels, 64), fill, dtype)
    pointers, sizes = between
    lengths, steps = sizes[:-3] or [], sizes[-3:] if len(sizes) > 3 else []
    args = [panels, panels, panels, *pointers, y, tokens, *lengths, HEADS, size]
    args += [n for i in range(3) for n in (3 * channels, i * channels)]
    quant = [inverse_of(OUT[0]), OUT[1]] if kernel.result == "u8" else []
    if isinstance(kernel, AttentionInt8):
        args += [*steps[:2], 3.0 / (74 * 74 * size**0.5), V_SCALE, *quant]
        args += [ALL_FULL] if kernel.has_tiles else []
        scratch = evaluate(kernel.block.scratch_bytes(longest, size, kernel.mask), {})
    else:
        args += [*steps[:3], size**-0.5, *quant]
        scratch = -(-longest // 16) * 16 * 256
    items = y.shape[0] * HEADS
    assert run(kernel, *args, output=y, items=items, scratch_bytes=scratch) == 0
    return np.asarray(run.from_panels(y, tokens))


def packed(run: Any, kernel: Kernel, x: Array, mask: Array, lengths: list[int]) -> Array:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sequence_of = np.repeat(np.arange(len(lengths)), lengths).astype(np.int64)
    pointers = [mask, sequence_of, starts]
    return run_kernel(run, kernel, x, x.shape[1] // 6, (pointers, []), max(lengths))


def padded(run: Any, kernel: Kernel, x: Array, mask: Array, lengths: list[int]) -> Array:
    """The same tokens in rows of equal length; what fills them up is masked with -inf."""
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    rows = np.full((*real.shape, x.shape[1]), 3, x.dtype)
    scores = np.full(real.shape, -np.inf, np.float32)
    rows[real], scores[real] = x, mask
    sizes = [real.shape[1], real.shape[1], 0, 0]
    flat = rows.reshape(-1, x.shape[1])
    y = run_kernel(run, replace(kernel, mask="key"), flat, x.shape[1] // 6,
                   ([scores], sizes), real.shape[1])  # fmt: skip
    return y.reshape(*real.shape, -1)[real]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: "-".join(map(str, n[:4])))
@pytest.mark.parametrize("size", [4, 20])
def test_ragged_sequences(kernel: Kernel, run: Any, lengths: list[int], size: int) -> None:
    if kernel.isa == "amx":
        size = max(size, LEAST_HEAD_SIZE)
    rng = np.random.default_rng([size, *lengths])
    int8, shape = isinstance(kernel, AttentionInt8), (sum(lengths), 3 * HEADS * size)
    x = rng.integers(0, 256, shape).astype(np.uint8)
    x = x if int8 else rng.standard_normal(shape).astype(np.float32)
    mask = rng.standard_normal(shape[0]).astype(np.float32)
    mask[rng.random(shape[0]) < 0.2] = -1e4
    if len(lengths) > 1:
        mask[: lengths[0]] = -np.inf  # no key at all: zeros
    got, want = (f(run, kernel, x, mask, lengths) for f in (packed, padded))
    if int8:  # the same sums of integers
        np.testing.assert_array_equal(got, want)
        return
    # Scores are the same; a probability is, relatively, off by the rounding of the two sums of
    # up to max(lengths) of them. A byte is one step off where the number is that near to a half.
    bound = 4 * EPS * (max(lengths) + 8) * np.abs(x).max()
    bound = bound if kernel.result == "f32" else 1
    assert np.abs(got.astype(np.float64) - want).max() <= bound
    assert not np.isnan(got.astype(np.float64)).any()
