"""Block sparse rows in plain NumPy: what the zeros of a weight are, and pruning to blocks.

Weights are `[out, in]` everywhere here, and a block `rows x cols` is output x input channels.
A matrix that blocks do not divide is padded with zeros on its lower and right edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.errors import InvalidInput

Matrix = NDArray[Any]
Mask = NDArray[np.bool_]

# The block shapes that pruners and our kernels use.
BLOCK_SHAPES: tuple[tuple[int, int], ...] = (
    (1, 1), (1, 4), (4, 1), (4, 4), (8, 1), (8, 4), (16, 1), (16, 4), (32, 1), (32, 4), (64, 1),
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class BsrMatrix:
    """A matrix that stores only its non-zero blocks, block row by block row.

    Block row i owns blocks `indptr[i]:indptr[i + 1]`; `indices` holds their block columns in
    rising order and `data` their values `[blocks, rows, cols]`.
    """

    shape: tuple[int, int]
    indptr: NDArray[np.int32]
    indices: NDArray[np.int32]
    data: Matrix

    @staticmethod
    def from_dense(w: Matrix, rows: int, cols: int) -> BsrMatrix:
        """Keep the blocks of `w` that hold any value that is not zero."""
        blocks = _blocks(w, rows, cols)
        kept = _nonzero(blocks)
        indptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
        block_row, block_col = np.nonzero(kept)
        data = np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)[block_row, block_col])
        return BsrMatrix((w.shape[0], w.shape[1]), indptr, block_col.astype(np.int32), data)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of one block."""
        return self.data.shape[1], self.data.shape[2]

    @property
    def row_lengths(self) -> NDArray[np.int32]:
        """Stored blocks of each block row."""
        return np.diff(self.indptr)

    @property
    def density(self) -> float:
        """Share of blocks that are stored; 0 for a matrix without blocks."""
        block_columns = -(-self.shape[1] // self.block[1])
        total = len(self.row_lengths) * block_columns
        return len(self.indices) / total if total else 0.0

    def to_dense(self) -> Matrix:
        """Return the matrix with its zeros written out."""
        rows, cols = self.block
        block_columns = -(-self.shape[1] // cols)
        blocks = np.zeros((len(self.row_lengths), block_columns, rows, cols), self.data.dtype)
        block_row = np.repeat(np.arange(len(self.row_lengths)), self.row_lengths)
        blocks[block_row, self.indices] = self.data
        padded = blocks.transpose(0, 2, 1, 3).reshape(blocks.shape[0] * rows, block_columns * cols)
        return np.ascontiguousarray(padded[: self.shape[0], : self.shape[1]])


def block_mask(w: Matrix, rows: int, cols: int, sparsity: float) -> Mask:
    """Return which values of `w` survive magnitude pruning in `rows x cols` blocks.

    The round(sparsity * blocks) blocks of the smallest sum of magnitudes go; between equal
    sums the first ones in row-major order go, so the answer depends on the values alone.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise InvalidInput(f"sparsity is a share from 0 to 1, not {sparsity}")
    # float64 sums of a block's float32 magnitudes are exact enough not to depend on their order.
    blocks = np.abs(_blocks(w, rows, cols))
    kept = _keep_largest(blocks.sum(axis=(1, 3), dtype=np.float64), sparsity)
    spread = np.repeat(np.repeat(kept, rows, axis=0), cols, axis=1)
    mask: Mask = spread[: w.shape[0], : w.shape[1]]
    return mask


def block_zeros(
    w: Matrix, shapes: Sequence[tuple[int, int]] = BLOCK_SHAPES
) -> dict[tuple[int, int], float]:
    """Return for each block shape the share of blocks that hold nothing but zeros."""
    values = np.asarray(w) != 0
    zeros = {}
    for rows, cols in shapes:
        kept = _nonzero(_blocks(values, rows, cols))
        zeros[rows, cols] = float(1.0 - kept.mean()) if kept.size else 0.0
    return zeros


def _blocks(w: Matrix, rows: int, cols: int) -> Matrix:
    """View `w` as `[block row, row, block column, column]`, padded to whole blocks."""
    if w.ndim != 2:
        raise InvalidInput(f"a block sparse weight has two axes [out, in], not {w.shape}")
    if rows < 1 or cols < 1:
        raise InvalidInput(f"a block has at least one row and one column, not {rows}x{cols}")
    below, right = -w.shape[0] % rows, -w.shape[1] % cols
    if below or right:
        w = np.pad(w, ((0, below), (0, right)))
    return w.reshape(w.shape[0] // rows, rows, w.shape[1] // cols, cols)


def _nonzero(blocks: Matrix) -> Mask:
    """Which blocks hold a value that is not zero (NaN is not zero)."""
    kept: Mask = (blocks != 0).any(axis=(1, 3))
    return kept


def _keep_largest(scores: NDArray[np.float64], sparsity: float) -> Mask:
    """Drop the round(sparsity * size) smallest scores, first ones first between equals."""
    drop = round(sparsity * scores.size)
    if drop == 0:
        return np.ones(scores.shape, np.bool_)
    threshold = np.partition(scores, drop - 1, axis=None)[drop - 1]
    kept: Mask = scores > threshold
    equal = np.flatnonzero(scores == threshold)
    dropped = scores.size - np.count_nonzero(kept)  # so far: all equals dropped too
    kept.reshape(-1)[equal[len(equal) - (dropped - drop) :]] = True
    return kept
