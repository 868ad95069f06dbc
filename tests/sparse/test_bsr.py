"""Block sparse rows against element-by-element definitions, with sizes around the block edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsec.errors import InvalidInput
from sparsec.sparse.bsr import BLOCK_SHAPES, BsrMatrix, block_mask, block_zeros

Array = NDArray[Any]
SIZES = [(1, 1), (3, 5), (4, 4), (5, 4), (7, 9), (64, 32), (65, 31)]


def sparse(shape: tuple[int, int], rng: np.random.Generator) -> Array:
    w = rng.standard_normal(shape).astype(np.float32)
    w[rng.random(shape) < 0.8] = 0.0
    return w


def blocks_of(w: Array, rows: int, cols: int) -> list[Array]:
    """All blocks, row-major, edge blocks cut off."""
    return [
        w[r : r + rows, c : c + cols]
        for r in range(0, w.shape[0], rows)
        for c in range(0, w.shape[1], cols)
    ]


@pytest.mark.parametrize("block", BLOCK_SHAPES, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("shape", SIZES)
def test_round_trip(
    shape: tuple[int, int], block: tuple[int, int], rng: np.random.Generator
) -> None:
    w = sparse(shape, rng)
    bsr = BsrMatrix.from_dense(w, *block)
    np.testing.assert_array_equal(bsr.to_dense(), w)
    assert bsr.to_dense().dtype == w.dtype
    blocks = blocks_of(w, *block)
    nonzero = sum(bool(piece.any()) for piece in blocks)
    assert bsr.data.shape == (nonzero, *block)
    assert bsr.indptr[-1] == len(bsr.indices) == nonzero
    assert bsr.row_lengths.sum() == nonzero
    assert bsr.density == nonzero / len(blocks)


def test_members_of_a_known_matrix() -> None:
    w = np.array([[0, 0, 1], [0, 0, 2], [0, 0, 0], [0, 0, 0], [3, 0, 4]], np.int8)
    bsr = BsrMatrix.from_dense(w, 2, 1)
    assert bsr.block == (2, 1)
    assert bsr.shape == (5, 3)
    assert bsr.indptr.tolist() == [0, 1, 1, 3]
    assert bsr.indices.tolist() == [2, 0, 2]
    assert bsr.data.reshape(-1, 2).tolist() == [[1, 2], [3, 0], [4, 0]]  # 0: padding
    assert bsr.row_lengths.tolist() == [1, 0, 2]


@pytest.mark.parametrize("value", [0, 1])
def test_all_zero_and_full(value: int) -> None:
    w = np.full((6, 6), value, np.float32)
    bsr = BsrMatrix.from_dense(w, 4, 4)
    assert bsr.density == value
    np.testing.assert_array_equal(bsr.to_dense(), w)


def test_nan_and_minus_zero() -> None:
    w = np.array([[np.nan, -0.0]], np.float32)
    assert BsrMatrix.from_dense(w, 1, 1).indices.tolist() == [0]  # NaN is kept, -0 is a zero


@pytest.mark.parametrize("block", BLOCK_SHAPES, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("shape", SIZES)
def test_block_zeros_counts_zero_blocks(
    shape: tuple[int, int], block: tuple[int, int], rng: np.random.Generator
) -> None:
    w = sparse(shape, rng)
    blocks = blocks_of(w, *block)
    zero = sum(not piece.any() for piece in blocks)
    assert block_zeros(w, [block])[block] == pytest.approx(zero / len(blocks), abs=1e-12)


def test_block_zeros_default_shapes() -> None:
    assert set(block_zeros(np.eye(64))) == set(BLOCK_SHAPES)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (1, 4), (4, 4), (16, 4)])
@pytest.mark.parametrize("shape", [(16, 16), (17, 15), (64, 32)])
def test_block_mask_drops_the_smallest_blocks(
    shape: tuple[int, int], block: tuple[int, int], sparsity: float, rng: np.random.Generator
) -> None:
    w = rng.standard_normal(shape).astype(np.float32)
    mask = block_mask(w, *block, sparsity)
    assert mask.shape == w.shape
    kept = [bool(piece.all()) for piece in blocks_of(mask, *block)]
    assert kept == [bool(piece.any()) for piece in blocks_of(mask, *block)]  # never half a block
    assert kept.count(False) == round(sparsity * len(kept))
    sums = [float(np.abs(piece.astype(np.float64)).sum()) for piece in blocks_of(w, *block)]
    dropped = [s for s, k in zip(sums, kept, strict=True) if not k]
    stayed = [s for s, k in zip(sums, kept, strict=True) if k]
    assert max(dropped, default=0.0) <= min(stayed, default=np.inf)


def test_equal_blocks_go_in_order() -> None:
    w = np.ones((2, 4), np.float32)
    mask = block_mask(w, 1, 1, 3 / 8)
    assert mask.tolist() == [[False, False, False, True], [True, True, True, True]]
    w[0, 0] = 2.0  # larger than the rest: the next ones go instead
    mask = block_mask(w, 1, 1, 3 / 8)
    assert mask.tolist() == [[True, False, False, False], [True, True, True, True]]


def test_errors() -> None:
    w = np.ones((4, 4), np.float32)
    with pytest.raises(InvalidInput, match="0 to 1"):
        block_mask(w, 1, 1, 1.5)
    with pytest.raises(InvalidInput, match="0 to 1"):
        block_mask(w, 1, 1, float("nan"))
    with pytest.raises(InvalidInput, match="not 0x4"):
        BsrMatrix.from_dense(w, 0, 4)
    with pytest.raises(InvalidInput, match="two axes"):
        block_zeros(w[0])
