"""Embedding: sums of table rows as panels; ids out of range are refused, never read.

Of fp32 tables alone both ops mean the same, so the meaning of embedding_int8 serves all kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.embedding import Embedding, EmbeddingFamily
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType

Array = np.ndarray[Any, Any]
VARIANTS = EmbeddingFamily().variants()
SOME = [k for k in VARIANTS if isinstance(k, Embedding) and DType.I64 in k.ids]
ROWS = (50, 20, 2)


ZERO_POINTS = (0, -7, 19)


def call(
    run: Any, kernel: Embedding, ids: list[Array], tables: list[Array], size: tuple[int, int],
    scales: list[Array | None],
) -> tuple[int, Array]:  # fmt: skip
    batch, seq = size
    channels = tables[0].shape[1]
    y = np.full_like(run.to_panels(np.zeros((batch * seq, channels), np.float32)), np.nan)
    args: list[Any] = []
    for t, (i, table, scale) in enumerate(zip(ids, tables, scales, strict=True)):
        rows, length = (1, *i.shape)[-2:]
        steps = (0 if rows == 1 else length, 0 if length == 1 else 1)
        quantised = [] if scale is None else [scale, ZERO_POINTS[t]]
        args += [i, table, *quantised, table.shape[0], *steps]
    items = -(-batch * seq // 16)
    status = run(kernel, *args, y, batch * seq, seq, channels, output=y, items=items)
    return status, y


def tables_of(
    kernel: Embedding, channels: int, rng: np.random.Generator
) -> tuple[list[Array], list[Array | None]]:
    """A table per ids of the kernel, and the scales of those that are int8."""
    tables: list[Array] = []
    scales: list[Array | None] = []
    for t in range(len(kernel.ids)):
        shape = (ROWS[t], channels)
        if t < len(kernel.ids) - kernel.int8_tables:
            tables.append(rng.standard_normal(shape).astype(np.float32))
            scales.append(None)
        else:
            tables.append(rng.integers(-128, 128, shape).astype(np.int8))
            scales.append(rng.uniform(1e-3, 2e-2, ROWS[t]).astype(np.float32))
    return tables, scales


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (1, 64), (3, 5), (2, 33), (3, 43), (130, 1)])
@pytest.mark.parametrize("channels", [1, 8, 33])
@pytest.mark.parametrize("broadcast", [False, True])
def test_sums_of_rows(
    kernel: Embedding, run: Any, size: tuple[int, int], channels: int, broadcast: bool
) -> None:
    rng = np.random.default_rng([*size, channels])
    shapes = [size, (size[1],) if broadcast else size, (1, 1) if broadcast else size]
    tables, scales = tables_of(kernel, channels, rng)
    ids = [
        rng.integers(-rows, rows, shape).astype(dtype.numpy)
        for rows, shape, dtype in zip(ROWS, shapes, kernel.ids, strict=False)
    ]
    status, y = call(run, kernel, ids, tables, size, scales)
    operands = [x for part in zip(ids, tables, scales, strict=True) for x in part]
    attrs = {"zero_points": ZERO_POINTS[: len(ids)]}
    (total,) = OPS["embedding_int8"].evaluate(operands, attrs, {})
    expected = np.broadcast_to(total, (*size, channels))
    assert status == 0
    flat = expected.reshape(-1, channels)
    np.testing.assert_array_equal(y, run.to_panels(flat, lanes_past_end=0.0))


@pytest.mark.parametrize("bad", [50, -51, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("where", [0, 16, 36])
def test_an_id_out_of_range_is_status_1(kernel: Embedding, run: Any, bad: int, where: int) -> None:
    ids = [np.zeros((1, 37), d.numpy) for d in kernel.ids]
    ids[0][0, where] = bad
    tables, scales = tables_of(kernel, 8, np.random.default_rng(0))
    status, _ = call(run, kernel, ids, tables, (1, 37), scales)
    assert status == 1


@pytest.mark.parametrize("bad", [2**32, 2**40, -(2**62), 2**63 - 1, -(2**63)])
def test_an_id_of_many_bits_is_status_1(some_kernel: Embedding, run: Any, bad: int) -> None:
    ids = [np.zeros((1, 5), np.int64) for _ in some_kernel.ids]
    ids[-1][0, 3] = bad
    tables, scales = tables_of(some_kernel, 8, np.random.default_rng(0))
    status, _ = call(run, some_kernel, ids, tables, (1, 5), scales)
    assert status == 1
