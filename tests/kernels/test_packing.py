"""Which tokens are packed, and their way back to rows, against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.packing import (
    ClearPadding,
    PackingFamily,
    PackTokens,
    UnpackTokens,
)
from sparsec.ir.dims import symbol
from sparsec.ir.ops import OPS

Array = np.ndarray[Any, Any]
ALL = PackingFamily().variants()
VARIANTS = [k for k in ALL if isinstance(k, PackTokens)]
SOME = [k for k in ALL if isinstance(k, UnpackTokens)]
LOWEST = float(np.finfo(np.float32).min)
SIZES = [(1, 1), (1, 7), (3, 16), (5, 33), (70, 1), (2, 200)]


def masks(batch: int, seq: int, rng: np.random.Generator) -> list[Array]:
    """Full, left, right, with holes, and with sequences of padding alone."""
    ends = rng.integers(1, seq + 1, (batch, 1))
    right = np.arange(seq) < ends
    holes = rng.random((batch, seq)) < 0.5
    empty = right.copy()
    empty[::2] = False
    return [np.ones((batch, seq), bool), right, right[:, ::-1].copy(), holes, empty]


def pack(real: Array, mask: Array, *, first: bool) -> list[Array]:
    attrs = {"tokens": symbol("tokens"), "most": real.size, "seen": LOWEST / 2}
    return OPS["pack_tokens"].evaluate([real, mask], {**attrs, "keep_first": first}, {})


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_pack_tokens(kernel: PackTokens, run: Any, size: tuple[int, int], first: bool) -> None:
    rng = np.random.default_rng(size)
    for real in masks(*size, rng):
        mask = np.where(real, 0, LOWEST).astype(np.float32)
        mask[rng.random(size) < 0.1] = rng.choice([np.nan, -np.inf, 1.0])
        want = pack(real, mask, first=first)
        shapes = [(), (real.size,), (real.size,), (size[0] + 1,), size]
        got = [np.full(shape, -7, np.int64) for shape in shapes]
        numbers = [*size, int(first), LOWEST / 2]
        assert run(kernel, real, mask, *got, *numbers, output=got, items=1, splits=1) == 0
        for ours, theirs in zip(got, want, strict=True):
            filled = ours[: len(theirs)] if theirs.ndim == 1 else ours
            np.testing.assert_array_equal(filled, theirs)


@pytest.mark.parametrize("channels", [1, 8, 17, 64])
@pytest.mark.parametrize("size", SIZES)
def test_unpack_tokens(
    some_kernel: UnpackTokens, run: Any, size: tuple[int, int], channels: int
) -> None:
    rng = np.random.default_rng([*size, channels])
    for real in masks(*size, rng):
        mask = np.where(real, 0, LOWEST).astype(np.float32)
        count, index, _, _, place = pack(real, mask, first=True)
        x = rng.standard_normal((int(count), channels)).astype(np.float32)
        y = np.full((real.size, channels), np.nan, np.float32)
        args = (run.to_panels(x), index, y, int(count), channels)
        assert run(some_kernel, *args, output=y, items=-(-int(count) // 16)) == 0
        clear = ClearPadding(some_kernel.vector)
        assert run_in_place(run, clear, place, y, channels) == 0
        (want,) = OPS["unpack_tokens"].evaluate([x[None], index, place], {}, {})
        np.testing.assert_array_equal(y.reshape(want.shape), want)


def run_in_place(run: Any, kernel: ClearPadding, place: Array, y: Array, channels: int) -> int:
    """y keeps what the kernel does not write."""
    status = 0
    for begin, end in ((len(y) // 3, len(y)), (0, len(y) // 3)):
        pointers = [np.ascontiguousarray(place).ctypes.data, y.ctypes.data]
        status |= run.function(kernel)(*pointers, channels, begin, end)
    return status
