"""int8 weights `[m, k]` in the order in which the kernels of int8_gemm read them.

A *step* is four input channels for one block of rows. The weights of a block of rows are
`[strip][step][row of the strip][word]`, a strip being the rows of one register block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsec.ir.op_spec import Array
from sparsec.sparse.bsr import BsrMatrix

QUAD = 4


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """`words`, and of a sparse weight the steps of every block of rows and what they read.

    Block b has steps `starts[b]:starts[b + 1]`. `indices` holds a quad of channels per step, or
    four channels per step; in 16 bits, as there are at most 65536 channels.
    """

    words: Array
    starts: Array | None = None
    indices: Array | None = None

    @property
    def most_steps(self) -> int:
        """Of any block of rows."""
        return 0 if self.starts is None else int(np.diff(self.starts).max(initial=0))


Words = Callable[[Array], Array]


def pack_dense(w: Array, strip: int, words: Words) -> PackedWeight:
    """All channels, in blocks of `strip` rows."""
    quads = _whole_blocks(w, strip, QUAD)
    steps = quads.reshape(-1, strip, quads.shape[1] // QUAD, QUAD).transpose(0, 2, 1, 3)
    return PackedWeight(_flat(words, steps))


def pack_quads(w: Array, rows: int, strip: int, words: Words) -> PackedWeight:
    """The blocks of `rows` by 4 channels that are not zero."""
    bsr = BsrMatrix.from_dense(_whole_blocks(w, rows, QUAD), rows, QUAD)
    return PackedWeight(
        _strips(bsr.data, bsr.indptr, strip, words), bsr.indptr, _indices(bsr.indices)
    )


def pack_channels(w: Array, rows: int, strip: int, words: Words) -> PackedWeight:
    """The blocks of `rows` by one channel that are not zero, four to a step.

    A last step that is not full gets channel 0 with weights of zero.
    """
    bsr = BsrMatrix.from_dense(_whole_blocks(w, rows, 1), rows, 1)
    steps = -(-bsr.row_lengths // QUAD)
    starts = np.concatenate([[0], np.cumsum(steps)]).astype(np.int32)
    row = np.repeat(np.arange(len(steps)), bsr.row_lengths)
    place = np.arange(len(row)) - bsr.indptr[row] + QUAD * starts[row]
    indices = np.zeros(QUAD * starts[-1], np.int32)
    indices[place] = bsr.indices
    data = np.zeros((QUAD * starts[-1], rows), np.int8)
    data[place] = bsr.data[:, :, 0]
    blocks = data.reshape(-1, QUAD, rows).transpose(0, 2, 1)
    return PackedWeight(_strips(blocks, starts, strip, words), starts, _indices(indices))


def pack_rows(values: Array, rows: int) -> Array:
    """One value per row, zeros past the last up to a whole block of `rows`."""
    packed = np.zeros(-(-len(values) // rows) * rows, values.dtype)
    packed[: len(values)] = values
    return packed


def _whole_blocks(w: Array, rows: int, cols: int) -> Array:
    """`w` with zeros on its lower and right edge."""
    m, k = w.shape
    return np.pad(w.astype(np.int8), ((0, -m % rows), (0, -k % cols)))


def _strips(blocks: Array, starts: Array, strip: int, words: Words) -> Array:
    """`[step][row][4]` as `[block of rows][strip][step][row of the strip][word]`."""
    parts = [
        block.reshape(len(block), -1, strip, QUAD).transpose(1, 0, 2, 3).reshape(-1, QUAD)
        for block in np.split(blocks, starts[1:-1])
        if len(block)
    ]
    return _flat(words, np.concatenate([*parts, np.zeros((0, QUAD), np.int8)]))


def _flat(words: Words, quads: Array) -> Array:
    return _readable(words(np.ascontiguousarray(quads)).reshape(-1))


def _indices(values: Array) -> Array:
    return _readable(values.astype(np.uint16))


def _readable(values: Array) -> Array:
    """At least one element: nothing in the weight blob is empty."""
    return values if values.size else np.zeros(1, values.dtype)
