"""What families know of a weight's blocks: its layout, how many are stored, and where."""

from __future__ import annotations

import numpy as np

from sparsec.ir.graph import Value
from sparsec.ir.layouts import Bsr
from sparsec.ir.op_spec import Array
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


def whole_steps(starts: Array, depth: int) -> tuple[Array, Array]:
    """Where entries go when each list of them is filled up to whole steps of `depth`.

    List i is the entries `starts[i]:starts[i + 1]`. Returns the first step of each list, with the
    end of the last one, and the place of each entry.
    """
    lengths = np.diff(starts)
    first = np.concatenate([[0], np.cumsum(-(-lengths // depth))])
    shifts = np.repeat(first[:-1] * depth - starts[:-1], lengths)
    return first, shifts + np.arange(len(shifts))
