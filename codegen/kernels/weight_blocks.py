"""What families know of a weight's blocks: its layout, and how many of them are stored."""

from __future__ import annotations

from sparsec.ir.graph import Value
from sparsec.ir.layouts import Bsr
from sparsec.sparse.bsr import block_zeros


def layout_and_density(weight: Value) -> tuple[str, float]:
    """`("bsr16x4", 0.2)`; `("dense", 1.0)` for a weight without blocks."""
    layout = weight.type.layout
    if not isinstance(layout, Bsr):
        return "dense", 1.0
    assert weight.data is not None, weight
    block = (layout.rows, layout.cols)
    return str(layout), round(1.0 - block_zeros(weight.data, (block,))[block], 3)


def block_of(layout: str) -> tuple[int, int] | None:
    """`bsr16x4` as (16, 4); None for a dense one."""
    if not layout.startswith("bsr"):
        return None
    rows, cols = layout.removeprefix("bsr").split("x")
    return int(rows), int(cols)
