"""int8 weights `[m, k]` in the order in which the kernels of int8_gemm read them.

A *step* is four input channels for one block of rows. The weights of a block of rows are
`[strip][step][row of the strip][word]`, a strip being the rows of one register block.

Wide weights, i16 of up to 255 on either side, are the sum of i8 parts: the blocks of a list may
read the same channels twice. All channels in turn they can not be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sparsec.codegen.isa.amx import (
    FULL,
    ROW_BYTES,
    ROWS,
    SUMS,
    TILE_REGISTERS,
    configuration,
)
from sparsec.codegen.kernels.weight_blocks import whole_steps
from sparsec.ir.op_spec import Array
from sparsec.sparse.bsr import BsrMatrix

QUAD = 4
TILE_QUADS = ROW_BYTES // QUAD
FETCH = 4  # quads that int8_tiles fetches at a time


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """`words`, and of a sparse weight the steps of every block of rows and what they read.

    Block b has steps `starts[b]:starts[b + 1]`. `indices` holds a quad of channels per step, or
    four channels per step; in 16 bits, as there are at most 65536 channels. For AMX see
    `pack_tiles`; `tiles` are then the shapes of the tile registers.

    `most_steps` are those of any block of rows, `quads` all that the blocks of rows store.
    """

    words: Array
    starts: Array | None = None
    indices: Array | None = None
    tiles: Array | None = None
    most_steps: int = 0
    quads: int = 0

    @property
    def arrays(self) -> dict[str, Array]:
        """Those that there are, by name, as a kernel takes them."""
        names = ("words", "tiles", "starts", "indices")
        return {n: a for n in names if (a := getattr(self, n)) is not None}


Words = Callable[[Array], Array]


def pack_dense(w: Array, strip: int, words: Words) -> PackedWeight:
    """All channels, in blocks of `strip` rows."""
    quads = _whole_blocks(w, strip, QUAD)
    steps = quads.reshape(-1, strip, quads.shape[1] // QUAD, QUAD).transpose(0, 2, 1, 3)
    return PackedWeight(_flat(words, steps), quads=quads.size // (strip * QUAD))


def pack_quads(w: Array, rows: int, strip: int, words: Words) -> PackedWeight:
    """The blocks of `rows` by 4 channels that are not zero."""
    return _pack_steps(_quads_of(w, rows), strip, words)


def pack_channels(w: Array, rows: int, strip: int, words: Words) -> PackedWeight:
    """The blocks of `rows` by one channel that are not zero, four to a step.

    A last step that is not full gets channel 0 with weights of zero.
    """
    return _pack_steps(_channels_of(w, rows), strip, words)


def pack_tiles(w: Array, rows: int, cols: int, strip: int) -> PackedWeight:
    """For AMX, which multiplies a tile of up to 16 rows by 16 quads: a step of int8_tiles.

    The weights of a block of rows are `[strip][step][row of the strip][16][4]`; quads that fill up
    a last step have weights of zero, and read channel 0. `cols` is 4, 1, or 0 for all channels.

    Of a sparse weight, `starts[b]` are two numbers: the first step of block b, and how many times
    FETCH quads it has; `indices` has room for whole steps.
    """
    shape = (min(strip, ROWS), ROW_BYTES)
    sums, others = [shape] * SUMS, [FULL] * (TILE_REGISTERS - SUMS)
    others[0] = shape
    tiles = configuration([*sums, *others])
    if cols == 0:
        padded = _whole_blocks(w, strip, ROW_BYTES)
        steps = padded.reshape(-1, strip, padded.shape[1] // ROW_BYTES, ROW_BYTES)
        quads = steps.shape[0] * -(-w.shape[1] // QUAD)
        return PackedWeight(_flat(_bytes, steps.transpose(0, 2, 1, 3)), tiles=tiles, quads=quads)
    found = _channels_of(w, rows) if cols == 1 else _quads_of(w, rows)
    first, place = whole_steps(found.starts, TILE_QUADS)
    blocks = np.zeros((first[-1] * TILE_QUADS, rows, QUAD), np.int8)
    blocks[place] = found.blocks
    indices = np.zeros((len(blocks), found.indices.shape[1]), np.int32)
    indices[place] = found.indices
    whole = blocks.reshape(-1, TILE_QUADS, rows, QUAD).transpose(0, 2, 1, 3)
    fetches = -(-np.diff(found.starts) // FETCH)
    starts = np.stack([first[:-1], fetches], axis=1).astype(np.int32)
    return PackedWeight(
        _strips(whole.reshape(-1, rows, ROW_BYTES), first, strip, _bytes),
        starts,
        _indices(indices),
        tiles,
        most_steps=int(np.diff(first).max(initial=0)),
        quads=len(found.blocks),
    )


def pack_rows(values: Array, rows: int) -> Array:
    """One value per row, zeros past the last up to a whole block of `rows`."""
    packed = np.zeros(-(-len(values) // rows) * rows, values.dtype)
    packed[: len(values)] = values
    return packed


def _whole_blocks(w: Array, rows: int, cols: int) -> Array:
    """`w` of i8 with zeros on its lower and right edge."""
    assert w.dtype == np.int8, w.dtype
    m, k = w.shape
    return np.pad(w, ((0, -m % rows), (0, -k % cols)))


@dataclass(frozen=True, slots=True, eq=False)
class _Quads:
    """What is stored: `blocks[starts[b]:starts[b + 1]]`, `[quad][row][4]`, is block b of rows.

    `indices` says, for every quad, which quad of channels or which four channels it is.
    """

    blocks: Array
    starts: Array
    indices: Array


def _quads_of(w: Array, rows: int) -> _Quads:
    bsr = _stored_blocks(w, rows, QUAD)
    return _Quads(bsr.data, bsr.indptr, bsr.indices[:, None])


def _stored_blocks(w: Array, rows: int, cols: int) -> BsrMatrix:
    """The blocks that are not zero, of wide weights those of each part; columns are those of `w`,
    and may come twice."""
    below, right = -w.shape[0] % rows, -w.shape[1] % cols
    parts = _parts(np.pad(w, ((0, below), (0, right))))
    bsr = BsrMatrix.from_dense(np.concatenate(parts, axis=1), rows, cols)
    return replace(bsr, indices=bsr.indices % (parts[0].shape[1] // cols))


def _parts(w: Array) -> list[Array]:
    """Matrices of i8 whose sum is `w`: most of wide weights is in the first."""
    if w.dtype == np.int8:
        return [w]
    rest, found = w, list[Array]()
    while rest.any() or not found:
        found.append(rest.clip(-128, 127).astype(np.int8))
        rest = rest - found[-1]
    return found


def _channels_of(w: Array, rows: int) -> _Quads:
    bsr = _stored_blocks(w, rows, 1)
    steps = -(-bsr.row_lengths // QUAD)
    starts = np.concatenate([[0], np.cumsum(steps)]).astype(np.int32)
    row = np.repeat(np.arange(len(steps)), bsr.row_lengths)
    place = np.arange(len(row)) - bsr.indptr[row] + QUAD * starts[row]
    indices = np.zeros(QUAD * starts[-1], np.int32)
    indices[place] = bsr.indices
    data = np.zeros((QUAD * starts[-1], rows), np.int8)
    data[place] = bsr.data[:, :, 0]
    blocks = data.reshape(-1, QUAD, rows).transpose(0, 2, 1)
    return _Quads(blocks, starts, indices.reshape(-1, QUAD))


def _pack_steps(found: _Quads, strip: int, words: Words) -> PackedWeight:
    """A step for every quad."""
    return PackedWeight(
        _strips(found.blocks, found.starts, strip, words),
        found.starts,
        _indices(found.indices),
        most_steps=int(np.diff(found.starts).max(initial=0)),
        quads=len(found.blocks),
    )


def _strips(blocks: Array, starts: Array, strip: int, words: Words) -> Array:
    """`[step][row][byte]` as `[block of rows][strip][step][row of the strip][word]`."""
    depth = blocks.shape[2]
    parts = [
        block.reshape(len(block), -1, strip, depth).transpose(1, 0, 2, 3).reshape(-1, depth)
        for block in np.split(blocks, starts[1:-1])
        if len(block)
    ]
    return _flat(words, np.concatenate([*parts, np.zeros((0, depth), np.int8)]))


def _bytes(w: Array) -> Array:
    return w.view("<i4")


def _flat(words: Words, quads: Array) -> Array:
    return _readable(words(np.ascontiguousarray(quads)).reshape(-1))


def _indices(values: Array) -> Array:
    return _readable(values.reshape(-1).astype(np.uint16))


def _readable(values: Array) -> Array:
    """At least one element: nothing in the weight blob is empty."""
    return values if values.size else np.zeros(1, values.dtype)
