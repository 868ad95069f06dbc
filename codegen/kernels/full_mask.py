"""A mask with a value per query and key as attention wants it: keys down, queries in the lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.vector import keep, ramp, transpose
from sparsec.codegen.kernels.panels import const, div, loop

# (key, first query of the block, values of `lanes` queries, lanes)
Store = Callable[[Any, Any, Any, int], None]


def transpose_mask(
    s: tir.KernelScope, first: Any, query: Any, width: int, lanes: int, store: Store
) -> None:
    """Calls `store` for all of the mask of `width` queries from `query` of the sequence on.

    `first` is where the mask of the sequence and head starts. Reads the parameters `mask`, `seq`
    and `query_step`. A query outside the sequence gets the mask of some query of it.
    """
    mask, seq = s["mask"], s["seq"]
    with loop(0, width // lanes) as i:
        queries = [query + i * lanes + lane for lane in range(lanes)]
        inside = [T.min(T.max(q, const(0)), seq - 1) for q in queries]
        rows = [keep(first + q * s["query_step"]) for q in inside]
        with loop(0, div(seq, lanes)) as block:
            tile = [keep(mask[ramp(row + block * lanes, lanes)]) for row in rows]
            for j, value in enumerate(transpose(tile)):
                store(block * lanes + j, i * lanes, value, lanes)
        with loop(div(seq, lanes) * lanes, seq) as key:
            for lane, row in enumerate(rows):
                store(key, i * lanes + lane, mask[row + key], 1)
