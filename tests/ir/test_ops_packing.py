"""What is packed, and that attention over packed tokens is attention over each sequence."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import symbol
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType, TensorType

LOWEST = np.finfo(np.float32).min


def pack(real: list[list[int]], mask: np.ndarray | None = None, *, keep_first: bool = False):
    kept = np.array(real, bool)
    scores = np.where(kept, 0, LOWEST).astype(np.float32) if mask is None else mask
    attrs = {"tokens": symbol("tokens"), "most": kept.size, "seen": LOWEST / 2}
    results = OPS["pack_tokens"].evaluate([kept, scores], {**attrs, "keep_first": keep_first}, {})
    return [r.tolist() for r in results]


def test_real_tokens_come_in_order_and_know_their_sequence():
    count, index, sequence, starts, place = pack([[1, 1, 0], [0, 1, 1], [1, 0, 1]])
    assert count == 6
    assert index == [0, 1, 4, 5, 6, 8]
    assert sequence == [0, 0, 1, 1, 2, 2]
    assert starts == [0, 2, 4, 6]
    assert place == [[0, 1, -1], [-1, 2, 3], [4, -1, 5]]


def test_a_sequence_without_a_real_token_is_kept_and_has_no_place():
    count, index, sequence, starts, place = pack([[0, 0], [1, 0]])
    assert (count, index, sequence, starts) == (3, [0, 1, 2], [0, 0, 1], [0, 2, 3])
    assert place == [[-1, -1], [2, -1]]


def test_a_sequence_is_kept_whose_real_keys_are_hidden_too():
    mask = np.array([[LOWEST, LOWEST, LOWEST], [np.nan, LOWEST, LOWEST]], np.float32)
    assert pack([[1, 1, 0], [1, 0, 0]], mask)[0] == 6


def test_the_first_token_is_kept_where_it_is_read():
    count, index, _, starts, place = pack([[0, 1], [1, 0]], keep_first=True)
    assert (count, index, starts) == (3, [0, 1, 2], [0, 2, 3])
    assert place == [[-1, 1], [2, -1]]


def test_unpacked_padding_is_zero():
    x = np.arange(6, dtype=np.float32).reshape(1, 3, 2) + 1
    place = np.array([[2, -1], [-1, 0]])
    (y,) = OPS["unpack_tokens"].evaluate([x, np.array([3, 2, 0]), place], {}, {})
    np.testing.assert_array_equal(y, [[[5, 6], [0, 0]], [[0, 0], [1, 2]]])


@pytest.mark.parametrize("op", ["attention", "attention_int8"])
def test_attention_of_packed_tokens_is_that_of_each_sequence(op: str, rng: np.random.Generator):
    attrs = {"heads": 2, "head_size": 4, "scale": 0.5, "q_offset": 0, "k_offset": 8}
    attrs |= {"v_offset": 16, "longest": 5}
    attrs |= {f"{x}_scale": 0.01 for x in "qkv"} if op == "attention_int8" else {}
    starts = np.array([0, 3, 4, 9])
    x = rng.standard_normal((1, 9, 24)).astype(np.float32)
    if op == "attention_int8":
        x = rng.integers(0, 256, x.shape).astype(np.uint8)
    mask = rng.standard_normal((1, 1, 1, 9)).astype(np.float32)
    sequence = np.repeat([0, 1, 2], np.diff(starts))
    (y,) = OPS[op].evaluate([x, x, x, mask, sequence, starts], attrs, {})
    for a, b in pairwise(starts):
        part = x[:, a:b]
        (alone,) = OPS[op].evaluate([part, part, part, mask[..., a:b]], attrs, {})
        np.testing.assert_array_equal(y[:, a:b], alone)


def test_packed_attention_needs_all_of_its_lists():
    x, tokens = TensorType(DType.F32, (1, 9, 24)), TensorType(DType.I64, (9,))
    attrs = {"heads": 2, "head_size": 4, "scale": 0.5, **{f"{n}_offset": 0 for n in "qkv"}}
    with pytest.raises(InvalidGraph, match="longest"):
        OPS["attention"].infer([x, x, x, None, tokens, tokens], attrs)
    with pytest.raises(InvalidGraph, match="starts"):
        OPS["attention"].infer([x, x, x, None, tokens], {**attrs, "longest": 9})
