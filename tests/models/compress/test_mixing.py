"""What epochs see of a text and of joined phrases."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="compress needs the extra compress")

from sparsec.models.compress.data import Encoded
from sparsec.models.compress.mixing import LONGEST_JOINED, joined, rows, some

FIRST, LAST = 2, 3  # special tokens


def encoded(count: int) -> Encoded:
    """Row r is FIRST, then r % 7 + 1 times the number 10 + r, then LAST."""
    made = [[FIRST, *[10 + r] * (r % 7 + 1), LAST] for r in range(count)]
    starts = np.cumsum([0, *map(len, made)])
    ids = np.concatenate(made).astype(np.int32)
    labels = {"labels": np.arange(count)}
    return Encoded(1, ids, np.zeros(len(ids), np.uint8), starts, labels, pad_id=0)


def test_chosen_rows_are_as_they_were_without_targets() -> None:
    whole = encoded(9)
    part = rows(whole, np.array([4, 0, 8]))
    assert not part.targets
    for at, row in enumerate([4, 0, 8]):
        wanted = whole.ids[whole.starts[row] : whole.starts[row + 1]]
        np.testing.assert_array_equal(part.ids[part.starts[at] : part.starts[at + 1]], wanted)


def test_epochs_of_a_share_go_through_all_of_a_text() -> None:
    whole = encoded(12)
    parts = [some(whole, 0.25, seed=5, epoch=e) for e in range(4)]
    assert [len(p) for p in parts] == [3] * 4
    seen = sorted(int(i) for p in parts for i in np.unique(p.ids) if i >= 10)
    assert seen == list(range(10, 22))
    assert some(whole, 1.0, seed=5, epoch=0) is whole


def test_joined_rows_hold_every_phrase_once_between_one_start_and_one_end() -> None:
    whole = encoded(300)
    made = joined(whole, seed=1, epoch=0)
    assert len(made) < len(whole) / 2
    inside = [made.ids[a:b] for a, b in zip(made.starts[:-1], made.starts[1:], strict=True)]
    assert all(r[0] == FIRST and r[-1] == LAST and (r[1:-1] >= 10).all() for r in inside)
    assert max(map(len, inside)) <= LONGEST_JOINED + 2
    tokens, counts = np.unique(np.concatenate([r[1:-1] for r in inside]), return_counts=True)
    np.testing.assert_array_equal(tokens, np.arange(10, 310))
    np.testing.assert_array_equal(counts, np.arange(300) % 7 + 1)


def test_joined_rows_depend_on_seed_and_epoch_alone() -> None:
    whole = encoded(50)
    again = joined(whole, seed=1, epoch=2)
    np.testing.assert_array_equal(joined(whole, seed=1, epoch=2).ids, again.ids)
    assert joined(whole, seed=1, epoch=3).ids.tolist() != again.ids.tolist()
