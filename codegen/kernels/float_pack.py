"""fp32 and bf16 weights `[m, k]` in the order in which the kernels of float_gemm read them.

A *strip* is the rows of a register block. A *step* is a channel in fp32; in bf16 it is an even
and an odd channel, which need not be neighbours when the weight is sparse. The words of a strip
are `[step][row]`; those for AMX `[step of tiles][tile][row][pair]`, 16 rows by 16 pairs to a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsec.codegen.isa.amx import ALL_FULL, ROWS
from sparsec.codegen.isa.bf16 import pair_words
from sparsec.codegen.kernels.weight_blocks import whole_steps
from sparsec.ir.op_spec import Array

DEPTH = 16  # pairs of a step for AMX


@dataclass(frozen=True, slots=True, eq=False)
class PackedFloats:
    """`words`, and of a sparse weight the steps of every strip and what they read.

    Strip i has steps `starts[i]:starts[i + 1]`. `indices` are the rows of a panel that a step
    reads: one in fp32; in bf16 the row of pairs of its even channel and that of its odd one.
    Weights for AMX have steps of DEPTH pairs, and `tiles`, the shapes of the tile registers.
    """

    words: Array
    starts: Array | None = None
    indices: Array | None = None
    tiles: Array | None = None

    @property
    def named(self) -> dict[str, Array]:
        """The arrays that there are, in the order of the kernels' parameters."""
        names = ("words", "tiles", "starts", "indices")
        found = {name: getattr(self, name) for name in names}
        return {name: array for name, array in found.items() if array is not None}


def pack_dense_bf16(w: Array, strip: int, strips: int) -> PackedFloats:
    """All pairs of channels, `[strip][k / 2][row]`; rows up to whole blocks are zero."""
    rows = _whole_blocks(w, strip * strips).reshape(-1, strip, w.shape[1]).transpose(0, 2, 1)
    return PackedFloats(pair_words(rows[:, 0::2], rows[:, 1::2]).ravel())


def pack_sparse(w: Array, strip: int, strips: int, per_lane: int) -> PackedFloats:
    """The channels of each strip that are not zero in all of its rows.

    `per_lane` is 1 for fp32, 2 for bf16.
    """
    whole = _whole_blocks(w, strip * strips)
    words, indices, starts = [], [], [0]
    for rows in whole.reshape(-1, strip, w.shape[1]):
        used = np.flatnonzero((rows != 0).any(axis=0))
        if per_lane == 1:
            words.append(np.ascontiguousarray(rows[:, used].T, np.float32).ravel())
            indices.append(used)
        else:
            even, odd, present = _paired(used)
            values = [rows[:, c] * there for c, there in zip((even, odd), present, strict=True)]
            words.append(pair_words(values[0].T, values[1].T).ravel())
            indices.append(np.stack([even // 2, odd // 2], axis=-1).ravel())
        starts.append(starts[-1] + len(indices[-1]) // per_lane)
    dtype = np.float32 if per_lane == 1 else np.int32
    # A word more: an empty weight is a weight too.
    return PackedFloats(
        np.concatenate([*words, np.zeros(1, dtype)]),
        np.array(starts, np.int32),
        np.concatenate([*indices, np.zeros(per_lane, np.int64)]).astype(np.uint16),
    )


def pack_dense_tiles(w: Array, strip: int) -> PackedFloats:
    """All pairs of channels for AMX, zeros up to whole strips and steps."""
    whole = _whole_blocks(w, strip)
    whole = np.pad(whole, ((0, 0), (0, -w.shape[1] % (2 * DEPTH))))
    words = pair_words(whole[:, 0::2], whole[:, 1::2]).reshape(-1, strip, whole.shape[1] // 2)
    return PackedFloats(_tiles(words.transpose(0, 2, 1), strip), tiles=ALL_FULL)


def pack_sparse_tiles(w: Array, strip: int) -> PackedFloats:
    """As `pack_sparse` for AMX: a strip has whole steps, filled up with weights of zero."""
    plain = pack_sparse(w, strip, 1, 2)
    assert plain.starts is not None
    assert plain.indices is not None
    starts, place = whole_steps(plain.starts, DEPTH)
    words = np.zeros((starts[-1] * DEPTH, strip), np.int32)
    words[place] = plain.words[:-1].reshape(-1, strip)
    indices = np.zeros((len(words), 2), np.uint16)
    indices[place] = plain.indices[:-2].reshape(-1, 2)
    return PackedFloats(
        np.append(_tiles(words, strip), np.int32(0)),
        starts.astype(np.int32),
        np.append(indices.ravel(), np.uint16(0)),
        ALL_FULL,
    )


def _tiles(words: Array, strip: int) -> Array:
    """`[..., pair][row]` of whole steps as tiles."""
    steps = words.reshape(-1, DEPTH, strip // ROWS, ROWS)
    return np.ascontiguousarray(steps.transpose(0, 2, 3, 1)).ravel()


def _paired(used: Array) -> tuple[Array, Array, tuple[Array, Array]]:
    """Even and odd channels in pairs, and whether each is `used` itself or only fills a pair.

    Neighbours that are both used come together first: one row of pairs serves both.
    """
    even, odd = used[used % 2 == 0], used[used % 2 == 1]
    both = np.intersect1d(even, odd - 1)
    even = np.concatenate([both, np.setdiff1d(even, both)])
    odd = np.concatenate([both + 1, np.setdiff1d(odd, both + 1)])
    count = max(len(even), len(odd))
    present = tuple(np.arange(count) < len(side) for side in (even, odd))
    # What fills a pair is the neighbour of its partner, with a weight of zero.
    even = np.concatenate([even, odd[len(even) :] - 1])
    odd = np.concatenate([odd, even[len(odd) :] + 1])
    return even, odd, (present[0], present[1])


def _whole_blocks(w: Array, rows: int) -> Array:
    padded = np.zeros((-(-len(w) // rows) * rows, w.shape[1]), np.float32)
    padded[: len(w)] = w
    return padded
