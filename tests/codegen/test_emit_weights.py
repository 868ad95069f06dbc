"""The weights' object file: aligned, without repetition, the same every time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.pack_weights import ALIGNMENT, PAGE, write_weights
from sparsec.codegen.program import Weight

Array = np.ndarray[Any, Any]


def _write(arrays: list[Array], path: Path) -> tuple[tuple[int, ...], bytes, str]:
    weights = [Weight(f"w{i}", a) for i, a in enumerate(arrays)]
    blob = write_weights(weights, path)
    data = path.read_bytes()[PAGE : PAGE + blob.nbytes]
    return blob.offsets, data, blob.digest


def test_every_weight_is_where_its_offset_says(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = [
        rng.standard_normal((7, 5)).astype(np.float32),
        rng.integers(-128, 128, 1001).astype(np.int8),
        np.array(3.5),
        np.array([True, False, True]),
        rng.standard_normal((6, 4)).T,  # not contiguous
        np.arange(5, dtype=">i4"),  # big-endian
    ]
    offsets, data, digest = _write(arrays, tmp_path / "w.o")
    for array, offset in zip(arrays, offsets, strict=True):
        assert offset % ALIGNMENT == 0
        stored = np.frombuffer(data, array.dtype.newbyteorder("<"), array.size, offset)
        np.testing.assert_array_equal(stored.reshape(array.shape), array)
    assert digest == hashlib.blake2b(data, digest_size=16).hexdigest()


def test_equal_bytes_are_stored_once(tmp_path: Path, rng: np.random.Generator) -> None:
    a = rng.standard_normal((64, 64)).astype(np.float32)
    same_ends = a.copy()
    same_ends[32, 32] += 1  # differs from `a` beyond the first and last page only
    offsets, data, _ = _write([a, a.copy(), same_ends, a.reshape(-1)], tmp_path / "w.o")
    assert offsets == (0, 0, a.nbytes, 0)
    assert len(data) == 2 * a.nbytes


@pytest.mark.parametrize("arrays", [[], [np.zeros(0, np.float32)]])
def test_nothing_to_store(tmp_path: Path, arrays: list[Array]) -> None:
    offsets, data, _ = _write(arrays, tmp_path / "w.o")
    assert offsets == (0,) * len(arrays)
    assert data == b""


def test_same_weights_same_file(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = [rng.standard_normal(100), rng.standard_normal(7)]
    files = [tmp_path / "a.o", tmp_path / "b.o"]
    for file in files:
        _write(arrays, file)
    assert files[0].read_bytes() == files[1].read_bytes()
